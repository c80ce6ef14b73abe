"""Rows, streams and loaders for tests of the data of the Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import IterableDataset

from tests.trainer.tiny import make_rows
from trainkit.trainer.collators import default_data_collator
from trainkit.trainer.dataloaders import TrainerDataLoader, make_dataloader


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, torch.Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(theirs, dict):
        return list(ours) == list(theirs) and all(same(ours[name], theirs[name]) for name in theirs)
    if isinstance(theirs, (list, tuple)):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return bool(ours == theirs)


class Stream(IterableDataset[Any]):
    """Rows that depend on the epoch, and a count of those that were read."""

    def __init__(self, n: int, sized: bool = True) -> None:
        self.n, self.sized, self.epoch, self.num_read = n, sized, 0, 0

    def __iter__(self) -> Iterator[Any]:
        for i in range(self.n):
            self.num_read += 1
            yield {"x": torch.tensor([float(i), float(self.epoch)])}

    def __len__(self) -> int:
        if not self.sized:
            raise TypeError
        return self.n

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class Counted:
    """Map-style rows, and which of them were read."""

    def __init__(self, n: int) -> None:
        self.rows, self.read = make_rows(n), list[int]()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        self.read.append(i)
        return self.rows[i]


def table(n: int) -> Dataset:
    return Dataset.from_dict({"x": [row["x"].tolist() for row in make_rows(n)], "labels": list(range(n))})


DATA: dict[str, Callable[[int], Any]] = {
    "list": make_rows,
    "table": table,
    "formatted": lambda n: table(n).with_format("torch"),
    "counted": Counted,
    "stream": Stream,
}


def loader_of(data: Any, **options: Any) -> TrainerDataLoader:
    fields: dict[str, Any] = {"batch_size": 2, "collate_fn": default_data_collator, "seed": 3}
    return make_dataloader(data, **{**fields, **options})
