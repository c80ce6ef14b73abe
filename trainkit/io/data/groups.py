"""Batches of data that only lie there: the rows of many batches are read at once and handed out one by one.

What a batch costs in Python is then paid once for many. Batches of a group share memory, no element of which is in two.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils import _pytree as pytree

from trainkit.io.data.assemble import Item, Loaded, Maker, Task, described, load
from trainkit.io.data.ragged import Ragged
from trainkit.io.data.sources import Source, files_of
from trainkit.io.data.stacking import stack

GROUP_BATCHES = 32
GROUP_BYTES = 1 << 22
"""Read at once, at most; a single batch may be larger. A batch that is kept keeps the memory of its group."""
AHEAD = 2
"""Groups that are read ahead: with one, Python's lock would keep the thread from reading while the loop works."""


def in_groups(source: Source, maker: Maker, tasks: Iterator[Task]) -> Generator[Item, None, None]:
    """The batches of tasks, in order.

    A source that is not pure (see :class:`~trainkit.io.data.sources.Source`) is read batch by batch. The first group
    is one batch, so that the first comes soon; each further one is at most twice the one before. Groups of a source
    in files are read ahead of the loop.

    Args:
        source: of the rows.
        maker: of the batches.
        tasks: what is to be loaded.
    """
    groups = _Groups(tasks)
    with closing((_ahead if files_of(source) else _in_turn)(source, groups)) as found:
        for group, values in found:
            if values is None:
                yield from (load(source, maker, task) for task in group)
                continue
            whole = _stacked(values) if maker.collate is stack else None
            yield from _batches(values, whole, maker, group)
            groups.fit(len(group), _nbytes(values if whole is None else whole))


class _Groups:
    """Tasks by the group."""

    def __init__(self, tasks: Iterator[Task]) -> None:
        self._tasks, self._number = tasks, 1

    def next(self) -> list[Task]:
        return list(islice(self._tasks, self._number))

    def fit(self, number: int, nbytes: int) -> None:
        """Make the next ones as large as they may be, by the size of one of ``number`` tasks."""
        self._number = max(1, min(2 * self._number, GROUP_BATCHES, GROUP_BYTES * number // max(nbytes, 1)))


def _in_turn(source: Source, groups: _Groups) -> Generator[tuple[list[Task], Any], None, None]:
    while group := groups.next():
        yield group, _read(source, group)


def _ahead(source: Source, groups: _Groups) -> Generator[tuple[list[Task], Any], None, None]:
    """Read in a thread while the loop works: waiting for a disk and copying need nothing of Python."""
    process = os.getpid()
    with ThreadPoolExecutor(1, "data") as thread:
        under_way: deque[tuple[list[Task], Future[Any]]] = deque()
        while True:
            while len(under_way) < AHEAD and (group := groups.next()):
                under_way.append((group, thread.submit(_read, source, group)))
            if not under_way:
                return
            group, reading = under_way.popleft()
            # The thread is not in a process that was forked off.
            yield group, reading.result() if os.getpid() == process else _read(source, group)


def _read(source: Source, group: list[Task]) -> Any:
    """The rows of all tasks; None if they are to be read batch by batch, also to tell which one is at fault."""
    if not getattr(source, "is_pure", False):
        return None
    try:
        return source.fetch([row for task in group for row in task.rows])
    except Exception:
        return None


def _batches(values: Any, whole: Any, maker: Maker, group: list[Task]) -> Iterator[Item]:
    """The batches of a group: parts of all its rows as one batch, or collated one by one where they are none."""
    start = 0
    for task in group:
        stop = start + len(task.rows)
        if whole is None:
            read = partial(part_of, values, start, stop)
            yield maker.make(read, task.rows, task.start, task.after, empty=task.empty)
        else:
            batch = part_of(whole, start, start if task.empty else stop)
            yield Loaded(task.after, batch, described(task.start))
        start = stop


def _stacked(values: Any) -> Any:
    """All rows of a group as one batch; None if they are none, though those of one batch may be."""
    try:
        whole = stack(values)
    except Exception:
        # Those of the batches are told with their places.
        return None
    return whole if pytree.tree_leaves(whole) else None


def part_of(values: Any, start: int, stop: int) -> Any:
    """Rows ``start`` to ``stop`` - 1 of rows or columns, in the same memory.

    Example:
        >>> import torch
        >>> part_of({"x": torch.arange(5), "name": list("abcde")}, 1, 3)
        {'x': tensor([1, 2]), 'name': ['b', 'c']}
    """
    if isinstance(values, Mapping):
        return {name: part_of(column, start, stop) for name, column in values.items()}
    if isinstance(values, tuple):
        return tuple(part_of(column, start, stop) for column in values)
    return values.part(start, stop) if isinstance(values, Ragged) else values[start:stop]


def _nbytes(values: Any) -> int:
    """Of columns of numbers and text; other values are somewhere anyway."""
    if isinstance(values, (Mapping, tuple)):
        return sum(map(_nbytes, values.values() if isinstance(values, Mapping) else values))
    if isinstance(values, Ragged):
        return values.values.nbytes
    if isinstance(values, list):
        return sum(len(value) for value in values if isinstance(value, (str, bytes)))
    return values.nbytes if isinstance(values, (Tensor, np.ndarray)) else 0
