"""Processes that agree where to stop, as threads that meet in each update at random times."""

from __future__ import annotations

import random
import signal
import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from trainkit.io.signals import StopRequest
from trainkit.trainer.preemption import Together

UPDATES = 6
WORLD = 3


class Late(Together):
    """On an accelerator; its completed updates are those of the test."""

    def _wait_for_the_one_before(self) -> None:
        pass


class Meeting:
    """Updates that need everybody's part; the host may be ahead of them by ``lag``."""

    def __init__(self, lag: int) -> None:
        self._lag, self._begun, self._changed = lag, [0] * WORLD, threading.Condition()

    def update(self, rank: int, number: int) -> None:
        with self._changed:
            self._begun[rank] = number
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: min(self._begun) >= number - self._lag, timeout=30), "it hangs"


def stops(kind: Any, device: str, lag: int, asked: set[tuple[int, int]], draw: random.Random) -> list[tuple[int, bool]]:
    """After which update each process stopped, and whether because of what was ``asked``: (process, update) pairs."""
    meeting, store, at_end = Meeting(lag), dist.HashStore(), threading.Barrier(WORLD, timeout=30)
    store.set_timeout(timedelta(seconds=30))
    found: list[Any] = [None] * WORLD
    pauses = [[draw.choice((0.0, 0.0, 0.0003)) for _ in range(UPDATES + 1)] for _ in range(WORLD)]

    def run(rank: int) -> None:
        request = StopRequest()
        together = kind(request, store, "stop", torch.device(device))
        for number in range(1, UPDATES + 1):
            meeting.update(rank, number)
            if (rank, number) in asked:
                request.signal = signal.SIGTERM
            time.sleep(pauses[rank][number])
            if together.stops_after(number):
                found[rank] = (number, True)
                return
        found[rank] = (UPDATES, together.is_asked_at_the_end(UPDATES, at_end.wait))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(WORLD)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize(("kind", "device", "lag"), [(Together, "cpu", 0), (Late, "cuda", 1)])
def test_all_stop_after_the_same_update(kind: Any, device: str, lag: int) -> None:
    for seed in range(150):
        draw = random.Random(seed)
        asked = {(draw.randrange(WORLD), draw.randint(1, UPDATES)) for _ in range(draw.randint(0, 3))}
        found = stops(kind, device, lag, asked, draw)
        assert len(set(found)) == 1, (seed, found)
        last, was_asked = found[0]
        first = min((number for _, number in asked), default=UPDATES)
        # A process that is ahead may write before the one that was asked first.
        assert min(first + 1 + lag, UPDATES) <= last <= min(first + 1 + 2 * lag, UPDATES)
        assert was_asked == bool(asked)
