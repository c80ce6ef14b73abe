"""Batches whose rows are read together, beside the same batches read one by one."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from trainkit.io.data.collate import pad_batch
from trainkit.io.data.errors import BatchError
from trainkit.io.data.groups import AHEAD, GROUP_BATCHES, GROUP_BYTES
from trainkit.io.data.loader import Loader
from trainkit.io.data.mixing import mix
from trainkit.io.data.ragged import Ragged
from trainkit.io.data.sources import Source, TokenFile, as_source

ROWS = 150


class OneByOne:
    """The same rows from a source that does not say that it is pure."""

    def __init__(self, source: Source) -> None:
        self.source = source

    @property
    def num_rows(self) -> int:
        return self.source.num_rows

    def fetch(self, indices: Sequence[int]) -> Any:
        return self.source.fetch(indices)


class Watched:
    """Counts the rows of each reading; row ``bad`` cannot be read."""

    is_pure = True

    def __init__(self, num_rows: int, width: int = 1, bad: int | None = None, files: Sequence[str] = ()) -> None:
        self.num_rows, self.width, self.bad, self.files = num_rows, width, bad, files
        self.read: list[int] = []
        self.threads: set[threading.Thread] = set()

    def fetch(self, indices: Sequence[int]) -> Any:
        self.read.append(len(indices))
        self.threads.add(threading.current_thread())
        if self.bad in indices:
            raise OSError(5, "unreadable")
        return {"x": torch.tensor(indices).repeat(self.width, 1).T.contiguous()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: Any) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("data")
    np.arange(ROWS * 3 + 1, dtype="uint16").tofile(folder / "tokens.bin")
    fixed = datasets.Dataset.from_dict({"x": [[i, i + 1] for i in range(ROWS)], "y": [i / 2 for i in range(ROWS)]})
    saved = str(folder / "saved")
    fixed.save_to_disk(saved)
    return {
        "arrow": fixed,
        "file": datasets.load_from_disk(saved),
        "selected": fixed.select(range(20, ROWS)),
        "columns": {"x": torch.arange(ROWS), "y": np.arange(ROWS) / 2},
        "rows": [{"x": i, "y": (i / 2, [i, i])} for i in range(ROWS)],
        "tensors": torch.utils.data.TensorDataset(torch.arange(ROWS), torch.arange(2 * ROWS).view(ROWS, 2)),
        "tokens": TokenFile(folder / "tokens.bin", 3, dtype="uint16"),
        "text": datasets.Dataset.from_dict({"s": [str(i) for i in range(ROWS)], "flag": [i > 9 for i in range(ROWS)]}),
        "nulls": datasets.Dataset.from_dict({"x": [None if i == 99 else i for i in range(ROWS)]}),
        "nested": datasets.Dataset.from_dict({"x": [[[i], [i] * (1 + (i > 40))] for i in range(ROWS)]}),
        "mixed": mix([fixed, {"x": torch.arange(8).view(4, 2), "y": torch.zeros(4, dtype=torch.float64)}], [2, 1]),
    }


def noisy(columns: Any, *, position: tuple[int, ...]) -> Any:
    """Draws, and knows its place."""
    leaves = [leaf.values if isinstance(leaf, Ragged) else leaf for leaf in pytree.tree_leaves(columns)]
    leaves = [torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf for leaf in leaves]
    return {"leaves": leaves, "place": torch.tensor(position), "drawn": torch.tensor(random.random())}


PURE = ["arrow", "file", "selected", "columns", "rows", "tensors", "tokens", "text"]
OF_SEVERAL_FORMS = ["nulls", "nested", "mixed"]


@pytest.mark.parametrize("kind", [*PURE, *OF_SEVERAL_FORMS])
@given(
    size=st.integers(1, 40),
    world=st.integers(1, 3),
    shuffle=st.booleans(),
    draws=st.booleans(),
    start=st.integers(0, 3),
)
@settings(max_examples=10)
def test_batches_are_those_that_are_read_one_by_one(
    sources: dict[str, Any], kind: str, size: int, world: int, shuffle: bool, draws: bool, start: int
) -> None:
    source = as_source(sources[kind])
    assert source is not None and getattr(source, "is_pure", False) == (kind in PURE)
    for rank in range(world):
        options: dict[str, Any] = {"batch_size": size, "shuffle": shuffle, "rank": rank, "world": world, "seed": 3}
        # What is no number can be had from a collator only.
        if draws or kind not in PURE or kind == "text":
            options |= {"collate": noisy, "uniform": False}
        alone = OneByOne(source)
        if hasattr(source, "order"):
            alone.order = source.order  # type: ignore[attr-defined]
        expected, found = Loader(alone, **options).epochs(2), Loader(source, **options)
        batches = found.epochs(2)
        for i, batch in enumerate(expected):
            if i == start:
                found.load_state_dict(found.state_dict())
                batches = found.epochs(2)
            one = next(batches)
            for (path, leaf), (other_path, other) in zip(
                pytree.tree_flatten_with_path(batch)[0], pytree.tree_flatten_with_path(one)[0], strict=True
            ):
                assert path == other_path and type(leaf) is type(other)
                assert torch.equal(leaf, other) if isinstance(leaf, Tensor) else leaf == other
        assert next(batches, None) is None


def test_the_first_batch_is_read_alone_and_groups_have_bounds() -> None:
    source = Watched(10_000)
    batches = iter(Loader(source, batch_size=10))
    next(batches)
    assert source.read == [10]
    for _ in batches:
        pass
    assert source.read[:4] == [10, 20, 40, 80]
    assert max(source.read) == 10 * GROUP_BATCHES and sum(source.read) == 10_000
    wide = Watched(200, width=GROUP_BYTES // 8 // 25)
    for _ in Loader(wide, batch_size=10):
        pass
    assert max(wide.read) == 20


def test_files_are_read_ahead_in_one_thread_which_ends_with_the_iteration() -> None:
    source = Watched(10_000, files=[__file__])
    loader = Loader(source, batch_size=10)
    batches = iter(loader)
    for _ in range(12):
        next(batches)
    # The groups of the batches taken, and those ahead.
    assert len(source.read) <= 5 + AHEAD and sum(source.read) <= loader.num_taken * 10 + (AHEAD + 1) * 160
    (thread,) = source.threads
    assert thread is not threading.current_thread() and thread.is_alive()
    position = loader.state_dict()
    batches.close()  # type: ignore[attr-defined]
    assert not thread.is_alive() and loader.state_dict() == position


def test_files_of_a_source_that_is_not_pure_are_its_own_matter() -> None:
    source = OneByOne(Watched(20))
    source.files = [object()]  # type: ignore[attr-defined]
    assert sum(len(batch["x"]) for batch in Loader(source, batch_size=5)) == 20


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_that_is_forked_off_goes_on_by_itself() -> None:
    batches = iter(Loader(Watched(2000, files=[__file__]), batch_size=10, shuffle=False))
    for _ in range(12):
        next(batches)
    pid = os.fork()
    if pid == 0:
        # A thread that is not there would be waited for without an end.
        signal.alarm(60)
        os._exit([int(batch["x"][0]) for batch in batches] != list(range(120, 2000, 10)))
    assert os.waitpid(pid, 0)[1] == 0
    assert [int(batch["x"][0]) for batch in batches] == list(range(120, 2000, 10))


def test_rows_in_memory_are_read_in_the_loop_itself() -> None:
    source = Watched(100)
    list(Loader(source, batch_size=10))
    assert source.threads == {threading.current_thread()}


def test_large_rows_are_stacked_in_smaller_groups() -> None:
    rows = [{"x": torch.zeros(GROUP_BYTES // 4 // 25), "y": i} for i in range(200)]
    memory = [batch["x"].untyped_storage().nbytes() for batch in Loader(rows, batch_size=10, shuffle=False)]
    # A batch of 10 is two fifths of what may be in one memory.
    assert max(memory) == 20 * rows[0]["x"].nbytes


def test_long_texts_are_read_in_smaller_groups() -> None:
    def longest_group(length: int) -> int:
        read: list[int] = []
        source = as_source(datasets.Dataset.from_dict({"s": ["x" * length] * 200, "y": list(range(200))}))

        class Noting:
            num_rows, is_pure = 200, True

            def fetch(self, indices: Sequence[int]) -> Any:
                read.append(len(indices))
                return source.fetch(indices)  # type: ignore[union-attr]

        for _ in Loader(Noting(), batch_size=2, collate=lambda columns: columns["y"]):
            pass
        return max(read)

    assert longest_group(10) == 2 * GROUP_BATCHES
    assert longest_group(GROUP_BYTES // 5) == 4


@pytest.mark.parametrize("files", [(), ("one",)])
def test_a_row_that_cannot_be_read_fails_in_its_batch_and_the_batches_before_come_first(files: tuple[str]) -> None:
    loader = Loader(Watched(200, bad=97, files=files), batch_size=10, shuffle=False)
    batches = iter(loader)
    assert [int(next(batches)["x"][0]) for _ in range(9)] == list(range(0, 90, 10))
    with pytest.raises(OSError, match=r"unreadable \(batch 9 \(epoch 0, batch 9 of it\); dataset indices \[90, 91"):
        next(batches)
    assert loader.num_taken == 9


@pytest.mark.parametrize("kind", ["arrow", "rows"])
def test_a_row_of_another_length_fails_in_its_batch(kind: str) -> None:
    rows = [{"x": [i, i]} for i in range(60)]
    rows[37] = {"x": [37]}
    batches = iter(Loader(datasets.Dataset.from_list(rows) if kind == "arrow" else rows, batch_size=5, shuffle=False))
    assert [next(batches)["x"][0, 0].item() for _ in range(7)] == list(range(0, 35, 5))
    with pytest.raises(BatchError, match=r"batch 7 \(epoch 0, batch 7 of it\), dataset index 37; dataset indices \[35"):
        next(batches)


def test_batches_of_equal_rows_may_differ_from_each_other() -> None:
    lengths = [1 + i // 10 for i in range(60)]
    data = datasets.Dataset.from_dict({"x": [[i] * n for i, n in enumerate(lengths)]})
    shapes = [tuple(batch["x"].shape) for batch in Loader(data, batch_size=5, shuffle=False)]
    assert shapes == [(5, 1 + i // 2) for i in range(12)]


def test_rows_whose_keys_look_alike_are_told_apart() -> None:
    rows = [{1: i} if i < 5 else {"1": i} for i in range(10)]
    batches = Loader(rows, batch_size=1, shuffle=False, uniform=False)
    assert [list(batch) for batch in batches] == [[1]] * 5 + [["1"]] * 5


def test_rows_of_different_lengths_are_padded_batch_by_batch() -> None:
    data = datasets.Dataset.from_dict({"x": [[i] * (1 + i % 7) for i in range(60)]})
    for batch, start in zip(
        Loader(data, batch_size=4, shuffle=False, collate=lambda c: pad_batch(c, fill={"x": -1})),
        range(0, 60, 4),
        strict=True,
    ):
        assert torch.equal(batch["x"], pad_batch(data[start : start + 4], fill={"x": -1})["x"])


@pytest.mark.parametrize("kind", [kind for kind in PURE if kind != "text"])
def test_changing_a_batch_changes_no_other_and_not_the_data(sources: dict[str, Any], kind: str) -> None:
    data = sources[kind]
    expected = [pytree.tree_leaves(batch) for batch in Loader(data, batch_size=4, shuffle=False)]
    expected = [[leaf.clone() for leaf in leaves] for leaves in expected]
    for _ in range(2):
        for leaves, batch in zip(expected, Loader(data, batch_size=4, shuffle=False), strict=True):
            for leaf, found in zip(leaves, pytree.tree_leaves(batch), strict=True):
                assert isinstance(found, Tensor) and torch.equal(leaf, found)
                found.zero_()
