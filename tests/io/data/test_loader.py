"""Batches of the loader beside those of plain lists, whole and resumed."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, IterableDataset

from trainkit.io.data.collate import masked_lm_batch, pad_batch
from trainkit.io.data.loader import Loader
from trainkit.io.data.order import epoch_order


def oracle(num_rows: int, size: int, epochs: int, *, seed: int, shuffle: bool, drop_last: bool) -> list[list[int]]:
    """The batches of row numbers of all epochs, by slicing lists."""
    batches = []
    for epoch in range(epochs):
        order = epoch_order(num_rows, seed=seed, epoch=epoch).tolist() if shuffle else list(range(num_rows))
        cut = [order[i : i + size] for i in range(0, num_rows, size)]
        batches += [batch for batch in cut if len(batch) == size or not drop_last]
    return batches


class Squares(Dataset[torch.Tensor]):
    """A map-style dataset without ``__getitems__``."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, row: int) -> torch.Tensor:
        return torch.tensor(row)


class Counted(IterableDataset[int]):
    """A stream of numbers without a state."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.num_rows))


class WithState(Counted):
    """A stream with a state, which counts what it reads."""

    def __init__(self, num_rows: int) -> None:
        super().__init__(num_rows)
        self.place = self.num_read = 0

    def __iter__(self) -> Iterator[int]:
        while self.place < self.num_rows:
            self.place += 1
            self.num_read += 1
            yield self.place - 1
        self.place = 0

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


def rows_of(batch: Any) -> list[int]:
    return (batch["x"] if isinstance(batch, dict) else batch).tolist()


def drain(batches: Iterator[Any]) -> list[list[int]]:
    return [rows_of(batch) for batch in batches]


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(state))


MAP_STYLE = {
    "list": lambda n: list(range(n)),
    "tensor": torch.arange,
    "columns": lambda n: {"x": torch.arange(n)},
    "torch": Squares,
    "arrow": lambda n: datasets.Dataset.from_dict({"x": list(range(n))}),
}
STREAMS = {
    "iterable": Counted,
    "state": WithState,
    "hugging face": lambda n: datasets.Dataset.from_dict({"x": list(range(n))}).to_iterable_dataset(
        num_shards=min(3, n)
    ),
}


@pytest.mark.parametrize("kind", MAP_STYLE)
@given(
    num_rows=st.integers(1, 30),
    size=st.integers(1, 8),
    epochs=st.integers(1, 3),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    seed=st.integers(-(2**63), 2**63 - 1),
    data=st.data(),
)
@settings(max_examples=30)
@pytest.mark.filterwarnings("ignore::trainkit.io.data.errors.DataWarning")
def test_batches_and_every_resumption_are_those_of_sliced_lists(
    kind: str, num_rows: int, size: int, epochs: int, shuffle: bool, drop_last: bool, seed: int, data: st.DataObject
) -> None:
    num_rows = max(num_rows, size) if drop_last else num_rows
    expected = oracle(num_rows, size, epochs, seed=seed, shuffle=shuffle, drop_last=drop_last)

    def make() -> Loader:
        return Loader(MAP_STYLE[kind](num_rows), batch_size=size, seed=seed, shuffle=shuffle, drop_last=drop_last)

    found: list[list[int]] = []
    loader = make()
    # Interrupted any number of times, each time in a new loader.
    while len(found) < len(expected):
        count = data.draw(st.integers(1, len(expected) - len(found)))
        batches = loader.epochs(epochs)
        found += [rows_of(next(batches)) for _ in range(count)]
        state = through_json(loader.state_dict())
        batches.close()
        loader = make()
        loader.load_state_dict(state)
    assert found == expected
    assert not drain(loader.epochs(epochs))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["list", "arrow"])
@given(stop=st.integers(0, 11), prefetch=st.integers(1, 5), then=st.sampled_from([0, 1, 2]))
@settings(max_examples=5)
def test_what_was_loaded_ahead_is_neither_lost_nor_repeated(
    kind: str, workers: int, stop: int, prefetch: int, then: int
) -> None:
    expected = oracle(11, 3, 3, seed=5, shuffle=True, drop_last=False)
    loader = Loader(MAP_STYLE[kind](11), batch_size=3, seed=5, workers=workers, prefetch=prefetch)
    batches = loader.epochs(3)
    found = [rows_of(next(batches)) for _ in range(stop)]
    batches.close()
    # The number of workers may differ afterwards, and the same loader goes on as well.
    for resumed in (loader, Loader(MAP_STYLE[kind](11), batch_size=3, seed=5, workers=then)):
        resumed.load_state_dict(through_json(loader.state_dict()))
        assert found + drain(resumed.epochs(3)) == expected
        resumed.load_state_dict({**loader.state_dict(), "epoch": 0, "batch": 0, "total": 0, "window": 0, "within": 0})
        loader.load_state_dict(resumed.state_dict())
        batches = loader.epochs(3)
        found = [rows_of(next(batches)) for _ in range(stop)]
        batches.close()


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("shuffle", [False, True])
@given(num_rows=st.integers(1, 20), size=st.integers(1, 5), epochs=st.integers(1, 3), data=st.data())
@settings(max_examples=25)
@pytest.mark.filterwarnings("ignore::trainkit.io.data.errors.DataWarning")
def test_streams_resume_anywhere_any_number_of_times(
    kind: str, shuffle: bool, num_rows: int, size: int, epochs: int, data: st.DataObject
) -> None:
    def make() -> Loader:
        return Loader(STREAMS[kind](num_rows), batch_size=size, shuffle=shuffle, window=2 * size)

    expected = drain(make().epochs(epochs))
    assert len(expected) == epochs * math.ceil(num_rows / size)
    per_epoch = len(expected) // epochs
    for epoch in range(epochs):
        shown = [row for batch in expected[epoch * per_epoch : (epoch + 1) * per_epoch] for row in batch]
        # datasets shuffles the shards of a stream from the second epoch on.
        assert sorted(shown) == list(range(num_rows))
        assert shuffle or (kind == "hugging face" and epoch) or shown == list(range(num_rows))
    found: list[list[int]] = []
    loader = make()
    while len(found) < len(expected):
        count = data.draw(st.integers(1, len(expected) - len(found)))
        batches = loader.epochs(epochs)
        found += [rows_of(next(batches)) for _ in range(count)]
        state = through_json(loader.state_dict())
        loader = make()
        loader.load_state_dict(state)
        # Saved again before anything was read.
        assert loader.state_dict() == state
    assert found == expected
    assert not drain(loader.epochs(epochs))


@pytest.mark.parametrize("kind", STREAMS)
def test_a_stream_in_a_worker_is_the_stream_in_the_loop(kind: str) -> None:
    expected = drain(Loader(STREAMS[kind](11), batch_size=2, window=4).epochs(2))
    assert len(expected) == 12
    for stop in (0, 1, 5, 8):
        loader = Loader(STREAMS[kind](11), batch_size=2, window=4, workers=1, prefetch=3)
        batches = loader.epochs(2)
        found = [rows_of(next(batches)) for _ in range(stop)]
        batches.close()
        for workers in (0, 1):
            resumed = Loader(STREAMS[kind](11), batch_size=2, window=4, workers=workers)
            resumed.load_state_dict(through_json(loader.state_dict()))
            assert found + drain(resumed.epochs(2)) == expected


@given(num_rows=st.integers(1, 25), size=st.integers(1, 9), world=st.integers(1, 5), drop_last=st.booleans())
@pytest.mark.filterwarnings("ignore::trainkit.io.data.errors.DataWarning")
def test_the_parts_of_all_ranks_are_the_batches_of_one(num_rows: int, size: int, world: int, drop_last: bool) -> None:
    num_rows = max(num_rows, size)
    for make in (MAP_STYLE["arrow"], MAP_STYLE["list"], STREAMS["state"]):
        options: dict[str, Any] = {"batch_size": size, "drop_last": drop_last, "window": 2 * size}
        whole = drain(Loader(make(num_rows), **options).epochs(2))
        ranks = [drain(Loader(make(num_rows), rank=r, world=world, **options).epochs(2)) for r in range(world)]
        assert [[row for part in parts for row in part] for parts in zip(*ranks, strict=True)] == whole


def test_a_run_goes_on_with_another_number_of_ranks() -> None:
    whole = drain(Loader(list(range(23)), batch_size=6).epochs(2))
    first = Loader(list(range(23)), batch_size=6, rank=1, world=3)
    for _ in zip(range(5), first.epochs(2), strict=False):
        pass
    found = []
    for rank in range(2):
        loader = Loader(list(range(23)), batch_size=6, rank=rank, world=2)
        loader.load_state_dict(first.state_dict())
        found.append(drain(loader.epochs(2)))
    assert [a + b for a, b in zip(*found, strict=True)] == whole[5:]


@pytest.mark.parametrize("kind", ["arrow", "iterable"])
@pytest.mark.parametrize("group", [False, True])
def test_batches_by_tokens_resume_anywhere(kind: str, group: bool) -> None:
    sizes = [1 + (7 * i) % 12 for i in range(40)]
    data: Any = [{"x": [i] * n} for i, n in enumerate(sizes)]
    if kind == "arrow":
        data = datasets.Dataset.from_list(data)
    else:
        rows, data = data, Counted(40)
        data.__class__ = type("Rows", (Counted,), {"__iter__": lambda self: iter(rows)})

    def make() -> Loader:
        collate = lambda rows: pad_batch(rows, fill={"x": -1})  # noqa: E731
        return Loader(
            data, max_tokens=30, lengths="x", group_by_length=group, window=16, collate=collate, workers=0, batches=25
        )

    whole = [batch["x"] for batch in make()]
    assert all(batch.numel() <= 30 for batch in whole)
    for stop in range(0, 25, 3):
        loader = make()
        taken = [batch["x"] for _, batch in zip(range(stop), loader, strict=False)]
        resumed = make()
        resumed.load_state_dict(through_json(loader.state_dict()))
        assert len(taken) == stop
        assert all(torch.equal(a, b["x"]) for a, b in zip(whole[stop:], resumed, strict=True))


def test_an_epoch_at_a_time_and_a_number_of_batches() -> None:
    loader = Loader(list(range(7)), batch_size=3, seed=1)
    assert len(loader) == 3
    expected = oracle(7, 3, 3, seed=1, shuffle=True, drop_last=False)
    found = []
    for epoch in range(3):
        assert loader.epoch == epoch
        found += drain(iter(loader))
    assert found == expected
    assert drain(loader.epochs(3)) == []
    counted = Loader(list(range(7)), batch_size=3, seed=1, batches=5)
    assert drain(iter(counted)) == expected[:5]
    assert drain(iter(counted)) == []
    assert counted.num_taken == 5
    for loader in (Loader(list(range(7)), batch_size=3, batches=5), Loader(Counted(7), batch_size=3, batches=5)):
        assert [len(loader), *(len(loader) for _ in loader), len(loader)] == [5, 4, 3, 2, 1, 0, 0]
    with pytest.raises(TypeError, match="len: a stream"):
        len(Loader(Counted(3), batch_size=1))


def test_a_second_iteration_ends_the_first() -> None:
    loader = Loader(list(range(8)), batch_size=2, shuffle=False)
    first, second = iter(loader), iter(loader)
    assert rows_of(next(first)) == [0, 1]
    assert rows_of(next(second)) == [2, 3]
    with pytest.raises(RuntimeError, match="ended when another began"):
        next(first)
    assert rows_of(next(second)) == [4, 5]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_the_data_draw_depends_on_the_place_in_the_run_only(workers: int) -> None:
    def noisy(rows: list[int]) -> torch.Tensor:
        return torch.tensor([[row, random.random(), np.random.rand(), float(torch.rand(()))] for row in rows])  # noqa: NPY002

    before = random.getstate(), torch.get_rng_state()
    whole = list(Loader(list(range(9)), batch_size=2, collate=noisy).epochs(2))
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    random.seed(99)
    torch.manual_seed(99)
    loader = Loader(list(range(9)), batch_size=2, collate=noisy, workers=workers)
    batches = loader.epochs(2)
    taken = [next(batches) for _ in range(3)]
    batches.close()
    assert all(torch.equal(a, b) for a, b in zip(whole, [*taken, *loader.epochs(2)], strict=True))
    assert len({float(batch[0, 1]) for batch in whole}) == len(whole)


def test_masks_are_drawn_by_the_place_of_the_batch() -> None:
    data = datasets.Dataset.from_dict({"input_ids": [[i] * 20 for i in range(5, 15)]})

    def collate(rows: Any, *, position: tuple[int, ...]) -> dict[str, torch.Tensor]:
        return masked_lm_batch(rows, position=position, seed=0, mask_id=1, vocab_size=99, pad_id=0)

    whole = [batch["input_ids"] for batch in Loader(data, batch_size=4, collate=collate).epochs(2)]
    loader = Loader(data, batch_size=4, collate=collate)
    next(iter(loader))
    assert all(torch.equal(a, b["input_ids"]) for a, b in zip(whole[1:], loader.epochs(2), strict=True))


def test_positions_are_small_and_reached_without_reading() -> None:
    class Watched:
        num_rows = 10**9

        def __init__(self) -> None:
            self.num_read = 0

        def fetch(self, rows: Any) -> torch.Tensor:
            self.num_read += len(rows)
            return torch.tensor(rows)

    source = Watched()
    loader = Loader(source, batch_size=32)
    start = loader.state_dict()
    late = {**start, "epoch": 7, "batch": 10**6, "total": 10**8, "window": 10**6 // 128, "within": 10**6 % 128}
    loader.load_state_dict(late)
    next(iter(loader))
    assert source.num_read == 32
    assert len(json.dumps(late)) < 500
    stream = WithState(10**5)
    loader = Loader(stream, batch_size=10, shuffle=False)
    loader.load_state_dict(
        {**loader.state_dict(), "batch": 9000, "window": 9000, "num_read": 90_000, "state": {"place": 90_000}}
    )
    assert rows_of(next(iter(loader))) == list(range(90_000, 90_010))
    assert stream.num_read == 10


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"format": 2}, "format 2"),
        ({"epoch": -1}, "epoch=-1"),
        ({"batch": 1.5}, "batch=1.5"),
        ({"total": True}, "total=True"),
        ({"more": 1}, "got .*'more'"),
        ({"made_for": {}}, "made for"),
    ],
)
def test_what_is_no_position_is_refused_and_changes_nothing(change: dict[str, Any], told: str) -> None:
    loader = Loader(list(range(8)), batch_size=2)
    next(iter(loader))
    before = loader.state_dict()
    with pytest.raises(ValueError, match=told):
        loader.load_state_dict({**before, **change})
    assert loader.state_dict() == before
    for other, named in (
        (Loader(list(range(9)), batch_size=2), "rows=8 \\(here 9\\)"),
        (Loader(list(range(8)), batch_size=4), "batch_size=2 \\(here 4\\)"),
        (Loader(list(range(8)), batch_size=2, seed=1), "seed=0 \\(here 1\\)"),
        (Loader(list(range(8)), batch_size=2, shuffle=False), "shuffle=True \\(here False\\)"),
    ):
        with pytest.raises(ValueError, match=named):
            other.load_state_dict(before)


@pytest.mark.parametrize("workers", [0, 1])
def test_tensors_of_any_size_and_dtype_come_from_workers(workers: int) -> None:
    def collate(rows: list[int]) -> dict[str, Any]:
        return {
            "large": torch.full((600, 1000), float(rows[0])),
            "half": torch.full((2,), float(rows[0]), dtype=torch.bfloat16),
            "nested": (torch.tensor(rows), torch.zeros(0)),
            "empty": torch.zeros(0, 3),
            "conjugated": torch.tensor([1 + 2j]).conj(),
            "negated": torch.tensor([1 + 2j]).conj().imag,
            "large and conjugated": torch.full((400, 400), 1 + 2j).conj(),
        }

    batches = list(Loader(list(range(4)), batch_size=2, shuffle=False, collate=collate, workers=workers))
    for i, batch in enumerate(batches):
        for name, tensor in collate([2 * i, 2 * i + 1]).items():
            torch.testing.assert_close(batch[name], tensor, rtol=0, atol=0)
        # A batch belongs to the loop.
        batch["nested"][0].add_(1)


def test_batches_go_to_their_device_one_ahead() -> None:
    """The meta device stands for an accelerator: what is there shows that it was moved, and when."""
    made: list[int] = []

    def collate(rows: list[int]) -> dict[str, torch.Tensor]:
        made.append(rows[0])
        if rows[0] == 6:
            raise ValueError("bad")
        return {"x": torch.zeros(len(rows), rows[0] + 1)}

    loader = Loader(list(range(9)), batch_size=2, shuffle=False, collate=collate, device="meta")
    batches = iter(loader)
    for i in range(2):
        batch = next(batches)
        assert batch["x"].device.type == "meta" and batch["x"].shape == (2, 2 * i + 1)
        assert made == [2 * j for j in range(i + 2)]
        assert loader.num_taken == i + 1
    # The fourth batch fails while the third waits, which is still handed out.
    assert next(batches)["x"].shape == (2, 5)
    assert loader.num_taken == 3
    with pytest.raises(ValueError, match=r"bad \(batch 3"):
        next(batches)
    assert loader.num_taken == 3


class Unmovable(torch.Tensor):
    """A batch that the device has no room for."""

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise RuntimeError("no room")


def test_a_batch_that_the_device_refuses_is_told_of_after_the_one_before_it() -> None:
    def collate(rows: list[int]) -> torch.Tensor:
        return torch.zeros(len(rows)).as_subclass(Unmovable if 4 in rows else torch.Tensor)

    loader = Loader(list(range(8)), batch_size=2, shuffle=False, collate=collate, device="meta")
    batches = iter(loader)
    assert [next(batches).device.type for _ in range(2)] == ["meta", "meta"]
    with pytest.raises(RuntimeError, match="no room"):
        next(batches)
    assert loader.num_taken == 2


def test_mappings_of_transformers_are_plain() -> None:
    from transformers import BatchEncoding

    loader = Loader([1, 2], batch_size=2, collate=lambda rows: BatchEncoding({"x": torch.tensor(rows)}))
    assert type(next(iter(loader))) is dict
