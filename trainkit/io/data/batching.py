"""Which rows make a batch: by number, by a budget of tokens, grouped by length; the same at whatever position."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from trainkit import rng

WINDOW_ROWS = 4096
"""Rows that are ordered together where nothing else is said."""


@dataclass(frozen=True)
class Batching:
    """How rows are made into batches. Exactly one of ``batch_size`` and ``max_tokens`` is given.

    The order of an epoch is cut into windows of ``window`` rows, and each window into batches, without regard to the
    other windows. So any window can be cut alone, which is what makes a position an integer.

    Args:
        batch_size: rows per batch, over all ranks.
        max_tokens: rows times the longest of them is at most this, over all ranks: what the batch has after padding.
        group: sort the rows of a window by length, so that batches need little padding.
        window: rows; a multiple of ``batch_size``.
        drop_last: leave out a batch of fewer rows than ``batch_size`` at the end of an epoch.
        shuffle: whether the batches of a window that was sorted are shuffled.
        seed: of the run.

    Raises: ValueError for numbers below 1, both or neither of the sizes, a window that is no multiple of the batch
        size, or ``drop_last`` without a batch size.

    Example:
        >>> Batching(batch_size=2, window=4).cut(5)
        [tensor([0, 1]), tensor([2, 3]), tensor([4])]
        >>> Batching(max_tokens=6, window=4).cut(4, torch.tensor([3, 2, 1, 4]))
        [tensor([0, 1]), tensor([2]), tensor([3])]
    """

    batch_size: int | None = None
    max_tokens: int | None = None
    group: bool = False
    window: int = WINDOW_ROWS
    drop_last: bool = False
    shuffle: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.batch_size is None) == (self.max_tokens is None):
            raise ValueError(
                f"batch_size, max_tokens: got {self.batch_size} and {self.max_tokens}, expected exactly one of them"
            )
        for name in ("batch_size", "max_tokens", "window"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}: got {value!r}, expected an integer of at least 1")
        if self.batch_size is not None and self.window % self.batch_size:
            raise ValueError(f"window: got {self.window} rows, expected a multiple of batch_size={self.batch_size}")
        if self.max_tokens is not None and self.drop_last:
            raise ValueError("drop_last: batches of max_tokens have no fixed size, so none is short; expected False")

    @property
    def needs_lengths(self) -> bool:
        return self.group or self.max_tokens is not None

    def cut(self, num_rows: int, lengths: Tensor | None = None, *, epoch: int = 0, window: int = 0) -> list[Tensor]:
        """The batches of one window, as places in it.

        Sorted batches are shuffled by (seed, epoch, window), the short one stays last.

        Args:
            num_rows: in the window.
            lengths: int64 of shape (num_rows,), in the order of the window, where rows are sorted or tokens counted.
            epoch: which pass over the data.
            window: which window of the epoch.
        """
        places = torch.arange(num_rows)
        if self.group and lengths is not None:
            places = lengths.argsort(stable=True)
        if self.batch_size is not None:
            batches = list(torch.split(places, self.batch_size)) if num_rows else []
        else:
            assert self.max_tokens is not None and lengths is not None
            batches = _within_budget(places, lengths[places].tolist(), self.max_tokens)
        if self.group and self.shuffle:
            batches = self._shuffled(batches, epoch, window)
        if self.drop_last and batches and len(batches[-1]) != self.batch_size:
            batches.pop()
        return batches

    def _shuffled(self, batches: list[Tensor], epoch: int, window: int) -> list[Tensor]:
        short = []
        if self.batch_size is not None and batches and len(batches[-1]) < self.batch_size:
            short.append(batches.pop())
        generator = torch.Generator().manual_seed(rng.fold_in_host(self.seed, epoch, window))
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()] + short

    def describe(self) -> dict[str, Any]:
        """What a saved position depends on, for comparison: JSON."""
        return asdict(self)


def rounded_window(window: int | None, batch_size: int | None, default: int = WINDOW_ROWS) -> int:
    """The window that was asked for, or the first multiple of the batch size that is at least ``default`` rows.

    Example:
        >>> rounded_window(None, 100, 250), rounded_window(7, None)
        (300, 7)
    """
    if window is not None or batch_size is None or batch_size < 1:
        return default if window is None else window
    return -(-default // batch_size) * batch_size


class Order(Protocol):
    """Rows by epoch and position."""

    @property
    def num_rows(self) -> int:
        """Rows per epoch."""

    def at(self, epoch: int, start: int, stop: int) -> Tensor:
        """The rows at positions ``start`` to ``stop`` - 1."""


class Windows:
    """The batches of map-style data, window by window; each costs the same, wherever it is.

    Args:
        order: of the rows.
        batching: how they are cut.
        lengths: int64 tensor, the length of each row of the source; None where none are needed.

    Example:
        >>> from trainkit.io.data.order import RowOrder
        >>> windows = Windows(RowOrder(5, seed=0, shuffle=False), Batching(batch_size=2, window=4))
        >>> windows.batches(0, 1), windows.num_batches(0)
        ([tensor([4])], 3)
    """

    def __init__(self, order: Order, batching: Batching, lengths: Tensor | None = None) -> None:
        self._order, self._batching, self._lengths = order, batching, lengths

    @property
    def num_tokens(self) -> int | None:
        """The sum of all lengths; None where none are needed."""
        return None if self._lengths is None else int(self._lengths.sum())

    @property
    def num_windows(self) -> int:
        """Windows per epoch."""
        return -(-self._order.num_rows // self._batching.window)

    def batches(self, epoch: int, window: int) -> list[Tensor]:
        """The rows of each batch of one window: dataset indices."""
        start = window * self._batching.window
        stop = min(start + self._batching.window, self._order.num_rows)
        rows = self._order.at(epoch, start, stop)
        lengths = None if self._lengths is None else self._lengths[rows]
        return [rows[places] for places in self._batching.cut(len(rows), lengths, epoch=epoch, window=window)]

    def num_batches(self, epoch: int) -> int:
        """Batches in an epoch. For ``max_tokens`` all windows are cut to count them."""
        size = self._batching.batch_size
        if size is None:
            return sum(len(self.batches(epoch, window)) for window in range(self.num_windows))
        full, rest = divmod(self._order.num_rows, size)
        return full + bool(rest and not self._batching.drop_last)


def _within_budget(places: Tensor, lengths: list[int], max_tokens: int) -> list[Tensor]:
    borders, longest, first = [0], 0, 0
    for i, length in enumerate(lengths):
        if i > first and max(longest, length) * (i + 1 - first) > max_tokens:
            borders.append(i)
            longest, first = 0, i
        longest = max(longest, length)
    return [places[a:b] for a, b in zip(borders, [*borders[1:], len(lengths)], strict=True) if b > a]


def rank_part(num_rows: int, rank: int, world: int) -> range:
    """Which rows of a global batch a rank takes: contiguous, at most one more than any other, none lost or doubled.

    Rank r takes rows floor(r * n / world) to floor((r + 1) * n / world) - 1; parts in the order of ranks are the batch.
    With fewer rows than ranks some parts are empty.

    Args:
        num_rows: n, of the global batch.
        rank: from 0.
        world: how many ranks there are.

    Example:
        >>> [rank_part(5, rank, 2) for rank in range(2)]
        [range(0, 2), range(2, 5)]
    """
    return range(rank * num_rows // world, (rank + 1) * num_rows // world)
