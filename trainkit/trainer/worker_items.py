"""What worker processes of the Trainer's loader read. Imported only where there are workers."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch.utils.data import IterableDataset, get_worker_info

from trainkit import rng
from trainkit.io.data.assemble import Failed, Item, Loaded, Maker, Task, failure
from trainkit.io.data.position import Position
from trainkit.io.data.workers import MapItems, in_processes
from trainkit.io.seeding import seeded
from trainkit.trainer.reading import BatchReader, Rows
from trainkit.trainer.sharding import stream_parts


@dataclass(frozen=True)
class _Makes(Maker):
    """Takes what was read for the batch: collating is done, and a batch need have no tensors."""

    by_epoch: bool = True

    def make(
        self, read: Callable[[], Any], rows: Sequence[int], start: Position, after: Position, *, empty: bool
    ) -> Item:
        where = f"epoch {start.epoch}, batch {start.batch} of it"
        epoch = start.epoch if self.by_epoch else 0
        try:
            with seeded(rng.fold_in_host(self.seed, epoch, start.batch, self.rank)):
                return Loaded(after, read(), where)
        except Exception as error:
            return failure(error, where, rows)


class _StreamItems(IterableDataset[Any]):
    """The batches of one worker of a stream, each with the number of its rows over all processes."""

    def __init__(
        self, rows: Iterable[Any], collate: Callable[[list[Any]], Any], cut: tuple[int, int, int, bool], seed: int
    ) -> None:
        self._rows, self._collate, self._cut, self._seed = rows, collate, cut, seed

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        info = get_worker_info()
        with seeded(rng.fold_in_host(self._seed, 0 if info is None else info.id)):
            for part, size in stream_parts(self._rows, *self._cut):
                yield self._collate(part), size


def map_batches(
    reader: BatchReader,
    epochs: Iterable[tuple[int, int, Iterator[Rows]]],
    *,
    seed: int,
    rank: int,
    by_epoch: bool,
    workers: int,
    prefetch: int,
) -> Generator[tuple[Any, bool], None, None]:
    """Batches of map-style data, made by worker processes, in order.

    Args:
        reader: makes them.
        epochs: one pass after the other: its number, the number of its first batch, and the rows of its batches. The
            next pass is asked for when the last batch of one has been given to the workers.
        seed: what rows and collator draw follows from seed, epoch, batch and rank.
        rank: of this process.
        by_epoch: whether each pass draws anew.
        workers: processes.
        prefetch: batches that each loads ahead.

    Returns: each batch, and whether it is the last of its pass. Closing ends the processes.

    Raises: the error of a worker, with the place of the batch in its text.
    """
    # `len` is never called: what the reader gives is collated.
    items = MapItems(reader, _Makes(len, seed, rank, 1, by_epoch=by_epoch))
    for item in in_processes(items, _tasks(epochs), workers=workers, prefetch=prefetch):
        if isinstance(item, Failed):
            raise item.error from item.cause
        assert isinstance(item, Loaded)
        yield item.batch, item.after.batch == 0


def stream_batches(
    rows: Iterable[Any],
    collate: Callable[[list[Any]], Any],
    cut: tuple[int, int, int, bool],
    *,
    seed: int,
    epoch: int,
    by_epoch: bool,
    workers: int,
    prefetch: int,
) -> Generator[tuple[Any, int], None, None]:
    """Batches of a stream, made by worker processes, from each in turn, as a ``DataLoader`` gives them.

    Args:
        rows: the stream; it is read in each worker, where ``get_worker_info`` says which one that is.
        collate: makes the batches.
        cut: rows per process, rank, number of processes, whether to drop what is left.
        seed: what stream and collator draw follows from seed, epoch, rank and the number of the worker.
        epoch: of the pass.
        by_epoch: whether each pass draws anew.
        workers: processes.
        prefetch: batches that each loads ahead.

    Returns: each batch, and the number of its rows over all processes. Closing ends the processes.
    """
    key = rng.fold_in_host(seed, epoch if by_epoch else 0, cut[1])
    items = cast(Any, _StreamItems(rows, collate, cut, key))
    running = in_processes(items, None, workers=workers, prefetch=prefetch)
    try:
        yield from cast(Iterator[tuple[Any, int]], running)
    finally:
        running.close()


def _tasks(epochs: Iterable[tuple[int, int, Iterator[Rows]]]) -> Iterator[Task]:
    for epoch, first, batches in epochs:
        coming = next(batches, None)
        if coming is None:
            return
        while coming is not None:
            rows, coming = coming, next(batches, None)
            after = Position(epoch, first + 1) if coming is not None else Position(epoch + 1)
            yield Task(Position(epoch, first), after, [int(row) for row in rows], empty=False)
            first += 1
