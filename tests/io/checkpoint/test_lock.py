"""One writer per folder, with real processes."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import pytest

from trainkit import TrainState
from trainkit.io.checkpoint import CheckpointError, CheckpointWarning, Lock, Saver, checkpoints, files, save, verify
from trainkit.io.checkpoint.lock import alone

# Python 3.12 warns of every fork in a process that has threads, and torch has some.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
Make = Callable[..., TrainState]


@contextmanager
def forked(work: Callable[[], None]) -> Iterator[int]:
    """A child that does this and ends with 0, or 1 after an exception. It is killed and reaped at the end."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    try:
        yield pid
    finally:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def hold(folder: Path) -> None:
    lock = Lock(folder)
    (folder / "ready").touch()
    time.sleep(60)
    lock.release()


def test_a_second_writer_is_refused_at_once_with_the_name_of_the_first(tmp_path: Path, make_state: Make) -> None:
    with forked(lambda: hold(tmp_path)) as owner:
        wait_for((tmp_path / "ready").exists)
        state = make_state()
        start = time.monotonic()
        for attempt in (Lock, Saver, lambda folder: save(folder, state)):
            with pytest.raises(CheckpointError, match=rf"is written to by process {owner} on '.*' since '20\d\d-"):
                attempt(tmp_path)
        assert time.monotonic() - start < 1
        assert checkpoints(tmp_path) == []


def test_the_lock_of_a_dead_owner_is_taken_over(tmp_path: Path) -> None:
    with forked(lambda: hold(tmp_path)) as owner:
        wait_for((tmp_path / "ready").exists)
        os.kill(owner, signal.SIGKILL)
        os.waitpid(owner, 0)
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == owner
    with Lock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert (tmp_path / ".lock").read_bytes() == b""


def test_children_of_a_dead_owner_do_not_hold_it(tmp_path: Path) -> None:
    def parent() -> None:
        with Lock(tmp_path):
            child = os.fork()
            if child == 0:
                (tmp_path / "child").write_text(str(os.getpid()))
                time.sleep(60)
                os._exit(0)
            time.sleep(60)

    with forked(parent) as owner:
        wait_for(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text() != "")
        with pytest.raises(CheckpointError, match=f"process {owner} "):
            Lock(tmp_path)
        os.kill(owner, signal.SIGKILL)
        os.waitpid(owner, 0)
        try:
            Lock(tmp_path).release()
        finally:
            os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)


def test_a_program_that_is_started_does_not_inherit_it(tmp_path: Path) -> None:
    lock = Lock(tmp_path)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False) as child:
        lock.release()
        Lock(tmp_path).release()
        child.communicate(b"\n")


def test_the_same_process_is_a_second_writer_too(tmp_path: Path, make_state: Make) -> None:
    with Lock(tmp_path) as lock:
        with pytest.raises(CheckpointError, match=f"process {os.getpid()} "):
            Lock(tmp_path)
        # What this process saves uses the lock that it has.
        save(tmp_path, make_state(1), run_id="run")
        with Saver(tmp_path, run_id="run") as saver:
            with pytest.raises(CheckpointError, match="this process has a Saver for it already"):
                Saver(tmp_path, run_id="run")
            saver.save(make_state(2))
            save(tmp_path, make_state(3))
        with pytest.raises(CheckpointError, match=f"process {os.getpid()} "):
            Lock(tmp_path)
        lock.release()
        lock.release()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff" * 5000, b'{"pid":"x","host":1,"since":2}', b"[" * 4000])
def test_an_owner_that_has_not_said_its_name(content: bytes, tmp_path: Path) -> None:
    with Lock(tmp_path):
        (tmp_path / ".lock").write_bytes(content)
        with pytest.raises(CheckpointError, match="another process that has not said its name yet"):
            Lock(tmp_path)


def test_the_lock_goes_with_its_object(tmp_path: Path) -> None:
    lock = Lock(tmp_path)
    del lock
    Lock(tmp_path).release()


def test_threads_that_save_into_one_folder_take_turns(tmp_path: Path, make_state: Make) -> None:
    states = [make_state(step) for step in range(8)]
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda state: save(tmp_path, state, run_id="run"), states))
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in range(8)]
    assert [verify(path).step for path in paths] == list(range(8))
    Lock(tmp_path).release()


def test_a_file_system_without_locks_is_said_and_does(
    tmp_path: Path, make_state: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(fd: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    for step in (1, 2):
        with pytest.warns(CheckpointWarning, match="has no locks"):
            verify(save(tmp_path, make_state(step)))


def test_the_lock_is_given_back_when_no_thread_is_changing_the_folder(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    with ThreadPoolExecutor(1) as other, files.opened(tmp_path) as fd:
        with alone(fd, tmp_path) as lock:
            closing = other.submit(saver.close)
            assert not wait([closing], timeout=0.2).done and lock.is_open
        closing.result(timeout=20)
    assert not lock.is_open
    Lock(tmp_path).release()


def test_a_child_may_leave_the_scope_of_a_lock_that_a_thread_of_its_parent_uses(tmp_path: Path) -> None:
    with Lock(tmp_path) as lock, ThreadPoolExecutor(1) as other:
        other.submit(lock.mutex.acquire).result()
        with forked(lock.release) as child:
            done = 0
            until = time.monotonic() + 20
            while not done and time.monotonic() < until:
                done, status = os.waitpid(child, os.WNOHANG)
                time.sleep(0.005)
            assert (done, status) == (child, 0)
        other.submit(lock.mutex.release).result()


def test_of_savers_that_are_opened_at_once_there_is_one_and_it_has_the_lock(tmp_path: Path) -> None:
    def opened(folder: Path) -> Saver | None:
        barrier.wait()
        try:
            return Saver(folder)
        except CheckpointError as error:
            refused.append(str(error))
            return None

    refused: list[str] = []
    barrier, before = threading.Barrier(8), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            for i in range(100):
                (saver,) = filter(None, pool.map(opened, [tmp_path / str(i)] * 8))
                with pytest.raises(CheckpointError, match=f"process {os.getpid()} "):
                    Lock(tmp_path / str(i))
                saver.close()
    finally:
        sys.setswitchinterval(before)
    assert len(refused) == 700
    assert all("this process has a Saver for it already" in text for text in refused)
