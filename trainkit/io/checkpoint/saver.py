"""Saving in the background: a run waits for a copy of its state and goes on while it is written."""

from __future__ import annotations

import functools
import os
import secrets
import signal
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from trainkit.io.checkpoint import commit, files, listing, loader, lock, writer
from trainkit.io.checkpoint.errors import CheckpointError, CheckpointWarning
from trainkit.io.checkpoint.host import Copy, HostMemory
from trainkit.io.checkpoint.manifest import Manifest
from trainkit.io.checkpoint.retention import Retention, kept
from trainkit.state import TrainState

ABANDONED = "abandoned"
"""In the names of checkpoints that a run has gone back behind."""
_FROM_OUTSIDE = signal.valid_signals() - {
    getattr(signal, name) for name in ("SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGTRAP", "SIGSYS", "SIGABRT")
}
"""All signals but those by which a thread learns of its own faults."""
Job = Callable[[Callable[[Path], None]], list[str]]
"""Writes a checkpoint and announces it; gives what its owner should be told."""


class Saver:
    """Writes the checkpoints of a run in a thread of its own, and removes those that the rules let go.

    ``save`` copies the state into memory of the host that is used again and again, and returns. At most one checkpoint
    is on its way: when the next comes too early, it waits for the one before. What goes wrong in the thread is raised
    once, by the next ``save``, ``wait`` or ``close``. A process that ends waits for what is on its way. The folder is
    locked for as long as the saver is open.

    Args:
        folder: of the run; made where it is missing.
        keep: which checkpoints stay.
        run_id: names the run, with 1 to 128 of ``A-Z a-z 0-9 . _ -``. None for that of ``resumed_from``, or a new one.
        resumed_from: the checkpoint that this run goes on from, in this folder or another. Whole newer ones of the same
            run in this folder are set aside before anything else, and a warning names them: they get names by which
            neither ``latest`` nor the rules find them, and stay until somebody deletes them.
        overwrite: whether the folder may have the checkpoints of other runs. They are removed when the first one of
            this run is durable.
        allow_nonfinite: also save parameters with infinities or NaNs.

    Raises:
        ValueError: an unsafe run_id.
        CheckpointError: another writer has the folder; it has the checkpoints of another run and ``overwrite`` is
            False; ``resumed_from`` cannot be read; or the system refused.

    Warns: CheckpointWarning for what was set aside, and for leftovers of dead writers that cannot be deleted.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from trainkit import init_state
        >>> from trainkit.io.checkpoint import latest
        >>> from trainkit.optim import sgd
        >>> state = init_state(nn.Linear(2, 1), sgd(0.1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Saver(folder, keep=Retention(last=1)) as saver:
        ...         for step in range(3):
        ...             saver.save(state.replace(step=state.step + step), cursor={"batch": step})
        ...     latest(folder).name, sorted(path.name for path in Path(folder).iterdir())
        ('checkpoint-2', ['.lock', 'checkpoint-2'])
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep: Retention | None = None,
        run_id: str | None = None,
        resumed_from: str | Path | None = None,
        overwrite: bool = False,
        allow_nonfinite: bool = False,
    ) -> None:
        writer.check_run_id(run_id)
        self.folder = Path(folder)
        self._host = HostMemory()
        self._flight = _Flight()
        self._pid = os.getpid()
        start = None if resumed_from is None else listing.manifest_of(Path(resumed_from))
        known = run_id if start is None else run_id or start.run_id
        with files.writing(self.folder), ExitStack() as stack:
            files.make_folder(self.folder)
            fd = stack.enter_context(files.opened(self.folder))
            owner, is_own = lock.for_saver(fd, self.folder)
            if is_own:
                # Who has found it meanwhile still sees that it is a saver's.
                stack.callback(owner.release)
            else:
                stack.callback(setattr, owner, "has_saver", False)
                stack.callback(setattr, owner, "run_id", None)
            with owner.mutex:
                problems = commit.remove_leftovers(fd, self.folder)
                self.run_id, others = self._run(fd, known, overwrite)
                owner.run_id = self.run_id
                if start is not None:
                    problems += _set_aside(fd, self.folder, self.run_id, start)
            rules = Retention() if keep is None else keep
            self._target = _Target(fd, self.folder, owner, rules, self.run_id, others, allow_nonfinite)
            # From here on they are closed by `close`, or when nobody has this object any more, or the process ends.
            self._end = weakref.finalize(self, _end, self._flight, stack.pop_all(), self._pid)
        for problem in problems:
            warnings.warn(problem, CheckpointWarning, stacklevel=2)

    def _run(self, fd: int, known: str | None, overwrite: bool) -> tuple[str, frozenset[str]]:
        """The name of this run, and of those whose checkpoints are to go."""
        found = {entry.manifest.run_id for entry in listing.scan(fd, self.folder) if entry.manifest}
        run_id = known or writer.new_run_id()
        others = frozenset(found - {run_id})
        if others and not overwrite:
            raise CheckpointError(
                f"{self.folder}: has checkpoints of the run {min(others)!r}, this is another; to go on with that one "
                "give resumed_from=latest(folder), to remove it overwrite=True, to keep both another folder"
            )
        return run_id, others

    @property
    def last(self) -> Path | None:
        """The newest checkpoint of this saver that is durable; None so far."""
        return self._flight.last

    def save(
        self,
        state: TrainState,
        *,
        cursor: Any = None,
        metadata: Any = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Copy the state and write the copy in the background. All arguments may be changed when this returns.

        Args:
            state: what to save; not changed.
            cursor: the position of the data, as JSON values.
            metadata: anything else, as JSON values. It is written as it is: keep secrets out of it.
            metrics: what is known of this state, for the rule ``best``.

        Raises:
            TypeError, ValueError: something cannot be stored, or ``metrics`` lacks the one that ``keep`` compares.
            CheckpointError: the save before this one failed; then nothing was done now. Call it again to try again.
            RuntimeError: the saver is closed, or belongs to the process that this one was forked from.
        """
        self._check_open()
        keep = self._target.keep
        if keep.best and metrics is not None and keep.metric not in metrics:
            raise ValueError(f"metrics: has {sorted(metrics)}, and not {keep.metric!r}, by which the best are kept")
        leaves = self._host.leaves(state)
        draft = writer.drafted(state.step, self._host.slots, cursor, metadata, metrics)
        self._flight.collect(stacklevel=3)
        copy = self._host.take(leaves)
        # Without a reference to this object: the thread does not keep a forgotten saver alive.
        self._flight.start(functools.partial(_write, self._target, draft, copy))

    def wait(self) -> Path | None:
        """Wait until nothing is on its way.

        Returns: the newest checkpoint of this saver that is durable; None if there is none.

        Raises: CheckpointError if the save that was on its way failed.
        """
        self._check_open()
        self._flight.collect(stacklevel=3)
        return self.last

    def close(self) -> None:
        """Wait, give the lock back, let the memory go. Doing it twice does nothing.

        Raises: CheckpointError if the save that was on its way failed.
        """
        if self._end.alive and os.getpid() == self._pid:
            self._host = HostMemory()
            self._end()

    def _check_open(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError(
                f"this Saver belongs to process {self._pid}; a process forked off it cannot save with it"
            )
        if not self._end.alive:
            raise RuntimeError("this Saver is closed")

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except CheckpointError as own:
            if error is None:
                raise
            # What ended the run goes on; this one is said beside it.
            warnings.warn(str(own), CheckpointWarning, stacklevel=2)


@dataclass(frozen=True)
class _Target:
    """Where to write, and what to do there."""

    fd: int
    folder: Path
    lock: lock.Lock
    keep: Retention
    run_id: str
    others: frozenset[str]
    allow_nonfinite: bool
    known: listing.Known = field(default_factory=dict)


def _write(target: _Target, draft: writer.Draft, copy: Copy, announce: Callable[[Path], None]) -> list[str]:
    """What the thread does. Returns what the owner should be told."""
    if not target.allow_nonfinite:
        writer.check_finite(draft.step, copy.params)
    with files.writing(target.folder), target.lock.mutex:
        parts = {file: [memory] for file, memory in copy.memory.items()}
        path, notes = writer.write(target.fd, target.folder, draft, parts, target.run_id, target.known, target.others)
        announce(path)
        return notes + writer.removed(target.fd, target.folder, _let_go(target, path))


def _let_go(target: _Target, new: Path) -> list[str]:
    """The names of the checkpoints that do not stay, oldest first."""
    entries = listing.scan(target.fd, target.folder, target.known)
    manifests = {entry.path.name: entry.manifest for entry in entries if entry.manifest is not None}
    own = [name for name, manifest in manifests.items() if manifest.run_id == target.run_id]
    stay = {own[i] for i in kept(target.keep, [manifests[name] for name in own])} | {new.name}
    go = set(own) - stay
    return [name for name, manifest in manifests.items() if name in go or manifest.run_id in target.others]


def _set_aside(fd: int, folder: Path, run_id: str, start: Manifest) -> list[str]:
    """Take the whole checkpoints of a run that are newer than its start out of the way. Returns what to tell.

    Before the run goes on, so that its own are the newest from the first one on. The newest goes last: until then
    all that is looked for is found as if nothing had happened. What is damaged is passed over where it is.
    """
    aside = {}
    for entry in listing.scan(fd, folder):
        newer = entry.manifest is not None and entry.manifest.run_id == run_id and entry.manifest.order > start.order
        if newer and _is_whole(entry.path):
            aside[entry.path.name] = f"{entry.path.name}.{ABANDONED}-{secrets.token_hex(8)}"
            files.rename(fd, entry.path.name, aside[entry.path.name])
    if not aside:
        return []
    os.fsync(fd)
    return [
        f"{folder}: the run goes on from step {start.step}; its newer checkpoints are set aside and not removed: "
        + ", ".join(f"{old} is {new} now" for old, new in aside.items())
    ]


def _is_whole(path: Path) -> bool:
    try:
        loader.verify(path)
    except CheckpointError:
        return False
    return True


class _Flight:
    """The one save that may be on its way, and what came of it."""

    def __init__(self) -> None:
        self.last: Path | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._notes: list[str] = []

    def start(self, job: Job) -> None:
        # Not a daemon: the interpreter waits for it before it ends.
        thread = threading.Thread(target=self._run, args=(job,), name="checkpoint", daemon=False)
        thread.start()
        self._thread = thread

    def _run(self, job: Job) -> None:
        # They are for the main thread. Here one could make a system call fail that nobody makes again.
        signal.pthread_sigmask(signal.SIG_BLOCK, _FROM_OUTSIDE)
        try:
            self._notes = job(self._announce)
        except BaseException as error:
            self._error = error

    def _announce(self, path: Path) -> None:
        self.last = path

    def is_this_thread(self) -> bool:
        return self._thread is threading.current_thread()

    def collect(self, stacklevel: int) -> None:
        """Wait for the thread, and raise what it raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        notes, self._notes = self._notes, []
        error, self._error = self._error, None
        for note in notes:
            warnings.warn(note, CheckpointWarning, stacklevel=stacklevel)
        if error is not None:
            raise error


def _end(flight: _Flight, resources: ExitStack, pid: int) -> None:
    if os.getpid() != pid:
        return
    if flight.is_this_thread():
        # A forgotten saver was found by the garbage collector while this thread ran, which cannot wait for itself.
        threading.Thread(target=_end, args=(flight, resources, pid)).start()
        return
    with resources:
        flight.collect(stacklevel=4)
