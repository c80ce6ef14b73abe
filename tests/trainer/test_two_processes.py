"""One program in one process and, by launchers, in two with the same global batch: the same losses and weights."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.process_programs import CASES
from tests.trainer.tiny import distance, without_times

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ("-m", "tests.trainer.process_programs")
LAUNCHERS = {
    "torchrun": ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"),
    # With --cpu it starts one process, unless there is MPI; this is how it starts two that use no accelerator.
    "accelerate": ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    left = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in left}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def launched(launcher: str, folder: Path) -> None:
    before, rows = [*LAUNCHERS.get(launcher, ())], "2" if launcher in LAUNCHERS else "4"
    if launcher == "accelerate":
        before += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port())]
    command = [sys.executable, *before, *PROGRAM, str(folder), rows]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def result(launcher: str) -> tuple[Path, list[dict[str, Any]]]:
        folder = tmp_path_factory.mktemp(launcher)
        launched(launcher, folder)
        ranks = range(2 if launcher in LAUNCHERS else 1)
        return folder, [json.loads((folder / f"result-{rank}.json").read_text()) for rank in ranks]

    return result


def assert_same_logs(two: list[dict[str, Any]], one: list[dict[str, Any]]) -> None:
    for mine, other in zip(map(without_times, two), map(without_times, one), strict=True):
        assert mine.keys() == other.keys()
        wrong = [key for key in other if not math.isclose(mine[key], other[key], rel_tol=1e-5, abs_tol=1e-5)]
        assert not wrong, (wrong, mine, other)


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one_with_the_same_global_batch(launcher: str, case: str, ran: Any) -> None:
    _, (one,) = ran("python")
    _, (first, second) = ran(launcher)
    assert distance(first[case]["weights"], second[case]["weights"]) == 0
    assert distance(first[case]["weights"], one[case]["weights"]) < 1e-6
    # Logged losses, norms of gradients, rates, epochs; losses and metrics of evaluations.
    assert_same_logs(first[case]["log"], one[case]["log"])
    assert_same_logs([first[case]["evaluated"]], [one[case]["evaluated"]])


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("case", [case for case in CASES if case != "drop_last"])
def test_an_evaluation_sees_each_row_once(launcher: str, case: str, ran: Any) -> None:
    for rank in ran(launcher)[1]:
        assert rank[case]["predicted"] == 7
        assert rank[case]["evaluated"].get("eval_rows", 7) == 7


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("case", [case for case in CASES if case != "beside"])
def test_resumed_in_two_processes(launcher: str, case: str, ran: Any) -> None:
    for rank in ran(launcher)[1]:
        assert distance(rank[case]["resumed"], rank[case]["weights"]) == 0


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_one_process_writes(launcher: str, ran: Any) -> None:
    # The second one would have failed: no file of it may grow.
    folder = ran(launcher)[0] / "alone"
    found = sorted(path.name for path in folder.iterdir())
    assert found == [
        "README.md",
        "all_results.json",
        "checkpoint-2",
        "checkpoint-4",
        "model.safetensors",
        "train_results.json",
        "trainer_state.json",
        "training_args.json",
    ]


def test_an_error_in_one_process_ends_the_other(tmp_path: Path) -> None:
    # The process that fails lives on for 25 seconds, so that it is the timeout, 8 seconds, that ends the other.
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    command = [sys.executable, *PROGRAM, str(tmp_path), "fail"]
    begin = time.monotonic()
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2", **address),
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert time.monotonic() - begin < 120
    assert [process.returncode for process in processes] == [1, 1], errors
    assert "ArithmeticError: on one process only" in errors[1]
    waited = float((tmp_path / "ended-0").read_text())
    assert waited < 20 < float((tmp_path / "ended-1").read_text())
