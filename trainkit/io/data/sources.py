"""Map-style sources: rows that can be read in any order, a batch at a time, as columns where the data have columns."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from trainkit.io.data.arrow import ArrowRows, list_lengths
from trainkit.io.data.errors import RowError


@runtime_checkable
class Source(Protocol):
    """Rows that can be read in any order. A class of your own with these two is a source as well.

    ``fetch`` gives rows in one of two forms: columns (a mapping or a tuple, whose entries hold a value per row: a
    tensor, an array, a list, a :class:`~trainkit.io.data.ragged.Ragged`; or one tensor), or a list of rows.

    A source may say of itself ``is_pure = True``: reading rows runs nobody's code but the source's, draws nothing, and
    gives values of the same form whichever rows are read together. Then the loader reads those of many batches at once.
    With ``files`` beside that, the paths of the files that its rows lie in, it also says that ``fetch`` may be called
    in another thread while the loop works.
    """

    @property
    def num_rows(self) -> int:
        """How many rows there are."""

    def fetch(self, indices: Sequence[int]) -> Any:
        """The rows of these numbers, in this order; at least one."""


def files_of(source: Source | None) -> Sequence[str | Path]:
    """The files that the rows of a pure source lie in, if it names some. Others may mean something else by ``files``.

    Example:
        >>> files_of(ColumnRows(torch.zeros(3, 2)))
        ()
    """
    found: Sequence[str | Path] = getattr(source, "files", ()) if getattr(source, "is_pure", False) else ()
    return found


class ColumnRows:
    """Columns in memory: a tensor or array, or a mapping or tuple of tensors, arrays and lists of one length.

    Args:
        columns: as above; the first axis counts the rows.

    Raises: ValueError for columns of different lengths, or none.

    Example:
        >>> ColumnRows({"x": torch.arange(4) * 10, "name": ["a", "b", "c", "d"]}).fetch([2, 0])
        {'x': tensor([20,  0]), 'name': ['c', 'a']}
    """

    is_pure = True

    def __init__(self, columns: Any) -> None:
        named = columns if isinstance(columns, Mapping) else dict(enumerate(_entries(columns)))
        lengths = {name: len(column) for name, column in named.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"data: got columns with these numbers of rows: {lengths}; expected one number for all")
        self._columns = columns
        self._num_rows = next(iter(lengths.values()))

    @property
    def num_rows(self) -> int:
        return self._num_rows

    def fetch(self, indices: Sequence[int]) -> Any:
        if isinstance(self._columns, Mapping):
            return {name: _taken(column, indices) for name, column in self._columns.items()}
        if isinstance(self._columns, tuple):
            return tuple(_taken(column, indices) for column in self._columns)
        return _taken(self._columns, indices)


class ItemRows:
    """Rows one by one: a list, or a map-style dataset of torch, whose ``__getitems__`` is used where it has one.

    Args:
        items: has ``__getitem__`` and ``__len__``.

    Example:
        >>> ItemRows(["a", "b", "c"]).fetch([2, 0])
        ['c', 'a']
    """

    def __init__(self, items: Any) -> None:
        self._items = items
        self.is_pure = type(items) in (list, tuple)

    @property
    def num_rows(self) -> int:
        return len(self._items)

    def fetch(self, indices: Sequence[int]) -> Any:
        many = getattr(self._items, "__getitems__", None)
        if many is not None:
            return many(list(indices))
        return [self._one(index) for index in indices]

    def _one(self, index: int) -> Any:
        try:
            return self._items[index]
        except Exception as error:
            raise RowError(index) from error


class TokenFile:
    """Rows of tokens from a file of plain numbers that is mapped into memory: no more of it is read than is used.

    Row i is ``tokens[i * seq_len : (i + 1) * seq_len + overlap]``; what does not fill a row at the end is left out.

    Args:
        path: a file of tokens one after the other, without a header, in the byte order of this machine; or a ``.npy``
            file of one axis, which says its dtype itself.
        seq_len: tokens from one row to the next.
        dtype: of the tokens in the file, such as "uint16"; None for ``.npy``.
        overlap: tokens that a row shares with the next one: 1 where targets are the inputs shifted by one, 0 where the
            model shifts.
        name: of the column.

    Raises:
        FileNotFoundError: nothing is at ``path``.
        ValueError: the file does not hold a whole number of tokens, or not one row; ``seq_len`` or ``overlap`` is too
            small.
        TypeError: the tokens are no integers.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "tokens.bin")
        ...     np.arange(10, dtype="uint16").tofile(path)
        ...     TokenFile(path, 3, dtype="uint16").fetch([2, 0])
        {'input_ids': tensor([[6, 7, 8, 9],
                [0, 1, 2, 3]])}
    """

    is_pure = True

    def __init__(
        self, path: Path | str, seq_len: int, *, dtype: str | None = None, overlap: int = 1, name: str = "input_ids"
    ) -> None:
        if seq_len < 1 or overlap < 0:
            raise ValueError(f"seq_len, overlap: got {seq_len} and {overlap}, expected at least 1 and 0 tokens")
        self._path, self._seq_len, self._overlap, self._name = Path(path), seq_len, overlap, name
        self._dtype = None if dtype is None else np.dtype(dtype)
        self._tokens: Any = self._mapped()
        self._num_rows = (len(self._tokens) - overlap) // seq_len
        if self._num_rows < 1:
            raise ValueError(f"data: {str(path)!r} has {len(self._tokens)} tokens; a row needs {seq_len + overlap}")

    @property
    def num_rows(self) -> int:
        return self._num_rows

    def fetch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        starts = np.asarray(indices, dtype=np.int64) * self._seq_len
        rows = np.lib.stride_tricks.sliding_window_view(self._tokens, self._width)[starts]
        return {self._name: torch.from_numpy(rows.astype(np.int64, copy=False))}

    @property
    def files(self) -> list[Path]:
        """The one that the rows lie in."""
        return [self._path]

    @property
    def _width(self) -> int:
        return self._seq_len + self._overlap

    def _mapped(self) -> Any:
        if not self._path.is_file():
            raise FileNotFoundError(f"data: no file at {str(self._path)!r}; expected a file of tokens")
        if self._path.suffix == ".npy":
            tokens = np.load(self._path, mmap_mode="r", allow_pickle=False)
            if tokens.ndim != 1 or self._dtype not in (None, tokens.dtype):
                raise ValueError(
                    f"data: {str(self._path)!r} holds {tokens.dtype} of shape {tokens.shape}, expected one axis of "
                    f"{self._dtype or 'integers'}"
                )
        else:
            tokens = self._raw()
        if tokens.dtype.kind not in "iu":
            raise TypeError(f"dtype: got {tokens.dtype} for tokens, expected integers")
        return tokens

    def _raw(self) -> Any:
        if self._dtype is None:
            raise ValueError(f"dtype: {str(self._path)!r} does not say its own; expected one, such as 'uint16'")
        size = self._path.stat().st_size
        if not size or size % self._dtype.itemsize:
            raise ValueError(
                f"data: {str(self._path)!r} has {size} bytes, expected a whole number of tokens of "
                f"{self._dtype.itemsize} bytes ({self._dtype})"
            )
        return np.memmap(self._path, dtype=self._dtype, mode="r")

    def __getstate__(self) -> dict[str, Any]:
        # A map travels to another process by name; pickled it would be a copy of the file.
        return {**self.__dict__, "_tokens": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._tokens = self._mapped()


def as_source(data: Any) -> Source | None:
    """Data that can be read in any order, as a source; None for what can only be read from its beginning.

    Args:
        data: a ``datasets.Dataset``; a tensor or array; columns (a mapping of tensors, arrays, lists); a list; a
            map-style dataset of torch (``__getitem__`` and ``__len__``); a :class:`Source`.

    Example:
        >>> as_source(torch.zeros(3, 2)).num_rows, as_source(x for x in "ab")
        (3, None)
    """
    if isinstance(data, Source):
        return data
    # Whoever has a Dataset has imported its package; nobody else should wait for the import.
    package = sys.modules.get("datasets")
    if package is not None and isinstance(data, package.Dataset):
        return ArrowRows(data)
    if isinstance(data, TensorDataset):
        return ColumnRows(data.tensors)
    if isinstance(data, (Tensor, np.ndarray, Mapping)):
        return ColumnRows(data)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, (str, bytes)):
        return ItemRows(data)
    return None


def row_lengths(data: Any, column: str) -> Tensor:
    """How many elements each row of a column has, or the numbers that it holds: what batching by length needs.

    A column of numbers is taken as lengths already. Arrow columns are read in large parts, never row by row.

    Args:
        data: a ``datasets.Dataset``, columns, or a sequence of mappings.
        column: the name of a column of sequences or of integers.

    Returns: int64 tensor of shape (rows,).

    Raises: ValueError if there is no such column, or it has no lengths.

    Example:
        >>> row_lengths([{"x": [1, 2]}, {"x": [3]}], "x")
        tensor([2, 1])
    """
    package = sys.modules.get("datasets")
    if package is not None and isinstance(data, package.Dataset):
        return list_lengths(data, column)
    if isinstance(data, Mapping):
        return _lengths_of(data[column], column) if column in data else _no_column(column, list(data))
    found = [row[column] if column in row else _no_column(column, list(row)) for row in data]
    return _lengths_of(found, column)


def lengths_of(source: Source, data: Any, column: str) -> Tensor:
    """The lengths that a source gives itself, where it has a method ``lengths``, else :func:`row_lengths` of its data.

    Args:
        source: of ``data``.
        data: as :func:`row_lengths` takes them.
        column: the name of a column of sequences or of integers.

    Returns: int64 tensor of shape (rows,).

    Raises: ValueError if there is no such column, or it has no lengths.

    Example:
        >>> data = {"x": [[1, 2], [3]]}
        >>> lengths_of(ColumnRows(data), data, "x")
        tensor([2, 1])
    """
    own = getattr(source, "lengths", None)
    return torch.as_tensor(own(column) if own is not None else row_lengths(data, column))


def _no_column(column: str, names: list[Any]) -> Any:
    raise ValueError(f"lengths: got {column!r}, but the rows have {', '.join(map(str, names))}")


def _lengths_of(values: Any, column: str) -> Tensor:
    if isinstance(values, (Tensor, np.ndarray)):
        array = torch.as_tensor(values)
        return array.to(torch.int64) if array.dim() == 1 else torch.full((len(array),), array.shape[1])
    try:
        return torch.tensor([value if isinstance(value, int) else len(value) for value in values], dtype=torch.int64)
    except TypeError as error:
        raise ValueError(f"lengths: column {column!r} has neither lengths nor sequences: {error}") from None


def _entries(columns: Any) -> Sequence[Any]:
    return columns if isinstance(columns, tuple) else [columns]


def _taken(column: Any, indices: Sequence[int]) -> Any:
    if isinstance(column, Tensor):
        return column[torch.as_tensor(indices)]
    if isinstance(column, np.ndarray):
        return column[np.asarray(indices)]
    return [column[index] for index in indices]
