"""The Trainer's loader: the batches of 4.57 in its order, from any position, with little work between them."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from trainkit.trainer.placing import moved as moved
from trainkit.trainer.placing import placing
from trainkit.trainer.reading import BatchReader, Rows
from trainkit.trainer.samplers import SeededRandomSampler, has_length, is_stream
from trainkit.trainer.sharding import RankBatchSampler, stream_parts

_PREFETCH = 2
_T = TypeVar("_T")


class TrainerDataLoader(DataLoader[Any]):
    """Batches of one process, in an order that follows from seed and epoch, on their device.

    Made by :func:`make_dataloader`. An iteration is one pass; after a complete one the next is of the next epoch, and
    :meth:`set_epoch` chooses another. Without workers nothing is loaded ahead, except that tables of plain numbers are
    read in larger parts. A loader is iterated by one loop at a time.

    ``dataset``, ``batch_sampler``, ``collate_fn``, ``num_workers`` are those of any ``DataLoader``, and these are those
    of the loaders of accelerate:

    - ``epoch`` (of the pass under way or the next one), ``total_batch_size`` (rows over all processes);
    - ``end_of_dataloader``: whether the batch given last is known to be the last one of its pass, or the last of a
      worker's part of a stream, where rows may be repeated as well;
    - ``remainder``: rows of that batch over all processes that are no repetitions; 0 if none is repeated, -1 if this is
      not known or such rows are left out.

    And ``is_last``: whether the batch given last is the last one of its pass, as far as it is known. In evaluation it
    always is: where the batches cannot be counted, the next one is made before one is given.
    """

    dataset: Any
    batch_sampler: Any
    epoch = 0
    end_of_dataloader = is_last = False
    remainder = -1
    # accelerate passes a loader of which this is true through as it is.
    _is_accelerate_prepared = True

    def __init__(
        self,
        dataset: Any,
        *,
        cut: tuple[int, int, int, bool],
        sampler: Any,
        collate_fn: Callable[[list[Any]], Any],
        even_batches: bool,
        seed: int,
        by_epoch: bool,
        place: Callable[[Any], Any] | None,
        gradient_state: Any,
        **options: Any,
    ) -> None:
        size, rank, world, drop_last = cut
        self._is_stream = is_stream(dataset)
        if self._is_stream:
            options.update(batch_size=size, drop_last=drop_last)
        else:
            order = SequentialSampler(dataset) if sampler is None else sampler
            options["batch_sampler"] = RankBatchSampler(order, size, drop_last, world, rank, even_batches)
        # What else iterates over a loader like this one draws its seeds here, and not from the global generator.
        super().__init__(dataset, collate_fn=collate_fn, generator=torch.Generator(), **options)
        self._reader = None if self._is_stream else BatchReader(dataset, collate_fn)
        self.total_batch_size = size * world
        self._cut, self._seed, self._by_epoch, self._place = cut, seed, by_epoch, place
        self.gradient_state = gradient_state
        self._start = self._given = 0
        self._stream_state: Any = None
        self._rows: Any = None
        self._running: tuple[Generator[tuple[Any, bool], None, None], tuple[int, int]] | None = None

    def __len__(self) -> int:
        """Batches of this process in a pass.

        Raises: TypeError where the data have no length.
        """
        if not self._is_stream:
            return len(self.batch_sampler)
        if not has_length(self.dataset):
            raise TypeError(f"len: {type(self.dataset).__name__} has no length, so its batches cannot be counted")
        whole = len(self.dataset) / self.total_batch_size
        return math.floor(whole) if self._cut[3] else math.ceil(whole)

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next pass is; sampler and data set are told, if they have ``set_epoch``."""
        self.epoch = epoch
        told: Any
        for told in (getattr(self.batch_sampler, "sampler", None), self.dataset):
            if hasattr(told, "set_epoch"):
                told.set_epoch(epoch)

    def skip(self, batches: int) -> None:
        """Let the next pass begin after so many batches.

        Map-style data: no row is read for them. Streams: their rows are read, and not made into batches, unless
        worker processes make them.

        Raises: ValueError for a negative number.
        """
        if batches < 0:
            raise ValueError(f"batches: got {batches}, expected a number of at least 0")
        self._start = self._given = batches
        self._stream_state = None

    def state_dict(self) -> dict[str, Any]:
        """The position after the batch that was given last: epoch, batches, and the stream's own state if it has one.

        JSON, if the stream's state is. In evaluation a stream is read ahead, so that its own state is left out.
        """
        stream = self._rows.state() if self._rows is not None and self._given and self._by_epoch else None
        return {"epoch": self.epoch, "batch": self._given, "stream": stream}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a position; a stream with a state of its own does so at once."""
        self.set_epoch(state["epoch"])
        self.skip(state["batch"])
        self._stream_state = state.get("stream")

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        start, self._start = self._start, 0
        self._given, self.end_of_dataloader, self.is_last = start, False, False
        self.set_epoch(self.epoch)
        return self._pass(start)

    def _pass(self, start: int) -> Generator[Any, None, None]:
        if self.gradient_state is not None:
            self.gradient_state._add_dataloader(self)
        place = self._place
        try:
            with closing(self._of_stream(start) if self._is_stream else self._of_rows(start)) as batches:
                for batch in batches:
                    self._given += 1
                    yield batch if place is None else place(batch)
            self.epoch, self._given = self.epoch + 1, 0
        finally:
            if self.gradient_state is not None:
                self.gradient_state._remove_dataloader(self)

    def _of_rows(self, start: int) -> Generator[Any, None, None]:
        """What is left of a pass over map-style data."""
        sampler = self.batch_sampler
        count, rows = (len(sampler), len(sampler.sampler)) if has_length(sampler) else (None, None)
        self.remainder = -1 if rows is None or self._cut[3] else rows % self.total_batch_size
        batches = self._from_workers(start) if self.num_workers else self._in_turn(start)
        with closing(batches):
            for batch, is_last in self._told(batches, None if count is None else count - start):
                # To set an attribute of a DataLoader takes long.
                if is_last:
                    self.is_last = self.end_of_dataloader = True
                yield batch

    def _in_turn(self, start: int) -> Generator[Any, None, None]:
        assert self._reader is not None
        yield from self._reader.read_all(self.batch_sampler.after(start))

    def _from_workers(self, start: int) -> Generator[Any, None, None]:
        at = self.epoch, start
        running, self._running = self._running, None
        if running is not None and running[1] != at:
            running[0].close()
            running = None
        made = self._worker_batches(at) if running is None else running[0]
        is_kept = False
        try:
            for batch, is_last in made:
                if is_last and self._keeps_workers:
                    self._running, is_kept = (made, (at[0] + 1, 0)), True
                yield batch
                if is_last:
                    return
        finally:
            if not is_kept:
                made.close()

    def _worker_batches(self, at: tuple[int, int]) -> Generator[tuple[Any, bool], None, None]:
        from trainkit.trainer.worker_items import map_batches

        assert self._reader is not None
        passes = _passes(self.batch_sampler, *at, is_one=not self._keeps_workers)
        return map_batches(self._reader, passes, rank=self._cut[1], seed=self._seed, **self._work())

    @property
    def _keeps_workers(self) -> bool:
        """Whether workers go on with the next epoch. They have the data set as it was when they began."""
        return self.persistent_workers and not hasattr(self.dataset, "set_epoch")

    def _work(self) -> dict[str, Any]:
        prefetch = self.prefetch_factor or _PREFETCH
        return {"by_epoch": self._by_epoch, "workers": self.num_workers, "prefetch": prefetch}

    def _of_stream(self, start: int) -> Generator[Any, None, None]:
        """What is left of a pass over a stream."""
        self.remainder = -1
        with closing(self._streamed(start)) as batches:
            for (batch, rows), is_last in self._told(batches, None):
                # Only a batch that is not whole has repetitions: the last one, of each worker where there are several.
                self.is_last, self.end_of_dataloader = is_last, is_last or rows < self.total_batch_size
                self.remainder = rows % self.total_batch_size
                yield batch

    def _told(self, batches: Iterable[_T], count: int | None) -> Iterator[tuple[_T, bool]]:
        """Each batch, and whether it is known to be the last of ``count``."""
        # In training nothing is read ahead, since a saved position is that of the data.
        if count is None and not self._by_epoch:
            return with_last(batches)
        return ((batch, number == count) for number, batch in enumerate(batches, 1))

    def _streamed(self, start: int) -> Generator[tuple[Any, int], None, None]:
        if self.num_workers:
            from trainkit.trainer.worker_items import stream_batches

            made = stream_batches(
                self.dataset, self.collate_fn, self._cut, seed=self._seed, epoch=self.epoch, **self._work()
            )
            with closing(made):
                yield from itertools.islice(made, start, None)
            return
        rows, done = self._rows_from(start)
        collate = self.collate_fn
        for part, size in itertools.islice(stream_parts(rows, *self._cut), start - done, None):
            yield collate(part), size

    def _rows_from(self, start: int) -> tuple[Iterator[Any], int]:
        """The rows of a stream, and how many batches of the pass they come after."""
        if not (hasattr(self.dataset, "state_dict") and hasattr(self.dataset, "load_state_dict")):
            return iter(self.dataset), 0
        from trainkit.io.data.streams import IterableRows

        if self._rows is None:
            self._rows = IterableRows(self.dataset, seed=self._seed)
        state, self._stream_state = self._stream_state, None
        size, _, world, _ = self._cut
        # Several processes fill up the last batch from the first rows, which a state does not have.
        if state is None or world > 1:
            return self._rows.read(self.epoch, None, 0), 0
        return self._rows.read(self.epoch, state, start * size), start


def _passes(sampler: Any, epoch: int, start: int, *, is_one: bool) -> Iterator[tuple[int, int, Iterator[Rows]]]:
    """What workers are to load. It does not hold the loader: with that, a loader out of use would wait for the
    collector of cycles, and its workers with it."""
    yield epoch, start, sampler.after(start)
    while not is_one:
        epoch += 1
        if hasattr(sampler.sampler, "set_epoch"):
            sampler.sampler.set_epoch(epoch)
        yield epoch, 0, sampler.after(0)


def make_dataloader(
    dataset: Any,
    *,
    batch_size: int,
    collate_fn: Callable[[list[Any]], Any],
    sampler: Any = None,
    drop_last: bool = False,
    workers: int = 0,
    pin_memory: bool = False,
    persistent_workers: bool = False,
    prefetch_factor: int | None = None,
    is_training: bool = True,
    seed: int | None = None,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str | None = None,
    even_batches: bool = True,
    split_batches: bool = False,
    seedable_sampler: bool = True,
    non_blocking: bool = False,
    gradient_state: Any = None,
) -> TrainerDataLoader:
    """The loader of one process: the batches that the Trainer of transformers gives, in the same order.

    Of each ``batch_size * world`` rows of the sampler, process r has the r-th ``batch_size``. The random order of epoch
    e follows from seed + e. A stream is read by every process, which takes its part.

    Args:
        dataset: map-style (``__getitem__``), or a stream (a torch ``IterableDataset``, or anything that can only be
            iterated).
        batch_size: rows per process.
        collate_fn: a list of rows to a batch.
        sampler: gives row numbers; None keeps the order of the data.
        drop_last: leave out rows at the end that do not fill a batch for every process.
        workers: processes that load.
        pin_memory: copy to a CUDA device from page-locked memory, while the loop goes on.
        persistent_workers: workers go on from one epoch to the next, which they begin to load ahead. Those of streams
            do not.
        prefetch_factor: batches that each worker loads ahead; None is 2.
        is_training: whether workers draw anew in each epoch; in evaluation they draw the same in every pass.
        seed: of a random order, and of what workers draw; None is the last one that was given to ``torch.manual_seed``.
        rank: of this process, from 0.
        world: number of processes.
        device: where batches go; None leaves them in host memory.
        even_batches: fill up the last batch from the start of the order so that all processes have as many batches of
            one size.
        split_batches: ``batch_size`` is that of all processes together.
        seedable_sampler: whether a ``RandomSampler`` follows from the seed, rather than from torch's global generator.
        non_blocking: let copies to the device run while the loop goes on.
        gradient_state: of accelerate, which is told when the loader is iterated; None tells nobody.

    Returns: the loader.

    Raises:
        ValueError: sizes or ranks out of range, options that need workers; ``split_batches`` with a batch size that is
            no multiple of ``world``.
        TypeError: map-style data without a length and without a sampler.

    Example:
        >>> loader = make_dataloader([{"x": i} for i in range(5)], batch_size=2, collate_fn=lambda rows: rows, seed=0)
        >>> loader.skip(2)
        >>> list(loader), len(loader)
        ([[{'x': 4}]], 3)

    Source: Trainer 4.57: _get_dataloader, and accelerate.Accelerator.prepare_data_loader.
    """
    _check(batch_size, rank, world, split_batches)
    if sampler is None and not is_stream(dataset) and not has_length(dataset):
        raise TypeError(f"dataset: {type(dataset).__name__} has no length; expected __len__, a sampler, or a stream")
    seed = torch.initial_seed() if seed is None else seed
    # A subclass draws as it likes.
    if seedable_sampler and type(sampler) is RandomSampler:
        sampler = SeededRandomSampler(sampler, seed)
    return TrainerDataLoader(
        dataset,
        cut=(batch_size // world if split_batches else batch_size, rank, world, drop_last),
        sampler=sampler,
        collate_fn=collate_fn,
        even_batches=even_batches,
        seed=seed,
        by_epoch=is_training,
        place=placing(device, pin_memory, non_blocking),
        gradient_state=gradient_state,
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=persistent_workers,
        prefetch_factor=prefetch_factor,
    )


def dataloader_for(
    args: Any,
    dataset: Any,
    *,
    batch_size: int,
    collate_fn: Callable[[list[Any]], Any],
    sampler: Any = None,
    is_training: bool = False,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str | None = None,
) -> TrainerDataLoader:
    """:func:`make_dataloader` by training arguments.

    Args:
        args: the ``dataloader_...`` fields, ``data_seed``, ``accelerator_config``.
        dataset: as there, and so are the following.
        batch_size: rows per process.
        collate_fn: a list of rows to a batch.
        sampler: gives row numbers.
        is_training: whether workers draw anew in each epoch.
        rank: of this process.
        world: number of processes.
        device: where batches go.

    Source: Trainer 4.57: _get_dataloader.
    """
    config = args.accelerator_config
    accelerate = sys.modules.get("accelerate.state")
    return make_dataloader(
        dataset,
        batch_size=batch_size,
        collate_fn=collate_fn,
        sampler=sampler,
        drop_last=args.dataloader_drop_last,
        workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        is_training=is_training,
        seed=args.data_seed,
        rank=rank,
        world=world,
        device=device,
        even_batches=config.even_batches,
        split_batches=config.split_batches,
        seedable_sampler=config.use_seedable_sampler,
        non_blocking=config.non_blocking,
        gradient_state=None if accelerate is None else accelerate.GradientState(),
    )


def after(loader: Any, batches: int) -> Iterable[Any]:
    """What a loader gives after its first ``batches`` of a pass.

    Of the Trainer's own loader no row of map-style data is read for them, nor of a ``DataLoader`` over such data. Those
    of any other iterable are made and thrown away.

    Args:
        loader: any iterable; its epoch is set before.
        batches: how many to leave out.

    Example:
        >>> list(after("abc", 1))
        ['b', 'c']

    Source: Trainer 4.57: _inner_training_loop; accelerate.skip_first_batches.
    """
    if isinstance(loader, TrainerDataLoader):
        loader.skip(batches)
        return loader
    if not batches:
        return loader  # type: ignore[no-any-return]
    if isinstance(loader, DataLoader):
        from accelerate import skip_first_batches

        rest: Any = skip_first_batches(loader, batches)
        if hasattr(rest, "set_epoch") and hasattr(loader, "iteration"):
            rest.set_epoch(loader.iteration)
        return rest  # type: ignore[no-any-return]
    return itertools.islice(loader, batches, None)


def length_of(data: Any) -> int | None:
    """The length of a loader or a data set; None where there is none.

    Example:
        >>> length_of([1, 2]), length_of(iter([1, 2]))
        (2, None)
    """
    return len(data) if has_length(data) else None


def with_last(items: Iterable[_T]) -> Iterator[tuple[_T, bool]]:
    """Each item, and whether it is the last: the next one is taken before one is given.

    Example:
        >>> list(with_last("ab"))
        [('a', False), ('b', True)]
    """
    coming = iter(items)
    for held in itertools.islice(coming, 1):
        for item in coming:
            yield held, False
            held = item
        yield held, True


def _check(batch_size: int, rank: int, world: int, split_batches: bool) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
    if not 0 <= rank < world:
        raise ValueError(f"rank: got {rank} of world={world}, expected a number below it")
    if split_batches and batch_size % world:
        raise ValueError(f"split_batches: got batch_size {batch_size} for {world} processes, expected a multiple")
