"""Fault campaigns from the command line.

    python -m tests.faults.crash                                # 300 kills of each kind
    python -m tests.faults.crash --kills 1000 --killops 1000 --seed 0
    python -m tests.faults.crash --all                          # every campaign at the size of a release
    python -m tests.faults.crash --replay killop/map/17 --seed 0

The exit code is 0 if nothing was refused, lost, diverged or hung. Each failure comes with the command that replays it.
"""

from __future__ import annotations

import argparse
import errno
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from queue import SimpleQueue

from tests.faults import damages, failing, fuzz, hostile, interleave, kills, mutations, power, ranks, seccomp, twice
from tests.faults.judge import Case, Reference, Tally, reference
from tests.faults.server import Server

_TRAIN = "tests.faults.programs:train"


def _cases() -> dict[str, Case]:
    found = {}
    for kind in ("map", "stream", "workers"):
        found[kind] = Case(kind, _TRAIN, {"kind": kind})
        # The calls of a run that waits for each save come in the same order each time.
        found[f"{kind}-waiting"] = Case(f"{kind}-waiting", _TRAIN, {"kind": kind, "saves": "waiting"})
    for keep in (1, 2, 3, 100):
        found[f"keep-{keep}"] = Case(f"keep-{keep}", _TRAIN, {"saves": "waiting", "keep": keep})
    found["plain"] = Case("plain", _TRAIN, {"saves": "plain"})
    found["compiled"] = Case("compiled", _TRAIN, {"strategy": "split"})
    found["calls"] = interleave.CALLS
    found["files"] = fuzz.FILES
    found["theirs"] = fuzz.THEIRS
    found["together"] = ranks.TOGETHER
    return found


CASES = _cases()
KINDS = ("map", "stream", "workers")
Job = Callable[[Server, Reference], Tally]


@dataclass(frozen=True)
class Part:
    """A campaign on one case."""

    campaign: str
    case: Case
    job: Callable[[Server], Tally]


def _part(campaign: str, case: Case, job: Job) -> Part:
    return Part(campaign, case, lambda server: job(server, reference(server, case)))


def _ranks_part(*, number: int, seed: int, only: int | None = None) -> Part:
    """The campaign of several processes, which needs servers of its own, and a reference for each rank."""

    def job(_: Server) -> Tally:
        waits = ranks.Waits()
        with ranks.servers() as forks:
            tally = ranks.ranks(forks, ranks.references(forks), kills=number, seed=seed, waits=waits, only=only)
        print(f"ranks: {waits}", flush=True)
        return tally

    return Part("ranks", ranks.TOGETHER, job)


def _case(name: str, mutation: str) -> Case:
    """A case, in which a rule is broken where it trains."""
    case = CASES[name]
    return replace(case, arguments={**case.arguments, "mutation": mutation}) if case.program == _TRAIN else case


def parts(sizes: argparse.Namespace) -> list[Part]:
    """What was asked for, the longest campaigns first."""
    found: list[Part] = []
    seed = sizes.seed

    def add(campaign: str, name: str, job: Callable[..., Tally], **options: object) -> None:
        case = _case(name, sizes.mutation)
        found.append(_part(campaign, case, lambda server, ref: job(server, case, ref, **options)))

    def share(number: int, of: int) -> int:
        return -(-number // of)

    if sizes.ranks:
        found.append(_ranks_part(number=sizes.ranks, seed=seed))
    for campaign, job, number in (
        ("killop", kills.killop, sizes.killops),
        ("kill", kills.kill, sizes.kills),
        ("sigterm", kills.sigterm, sizes.sigterms),
    ):
        for kind in KINDS if number else ():
            add(campaign, kind, job, kills=share(number, len(KINDS)), seed=seed)
    for name in ("keep-1", "keep-2", "keep-100", "plain") if sizes.states else ():
        add("states", name, power.states, number=share(sizes.states, 4), seed=seed)
    for name in ("keep-1", "plain") if sizes.errnos else ():
        add("errnos", name, failing.errnos, number=share(sizes.errnos, 2), seed=seed)
        add("shorts", name, failing.shorts, number=share(sizes.errnos, 4), seed=seed)
    if sizes.diskfull:
        add("diskfull", "keep-2", failing.diskfull, number=sizes.diskfull, seed=seed)
    if sizes.parts:
        add("parts", "map", kills.parts, number=sizes.parts)
        add("parts", "compiled", kills.parts, number=1, parts=("compile",))
    if sizes.interleavings:
        add("interleavings", "calls", interleave.interleavings, number=sizes.interleavings, seed=seed)
    for i in range(sizes.jobs) if sizes.fuzz else ():
        add(
            "fuzz",
            "files",
            fuzz.fuzz,
            number=share(sizes.fuzz, sizes.jobs),
            first=i * share(sizes.fuzz, sizes.jobs),
            seed=seed,
        )
    if sizes.fuzz:
        add("fuzz", "theirs", fuzz.fuzz, number=share(sizes.fuzz, 10), seed=seed)
    if sizes.damages:
        add("corrupt", "keep-3", damages.corrupt, number=sizes.damages, seed=seed)
    if sizes.once:
        add("clock", "keep-3", damages.clock)
        add("hostile", "keep-3", hostile.hostile)
        for kind in KINDS:
            add("rerun", kind, damages.rerun)
            add("twice", kind, _twice, seed=seed)
    return found


def _twice(server: Server, case: Case, reference: Reference, *, seed: int) -> Tally:
    with Server() as second:
        return twice.twice(server, second, case, reference, number=3, seed=seed)


def replayed(name: str, seed: int, mutation: str = "") -> Part:
    """The campaign of which only one run is made again: ``campaign/case/run``.

    Raises: ValueError for a name that no campaign gives.
    """
    campaign, _, rest = name.partition("/")
    case_name, _, run = rest.partition("/")
    if case_name not in CASES:
        raise ValueError(f"--replay: got {name!r}, expected campaign/case/run with a case among {', '.join(CASES)}")
    if campaign == "ranks":
        return _ranks_part(number=1, seed=seed, only=int(run))
    case = _case(case_name, mutation)
    words = run.split("/")
    jobs: dict[str, Job] = {
        "kill": lambda s, r: kills.kill(s, case, r, kills=1, seed=seed, only=int(run)),
        "killop": lambda s, r: kills.killop(s, case, r, kills=1, seed=seed, only=int(run)),
        "sigterm": lambda s, r: kills.sigterm(s, case, r, kills=1, seed=seed, only=int(run)),
        "parts": lambda s, r: kills.parts(s, case, r, only=(words[0], int(words[1]))),
        "interleavings": lambda s, r: interleave.interleavings(s, case, r, number=1, seed=seed, only=int(run)),
        "fuzz": lambda s, r: fuzz.fuzz(s, case, r, number=1, seed=seed, first=int(run)),
        "states": lambda s, r: power.states(s, case, r, seed=seed, only=(words[0], words[1], int(words[2]))),
        "errnos": lambda s, r: failing.errnos(
            s, case, r, only=(getattr(errno, words[0]), int(words[1].rstrip("+")), words[1].endswith("+"))
        ),
        "shorts": lambda s, r: failing.shorts(s, case, r, only=int(run)),
        "diskfull": lambda s, r: failing.diskfull(s, case, r, number=1, only=int(run)),
        "corrupt": lambda s, r: damages.corrupt(s, case, r, number=1, seed=seed, only=int(run)),
        "clock": lambda s, r: damages.clock(s, case, r),
        "rerun": lambda s, r: damages.rerun(s, case, r),
        "twice": lambda s, r: _twice(s, case, r, seed=seed),
        "hostile": lambda s, r: hostile.hostile(s, case, r, only=run),
    }
    if campaign not in jobs:
        raise ValueError(f"--replay: got {name!r}, expected a campaign among {', '.join(jobs)}, ranks")
    return _part(campaign, case, jobs[campaign])


def run_all(todo: Sequence[Part], *, jobs: int, again: str) -> dict[str, Tally]:
    """Run campaigns, several at a time, each with a server for itself.

    When one is done, a line is printed, and for each failure the command that replays it: ``again`` and its name.
    """
    results: dict[str, Tally] = {}

    def one(part: Part) -> None:
        started = time.monotonic()
        server = idle.get()
        try:
            tally = part.job(server)
        except Exception:
            # The others go on, and what they have found is not lost.
            tally = Tally()
            tally.note(f"{part.campaign}/{part.case.name}", [f"crashed: {traceback.format_exc()}"])
        idle.put(server)
        results.setdefault(part.campaign, Tally()).add(tally)
        lines = [f"{part.campaign:13} {part.case.name:10} {time.monotonic() - started:6.1f} s  {tally}"]
        for name, problem in tally.failures:
            lines += [f"\n{name}: {problem}", f"  again: {again} --replay '{name.partition(' (')[0]}'\n"]
        print("\n".join(lines), flush=True)

    jobs = min(jobs, len(todo))
    with ExitStack() as stack:
        idle: SimpleQueue[Server] = SimpleQueue()
        for _ in range(jobs):
            idle.put(stack.enter_context(Server()))
        list(stack.enter_context(ThreadPoolExecutor(jobs)).map(one, todo))
    return results


def report(results: dict[str, Tally]) -> int:
    """Print totals; returns how many failures there are."""
    for campaign, tally in results.items():
        print(f"{campaign:13} total: {tally}")
    failures = sum(len(tally.failures) for tally in results.values())
    print(f"{failures} failures; the commands that replay them are above" if failures else "ok")
    return failures


_ALL = {
    "kills": 1000, "killops": 1000, "sigterms": 100, "parts": 5, "states": 5000, "errnos": 10**6, "diskfull": 100,
    "damages": 1000, "interleavings": 500, "fuzz": 100_000, "ranks": 20,
}  # fmt: skip
"""The sizes of a release."""


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--kills", type=int, default=0, help="SIGKILLs at random moments")
    add("--killops", type=int, default=0, help="SIGKILLs before random file-changing calls")
    add("--sigterms", type=int, default=0, help="stop requests at random moments and before random calls")
    add("--parts", type=int, default=0, help="stop requests in each part of a step and a save, up to 5")
    add("--states", type=int, default=0, help="disk states after a power cut")
    add("--errnos", type=int, default=0, help="calls that fail")
    add("--diskfull", type=int, default=0, help="runs on a disk that fills up (needs the right to mount)")
    add("--damages", type=int, default=0, help="damaged files")
    add("--interleavings", type=int, default=0, help="random orders of calls of a saver")
    add("--fuzz", type=int, default=0, help="mutated files")
    add("--ranks", type=int, default=0, help="SIGKILLs to one of two processes that train together")
    add("--once", action="store_true", help="what is tried once: clock, rerun, two writers, hostile files")
    add("--all", action="store_true", help="every campaign at the size of a release")
    add("--seed", type=int, default=0, help="of all draws")
    add("--jobs", type=int, default=2, help="campaigns at a time")
    add("--mutation", default="", choices=mutations.MUTATIONS, metavar="RULE", help="break a rule, to see it noticed")
    add("--replay", default="", help="one run by its name, as a failure prints it")
    found = parser.parse_args(words)
    if found.all:
        vars(found).update(_ALL, once=True)
    elif not (found.replay or found.once or any(getattr(found, name) for name in _ALL)):
        vars(found).update(kills=300, killops=300)
    return found


def main(words: Sequence[str] | None = None) -> int:
    chosen = arguments(words)
    if reason := seccomp.why_not():
        print(f"system calls cannot be stopped here: {reason}")
        return 2
    todo = [replayed(chosen.replay, chosen.seed, chosen.mutation)] if chosen.replay else parts(chosen)
    again = f"python -m tests.faults.crash --seed {chosen.seed}"
    again += f" --mutation '{chosen.mutation}'" if chosen.mutation else ""
    return 1 if report(run_all(todo, jobs=chosen.jobs, again=again)) else 0


if __name__ == "__main__":
    sys.exit(main())
