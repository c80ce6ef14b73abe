"""Worker processes that load ahead, on the machinery of ``torch.utils.data.DataLoader``; their errors and their end."""

from __future__ import annotations

import atexit
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.data._utils import worker as torch_worker

from trainkit.io.data.assemble import Failed, Item, Loaded, Maker, Task, load
from trainkit.io.data.errors import LoadError
from trainkit.io.data.sources import Source

INLINE_BYTES = 1 << 20
"""Tensors up to this size come through a pipe, larger ones through shared memory."""
GRACE_SECONDS = 1.0
"""How long a worker may take to end by itself before it is killed."""
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Held strongly: the collector forgets weak references before it closes an iterator that lies in a cycle.
_running: set[Any] = set()


class RemoteTrace(Exception):
    """The traceback of a worker process, as the cause of the error that is raised here."""

    def __init__(self, text: str) -> None:
        super().__init__(f"in a worker process:\n{text}")


class MapItems(Dataset[Item]):
    """Batches by task: the dataset that worker processes see for map-style data."""

    def __init__(self, source: Source, maker: Maker) -> None:
        self._source, self._maker = source, maker

    def __getitem__(self, task: Task) -> Item:
        return _portable(load(self._source, self._maker, task))


class StreamItems(IterableDataset[Item]):
    """Batches in turn: the dataset that the one worker process of a stream sees.

    To the stream it is no worker but the process that reads everything, as the loop would be: a stream that is told of
    a worker may take a part of the rows, and one of ``datasets`` that is shuffled draws another order.

    Args:
        read: starts the reading.
    """

    def __init__(self, read: Callable[[], Iterator[Item]]) -> None:
        self._read = read

    def __iter__(self) -> Iterator[Item]:
        torch_worker._worker_info = None
        return map(_portable, self._read())


def in_processes(
    items: MapItems | StreamItems, tasks: Iterable[Task] | None, *, workers: int, prefetch: int
) -> Generator[Item, None, None]:
    """What the worker processes load, in order. Closing the iterator ends them.

    The processes ignore SIGINT and SIGTERM, which are meant for the run: a run that is told to stop still gets its
    batches until it has stopped. They end with the iterator, with the process that started them, or by SIGKILL.

    Args:
        items: what to load; copied to the processes.
        tasks: for map-style data, what is to be loaded, in order.
        workers: how many processes.
        prefetch: batches that each loads ahead.

    Raises: :class:`~trainkit.io.data.errors.LoadError` if a process ends unasked.
    """
    # A generator of its own: seeds for the workers are drawn from it, and nobody draws from torch's global one.
    loader: DataLoader[Item] = DataLoader(
        items,
        sampler=tasks,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch,
        collate_fn=_same,
        worker_init_fn=_begin,
        generator=torch.Generator().manual_seed(0),
    )
    # Blocked while the processes start, which inherit it; the run itself gets afterwards what came meanwhile.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        running: Any = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    _running.add(running)
    try:
        yield from map(_arrived, _until_a_worker_dies(running))
    finally:
        _end(running)


def _until_a_worker_dies(running: Any) -> Iterator[Item]:
    while True:
        try:
            item = next(running)
        except StopIteration:
            return
        except (RuntimeError, EOFError, OSError) as error:
            # Reading from a process that has just ended fails in several ways.
            if not _has_died(running._workers):
                raise
            raise LoadError(
                f"a worker process of the loader ended while batches were expected from it ({error}). It may have been "
                "killed for want of memory. No batch is lost: the run can go on from its last position"
            ) from error
        yield item


def _has_died(workers: list[Any]) -> bool:
    for worker in workers:
        worker.join(timeout=GRACE_SECONDS / len(workers))
    return any(worker.exitcode for worker in workers)


def _begin(_: int) -> None:
    # Handlers that do nothing: ignoring would be inherited by programs that the data's code may start.
    for number in _STOP_SIGNALS:
        signal.signal(number, _pass)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)


def _pass(number: int, frame: Any) -> None:
    pass


def _end(running: Any) -> None:
    """Let the processes finish what they are at, for a moment, and kill those that do not."""
    if running not in _running:
        # Ended already, when Python began to; a thread that is started later never runs.
        return
    _running.discard(running)
    if running._worker_pids_set:
        # torch raises an error when a process that it knows is killed.
        torch._C._remove_worker_pids(id(running))
        running._worker_pids_set = False
    killer = threading.Timer(GRACE_SECONDS, lambda: [worker.kill() for worker in running._workers])
    killer.start()
    try:
        running._shutdown_workers()
    finally:
        killer.cancel()


@atexit.register
def _end_all() -> None:
    # Before Python waits for its child processes, which ignore its SIGTERM.
    for running in list(_running):
        _end(running)


@dataclass(frozen=True)
class _Inline:
    """A small tensor on its way through the pipe."""

    array: Any


def _inline(tensor: Tensor) -> Any:
    # A view that is conjugated or negated only when it is read has no form in NumPy, and loses that in shared memory.
    tensor = tensor.resolve_conj().resolve_neg()
    # Shared memory costs a connection to the worker for each tensor, and a file descriptor while it lives.
    if tensor.nbytes > INLINE_BYTES or tensor.requires_grad or tensor.layout != torch.strided:
        return tensor
    try:
        return _Inline(tensor.numpy())
    except TypeError:
        return tensor  # bfloat16 and others that NumPy lacks


def _arrived(item: Item) -> Item:
    if not isinstance(item, Loaded):
        return item
    batch = pytree.tree_map_only(_Inline, lambda inline: torch.from_numpy(inline.array), item.batch)
    return Loaded(item.after, batch, item.where)


def _portable(item: Item) -> Item:
    """An item that survives the way to another process; an error there carries its traceback as text."""
    if isinstance(item, Loaded):
        return Loaded(item.after, pytree.tree_map_only(Tensor, _inline, item.batch), item.where)
    if not isinstance(item, Failed):
        return item
    cause = item.cause or item.error
    trace = RemoteTrace("".join(traceback.format_exception(type(cause), cause, cause.__traceback__)))
    error = item.error if _travels(item.error) else LoadError(f"{type(item.error).__name__}: {item.error}")
    return Failed(error, trace)


def _travels(error: BaseException) -> bool:
    try:
        again = ForkingPickler.loads(ForkingPickler.dumps(error))
    except Exception:
        # Whatever a foreign class raises here would be raised again by the queue, which then gives nothing for ever.
        return False
    return type(again) is type(error) and str(again) == str(error)


def _same(item: Any) -> Any:
    return item
