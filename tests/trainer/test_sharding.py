"""What each process gets: that of accelerate and transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, IterableDataset, RandomSampler, SequentialSampler
from transformers.trainer_pt_utils import IterableDatasetShard as TheirShard

from trainkit.trainer.samplers import SeededRandomSampler
from trainkit.trainer.sharding import IterableDatasetShard, RankBatchSampler, pieces, stream_parts


class Numbers(IterableDataset[int]):
    def __init__(self, n: int, shuffled: bool = False) -> None:
        self.n, self.generator = n, torch.Generator() if shuffled else None

    def __iter__(self) -> Iterator[int]:
        if self.generator is None:
            return iter(range(self.n))
        return iter(torch.randperm(self.n, generator=self.generator).tolist())

    def __len__(self) -> int:
        return self.n


@given(st.integers(0, 40), st.integers(1, 5), st.integers(1, 4), st.booleans(), st.booleans(), st.booleans(), st.data())
def test_the_batches_of_a_rank_are_those_of_accelerate(
    n: int, size: int, world: int, drop_last: bool, even: bool, split: bool, data: Any
) -> None:
    rank = data.draw(st.integers(0, world - 1))
    whole = size * world if split else size
    theirs = BatchSampler(SequentialSampler(range(n)), whole, drop_last)
    if world > 1:
        theirs = BatchSamplerShard(theirs, world, rank, split_batches=split, even_batches=even)
    for sampler in (SequentialSampler(range(n)), list(range(n))):
        ours = RankBatchSampler(sampler, size, drop_last, world, rank, even)
        assert list(ours) == list(theirs)
        assert len(ours) == len(theirs)
        batches = [[int(row) for row in rows] for rows in ours.after(0)]
        for start in range(len(batches) + 2):
            assert [[int(row) for row in rows] for rows in ours.after(start)] == batches[start:]


def test_a_sampler_is_asked_for_no_more_rows_than_are_taken() -> None:
    asked: list[int] = []

    def rows() -> Iterator[int]:
        for i in range(100):
            asked.append(i)
            yield i

    batches = iter(RankBatchSampler(rows(), 2, num_processes=2, process_index=1))
    assert next(batches) == [2, 3]
    assert asked == [0, 1, 2, 3]


def test_going_on_in_a_whole_order_draws_no_batch_before() -> None:
    sampler = SeededRandomSampler(RandomSampler(range(10)), seed=1)
    rest = [rows.tolist() for rows in RankBatchSampler(sampler, 3).after(2) if isinstance(rows, torch.Tensor)]
    assert rest == [rows.tolist() for rows in sampler.order().split(3)][2:]


@given(st.integers(0, 20), st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_the_shard_of_a_stream_is_that_of_transformers(n: int, size: int, world: int, drop_last: bool) -> None:
    for rank in range(world):
        options: dict[str, Any] = {"batch_size": size, "drop_last": drop_last, "num_processes": world}
        ours = IterableDatasetShard(Numbers(n), process_index=rank, **options)
        theirs = TheirShard(Numbers(n), process_index=rank, **options)
        assert list(ours) == list(theirs)
        assert len(ours) == len(theirs)
        if not drop_last:
            assert ours.num_examples == n == theirs.num_examples


def test_the_shard_of_a_shuffled_stream_follows_from_seed_and_epoch() -> None:
    ours, theirs = (kind(Numbers(9, shuffled=True), 2, seed=3) for kind in (IterableDatasetShard, TheirShard))
    for epoch in (0, 4):
        ours.set_epoch(epoch)
        theirs.set_epoch(epoch)
        assert list(ours) == list(theirs)


def test_a_shard_tells_its_data_set_the_epoch() -> None:
    class Told(Numbers):
        epoch = -1

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    data = Told(3)
    IterableDatasetShard(data).set_epoch(5)
    assert data.epoch == 5


def test_a_shard_refuses_an_index_outside() -> None:
    with pytest.raises(ValueError, match="process_index: got 2 of 2"):
        IterableDatasetShard(Numbers(3), num_processes=2, process_index=2)


@given(st.integers(0, 30), st.integers(1, 4), st.integers(1, 4))
def test_the_parts_of_a_stream_have_every_row_and_are_even(n: int, size: int, world: int) -> None:
    parts = [list(stream_parts(range(n), size, rank, world)) for rank in range(world)]
    for together in zip(*parts, strict=True):
        assert len({len(part) for part, _ in together}) == 1
        real = {count for _, count in together}
        assert len(real) == 1
        rows = [row for part, _ in together for row in part]
        # What comes after the real rows are repetitions of the first of the stream.
        assert rows[real.pop() :] == [i % min(n, world) for i in range(len(rows) - together[0][1])]
    given_rows = [row for together in zip(*parts, strict=True) for row in _real(together)]
    assert given_rows == list(range(n))


def _real(together: tuple[tuple[list[int], int], ...]) -> list[int]:
    return [row for part, _ in together for row in part][: together[0][1]]


def test_parts_of_a_stream_can_be_whole_only() -> None:
    assert list(stream_parts("abcde", 2, 1, 2, drop_last=True)) == [(["c", "d"], 4)]


def test_pieces_can_stay_short() -> None:
    assert list(pieces("abc", 2, fill=False)) == [["a", "b"], ["c"]]
    assert list(pieces("abc", 2, drop_last=True)) == [["a", "b"]]
