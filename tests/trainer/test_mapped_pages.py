"""Arrays in files that are read from end to end in little memory."""

from __future__ import annotations

import mmap
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainkit.trainer.mapped_pages import few_pages

BYTES = 1 << 28


def mapped_bytes() -> int:
    """Memory of this process that belongs to files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile"))


def read_slowly(array: Any) -> int:
    """Touch all of it; the most that was there meanwhile, beside what was there before."""
    before = most = mapped_bytes()
    for part in np.array_split(array.reshape(-1), 256):
        part.max()
        time.sleep(0.0005)
        most = max(most, mapped_bytes())
    return most - before


@pytest.fixture
def array(tmp_path: Path) -> Any:
    array = np.memmap(tmp_path / "rows", dtype=np.uint8, mode="w+", shape=(BYTES,))
    array[:: mmap.PAGESIZE] = 7
    array.flush()
    return np.memmap(tmp_path / "rows", dtype=np.uint8, mode="r+").reshape(1024, -1)


def test_few_pages_are_there_at_a_time(array: Any) -> None:
    with few_pages([array]):
        most = read_slowly(array)
    # A view of the view, outside of the scope: all of it is there in the end.
    assert most < BYTES / 4 and read_slowly(array[:]) > BYTES * 0.9


def test_what_is_written_stays(array: Any) -> None:
    with few_pages([array[3:]]):
        array[5] = 3
        time.sleep(0.02)
        assert array[5].min() == 3
        array[6] = 4
    assert array[6].min() == 4 and array[0, 0] == 7


def test_memory_without_a_file_and_private_mappings_are_left_alone(array: Any, tmp_path: Path) -> None:
    anonymous = np.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), np.uint8)
    private = np.memmap(tmp_path / "rows", dtype=np.uint8, mode="c")
    for one in (anonymous, private, np.asarray(private)):
        one[:10] = 5
    with few_pages([anonymous, private, np.asarray(private), np.ones(3), None]):
        assert not [thread for thread in threading.enumerate() if thread.name == "mapped pages"]
        time.sleep(0.02)
    assert anonymous[:10].min() == 5 and private[:10].min() == 5


def test_a_map_may_be_closed_meanwhile(tmp_path: Path) -> None:
    arrays = [np.memmap(tmp_path / "one", dtype=np.uint8, mode="w+", shape=(mmap.PAGESIZE,))]
    mapped: Any = arrays[0].base
    with few_pages(arrays):
        arrays.clear()
        mapped.close()
        # An error of the thread would fail this test.
        time.sleep(0.02)


def test_the_thread_ends_with_an_error(array: Any) -> None:
    with pytest.raises(KeyError), few_pages([array]):
        raise KeyError("metric")
    assert not [thread for thread in threading.enumerate() if thread.name == "mapped pages"]
