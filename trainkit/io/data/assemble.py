"""From row numbers to a batch: read, collate, and say what went wrong and where."""

from __future__ import annotations

import inspect
from collections import UserDict
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from trainkit import rng
from trainkit.io.data.batching import Batching, Windows, rank_part
from trainkit.io.data.errors import BatchError, RowError, cause_of, explained, numbers
from trainkit.io.data.position import Limit, Position
from trainkit.io.data.sources import Source
from trainkit.io.data.streams import Stream
from trainkit.io.seeding import READING, seeded

Collate = Callable[..., Any]


@dataclass(frozen=True)
class Task:
    """A batch to be made of map-style data.

    Args:
        start: the position before it.
        after: the position when it has been taken.
        rows: the dataset indices of this rank's part; one row that stands for its form if the part is empty.
        empty: whether the part is empty.
    """

    start: Position
    after: Position
    rows: list[int]
    empty: bool


@dataclass(frozen=True)
class Loaded:
    """A batch, and the position when it has been taken."""

    after: Position
    batch: Any
    where: str


@dataclass(frozen=True)
class Failed:
    """An error in place of a batch."""

    error: BaseException
    cause: BaseException | None


@dataclass(frozen=True)
class Note:
    """Something to warn about."""

    text: str


Item = Loaded | Failed | Note


@dataclass(frozen=True)
class Maker:
    """How this rank makes its part of a batch.

    Whatever the data's own code draws (Python's ``random``, ``numpy.random``, torch) is seeded by the place of the
    batch in the run, so that it is the same in any process and after any number of resumptions.

    Args:
        collate: rows or columns to a tree of tensors. It is given ``position=(epoch, batch)``, with the rank where
            there are several, if it has an argument of this name.
        seed: of the run.
        rank: from 0.
        world: how many ranks there are.
    """

    collate: Collate
    seed: int
    rank: int
    world: int
    with_position: bool = field(init=False)

    def __post_init__(self) -> None:
        # Asked once: looking at a signature costs as much as a small batch.
        object.__setattr__(self, "with_position", wants_position(self.collate))

    def make(
        self, read: Callable[[], Any], rows: Sequence[int], start: Position, after: Position, *, empty: bool
    ) -> Item:
        """A batch from what ``read`` gives, or the error with its place."""
        where = described(start)
        try:
            with seeded(rng.fold_in_host(self.seed, start.epoch, start.batch, self.rank)):
                batch = self._collated(read(), start)
            if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(batch)):
                raise BatchError(
                    f"collate: returned {type(batch).__name__} without tensors, expected a tree of tensors"
                )
            return Loaded(after, pytree.tree_map_only(Tensor, _no_rows, batch) if empty else batch, where)
        except Exception as error:
            return failure(error, where, rows)

    def _collated(self, values: Any, start: Position) -> Any:
        place = (start.epoch, start.batch) if self.world == 1 else (start.epoch, start.batch, self.rank)
        given = {"position": place} if self.with_position else {}
        batch = self.collate(values, **given)
        # What a tokenizer of transformers returns is a mapping that no tree function looks into.
        return dict(batch) if isinstance(batch, UserDict) else batch


def described(start: Position) -> str:
    """A batch for a message: its number in the run and in the epoch, both from 0.

    Example:
        >>> described(Position(epoch=1, batch=2, total=12))
        'batch 12 (epoch 1, batch 2 of it)'
    """
    return f"batch {start.total} (epoch {start.epoch}, batch {start.batch} of it)"


def failure(error: BaseException, where: str, rows: Sequence[int]) -> Failed:
    """An error that says in which batch it happened, at which dataset indices, and at which of them if it is known."""
    cause, at = cause_of(error), ""
    if isinstance(error, RowError):
        at = f", dataset index {error.row}"
    elif isinstance(error, BatchError) and error.position is not None and error.position < len(rows):
        at = f", dataset index {rows[error.position]}"
    return Failed(explained(cause, f"{where}{at}; dataset indices {numbers(rows)}"), cause)


def wants_position(collate: Collate) -> bool:
    """Whether a collator takes the place of the batch, and has not been given one.

    Example:
        >>> wants_position(lambda rows: rows), wants_position(lambda rows, *, position: rows)
        (False, True)
    """
    try:
        parameter = inspect.signature(collate).parameters.get("position")
    except (TypeError, ValueError):
        return False
    return parameter is not None and parameter.default is inspect.Parameter.empty


def tasks(windows: Windows, position: Position, limit: Limit, maker: Maker) -> Iterator[Task]:
    """What is to be loaded after a position, up to a limit."""
    while not limit.before(position):
        while position.window < windows.num_windows:
            window = position.window
            batches = windows.batches(position.epoch, window)
            for rows in batches[position.within :]:
                if limit.before(position):
                    return
                part = rank_part(len(rows), maker.rank, maker.world)
                after = position.taken()
                if after.within == len(batches):
                    after = after.next_window()
                yield Task(position, after, (rows[part.start : part.stop] if part else rows[:1]).tolist(), not part)
                position = after
            if position.window == window:
                position = position.next_window()
        position = position.at_epoch(position.epoch + 1)


def load(source: Source, maker: Maker, task: Task) -> Item:
    """The batch of a task."""
    return maker.make(lambda: source.fetch(task.rows), task.rows, task.start, task.after, empty=task.empty)


def stream_items(
    stream: Stream,
    batching: Batching,
    length_of: Callable[[Any], int] | None,
    position: Position,
    limit: Limit,
    maker: Maker,
) -> Generator[Item, None, None]:
    """Batches of a stream after a position, up to a limit. A rank reads all rows and takes its part of each batch."""
    while not limit.before(position):
        with seeded(rng.fold_in_host(maker.seed, READING, position.epoch)):
            rows = stream.read(position.epoch, position.state, position.num_read)
        ended, last = False, 0
        while not ended:
            window = position.window
            try:
                with seeded(rng.fold_in_host(maker.seed, READING, position.epoch, position.window)):
                    values = _window_of(rows, batching.window, position.num_read)
                batches = _cut(values, batching, length_of, position)
            except Exception as error:
                yield _unread(error, position)
                return
            ended = len(values) < batching.window
            state = None if ended else stream.state()
            for places in batches[position.within :]:
                if limit.before(position):
                    return
                after = position.taken()
                if after.within == len(batches) and not ended:
                    after = after.next_window(len(values), state)
                yield _of_stream(values, places, position, after, maker)
                position, last = after, len(places)
            if position.window == window and not ended:
                position = position.next_window(len(values), state)
        text = _short_epoch(position, last, batching)
        if position.batch == 0 and position.total == 0:
            yield Failed(ValueError(text), None)
            return
        if text:
            yield Note(text)
        if position.batch == 0:
            return
        position = position.at_epoch(position.epoch + 1)


def _window_of(rows: Iterator[Any], size: int, num_read: int) -> list[Any]:
    """The next rows of a stream, at most ``size``; ``num_read`` were read before them."""
    values: list[Any] = []
    try:
        while len(values) < size:
            values.append(next(rows))
    except StopIteration:
        pass
    except Exception as error:
        raise RowError(num_read + len(values)) from error
    return values


def _unread(error: Exception, at: Position) -> Failed:
    """An error while the rows of a window were read or cut: none of its batches can be made."""
    cause = cause_of(error)
    row = f"dataset index {error.row}, " if isinstance(error, RowError) else ""
    where = f"{row}in window {at.window} of epoch {at.epoch}, from row {at.num_read} on; before {described(at)}"
    return Failed(explained(cause, where), cause)


def _cut(values: list[Any], batching: Batching, length_of: Callable[[Any], int] | None, at: Position) -> list[Tensor]:
    """The batches of a window of a stream, in an order of its own where it is shuffled."""
    order = torch.arange(len(values))
    if batching.shuffle:
        generator = torch.Generator().manual_seed(rng.fold_in_host(batching.seed, at.epoch, at.window))
        order = torch.randperm(len(values), generator=generator)
    lengths = None
    if batching.needs_lengths:
        assert length_of is not None
        found = [_length(length_of, values[i], at.num_read + i) for i in order.tolist()]
        lengths = torch.tensor(found, dtype=torch.int64)
        check_budget(lengths, batching.max_tokens, [at.num_read + i for i in order.tolist()])
    return [order[places] for places in batching.cut(len(values), lengths, epoch=at.epoch, window=at.window)]


def _length(length_of: Callable[[Any], int], value: Any, row: int) -> int:
    try:
        return int(length_of(value))
    except Exception as error:
        raise RowError(row) from error


def check_budget(lengths: Tensor, max_tokens: int | None, rows: Sequence[int]) -> None:
    """Refuse a row that no batch has room for.

    Raises: ValueError that names the row.
    """
    if max_tokens is not None and len(lengths) and int(lengths.max()) > max_tokens:
        i = int(lengths.argmax())
        raise ValueError(
            f"max_tokens: got {max_tokens}, but the row with dataset index {rows[i]} has {int(lengths[i])}; cut or "
            "leave out such rows, or give a larger one"
        )


def _of_stream(values: list[Any], places: Tensor, start: Position, after: Position, maker: Maker) -> Item:
    part = rank_part(len(places), maker.rank, maker.world)
    mine = (places[part.start : part.stop] if part else places[:1]).tolist()
    rows = [start.num_read + i for i in mine]
    return maker.make(lambda: [values[i] for i in mine], rows, start, after, empty=not part)


def _short_epoch(position: Position, last: int, batching: Batching) -> str:
    size = batching.batch_size
    if position.batch == 0:
        missed = f"no batch of {size} rows" if batching.drop_last else "no row"
        text = f"data: the stream gave {missed} in epoch {position.epoch}"
        if not position.total:
            return text
        return f"{text}, and the run ends after {position.total} batches; can it be read more than once?"
    if position.total == position.batch == 1 and size is not None and 0 < last < size:
        return f"data: the stream has only {last} rows; every batch has {last} rows and not batch_size={size}"
    return ""


def _no_rows(tensor: Tensor) -> Tensor:
    return tensor[:0] if tensor.dim() else tensor
