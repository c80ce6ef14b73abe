"""Several sources as one, in given shares, with a position that is an integer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from trainkit import rng
from trainkit.io.data.batching import Order
from trainkit.io.data.errors import BatchError, cause_of, explained, numbers
from trainkit.io.data.order import order_of
from trainkit.io.data.ragged import Ragged, offsets_of
from trainkit.io.data.sources import Source, as_source, lengths_of
from trainkit.io.data.streams import Stream, as_stream
from trainkit.io.seeding import READING, seeded

LONGEST_CYCLE = 10_000
"""Shares are exact if they are fractions with a common denominator up to this, and rounded to 1 / 10,000 otherwise."""
_READ_ROWS = 256


def mix(
    sources: Mapping[str, Any] | Sequence[Any],
    weights: Mapping[str, float] | Sequence[float] | None = None,
    *,
    rows: int | None = None,
    seed: int = 0,
) -> Mixture | MixedStream:
    """Several sources as one, for a :class:`~trainkit.io.data.loader.Loader`.

    Rows are dealt in cycles. Each cycle has the same number of rows of each source, exactly in the ratio of the
    weights, in an order drawn from (seed, cycle). So how many rows of each source come before a position is arithmetic,
    and a long run keeps the ratio exactly. Each source is read in its own order and from its beginning when it is
    through, independently of the others: a small source with a large weight is repeated, a large one continued over the
    epochs of the mixture. The loader's ``seed`` and ``shuffle`` decide the order of each source that can be read in any
    order, also beside streams.

    Args:
        sources: at least one, of any kind that a loader takes, a mixture included, which keeps its own weights. If one
            of them is a stream, so is the mixture.
        weights: positive, one for each source; equal ones by default.
        rows: of an epoch of the mixture. By default as many as the sources have together. Not for streams: their
            mixture has one epoch without end.
        seed: decides which source comes when; fits 64 bits.

    Raises: ValueError for weights that do not fit the sources, are not positive or are less than 1 / 10,000 of their
        sum; for a source without rows.

    Example:
        >>> mixture = mix({"a": [1, 2, 3, 4], "b": [10]}, {"a": 3, "b": 1})
        >>> order = mixture.order(seed=0, shuffle=False)
        >>> sorted(mixture.fetch(order.at(0, 0, 4).tolist()))
        [1, 2, 3, 10]
    """
    names = list(sources) if isinstance(sources, Mapping) else [str(i) for i in range(len(sources))]
    data = list(sources.values()) if isinstance(sources, Mapping) else list(sources)
    counts = _counts(names, weights)
    if rows is not None and rows < 1:
        raise ValueError(f"rows: got {rows}, expected at least 1")
    found = [as_source(one) for one in data]
    for name, source in zip(names, found, strict=True):
        if source is not None and not source.num_rows:
            raise ValueError(f"sources: {name!r} has no rows, expected at least one")
    deal = Deal(counts, seed)
    known = [source for source in found if source is not None]
    if len(known) == len(found):
        return Mixture(names, data, known, deal, rows)
    if rows is not None:
        raise ValueError(f"rows: got {rows} for a mixture with streams, which has no end; give Loader(batches=...) one")
    return MixedStream(names, data, deal, seed=seed)


class Deal:
    """Which source comes when: cycles with a fixed number of rows of each, each in an order of its own.

    Args:
        counts: rows of each source in a cycle.
        seed: fits 64 bits.

    Example:
        >>> deal = Deal([3, 1], seed=0)
        >>> deal.cycle(0).sort().values, deal.before(10**9 + 4)
        (tensor([0, 0, 0, 1]), [750000003, 250000001])
    """

    def __init__(self, counts: Sequence[int], seed: int) -> None:
        self.counts, self.seed, self.length = list(counts), seed, sum(counts)
        self._last: tuple[int, Tensor] = -1, torch.empty(0)

    def cycle(self, number: int) -> Tensor:
        """The sources of one cycle in order: int64."""
        if self._last[0] != number:
            every = torch.repeat_interleave(torch.arange(len(self.counts)), torch.tensor(self.counts))
            generator = torch.Generator().manual_seed(rng.fold_in_host(self.seed, number))
            self._last = number, every[torch.randperm(self.length, generator=generator)]
        return self._last[1]

    def before(self, position: int) -> list[int]:
        """How many rows of each source come before a position."""
        number, rest = divmod(position, self.length)
        begun = (
            self.cycle(number)[:rest].bincount(minlength=len(self.counts)).tolist() if rest else [0] * len(self.counts)
        )
        return [number * count + more for count, more in zip(self.counts, begun, strict=True)]

    def at(self, start: int, stop: int) -> Tensor:
        """The sources at positions ``start`` to ``stop`` - 1."""
        first, last = start // self.length, max(stop - 1, start) // self.length
        whole = torch.cat([self.cycle(number) for number in range(first, last + 1)])
        return whole[start - first * self.length : stop - first * self.length]


class Mixture:
    """A mixture of map-style sources; :func:`mix` makes it. Its rows are numbered through, source after source."""

    def __init__(self, names: list[str], data: list[Any], sources: list[Source], deal: Deal, rows: int | None) -> None:
        self._names, self._data, self._sources, self._deal = names, data, sources, deal
        sizes = torch.tensor([source.num_rows for source in sources])
        self._ends = sizes.cumsum(0)
        self._epoch_rows = rows or self.num_rows

    @property
    def num_rows(self) -> int:
        """Of all sources together; an epoch of the mixture may have more or fewer."""
        return int(self._ends[-1])

    def order(self, *, seed: int, shuffle: bool) -> MixedOrder:
        """The rows of each epoch in order, each source in its own."""
        orders = [
            order_of(source, seed=rng.fold_in_host(seed, i), shuffle=shuffle) for i, source in enumerate(self._sources)
        ]
        return MixedOrder(orders, [0, *self._ends[:-1].tolist()], self._deal, self._epoch_rows)

    def fetch(self, indices: Sequence[int]) -> Any:
        rows = torch.as_tensor(indices)
        of = torch.searchsorted(self._ends, rows, right=True)
        used = sorted(set(of.tolist()))
        if len(used) == 1:
            return self._part(used[0], rows)
        places = [(of == i).nonzero().flatten() for i in used]
        parts = [self._part(i, rows[at]) for i, at in zip(used, places, strict=True)]
        return joined(parts, torch.cat(places), [self._names[i] for i in used])

    def lengths(self, column: str) -> Tensor:
        """Lengths of all rows, as :func:`~trainkit.io.data.sources.lengths_of` gives them for each source."""
        parts = [lengths_of(source, data, column) for source, data in zip(self._sources, self._data, strict=True)]
        return torch.cat(parts)

    def describe(self) -> dict[str, Any]:
        """What a position depends on, beside the sources."""
        about = [_about(source) for source in self._sources]
        return {"sources": about, "counts": self._deal.counts, "mix": self._deal.seed, "epoch_rows": self._epoch_rows}

    def _part(self, i: int, rows: Tensor) -> Any:
        own = (rows - (int(self._ends[i - 1]) if i else 0)).tolist()
        try:
            return self._sources[i].fetch(own)
        except Exception as error:
            cause = cause_of(error)
            raise explained(cause, f"rows {numbers(own)} of source {self._names[i]!r}") from cause


class MixedOrder:
    """The order of a :class:`Mixture`: any part of any epoch at once."""

    def __init__(self, orders: list[Order], starts: list[int], deal: Deal, num_rows: int) -> None:
        self._orders, self._starts, self._deal, self._num_rows = orders, starts, deal, num_rows

    @property
    def num_rows(self) -> int:
        return self._num_rows

    def at(self, epoch: int, start: int, stop: int) -> Tensor:
        """The rows at positions ``start`` to ``stop`` - 1 of an epoch, numbered through all sources."""
        first = epoch * self.num_rows + start
        of = self._deal.at(first, first + stop - start)
        rows = torch.empty_like(of)
        for i, begin in enumerate(self._deal.before(first)):
            mine = of == i
            rows[mine] = _endless(self._orders[i], begin, begin + int(mine.sum())) + self._starts[i]
        return rows


def _endless(order: Order, start: int, stop: int) -> Tensor:
    """Rows of a source that is read again and again, each time in the order of the next epoch."""
    parts = [torch.empty(0, dtype=torch.int64)]
    while start < stop:
        epoch, place = divmod(start, order.num_rows)
        end = min(order.num_rows, place + stop - start)
        parts.append(order.at(epoch, place, end))
        start += end - place
    return torch.cat(parts)


class OrderedStream:
    """Map-style data read in order, as a stream that goes on from any row.

    Args:
        source: what is read.
        seed: of its order, and of what reading it draws.
        shuffle: whether each epoch has an order of its own.

    Example:
        >>> from trainkit.io.data.sources import ItemRows
        >>> stream = OrderedStream(ItemRows([5, 6, 7]), seed=0)
        >>> list(stream.read(0, None, 0))[2] == next(stream.read(0, None, 2))
        True
    """

    def __init__(self, source: Source, *, seed: int, shuffle: bool = True) -> None:
        self._source, self._seed = source, seed
        self._order = order_of(source, seed=seed, shuffle=shuffle)

    def read(self, epoch: int, state: Any, num_read: int) -> Iterator[Any]:
        # From the same borders wherever reading begins, so that what the source draws is the same.
        for start in range(num_read // _READ_ROWS * _READ_ROWS, self._order.num_rows, _READ_ROWS):
            stop = min(start + _READ_ROWS, self._order.num_rows)
            with seeded(rng.fold_in_host(self._seed, READING, epoch, start)):
                rows = as_rows(self._source.fetch(self._order.at(epoch, start, stop).tolist()))
            yield from rows[max(num_read - start, 0) :]

    def state(self) -> Any:
        return None

    def describe(self) -> dict[str, Any]:
        """What a position depends on."""
        return _about(self._source)


class MixedStream:
    """A mixture in which at least one source is a stream; :func:`mix` makes it. It has one epoch, without end.

    Its state is how many rows were dealt, and for each source its epoch, its rows in it and its own state.
    """

    def __init__(self, names: list[str], data: list[Any], deal: Deal, *, seed: int, shuffle: bool = True) -> None:
        self._names, self._data, self._deal = names, data, deal
        self._num_dealt = 0
        self._streams = [_stream_of(one, rng.fold_in_host(seed, i), shuffle) for i, one in enumerate(data)]
        self._read = [_Reading(stream, name) for stream, name in zip(self._streams, names, strict=True)]

    def ordered(self, *, seed: int, shuffle: bool) -> MixedStream:
        """The same mixture from its beginning, with the order of a seed where sources can be read in any order."""
        return MixedStream(self._names, self._data, self._deal, seed=seed, shuffle=shuffle)

    def read(self, epoch: int, state: Any, num_read: int) -> Iterator[Any]:
        self._num_dealt = 0 if state is None else state["dealt"]
        for i, reading in enumerate(self._read):
            reading.start(None if state is None else state["sources"][i])
        return self._rows()

    def state(self) -> Any:
        return {"dealt": self._num_dealt, "sources": [reading.state() for reading in self._read]}

    def describe(self) -> dict[str, Any]:
        """What a position depends on, beside the sources."""
        sources = {name: _described(stream) for name, stream in zip(self._names, self._streams, strict=True)}
        return {"sources": sources, "counts": self._deal.counts, "mix": self._deal.seed}

    def _rows(self) -> Iterator[Any]:
        while True:
            number, place = divmod(self._num_dealt, self._deal.length)
            for i in self._deal.cycle(number)[place:].tolist():
                row = self._read[i].next()
                self._num_dealt += 1
                yield row


def _stream_of(data: Any, seed: int, shuffle: bool) -> Stream:
    source = as_source(data)
    if source is not None:
        return OrderedStream(source, seed=seed, shuffle=shuffle)
    return as_stream(data, seed=seed, shuffle=shuffle)


def _described(source: Any) -> dict[str, Any]:
    about: dict[str, Any] = getattr(source, "describe", dict)()
    return about


def _about(source: Source) -> dict[str, Any]:
    return {"rows": source.num_rows, **_described(source)}


class _Reading:
    """One stream of a mixture, read again and again."""

    def __init__(self, stream: Stream, name: str) -> None:
        self._stream, self._name = stream, name
        self._epoch, self._num_read, self._begun = 0, 0, False
        self._given: Any = None
        self._rows: Iterator[Any] = iter(())

    def start(self, state: Any) -> None:
        at = state or {"epoch": 0, "num_read": 0, "state": None}
        self._epoch, self._num_read, self._given, self._begun = at["epoch"], at["num_read"], at["state"], False

    def state(self) -> dict[str, Any]:
        # A stream that was not touched since the start may not know its own state yet.
        own = self._stream.state() if self._begun and self._num_read else self._given
        return {"epoch": self._epoch, "num_read": self._num_read, "state": own}

    def next(self) -> Any:
        if not self._begun:
            self._rows, self._begun = self._stream.read(self._epoch, self._given, self._num_read), True
        try:
            for row in self._rows:
                self._num_read += 1
                return row
        except Exception as error:
            cause = cause_of(error)
            at = f"row {self._num_read} of epoch {self._epoch} of source {self._name!r}"
            raise explained(cause, at) from cause
        if not self._num_read:
            raise ValueError(f"sources: {self._name!r} gave no row in epoch {self._epoch}, expected at least one")
        self._epoch, self._num_read, self._given, self._begun = self._epoch + 1, 0, None, False
        return self.next()


def joined(parts: list[Any], places: Tensor, names: list[str]) -> Any:
    """Rows of several sources as one batch.

    Args:
        parts: what each source gave.
        places: where in the batch the rows of all parts go, one part after the other; a permutation.
        names: of the sources, for errors.

    Raises: :class:`~trainkit.io.data.errors.BatchError` for sources with different keys.

    Example:
        >>> joined([{"x": torch.tensor([1, 2])}, {"x": torch.tensor([3])}], torch.tensor([0, 2, 1]), ["a", "b"])
        {'x': tensor([1, 3, 2])}
    """
    order = places.argsort()
    if all(isinstance(part, Mapping) for part in parts):
        keys = parts[0].keys()
        for part, name in zip(parts, names, strict=True):
            if part.keys() != keys:
                raise BatchError(
                    f"sources: expected the keys {sorted(keys)} of {names[0]!r}, found {sorted(part)} in {name!r}"
                )
        return {key: _joined_column([part[key] for part in parts], order) for key in keys}
    if all(isinstance(part, Tensor) for part in parts):
        return _joined_column(parts, order)
    rows = [row for part in parts for row in as_rows(part)]
    return [rows[i] for i in order.tolist()]


def as_rows(values: Any) -> list[Any]:
    """A list of rows from rows or columns.

    Example:
        >>> as_rows({"x": torch.tensor([1, 2]), "y": ["a", "b"]})
        [{'x': tensor(1), 'y': 'a'}, {'x': tensor(2), 'y': 'b'}]
    """
    if isinstance(values, Mapping):
        columns = [as_rows(column) for column in values.values()]
        return [dict(zip(values, row, strict=True)) for row in zip(*columns, strict=True)]
    if isinstance(values, tuple):
        return list(zip(*(as_rows(column) for column in values), strict=True))
    if isinstance(values, Ragged):
        return [values[i] for i in range(len(values))]
    return list(values)


def _joined_column(columns: list[Any], order: Tensor) -> Any:
    if all(isinstance(column, Tensor) for column in columns):
        forms = {(column.dtype, column.shape[1:]) for column in columns}
        if len(forms) == 1:
            return torch.cat(columns)[order]
    if all(isinstance(column, Ragged) for column in columns):
        forms = {(column.values.dtype, column.values.shape[1:]) for column in columns}
        if len(forms) == 1:
            return _reordered(columns, order)
    # Differing forms are told apart by whoever collates, who knows the rows.
    rows = [row for column in columns for row in as_rows(column)]
    return [rows[i] for i in order.tolist()]


def _reordered(columns: list[Ragged], order: Tensor) -> Ragged:
    rows = [row for column in columns for row in as_rows(column)]
    lengths = torch.cat([column.lengths for column in columns])[order]
    return Ragged(torch.cat([rows[i] for i in order.tolist()]), offsets_of(lengths))


def _counts(names: list[str], weights: Any) -> list[int]:
    """Rows of each source in a cycle: the smallest whole numbers in the ratio of the weights."""
    if not names:
        raise ValueError("sources: got none, expected at least one")
    if isinstance(weights, Mapping):
        if set(weights) != set(names):
            raise ValueError(f"weights: got {sorted(weights)} for the sources {sorted(names)}, expected one for each")
        weights = [weights[name] for name in names]
    given = [1.0] * len(names) if weights is None else list(weights)
    if len(given) != len(names) or not all(math.isfinite(weight) and weight > 0 for weight in given):
        raise ValueError(f"weights: got {given} for {len(names)} sources, expected a positive number for each")
    exact = [Fraction(weight) for weight in given]
    total = sum(exact)
    shares = [(weight / total).limit_denominator(LONGEST_CYCLE * LONGEST_CYCLE) for weight in exact]
    if min(shares) * LONGEST_CYCLE < 1:
        raise ValueError(f"weights: got {given}; each must be at least 1 / {LONGEST_CYCLE} of their sum")
    total = sum(shares)
    shares = [share / total for share in shares]
    length = math.lcm(*(share.denominator for share in shares))
    if length > LONGEST_CYCLE:
        length = LONGEST_CYCLE
    counts = [int(share * length) for share in shares]
    # The rows that rounding down left over go to those who lost most.
    by_loss = sorted(range(len(counts)), key=lambda i: counts[i] - shares[i] * length)
    for i in by_loss[: length - sum(counts)]:
        counts[i] += 1
    return counts
