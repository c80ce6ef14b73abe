"""Calls that fail: any errno at any call, a disk that is really full."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

from tests.faults.disk import Tree, plant, snapshot
from tests.faults.judge import Case, Reference, Tally, announced, check_end, check_losses, workspace
from tests.faults.server import Server
from tests.faults.trap import Plan

_TAKES_SPACE = ("open", "write", "truncate", "allocate", "mkdir", "link", "symlink", "rename", "fsync")
# What can fail with an errno; empty for every call.
CODES: dict[int, tuple[str, ...]] = {
    errno.ENOSPC: _TAKES_SPACE,
    errno.EDQUOT: _TAKES_SPACE,
    errno.EIO: (),
    errno.EROFS: ("open", "mkdir", "link", "symlink", "rename", "unlink", "rmdir", "chmod", "truncate"),
    errno.EMFILE: ("open",),
}


def errnos(
    server: Server,
    case: Case,
    reference: Reference,
    *,
    number: int | None = None,
    seed: int = 0,
    codes: tuple[int, ...] = tuple(CODES),
    only: tuple[int, int, bool] | None = None,
) -> Tally:
    """Let call n fail, once or from then on, in a run that resumes; then start it again without faults.

    The run has to fail with the errno in its message, or to end as if nothing had happened. Nothing that was announced
    may be lost.

    Args:
        server: runs the case.
        case: the program.
        reference: how it ends without faults.
        number: how many points, drawn from all; None for all of them.
        seed: of the draws.
        codes: which errnos.
        only: replay one point alone: (errno, call, sticky).
    """
    tally = Tally()
    with workspace() as root:
        saved = announced(case.run(server, root, Plan(action="kill", at=reference.calls // 2)))
        before = snapshot(root)
    points = []
    for code in codes:
        with workspace() as root:
            plant(before, root)
            calls = case.run(server, root, _plan(code, 0, False)).calls
        points += [(code, call, is_sticky) for call in range(1, calls + 1) for is_sticky in (False, True)]
    if number is not None:
        points = Random(f"errnos {case.name} {seed}").sample(points, min(number, len(points)))
    for code, call, is_sticky in points if only is None else [only]:
        plan = _plan(code, call, is_sticky)
        _one(server, case, reference, before, saved, plan, tally)
    return tally


def shorts(
    server: Server,
    case: Case,
    reference: Reference,
    *,
    number: int | None = None,
    seed: int = 0,
    only: int | None = None,
) -> Tally:
    """Let write n take only half of its bytes, as write(2) may: nobody may notice."""
    tally = Tally()
    with workspace() as root:
        calls = case.run(server, root, Plan(kinds=("write",))).calls
    chosen = list(range(1, calls + 1))
    if number is not None:
        chosen = Random(f"shorts {case.name} {seed}").sample(chosen, min(number, calls))
    for call in chosen if only is None else [only]:
        with workspace() as root:
            outcome = case.run(server, root, Plan(action="short", at=call, kinds=("write",)))
            tally.note(f"shorts/{case.name}/{call} ({outcome.hits})", check_end(reference, outcome), "ok")
    return tally


def _plan(code: int, call: int, is_sticky: bool) -> Plan:
    reads = code == errno.EMFILE
    return Plan(action="errno", code=code, at=call, is_sticky=is_sticky, kinds=CODES[code], reads=reads)


def _one(server: Server, case: Case, reference: Reference, before: Tree, saved: int, plan: Plan, tally: Tally) -> None:
    with workspace() as root:
        plant(before, root)
        outcome = case.run(server, root, plan)
        name = f"errnos/{case.name}/{errno.errorcode[plan.code]}/{plan.at}{'+' if plan.is_sticky else ''}"
        name = f"{name} ({', '.join(outcome.hits[:1])})"
        if outcome.code == 0:
            # What could not be deleted is left to the next start.
            problems, verdict = check_end(reference, outcome, but="leftovers"), "went on"
        else:
            problems, verdict = check_losses(reference, outcome), "failed loudly"
            if not problems and os.strerror(plan.code) not in outcome.stderr:
                problems = [f"unclear: {os.strerror(plan.code)!r} is not in the message\n{outcome.stderr}"]
        saved = max(saved, announced(outcome))
        again = case.run(server, root, Plan(trace=False))
        tally.note(name, problems or check_end(reference, again, saved=saved), verdict)


def diskfull(
    server: Server, case: Case, reference: Reference, *, number: int, seed: int = 0, only: int | None = None
) -> Tally:
    """Run on a small tmpfs that fills up; make room; go on.

    Raises: PermissionError where file systems cannot be mounted.
    """
    tally = Tally()
    with workspace() as root:
        assert case.run(server, root).code == 0
        needed = sum(os.lstat(path).st_blocks * 512 for path in root.rglob("*"))
    random = Random(f"diskfull {case.name} {seed}")
    for _ in range(number):
        size = random.randrange(needed // 8, needed * 3 // 2) if only is None else only
        with workspace() as base, _small_disk(base, size) as root:
            outcome = case.run(server, root, Plan(trace=False))
            name = f"diskfull/{case.name}/{size}"
            if outcome.code == 0:
                tally.note(name, check_end(reference, outcome), "fitted")
                continue
            problems = check_losses(reference, outcome)
            if not problems and os.strerror(errno.ENOSPC) not in outcome.stderr:
                problems = [f"unclear: the message does not say that the disk is full\n{outcome.stderr}"]
            _mount(root, "-o", f"remount,size={needed * 8}")
            again = case.run(server, root, Plan(trace=False))
            tally.note(name, problems or check_end(reference, again, saved=announced(outcome)), "filled up")
    return tally


@contextmanager
def _small_disk(base: Path, size: int) -> Iterator[Path]:
    root = base / "disk"
    root.mkdir()
    _mount(root, "-t", "tmpfs", "-o", f"size={size}", "tmpfs")
    try:
        yield root
    finally:
        subprocess.run(["umount", str(root)], check=True)


def _mount(root: Path, *options: str) -> None:
    done = subprocess.run(["mount", *options, str(root)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise PermissionError(done.returncode, f"mount: {done.stderr.strip()}")
