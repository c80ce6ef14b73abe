"""Files of rows, read into the system's memory ahead of whoever copies rows out of their mappings."""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from trainkit.io.data.assemble import Task

PIECE = 1 << 20
WINDOW = 1 << 28
"""Bytes that are read ahead of rows in order, at most."""
SMALL = 1 << 23
"""Bytes that are not worth a thread."""


class ReadAhead:
    """A thread that reads files while others copy rows out of their mappings, which otherwise wait at every new page.

    A copy out of mapped memory that is not there yet stops the process until the disk has answered; a page is asked for
    only once the one before has come. Pieces that are in memory already are passed by.

    Rows in order: the thread keeps at most :data:`WINDOW` bytes ahead. Rows in any order: it reads all files, if
    they fit in half of the memory that is free, and nothing otherwise. What it reads changes no row; a file that cannot
    be read is left to whoever needs its rows, and says so.

    Args:
        files: that rows are mapped from, in the order of the rows.
        in_order: whether rows are asked for in their order.
        num_rows: of all files.
    """

    def __init__(self, files: Sequence[Path], *, in_order: bool, num_rows: int) -> None:
        self._files = [(path, size) for path, size in ((path, _size(path)) for path in files) if size]
        self._total = sum(size for _, size in self._files)
        self._in_order, self._num_rows = in_order, num_rows
        self._share = 0.0
        self._moved = threading.Condition()
        self._is_stopped = False
        self._thread: threading.Thread | None = None

    @property
    def is_of_use(self) -> bool:
        """Whether there is enough to read, and room for it."""
        return self._total >= SMALL and (self._in_order or self._total <= _free_memory() / 2)

    def following(self, tasks: Iterator[Task]) -> Generator[Task, None, None]:
        """The tasks, in front of whose rows is read; from the second one on, so that the first comes at once."""
        epoch = None
        try:
            for number, task in enumerate(tasks):
                if number:
                    self._be_at(task.rows[0] / self._num_rows if self._in_order else 0.0)
                    if task.start.epoch != epoch:
                        epoch = task.start.epoch
                        self._stop()
                        self._start()
                yield task
        finally:
            self._stop()

    def _be_at(self, share: float) -> None:
        with self._moved:
            self._share = share
            self._moved.notify()

    def _start(self) -> None:
        self._is_stopped = False
        self._thread = threading.Thread(target=self._read, name="read-ahead", daemon=True)
        self._thread.start()

    def _stop(self) -> None:
        with self._moved:
            self._is_stopped = True
            self._moved.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _read(self) -> None:
        buffer, before = bytearray(PIECE), 0
        for path, size in self._files:
            with suppress(OSError), path.open("rb", buffering=0) as file:
                for start in range(0, size, PIECE):
                    if not self._may_read(before + start):
                        return
                    is_passed = before + start + PIECE < self._share * self._total
                    if not is_passed and not _is_there(file.fileno(), start, size):
                        os.preadv(file.fileno(), [buffer], start)
            before += size

    def _may_read(self, place: int) -> bool:
        """Wait until a place in the files is near enough; False at the end."""
        with self._moved:
            while not self._is_stopped and self._in_order and place > self._share * self._total + WINDOW:
                self._moved.wait()
            return not self._is_stopped


def _is_there(file: int, start: int, size: int) -> bool:
    """Whether the first and the last byte of a piece are in memory."""
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    try:
        return all(
            os.preadv(file, [bytearray(1)], place, os.RWF_NOWAIT) for place in (start, min(start + PIECE, size) - 1)
        )
    except OSError:
        # Not there, or a file system that cannot tell.
        return False


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _free_memory() -> int:
    """Bytes that programs can get without others being moved out; 0 where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    found = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(found.get("MemAvailable", "0 kB").split()[0]) * 1024
