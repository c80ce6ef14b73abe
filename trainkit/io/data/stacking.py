"""The collator used where none is given: rows of equal shapes to a tree of tensors, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainkit.io.data.errors import BatchError
from trainkit.io.data.ragged import Ragged, as_tensor


def stack(rows: Any) -> Any:
    """A batch of tensors from rows of equal shapes; nothing is padded, converted or left out.

    A list holds rows: mappings and tuples of values become mappings and tuples of batches. A mapping or a tuple holds
    columns. Values are tensors, arrays, numbers or lists of numbers. Python integers become int64, floats the default
    float dtype, and all rows of a key must have the shape and dtype of the first.

    Args:
        rows: a list of rows, or columns.

    Returns: a tensor of shape [rows, ...] for each key, in a tree like that of one row.

    Raises: :class:`~trainkit.io.data.errors.BatchError`, a ValueError, for rows that differ in keys, shapes or dtypes,
        and for values that are no numbers; it names the key, the row, what was expected and what was found.

    Example:
        >>> stack([{"x": [1, 2], "y": 0.5}, {"x": [3, 4], "y": 1.5}])
        {'x': tensor([[1, 2],
                [3, 4]]), 'y': tensor([0.5000, 1.5000])}
    """
    return _rows(rows, "") if isinstance(rows, list) else _columns(rows, "")


def _columns(columns: Any, key: str) -> Any:
    if isinstance(columns, (Tensor, np.ndarray, Ragged)):
        return _whole(columns, key)
    if isinstance(columns, Mapping):
        return {name: _columns(column, _under(key, name)) for name, column in columns.items()}
    if isinstance(columns, tuple):
        return tuple(_columns(column, _under(key, i)) for i, column in enumerate(columns))
    if isinstance(columns, list):
        return _rows(columns, key)
    raise BatchError(f"{_said(key)}: expected a column of numbers, found {type(columns).__name__}")


def _rows(values: list[Any], key: str) -> Any:
    if not values:
        raise BatchError(f"{_said(key)}: expected at least one row, found none")
    first = values[0]
    if isinstance(first, Mapping):
        _check_alike(values, key, Mapping, lambda row: sorted(map(str, row)), "keys")
        return {name: _rows([row[name] for row in values], _under(key, name)) for name in first}
    if isinstance(first, tuple):
        _check_alike(values, key, tuple, len, "length")
        return tuple(_rows([row[i] for row in values], _under(key, i)) for i in range(len(first)))
    return _stacked(values, key)


def _stacked(values: list[Any], key: str) -> Tensor:
    kind = type(values[0])
    if kind in (bool, int, float) and all(type(value) is kind for value in values):
        return _number_column(values, key)
    tensors = [_tensor(value, key, i) for i, value in enumerate(values)]
    expected = _form(tensors[0])
    for i, tensor in enumerate(tensors):
        if _form(tensor) != expected:
            raise BatchError(f"{_said(key)}: expected {_shown(tensors[0])}, found {_shown(tensor)}", i)
    return torch.stack(tensors)


def _number_column(values: list[Any], key: str) -> Tensor:
    try:
        return torch.tensor(values)
    except (OverflowError, RuntimeError, ValueError):
        i = next(i for i, value in enumerate(values) if not -(1 << 63) <= value < 1 << 63)
        raise BatchError(f"{_said(key)}: expected integers of 64 bits, found {values[i]}", i) from None


def _tensor(value: Any, key: str, row: int) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype != object:
        return _from_array(np.asarray(value), key, row)
    if isinstance(value, (bool, int, float)) or (isinstance(value, Sequence) and not isinstance(value, (str, bytes))):
        try:
            return torch.tensor(value)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise BatchError(f"{_said(key)}: expected numbers of equal shapes, found a list: {error}", row) from None
    raise BatchError(
        f"{_said(key)}: expected a tensor, array, number or list of numbers, found {_named(value)}; "
        "leave the field out, or give a collate that makes numbers of it",
        row,
    )


def _from_array(array: np.ndarray[Any, Any], key: str, row: int | None = None) -> Tensor:
    try:
        return as_tensor(array)
    except (TypeError, BatchError):
        raise BatchError(f"{_said(key)}: expected numbers, found an array of {array.dtype}", row) from None


def _whole(column: Any, key: str) -> Tensor:
    if isinstance(column, Tensor):
        return column
    if isinstance(column, np.ndarray):
        return _from_array(column, key)
    lengths = column.lengths
    differing = (lengths != lengths[0]).nonzero().flatten().tolist()
    if differing:
        i = differing[0]
        raise BatchError(
            f"{_said(key)}: expected {int(lengths[0])} elements as in the first row, found {int(lengths[i])}; rows of "
            "different lengths need a collate that pads them",
            i,
        )
    dense: Tensor = column.values.unflatten(0, (len(column), int(lengths[0])))
    return dense


def _check_alike(values: list[Any], key: str, kind: type, of: Any, what: str) -> None:
    expected = of(values[0])
    for i, value in enumerate(values):
        if not isinstance(value, kind):
            raise BatchError(f"{_said(key)}: expected {type(values[0]).__name__}, found {_named(value)}", i)
        if of(value) != expected:
            raise BatchError(f"{_said(key)}: expected the {what} {expected}, found {of(value)}", i)


def _form(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def _shown(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


def _named(value: Any) -> str:
    return "None" if value is None else type(value).__name__


def _under(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


def _said(key: str) -> str:
    return f"key {key!r}" if key else "rows"
