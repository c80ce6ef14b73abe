"""Files that are damaged behind a run's back: it goes back to an older checkpoint, or stops, and names the file."""

from __future__ import annotations

import math
import os
from itertools import count, permutations
from pathlib import Path
from random import Random

from tests.faults.disk import Tree, plant, snapshot
from tests.faults.judge import Case, Reference, Tally, announced, check_end, check_losses, workspace
from tests.faults.server import Server
from tests.faults.trap import Outcome, Plan

KINDS = ("empty", "truncate", "flip", "zero", "append", "swap", "exchange", "delete", "link", "folder", "add")


def corrupt(
    server: Server, case: Case, reference: Reference, *, number: int, seed: int = 0, only: int | None = None
) -> Tally:
    """Damage one file of the newest checkpoint, or of all of them, and start the run again.

    Args:
        server: runs the case; it must keep at least 2 checkpoints.
        case: the program.
        reference: how it ends without faults.
        number: how many damages; they go through all files and kinds before one comes twice.
        seed: of all draws.
        only: replay one damage alone.
    """
    tally = Tally()
    whole, saved = stopped_run(server, case, reference)
    folders = saves_in(whole)
    assert len(folders) >= 2, f"{case.name}: has {folders}, expected two to choose from"
    files = sorted(path.rpartition("/")[2] for path in whole if path.startswith(folders[-1] + "/"))
    table = [(file, kind, False) for kind in KINDS for file in files]
    # The file that is put in all places is right in its own.
    table += [(file, kind, True) for kind in KINDS if kind != "exchange" for file in files]
    stride = next(n for n in count(5) if math.gcd(n, len(table)) == 1)
    for i in range(number) if only is None else [only]:
        # In strides, so that a few go through all kinds; the stride has no factor in common with the table's length.
        file, kind, everywhere = table[i * stride % len(table)]
        random = Random(f"corrupt {case.name} {seed} {i}")
        tree = dict(whole)
        for folder in folders if everywhere else folders[-1:]:
            damage(tree, folder, file, kind, random, folders[0])
        name = f"corrupt/{case.name}/{i} ({kind} {file}{' in all' if everywhere else ''})"
        with workspace() as root:
            plant(tree, root)
            outcome = case.run(server, root, Plan(trace=False))
            harmless = tree == whole or kind == "add"
            named = f"{folders[-1]}/" + ("" if kind == "swap" else file)
            verdict, problems = _judge(reference, outcome, saved, named, harmless=harmless, hopeless=everywhere)
            tally.note(name, problems, verdict)
    return tally


def stopped_run(server: Server, case: Case, reference: Reference) -> tuple[Tree, int]:
    """What a run leaves that was killed in its second half, and the newest step that it announced."""
    with workspace() as root:
        outcome = case.run(server, root, Plan(action="kill", at=reference.calls * 3 // 4))
        again = case.run(server, root, Plan(action="kill", at=4))
        assert not check_losses(reference, again)
        return snapshot(root), announced(outcome)


def saves_in(tree: Tree) -> list[str]:
    """The checkpoints in a tree, oldest first."""
    folders = [path for path, content in tree.items() if content is None]
    found = [path for path in folders if path.rpartition("/")[2].startswith("checkpoint-")]
    return sorted(found, key=lambda path: int(path.rpartition("-")[2]))


def damage(tree: Tree, folder: str, file: str, kind: str, random: Random, other: str) -> None:
    """Damage one file of a tree.

    Args:
        tree: is changed.
        folder: of the checkpoint.
        file: in it.
        kind: one of ``KINDS``.
        random: where and how much.
        other: the checkpoint whose file of that name is put in its place ("exchange").
    """
    path = f"{folder}/{file}"
    content = tree[path]
    assert isinstance(content, bytes)
    at = random.randrange(len(content))
    if kind == "flip":
        flipped = content[at] ^ 1 << random.randrange(8)
        tree[path] = content[:at] + bytes([flipped]) + content[at + 1 :]
    elif kind == "zero":
        end = at + random.randint(1, 512)
        tree[path] = content[:at] + bytes(len(content[at:end])) + content[end:]
    elif kind == "swap":
        names = sorted(each for each in tree if each.startswith(folder + "/"))
        second = names[(names.index(path) + 1) % len(names)]
        tree[path], tree[second] = tree[second], content
    elif kind == "exchange":
        tree[path] = tree[f"{other}/{file}"]
    elif kind == "delete":
        del tree[path]
    elif kind == "link":
        tree[folder + "/elsewhere"] = content
        tree[path] = "elsewhere"
    elif kind == "folder":
        tree[path] = None
    elif kind == "add":
        tree[folder + "/more.safetensors"] = content
    else:
        tree[path] = {"empty": b"", "truncate": content[:at], "append": content + random.randbytes(at + 1)}[kind]


def _judge(
    reference: Reference, outcome: Outcome, saved: int, named: str, *, harmless: bool, hopeless: bool
) -> tuple[str, list[str]]:
    if harmless:
        return "harmless", check_end(reference, outcome, saved=saved)
    if hopeless:
        problems = check_losses(reference, outcome)
        if not problems and outcome.code == 0:
            problems = [f"silent: started at {outcome.told('resumed')} though nothing is whole"]
        if not problems and named not in outcome.stderr:
            problems = [f"unclear: the error does not name {named}\n{outcome.stderr}"]
        return "refused", problems
    problems = check_end(reference, outcome)
    if not problems and not 0 < outcome.told("resumed")[0] < saved:
        problems = [f"silent: resumed at {outcome.told('resumed')[0]}, {saved} is damaged"]
    if not problems and not any(named in warning for warning in outcome.told("warning")):
        problems = [f"unclear: no warning names {named}: {outcome.told('warning')}"]
    return "fell back", problems


def clock(server: Server, case: Case, reference: Reference) -> Tally:
    """Give checkpoints every order of modification times; the newest is the one of the highest step all the same."""
    tally = Tally()
    whole, saved = stopped_run(server, case, reference)
    folders = saves_in(whole)
    for order in permutations(range(len(folders))):
        with workspace() as root:
            plant(whole, root)
            for folder, place in zip(folders, order, strict=True):
                for path in [*(root / folder).iterdir(), root / folder]:
                    os.utime(path, (10**9 + place, 10**9 + place))
            outcome = case.run(server, root, Plan(trace=False))
            tally.note(f"clock/{case.name}/{order}", check_end(reference, outcome, saved=saved), "ok")
    return tally


def rerun(server: Server, case: Case, reference: Reference) -> Tally:
    """Start a finished run again: no step, no file changed."""
    tally = Tally()
    with workspace() as root:
        problems = check_end(reference, case.run(server, root))
        before = _without_lock(root)
        for _ in range(2):
            outcome = case.run(server, root)
            problems = problems or check_end(reference, outcome, saved=max(reference.losses))
            if not problems and outcome.told("step"):
                problems = [f"past the end: trained steps {outcome.told('step')} again"]
            if not problems and _without_lock(root) != before:
                problems = ["changed: the files of a finished run are others"]
            tally.note(f"rerun/{case.name}", problems)
    return tally


def _without_lock(root: Path) -> Tree:
    return {path: content for path, content in snapshot(root).items() if not path.endswith("/.lock")}
