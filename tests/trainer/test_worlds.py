"""Saved in one number of processes, loaded in another: the same tensors, the same rows, the same losses."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.world_programs import CASES, GLOBAL_BATCH, SAVED, Place

ROOT = Path(__file__).resolve().parents[2]
Runs = dict[str, dict[str, Any]]
"""By world of the beginning and world of the end, 11, 12, 21 and 22, the results of each process."""


def runs(folder: Path, cases: list[str]) -> dict[str, Runs]:
    """Every case in one process, in two, and from each to the other, with the same global batch."""
    found: dict[str, Runs] = {name: {} for name in cases}
    for i, name in enumerate(cases):
        found[name]["11"] = {"0": CASES[name](folder / f"one-{i}", None, Place())}
    in_two(folder, cases)
    for rank in ("0", "1"):
        for name, result in json.loads((folder / f"result-{rank}.json").read_text()).items():
            found[name].setdefault("22", {})[rank] = result["whole"]
            found[name].setdefault("12", {})[rank] = result["continued"]
    for i, name in enumerate(cases):
        with told_of_smaller_batches() if name != "loop" else nullcontext():
            found[name]["21"] = {"0": CASES[name](folder / f"two-one-{i}", folder / f"two-{i}", Place())}
    return found


def told_of_smaller_batches() -> Any:
    """What a process takes of the global batch is another number now."""
    return pytest.warns(UserWarning, match=f"train_batch_size: {GLOBAL_BATCH // 2} then, {GLOBAL_BATCH} now")


def in_two(folder: Path, cases: list[str]) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    environment = {**os.environ, **common, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.trainer.world_programs", str(folder), *cases]
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, env={**environment, "RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors


def check(found: Runs) -> None:
    for before, after, whole in (("11", "12", "22"), ("22", "21", "11")):
        saved, loaded = found[before]["0"]["saved"], [rank["loaded"] for rank in found[after].values()]
        assert saved and loaded == [saved] * len(loaded)
        for rank in found[after].values():
            for unchanged in (found[before]["0"], found[whole]["0"]):
                assert_close(later_losses(rank), later_losses(unchanged))


def later_losses(result: dict[str, Any]) -> dict[int, float]:
    return {int(step): loss for step, loss in result["losses"].items() if int(step) > SAVED}


def assert_close(found: dict[int, float], expected: dict[int, float]) -> None:
    assert found.keys() == expected.keys() and found
    wrong = {step: (found[step], loss) for step, loss in expected.items() if abs(found[step] / loss - 1) > 1e-6}
    assert not wrong


def rows(ranks: dict[str, Any]) -> dict[int, list[int]]:
    """The rows of each global batch."""
    return {int(step): [row for rank in ranks.values() for row in rank["rows"][step]] for step in ranks["0"]["rows"]}


def test_a_loop_of_ones_own(tmp_path: Path) -> None:
    found = runs(tmp_path, ["loop"])["loop"]
    check(found)
    whole = rows(found["11"])
    assert len({tuple(sorted(batch)) for batch in whole.values()}) == len(whole)
    assert rows(found["22"]) == whole
    for after in ("12", "21"):
        assert rows(found[after]) == {step: batch for step, batch in whole.items() if step > SAVED}
    assert {len(rank["rows"]["1"]) for rank in found["22"].values()} == {GLOBAL_BATCH // 2}


@pytest.mark.slow
def test_the_trainer(tmp_path: Path) -> None:
    for found in runs(tmp_path, [name for name in CASES if name != "loop"]).values():
        check(found)


@pytest.mark.slow
def test_processes_end_well_at_the_worst_moment(tmp_path: Path) -> None:
    for _ in range(4):
        in_two(tmp_path, ["part"])
