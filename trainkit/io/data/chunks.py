"""Columns of numbers in Arrow's memory, copied row by row without Arrow in between.

Arrow itself takes rows out of a column in many parts by first joining the parts, which copies the whole column.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.lib.stride_tricks import as_strided
from torch import Tensor

from trainkit.io.data.ragged import Ragged

Array = np.ndarray[Any, Any]


class Chunks:
    """The parts of a column, each opened when a row of it is first asked for.

    Args:
        column: with at least one row.
    """

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._column = column
        self._ends = np.cumsum([len(chunk) for chunk in column.chunks])
        self._opened: dict[int, Any] = {}

    def located(self, rows: Array) -> tuple[Array, Array]:
        """For each row its chunk, and its number in it: int64."""
        chunks = np.searchsorted(self._ends, rows, side="right")
        begins = np.concatenate([[0], self._ends[:-1]])
        return chunks, rows - begins[chunks]

    def opened(self, number: int, view: Any) -> Any:
        """``view`` of a chunk, remembered."""
        if number not in self._opened:
            self._opened[number] = view(self._column.chunk(number))
        return self._opened[number]


class NumberColumn:
    """A column of numbers, or of lists of numbers of a fixed size, without a null.

    Args:
        column: with at least one row.

    Example:
        >>> NumberColumn(pa.chunked_array([[1, 2], [3]])).take(np.array([2, 0]))
        tensor([3, 1])
    """

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._chunks = Chunks(column)

    def take(self, rows: Array) -> Tensor:
        """The rows of these numbers in memory of their own: [rows, ...]."""
        chunks, local = self._chunks.located(rows)
        parts = list(_by_chunk(chunks))
        taken = [self._values(number)[local[places]] for number, places in parts]
        if len(parts) == 1:
            return torch.from_numpy(taken[0])
        out = np.empty((len(rows), *taken[0].shape[1:]), dtype=taken[0].dtype)
        for (_, places), values in zip(parts, taken, strict=True):
            out[places] = values
        return torch.from_numpy(out)

    def _values(self, number: int) -> Array:
        values: Array = self._chunks.opened(number, _values)
        return values


class ListColumn:
    """A column of lists of numbers, without a null in the lists or in place of one.

    Args:
        column: with at least one row.

    Example:
        >>> ListColumn(pa.chunked_array([[[1, 2], []], [[3]]])).take(np.array([2, 0]))
        Ragged(values=tensor([3, 1, 2]), offsets=tensor([0, 1, 3]))
    """

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._chunks = Chunks(column)

    def take(self, rows: Array) -> Ragged:
        """The rows of these numbers in memory of their own."""
        chunks, local = self._chunks.located(rows)
        numbers, places = np.unique(chunks, return_inverse=True)
        opened = [self._chunks.opened(number, _lists) for number in numbers.tolist()]
        stretches = _stretches(places, local)
        if len(stretches) > len(opened) and all(lists.width == opened[0].width > 0 for lists in opened):
            return _of_one_width(places, local, opened)
        parts: list[Array] = []
        lengths: list[int] = []
        for place, first, last in stretches:
            offsets, values = opened[place].offsets, opened[place].values
            begin, end = offsets[first], offsets[last + 1]
            parts.append(values[begin:end])
            lengths += [end - begin] if first == last else np.diff(offsets[first : last + 2]).tolist()
        ends = np.cumsum([0, *lengths])
        return Ragged(torch.from_numpy(np.concatenate(parts)), torch.from_numpy(ends))


@dataclass(frozen=True)
class _Lists:
    """A chunk of lists.

    Args:
        offsets: a memoryview: single numbers come out of it in a third of the time.
        values: the elements.
        width: elements of every list; 0 where they differ or are none.
        address: of the first element of the first list.
    """

    offsets: Any
    values: Array
    width: int
    address: int


def _lists(chunk: pa.Array) -> _Lists:
    offsets, values = chunk.offsets.to_numpy(), np.asarray(chunk.values.to_numpy())
    widths = np.diff(offsets)
    width = int(widths[0]) if len(widths) and (widths == widths[0]).all() else 0
    address = values.ctypes.data + int(offsets[0]) * values.itemsize
    return _Lists(memoryview(offsets), values, width, address)


def _of_one_width(places: Array, local: Array, opened: Sequence[_Lists]) -> Ragged:
    """Rows of as many elements each, copied by one call, which lets other threads run meanwhile.

    Args:
        places: of each row's chunk in ``opened``.
        local: each row's number in its chunk.
        opened: chunks of one width.
    """
    width, dtype = opened[0].width, opened[0].values.dtype
    size = width * dtype.itemsize
    addresses = np.array([lists.address for lists in opened])[places] + local * size
    origin = int(addresses.min())
    extent = int(addresses.max()) - origin + size
    # One array over all chunks, and whatever lies between them, of which nothing but the rows is ever read.
    memory = np.frombuffer(pa.foreign_buffer(origin, extent, base=opened), np.uint8)
    if extent * size <= sys.maxsize:
        rows = as_strided(memory, (extent - size + 1, size), (1, 1), writeable=False)[addresses - origin]
    else:
        # More elements than NumPy can count: long rows, some in a file and some in memory, lie far apart.
        rows = np.stack([memory[start : start + size] for start in (addresses - origin).tolist()])
    return Ragged(torch.from_numpy(rows.view(dtype).reshape(-1)), torch.arange(len(local) + 1) * width)


def _stretches(chunks: Array, local: Array) -> list[tuple[int, int, int]]:
    """Rows that lie one after the other: their chunk, and the first and the last of them in it."""
    is_first = np.concatenate([[True], (chunks[1:] != chunks[:-1]) | (local[1:] != local[:-1] + 1)])
    is_last = np.concatenate([is_first[1:], [True]])
    return list(zip(chunks[is_first].tolist(), local[is_first].tolist(), local[is_last].tolist(), strict=True))


def _by_chunk(chunks: Array) -> Iterator[tuple[int, Any]]:
    """Each chunk that occurs, and at which places."""
    if (chunks == chunks[0]).all():
        yield int(chunks[0]), slice(None)
        return
    order = np.argsort(chunks, kind="stable")
    borders = np.flatnonzero(np.diff(chunks[order])) + 1
    for places in np.split(order, borders):
        yield int(chunks[places[0]]), places


def _values(chunk: pa.Array) -> Array:
    if not pa.types.is_fixed_size_list(chunk.type):
        return np.asarray(chunk.to_numpy())
    return np.asarray(chunk.flatten().to_numpy()).reshape(len(chunk), chunk.type.list_size)
