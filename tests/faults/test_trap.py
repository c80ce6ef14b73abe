"""The harness itself: it sees all calls, does what was planned, and tells right savers from wrong ones."""

from __future__ import annotations

import errno
import signal
from pathlib import Path
from random import Random

import pytest

from tests.faults import damages, failing, kills, power
from tests.faults.disk import Disk, Tree, replay, snapshot
from tests.faults.judge import Case, Tally, losses, reference
from tests.faults.server import Server
from tests.faults.trap import Plan, read_record

CALLS = Case("calls", "tests.faults.samples:calls")
COUNT = Case("count", "tests.faults.samples:count")
NUM_CALLS = 26


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root/run").mkdir(parents=True)
    return tmp_path / "root"


def test_the_calls_that_were_seen_make_what_is_on_the_disk(samples: Server, root: Path, tmp_path: Path) -> None:
    before = snapshot(root)
    outcome = CALLS.run(samples, root, Plan(record=str(tmp_path / "record")))
    calls = read_record(tmp_path / "record")
    assert (outcome.code, outcome.calls, len(calls), outcome.blind) == (0, NUM_CALLS, NUM_CALLS, [])
    names = "open write truncate allocate fsync rename unlink rmdir mkdir link symlink chmod"
    assert {call.kind for call in calls} == set(names.split())
    assert replay(str(root), before, calls).left("kill", Random(0)) == snapshot(root)
    assert outcome.told("failed") == [errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT]


@pytest.mark.parametrize("at", [1, 2, 3, 7, 11, 12, 16, 18, NUM_CALLS])
def test_a_kill_comes_before_the_call(samples: Server, root: Path, tmp_path: Path, at: int) -> None:
    before = snapshot(root)
    outcome = CALLS.run(samples, root, Plan(at=at, record=str(tmp_path / "record")))
    calls = read_record(tmp_path / "record")
    assert (outcome.code, outcome.calls, len(calls)) == (-signal.SIGKILL, at, at - 1)
    assert replay(str(root), before, calls).left("kill", Random(0)) == snapshot(root)


def test_a_call_fails_once_or_from_then_on(samples: Server, root: Path) -> None:
    once = Plan(action="errno", at=3, code=errno.ENOSPC)
    outcome = COUNT.run(samples, root, once)
    assert (outcome.code, len(outcome.hits)) == (1, 1)
    assert "No space left on device" in outcome.stderr
    case = Case("count", COUNT.program, {"flaw": "quiet"})
    outcome = case.run(samples, root, Plan(action="errno", at=3, code=errno.EIO, is_sticky=True, kinds=("fsync",)))
    assert {hit.split()[0] for hit in outcome.hits} == {"fsync"}
    assert len(outcome.hits) == outcome.calls - 2 > 1


def test_a_signal_that_does_not_kill_lets_the_call_be_made(samples: Server, root: Path) -> None:
    outcome = COUNT.run(samples, root, Plan(at=5, signal=signal.SIGCONT))
    assert (outcome.code, len(outcome.hits), len(losses(outcome))) == (0, 1, 12)


def test_a_hung_process_is_ended(samples: Server, root: Path) -> None:
    outcome = Case("wait", "tests.faults.samples:wait").run(samples, root, Plan(limit=0.2))
    assert (outcome.is_hung, outcome.code) == (True, -signal.SIGKILL)


def test_what_a_killed_process_leaves_is_counted(samples: Server, root: Path) -> None:
    outcome = Case("wait", "tests.faults.samples:wait").run(samples, root, Plan(after=0.2, trace=False))
    assert (outcome.is_hung, outcome.code, outcome.orphans) == (False, -signal.SIGKILL, 1)


def test_only_what_was_synced_survives_strictly(tmp_path: Path, samples: Server, root: Path) -> None:
    case = Case("count", COUNT.program, {"steps": 3})
    before = snapshot(root)
    case.run(samples, root, Plan(record=str(tmp_path / "record")))
    calls = read_record(tmp_path / "record")
    disk, left = Disk(str(root), before), {}
    for call in calls:
        disk.feed(call)
        left[call.kind] = disk.left("strict", Random(0))
    assert left["rename"] == before
    assert left["fsync"] == snapshot(root)
    # A write that was not synced yet leaves nothing, its length, or its half.
    written = [number for number, call in enumerate(calls, 1) if call.kind == "write"]
    half = replay(str(root), before, calls[: written[-1]])
    whole, zero, torn = (half.left(kind, Random(1))["run/.staging-3/state"] for kind in ("kill", "zero", "torn"))
    assert isinstance(whole, bytes)
    assert len(whole) == 3064
    assert zero in (b"", bytes(3064))
    assert torn == whole[: 1500 + 782]


def _all(samples: Server, flaw: str) -> Tally:
    case = Case("count", COUNT.program, {"flaw": flaw})
    right, tally = reference(samples, COUNT), Tally()
    tally.add(kills.killop(samples, case, right, kills=10, seed=0))
    tally.add(power.states(samples, case, right, number=120))
    tally.add(failing.errnos(samples, case, right, number=20, codes=(errno.ENOSPC,)))
    return tally


def test_a_right_saver_passes(samples: Server) -> None:
    assert _all(samples, "").failures == []


@pytest.mark.parametrize(
    "flaw", ["in place", "file fsync", "folder fsync", "parent fsync", "early", "prune first", "quiet"]
)
def test_a_wrong_saver_is_found_out(samples: Server, flaw: str) -> None:
    assert _all(samples, flaw).failures


def test_a_failure_that_is_replayed_is_the_same(samples: Server) -> None:
    case = Case("count", COUNT.program, {"flaw": "early"})
    right = reference(samples, COUNT)
    name, problem = kills.killop(samples, case, right, kills=20, seed=5).failures[0]
    number = int(name.split(" ")[0].rpartition("/")[2])
    again = kills.killop(samples, case, right, kills=1, seed=5, only=number)
    assert [problem for _, problem in again.failures] == [problem]


def test_each_damage_changes_the_tree() -> None:
    folder: Tree = {"run": None, "run/checkpoint-2": None, "run/checkpoint-4": None}
    files = {f"run/checkpoint-{i}/{name}": f"{name} {i}".encode() * 9 for i in (2, 4) for name in ("a", "b")}
    whole: Tree = {**folder, **files}
    assert damages.saves_in(whole) == ["run/checkpoint-2", "run/checkpoint-4"]
    for kind in damages.KINDS:
        tree = dict(whole)
        damages.damage(tree, "run/checkpoint-4", "a", kind, Random(1), "run/checkpoint-2")
        assert tree != whole, kind
        assert all(tree[path] == whole[path] for path in files if "checkpoint-2" in path)
