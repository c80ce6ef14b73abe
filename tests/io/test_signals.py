"""Signals that ask a run to end, sent to real processes."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from trainkit.io.signals import EXIT_PREEMPTED, stop_on

PROGRAM = """
import sys
from trainkit.io.signals import EXIT_PREEMPTED, stop_on

with stop_on() as stop:
    print("ready", flush=True)
    step = 0
    while not stop:
        step += 1
        sum(range(100_000))
    for _ in range(20):
        sum(range(100_000))
    print("saved", stop.signal.name, flush=True)
sys.exit(EXIT_PREEMPTED)
"""


@pytest.mark.parametrize("times", [1, 3])
def test_a_process_finishes_its_step_saves_and_says_so(times: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for _ in range(times):
        process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert out == "saved SIGTERM\n"
    assert process.returncode == EXIT_PREEMPTED == 75


def test_the_signals_of_choice_and_only_the_first_is_kept() -> None:
    with stop_on(signal.SIGUSR1, signal.SIGUSR2) as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop
        assert stop.signal is signal.SIGUSR2


def test_the_handlers_come_back_also_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    inside = []

    def fails() -> None:
        with stop_on():
            inside.append(signal.getsignal(signal.SIGTERM))
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert inside != [before]
    assert signal.getsignal(signal.SIGTERM) == before


def test_only_the_main_thread_may_ask() -> None:
    errors: list[BaseException] = []

    def elsewhere() -> None:
        try:
            with stop_on():
                pass
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "outside of the main thread" in str(errors[0])


def test_a_signal_that_is_named_twice_is_handled_once() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_on(signal.SIGTERM, signal.SIGTERM):
        pass
    assert signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(OSError, match="Invalid argument"), stop_on(signal.SIGTERM, signal.SIGKILL):
        pass
    assert signal.getsignal(signal.SIGTERM) == before


FORK = """
import multiprocessing, signal, time
from trainkit.io.signals import stop_on

def work(started):
    started.set()
    while True:
        time.sleep(1)

fork = multiprocessing.get_context("fork")
with stop_on() as stop:
    started = fork.Event()
    process = fork.Process(target=work, args=(started,), daemon=True)
    process.start()
    started.wait()
    process.terminate()
    process.join(20)
    code = process.exitcode
    process.kill()
    assert (code, bool(stop)) == (-signal.SIGTERM, False), code
"""


def test_a_forked_process_still_ends_by_it() -> None:
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=60)
