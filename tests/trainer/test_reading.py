"""Batches read the short way are those of rows read one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, List, Value
from torch.utils.data import Subset, TensorDataset, default_collate
from transformers import default_data_collator as theirs

from tests.trainer.rows import same
from tests.trainer.tiny import make_rows
from trainkit.io.data.groups import GROUP_BATCHES
from trainkit.trainer.collators import default_data_collator
from trainkit.trainer.data import ColumnsOnly
from trainkit.trainer.reading import BatchReader

ROWS = 70
PLAN = [[3, 1], [0, 1], [2, 2], [69, 5], [7, 8], [9, 10], [11, 12], [13, 14], [15, 16], [4]]


def table(**columns: Any) -> Dataset:
    ids = [[i, i + 1, i + 2] for i in range(ROWS)]
    given = {
        "input_ids": ids,
        "weight": [i / 4 for i in range(ROWS)],
        "text": ["a"] * ROWS,
        "label": [i % 3 for i in range(ROWS)],
    }
    return Dataset.from_dict({**given, **columns})


def small_integers() -> Dataset:
    kinds = Features({"x": List(Value("int16")), "h": Value("float16"), "label": Value("bool"), "u": Value("uint8")})
    rows = {
        "x": [[i, 2] for i in range(ROWS)],
        "h": [1.5] * ROWS,
        "label": [i % 2 == 0 for i in range(ROWS)],
        "u": [7] * ROWS,
    }
    return Dataset.from_dict(rows, features=kinds)


def with_gaps() -> Dataset:
    return table(extra=[None, *range(1, ROWS)], flags=[[True, False]] * ROWS)


TABLES: list[Callable[[], Dataset]] = [
    table,
    small_integers,
    with_gaps,
    lambda: table().shuffle(seed=3),
    lambda: table().select(range(ROWS)).with_format("torch"),
    lambda: table(label=[[1, 0]] * ROWS),
    lambda: table(label=[[1, 0]] * ROWS).with_format("torch"),
    lambda: table().with_format("torch", columns=["weight"]),
    lambda: table().with_format("torch", dtype=torch.float64),
    lambda: table().with_format("numpy"),
    lambda: table().with_transform(lambda batch: {"x": [len(ids) for ids in batch["input_ids"]]}),
    lambda: table(label_ids=[[i, 1] for i in range(ROWS)]).remove_columns("label"),
]


@pytest.mark.parametrize("make", TABLES)
def test_tables_give_the_batches_of_their_rows(make: Callable[[], Dataset]) -> None:
    data = make()
    reader = BatchReader(data, default_data_collator)
    for rows, batch in zip(PLAN, reader.read_all(iter(PLAN)), strict=True):
        # As a DataLoader reads them: some formats give other dtypes row by row.
        assert same(batch, default_data_collator(data.__getitems__(rows)))
        assert same(reader.fetch(torch.tensor(rows)), batch)


@pytest.mark.parametrize("make", [table, small_integers, lambda: table().with_format("torch")])
def test_tables_give_the_batches_of_transformers(make: Callable[[], Dataset]) -> None:
    data = make()
    for rows, batch in zip(PLAN, BatchReader(data, theirs).read_all(iter(PLAN)), strict=True):
        assert same(batch, theirs([data[i] for i in rows]))


def test_lists_of_several_lengths_are_read_where_batches_have_one() -> None:
    data = table(input_ids=[[1] * (1 + i // 2) for i in range(ROWS)])
    plan = [[i, i + 1] for i in range(0, ROWS, 2)]
    for rows, batch in zip(plan, BatchReader(data, default_data_collator).read_all(iter(plan)), strict=True):
        assert same(batch, theirs([data[i] for i in rows]))
    with pytest.raises(ValueError, match="length"):
        BatchReader(data, default_data_collator).fetch([0, 2])


def test_a_group_is_as_large_as_memory_allows_and_shares_no_element() -> None:
    plan = [[i % ROWS] for i in range(100)]
    asked: list[int] = []

    def told() -> Any:
        for i, rows in enumerate(plan):
            asked.append(i)
            yield rows

    batches = BatchReader(table(), default_data_collator).read_all(told())
    first = next(batches)
    assert asked == [0]
    kept = [first, *(next(batches) for _ in range(70))]
    assert len(asked) == 1 + 2 + 4 + 8 + 16 + 32 + GROUP_BATCHES
    before = copy.deepcopy(kept[40])
    for batch in [*kept[:40], *kept[41:]]:
        batch["input_ids"].zero_()
    assert same(kept[40], before)
    large = Dataset.from_dict({"x": torch.zeros(4, 1 << 18).tolist()}).with_format("torch")
    asked.clear()
    plan = [[0, 1, 2, 3]] * 5
    batches = BatchReader(large, default_data_collator).read_all(told())
    next(batches), next(batches)
    assert asked == [0, 1]


@pytest.mark.parametrize("collate", [default_collate, default_data_collator, ColumnsOnly(default_collate, ["x"])])
def test_tensors_are_indexed_once(collate: Any) -> None:
    data = TensorDataset(torch.randn(ROWS, 3), torch.arange(ROWS))
    reader = BatchReader(data, collate)
    for rows, batch in zip(PLAN, reader.read_all(iter(PLAN)), strict=True):
        assert same(batch, default_collate([data[i] for i in rows]))


def test_any_collator_gets_the_rows_of_tensors() -> None:
    data = TensorDataset(torch.randn(ROWS, 3), torch.arange(ROWS))
    rows = BatchReader(data, lambda given: given).fetch([5, 2])
    assert same(rows, [data[5], data[2]])
    rows[0][0].zero_()
    assert bool(data[5][0].abs().sum() > 0)


def test_a_subclass_of_tensor_datasets_reads_as_it_likes() -> None:
    class Doubled(TensorDataset):
        def __getitem__(self, i: int) -> Any:
            return (super().__getitem__(i)[0] * 2,)

    data = Doubled(torch.arange(4.0))
    assert same(BatchReader(data, default_collate).fetch([3, 1]), [torch.tensor([6.0, 2.0])])


@pytest.mark.parametrize(
    "make", [table, lambda: table().with_format("torch"), make_rows, lambda: Subset(make_rows(), [1, 0, 2])]
)
def test_any_collator_gets_a_list_of_rows(make: Callable[[], Any]) -> None:
    data = make()
    seen: list[Any] = []

    def collate(rows: list[Any]) -> Any:
        assert type(rows) is list
        seen.append(rows)
        return len(rows)

    assert list(BatchReader(data, collate).read_all(iter([[1, 0], torch.tensor([2])]))) == [2, 1]
    assert same(seen, [[data[1], data[0]], [data[2]]])


def test_a_number_of_rows() -> None:
    assert BatchReader([1, 2, 3], len).num_rows == 3
