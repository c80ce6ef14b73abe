"""Rows of a ``datasets.Dataset`` as columns of tensors, without a Python object per row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from trainkit.io.data.chunks import ListColumn, NumberColumn
from trainkit.io.data.ragged import from_arrow, is_list, is_number

_SCAN_ROWS = 10_000


class ArrowRows:
    """The rows of a ``datasets.Dataset``, a batch of columns at a time.

    Numbers become a tensor. Lists of numbers become a :class:`~trainkit.io.data.ragged.Ragged`, lists of a fixed size
    and arrays a tensor. Text and other values become a list. A dataset that has a format or transform of its own
    (``with_format``, ``with_transform``), or columns that are decoded (images, audio), gives what ``dataset[indices]``
    gives.

    Columns of numbers and of lists of numbers without a null are copied straight out of Arrow's memory, which is the
    file itself where the dataset is mapped; all others are gathered by ``datasets``.

    Args:
        dataset: the dataset.

    Example:
        >>> from datasets import Dataset
        >>> ArrowRows(Dataset.from_dict({"label": [0, 1, 2], "ids": [[5], [6, 7], []]})).fetch([1, 0])
        {'label': tensor([1, 0]), 'ids': Ragged(values=tensor([6, 7, 5]), offsets=tensor([0, 2, 3]))}
    """

    def __init__(self, dataset: Any) -> None:
        self._as_given = dataset.format["type"] is not None or _is_decoded(dataset)
        self.is_pure = False
        self._dataset = dataset
        self._direct: dict[str, NumberColumn | ListColumn] = {}
        self._rest: Any = None
        self._selected: NumberColumn | None = None
        if not self._as_given:
            self._open()

    @property
    def num_rows(self) -> int:
        return len(self._dataset)

    @property
    def files(self) -> list[str]:
        """Those that the rows lie in; none for a dataset in memory, or one that makes its rows when they are read."""
        return [file["filename"] for file in self._dataset.cache_files] if self.is_pure else []

    def fetch(self, indices: Sequence[int]) -> Any:
        if self._as_given:
            return self._dataset[_range_of(indices)]
        rows = np.asarray(indices, dtype=np.int64)
        if self._selected is not None:
            rows = self._selected.take(rows).numpy().astype(np.int64)
        rest = {} if self._rest is None else table_columns(self._rest[_range_of(indices)])
        return {
            name: self._direct[name].take(rows) if name in self._direct else rest[name]
            for name in self._dataset.column_names
        }

    def _open(self) -> None:
        table, names = self._dataset.data, self._dataset.column_names
        direct = {name: _direct_column(table.column(name)) for name in names}
        self._direct = {name: column for name, column in direct.items() if column is not None}
        others = [name for name in names if name not in self._direct]
        if others:
            self._rest = self._dataset.select_columns(others).with_format("arrow")
        self.is_pure = all(_has_one_form(table.column(name)) for name in others)
        # What `select` and `shuffle` of datasets leave in place of copied rows: the number of each row in the table.
        if self._dataset._indices is not None:
            self._selected = NumberColumn(self._dataset._indices.column(0))

    def __reduce__(self) -> tuple[Any, ...]:
        # A dataset in a file travels to another process by name; views of its memory would be copies.
        return ArrowRows, (self._dataset,)


def table_columns(table: pa.Table) -> dict[str, Any]:
    """The columns of an Arrow table, each as :func:`~trainkit.io.data.ragged.from_arrow` gives it.

    Example:
        >>> table_columns(pa.table({"x": [1.5, 2.5], "text": ["a", "b"]}))
        {'x': tensor([1.5000, 2.5000], dtype=torch.float64), 'text': ['a', 'b']}
    """
    return {name: from_arrow(table.column(name)) for name in table.column_names}


def list_lengths(dataset: Any, column: str) -> Tensor:
    """The number of elements of each row of a list column, or a column of integers itself, read in large parts.

    Args:
        dataset: a ``datasets.Dataset``.
        column: its column.

    Returns: int64 tensor of shape (rows,).

    Raises: ValueError if there is no such column, it holds neither lists, text nor integers, or a row is null.

    Example:
        >>> from datasets import Dataset
        >>> list_lengths(Dataset.from_dict({"ids": [[5], [6, 7], []]}), "ids")
        tensor([1, 2, 0])
    """
    if column not in dataset.column_names:
        raise ValueError(f"lengths: got {column!r}, but the dataset has {', '.join(dataset.column_names)}")
    parts = dataset.select_columns([column]).with_format("arrow").iter(batch_size=_SCAN_ROWS)
    lengths = [_lengths(part.column(column).combine_chunks(), column) for part in parts]
    return torch.cat(lengths) if lengths else torch.empty(0, dtype=torch.int64)


def _lengths(array: Any, column: str) -> Tensor:
    kind = array.type
    if array.null_count:
        raise ValueError(f"lengths: column {column!r} has {array.null_count} nulls, expected a value in each row")
    if not is_list(kind) and not pa.types.is_integer(kind) and not _is_text(kind):
        raise ValueError(f"lengths: column {column!r} holds {kind}, expected lists, text or integers")
    counted = pc.list_value_length(array) if is_list(kind) else pc.utf8_length(array) if _is_text(kind) else array
    lengths: Tensor = from_arrow(counted).to(torch.int64)
    return lengths


def _direct_column(column: pa.ChunkedArray) -> NumberColumn | ListColumn | None:
    """A column that can be copied as it lies in memory; None for any other."""
    kind = column.type
    if column.null_count or not len(column):
        return None
    if _lies_plain(kind):
        return NumberColumn(column)
    if not is_list(kind) or not _lies_plain(kind.value_type) or any(c.values.null_count for c in column.chunks):
        return None
    return NumberColumn(column) if pa.types.is_fixed_size_list(kind) else ListColumn(column)


def _has_one_form(column: pa.ChunkedArray) -> bool:
    """Whether :func:`~trainkit.io.data.ragged.from_arrow` surely makes the same of any of its rows: text, or booleans
    of which none is null. Of others some rows may give a tensor and some a list."""
    kind = column.type
    return _is_text(kind) or _is_bytes(kind) or (pa.types.is_boolean(kind) and not column.null_count)


def _lies_plain(kind: Any) -> bool:
    # Booleans are bits in Arrow.
    return is_number(kind) and not pa.types.is_boolean(kind)


def _is_text(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_bytes(kind: Any) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _range_of(indices: Sequence[int]) -> Any:
    """Rows as a range if they are one, which is a slice of the file for ``datasets``."""
    first, last = indices[0], indices[-1]
    # The last row tells cheaply that it cannot be one.
    in_turn = last - first == len(indices) - 1 and list(indices) == list(range(first, last + 1))
    return range(first, last + 1) if in_turn else list(indices)


def _is_decoded(dataset: Any) -> bool:
    from datasets.features.features import require_decoding

    return any(require_decoding(feature) for feature in dataset.features.values())
