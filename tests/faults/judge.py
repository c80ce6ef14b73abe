"""Whether a run that met faults went as one that met none: every loss, the end, and nothing announced is lost."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.faults.server import Server
from tests.faults.trap import Outcome, Plan

_FAST = Path("/dev/shm")


@dataclass(frozen=True)
class Case:
    """What is run: a program of the server and its arguments without ``folder``."""

    name: str
    program: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def run(self, server: Server, root: Path, plan: Plan | None = None) -> Outcome:
        """Start the program on ``root``/run, as often as one likes by the same command."""
        chosen = replace(Plan() if plan is None else plan, root=str(root))
        return server.run(self.program, {**self.arguments, "folder": str(root / "run")}, chosen)


@dataclass(frozen=True)
class Reference:
    """The run that nothing happened to.

    Args:
        losses: by step.
        final: what it told about its end.
        calls: file-changing calls that it made.
        seconds: that it took when nobody watched its calls.
    """

    losses: dict[int, Any]
    final: Any
    calls: int
    seconds: float


def reference(server: Server, case: Case) -> Reference:
    """Run a case without faults, twice.

    Raises: AssertionError if the runs fail or differ: then nothing could be compared with them.
    """
    found = []
    for trace in (True, False):
        with workspace() as root:
            outcome = case.run(server, root, Plan(trace=trace))
            assert outcome.code == 0, f"{case.name}: the run without faults failed\n{outcome.stderr}"
            assert not outcome.blind, f"{case.name}: {outcome.blind[0]} cannot be watched"
            found.append(Reference(losses(outcome), outcome.told("final")[0], outcome.calls, outcome.seconds))
    first, second = found
    assert first.losses == second.losses, f"{case.name}: two runs without faults differ in their losses"
    assert first.final == second.final, f"{case.name}: two runs without faults end differently"
    return replace(first, seconds=second.seconds)


def losses(outcome: Outcome) -> dict[int, Any]:
    """The losses that a run told, by step."""
    return {message["step"]: message["loss"] for message in outcome.messages if "step" in message}


def announced(outcome: Outcome, before_call: int | None = None) -> int:
    """The newest step that a run called saved; with ``before_call``, by the time of that call."""
    told = [m["saved"] for m in outcome.messages if "saved" in m and (before_call is None or m["at"] < before_call)]
    return max(told, default=0)


def check_losses(reference: Reference, outcome: Outcome) -> list[str]:
    """What is wrong with the steps of any attempt, faulted or not."""
    if outcome.is_hung:
        return ["hung"]
    for step, loss in losses(outcome).items():
        if step not in reference.losses:
            return [f"past the end: step {step}"]
        if loss != reference.losses[step]:
            return [f"diverged: loss {loss} at step {step}, expected {reference.losses[step]}"]
    return []


def check_end(reference: Reference, outcome: Outcome, *, saved: int = 0, but: str = "") -> list[str]:
    """What is wrong with an attempt that ought to have come to its end.

    Args:
        reference: the run to equal.
        outcome: of the attempt.
        saved: the newest step that was announced before; the attempt may not start below it.
        but: a part of the end that may differ.
    """
    problems = check_losses(reference, outcome)
    if not problems and outcome.code:
        problems = [f"refused: code {outcome.code}\n{outcome.stderr}"]
    if not problems and outcome.told("resumed")[0] < saved:
        problems = [f"lost: resumed at {outcome.told('resumed')[0]}, but {saved} was announced"]
    if not problems:
        final = outcome.told("final")[0]
        wrong = [key for key in reference.final if key != but and final[key] != reference.final[key]]
        problems = [f"diverged: the end differs in {', '.join(wrong)}"] if wrong else []
    return problems


@dataclass
class Tally:
    """What a campaign found.

    Args:
        counts: attempts by what became of them.
        failures: what went wrong, each with the name of the run that it can be replayed by.
    """

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[str, str]] = field(default_factory=list)

    def note(self, name: str, problems: list[str], verdict: str = "ok") -> None:
        """One attempt's verdict: ``verdict``, or the first word of its first problem."""
        self.counts[problems[0].partition(":")[0] if problems else verdict] += 1
        self.failures += [(name, problem) for problem in problems]

    def add(self, other: Tally) -> None:
        self.counts += other.counts
        self.failures += other.failures

    def __str__(self) -> str:
        return ", ".join(f"{count} {verdict}" for verdict, count in sorted(self.counts.items()))


@contextmanager
def workspace() -> Iterator[Path]:
    """An empty folder, in memory where there is such a file system, removed afterwards."""
    base = _FAST if _FAST.is_dir() and shutil.disk_usage(_FAST).free > 1 << 28 else None
    root = Path(tempfile.mkdtemp(prefix="faults-", dir=base)).resolve()
    try:
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)
