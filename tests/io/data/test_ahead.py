"""Files that the system reads before their rows are asked for."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from trainkit.io.data import ahead


def resident(path: Path) -> float:
    """The share of a file's pages in the system's memory."""
    view = np.memmap(path, mode="r")
    pages = (ctypes.c_ubyte * -(-len(view) // mmap.PAGESIZE))()
    assert not ctypes.CDLL(None).mincore(ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(len(view)), pages)
    return float((np.ctypeslib.as_array(pages) & 1).mean())


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "data files"]


@pytest.fixture(autouse=True)
def _alone() -> None:
    """A test begins when the threads of those before it have ended: a scope does not wait for its thread."""
    for thread in threads():
        thread.join(60)


@pytest.fixture
def dropped(tmp_path: Path) -> Path:
    """A file that is on the disk and not in memory."""
    path = tmp_path / "rows"
    path.write_bytes(os.urandom(3 * ahead.PIECE + 5))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident(path) > 0.1:
        pytest.skip("this file system keeps its files in memory")
    return path


def test_all_of_a_file_comes_into_memory(dropped: Path) -> None:
    with ahead.fetched([dropped.parent / "missing", dropped]):
        deadline = time.monotonic() + 60
        while resident(dropped) < 1 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert resident(dropped) == 1


def test_files_that_memory_cannot_hold_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows"
    path.write_bytes(bytes(1000))
    monkeypatch.setattr(ahead, "_memory", lambda: 1999)
    with ahead.fetched([path]):
        assert not threads()


def test_a_file_that_is_named_twice_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows"
    os.mkfifo(path)
    monkeypatch.setattr(ahead, "_size", lambda file: 1000)
    monkeypatch.setattr(ahead, "_memory", lambda: 2000)
    with ahead.fetched([path, path]):
        (thread,) = threads()
        os.close(os.open(path, os.O_WRONLY))
        thread.join(60)
        assert not thread.is_alive()


@pytest.mark.parametrize(("said", "expected"), [("4096\n", 4096), ("max\n", None), (None, None)])
def test_the_memory_of_a_container_counts(
    said: str | None, expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "_LIMIT", tmp_path / "memory.max")
    if said is not None:
        (tmp_path / "memory.max").write_text(said)
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert ahead._memory() == (whole if expected is None else expected)


def test_nothing_is_read_after_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows"
    os.mkfifo(path)
    monkeypatch.setattr(ahead, "_size", lambda file: 1)
    with ahead.fetched([path]):
        (thread,) = threads()
        writer = os.open(path, os.O_WRONLY)
        os.write(writer, b"a")
    # The read that may be under way ends; nobody begins another.
    with suppress(BrokenPipeError):
        os.write(writer, b"b")
    thread.join(60)
    assert not thread.is_alive()
    with pytest.raises(BrokenPipeError):
        os.write(writer, b"c")
    os.close(writer)
