"""A run that is sent SIGTERM saves, ends with a code of its own, and goes on as if there had been no break."""

from __future__ import annotations

import multiprocessing
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from tests.trainer.preemption_programs import Case, run
from trainkit.io.signals import EXIT_PREEMPTED
from trainkit.trainer.checkpoints import numbered, step_of, verify

ROOT = Path(__file__).parents[2]
TIMEOUT = 120
START = multiprocessing.get_context("forkserver")
# What a run imports, so that a process starts in a third of a second.
RUNS_IMPORT = ("accelerate", "tensordict.nn", "trainkit.execution", "torch._inductor.compile_fx")
START.set_forkserver_preload(["tests.trainer.preemption_programs", *RUNS_IMPORT])


def codes(*cases: Case) -> list[int | None]:
    """Exit codes of processes that run together."""
    processes = [START.Process(target=run, args=(case,)) for case in cases]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def end(folder: Path, rank: int = 0) -> Any:
    return torch.load(folder / f"end-{rank}", weights_only=True)


def steps_in(path: Path) -> list[int]:
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def assert_same(one: Any, other: Any) -> None:
    # A log that was stored has its keys in another order.
    flat, other_flat = (dict(pytree.tree_leaves_with_path(each)) for each in (one, other))
    assert flat.keys() == other_flat.keys()
    for path, mine in flat.items():
        theirs = other_flat[path]
        same = torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs
        assert same, (pytree.keystr(path), mine, theirs)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The end of a case that nobody interrupts, by its arguments."""

    @cache
    def of(by_microbatch: bool, arguments: tuple[tuple[str, Any], ...]) -> Any:
        case = Case(tmp_path_factory.mktemp("whole"), arguments=dict(arguments), by_microbatch=by_microbatch)
        assert codes(case) == [0]
        return end(case.folder)

    return lambda case: of(case.by_microbatch, tuple(case.arguments.items()))


def stop_and_go_on(case: Case, whole: Any, last: int) -> list[int]:
    """The steps that were saved until the run had stopped after ``last`` updates; it then ends like the whole one."""
    assert codes(case) == [EXIT_PREEMPTED]
    newest = numbered(case.folder)[-1]
    assert step_of(newest) == last
    verify(newest)
    saves = steps_in(case.folder / "saves-0")
    assert saves[-1] == last
    assert steps_in(case.folder / "ends-0") == [last]
    assert not (case.folder / "end-0").exists()
    assert codes(replace(case, asks=(), resume=True)) == [0]
    assert_same(end(case.folder), whole(case))
    return saves


# Updates are counted from 1: what is asked for during the third one, after two, stops after the third.
PARTS = {
    "data": (2, 3),
    "begin": (2, 3),
    "forward": (2, 3),
    "backward": (1, 2),
    "update": (4, 5),
    "end": (2, 2),
    "log": (3, 3),
    "evaluation": (3, 3),
    "epoch end": (4, 4),
    "epoch begin": (4, 5),
}


@pytest.mark.slow
@pytest.mark.parametrize("by_microbatch", [False, True], ids=["one call", "microbatches"])
@pytest.mark.parametrize("part", PARTS)
def test_a_signal_in_any_part_of_a_step(part: str, by_microbatch: bool, whole: Any, tmp_path: Path) -> None:
    completed, last = PARTS[part]
    case = Case(tmp_path, ((part, completed),), by_microbatch=by_microbatch)
    assert stop_and_go_on(case, whole, last) == [last]


def test_a_signal_in_a_backward_pass(whole: Any, tmp_path: Path) -> None:
    assert stop_and_go_on(Case(tmp_path, (("backward", 1),)), whole, 2) == [2]


def test_a_signal_in_a_save_that_is_due(whole: Any, tmp_path: Path) -> None:
    case = Case(tmp_path, (("save", 2),), {"save_strategy": "steps", "save_steps": 1})
    assert stop_and_go_on(case, whole, 2) == [1, 2]


def test_more_signals_in_the_save_and_after_it(whole: Any, tmp_path: Path) -> None:
    asks = (("forward", 4), ("save", 5), ("train end", 5))
    assert stop_and_go_on(Case(tmp_path, asks, {"save_total_limit": 1}), whole, 5) == [5]


BY_EPOCH = dict.fromkeys(("save_strategy", "eval_strategy", "logging_strategy"), "epoch")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "completed", "last", "saves"),
    [
        # In the middle of a pass nothing happens that belongs to its end.
        ("forward", 1, 2, [2]),
        # In its last update everything does.
        ("backward", 3, 4, [4]),
        ("evaluation", 4, 4, [4]),
        ("save", 4, 4, [4]),
        ("forward", 5, 6, [4, 6]),
    ],
)
def test_what_goes_by_passes(
    part: str, completed: int, last: int, saves: list[int], whole: Any, tmp_path: Path
) -> None:
    assert stop_and_go_on(Case(tmp_path, ((part, completed),), BY_EPOCH), whole, last) == saves


@pytest.mark.slow
def test_the_end_of_a_pass_comes_into_its_save(whole: Any, tmp_path: Path) -> None:
    # Saved by steps before the end of the pass, whose evaluation is not in that checkpoint.
    arguments = {**BY_EPOCH, "save_strategy": "steps", "save_steps": 2}
    case = Case(tmp_path, (("evaluation", 4),), arguments)
    assert stop_and_go_on(case, whole, 4) == [2, 4, 4]


@pytest.mark.slow
def test_in_the_last_update(whole: Any, tmp_path: Path) -> None:
    # The run is complete but its end: what the program does after train() is done by the next start.
    assert stop_and_go_on(Case(tmp_path, (("update", 7),)), whole, 8) == [8]


@pytest.mark.slow
def test_again_and_again(whole: Any, tmp_path: Path) -> None:
    case = Case(tmp_path, tuple(("forward", n) for n in range(8)), {"gradient_accumulation_steps": 2})
    stops = []
    while codes(replace(case, resume=bool(stops))) == [EXIT_PREEMPTED]:
        stops.append(step_of(numbered(tmp_path)[-1]))
    assert stops == [1, 2, 3, 4]
    # It was asked for in the last one too, which then had nothing left to do.
    assert_same(end(tmp_path), whole(case))


@pytest.mark.slow
@pytest.mark.parametrize("own", ["", "group"])
def test_workers_of_the_data(own: str, whole: Any, tmp_path: Path) -> None:
    case = Case(tmp_path, (("forward", 2),), {"dataloader_num_workers": 2}, own=own)
    assert stop_and_go_on(case, whole, 3) == [3]


@pytest.mark.slow
def test_while_a_step_is_compiled(whole: Any, tmp_path: Path) -> None:
    case = Case(tmp_path, (("compilation", 0),), {"torch_compile": True})
    assert stop_and_go_on(case, whole, 1) == [1]


@pytest.mark.slow
def test_the_best_checkpoint_stays(whole: Any, tmp_path: Path) -> None:
    # At this rate the loss of the second of four evaluations is the least.
    arguments = {
        "learning_rate": 0.3,
        "save_strategy": "steps",
        "save_steps": 3,
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "max_steps": 12,
    }
    case = Case(tmp_path, (("forward", 10),), arguments)
    assert codes(case) == [EXIT_PREEMPTED]
    assert [step_of(path) for path in numbered(tmp_path)] == [6, 11]
    assert codes(replace(case, asks=(), resume=True)) == [0]
    assert_same(end(tmp_path), whole(case))
    assert end(tmp_path)["best"] == 6


def test_a_handler_of_the_user_is_left_alone(tmp_path: Path) -> None:
    case = Case(tmp_path, (("forward", 2),), own="handler")
    assert codes(case) == [0]
    assert end(tmp_path)["seen"] == [2]
    assert not numbered(tmp_path)


def test_in_a_thread_the_signal_ends_the_process_as_ever(tmp_path: Path) -> None:
    assert codes(Case(tmp_path, (("forward", 2),), own="thread")) == [-signal.SIGTERM]
    assert not numbered(tmp_path)


@pytest.mark.slow
def test_before_and_after_the_updates_the_signal_ends_the_process_as_ever(tmp_path: Path) -> None:
    assert codes(Case(tmp_path / "a", (("evaluation", 0),), {"eval_on_start": True})) == [-signal.SIGTERM]
    assert codes(Case(tmp_path / "b", (("train end", 8),))) == [-signal.SIGTERM]


@pytest.mark.slow
def test_an_error_is_shown_and_the_signal_ends_the_process(tmp_path: Path) -> None:
    program = "import sys; from pathlib import Path; from tests.trainer.preemption_programs import Case, make\n"
    program += "make(Case(Path(sys.argv[1]), (('error', 2),))).train()"
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == -signal.SIGTERM
    assert done.stderr.count("ArithmeticError: after the signal") == 1
    assert not numbered(tmp_path)


@pytest.mark.slow
def test_a_search_ends_with_its_trial(tmp_path: Path) -> None:
    assert codes(Case(tmp_path, (("forward", 2),), own="search")) == [EXIT_PREEMPTED]
    assert steps_in(tmp_path / "saves-0") == [3]
    assert [path.name for path in tmp_path.glob("run-*/*")] == ["checkpoint-3"]


PROGRAM = """
import sys
from pathlib import Path
from tests.trainer.preemption_programs import Case, make

trainer = make(Case(Path(sys.argv[1]), (("forward", 2),), {"save_only_model": True}))
trainer.train()
print("this is not reached")
"""


def test_a_program_ends_with_the_code_and_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == EXIT_PREEMPTED == 75
    assert "not reached" not in done.stdout
    assert "Traceback" not in done.stderr
    assert f"SIGTERM: stopped after update 3 and saved it in {tmp_path}" in done.stderr
    assert not (tmp_path / "checkpoint-3" / "optimizer.pt").exists()


# -- two processes -----------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def ranks(folder: Path, asks: tuple[Any, Any] = ((), ()), **options: Any) -> list[Case]:
    port = free_port()
    return [Case(folder, one, rank=rank, world=2, port=port, **options) for rank, one in enumerate(asks)]


TOGETHER: dict[str, tuple[Any, list[int]]] = {
    # Asked in update 3: after it this is told, and everyone stops after the next one.
    "the first": (((("forward", 2),), ()), [4]),
    "the second": (((), (("backward", 2),)), [4]),
    "both": (((("update", 2),), (("data", 2),)), [4]),
    "both, at different updates": (((("forward", 1),), (("forward", 2),)), [3]),
    "in an evaluation": (((), (("evaluation", 3),)), [4]),
    "in the last update": (((), (("update", 7),)), [8]),
    "at the end of a pass": (((("epoch end", 4),), ()), [5]),
    "and again in the save": (((("forward", 2), ("save", 4)), (("save", 4),)), [4]),
}


@pytest.fixture(scope="module")
def whole_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    assert codes(*ranks(folder)) == [0, 0]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("asked", TOGETHER)
def test_two_processes_stop_after_the_same_update(asked: str, whole_of_two: Path, tmp_path: Path) -> None:
    asks, saves = TOGETHER[asked]
    assert codes(*ranks(tmp_path, asks)) == [EXIT_PREEMPTED] * 2
    for rank in range(2):
        assert steps_in(tmp_path / f"saves-{rank}") == saves
        assert steps_in(tmp_path / f"ends-{rank}") == saves
    verify(tmp_path / f"checkpoint-{saves[-1]}")
    assert codes(*ranks(tmp_path, resume=True)) == [0, 0]
    for rank in range(2):
        assert_same(end(tmp_path, rank), end(whole_of_two, rank))


def test_two_processes_that_one_signal_stops(tmp_path: Path) -> None:
    asks, saves = TOGETHER["the second"]
    assert codes(*ranks(tmp_path, asks)) == [EXIT_PREEMPTED] * 2
    assert steps_in(tmp_path / "saves-0") == steps_in(tmp_path / "saves-1") == saves
