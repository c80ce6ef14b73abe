"""Processes that are ended at a random moment, or before a random file-changing call; started again until done."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

from tests.faults.judge import Case, Reference, Tally, announced, check_end, check_losses, losses, workspace
from tests.faults.programs import PARTS
from tests.faults.server import Server
from tests.faults.trap import Plan
from trainkit.io.signals import EXIT_PREEMPTED

_MOST_ATTEMPTS = 1000
_SECONDS = 3.0
"""From a stop request to the end of a process whose steps and saves take milliseconds."""


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


def parts(
    server: Server,
    case: Case,
    reference: Reference,
    *,
    number: int = 1,
    only: tuple[str, int] | None = None,
    parts: tuple[str, ...] = (*PARTS[1:], "save"),
) -> Tally:
    """SIGTERM in each part of a step, in evaluations and in saves: the step that runs is the last, and it is saved.

    Args:
        server: runs the case.
        case: the program.
        reference: how it ends without faults.
        number: how often in each part: when it comes for the first time, for the second, ...; less often than the run
            evaluates, since a request in its last step finds it finished.
        only: replay one alone: the part and the time.
        parts: which; also "compile", with a step of other bits, whose reference is that of a compiled case.
    """
    tally = Tally()
    for part in parts if only is None else only[:1]:
        for at in range(1, number + 1) if only is None else only[1:]:
            with workspace() as root:
                tally.add(_stopped_in(server, case, reference, part, at, root))
    return tally


def _stopped_in(server: Server, case: Case, reference: Reference, part: str, at: int, root: Path) -> Tally:
    tally, name = Tally(), f"parts/{case.name}/{part}/{at}"
    if part == "save":
        # Again and again, as some schedulers do.
        outcome = case.run(server, root, Plan(signal=signal.SIGTERM, at=at, kinds=("fsync",), is_sticky=True))
        later = outcome.told("step")
    else:
        asking = replace(case, arguments={**case.arguments, "stop_in": part, "stop_at": at})
        outcome = asking.run(server, root, Plan(trace=False))
        asked = next((i for i, message in enumerate(outcome.messages) if "asked" in message), None)
        if asked is None:
            tally.note(name, [f"unasked: {part} did not come {at} times\n{outcome.stderr}"])
            return tally
        later = [message["step"] for message in outcome.messages[asked:] if "step" in message]
    saved, last = announced(outcome), max(losses(outcome), default=0)
    problems = check_losses(reference, outcome)
    if not problems and outcome.code != EXIT_PREEMPTED:
        problems = [f"refused: code {outcome.code}\n{outcome.stderr}"]
    if not problems and part != "save" and len(later) > 1:
        problems = [f"late: steps {later} came after the request"]
    if not problems and saved != last:
        problems = [f"lost: stopped at step {last}, but {saved} was announced"]
    tally.note(name, problems or check_end(reference, case.run(server, root, Plan(trace=False)), saved=saved), "ok")
    return tally


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
        if not problems and plan.after and outcome.code == EXIT_PREEMPTED and outcome.seconds > plan.after + _SECONDS:
            problems = [f"slow: ended {outcome.seconds - plan.after:.1f} s after the request"]
        tally.note(where, problems, "killed")
        if problems or attempt == _MOST_ATTEMPTS:
            return tally
    return tally
