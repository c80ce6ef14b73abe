"""Files of data that the system reads into its memory before their rows are asked for."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

PIECE = 1 << 22
"""Bytes that are read at a time; in between the end of the scope is seen."""
_LIMIT = Path("/sys/fs/cgroup/memory.max")


@contextmanager
def fetched(files: Sequence[str | Path]) -> Iterator[None]:
    """A scope in which files are read from their beginning on, in the background: the system then has them in memory.

    Rows in random order are wanted from everywhere in a file. Read one by one they cost a wait each; in one go the
    whole file comes at the full rate of the disk. Nothing is done where the files would fill more than half of the
    memory of this machine or container, since the first of it would be gone again before it is wanted.

    Args:
        files: which. Those that cannot be opened are passed over: who reads them says so better.

    Example:
        >>> with fetched([__file__]):
        ...     len(Path(__file__).read_bytes()) > 1000
        True
    """
    # Data that is joined with itself names them again.
    files = list(dict.fromkeys(files))
    if not 0 < sum(map(_size, files)) <= _memory() // 2:
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=_read, args=(files, ended), name="data files", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()


def _read(files: Sequence[str | Path], ended: threading.Event) -> None:
    # The advice to read ahead, posix_fadvise, is taken for a part of what it names only, without a word.
    piece = bytearray(PIECE)
    for file in files:
        with suppress(OSError), open(file, "rb", buffering=0) as opened:
            while not ended.is_set() and opened.readinto(piece):
                pass


def _size(file: str | Path) -> int:
    try:
        return os.stat(file).st_size
    except OSError:
        return 0


def _memory() -> int:
    """Bytes that this machine has, or the container that this process is in may use."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = _LIMIT.read_text(encoding="ascii").strip()
    except OSError:
        return whole
    return min(whole, int(limit)) if limit.isdecimal() else whole
