"""Arrays in files, read from end to end without their pages gathering in the process."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

EVERY = 0.001
"""Seconds between two times that pages are given back; at the rate of memory some 5 MiB are read meanwhile."""


@contextmanager
def few_pages(arrays: Iterable[Any]) -> Iterator[None]:
    """A scope in which the pages of mapped files leave this process soon after they came.

    Whoever reads all of a mapped array has all of it in the process's memory at the end, as the system counts it,
    though it could take the pages back. Here they go back to the system's cache of files again and again, written ones
    too; a page that is touched again comes from there.

    Args:
        arrays: those that no file is mapped for are passed over.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> with tempfile.TemporaryFile() as file:
        ...     array = np.memmap(file, dtype="int64", mode="w+", shape=(3,))
        ...     with few_pages([array, np.ones(3)]):
        ...         array += 1
        ...     array.tolist()
        [1, 1, 1]

    Source: ``madvise(2)``: MADV_DONTNEED on a shared mapping of a file loses nothing.
    """
    maps = {id(found): found for found in map(_map_of, arrays) if found is not None}
    if not maps or not hasattr(mmap, "MADV_DONTNEED"):
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=_give_back, args=(list(maps.values()), ended), name="mapped pages", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _give_back(maps: list[mmap.mmap], ended: threading.Event) -> None:
    while not ended.wait(EVERY):
        for each in maps:
            # Whoever reads them may have closed them.
            with suppress(ValueError):
                each.madvise(mmap.MADV_DONTNEED)


def _map_of(array: Any) -> mmap.mmap | None:
    """What an array is a view of, if that is a file whose mapping is shared.

    The changes of a private mapping (mode "c") are nowhere else, nor is what lies in a mapping without a file.
    """
    while isinstance(array, np.ndarray):
        if isinstance(array, np.memmap) and isinstance(array.base, mmap.mmap):
            return None if array.mode == "c" else array.base
        array = array.base
    return None
