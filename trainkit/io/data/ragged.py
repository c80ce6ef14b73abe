"""Columns of sequences of different lengths: one flat tensor and where each row begins in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from trainkit.io.data.errors import BatchError

Columns = dict[str, Any]
"""Fields by name; each holds a value per row: a tensor, an array, an Arrow array, a list, a :class:`Ragged`."""


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths, one after the other. Row i is ``values[offsets[i] : offsets[i + 1]]``.

    Args:
        values: [N, ...], the elements of all rows.
        offsets: int64 [R + 1], not decreasing, from 0 to N.

    Raises: ValueError for offsets of another form.

    Example:
        >>> column = Ragged(torch.tensor([5, 6, 7]), torch.tensor([0, 1, 3]))
        >>> len(column), column[1]
        (2, tensor([6, 7]))

    Source: the layout of Arrow's lists and of ``torch.nested`` (jagged).
    """

    values: Tensor
    offsets: Tensor

    def __post_init__(self) -> None:
        o = self.offsets
        if o.dtype != torch.int64 or o.dim() != 1 or not len(o):
            raise ValueError(f"offsets: got {o.dtype} of shape {tuple(o.shape)}, expected int64 of shape (rows + 1,)")
        if o[0] != 0 or o[-1] != len(self.values) or bool((o.diff() < 0).any()):
            raise ValueError(
                f"offsets: got {int(o[0])} to {int(o[-1])} for {len(self.values)} values, expected numbers that do not "
                "decrease, from 0 to the number of values"
            )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Tensor:
        if not 0 <= row < len(self):
            raise IndexError(f"row: got {row}, expected 0 to {len(self) - 1}")
        return self.values[int(self.offsets[row]) : int(self.offsets[row + 1])]

    @property
    def lengths(self) -> Tensor:
        """int64 [R], elements per row."""
        return self.offsets.diff()

    def part(self, start: int, stop: int) -> Ragged:
        """Rows ``start`` to ``stop`` - 1, in the same memory."""
        offsets = self.offsets[start : stop + 1]
        first = int(offsets[0])
        return Ragged(self.values[first : int(offsets[-1])], offsets - first)


def offsets_of(lengths: Tensor) -> Tensor:
    """Where rows of these lengths begin, and where the last one ends: int64 [R + 1].

    Example:
        >>> offsets_of(torch.tensor([2, 0, 1]))
        tensor([0, 2, 2, 3])
    """
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def from_arrow(column: Any) -> Any:
    """An Arrow column as a tensor, a :class:`Ragged`, or a list of Python values.

    Numbers become a tensor, lists of numbers a :class:`Ragged`, lists of a fixed size and arrays of ``datasets`` a
    tensor. A column with a null in it becomes a list, whose None a collator can name; so does text.

    Args:
        column: an array, or one in parts.

    Example:
        >>> from_arrow(pa.array([1, 2])), from_arrow(pa.array([[1], [2, 3]])).offsets, from_arrow(pa.array(["a", None]))
        (tensor([1, 2]), tensor([0, 1, 3]), ['a', None])
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array.type, pa.ExtensionType):
        return _extension(array)
    if is_list(array.type) and not pa.types.is_fixed_size_list(array.type) and not array.null_count:
        values = _dense(_elements(array))
        if values is not None:
            return Ragged(values, _list_offsets(array))
    dense = _dense(array)
    return array.to_pylist() if dense is None else dense


def is_list(kind: Any) -> bool:
    """Whether an Arrow type is one of lists."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def is_number(kind: Any) -> bool:
    """Whether an Arrow type is one of numbers."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def as_ragged(column: Any, name: str = "column") -> Ragged:
    """A column as flat values and offsets; numbers are moved as arrays, never one by one in Python.

    Args:
        column: a :class:`Ragged`; a tensor or array of two axes or more; an Arrow list column; a sequence (or an array)
            of tensors or arrays with equal trailing shapes, or of lists of numbers.
        name: of the column, for errors.

    Returns: values of the column's own dtype; lists of Python numbers become int64 or the default float dtype.

    Raises: BatchError, a ValueError, for anything else, naming the column.

    Example:
        >>> as_ragged([[1, 2], [], [3]])
        Ragged(values=tensor([1, 2, 3]), offsets=tensor([0, 2, 2, 3]))
    """
    if isinstance(column, Ragged):
        return column
    if isinstance(column, (pa.Array, pa.ChunkedArray)):
        return _lists(column, name)
    if isinstance(column, np.ndarray) and column.dtype == object:
        return _from_sequence(list(column), name)
    if isinstance(column, (Tensor, np.ndarray)):
        return _from_dense(as_tensor(column), name)
    if isinstance(column, Sequence) and not isinstance(column, (str, bytes)):
        return _from_sequence(column, name)
    raise BatchError(f"{name}: got {type(column).__name__}, expected a column of sequences of numbers")


def as_columns(rows: Any) -> Columns:
    """The fields of some rows by name, from columns or from a list of rows.

    Args:
        rows: a mapping from names to columns, an Arrow table, or a sequence of mappings with equal names.

    Raises: BatchError, a ValueError, for anything else, for no rows, and for a row with other names than the first.

    Example:
        >>> as_columns([{"x": 1}, {"x": 2}])
        {'x': [1, 2]}
    """
    if isinstance(rows, pa.Table):
        return {name: rows.column(name) for name in rows.column_names}
    if isinstance(rows, Mapping):
        return dict(rows)
    if not isinstance(rows, Sequence) or not all(isinstance(row, Mapping) for row in rows):
        raise BatchError(f"rows: got {type(rows).__name__}, expected a mapping of columns or a list of mappings")
    if not rows:
        raise BatchError("rows: got none, expected at least one")
    names = rows[0].keys()
    for i, row in enumerate(rows):
        if row.keys() != names:
            raise BatchError(f"rows: row {i} has {sorted(row)}, the first has {sorted(names)}; expected equal names", i)
    return {name: [row[name] for row in rows] for name in names}


def as_tensor(array: Tensor | np.ndarray[Any, Any]) -> Tensor:
    """A tensor of an array's values; it shares their memory where that may be written to."""
    if isinstance(array, Tensor):
        return array
    if array.dtype == object:
        raise BatchError("array: got dtype object, expected numbers of equal shapes")
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _from_dense(dense: Tensor, name: str) -> Ragged:
    if dense.dim() < 2:
        raise BatchError(f"{name}: got shape {tuple(dense.shape)}, expected a sequence for each row")
    offsets = torch.arange(len(dense) + 1) * dense.shape[1]
    return Ragged(dense.flatten(0, 1), offsets)


def _from_sequence(column: Sequence[Any], name: str) -> Ragged:
    arrays = [isinstance(row, (Tensor, np.ndarray)) for row in column]
    if any(arrays):
        if not all(arrays):
            raise BatchError(f"{name}: got arrays in some rows and not in others, expected one kind")
        tensors = [as_tensor(row) for row in column]
        if any(t.dim() < 1 for t in tensors):
            raise BatchError(f"{name}: got a number, expected a sequence for each row")
        lengths = torch.tensor([len(t) for t in tensors])
        return Ragged(torch.cat(tensors), offsets_of(lengths))
    try:
        listed = pa.array(column)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise BatchError(f"{name}: {error}; expected a list of numbers for each row") from None
    found = _lists(listed, name)
    if found.values.dtype == torch.float64:
        # Python floats have no width of their own.
        return Ragged(found.values.to(torch.get_default_dtype()), found.offsets)
    return found


def _lists(column: Any, name: str) -> Ragged:
    """An Arrow column of lists of numbers."""
    found = from_arrow(column)
    if isinstance(found, Ragged):
        return found
    if isinstance(found, Tensor) and found.dim() > 1:
        return _from_dense(found, name)
    raise BatchError(f"{name}: {_why_no_lists(column)}")


def _why_no_lists(column: Any) -> str:
    kind = column.type
    if not is_list(kind):
        return f"got an Arrow column of {kind}, expected lists of numbers"
    if column.null_count:
        return f"{column.null_count} of {len(column)} rows are null, expected a sequence for each row"
    if not is_number(kind.value_type):
        return f"got sequences of {kind.value_type}, expected sequences of numbers"
    return f"{pc.list_flatten(column).null_count} of its numbers are null, expected none"


def _extension(array: Any) -> Any:
    """Arrays of datasets (Array2D and so on) know how they become an array of NumPy, of objects if rows differ."""
    values = array.to_numpy(zero_copy_only=False)
    return array.to_pylist() if values.dtype == object else torch.from_numpy(np.array(values))


def _dense(array: Any) -> Tensor | None:
    """A tensor with one row for each element, or None if their shapes differ or they are no numbers."""
    if pa.types.is_null(array.type) and not len(array):
        return torch.empty(0, dtype=torch.int64)
    if array.null_count:
        return None
    if is_number(array.type):
        # Arrow's memory may be a read-only file, which torch cannot express: one copy.
        return torch.from_numpy(np.array(array.to_numpy(zero_copy_only=False)))
    if not is_list(array.type) or not len(array):
        return None
    values = _dense(_elements(array))
    if values is None or len(values) % len(array):
        return None
    width = len(values) // len(array)
    if not pa.types.is_fixed_size_list(array.type) and bool((_list_offsets(array).diff() != width).any()):
        return None
    return values.reshape(len(array), width, *values.shape[1:])


def _elements(array: Any) -> Any:
    """The elements of all lists of an array, which may be a slice of a longer one."""
    if pa.types.is_fixed_size_list(array.type):
        return array.flatten()
    first, last = array.offsets[0].as_py(), array.offsets[-1].as_py()
    return array.values.slice(first, last - first)


def _list_offsets(array: Any) -> Tensor:
    offsets = torch.from_numpy(np.array(array.offsets, dtype=np.int64))
    return offsets - offsets[0]
