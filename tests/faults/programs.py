"""The training runs that faults are tried on: small, deterministic, saving often, and telling all they do.

Each uses dropout, AdamW and a shuffled or streamed source whose position is a cursor. What a run tells: ``resumed`` (at
which step), ``step`` with ``loss`` (exact), ``saved`` (announced as durable), ``warning``, and at its end ``final``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.callback import on_compile_start

from tests.faults import mutations
from tests.faults.trap import Emit
from trainkit import TrainState, evaluate, init_state, make_eval_step, make_train_step, run
from trainkit.execution import compile_step
from trainkit.execution.compile import Strategy
from trainkit.io import checkpoint
from trainkit.io.data.loader import Loader
from trainkit.io.signals import EXIT_PREEMPTED, stop_on
from trainkit.losses import classification, module_loss
from trainkit.optim import Transform, adamw

torch.set_num_threads(1)

_ROWS, _FEATURES, _CLASSES, _BATCH, _SEED = 40, 6, 4, 8, 3


def train(
    emit: Emit,
    *,
    folder: str,
    kind: str = "map",
    saves: str = "background",
    steps: int = 12,
    every: int = 2,
    keep: int = 2,
    pause: float = 0.0,
    audit: bool = False,
    mutation: str = "",
    strategy: Strategy = "eager",
    stop_in: str = "",
    stop_at: int = 0,
) -> None:
    """Train to step ``steps``, from the newest whole checkpoint if there is one. SIGTERM ends it after a save.

    Args:
        emit: tells the supervisor.
        folder: of the run.
        kind: of data: "map", "stream", "workers".
        saves: "background", "waiting" (for each save, so that calls come in the same order each time) or "plain" (the
            function ``save``, which removes nothing).
        steps: where to stop.
        every: steps between saves.
        keep: how many checkpoints stay.
        pause: seconds that a step takes longer.
        audit: whether to tell ``unpickled`` for each name that is looked up by an unpickler.
        mutation: which rule is broken, see :mod:`tests.faults.mutations`.
        strategy: how the step is compiled.
        stop_in: a part of a step in which SIGTERM comes, of ``PARTS``; "" for none.
        stop_at: when it comes for the how manieth time, from 1.
    """
    mutations.apply(mutation)
    if audit:
        sys.addaudithook(lambda event, names: emit(unpickled=names) if event == "pickle.find_class" else None)
    warnings.showwarning = lambda message, *_: emit(warning=f"{type(message).__name__}: {message}")
    torch.manual_seed(_SEED)
    enter = _asking(emit, stop_in, stop_at)
    layers = nn.Linear(_FEATURES, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, _CLASSES), _Entered(enter)
    module = nn.Sequential(*layers)
    optimizer = _entered(adamw(0.01), enter)
    loss = module_loss(module, classification, inputs="x", targets="y")
    step = compile_step(make_train_step(loss, optimizer), strategy=strategy)
    state = init_state(module, optimizer, seed=_SEED)
    loader, test = _loader(kind, steps), list(_loader("map", 1))
    history: list[str] = []
    is_stopped = False
    restored = checkpoint.load_latest(folder, state)
    if restored is not None:
        state, history = restored.state, restored.metadata["losses"]
        loader.load_state_dict(restored.cursor)
    emit(resumed=0 if restored is None else restored.step, process=os.getpid())
    # The writer ends within the scope of the signal, which may come again while it does.
    with stop_on() as stop, _Writer(emit, folder, saves, keep, restored) as writer:
        for record in run(step, state, loader):
            state = record.state
            history.append(float(record.metrics["loss"].compute()).hex())
            emit(step=record.step, loss=history[-1])
            time.sleep(pause)
            if record.step % every == 0:
                evaluate(make_eval_step(loss), state, test)
            # Asked once: a request that came between a save and the end would lose the steps before it.
            is_stopped = bool(stop)
            if record.step % every == 0 or record.step == steps or is_stopped:
                writer.save(state, cursor=loader.state_dict(), metadata={"losses": history})
            if is_stopped:
                break
    if is_stopped and len(history) < steps:
        sys.exit(EXIT_PREEMPTED)
    emit(final=_final(Path(folder), state, history))


def warm_up() -> None:
    """Train once in this process, so that those forked off it find everything imported and looked up."""
    with tempfile.TemporaryDirectory() as folder:
        train(lambda **message: None, folder=folder, saves="plain", steps=4)
        train(lambda **message: None, folder=folder, saves="plain", steps=6)


PARTS = ("compile", "forward", "backward", "update", "evaluation")
Enter = Callable[[str], None]
"""Is called in each of ``PARTS``."""


def _asking(emit: Emit, part: str, at: int) -> Enter:
    """Send SIGTERM to this process when it enters a part for the ``at``-th time, and tell that it was ``asked``."""
    times = 0

    def enter(entered: str) -> None:
        nonlocal times
        times += entered == part
        if entered == part and times == at:
            emit(asked=part)
            os.kill(os.getpid(), signal.SIGTERM)

    if part == "compile":
        on_compile_start(lambda _: enter("compile"))
    return enter


class _Entered(nn.Module):
    """Gives what it gets, and says when it does, and when the gradient comes back."""

    def __init__(self, enter: Enter) -> None:
        super().__init__()
        self._enter = enter

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return x
        self._enter("forward" if torch.is_grad_enabled() else "evaluation")
        if x.requires_grad:
            x.register_hook(lambda _: self._enter("backward"))
        return x


def _entered(optimizer: Transform, enter: Enter) -> Transform:
    def apply(*args: Any, **extra: Any) -> Any:
        if not torch.compiler.is_compiling():
            enter("update")
        return optimizer.apply(*args, **extra)

    return dataclasses.replace(optimizer, apply=apply)


class _Writer:
    """Saves one way or another, and tells what was announced."""

    def __init__(self, emit: Emit, folder: str, saves: str, keep: int, restored: checkpoint.Restored | None) -> None:
        self._emit, self._folder, self._saves = emit, folder, saves
        self._told = -1 if restored is None else restored.step
        rules = checkpoint.Retention(last=keep)
        path = None if restored is None else restored.path
        self._open: Any = (
            checkpoint.Lock(folder) if saves == "plain" else checkpoint.Saver(folder, keep=rules, resumed_from=path)
        )

    def save(self, state: TrainState, **rest: Any) -> None:
        if self._saves == "plain":
            self._tell(checkpoint.save(self._folder, state, **rest))
            return
        self._open.save(state, **rest)
        if self._saves == "waiting":
            self._open.wait()
        self._tell(self._open.last)

    def _tell(self, path: Path | None) -> None:
        step = -1 if path is None else int(path.name.partition("-")[2])
        if step > self._told:
            self._told = step
            self._emit(saved=step)

    def __enter__(self) -> _Writer:
        self._open.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)
        if self._saves != "plain":
            self._tell(self._open.last)


class _Numbers:
    """A stream that knows where it is: the rows in a fixed order, each epoch."""

    def __init__(self, columns: dict[str, Tensor]) -> None:
        self._columns, self._next = columns, 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while self._next < _ROWS:
            self._next += 1
            yield {name: column[self._next - 1] for name, column in self._columns.items()}
        self._next = 0

    def state_dict(self) -> dict[str, int]:
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._next = state["next"]


def _loader(kind: str, steps: int) -> Loader:
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(_ROWS, _FEATURES, generator=generator)
    columns = {"x": rows, "y": torch.randint(_CLASSES, (_ROWS,), generator=generator)}
    if kind == "stream":
        return Loader(_Numbers(columns), batch_size=_BATCH, window=2 * _BATCH, seed=_SEED, batches=steps)
    return Loader(columns, batch_size=_BATCH, seed=_SEED, workers=2 if kind == "workers" else 0, batches=steps)


def _final(folder: Path, state: TrainState, history: list[str]) -> dict[str, Any]:
    """The end of a run as values that can be compared: each tensor's bits, the position, the log, the files."""
    newest = checkpoint.latest(folder)
    assert newest is not None
    files = ("model.safetensors", "training.safetensors", "training.json")
    digest = hashlib.sha256()
    for leaf in torch.utils._pytree.tree_leaves(state):
        digest.update(leaf.numpy().tobytes())
    return {
        "state": digest.hexdigest(),
        "history": history,
        "newest": newest.name,
        "files": {name: hashlib.sha256((newest / name).read_bytes()).hexdigest() for name in files},
        "leftovers": sorted(path.name for path in folder.iterdir() if path.name.startswith((".staging", ".trash"))),
    }
