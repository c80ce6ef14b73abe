"""Rows of a ``datasets.Dataset`` as columns of tensors, without a Python object per row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from trainkit.io.data.ragged import Ragged

_SCAN_ROWS = 10_000


class ArrowRows:
    """The rows of a ``datasets.Dataset``, a batch of columns at a time.

    Numbers become a tensor. Lists of numbers become a :class:`~trainkit.io.data.ragged.Ragged`, lists of a fixed size
    and arrays a tensor. Text and other values become a list. A dataset that has a format or transform of its own
    (``with_format``, ``with_transform``), or columns that are decoded (images, audio), gives what ``dataset[indices]``
    gives.

    Args:
        dataset: the dataset.

    Example:
        >>> from datasets import Dataset
        >>> ArrowRows(Dataset.from_dict({"label": [0, 1, 2], "ids": [[5], [6, 7], []]})).fetch([1, 0])
        {'label': tensor([1, 0]), 'ids': Ragged(values=tensor([6, 7, 5]), offsets=tensor([0, 2, 3]))}
    """

    def __init__(self, dataset: Any) -> None:
        self._as_given = dataset.format["type"] is not None or _is_decoded(dataset)
        self._dataset = dataset if self._as_given else dataset.with_format("arrow")

    @property
    def num_rows(self) -> int:
        return len(self._dataset)

    def fetch(self, indices: Sequence[int]) -> Any:
        first, last = indices[0], indices[-1]
        # A range is one slice of the file. The last row tells cheaply that it cannot be one.
        in_turn = last - first == len(indices) - 1 and list(indices) == list(range(first, last + 1))
        rows = self._dataset[range(first, last + 1) if in_turn else list(indices)]
        return rows if self._as_given else table_columns(rows)


def table_columns(table: pa.Table) -> dict[str, Any]:
    """The columns of an Arrow table: tensors, :class:`~trainkit.io.data.ragged.Ragged`, or lists of Python values.

    A column with a null in it becomes a list, whose None a collator can name.

    Example:
        >>> table_columns(pa.table({"x": [1.5, 2.5], "text": ["a", "b"]}))
        {'x': tensor([1.5000, 2.5000], dtype=torch.float64), 'text': ['a', 'b']}
    """
    return {name: _column(table.column(name).combine_chunks()) for name in table.column_names}


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
    if array.null_count:
        raise ValueError(f"lengths: column {column!r} has {array.null_count} nulls, expected a value in each row")
    if pa.types.is_integer(array.type):
        return _tensor(array).to(torch.int64)
    if not _is_list(array.type) and not pa.types.is_string(array.type) and not pa.types.is_large_string(array.type):
        raise ValueError(f"lengths: column {column!r} holds {array.type}, expected lists, text or integers")
    counted = pc.list_value_length(array) if _is_list(array.type) else pc.utf8_length(array)
    return _tensor(counted).to(torch.int64)


def _column(array: Any) -> Any:
    if isinstance(array.type, pa.ExtensionType):
        return _extension(array)
    if array.null_count == 0:
        if _is_number(array.type):
            return _tensor(array)
        if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
            values = _dense(_elements(array))
            if values is not None:
                return Ragged(values, _offsets(array))
        dense = _dense(array)
        if dense is not None:
            return dense
    return array.to_pylist()


def _extension(array: Any) -> Any:
    """Arrays of datasets (Array2D and so on) know how they become an array of NumPy, of objects if rows differ."""
    values = array.to_numpy(zero_copy_only=False)
    return array.to_pylist() if values.dtype == object else torch.from_numpy(np.array(values))


def _dense(array: Any) -> Tensor | None:
    """A tensor with one row for each element, or None if their shapes differ or they are no numbers."""
    if array.null_count:
        return None
    if _is_number(array.type):
        return _tensor(array)
    if not _is_list(array.type) or not len(array):
        return None
    values = _dense(_elements(array))
    if values is None or len(values) % len(array):
        return None
    width = len(values) // len(array)
    if not pa.types.is_fixed_size_list(array.type) and bool((_offsets(array).diff() != width).any()):
        return None
    return values.reshape(len(array), width, *values.shape[1:])


def _elements(array: Any) -> Any:
    """The elements of all lists of an array, which may be a slice of a longer one."""
    if pa.types.is_fixed_size_list(array.type):
        return array.flatten()
    first, last = array.offsets[0].as_py(), array.offsets[-1].as_py()
    return array.values.slice(first, last - first)


def _offsets(array: Any) -> Tensor:
    offsets = torch.from_numpy(np.array(array.offsets, dtype=np.int64))
    return offsets - offsets[0]


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_number(kind: Any) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _tensor(array: Any) -> Tensor:
    # Arrow's memory may be a read-only file, which torch cannot express: one copy.
    return torch.from_numpy(np.array(array.to_numpy(zero_copy_only=False)))


def _is_decoded(dataset: Any) -> bool:
    from datasets.features.features import require_decoding

    return any(require_decoding(feature) for feature in dataset.features.values())
