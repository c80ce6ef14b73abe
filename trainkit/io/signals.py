"""Ending a run when the machine is taken away: the step is finished, the state saved, and the process says so."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

EXIT_PREEMPTED = 75
"""The exit code of a program that saved and stopped because it was asked to: EX_TEMPFAIL of ``sysexits.h``, "try again
later". Run it again with the same command to go on."""


class StopRequest:
    """Whether a run was asked to end. Read it between steps; nothing is interrupted.

    Args:
        signal: the first that came, None so far.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._process = os.getpid()

    def __bool__(self) -> bool:
        return self.signal is not None

    def _record(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A fork, of a pool say, which nobody else would end.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        # Later ones change nothing: schedulers repeat them, and the save that the first one led to must go on.
        if self.signal is None:
            self.signal = signal.Signals(number)


@contextmanager
def stop_on(*signals: signal.Signals) -> Iterator[StopRequest]:
    """A scope in which these signals ask the run to end in place of ending it.

    The loop looks at the request after every step, saves, and leaves. While a step computes or compiles, an evaluation
    runs, or a checkpoint is written, the request waits for that to end. The handlers that were there
    before come back at the end of the scope. Processes that are forked meanwhile end by them, as they do by default.

    Args:
        signals: which; SIGTERM for none.

    Raises: RuntimeError outside of the main thread, where Python delivers no signals.

    Example:
        >>> import os
        >>> with stop_on() as stop:
        ...     for step in range(10):
        ...         if step == 2:
        ...             os.kill(os.getpid(), signal.SIGTERM)
        ...         if stop:
        ...             break
        >>> step, stop.signal.name
        (2, 'SIGTERM')

    Source: SLURM ``--signal`` and Kubernetes pod termination send SIGTERM, and SIGKILL after a time of grace.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("stop_on: called outside of the main thread, where Python handles no signals")
    request = StopRequest()
    before: dict[signal.Signals, Any] = {}
    try:
        for each in dict.fromkeys(signals or (signal.SIGTERM,)):
            before[each] = signal.signal(each, request._record)
        yield request
    finally:
        for each, handler in before.items():
            # None stands for a handler that was not installed from Python and cannot be put back.
            signal.signal(each, signal.SIG_DFL if handler is None else handler)
