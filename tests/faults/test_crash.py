"""Runs that meet faults end as one that met none: the campaigns in small. ``make crash-test`` has them at length."""

from __future__ import annotations

import pytest

from tests.faults import damages, failing, hostile, kills
from tests.faults.crash import CASES, main, replayed
from tests.faults.judge import Case, check_end, reference, workspace
from tests.faults.mutations import MUTATIONS
from tests.faults.suite import CAMPAIGNS, TIGHT, Bench
from tests.faults.trap import Plan


@pytest.mark.parametrize("name", CAMPAIGNS)
def test_no_fault_is_noticed_in_the_end(bench: Bench, name: str) -> None:
    tally = CAMPAIGNS[name](bench)
    assert tally.failures == []
    assert tally.counts.total() >= 2


@pytest.mark.parametrize("kind", ["stream", "workers"])
def test_kills_with_other_data(bench: Bench, kind: str) -> None:
    case = Case(kind, TIGHT.program, {"kind": kind})
    whole = reference(bench.server, case)
    for campaign in (kills.kill, kills.killop):
        assert campaign(bench.server, case, whole, kills=10, seed=0).failures == []


def test_a_stop_request_loses_no_step(bench: Bench) -> None:
    tally = kills.sigterm(bench.server, bench.wide, bench.three, kills=15, seed=0)
    assert tally.failures == []


def test_a_stop_request_in_any_part_of_a_step_waits_for_its_end(bench: Bench) -> None:
    tally = kills.parts(bench.server, bench.wide, bench.three)
    assert tally.failures == []
    assert tally.counts == {"ok": 5}


@pytest.mark.slow
def test_a_stop_request_in_a_compilation_waits_for_its_end(bench: Bench) -> None:
    compiled = CASES["compiled"]
    whole = reference(bench.server, compiled)
    tally = kills.parts(bench.server, compiled, whole, parts=("compile", "save"))
    assert tally.failures == []
    assert tally.counts == {"ok": 2}


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_nothing_is_unpickled_in_saving_loading_and_going_on(bench: Bench, kind: str) -> None:
    case = Case(kind, TIGHT.program, {"kind": kind, "audit": True})
    with workspace() as root:
        first = case.run(bench.server, root, Plan(action="kill", at=bench.one.calls // 2))
        second = case.run(bench.server, root, Plan(trace=False))
    assert (first.code, second.code) == (-9, 0) and second.told("resumed")[0] > 0
    assert first.told("unpickled") + second.told("unpickled") == []


def test_short_writes_are_continued(bench: Bench) -> None:
    assert failing.shorts(bench.server, bench.tight, bench.one, number=10).failures == []


def test_a_full_disk_is_survived(bench: Bench) -> None:
    try:
        tally = failing.diskfull(bench.server, bench.tight, bench.one, number=8)
    except PermissionError as error:
        pytest.skip(f"no file system can be mounted: {error}")
    assert tally.failures == []
    assert tally.counts["filled up"] >= 2


def test_the_clock_decides_nothing(bench: Bench) -> None:
    assert damages.clock(bench.server, bench.wide, bench.three).failures == []


def test_a_finished_run_stays_finished(bench: Bench) -> None:
    assert damages.rerun(bench.server, bench.wide, bench.three).failures == []


def test_hostile_checkpoints_do_no_harm(bench: Bench) -> None:
    tally = hostile.hostile(bench.server, bench.wide, bench.three)
    assert tally.failures == []
    assert tally.counts == {"refused": len(hostile.REFUSED), "harmless": len(hostile.HARMLESS)}


def test_a_name_that_no_failure_has_is_refused() -> None:
    with pytest.raises(ValueError, match="a case among map, "):
        replayed("kill/nothing/3", 0)
    with pytest.raises(ValueError, match="a campaign among kill, "):
        replayed("tickle/map/3", 0)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_rule_is_noticed(bench: Bench, mutation: str) -> None:
    broken = Bench(bench.server, bench.second, bench.one, bench.three, mutation)
    with workspace() as root:
        # Without faults nobody could tell.
        assert check_end(bench.one, broken.tight.run(bench.server, root)) == []
    assert any(campaign(broken).failures for campaign in CAMPAIGNS.values())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_long_campaigns(seed: int) -> None:
    sizes = {"kills": 200, "killops": 200, "states": 1000, "errnos": 300, "diskfull": 20, "damages": 200}
    words = [word for name, number in sizes.items() for word in (f"--{name}", str(number))]
    assert main([*words, "--once", "--seed", str(seed)]) == 0
