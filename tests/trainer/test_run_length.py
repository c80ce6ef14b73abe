"""Counts: those of the Trainer of transformers, except where it counts wrong."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainingArguments

from tests.trainer.tiny import make_net
from trainkit.trainer.run_length import (
    count_items,
    num_examples,
    num_tokens,
    resume_position,
    run_length,
    take_group,
    tokens_in,
)
from trainkit.trainer.sharding import IterableDatasetShard

NAMES = ["epochs", "updates", "examples", "samples", "by_epochs", "batches", "steps"]


def arguments(steps: int, epochs: float, accumulation: int) -> Any:
    return SimpleNamespace(max_steps=steps, num_train_epochs=epochs, gradient_accumulation_steps=accumulation)


class Batches:
    """As much of a loader as counting needs."""

    def __init__(self, length: int | None, rows: int) -> None:
        self.length, self.dataset = length, range(rows)

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError
        return self.length


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    folder = str(tmp_path_factory.mktemp("run"))
    return Trainer(make_net(), TrainingArguments(folder, use_cpu=True, report_to=[]))


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize(("steps", "epochs"), [(-1, 3.0), (-1, 1.5), (-1, 0.0), (-1, 0.3), (7, 1.0), (1, 3.0)])
@pytest.mark.parametrize("length", [1, 3, 5, 8])
def test_the_length_of_a_run_is_that_of_transformers(
    theirs: Trainer, length: int, steps: int, epochs: float, accumulation: int
) -> None:
    args, total = arguments(steps, epochs, accumulation), 2 * accumulation
    args.include_tokens_per_second = False
    expected = theirs.set_initial_training_values(args, Batches(length, length * 2), total)
    found = run_length(args, length, length * 2, total)
    assert dict(zip(NAMES, found, strict=True)) == dict(zip(NAMES, expected, strict=True))


def test_a_run_over_data_without_length_is_that_of_transformers(theirs: Trainer) -> None:
    args = arguments(6, 3.0, 2)
    args.include_tokens_per_second = False
    expected = theirs.set_initial_training_values(args, Batches(None, 0), 4)
    assert run_length(args, None, 99, 4) == expected
    assert expected[0] == sys.maxsize


def test_no_steps_are_no_updates() -> None:
    epochs, _, _, samples, by_epochs, _, steps = run_length(arguments(0, 3.0, 1), 5, 10, 2)
    assert (epochs, samples, by_epochs, steps) == (0, 0, False, 0)
    assert run_length(arguments(0, 3.0, 1), None, 10, 2)[-1] == 0


@pytest.mark.parametrize(("length", "found"), [(None, "no length"), (0, "no batch")])
def test_epochs_that_cannot_be_counted_are_refused(length: int | None, found: str) -> None:
    with pytest.raises(ValueError, match=f"max_steps: got -1, but the training data have {found}"):
        run_length(arguments(-1, 3.0, 1), length, 0, 2)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_the_position_to_resume_at_is_where_a_run_was(accumulation: int) -> None:
    batches = 5
    updates = -(-batches // accumulation)
    position, step = (0, 0), 0
    for epoch in range(3):
        for first in range(0, batches, accumulation):
            assert resume_position(step, updates, accumulation) == position == (epoch, first)
            step += 1
            done = first + accumulation
            position = (epoch, done) if done < batches else (epoch + 1, 0)


def test_a_group_is_shorter_where_the_data_end() -> None:
    batches = iter(range(5))
    assert [take_group(batches, 2) for _ in range(4)] == [[0, 1], [2, 3], [4], []]


def batch(labels: Any) -> dict[str, Any]:
    return {"labels": torch.tensor(labels)}


def test_items_are_the_targets_that_the_loss_uses() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(config)
    ids = torch.randint(11, (2, 6))
    labels = torch.where(torch.rand(2, 6) < 0.4, -100, ids)
    count = count_items([{"labels": labels}], shifted=True)
    mean = model(input_ids=ids, labels=labels).loss
    given_count = model(input_ids=ids, labels=labels, num_items_in_batch=count).loss
    torch.testing.assert_close(mean, given_count)


def test_items_are_counted_over_all_batches() -> None:
    found = count_items([batch([[1, 2, -100]]), batch([[-100, 4, 5], [6, -100, -100]])])
    assert found is not None and int(found) == 5
    shifted = count_items([batch([[1, 2, -100]]), batch([[-100, 4, 5], [6, -100, -100]])], shifted=True)
    assert shifted is not None and int(shifted) == 3
    packed = {**batch([[1, 2, 3]]), "shift_labels": torch.tensor([[2, 3, -100]])}
    found = count_items([packed], shifted=True)
    assert found is not None and int(found) == 2
    named = count_items([{"targets": torch.tensor([1, 2])}], "targets")
    assert named is not None and int(named) == 2


@pytest.mark.parametrize(
    "batches", [[], [{"x": torch.ones(1)}], [{"labels": [1, 2]}], [torch.ones(2)], [{"labels": 1}]]
)
def test_no_labels_no_count(batches: list[Any]) -> None:
    assert count_items(batches) is None
    assert count_items(batches, shifted=True) is None


class Endless(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(4))


def test_examples_are_those_of_the_data_set_or_of_the_loaders_own_batches(theirs: Trainer) -> None:
    loader = DataLoader(range(10), batch_size=4)  # type: ignore[arg-type]
    assert num_examples(loader, 8) == 10 == theirs.num_examples(loader)
    shard = DataLoader(IterableDatasetShard(range(7), 2, num_processes=2), batch_size=2)
    assert num_examples(shard, 8) == 7

    class Sized(list[Any]):
        batch_size: int | None = None
        batch_sampler: Any = None

    five = Sized([0] * 5)
    assert num_examples(five, 8) == 40
    five.batch_size = 3
    assert num_examples(five, 8) == 15
    five.batch_size, five.batch_sampler = None, SimpleNamespace(batch_size=2)
    assert num_examples(five, 8) == 10
    with pytest.raises(TypeError):
        num_examples(DataLoader(Endless(), batch_size=2), 8)


def test_tokens_of_a_loader(theirs: Trainer) -> None:
    batches = [{"input_ids": torch.ones(2, 4)}] * 3 + [{"input_ids": torch.ones(1, 2)}]
    assert num_tokens(batches) == 26 == theirs.num_tokens(batches)
    assert num_tokens(batches, 5) == 40 == theirs.num_tokens(batches, 5)
    with pytest.warns(UserWarning, match="no 'input_ids'"):
        assert num_tokens([batches[0], {"x": torch.ones(1)}, batches[0]]) == 8


def test_tokens_of_a_batch() -> None:
    ids, mask = torch.tensor([[5, 6, 0]]), torch.tensor([[1, 1, 0]])
    padding = SimpleNamespace(pad_token_id=0)
    assert tokens_in({"input_ids": ids}, None, None, True) == 3
    assert tokens_in({"input_ids": ids}, None, None, "no") is None
    assert tokens_in({"x": ids}, None, None) is None
    assert tokens_in({"input_ids": ids, "attention_mask": mask}, None, None, "non_padding") == torch.tensor(2)
    assert tokens_in({"input_ids": ids}, None, padding, "non_padding") == torch.tensor(2)
    assert tokens_in({"input_ids": ids}, None, None, "non_padding") == 3
    named = torch.nn.Identity()
    named.main_input_name = "pixels"  # type: ignore[assignment]
    assert tokens_in({"pixels": torch.ones(4), "input_ids": ids}, named, None) == 4
