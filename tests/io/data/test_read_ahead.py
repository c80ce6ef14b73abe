"""A thread that reads files ahead changes no batch, leaves no thread, and keeps to its window."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, load_from_disk

from benchmarks.data import resident
from trainkit.io.data import Loader, TokenFile, read_ahead
from trainkit.io.data.read_ahead import PIECE, ReadAhead

ROWS, SEQ_LEN = 64, 1 << 18
"""Rows of 1 MiB in a file of 64 MiB: several times what systems read ahead by themselves."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens.bin"
    np.random.default_rng(0).integers(0, 2**31, ROWS * SEQ_LEN, dtype=np.int32).tofile(path)
    return path


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert "read-ahead" not in [thread.name for thread in threading.enumerate()]


def tokens(path: Path) -> TokenFile:
    return TokenFile(path, SEQ_LEN, dtype="int32", overlap=0)


def drop(path: Path) -> None:
    """Take a file out of the system's memory."""
    os.sync()
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident(path) > 0.01:
        pytest.skip("this file system keeps its files in memory")


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("epochs", [1, 2])
def test_batches_are_those_of_the_rows(path: Path, shuffle: bool, epochs: int) -> None:
    with_thread = Loader(tokens(path), batch_size=5, shuffle=shuffle, seed=3)
    without = Loader(
        torch.from_numpy(np.fromfile(path, np.int32).reshape(ROWS, -1)), batch_size=5, shuffle=shuffle, seed=3
    )
    seen = 0
    for a, b in zip(with_thread.epochs(epochs), without.epochs(epochs), strict=True):
        assert torch.equal(a["input_ids"], b.long())
        seen += len(b)
    assert seen == epochs * ROWS


def test_an_arrow_file_is_read_ahead_in_order_and_one_with_chosen_rows_in_any(tmp_path: Path) -> None:
    data = Dataset.from_dict({"x": np.arange(3 << 20)})
    data.save_to_disk(str(tmp_path / "d"))
    stored = load_from_disk(str(tmp_path / "d"))
    from trainkit.io.data.arrow import ArrowRows

    whole, chosen = ArrowRows(stored), ArrowRows(stored.select([5, 3, 1]))
    assert sum(file.stat().st_size for file in whole.files) >= 24 << 20
    assert (whole.is_in_order_of_files, chosen.is_in_order_of_files) == (True, False)
    batches = Loader(stored, batch_size=1 << 18, shuffle=False)
    assert torch.equal(torch.cat([batch["x"] for batch in batches]), torch.arange(3 << 20))


@pytest.mark.parametrize("end", ["left early", "an error"])
def test_its_thread_ends_with_the_iteration(path: Path, end: str) -> None:
    batches = iter(Loader(tokens(path), batch_size=2))
    next(batches), next(batches), next(batches)
    if end == "an error":
        with pytest.raises(KeyError):
            batches.throw(KeyError("mine"))  # type: ignore[attr-defined]
    else:
        batches.close()  # type: ignore[attr-defined]


def test_shuffled_files_are_read_whole_and_rows_in_order_up_to_the_window(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "WINDOW", 4 * PIECE)
    for in_order, expected in ((False, 1.0), (True, 5 / ROWS)):
        drop(path)
        ahead = ReadAhead([path], in_order=in_order, num_rows=ROWS)
        ahead._be_at(1 / ROWS)
        ahead._start()
        deadline = time.monotonic() + 20
        while resident(path) < expected and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        ahead._stop()
        # The system itself reads on behind what was asked for.
        assert expected <= resident(path) <= max(expected, 0.5)


def test_what_is_of_no_use(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small").write_bytes(b"0" * 1000)
    assert not ReadAhead([], in_order=True, num_rows=1).is_of_use
    assert not ReadAhead([tmp_path / "small", tmp_path / "gone"], in_order=True, num_rows=1).is_of_use
    monkeypatch.setattr(read_ahead, "_free_memory", lambda: 2 * (ROWS << 20) - 1)
    assert not ReadAhead([path], in_order=False, num_rows=ROWS).is_of_use
    assert ReadAhead([path], in_order=True, num_rows=ROWS).is_of_use


def test_free_memory_is_what_the_system_says() -> None:
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    said = int(lines["MemAvailable"].split()[0]) << 10
    assert abs(read_ahead._free_memory() - said) < 1 << 30


def test_a_position_in_the_middle_is_not_preceded_by_reading(path: Path) -> None:
    drop(path)
    loader = Loader(tokens(path), batch_size=2, shuffle=False)
    loader.load_state_dict({**loader.state_dict(), "within": 24, "total": 24})
    list(islice(loader, 2))
    assert 2 / ROWS < resident(path) < 0.5
