"""Which rows each process gets: of an order of row numbers, and of a stream."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, IterableDataset, SequentialSampler

from trainkit.trainer.samplers import LengthGroupedSampler, SeededRandomSampler


class IterableDatasetShard(IterableDataset[Any]):
    """The rows of a stream that one process gets: of each ``batch_size * num_processes`` its ``batch_size``.

    Rows that do not fill such a piece at the end are left out with ``drop_last``, and otherwise filled up with the
    first piece.

    Args:
        dataset: the stream; every process reads all of it.
        batch_size: rows of this process in a piece.
        drop_last: as above.
        num_processes: how many share the stream.
        process_index: from 0.
        seed: a torch ``generator`` of a data set without ``set_epoch`` is seeded with seed + epoch.

    Raises: ValueError for a process index out of range.

    Example:
        >>> [list(IterableDatasetShard(range(10), 2, num_processes=2, process_index=i)) for i in (0, 1)]
        [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 0, 1]]

    Source: Trainer 4.57: IterableDatasetShard.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int = 1,
        drop_last: bool = False,
        num_processes: int = 1,
        process_index: int = 0,
        seed: int = 0,
    ) -> None:
        if not 0 <= process_index < num_processes:
            raise ValueError(f"process_index: got {process_index} of {num_processes}, expected a number below it")
        self.dataset, self.batch_size, self.drop_last, self.seed = dataset, batch_size, drop_last, seed
        self.num_processes, self.process_index = num_processes, process_index
        self.epoch = self.num_examples = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch that is read next; the data set is told too."""
        self.epoch = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        self.num_examples = 0
        generator = getattr(self.dataset, "generator", None)
        if not hasattr(self.dataset, "set_epoch") and isinstance(generator, torch.Generator):
            generator.manual_seed(self.seed + self.epoch)
        part = slice(self.process_index * self.batch_size, (self.process_index + 1) * self.batch_size)
        for piece in pieces(self._counted(), self.batch_size * self.num_processes, self.drop_last):
            yield from piece[part]

    def __len__(self) -> int:
        whole = self.batch_size * self.num_processes
        count = len(self.dataset) // whole if self.drop_last else math.ceil(len(self.dataset) / whole)
        return count * self.batch_size

    def _counted(self) -> Iterator[Any]:
        for row in self.dataset:
            self.num_examples += 1
            yield row


class RankBatchSampler(BatchSampler):
    """The batches of one process: of each ``batch_size * num_processes`` rows of a sampler its own ``batch_size``.

    Process p gets batches p, p + W, p + 2W, ... of the sampler. Rows that do not fill a batch for every process at the
    end are left out with ``drop_last``, filled up from the start of the order with ``even_batches``, and otherwise
    given out as they are.

    Args:
        sampler: gives row numbers.
        batch_size: rows per process.
        drop_last: as above; a single process leaves out a batch of fewer rows.
        num_processes: W.
        process_index: p, from 0.
        even_batches: as above; a single process gets a batch of fewer rows as it is.

    Example:
        >>> [list(RankBatchSampler(range(5), 2, False, 2, p)) for p in (0, 1)]
        [[[0, 1], [4, 0]], [[2, 3], [1, 2]]]

    Source: accelerate.data_loader.BatchSamplerShard, which Trainer 4.57 shards with.
    """

    sampler: Any

    def __init__(
        self,
        sampler: Any,
        batch_size: int,
        drop_last: bool = False,
        num_processes: int = 1,
        process_index: int = 0,
        even_batches: bool = True,
    ) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.num_processes, self.process_index = num_processes, process_index
        self.even_batches = even_batches and num_processes > 1

    def __len__(self) -> int:
        rows, whole = len(self.sampler), self.batch_size * self.num_processes
        if self.drop_last:
            return rows // whole
        mine = rows if self.even_batches else rows - self.process_index * self.batch_size
        return math.ceil(max(mine, 0) / whole)

    def __iter__(self) -> Iterator[list[int]]:
        return (rows if isinstance(rows, list) else rows.tolist() for rows in self.after(0))

    def after(self, start: int) -> Iterator[list[int] | Tensor]:
        """The batches of this process after the first ``start``. No row is read for those, and with a sampler that
        gives its whole order at once nothing is done for them at all."""
        order = _order_of(self.sampler)
        if order is None:
            return itertools.islice(self._drawn(), start, None)
        return self._cut(*order, start)

    def _cut(self, rows_at: Callable[[int, int], Tensor], num_rows: int, start: int) -> Iterator[Tensor]:
        whole, first = self.batch_size * self.num_processes, self.process_index * self.batch_size
        for i in range(start, num_rows // whole):
            yield rows_at(i * whole + first, i * whole + first + self.batch_size)
        left = num_rows % whole
        if not left or self.drop_last or start > num_rows // whole:
            return
        rest = rows_at(num_rows - left, num_rows)
        if self.even_batches:
            filling = rows_at(0, min(whole, num_rows))
            rest = torch.cat([rest, filling.repeat(math.ceil(whole / len(filling)))])[:whole]
        if len(mine := rest[first : first + self.batch_size]):
            yield mine

    def _drawn(self) -> Iterator[list[int]]:
        """One by one, for a sampler that may decide only when it is asked."""
        whole, first = self.batch_size * self.num_processes, self.process_index * self.batch_size
        for piece in pieces(self.sampler, whole, self.drop_last, fill=self.even_batches):
            if mine := piece[first : first + self.batch_size]:
                yield mine


def pieces(items: Iterable[Any], size: int, drop_last: bool = False, *, fill: bool = True) -> Iterator[list[Any]]:
    """Items in pieces of ``size``; what is left at the end is left out, filled up from the first piece, or given.

    Args:
        items: any iterable; it is read as the pieces are taken.
        size: of a piece.
        drop_last: leave out the last ones.
        fill: fill up, from the start again and again.

    Example:
        >>> list(pieces("abcde", 2)), list(pieces("a", 3))
        ([['a', 'b'], ['c', 'd'], ['e', 'a']], [['a', 'a', 'a']])
    """
    iterator = iter(items)
    first: list[Any] = []
    while piece := list(itertools.islice(iterator, size)):
        first = first or piece
        if len(piece) < size:
            if drop_last:
                return
            if fill:
                piece = piece + list(itertools.islice(itertools.cycle(first), size - len(piece)))
        yield piece


def stream_parts(
    rows: Iterable[Any], batch_size: int, rank: int = 0, world: int = 1, drop_last: bool = False
) -> Iterator[tuple[list[Any], int]]:
    """The batches of one process of a stream that every process reads: of each ``batch_size * world`` rows its own.

    What is left at the end is shared evenly, filled up with the first rows where it is no multiple of ``world``.

    Args:
        rows: the stream; a row is read when its batch is asked for, not before.
        batch_size: rows per process.
        rank: of this process, from 0.
        world: number of processes.
        drop_last: leave out what does not fill a batch for every process.

    Returns: for each batch its rows, and how many rows all processes together have in it that are no repetitions.

    Example:
        >>> [list(stream_parts("abcdefg", 2, rank, 2)) for rank in (0, 1)]
        [[(['a', 'b'], 4), (['e', 'f'], 3)], [(['c', 'd'], 4), (['g', 'a'], 3)]]

    Source: accelerate.data_loader.DataLoaderDispatcher, which reads in one process and sends; the batches are the same.
    """
    first: list[Any] = []
    for piece in pieces(rows, batch_size * world, drop_last, fill=False):
        first = first or piece[:world]
        size = math.ceil(len(piece) / world)
        whole = piece + list(itertools.islice(itertools.cycle(first), size * world - len(piece)))
        yield whole[rank * size : (rank + 1) * size], len(piece)


def _order_of(sampler: Any) -> tuple[Callable[[int, int], Tensor], int] | None:
    """The rows at any positions of a whole epoch, and how many there are, where a sampler can tell."""
    if type(sampler) is SequentialSampler:
        return torch.arange, len(sampler)
    if type(sampler) in (SeededRandomSampler, LengthGroupedSampler):
        order = sampler.order()
        return (lambda start, stop: order[start:stop]), len(order)
    return None
