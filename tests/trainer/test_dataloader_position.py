"""Going on at any batch of any epoch, without reading what came before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, RandomSampler

from tests.trainer.rows import DATA, Counted, Stream, loader_of, same, table
from tests.trainer.tiny import make_rows
from trainkit.trainer.collators import default_data_collator
from trainkit.trainer.dataloaders import after


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", DATA)
def test_going_on_at_any_batch_gives_the_rest(kind: str, workers: int) -> None:
    data = DATA[kind](7)
    sampler = None if kind == "stream" else RandomSampler(data)
    loader = loader_of(data, sampler=sampler, workers=workers)
    loader.set_epoch(2)
    whole = list(loader)
    for start in range(6) if not workers else (3,):
        loader.set_epoch(2)
        loader.skip(start)
        assert same(list(loader), whole[start:])
    # A skip holds for one pass.
    loader.set_epoch(2)
    assert same(list(loader), whole)


def test_skipped_rows_are_not_read() -> None:
    data = Counted(9)
    loader = loader_of(data, sampler=RandomSampler(data))
    loader.skip(3)
    assert len(list(loader)) == 2
    assert len(data.read) == 3


def test_nothing_is_read_before_it_is_asked_for() -> None:
    data, stream = Counted(9), Stream(9)
    for loader in (loader_of(data), loader_of(stream)):
        next(iter(loader))
    assert data.read == [0, 1]
    assert stream.num_read == 2


def test_a_negative_skip_is_refused() -> None:
    with pytest.raises(ValueError, match="batches: got -1"):
        loader_of(make_rows(4)).skip(-1)


class Resumable(Stream):
    """A stream that can say where it is."""

    at = 0

    def __iter__(self) -> Iterator[Any]:
        while self.at < self.n:
            self.at, row = self.at + 1, self.at
            self.num_read += 1
            yield {"x": torch.tensor([float(row), float(self.epoch)])}
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def huggingface_stream(n: int) -> Any:
    return table(n).to_iterable_dataset(num_shards=2)


def shuffled_stream(n: int) -> Any:
    return huggingface_stream(n).shuffle(seed=3, buffer_size=4)


@pytest.mark.parametrize(
    "make", [make_rows, table, Stream, Resumable, huggingface_stream, shuffled_stream], ids=lambda make: make.__name__
)
def test_a_saved_position_goes_on_in_another_loader(make: Callable[[int], Any]) -> None:
    first = loader_of(make(9))
    list(first)
    batches = iter(first)
    next(batches), next(batches)
    position = first.state_dict()
    assert (position["epoch"], position["batch"]) == (1, 2)
    rest = list(batches)
    assert first.state_dict() == {"epoch": 2, "batch": 0, "stream": None}
    data = make(9)
    second = loader_of(data)
    second.load_state_dict(position)
    assert same(list(second), rest)
    if make is Resumable:
        assert data.num_read == 5
    # And the pass after it.
    assert same(list(second), list(first))


def test_in_evaluation_a_stream_is_read_ahead_and_goes_on_by_its_batches() -> None:
    first = loader_of(Resumable(9), is_training=False)
    batches = iter(first)
    next(batches)
    position, rest = first.state_dict(), list(batches)
    assert position == {"epoch": 0, "batch": 1, "stream": None}
    second = loader_of(Resumable(9), is_training=False)
    second.load_state_dict(position)
    assert same(list(second), rest)


def test_a_stream_of_several_ranks_goes_on_from_its_beginning() -> None:
    for rank in (0, 1):
        first = loader_of(Resumable(9), rank=rank, world=2)
        batches = iter(first)
        next(batches)
        position, rest = first.state_dict(), list(batches)
        second = loader_of(Resumable(9), rank=rank, world=2)
        second.load_state_dict(position)
        assert same(list(second), rest)
    assert rest[-1]["x"][:, 0].tolist() == [0.0]


def test_what_comes_after_some_batches_of_any_loader() -> None:
    data = make_rows(7)
    whole = list(loader_of(data))
    assert same(list(after(loader_of(data), 2)), whole[2:])
    plain: Any = DataLoader(data, 2, collate_fn=default_data_collator)  # type: ignore[arg-type]
    assert same(list(after(plain, 2)), whole[2:])
    assert after(plain, 0) is plain
    assert list(after([1, 2, 3], 1)) == [2, 3]
    prepared: Any = prepare_data_loader(
        DataLoader(data, 2, shuffle=True, collate_fn=default_data_collator),  # type: ignore[arg-type]
        use_seedable_sampler=True,
        data_seed=1,
    )
    prepared.set_epoch(3)
    expected = list(prepared)
    prepared.set_epoch(3)
    assert same(list(after(prepared, 2)), expected[2:])
