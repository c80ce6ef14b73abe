"""Ending a run when the machine is taken away: SIGTERM is noted, and after an update the run saves and ends.

Only while updates are made. Before the first one there is nothing to save; after the last one the run has saved what
its arguments ask for.
"""

from __future__ import annotations

import itertools
import logging
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trainkit.io.signals import EXIT_PREEMPTED, StopRequest, stop_on

_log = logging.getLogger(__name__)
_runs = itertools.count()
"""Runs of several processes that this one took part in; they are counted alike in all of them."""


def until_asked(
    train: Callable[[Callable[[], None]], None],
    *,
    step: Callable[[], int],
    end: Callable[[], None],
    world: int,
    wait: Callable[[], None],
    device: torch.device,
) -> None:
    """Train; once SIGTERM came, end after the same update in every process.

    Args:
        train: ``(look) -> None`` calls ``look`` after each update, where the run may end.
        step: completed updates.
        end: saves and raises. A signal that comes meanwhile changes nothing.
        world: number of processes.
        wait: returns once every process has called it.
        device: where updates are computed.

    Example:
        >>> import os
        >>> def train(look):
        ...     for step in range(9):
        ...         if step == 2:
        ...             os.kill(os.getpid(), signal.SIGTERM)
        ...         look()
        >>> def end():
        ...     raise SystemExit("ended")
        >>> until_asked(train, step=lambda: 2, end=end, world=1, wait=lambda: None, device=torch.device("cpu"))
        Traceback (most recent call last):
        SystemExit: ended
    """
    with noticed() as request:
        if world == 1:

            def look() -> None:
                if request.signal is not None:
                    end()

            train(look)
            return
        together = Together(request, _store(), f"trainkit/stop/{next(_runs)}", device)

        def look_together() -> None:
            if together.stops_after(step()):
                end()

        train(look_together)
        if together.is_asked_at_the_end(step(), wait):
            end()


@contextmanager
def noticed() -> Iterator[StopRequest]:
    """A scope in which SIGTERM is noted, where nobody else handles it: a handler of the user or a launcher stays.

    If it came and the scope does not end in SystemExit, it ends the process afterwards as it would have without.

    Example:
        >>> with noticed() as request:
        ...     print(bool(request))
        False
    """
    if not _is_unhandled():
        yield StopRequest()
        return
    request = StopRequest()
    try:
        with stop_on(signal.SIGTERM) as request:
            yield request
    except SystemExit:
        raise
    except BaseException as error:
        if request:
            traceback.print_exception(error)
            signal.raise_signal(signal.SIGTERM)
        raise
    if request:
        signal.raise_signal(signal.SIGTERM)


def _is_unhandled() -> bool:
    in_main = threading.current_thread() is threading.main_thread()
    return in_main and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def _store() -> Any:
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


def tell(step: int, folder: str) -> None:
    """One line of the log: what happened, and how to go on."""
    _log.warning(
        "SIGTERM: stopped after update %d and saved it in %s; train(resume_from_checkpoint=True) goes on there, and "
        "ends as if there had been no break. Exit code %d",
        step,
        folder,
        EXIT_PREEMPTED,
    )


class Together:
    """Several processes that stop after the same update, without a collective for it.

    A process that was asked writes into the store of the process group, after its update k, that all stop after update
    k + 1. Everyone looks there after each update. To complete update k + 1 the gradients of all are needed, those of
    the writer too, which come after its writing; so whoever has completed it finds what was written, and nobody is
    further. Of several writers the first counts: the others are at the same update.

    An accelerator completes updates later than they are asked of it. There everyone waits for its update before the
    last, which keeps it busy, and all stop after update k + 2.

    Args:
        request: to this process.
        store: of the process group.
        key: of this run in it.
        device: where updates are computed.
    """

    def __init__(self, request: StopRequest, store: Any, key: str, device: torch.device) -> None:
        self._request, self._store, self._key = request, store, key
        self._is_late = device.type != "cpu"
        self._device = device
        self._completed: torch.Event | None = None
        self._last: int | None = None

    def stops_after(self, step: int) -> bool:
        """Whether all processes stop after this update, which was made just now."""
        if self._is_late:
            self._wait_for_the_one_before()
        self._write(step)
        if self._last is None and self._store.check([self._key]):
            self._last = int(self._store.get(self._key))
        return self._last is not None and step >= self._last

    def is_asked_at_the_end(self, step: int, wait: Callable[[], None]) -> bool:
        """Whether any process was asked, after the last update, when no update is left that would tell.

        Args:
            step: completed updates.
            wait: returns once every process has called it.
        """
        self._write(step)
        wait()
        return bool(self._store.check([self._key]))

    def _write(self, step: int) -> None:
        if self._request.signal is not None and self._last is None:
            self._store.compare_set(self._key, "", str(step + 1 + self._is_late))

    def _wait_for_the_one_before(self) -> None:
        if self._completed is not None:
            self._completed.synchronize()
        now = torch.Event(self._device)
        now.record()
        self._completed = now
