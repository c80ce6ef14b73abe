"""Streams: rows that can only be read from a beginning, or from a state that the stream itself gives."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

from trainkit import rng
from trainkit.io.seeding import READING, seeded

CHUNK_ROWS = 64
"""Rows that are read in one scope of seeds where a stream has no state."""


@runtime_checkable
class Stream(Protocol):
    """Rows in one order. A class of your own with these two is a stream as well.

    What it draws beforehand, such as an order, belongs in its state, or must follow from the epoch and a seed of its
    own: Python's, NumPy's and torch's global generators are where they were only at the border of a window.
    """

    def read(self, epoch: int, state: Any, num_read: int) -> Iterator[Any]:
        """The rows of an epoch after the first ``num_read``; ``state`` is what :meth:`state` gave there, or None."""

    def state(self) -> Any:
        """Where the reading is, after the row that was given last: JSON, or None if ``num_read`` says it all."""


class IterableRows:
    """Any iterable that can be read from its beginning again, such as a torch ``IterableDataset``.

    With ``state_dict`` and ``load_state_dict`` it continues from its own state; otherwise the rows before a position
    are read and thrown away, which costs what reading them cost the first time. ``set_epoch`` is called where there is
    one.

    Without a state, what the iterable draws from the global generators of Python, NumPy and torch is drawn again as it
    was: rows are read 64 at a time, ahead of what is given, each time from a seed made of (seed, epoch, place). So it
    may shuffle or crop with ``random``. What it draws from elsewhere must begin again with ``iter()``. With a state, an
    order that was drawn must be part of the state.

    ``datasets.IterableDataset`` has a state, except that it forgets the rows of a shuffle buffer: a stream after
    ``shuffle`` is therefore read again from the beginning of its epoch, so that no row is lost.

    Args:
        rows: the iterable.
        seed: of what reading draws, where there is no state; fits 64 bits.

    Raises: TypeError for an iterator without a state: it can be read once only, so a run over it could not be resumed.

    Example:
        >>> list(IterableRows([1, 2, 3]).read(0, None, 1))
        [2, 3]
    """

    def __init__(self, rows: Iterable[Any], *, seed: int = 0) -> None:
        self._rows: Any = rows
        self._seed = seed
        self._has_state = hasattr(rows, "state_dict") and hasattr(rows, "load_state_dict") and not _forgets_rows(rows)
        with seeded(seed):  # iter() may draw.
            is_iterator = not self._has_state and iter(rows) is rows
        if is_iterator:
            raise TypeError(
                f"data: got {type(rows).__name__}, an iterator, which can be read only once; expected something that "
                "iter() starts again, such as a class with __iter__ or datasets.IterableDataset.from_generator"
            )
        # What a foreign stream starts from; one of datasets is told so by None.
        self._first = None if not self._has_state or _is_hugging_face(rows) else self.state()

    def read(self, epoch: int, state: Any, num_read: int) -> Iterator[Any]:
        if hasattr(self._rows, "set_epoch"):
            self._rows.set_epoch(epoch)
        if not self._has_state:
            # A state may be left in it from elsewhere.
            if _is_hugging_face(self._rows):
                self._rows.load_state_dict(None)
            return self._again(epoch, num_read)
        self._rows.load_state_dict(copy.deepcopy(self._first if state is None else state))
        return iter(self._rows)

    def state(self) -> Any:
        return copy.deepcopy(self._rows.state_dict()) if self._has_state else None

    def describe(self) -> dict[str, Any]:
        """What a position depends on, beside the rows: what ``made_for`` of the iterable says, if it has that."""
        about: dict[str, Any] = getattr(self._rows, "made_for", dict)()
        return about

    def _again(self, epoch: int, num_read: int) -> Iterator[Any]:
        rows: Iterator[Any] | None = None
        first = 0
        while True:
            values: list[Any] = []
            failed: Exception | None = None
            with seeded(rng.fold_in_host(self._seed, READING, epoch, first)):
                try:
                    rows = iter(self._rows) if rows is None else rows
                    while len(values) < CHUNK_ROWS:
                        values.append(next(rows))
                except StopIteration:
                    pass
                except Exception as error:
                    # Told when its turn comes: the rows before it are good.
                    failed = error
            yield from values[max(num_read - first, 0) :]
            if failed is not None:
                raise failed
            if len(values) < CHUNK_ROWS:
                return
            first += len(values)


def as_stream(data: Any, *, seed: int = 0, shuffle: bool = True) -> Stream:
    """Data that are read from their beginning, as a stream.

    Args:
        data: an iterable, or a :class:`Stream`.
        seed: of what reading draws, and of the order of what a mixture has in it that can be read in any order.
        shuffle: whether that has an order of its own.

    Raises: TypeError for anything else, and for an iterator that can be read only once.

    Example:
        >>> list(as_stream("abc").read(0, None, 0))
        ['a', 'b', 'c']
    """
    if isinstance(data, Stream):
        ordered: Stream = data.ordered(seed=seed, shuffle=shuffle) if hasattr(data, "ordered") else data
        return ordered
    if not isinstance(data, Iterable) and not hasattr(data, "__iter__"):
        raise TypeError(f"data: got {type(data).__name__}, expected a dataset, a list, columns or an iterable")
    return IterableRows(data, seed=seed)


def _is_hugging_face(rows: Any) -> bool:
    package = sys.modules.get("datasets")
    return package is not None and isinstance(rows, package.IterableDataset)


def _forgets_rows(rows: Any) -> bool:
    """Whether a shuffle buffer stands somewhere in a stream of datasets."""
    return _is_hugging_face(rows) and _has_buffer(rows._ex_iterable)


def _has_buffer(stage: Any) -> bool:
    if type(stage).__name__ == "BufferShuffledExamplesIterable":
        return True
    below = [getattr(stage, "ex_iterable", None), *getattr(stage, "ex_iterables", [])]
    return any(_has_buffer(one) for one in below if one is not None)
