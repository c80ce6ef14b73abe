"""Orders: those of transformers and accelerate, and a function of seed and epoch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import RandomSampler, SequentialSampler
from transformers.trainer_pt_utils import DistributedLengthGroupedSampler as TheirDistributed
from transformers.trainer_pt_utils import LengthGroupedSampler as TheirGrouped
from transformers.trainer_pt_utils import get_length_grouped_indices

from trainkit.trainer.samplers import (
    DistributedLengthGroupedSampler,
    LengthGroupedSampler,
    SeededRandomSampler,
    eval_sampler,
    eval_sampler_for,
    has_length,
    is_stream,
    length_grouped_order,
    lengths_of,
    train_sampler,
    train_sampler_for,
)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows_of(lengths: list[int]) -> list[dict[str, Any]]:
    return [{"input_ids": [0] * length} for length in lengths]


LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=120)


@given(LENGTHS, st.integers(1, 6), st.integers(0, 3))
def test_length_grouped_order_is_that_of_transformers(lengths: list[int], batch_size: int, seed: int) -> None:
    order = length_grouped_order(lengths, batch_size, generator(seed)).tolist()
    # Of several megabatches with the longest row, transformers takes the one that torch.argmax finds.
    if lengths.count(max(lengths)) == 1:
        assert order == get_length_grouped_indices(lengths, batch_size, generator=generator(seed))
    assert sorted(order) == list(range(len(lengths)))
    assert lengths[order[0]] == max(lengths)


def test_length_grouped_order_refuses_batches_of_nothing() -> None:
    with pytest.raises(ValueError, match="batch_size: got 0"):
        length_grouped_order([1, 2], 0)


def test_no_rows_have_an_empty_order() -> None:
    assert length_grouped_order([], 2).tolist() == []


@pytest.mark.parametrize("epoch", [0, 1, 5])
@pytest.mark.parametrize("options", [{}, {"replacement": True, "num_samples": 70}, {"num_samples": 23}])
def test_the_random_order_of_an_epoch_is_that_of_accelerate(epoch: int, options: dict[str, Any]) -> None:
    ours = SeededRandomSampler(RandomSampler(range(10), **options), seed=3)
    theirs = SeedableRandomSampler(range(10), **options, data_seed=3)
    ours.set_epoch(epoch)
    theirs.set_epoch(epoch)
    assert list(ours) == list(theirs)
    # A pass is followed by that of the next epoch.
    assert list(ours) == list(theirs)


def test_the_random_order_does_not_depend_on_the_global_generator() -> None:
    sampler = SeededRandomSampler(RandomSampler(range(50)), seed=3)
    before = torch.get_rng_state()
    first = sampler.order()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert torch.equal(sampler.order(), first)


def test_a_grouped_sampler_with_a_generator_is_that_of_transformers() -> None:
    lengths = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
    ours = LengthGroupedSampler(2, rows_of(lengths), generator=generator(1))
    theirs = TheirGrouped(2, rows_of(lengths), generator=generator(1))
    assert list(ours) == list(theirs)
    assert len(ours) == len(theirs)
    torch.manual_seed(5)
    drawn = list(LengthGroupedSampler(2, lengths=lengths))
    torch.manual_seed(5)
    assert drawn == list(TheirGrouped(2, lengths=lengths))


def test_a_seeded_grouped_sampler_replays_any_epoch() -> None:
    sampler = LengthGroupedSampler(2, lengths=list(range(30)), seed=4)
    sampler.set_epoch(2)
    second = list(sampler)
    sampler.set_epoch(0)
    assert list(sampler) != second
    torch.rand(3)
    sampler.set_epoch(2)
    assert list(sampler) == second


def test_a_grouped_sampler_needs_one_source_of_lengths_and_of_chance() -> None:
    with pytest.raises(ValueError, match="dataset, lengths: got neither"):
        LengthGroupedSampler(2)
    with pytest.raises(ValueError, match="seed, generator: got both"):
        LengthGroupedSampler(2, lengths=[1], generator=generator(0), seed=0)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_the_distributed_grouped_sampler_is_that_of_transformers(drop_last: bool, replicas: int) -> None:
    lengths = list(range(1, 12))
    for rank in range(replicas):
        options: dict[str, Any] = {"num_replicas": replicas, "rank": rank, "seed": 3, "lengths": lengths}
        ours = DistributedLengthGroupedSampler(2, drop_last=drop_last, **options)
        theirs = TheirDistributed(2, drop_last=drop_last, **options)
        ours.set_epoch(4)
        theirs.set_epoch(4)
        assert list(ours) == list(theirs)
        assert len(ours) == len(list(ours))


def test_a_distributed_sampler_refuses_a_rank_outside() -> None:
    with pytest.raises(ValueError, match="rank: got 2 of num_replicas=2"):
        DistributedLengthGroupedSampler(2, num_replicas=2, rank=2, lengths=[1])


def test_lengths_are_given_by_a_column_or_measured() -> None:
    data = Dataset.from_dict({"input_ids": [[1], [2, 3], []], "length": [7, 8, 9], "pixels": [[1, 1], [2], [3]]})
    assert lengths_of(data, "length") == [7, 8, 9]
    assert lengths_of(data, "not there") == [1, 2, 0]
    assert lengths_of(data, model_input_name="pixels") == [2, 1, 1]
    assert lengths_of(data.with_format("torch")) == [1, 2, 0]
    assert lengths_of([{"input_ids": torch.zeros(4)}]) == [4]


@pytest.mark.parametrize("rows", [[{"x": [1]}], [(1, 2)], [{"input_ids": 3}]])
def test_rows_without_lengths_are_refused(rows: list[Any]) -> None:
    with pytest.raises(ValueError, match="group_by_length: row 0 is"):
        lengths_of(rows)


def test_what_is_a_stream() -> None:
    class Unsized:
        def __getitem__(self, i: int) -> int:
            return i

    assert is_stream(x for x in "ab")
    assert not is_stream("ab")
    assert not is_stream(Unsized())
    assert not has_length(Unsized())
    assert has_length("ab")


def args(**changes: Any) -> Any:
    fields: dict[str, Any] = {
        "group_by_length": False,
        "length_column_name": "length",
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "seed": 42,
        "data_seed": None,
        "world_size": 1,
    }
    return SimpleNamespace(**{**fields, **changes})


def test_training_is_in_random_order_or_grouped() -> None:
    assert type(train_sampler_for(args(), rows_of([1, 2]))) is RandomSampler
    assert train_sampler(None) is None
    assert train_sampler_for(args(group_by_length=True), iter([])) is None
    names = SimpleNamespace(model_input_names=["pixels", "input_ids"])
    data = [{"pixels": [0] * n} for n in (1, 4, 2)]
    grouped = train_sampler_for(args(group_by_length=True), data, names)
    assert isinstance(grouped, LengthGroupedSampler)
    assert (grouped.batch_size, grouped.lengths, grouped.seed) == (4, [1, 4, 2], 42)
    other = train_sampler_for(args(group_by_length=True, data_seed=3), data, names)
    assert isinstance(other, LengthGroupedSampler) and other.seed == 3


def test_evaluation_keeps_the_order_of_the_data_unless_asked() -> None:
    rows = rows_of([1, 3, 2])
    sampler = eval_sampler_for(args(group_by_length=True), rows)
    assert type(sampler) is SequentialSampler
    assert eval_sampler_for(args(world_size=2), rows) is None
    assert eval_sampler_for(args(), iter([])) is None
    assert next(iter(eval_sampler(rows, group_by_length=True) or ())) == 1
