"""Two processes train together, and one of them is ended: the other one ends too, and both go on where they can."""

from __future__ import annotations

import socket
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

from tests.faults.judge import Case, Reference, Tally, announced, check_end, check_losses, losses, workspace
from tests.faults.rank_programs import WORLD
from tests.faults.server import Server
from tests.faults.trap import Outcome, Plan, end_session, members
from trainkit.io.checkpoint import CheckpointError
from trainkit.trainer.checkpoints import MANIFEST, verify
from trainkit.trainer.random_state import file_name

TOGETHER = Case("together", "tests.faults.rank_programs:train")
_PARTING = Case("parting", "tests.faults.rank_programs:part")
_SECONDS = 60.0
"""From the end of one process to that of the other."""
_RANKS = range(WORLD)
_LAST_CALLS = 30
_KILLED = ("killed at a moment", "killed in a save")
Servers = tuple[Server, ...]


@dataclass(frozen=True)
class Ended:
    """How the processes of one attempt ended.

    Args:
        outcomes: by rank.
        moments: of their ends, in seconds.
    """

    outcomes: tuple[Outcome, ...]
    moments: tuple[float, ...]

    @property
    def saved(self) -> int:
        """The newest step that any of them called saved."""
        return max(map(announced, self.outcomes))


@dataclass
class Waits:
    """Seconds that processes outlived the one that was ended: in training, and while they still waited for it to come.

    The latter takes up to two and a half times ``ddp_timeout`` where process 0 is the one that does not come.
    """

    training: list[float] = field(default_factory=list)
    starting: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [
            f"{len(seconds)} {name}, gone after {statistics.median(seconds):.2f} s, at most {max(seconds):.2f} s"
            for name, seconds in vars(self).items()
            if seconds
        ]
        return "survivors: " + "; ".join(parts or ["none"])


@contextmanager
def servers() -> Iterator[Servers]:
    """One to fork from for each rank."""
    preload = ("tests.faults.rank_programs:warm_up",)
    with Server(preload) as first, Server(preload) as second:
        yield first, second


def references(forks: Servers) -> list[Reference]:
    """What each rank gives without faults.

    Raises: AssertionError if the runs fail or differ.
    """
    found = []
    for trace in (True, False):
        with workspace() as root:
            ended = _run(forks, root, [Plan(trace=trace)] * WORLD)
            for outcome in ended.outcomes:
                assert outcome.code == 0, f"the run without faults failed\n{outcome.stderr}"
                assert not outcome.blind, f"{outcome.blind[0]} cannot be watched"
            assert _damage(root / "run", ended.saved) == []
            found.append([Reference(losses(o), o.told("final")[0], o.calls, o.seconds) for o in ended.outcomes])
    for first, second in zip(*found, strict=True):
        assert (first.losses, first.final) == (second.losses, second.final), "two runs without faults differ"
    assert found[0][0].final == found[0][1].final, "the processes end differently"
    return [replace(first, seconds=second.seconds) for first, second in zip(*found, strict=True)]


def ranks(
    forks: Servers,
    reference: list[Reference],
    *,
    kills: int,
    seed: int,
    waits: Waits | None = None,
    only: int | None = None,
) -> Tally:
    """SIGKILL to either process, by turns at a random moment and before a random file-changing call of its own.

    Then the other one ends within a minute and names it, what can be resumed from is whole, no process is left, and
    the run that goes on ends as one that was never broken off.

    Args:
        forks: run the processes.
        reference: how each of them ends without faults.
        kills: at least so many, in as many runs as that takes.
        seed: of all draws.
        waits: gets the seconds that the other one took to end.
        only: replay this run alone.
    """
    tally, number = Tally(), 0 if only is None else only
    while sum(tally.counts[verdict] for verdict in _KILLED) < kills and len(tally.failures) < 10:
        random = Random(f"ranks {seed} {number}")
        with workspace() as root:
            tally.add(_until_done(forks, reference, random, f"ranks/{TOGETHER.name}/{number}", root, waits or Waits()))
        number += 1
        if only is not None:
            break
    return tally


def _until_done(
    forks: Servers, reference: list[Reference], random: Random, name: str, root: Path, waits: Waits
) -> Tally:
    tally, saved, workers = Tally(), 0, random.randint(0, 1)
    while True:
        victim = random.choice(_RANKS)
        plan = _plan(random, reference[victim])
        plans = [plan if rank == victim else Plan(trace=False, limit=2 * _SECONDS) for rank in _RANKS]
        ended = _run(forks, root, plans, workers=workers)
        killed, survivor = ended.outcomes[victim], ended.outcomes[1 - victim]
        where = f"{name} (process {victim}, {', '.join(killed.hits) or f'{plan.after:.3f} s'})"
        problems = _check_processes(ended)
        if killed.code != -plan.signal:
            for own, outcome in zip(reference, ended.outcomes, strict=True):
                # After a kill between the last save and the removal of an older one that stays, until the next save.
                but = "checkpoints" if outcome.told("resumed") == [max(reference[0].losses)] else ""
                problems = problems or check_end(own, outcome, saved=saved, but=but)
            tally.note(where, problems, "finished")
            return tally
        seconds = ended.moments[1 - victim] - ended.moments[victim]
        (waits.training if survivor.told("resumed") else waits.starting).append(seconds)
        for own, outcome in zip(reference, ended.outcomes, strict=True):
            problems = problems or check_losses(own, outcome) or _check_resumed(outcome, saved)
        saved = max(saved, ended.saved)
        problems = problems or _check_survivor(survivor, victim, seconds) or _damage(root / "run", saved)
        tally.note(where, problems, _KILLED[bool(killed.hits)])
        if problems:
            return tally


def partings(forks: Servers, *, number: int) -> list[str]:
    """Let processes destroy their group at the worst moment, and say what is wrong with their ends."""
    found = []
    for _ in range(number):
        with workspace() as root:
            ended = _run(forks, root, [Plan(trace=False, limit=20.0)] * WORLD, case=_PARTING)
        bad = [outcome for outcome in ended.outcomes if outcome.code or outcome.told("final") != ["parted"]]
        found += [f"code {outcome.code}, hung: {outcome.is_hung}\n{outcome.stderr}" for outcome in bad]
    return found


def _plan(random: Random, reference: Reference) -> Plan:
    after = random.uniform(0.002, reference.seconds)
    # Half of them in the end of the last save, which no other one follows that would remove what it leaves.
    first = 1 if random.random() < 0.5 else max(1, reference.calls - _LAST_CALLS)
    at = random.randint(first, reference.calls)
    is_timed = random.random() < 0.5
    return Plan(
        trace=not is_timed,
        after=after * is_timed,
        at=at * (not is_timed),
        leave_children=True,
        limit=2 * _SECONDS,
    )


def _run(forks: Servers, root: Path, plans: list[Plan], *, workers: int = 0, case: Case = TOGETHER) -> Ended:
    """Start all processes at once on ``root``/run."""
    outcomes = [Outcome() for _ in plans]
    moments = [0.0 for _ in plans]
    port = _free_port()

    def run(rank: int) -> None:
        arguments = {"rank": rank, "port": port, "workers": workers}
        outcomes[rank] = replace(case, arguments=arguments).run(forks[rank], root, plans[rank])
        moments[rank] = time.monotonic()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in _RANKS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(moments), "a process could not be started; its error is above"
    return Ended(tuple(outcomes), tuple(moments))


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _check_processes(ended: Ended) -> list[str]:
    """Nothing that they started is left when they are gone, or soon afterwards."""
    sessions = [session for outcome in ended.outcomes for session in outcome.told("process")]
    deadline = time.monotonic() + _SECONDS
    while left := [process for session in sessions for process in members(session)]:
        if time.monotonic() > deadline:
            for session in sessions:
                end_session(session)
            return [f"orphans: {len(left)} processes are left"]
        time.sleep(0.01)
    return []


def _check_resumed(outcome: Outcome, saved: int) -> list[str]:
    resumed = outcome.told("resumed")
    if resumed and resumed[0] < saved:
        return [f"lost: resumed at {resumed[0]}, but {saved} was announced"]
    return []


def _check_survivor(outcome: Outcome, dead: int, seconds: float) -> list[str]:
    if seconds > _SECONDS:
        return [f"slow: ended {seconds:.1f} s after the other process"]
    has_finished = bool(outcome.told("final"))
    if not outcome.code and not has_finished:
        return ["deaf: ended well without having finished"]
    # Before it has begun to train it may still wait for the other one to come.
    if outcome.told("resumed") and not has_finished and f"process {dead} has closed" not in outcome.stderr:
        return [f"unclear: the error does not name process {dead}\n{outcome.stderr}"]
    return []


def _damage(folder: Path, saved: int) -> list[str]:
    """What is wrong with what could be taken for a checkpoint; the newest is not older than one that was announced."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    for path in found:
        lacking = [n for n in (MANIFEST, *(file_name(r, WORLD) for r in _RANKS)) if not (path / n).is_file()]
        if lacking:
            return [f"half: {path.name} lacks {', '.join(lacking)}"]
        try:
            verify(path)
        except CheckpointError as error:
            return [f"half: {error}"]
    newest = int(found[-1].name.partition("-")[2]) if found else 0
    return [f"lost: {saved} was announced, but the newest checkpoint is {newest}"] if newest < saved else []
