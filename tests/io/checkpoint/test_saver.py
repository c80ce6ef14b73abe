"""Saving in the background: copies, errors, order, the end of a process."""

import gc
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trainkit import TrainState, init_state, tree
from trainkit.io.checkpoint import CheckpointError, CheckpointWarning, Retention, Saver, checkpoints, load, save, verify
from trainkit.io.checkpoint.format import flatten_state
from trainkit.io.checkpoint.host import HostMemory, _in_threads
from trainkit.io.checkpoint.tensors import PIECE, layout, memory_in_order
from trainkit.optim import sgd

# Python 3.12 warns of every fork in a process that has threads, and torch has some.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
Make = Callable[..., TrainState]
Bits = Callable[[TrainState], Any]


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file may grow beyond this: the system then refuses writes, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def large(step: int = 0, size: int = 100_000) -> TrainState:
    state = init_state(nn.Linear(1, 1), sgd(0.1))
    return state.replace(step=torch.tensor(step), params=tree.frozen({"w": torch.full((size,), float(step))}))


def test_what_comes_after_the_call_does_not_get_into_the_file(tmp_path: Path, make_state: Make, bits: Bits) -> None:
    state = make_state(1)
    before = bits(state)
    cursor = {"rows": [1, 2]}
    with Saver(tmp_path) as saver:
        saver.save(state, cursor=cursor)
        # What a step does that may overwrite its state.
        for tensor in (*flatten_state(state).model.values(), *flatten_state(state).training.values()):
            tensor.fill_(7)
        cursor["rows"].append(3)
    restored = load(tmp_path / "checkpoint-1", state)
    assert bits(restored.state) == before and restored.cursor == {"rows": [1, 2]}


def test_the_memory_of_the_host_is_used_again(make_state: Make, bits: Bits) -> None:
    memory = HostMemory()

    def take(state: TrainState) -> Any:
        return memory.take(memory.leaves(state))

    first, second = take(make_state(1)), take(make_state(2))
    for name, tensor in first.params.items():
        assert tensor.data_ptr() == second.params[name].data_ptr() != make_state(2).params[name].data_ptr()
        assert torch.equal(tensor, make_state(2).params[name])
    # Another model gets what it needs.
    wide = take(make_state(3, width=50))
    assert torch.equal(wide.params["0.weight"], make_state(3, width=50).params["0.weight"])


def _kinds() -> list[TrainState]:
    """States whose leaves are alike, and differ in one thing each."""
    base = large(0, size=6)
    one, two = torch.zeros(6), torch.ones(6)
    params: list[dict[str, torch.Tensor]] = [
        {"a": one, "b": two},
        {"b": one, "a": two},
        {"a": one, "c": two},
        {"a": one.double(), "b": two},
        {"a": one.view(torch.int32), "b": two},
        {"a": one.view(2, 3), "b": two},
        {"a": one.view(3, 2).t(), "b": two},
        {"a": one[:5], "b": two},
        {"a": one.to(torch.float8_e5m2), "b": two},
        {"a": one.to(torch.uint8), "b": two},
    ]
    memory: list[Any] = [
        {"a": tree.frozen({"x": one}), "b": two},
        {"a": one, "b": tree.frozen({"x": two})},
        {"a": one, "b": tree.frozen({"x": two, "y": tree.frozen({})})},
        {"a/x": one, "b": two},
    ]
    states = [base.replace(params=tree.frozen(p)) for p in params] + [
        base.replace(opt_state=tree.frozen(m)) for m in memory
    ]
    # Each after each other.
    return [state for other in states for state in (states[0], other, states[10], other)]


def test_a_state_of_another_kind_is_laid_out_anew(tmp_path: Path) -> None:
    host = HostMemory()
    for state in _kinds():
        copy = host.take(host.leaves(state))
        leaves = flatten_state(state)
        for file, own in leaves.by_file().items():
            assert host.slots[file] == layout(own)
            parts = memory_in_order(host.slots[file], own)
            assert bytes(copy.memory[file]) == b"".join(map(bytes, parts))
        assert copy.params.keys() == set(leaves.params)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_large_leaves_are_copied_whole(threads: int) -> None:
    size = PIECE // 4 + 5
    flat = torch.arange(3 * size, dtype=torch.float32)
    whole = {
        "plain": flat[:size],
        "parameter": nn.Parameter(flat[size : 2 * size]),
        "larger than a piece": flat.double(),
        "turned": flat[: size // 7 * 7].view(7, -1).t(),
        "gaps": flat[::3],
        "conjugated": torch.complex(flat[:size], flat[:size]).conj(),
        "negative": torch.complex(flat[:size], flat[:size]).conj().imag,
        "half": flat.bfloat16(),
        "bytes": flat.to(torch.uint8),
        "small": flat[:3],
        "small parameter": nn.Parameter(flat[:4]),
    }
    state = large().replace(params=tree.frozen(whole))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        host = HostMemory()
        copies = [host.take(host.leaves(state)).params for _ in range(2)]
    finally:
        torch.set_num_threads(before)
    for name, tensor in whole.items():
        assert torch.equal(copies[0][name], tensor) and torch.equal(copies[1][name], tensor)
        assert not copies[0][name].requires_grad


def test_a_state_may_have_large_leaves_alone() -> None:
    members = 20_000
    state = large().replace(step=torch.arange(members), key=torch.arange(members), opt_state=tree.frozen())
    host = HostMemory()
    copy = host.take(host.leaves(state))
    for file, own in flatten_state(state).by_file().items():
        assert bytes(copy.memory[file]) == b"".join(map(bytes, memory_in_order(host.slots[file], own)))


def test_a_leaf_that_became_another_behind_its_name_is_seen(tmp_path: Path) -> None:
    state = large(1, size=6)
    with Saver(tmp_path) as saver:
        saver.save(state)
        state.params["w"].data = torch.arange(9.0)
        state.step.fill_(2)
        saver.save(state)
    assert torch.equal(load(tmp_path / "checkpoint-2", state).state.params["w"], torch.arange(9.0))


def test_a_save_may_be_made_where_autograd_is_off(tmp_path: Path) -> None:
    with Saver(tmp_path) as saver:
        with torch.inference_mode():
            saver.save(large(1))
        saver.save(large(2))
        parameter = nn.Parameter(torch.full((100_000,), 3.0))
        saver.save(large(3).replace(params=tree.frozen({"w": parameter})))
        with torch.inference_mode():
            saver.save(large(4))
    for step in (2, 3, 4):
        assert load(tmp_path / f"checkpoint-{step}", large()).state.params["w"].eq(step).all()


def test_a_leaf_that_cannot_be_stored_is_refused_in_the_middle_of_a_run(tmp_path: Path) -> None:
    with Saver(tmp_path) as saver:
        saver.save(large(1))
        with pytest.raises(ValueError, match="safetensors files cannot hold"):
            saver.save(large(2).replace(params=tree.frozen({"w": torch.zeros(100_000, dtype=torch.complex128)})))
        saver.save(large(3))
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-3"]
    assert load(tmp_path / "checkpoint-3", large()).state.params["w"].eq(3).all()


@pytest.mark.parametrize("at", [0, 2**15 - 2, 2**15 - 1, 2**15, 99_998, 99_999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.float8_e5m2])
def test_a_number_that_is_not_finite_is_found_anywhere(at: int, dtype: torch.dtype, tmp_path: Path) -> None:
    numbers = torch.zeros(100_000)
    numbers[at] = float("nan")
    whole = numbers.to(dtype)
    for tensor in (whole, nn.Parameter(whole), whole.view(2, -1).t(), whole.conj()):
        state = large().replace(params=tree.frozen({"good": torch.ones(70_000), "bad": tensor}))
        with pytest.raises(CheckpointError, match="parameter 'bad' is not finite"):
            save(tmp_path, state)


def test_a_state_is_not_kept_alive_by_its_save(tmp_path: Path, make_state: Make) -> None:
    with Saver(tmp_path) as saver:
        state = make_state(1)
        alive = weakref.ref(state.params["0.weight"])
        saver.save(state)
        del state
        gc.collect()
        assert alive() is None


def test_one_save_is_on_its_way_at_most(tmp_path: Path) -> None:
    names = []
    with Saver(tmp_path, keep=Retention(last=None)) as saver:
        for step in range(5):
            saver.save(large(step))
            names.append([thread.name for thread in threading.enumerate()].count("checkpoint"))
            if step:
                # The one before is durable, as this one could begin.
                verify(tmp_path / f"checkpoint-{step - 1}")
                assert saver.last in (tmp_path / f"checkpoint-{step - 1}", tmp_path / f"checkpoint-{step}")
        assert saver.wait() == tmp_path / "checkpoint-4"
    assert max(names) <= 1
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in range(5)]


@pytest.mark.parametrize("call", ["save", "wait", "close", "exit"])
def test_an_error_of_the_writer_is_raised_once(call: str, tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    saver.save(large(1))
    saver.wait()
    with file_size_limit(1000):
        saver.save(large(2))
        saver._flight._thread.join()
    refused = pytest.raises(CheckpointError, match=r"cannot save: File too large \(errno 27\)")
    if call == "save":
        with refused:
            saver.save(large(3))
    elif call == "wait":
        with refused:
            saver.wait()
    elif call == "close":
        with refused:
            saver.close()
        saver.close()
    else:
        with refused, saver:
            pass
    if call in ("save", "wait"):
        assert saver.wait() == tmp_path / "checkpoint-1"
        saver.save(large(3))
        saver.close()
        assert saver.last == tmp_path / "checkpoint-3"
    assert "checkpoint-2" not in [path.name for path in tmp_path.iterdir()]
    assert not list(tmp_path.glob(".staging-*"))
    verify(tmp_path / "checkpoint-1")
    # The lock was given back, whatever happened.
    with Saver(tmp_path, resumed_from=saver.last):
        pass


def test_what_ended_the_run_is_raised_and_the_writers_error_is_said_beside_it(tmp_path: Path) -> None:
    def run() -> None:
        with Saver(tmp_path) as saver, file_size_limit(1000):
            saver.save(large(2))
            saver._flight._thread.join()
            raise ZeroDivisionError

    with pytest.warns(CheckpointWarning, match="cannot save"), pytest.raises(ZeroDivisionError):
        run()


def test_a_blocking_save_that_fails_leaves_what_was(tmp_path: Path) -> None:
    save(tmp_path, large(1))
    for limit in (0, 100, 1000, 400_000):
        with file_size_limit(limit), pytest.raises(CheckpointError, match=r"cannot save: File too large \(errno 27\)"):
            # The lock file cannot be written either for 0.
            save(tmp_path, large(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "checkpoint-1"]
    save(tmp_path, large(2))
    verify(tmp_path / "checkpoint-2")


def test_an_error_of_a_copy_is_raised() -> None:
    def fail() -> None:
        raise IndexError("of a copy")

    for number in (1, 2):
        with pytest.raises(IndexError, match="of a copy"):
            _in_threads([lambda: None, fail], number)


def blocked_signals(thread: threading.Thread) -> int:
    lines = Path(f"/proc/self/task/{thread.native_id}/status").read_text().splitlines()
    return next(int(line.split()[1], 16) for line in lines if line.startswith("SigBlk"))


def test_signals_do_not_interrupt_the_writer(tmp_path: Path) -> None:
    with Saver(tmp_path) as saver:
        with saver._target.lock.mutex:
            saver.save(large())
            (writer,) = (thread for thread in threading.enumerate() if thread.name == "checkpoint")
            deadline = time.monotonic() + 60
            while not blocked_signals(writer) >> (signal.SIGTERM - 1) & 1 and time.monotonic() < deadline:
                time.sleep(0.001)
            blocked = blocked_signals(writer)
        saver.wait()
    assert all(blocked >> (number - 1) & 1 for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
    assert not blocked >> (signal.SIGSEGV - 1) & 1
    assert not blocked_signals(threading.main_thread()) >> (signal.SIGTERM - 1) & 1


def test_a_closed_saver_says_so(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    saver.close()
    for call in (saver.wait, lambda: saver.save(large())):
        with pytest.raises(RuntimeError, match="this Saver is closed"):
            call()


def test_a_forked_process_cannot_save_with_it(tmp_path: Path) -> None:
    with Saver(tmp_path) as saver:
        saver.save(large(1))
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                saver.save(large(2))
            except RuntimeError as error:
                code = 0 if "belongs to process" in str(error) else 2
            saver.close()
            os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
        saver.save(large(3))
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-3"]


def test_a_saver_that_is_forgotten_gives_the_lock_back(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    saver.save(large(1))
    del saver
    gc.collect()
    with Saver(tmp_path, resumed_from=tmp_path / "checkpoint-1"):
        pass


PROGRAM = """
import sys, torch
from torch import nn
from trainkit import init_state, tree
from trainkit.io.checkpoint import Saver
from trainkit.optim import sgd
state = init_state(nn.Linear(1, 1), sgd(0.1))
state = state.replace(params=tree.frozen({"w": torch.ones(2_000_000)}))
saver = Saver(sys.argv[1])
"""


@pytest.mark.parametrize(
    "end",
    [
        pytest.param("raise ZeroDivisionError", id="raise"),
        pytest.param("", id="return", marks=pytest.mark.slow),
        pytest.param("sys.exit(3)", id="exit", marks=pytest.mark.slow),
    ],
)
def test_a_process_that_ends_waits_for_the_write(end: str, tmp_path: Path) -> None:
    program = f"{PROGRAM}\nsaver.save(state)\n{end}"
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == {"": 0, "sys.exit(3)": 3}.get(end, 1)
    verify(tmp_path / "checkpoint-0")
    assert not list(tmp_path.glob(".staging-*"))
    assert (tmp_path / ".lock").read_bytes() == b""


def test_an_error_that_nobody_fetched_is_said_at_the_end(tmp_path: Path) -> None:
    program = (
        f"{PROGRAM}\nimport resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\nsaver.save(state)\n"
    )
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert result.stderr.count("CheckpointError: ") == 1 and "File too large" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@given(
    actions=st.lists(
        st.sampled_from(["save", "save in place", "wait", "blocking save", "load", "fail", "reopen"]), max_size=12
    )
)
def test_any_order_of_calls(actions: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("run")
    saver = Saver(folder, keep=Retention(last=None), run_id="run")
    saved: list[float] = []
    # The one memory that a run which donates its state has.
    state = large(0, size=5000)
    for action in actions:
        step = len(saved) + 1
        state.params["w"].fill_(float(step))
        state.step.fill_(step)
        if action == "fail":
            saver.wait()
            with file_size_limit(1000):
                saver.save(state)
                saver._flight._thread.join()
            with pytest.raises(CheckpointError):
                saver.wait()
        elif action == "save":
            saver.save(large(step, size=5000))
            saved.append(float(step))
        elif action == "save in place":
            saver.save(state)
            saved.append(float(step))
        elif action == "blocking save":
            save(folder, state)
            saved.append(float(step))
        elif action == "reopen":
            saver.close()
            saver = Saver(folder, keep=Retention(last=None), run_id="run")
        else:
            saver.wait()
            for i, path in enumerate(checkpoints(folder) if action == "load" else []):
                assert torch.equal(load(path, state).state.params["w"], torch.full((5000,), saved[i]))
    saver.close()
    found = [load(path, state).state.params["w"][0].item() for path in checkpoints(folder)]
    assert found == saved
