"""Two runs on one folder: the second is refused and told by whom; when the first is dead, the second goes on."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from random import Random

from tests.faults.judge import Case, Reference, Tally, announced, check_end, check_losses, workspace
from tests.faults.server import Server
from tests.faults.trap import Outcome, Plan

_PAUSE = 0.1


def twice(first: Server, second: Server, case: Case, reference: Reference, *, number: int = 1, seed: int = 0) -> Tally:
    """Start a second run while one is going on, end the first one with SIGKILL, start the second again.

    Args:
        first: runs the first one.
        second: runs the second one.
        case: the program.
        reference: how it ends without faults.
        number: how often.
        seed: of the time of the kill.
    """
    tally = Tally()
    slow = replace(case, arguments={**case.arguments, "pause": _PAUSE})
    random = Random(f"twice {case.name} {seed}")
    with workspace() as root:
        # Its server may still be importing, while the first run would already be over.
        assert case.run(second, root, Plan(trace=False)).code == 0
    for i in range(number):
        with workspace() as root:
            plan = Plan(trace=False, after=random.uniform(5 * _PAUSE, 9 * _PAUSE))
            owner = _InThread(first, slow, root, plan)
            _wait_for(root / "run/.lock")
            refused = case.run(second, root, Plan(trace=False))
            killed = owner.result()
            problems = check_losses(reference, killed) or _check_refused(refused, killed)
            tally.note(f"twice/{case.name}/{i} (second writer)", problems, "refused")
            again = case.run(second, root, Plan(trace=False))
            problems = check_end(reference, again, saved=announced(killed))
            tally.note(f"twice/{case.name}/{i} (dead owner)", problems, "taken over")
    return tally


def _check_refused(refused: Outcome, owner: Outcome) -> list[str]:
    if owner.code != -9:
        return [f"the first run did not live long enough: {owner}"]
    if not refused.code:
        return ["allowed: a second run wrote to the folder of a living one"]
    name = f"process {owner.told('process')[0]} "
    if name not in refused.stderr:
        return [f"unclear: the error does not say {name!r}\n{refused.stderr}"]
    return [f"slow: refused after {refused.seconds:.1f} s"] if refused.seconds > 1 else []


def _wait_for(lock: Path) -> None:
    for _ in range(2000):
        if lock.exists() and lock.stat().st_size:
            return
        time.sleep(0.005)
    raise TimeoutError(f"{lock} was not made in 10 seconds")


class _InThread:
    """A run that goes on while others are started."""

    def __init__(self, server: Server, case: Case, root: Path, plan: Plan) -> None:
        self._outcome: Outcome | None = None
        self._thread = threading.Thread(target=self._run, args=(server, case, root, plan))
        self._thread.start()

    def _run(self, server: Server, case: Case, root: Path, plan: Plan) -> None:
        self._outcome = case.run(server, root, plan)

    def result(self) -> Outcome:
        self._thread.join()
        assert self._outcome is not None, "the run in the thread failed"
        return self._outcome
