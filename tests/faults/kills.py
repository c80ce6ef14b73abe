"""Processes that are ended at a random moment, or before a random file-changing call; started again until done."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from tests.faults.judge import Case, Reference, Tally, announced, check_end, check_losses, losses, workspace
from tests.faults.server import Server
from tests.faults.trap import Plan
from trainkit.io.signals import EXIT_PREEMPTED

_MOST_ATTEMPTS = 1000


def kill(server: Server, case: Case, reference: Reference, *, kills: int, seed: int, only: int | None = None) -> Tally:
    """SIGKILL after a random time, drawn between nothing and the time of a whole run.

    Args:
        server: runs the case.
        case: the program.
        reference: how it ends without faults.
        kills: at least so many kills, in as many runs as that takes.
        seed: of all draws.
        only: replay this run alone.
    """

    def plans(random: Random) -> Iterator[Plan]:
        while True:
            after = random.uniform(0.002, reference.seconds)
            yield Plan(trace=False, after=after, leave_children=random.random() < 0.5)

    return _campaign("kill", server, case, reference, plans, kills=kills, seed=seed, only=only)


def killop(
    server: Server, case: Case, reference: Reference, *, kills: int, seed: int, only: int | None = None
) -> Tally:
    """SIGKILL before a random file-changing call; arguments as for :func:`kill`."""

    def plans(random: Random) -> Iterator[Plan]:
        while True:
            yield Plan(action="kill", at=random.randint(1, reference.calls), leave_children=random.random() < 0.5)

    return _campaign("killop", server, case, reference, plans, kills=kills, seed=seed, only=only)


def sigterm(
    server: Server, case: Case, reference: Reference, *, kills: int, seed: int, only: int | None = None
) -> Tally:
    """SIGTERM at random moments and before random calls, so also in a save: the step is finished and saved, the exit
    code says that the run goes on, and not one step is made again. Arguments as for :func:`kill`."""

    def plans(random: Random) -> Iterator[Plan]:
        while True:
            after, at = random.uniform(0.002, reference.seconds), random.randint(1, reference.calls)
            is_timed = random.random() < 0.5
            yield Plan(signal=signal.SIGTERM, trace=not is_timed, after=after * is_timed, at=at * (not is_timed))

    return _campaign("sigterm", server, case, reference, plans, kills=kills, seed=seed, only=only)


def _campaign(
    name: str,
    server: Server,
    case: Case,
    reference: Reference,
    plans: Callable[[Random], Iterator[Plan]],
    *,
    kills: int,
    seed: int,
    only: int | None,
) -> Tally:
    tally = Tally()
    number = 0 if only is None else only
    while tally.counts["killed"] < kills and len(tally.failures) < 10:
        random = Random(f"{name} {case.name} {seed} {number}")
        with workspace() as root:
            tally.add(_until_done(server, case, reference, plans(random), f"{name}/{case.name}/{number}", root))
        number += 1
        if only is not None:
            break
    return tally


def _until_done(
    server: Server, case: Case, reference: Reference, plans: Iterator[Plan], name: str, root: Path
) -> Tally:
    tally, saved = Tally(), 0
    for attempt, plan in enumerate(plans):
        outcome = case.run(server, root, plan)
        where = f"{name} (attempt {attempt}, {', '.join(outcome.hits) or f'{plan.after:.3f} s'})"
        # Before the program has asked for it, SIGTERM ends a process as it always does.
        if outcome.code not in (-plan.signal, EXIT_PREEMPTED):
            tally.note(where, check_end(reference, outcome, saved=saved), "finished")
            return tally
        problems = check_losses(reference, outcome)
        resumed = outcome.told("resumed")
        if not problems and resumed and resumed[0] < saved:
            problems = [f"lost: resumed at {resumed[0]}, but {saved} was announced"]
        saved = max(saved, announced(outcome))
        if not problems and outcome.code == EXIT_PREEMPTED and saved < max(losses(outcome), default=0):
            problems = [f"lost: stopped at step {max(losses(outcome))}, but {saved} was announced"]
        tally.note(where, problems, "killed")
        if problems or attempt == _MOST_ATTEMPTS:
            return tally
    return tally
