"""Real faults: killed in a save, a full disk, a folder that may not be written. What was announced is there."""

import errno
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainkit import TrainState, init_state, tree
from trainkit.io.checkpoint import (
    CheckpointError,
    Retention,
    Saver,
    checkpoints,
    files,
    latest,
    load,
    load_latest,
    save,
    verify,
)
from trainkit.optim import sgd

# Python 3.12 warns of every fork in a process that has threads, and torch has some.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
Bits = Callable[[TrainState], Any]


def state_at(step: int, size: int = 200_000) -> TrainState:
    generator = torch.Generator().manual_seed(step)
    state = init_state(nn.Linear(1, 1), sgd(0.1))
    weights = tree.frozen({"w": torch.randn(size, generator=generator), "b": torch.full((3,), float(step))})
    return state.replace(step=torch.tensor(step), params=weights)


def train(folder: Path, announce: int, background: bool) -> None:
    """A run that saves after every step and says which checkpoints it may rely on."""
    start = latest(folder)
    step = 0 if start is None else int(start.name.removeprefix("checkpoint-"))
    with Saver(folder, keep=Retention(last=1), run_id="run") as saver:
        while True:
            step += 1
            if background:
                saver.save(state_at(step), cursor={"step": step})
                saver.wait()
            else:
                save(folder, state_at(step), cursor={"step": step})
            os.write(announce, b"%d\n" % step)


def in_a_child(work: Callable[[int], None]) -> tuple[int, int]:
    """A process that does this, and the pipe on which it says what it may rely on."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            work(writer)
        finally:
            os._exit(1)
    os.close(writer)
    return pid, reader


def killed(folder: Path, chance: random.Random, in_a_save: bool) -> int:
    """The last step that a run announced before it was killed, in a save or anywhere; 0 for none."""
    before = set(folder.glob(".staging-*"))
    background = chance.random() < 0.5
    pid, reader = in_a_child(lambda announce: train(folder, announce, background))
    while True:
        time.sleep(chance.uniform(0, 0.06))
        os.kill(pid, signal.SIGSTOP)
        assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
        # It stands still: what is seen now is so when it dies.
        if not in_a_save or set(folder.glob(".staging-*")) - before:
            break
        os.kill(pid, signal.SIGCONT)
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    with os.fdopen(reader) as announced:
        return max((int(line) for line in announced), default=0)


def campaign(folder: Path, kills: int, seed: int, bits: Bits) -> None:
    """Kill a run again and again, each second time in the middle of a save."""
    chance = random.Random(seed)
    relied_on = 0
    for i in range(kills):
        relied_on = max(relied_on, killed(folder, chance, in_a_save=i % 2 == 0))
        newest = latest(folder)
        assert newest is not None or relied_on == 0
        if newest is not None:
            restored = load(newest, state_at(0))
            assert restored.step >= relied_on
            assert bits(restored.state) == bits(state_at(restored.step)) and restored.cursor == {"step": restored.step}
    with Saver(folder, run_id="run"):
        assert not [path.name for path in folder.iterdir() if path.name.startswith((".staging-", ".trash-"))]


def test_a_run_that_is_killed_in_its_saves_loses_nothing(tmp_path: Path, bits: Bits) -> None:
    campaign(tmp_path, kills=20, seed=0, bits=bits)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_many_kills(seed: int, tmp_path: Path, bits: Bits) -> None:
    campaign(tmp_path, kills=200, seed=seed, bits=bits)


@contextmanager
def at_work(work: Callable[[int], None]) -> Iterator[None]:
    """A scope in which a process does this beside."""
    pid, reader = in_a_child(work)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reader)


def test_who_reads_while_another_writes_finds_a_whole_one(tmp_path: Path, bits: Bits) -> None:
    save(tmp_path, state_at(1), run_id="run")
    steps = []
    with at_work(lambda announce: train(tmp_path, announce, background=True)):
        # Each is removed as soon as the next is durable.
        while len(steps) < 50 or steps[-1] < 5:
            restored = load_latest(tmp_path, state_at(0))
            assert restored is not None and bits(restored.state) == bits(state_at(restored.step))
            steps.append(restored.step)
    assert steps == sorted(steps)


def test_who_reads_what_is_written_again_and_again_finds_it_whole(tmp_path: Path, bits: Bits) -> None:
    save(tmp_path, state_at(1), run_id="run")
    save(tmp_path, state_at(2), cursor=0)

    def write(announce: int) -> None:
        for i in itertools.count(1):
            save(tmp_path, state_at(2), cursor=i)

    cursors = []
    with at_work(write):
        while len(cursors) < 50 or cursors[-1] < 50:
            # A warning that something is damaged would be an error here.
            restored = load_latest(tmp_path, state_at(0))
            assert restored is not None and bits(restored.state) == bits(state_at(2))
            cursors.append(restored.cursor)
    assert cursors == sorted(cursors)


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    """A file system of its own in memory."""
    path.mkdir()
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("needs the right to mount")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(path)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount: {mounted.stderr.decode()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def _save(folder: Path, state: TrainState, background: bool) -> None:
    if background:
        with Saver(folder, run_id="run") as saver:
            saver.save(state)
    else:
        save(folder, state)


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_ends_a_save_and_nothing_else(background: bool, tmp_path: Path, bits: Bits) -> None:
    with small_disk(tmp_path / "disk", "2m") as folder:
        save(folder, state_at(1), run_id="run")
        (folder / "ballast").write_bytes(bytes(600_000))
        for _ in range(3):
            with pytest.raises(
                CheckpointError, match=rf"cannot save: No space left on device \(errno {errno.ENOSPC}\)"
            ):
                _save(folder, state_at(2), background)
            assert sorted(path.name for path in folder.iterdir()) == [".lock", "ballast", "checkpoint-1"]
            assert bits(load(folder / "checkpoint-1", state_at(0)).state) == bits(state_at(1))
        (folder / "ballast").unlink()
        verify(save(folder, state_at(2)))
        assert latest(folder) == folder / "checkpoint-2"


def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "4m") as folder:
        save(folder, state_at(1))
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        with pytest.raises(CheckpointError, match=r"\.lock: cannot be opened: Read-only file system"):
            save(folder, state_at(2))
        # Reading needs no lock.
        assert latest(folder) == folder / "checkpoint-1"


def test_what_dead_writers_have_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    save(tmp_path, state_at(1), run_id="run")
    left = [tmp_path / ".staging-0123456789abcdef", tmp_path / ".trash-0123456789abcdef"]
    for path in left:
        path.mkdir(0o700)
        (path / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".staging-not-ours").mkdir()
    with Saver(tmp_path, run_id="run"):
        assert not any(path.exists() for path in left)
    assert (tmp_path / ".staging-not-ours").exists()
    left[0].mkdir()
    save(tmp_path, state_at(2))
    assert not left[0].exists()


def test_a_file_system_without_exchange_keeps_the_old_one_until_the_new_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: Bits
) -> None:
    save(tmp_path, state_at(1), metadata="first")
    # The kernel refuses this kind of rename, as it does for file systems that cannot exchange.
    monkeypatch.setattr(files, "_RENAME_EXCHANGE", 1 << 20)
    path = save(tmp_path, state_at(1), metadata="second")
    assert load(path, state_at(0)).metadata == "second"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".lock", "checkpoint-1"]
    # Killed between the two renames, the old one counts under its new name.
    path.rename(tmp_path / "checkpoint-1.replaced-0123456789abcdef")
    newest = latest(tmp_path)
    assert newest is not None and newest.name == "checkpoint-1.replaced-0123456789abcdef"
    assert bits(load(newest, state_at(0)).state) == bits(state_at(1))
    with Saver(tmp_path, resumed_from=newest, keep=Retention(last=1)) as saver:
        saver.save(state_at(1))
    assert [each.name for each in checkpoints(tmp_path)] == ["checkpoint-1"]


def test_nothing_that_is_read_runs_code(tmp_path: Path) -> None:
    save(tmp_path, state_at(1))
    pid = os.fork()
    if pid == 0:
        # A hook stays for the life of a process.
        bad: list[str] = []
        names = ("pickle.find_class", "compile", "exec", "import", "os.system", "subprocess.Popen", "ctypes.dlopen")
        sys.addaudithook(lambda event, _: bad.append(event) if event in names else None)
        restored = load_latest(tmp_path, state_at(0))
        os._exit(0 if restored is not None and restored.step == 1 and not bad else 1)
    assert os.waitpid(pid, 0)[1] == 0
