"""The power is cut: from what the disk may then hold, before any call of a recorded run, the run has to go on."""

from __future__ import annotations

from pathlib import Path
from random import Random

from tests.faults.calls import Call
from tests.faults.damages import damage, saves_in
from tests.faults.disk import KINDS, Disk, Tree, plant, snapshot
from tests.faults.judge import Case, Reference, Tally, announced, check_end, workspace
from tests.faults.server import Server
from tests.faults.trap import Outcome, Plan, read_record

STARTS = ("fresh", "early", "middle", "damaged")


def states(
    server: Server,
    case: Case,
    reference: Reference,
    *,
    number: int | None = None,
    seed: int = 0,
    only: tuple[str, str, int] | None = None,
    kinds: tuple[str, ...] = KINDS,
) -> Tally:
    """Rebuild disk states of a run and start the program on each.

    The run is recorded several times: from an empty folder, and going on where a process was killed, after its first
    call ("early") and in its middle. What that process did not fsync is then not durable either, although the next one
    finds it. With more than one checkpoint also where the newest is damaged, so that its name is written again.

    Args:
        server: runs the case.
        case: the program.
        reference: how it ends without faults.
        number: how many states, drawn evenly from all; None for all of them.
        seed: of the draws.
        only: replay one state alone, given as (start, kind, call).
        kinds: of states.
    """
    tally = Tally()
    starts = STARTS if case.arguments.get("keep", 1) > 1 else STARTS[:-1]
    for start in starts if only is None else only[:1]:
        with workspace() as root, workspace() as other:
            disk, saved = _begun(server, case, reference, start, root, other)
            outcome, calls = _recorded(server, case, root, other / "record", 0)
        tally.note(f"states/{case.name}/{start}", check_end(reference, outcome, saved=saved), "recorded")
        points = [(kind, call) for call in range(1, len(calls) + 2) for kind in kinds]
        if number is not None:
            drawn = Random(f"states {case.name} {start} {seed}").sample(points, min(number // len(starts), len(points)))
            points = sorted(drawn, key=lambda point: point[1])
        fed = 0
        for kind, call in points if only is None else [only[1:]]:
            for executed in calls[fed : call - 1]:
                disk.feed(executed)
            fed = call - 1
            left = disk.left(kind, Random(f"{kind} {call} {seed}"))
            expected = max(saved, announced(outcome, before_call=call))
            name = f"states/{case.name}/{start}/{kind}/{call} ({_describe(calls, call)})"
            tally.note(name, _go_on(server, case, reference, left, expected), kind)
    return tally


def _begun(server: Server, case: Case, reference: Reference, start: str, root: Path, other: Path) -> tuple[Disk, int]:
    """What came before the run that is recorded, and the step that it must not start below."""
    disk = Disk(str(root), {})
    if start == "fresh":
        return disk, 0
    at = 2 if start == "early" else reference.calls * 2 // 3
    killed, calls = _recorded(server, case, root, other / "killed", at)
    for executed in calls:
        disk.feed(executed)
    if start != "damaged":
        return disk, announced(killed)
    tree = snapshot(root)
    # What a broken rule leaves may lack the file.
    *_, older, newest = [folder for folder in saves_in(tree) if f"{folder}/model.safetensors" in tree]
    damage(tree, newest, "model.safetensors", "flip", Random(0), older)
    changed = tree[f"{newest}/model.safetensors"]
    assert isinstance(changed, bytes)
    (root / newest / "model.safetensors").write_bytes(changed)
    return Disk(str(root), tree), int(older.rpartition("-")[2])


def _recorded(server: Server, case: Case, root: Path, record: Path, kill_at: int) -> tuple[Outcome, list[Call]]:
    outcome = case.run(server, root, Plan(record=str(record), action="kill", at=kill_at))
    return outcome, read_record(record)


def _go_on(server: Server, case: Case, reference: Reference, left: Tree, saved: int) -> list[str]:
    with workspace() as root:
        plant(left, root)
        return check_end(reference, case.run(server, root, Plan(trace=False)), saved=saved)


def _describe(calls: list[Call], number: int) -> str:
    if number > len(calls):
        return "at the end"
    call = calls[number - 1]
    return f"before {call.kind} {Path(call.path).name}"
