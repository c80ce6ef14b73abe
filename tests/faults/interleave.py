"""A saver that is called in a random order, beside a plain model of what must be on the disk after each call."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, NoReturn

import pytest
import torch
from torch import nn

from tests.faults.judge import Case, Reference, Tally, workspace
from tests.faults.server import Server
from tests.faults.trap import Emit, Plan
from trainkit import SpentStateError, TrainState, init_state, make_train_step
from trainkit.execution import compile_step
from trainkit.io import checkpoint
from trainkit.losses import classification, module_loss
from trainkit.optim import adamw

_RUN, _BATCH = "run", 8
_WORDS = "File too large"
CALLS = Case("calls", "tests.faults.interleave:act")
ENDS = {"close": 0, "fall off": 0, "exit": 3, "raise": 1}
"""How a process ends, and its exit code when nothing else is wrong."""


def interleavings(
    server: Server, case: Case, reference: Reference, *, number: int, seed: int = 0, only: int | None = None
) -> Tally:
    """Let processes call a saver in random orders and end in one of several ways; look at what they left.

    Args:
        server: runs the case.
        case: calls :func:`act`.
        reference: not needed: the model says what must be there.
        number: how many orders.
        seed: of all draws.
        only: replay one order alone.
    """
    tally = Tally()
    for i in range(number) if only is None else [only]:
        with workspace() as root:
            arguments = {**case.arguments, "folder": str(root / "run"), "seed": f"{seed} {i}", "most": 14}
            outcome = server.run(case.program, arguments, Plan(trace=False))
            left = server.run("tests.faults.interleave:look", {"folder": str(root / "run")}, Plan(trace=False))
            tally.note(f"interleavings/{case.name}/{i} ({_order(outcome.messages)})", _problems(outcome, left))
    return tally


def _order(messages: list[dict[str, Any]]) -> str:
    return ", ".join(message["call"] for message in messages if "call" in message)


def _problems(outcome: Any, left: Any) -> list[str]:
    if outcome.is_hung:
        return ["hung"]
    expected = outcome.told("expected")[-1]
    if outcome.code != expected["code"]:
        return [f"wrong: code {outcome.code}, expected {expected['code']}\n{outcome.stderr}"]
    if (_WORDS in outcome.stderr) != expected["error"]:
        return [f"wrong: an error that nobody fetched: {expected['error']}\n{outcome.stderr}"]
    if left.code:
        return [f"wrong: what is left cannot be read\n{left.stderr}"]
    (found,) = left.told("found")
    return [] if found == expected["disk"] else [f"wrong: on the disk is {found}, expected {expected['disk']}"]


def act(emit: Emit, *, folder: str, seed: str = "", most: int = 0) -> None:
    """Call a saver up to ``most`` times in an order drawn from ``seed``, then end this process as drawn.

    Tells each ``call`` before it is made, and after it what is ``expected``: the code with which the process would end
    now, whether it would print an error, and on the disk the digest of each checkpoint.
    """
    random = Random(seed)
    _make_the_disk_slow(Random(seed))
    actor = _Actor(emit, Path(folder), random, keep=random.choice((1, 2, None)))
    for _ in range(random.randint(0, most)):
        actor.call(random.choice(_ACTIONS))
    actor.end(random.choice(list(ENDS)) if most else "close")
    emit(final={})


def look(emit: Emit, *, folder: str) -> None:
    """Tell the digest of each checkpoint in a folder, whose every byte is verified, and that nothing else is there."""
    found = {}
    for path in checkpoint.checkpoints(folder):
        restored = checkpoint.load(path, _new_state())
        found[path.name] = _digest(restored.state, restored.cursor)
    others = {path.name.partition(".abandoned-")[0] for path in Path(folder).iterdir()} - {*found, ".lock"}
    assert not [name for name in others if not name.startswith("checkpoint-")], f"there are also {sorted(others)}"
    emit(found=found)


def warm_up() -> None:
    """Make what all actors use, once in the process that they are forked from."""
    state = _new_state()
    state, _ = _STEP(state, _batch(0))
    _DONATING(state, _batch(0))


def _make_the_disk_slow(random: Random) -> None:
    """So that calls meet saves that are on their way."""
    real = os.fsync

    def fsync(descriptor: Any) -> None:
        time.sleep(random.choice((0, 0, 0.0005, 0.003)))
        real(descriptor)

    os.fsync = fsync


_MODULE = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.2), nn.Linear(16, 4))
_OPTIMIZER = adamw(0.01)
_STEP = make_train_step(module_loss(_MODULE, classification, inputs="x", targets="y"), _OPTIMIZER)
_DONATING = compile_step(_STEP, strategy="eager")


def _new_state() -> TrainState:
    return init_state(_MODULE, _OPTIMIZER, seed=3)


def _batch(number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    rows = torch.randn(_BATCH, 6, generator=generator)
    return {"x": rows, "y": torch.randint(4, (_BATCH,), generator=generator)}


def _digest(state: TrainState, cursor: Any) -> str:
    digest = hashlib.sha256(json.dumps(cursor).encode())
    for leaf in torch.utils._pytree.tree_leaves(state):
        digest.update(leaf.numpy().tobytes())
    return digest.hexdigest()


Disk = dict[str, tuple[int, int, str]]
"""Step, place in the order of saving and digest, by name."""


class _Actor:
    """A run that calls its saver in any order, and the model that it is compared with."""

    def __init__(self, emit: Emit, folder: Path, random: Random, keep: int | None) -> None:
        self.emit, self.folder, self.random, self.keep = emit, folder, random, keep
        self.state, self.cursor = _new_state(), {"rows": [0]}
        self.disk: Disk = {}
        self.flight: tuple[int, str] | None = None
        self.fails = False
        self.saves = 0
        self.last: Path | None = None
        self.warned: list[str] = []
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: self.warned.append(str(message))
        self.saver = self._opened()
        self._expect(0)

    def call(self, name: str) -> None:
        self.emit(call=name)
        getattr(self, f"_{name.replace(' ', '_')}")()
        running = [thread.name for thread in threading.enumerate()].count("checkpoint")
        assert running <= (self.flight is not None), f"{running} saves are on their way"
        assert not self.warned, f"warned: {self.warned}"
        self._expect(0)

    def end(self, how: str) -> None:
        """End the process; the model says how the disk looks then."""
        self.emit(call=how)
        if how == "close":
            self._close()
        self._expect(ENDS[how])
        if how == "exit":
            sys.exit(ENDS[how])
        if how == "raise":
            raise ZeroDivisionError

    def _expect(self, code: int) -> None:
        """Tell how everything has to look if the process ends now, waiting for what is on its way."""
        before = dict(self.disk)
        error = self._landed()
        told = {"code": code, "error": error, "disk": {name: digest for name, (_, _, digest) in self.disk.items()}}
        self.emit(expected=told)
        self.disk = before

    def _landed(self) -> bool:
        """What the disk holds once the save that is on its way has ended; whether that one fails."""
        if self.flight is None or self.fails:
            return self.fails
        step, digest = self.flight
        name = f"checkpoint-{step}"
        self.saves += 1
        self.disk[name] = (step, self.saves, digest)
        order = sorted(self.disk, key=lambda each: self.disk[each][:2])
        stay = {name, *(order if self.keep is None else order[-self.keep :])}
        self.disk = {each: self.disk[each] for each in order if each in stay}
        return False

    def _collecting(self, call: Callable[[], Any]) -> bool:
        """Make a call that waits for the save on its way; whether that one failed, which the call must have raised."""
        landed, failed = self.flight, self._landed()
        raised = ""
        try:
            call()
        except checkpoint.CheckpointError as error:
            raised = str(error)
        assert (_WORDS in raised) if failed else not raised, f"raised {raised!r}, a failed save: {failed}"
        if landed is not None and not failed:
            self.last = self.folder / f"checkpoint-{landed[0]}"
        self.flight, self.fails = None, False
        return failed

    def _opened(self, resumed_from: Path | None = None) -> checkpoint.Saver:
        self.last = None
        rules = checkpoint.Retention(last=self.keep)
        return checkpoint.Saver(self.folder, keep=rules, run_id=_RUN, resumed_from=resumed_from)

    def _next_batch(self) -> dict[str, torch.Tensor]:
        self.cursor["rows"].append(int(self.state.step))
        return _batch(int(self.state.step))

    def _step(self) -> None:
        before, batch = self.state, self._next_batch()
        digest = _digest(before, None)
        self.state, _ = _STEP(before, batch)
        assert _digest(before, None) == digest, "a step changed the state that it was given"

    def _donating_step(self) -> None:
        before = self.state
        self.state, _ = _DONATING(before, self._next_batch())
        with pytest.raises(SpentStateError):
            _ = before.params

    def _save(self) -> None:
        taken = (int(self.state.step), _digest(self.state, self.cursor))
        if not self._collecting(lambda: self.saver.save(self.state, cursor=self.cursor)):
            self.flight = taken
        # Whatever becomes of them now is not in the file.
        self.cursor["rows"].append(-1)

    def _failing_save(self) -> None:
        self._wait()
        taken = (int(self.state.step), _digest(self.state, self.cursor))
        with _small_files():
            self.saver.save(self.state, cursor=self.cursor)
            # Until the writer has met it; what it raised waits for the next call.
            for thread in threading.enumerate():
                if thread.name == "checkpoint":
                    thread.join()
        self.flight, self.fails = taken, True

    def _wait(self) -> None:
        self._collecting(self.saver.wait)
        assert self.saver.last == self.last, f"the last is {self.saver.last}, expected {self.last}"

    def _blocking_save(self) -> None:
        self._wait()
        step, digest = int(self.state.step), _digest(self.state, None)
        checkpoint.save(self.folder, self.state)
        self.saves += 1
        self.disk[f"checkpoint-{step}"] = (step, self.saves, digest)

    def _load(self) -> None:
        """The newest one, be the save on its way in time or not; sometimes the run goes on from there."""
        allowed = [self._newest()]
        before, saves = dict(self.disk), self.saves
        self._landed()
        allowed.append(self._newest())
        self.disk, self.saves = before, saves
        restored = checkpoint.load_latest(self.folder, _new_state())
        found = None if restored is None else _digest(restored.state, restored.cursor)
        assert found in allowed, f"loaded {found}, expected one of {allowed}"
        if restored is not None and self.random.random() < 0.5:
            self.state, self.cursor = restored.state, restored.cursor or {"rows": []}

    def _newest(self) -> str | None:
        return max(self.disk.values(), default=(0, 0, None), key=lambda entry: entry[:2])[2]

    def _close(self) -> None:
        self._collecting(self.saver.close)

    def _close_and_open(self) -> None:
        self._close()
        self.saver = self._opened()

    def _go_back(self) -> None:
        """Go on from any checkpoint: the newer ones are no checkpoints any more, and a warning names them."""
        self._close()
        if not self.disk:
            self.saver = self._opened()
            return
        name = self.random.choice(list(self.disk))
        restored = checkpoint.load(self.folder / name, _new_state())
        self.state, self.cursor = restored.state, restored.cursor or {"rows": []}
        newer = [each for each in self.disk if self.disk[each][:2] > self.disk[name][:2]]
        self.saver = self._opened(resumed_from=restored.path)
        assert len(self.warned) == bool(newer) and all(f"{each} is {each}." in self.warned[0] for each in newer)
        self.warned.clear()
        self.disk = {each: entry for each, entry in self.disk.items() if each not in newer}

    def _leave_by_an_error(self) -> None:
        """The error that ends the scope of a saver goes on; that of the writer is a warning beside it."""
        failed = self._landed()
        try:
            with self.saver:
                _raise()
        except ZeroDivisionError:
            self.flight, self.fails = None, False
        assert len(self.warned) == failed, f"warned: {self.warned}"
        self.warned.clear()
        self.saver = self._opened()


_ACTIONS = (
    "step", "donating step", "save", "save", "save", "failing save", "wait", "blocking save", "load",
    "close and open", "leave by an error", "go back",
)  # fmt: skip


def _raise() -> NoReturn:
    raise ZeroDivisionError


@contextmanager
def _small_files() -> Iterator[None]:
    """No file may grow beyond 100 bytes: the system refuses writes, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
