"""Batches of map-style data: rows are read and collated with as little work per row as the data allow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate

from trainkit.trainer import collators, foreign
from trainkit.trainer.data import ColumnsOnly

Rows = Sequence[int] | Tensor


class BatchReader:
    """Makes batches of row numbers.

    - A ``TensorDataset`` is read by one indexing of each tensor.
    - A ``datasets.Dataset`` with the default collator is read in columns, up to 32 batches at once.
    - Everything else in rows, by ``__getitems__`` where there is one, which the collator gets as a list.

    The batches are those that ``collate([dataset[i] for i in rows])`` gives. To worker processes a reader is a source.

    Args:
        dataset: map-style.
        collate: a list of rows to a batch.

    Example:
        >>> reader = BatchReader([{"x": 1}, {"x": 2}], collators.default_data_collator)
        >>> reader.fetch([1, 0])
        {'x': tensor([2, 1])}
    """

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate
        self._tensors: tuple[Tensor, ...] | None = None
        if type(dataset) is TensorDataset:
            self._tensors = dataset.tensors
        self._stacks = _stacks_tuples(collate)
        self._columns = _column_source(dataset, collate)
        self._dataset = dataset
        self._many = getattr(dataset, "__getitems__", None)

    @property
    def num_rows(self) -> int:
        """Of the data set."""
        return len(self._dataset)

    def fetch(self, indices: Rows) -> Any:
        """One batch."""
        if self._tensors is not None:
            at = indices if isinstance(indices, Tensor) else torch.tensor(indices)
            found = [tensor[at] for tensor in self._tensors]
            if self._stacks:
                return found
            return self._collate(list(zip(*(tensor.unbind() for tensor in found), strict=True)))
        listed = _listed(indices)
        if self._columns is not None:
            batch = collators.stacked_columns(self._columns.fetch(listed))
            if batch is not None:
                return batch
        if self._many is not None:
            return self._collate(self._many(listed))
        dataset = self._dataset
        return self._collate([dataset[i] for i in listed])

    def read_all(self, plan: Iterator[Rows]) -> Iterator[Any]:
        """The batches of a plan, each read when it is asked for, except what is said above of Arrow tables."""
        if self._columns is None:
            return map(self.fetch, plan)
        return self._in_groups(plan)

    def _in_groups(self, plan: Iterator[Rows]) -> Iterator[Any]:
        from trainkit.io.data.groups import GROUP_BATCHES, GROUP_BYTES

        # The first batch is not kept waiting for others.
        size = 1
        while group := list(islice(plan, size)):
            batches = self._group(group) if len(group) > 1 else [self.fetch(group[0])]
            size = max(1, min(size * 2, GROUP_BATCHES, GROUP_BYTES // max(1, _num_bytes(batches[0]))))
            yield from batches

    def _group(self, group: list[Rows]) -> list[Any]:
        sizes = [len(rows) for rows in group]
        whole = collators.stacked_columns(self._columns.fetch([row for rows in group for row in _listed(rows)]))
        # Lists whose lengths differ between batches, or values that only rows tell.
        if not whole:
            return [self.fetch(rows) for rows in group]
        parts = [torch.split(tensor, sizes) for tensor in whole.values()]
        return [dict(zip(whole, tensors, strict=True)) for tensors in zip(*parts, strict=True)]


def _listed(rows: Rows) -> list[int]:
    return rows.tolist() if isinstance(rows, Tensor) else list(rows)


def _stacks_tuples(collate: Any) -> bool:
    """Whether a collator does nothing with rows that are tuples of tensors but stack them into a list."""
    inner = collate.collator if isinstance(collate, ColumnsOnly) else collate
    return inner is default_collate or inner is collators.default_data_collator


def _column_source(dataset: Any, collate: Any) -> Any:
    """A source of columns whose stacked columns are the batch of the default collator; None where rows are needed."""
    if not foreign.is_hf_dataset(dataset) or not collators.is_default(collate) or not dataset.column_names:
        return None
    kind = dataset.format
    if kind["type"] == "torch" and _is_plain(kind, dataset):
        dataset = dataset.with_format(None)
    from trainkit.io.data.sources import as_source

    source: Any = as_source(dataset)
    # Others run transforms and decoders, or hold values that are no numbers in some rows only.
    return source if source.is_pure else None


def _is_plain(kind: Any, dataset: Any) -> bool:
    """Whether the format "torch" gives the very numbers that the default collator makes of Python's."""
    names, label = set(dataset.column_names), dataset.features.get("label")
    return (
        not kind["format_kwargs"]
        and set(kind["columns"]) == names
        # Lists of labels become floats where they are Python's, and stay what they are where they are tensors.
        and "label_ids" not in names
        and (label is None or hasattr(label, "dtype"))
        and torch.get_default_dtype() == torch.float32
    )


def _num_bytes(batch: Any) -> int:
    return sum(value.nbytes for value in batch.values() if isinstance(value, Tensor)) if isinstance(batch, dict) else 0
