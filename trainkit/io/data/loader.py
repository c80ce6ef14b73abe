"""The loader: batches of any data, ahead of the loop, from any position."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from trainkit.io.data.ahead import fetched
from trainkit.io.data.assemble import (
    Collate,
    Failed,
    Item,
    Loaded,
    Maker,
    Note,
    check_budget,
    stream_items,
    tasks,
)
from trainkit.io.data.batching import WINDOW_ROWS, Batching, Windows, rounded_window
from trainkit.io.data.device import one_ahead
from trainkit.io.data.errors import BatchError, DataWarning
from trainkit.io.data.groups import in_groups
from trainkit.io.data.order import order_of
from trainkit.io.data.position import Limit, Position, from_json, to_json
from trainkit.io.data.sources import Source, as_source, files_of, lengths_of
from trainkit.io.data.stacking import stack
from trainkit.io.data.streams import Stream, as_stream
from trainkit.io.data.workers import MapItems, StreamItems, in_processes


class Loader:
    """Batches of any data, loaded ahead, that can go on from any position.

    ``for batch in loader`` gives what is left of the current epoch; :meth:`epochs` goes on until a number of epochs are
    complete. :meth:`state_dict` counts the batches that the loop took, not those that were loaded ahead: after
    :meth:`load_state_dict` in another process the next batch is the one that the loop would have taken next, whatever
    the numbers of workers, prefetched batches and ranks are there.

    Map-style data (see :func:`~trainkit.io.data.sources.as_source`): the order is a function of (seed, epoch), so going
    on at batch one million costs what starting costs. Where the data only lie there (arrow, columns, lists, files of
    tokens) and no workers are asked for, up to 32 batches are read at once: they share memory, though no element, and
    one that is kept keeps up to 4 MiB. Streams (see :class:`~trainkit.io.data.streams.IterableRows`) go
    on from their own state where they have one. They are shuffled within windows of rows, and a position inside of a
    window reads that window again. One process reads a stream, however many workers there are, since it is one
    sequence.

    What the data's own code and the collator draw (masks, crops, dropout of tokens) depends on seed, epoch, batch and
    rank, so that ranks draw apart from each other. Hence the rows of a batch do not depend on the number of ranks, but
    what is drawn for them does.

    Args:
        data: a ``datasets.Dataset`` or ``IterableDataset``, a torch dataset, a list, columns, a tensor, a token file, a
            mixture, any iterable.
        batch_size: rows per batch over all ranks. Or
        max_tokens: rows times the longest row, at most, over all ranks. If collating pads to a multiple, give rounded
            lengths.
        lengths: elements per row, for ``max_tokens`` and ``group_by_length``: numbers, or the name of a column; for a
            stream a function of the row, or the name of a column.
        group_by_length: batches of rows of similar lengths, sorted within windows.
        window: rows that are sorted, and in streams shuffled, together; a multiple of ``batch_size``. About 4096 by
            default.
        seed: decides the order and what the data's own code draws; fits 64 bits.
        shuffle: each epoch in an order of its own.
        drop_last: leave out a batch of fewer rows at the end of an epoch.
        collate: rows (a list) or columns (a mapping, a tuple) to a tree of tensors. By default
            :func:`~trainkit.io.data.stacking.stack`, which pads nothing. It may have an argument ``position``, which is
            then (epoch, batch), and the rank where there are several.
        workers: processes that load; 0 loads in the loop itself. A stream is read by one.
        prefetch: batches that each worker loads ahead.
        device: where batches go, copied one ahead; None leaves them in host memory.
        rank: of this process, from 0. It gets its part of each batch; the parts of all ranks are the batch of one rank.
            Where a batch has fewer rows than there are ranks, some parts have no rows.
        world: number of ranks.
        batches: take so many in all, over as many epochs as needed. Then ``for batch in loader`` goes on over epochs.
        uniform: refuse a batch with other keys, dtypes or numbers of axes than the first.

    Raises:
        ValueError: no rows, too few for one batch with ``drop_last``, a row that exceeds ``max_tokens``, arguments out
            of range or that exclude each other.
        TypeError: data of an unknown kind, or an iterator that can be read only once.

    Example:
        >>> loader = Loader(list(range(6)), batch_size=2, seed=0)
        >>> batches = iter(loader)
        >>> first, cursor = next(batches), loader.state_dict()
        >>> resumed = Loader(list(range(6)), batch_size=2, seed=0)
        >>> resumed.load_state_dict(cursor)
        >>> [torch.equal(a, b) for a, b in zip(batches, resumed, strict=True)]
        [True, True]
    """

    def __init__(
        self,
        data: Any,
        *,
        batch_size: int | None = None,
        max_tokens: int | None = None,
        lengths: Sequence[int] | Tensor | str | Callable[[Any], int] | None = None,
        group_by_length: bool = False,
        window: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        collate: Collate | None = None,
        workers: int = 0,
        prefetch: int = 2,
        device: torch.device | str | None = None,
        rank: int = 0,
        world: int = 1,
        batches: int | None = None,
        uniform: bool = True,
    ) -> None:
        _check_numbers(workers=workers, prefetch=prefetch, rank=rank, world=world, batches=batches, seed=seed)
        self._workers, self._prefetch, self._batches, self._uniform = workers, prefetch, batches, uniform
        self._device = torch.device("cpu" if device is None else device)
        self._maker = Maker(collate or stack, seed, rank, world)
        source = as_source(data)
        # A stream that is neither shuffled nor sorted needs no rows beside those of the batch.
        apart = source is None and not shuffle and not group_by_length and batch_size is not None
        rows = rounded_window(window, batch_size, 1 if apart else WINDOW_ROWS)
        self._batching = Batching(batch_size, max_tokens, group_by_length, rows, drop_last, shuffle, seed)
        self._source: Source | None = source
        self._stream: Stream | None = None
        if source is None:
            self._stream = as_stream(data, seed=seed, shuffle=shuffle)
            self._length_of = _length_function(lengths, self._batching)
        else:
            self._windows = _windows(source, data, lengths, self._batching)
        self._position = Position()
        self._form: Any = None
        self._seen: Any = None
        self._running: object = None

    @property
    def epoch(self) -> int:
        """The epoch that the next batch is of, or that has just been completed."""
        return self._position.epoch

    @property
    def num_taken(self) -> int:
        """Batches that the loop took since the run began."""
        return self._position.total

    def __len__(self) -> int:
        """Batches in the current epoch; with ``batches``, how many of these are left.

        With ``max_tokens`` the whole epoch is planned to count them.

        Raises: TypeError for a stream without ``batches``, whose end is not known.
        """
        if self._batches is not None:
            return max(self._batches - self._position.total, 0)
        if self._stream is not None:
            raise TypeError(
                "len: a stream does not know how many batches it has; give Loader(batches=...) to end a run"
            )
        return self._windows.num_batches(self.epoch)

    def __iter__(self) -> Iterator[Any]:
        """The rest of the current epoch; with ``batches`` the rest of these, over epochs.

        After the last batch of an epoch the next call begins the next one. An iteration ends the one before it.
        """
        return self._run(Limit(self.epoch + 1 if self._batches is None else None, self._batches))

    def epochs(self, number: int) -> Iterator[Any]:
        """Batches until ``number`` epochs are complete, counted from the beginning of the run: a resumed run ends where
        an uninterrupted one does. Workers go on over the borders of epochs.

        Raises: ValueError for a negative number.
        """
        if number < 0:
            raise ValueError(f"epochs: got {number}, expected a number of at least 0")
        return self._run(Limit(number, self._batches))

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that the loop took: JSON, of a size that does not grow.

        Raises: TypeError if the stream's own state is no JSON.
        """
        return to_json(self._position, self._made_for())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a position. An iteration that is under way ends.

        Raises: ValueError if it is no position, or one in other data, batches or another order; nothing is changed
            then.
        """
        position = from_json(state, self._made_for())
        if self._stream is None and position.window > self._windows.num_windows:
            raise ValueError(f"cursor: got window={position.window} of {self._windows.num_windows} in an epoch")
        self._position = position
        self._running = None

    def _made_for(self) -> dict[str, Any]:
        size = {} if self._source is None else {"rows": self._source.num_rows, "tokens": self._windows.num_tokens}
        about = getattr(self._source or self._stream, "describe", dict)
        return {**size, **self._batching.describe(), **about()}

    def _run(self, limit: Limit) -> Iterator[Any]:
        running = self._running = object()
        files = files_of(self._source) if self._batching.shuffle else ()
        with fetched(files), closing(self._items(limit)) as items:
            for item in one_ahead(items, self._device):
                if isinstance(item, Note):
                    warnings.warn(item.text, DataWarning, stacklevel=2)
                    continue
                if isinstance(item, Failed):
                    raise item.error from item.cause
                self._check_form(item)
                self._take(running, item.after)
                yield item.batch
                self._take(running, self._position)
        if limit.epochs is not None and self.epoch < limit.epochs and not limit.before(self._position):
            self._position = self._position.at_epoch(limit.epochs)

    def _take(self, running: object, position: Position) -> None:
        if self._running is not running:
            raise RuntimeError("loader: this iteration ended when another began, or a position was loaded")
        self._position = position

    def _items(self, limit: Limit) -> Generator[Item, None, None]:
        if self._stream is None:
            assert self._source is not None
            todo = tasks(self._windows, self._position, limit, self._maker)
            if not self._workers:
                return in_groups(self._source, self._maker, todo)
            items: MapItems | StreamItems = MapItems(self._source, self._maker)
            return in_processes(items, todo, workers=self._workers, prefetch=self._prefetch)
        read = functools.partial(
            stream_items, self._stream, self._batching, self._length_of, self._position, limit, self._maker
        )
        if not self._workers:
            return read()
        return in_processes(StreamItems(read), None, workers=1, prefetch=self._prefetch)

    def _check_form(self, item: Loaded) -> None:
        if not self._uniform:
            return
        # Paths in a tree cost more than many a batch; most are like the one before.
        outline = _outline(item.batch)
        if outline is not None and outline == self._seen:
            return
        form = {pytree.keystr(path): _form(leaf) for path, leaf in pytree.tree_flatten_with_path(item.batch)[0]}
        if self._form is None:
            self._form = form
        if form != self._form:
            keys = [key for key in {**self._form, **form} if form.get(key) != self._form.get(key)]
            expected, found = self._form.get(keys[0], "no such key"), form.get(keys[0], "no such key")
            raise BatchError(
                f"key {keys[0]}: expected {expected} as in the first batch, found {found} ({item.where}); make batches "
                "alike, or give uniform=False"
            )
        self._seen = outline


def _windows(source: Source, data: Any, lengths: Any, batching: Batching) -> Windows:
    """The plan of map-style data, refused at once if it gives no batch."""
    if not source.num_rows:
        raise ValueError("data: there are no rows, expected at least one")
    order = order_of(source, seed=batching.seed, shuffle=batching.shuffle)
    known = _row_lengths(source, data, lengths, batching)
    if known is not None:
        check_budget(known, batching.max_tokens, range(len(known)))
    size = batching.batch_size
    if size is not None and order.num_rows < size:
        if batching.drop_last:
            raise ValueError(f"batch_size: got {size} with drop_last for {order.num_rows} rows, which make no batch")
        text = f"data: {order.num_rows} rows do not fill batch_size={size}; every batch has {order.num_rows} rows"
        warnings.warn(text, DataWarning, stacklevel=3)
    return Windows(order, batching, known)


def _row_lengths(source: Source, data: Any, lengths: Any, batching: Batching) -> Tensor | None:
    if not batching.needs_lengths:
        if lengths is not None:
            raise ValueError("lengths: expected max_tokens or group_by_length with it; nothing else uses lengths")
        return None
    if lengths is None or callable(lengths):
        raise ValueError("lengths: max_tokens and group_by_length need a number for each row, or the name of a column")
    known = lengths_of(source, data, lengths) if isinstance(lengths, str) else lengths
    known = torch.as_tensor(known, dtype=torch.int64)
    if known.shape != (source.num_rows,) or (len(known) and int(known.min()) < 0):
        raise ValueError(
            f"lengths: got shape {tuple(known.shape)} for {source.num_rows} rows, expected for each row a number of at "
            "least 0"
        )
    return known


def _length_function(lengths: Any, batching: Batching) -> Callable[[Any], int] | None:
    if not batching.needs_lengths:
        if lengths is not None:
            raise ValueError("lengths: expected max_tokens or group_by_length with it; nothing else uses lengths")
        return None
    if isinstance(lengths, str):
        return functools.partial(_length_in, lengths)
    if not callable(lengths):
        raise ValueError("lengths: a stream needs a function that gives the length of a row, or the name of a column")
    function: Callable[[Any], int] = lengths
    return function


def _length_in(column: str, row: Any) -> int:
    value = row[column]
    return value if isinstance(value, int) else len(value)


def _outline(batch: Any) -> Any:
    """Enough of a plain mapping of tensors to tell that another one has the same form; None for other trees."""
    if type(batch) is not dict or not all(isinstance(leaf, Tensor) for leaf in batch.values()):
        return None
    return [(name, leaf.dtype, leaf.dim()) for name, leaf in batch.items()]


def _form(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return type(leaf).__name__
    return f"{str(leaf.dtype).removeprefix('torch.')} with {leaf.dim()} axes"


def _check_numbers(**numbers: Any) -> None:
    least = {"workers": 0, "prefetch": 1, "rank": 0, "world": 1, "batches": 0}
    for name, value in numbers.items():
        if name == "batches" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name}: got {value!r}, expected an integer")
        if name in least and value < least[name]:
            raise ValueError(f"{name}: got {value}, expected at least {least[name]}")
    if numbers["rank"] >= numbers["world"]:
        raise ValueError(f"rank: got {numbers['rank']} of world={numbers['world']}, expected a number below it")
    if not -(1 << 63) <= numbers["seed"] < 1 << 64:
        raise ValueError(f"seed: got {numbers['seed']}, expected an integer that fits 64 bits")
