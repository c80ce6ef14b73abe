"""Small savers of a counter, one right and the others wrong in a known way: what the harness must tell apart.

A run adds up squares, ``steps`` of them, and saves the sum ``every`` so many steps. No torch, so that it takes
milliseconds.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

from tests.faults.trap import Emit

_SIZE = 3000


def count(emit: Emit, *, folder: str, steps: int = 12, every: int = 3, flaw: str = "") -> None:
    """Count, resume from the newest good file, say everything that a judge wants to know.

    Args:
        emit: tells the supervisor.
        folder: where the saves go.
        steps: where to stop.
        every: steps between saves.
        flaw: the rule that is broken: "in place", "file fsync", "folder fsync", "parent fsync", "early" (announces
            before it is durable), "prune first", "quiet" (errors are swallowed); "" for none.
    """
    base = Path(folder)
    _make(base, flaw)
    for leftover in (*base.glob(".staging*"), *base.glob(".trash*")):
        shutil.rmtree(leftover)
    saved = _newest(base, flaw, emit)
    if flaw != "parent fsync":
        # The newest may have been renamed by a process that died before it was durable, and the older ones go now.
        _sync(base)
    _prune(base, keep=1)
    step, total = (0, 0) if saved is None else (saved["step"], saved["total"])
    emit(resumed=step)
    while step < steps:
        step += 1
        total += step * step
        emit(step=step, loss=total)
        if step % every == 0:
            if flaw == "early":
                emit(saved=step)
            try:
                _save(base, {"step": step, "total": total}, flaw)
            except OSError:
                if flaw != "quiet":
                    raise
            emit(saved=step)
    emit(final={"step": step, "total": total, "files": _contents(base)})


def _make(base: Path, flaw: str) -> None:
    base.mkdir(exist_ok=True)
    if flaw != "parent fsync":
        # Also when it was there: who made it may have died before this.
        _sync(base.parent)


def _text(state: dict[str, Any]) -> bytes:
    body = json.dumps(state).ljust(_SIZE)
    return (hashlib.sha256(body.encode()).hexdigest() + body).encode()


def _save(base: Path, state: dict[str, Any], flaw: str) -> None:
    final = base / f"save-{state['step']:04}"
    if flaw == "prune first":
        _prune(base, keep=0)
    target = final if flaw == "in place" else base / f".staging-{state['step']}"
    target.mkdir()
    with open(target / "state", "wb") as file:
        file.write(_text(state)[: _SIZE // 2])
        file.flush()
        file.write(_text(state)[_SIZE // 2 :])
        file.flush()
        if flaw != "file fsync":
            os.fsync(file.fileno())
    if flaw != "folder fsync":
        _sync(target)
    if target != final:
        target.rename(final)
    if flaw != "parent fsync":
        _sync(base)
    _prune(base, keep=1)


def _prune(base: Path, *, keep: int) -> None:
    saves = sorted(base.glob("save-*"))
    old = [path.rename(base / f".trash-{path.name}") for path in saves[: len(saves) - keep]]
    if old:
        _sync(base)
    for path in old:
        shutil.rmtree(path)


def _newest(base: Path, flaw: str, emit: Emit) -> dict[str, Any] | None:
    saves = sorted(base.glob("save-*"), reverse=True)
    for path in saves:
        try:
            text = (path / "state").read_bytes()
            if hashlib.sha256(text[64:]).hexdigest().encode() != text[:64]:
                raise ValueError("digest")
            state: dict[str, Any] = json.loads(text[64:])
        except (OSError, ValueError) as error:
            problem = f"{path}: {error}"
            emit(warning=problem)
            if flaw == "in place":
                raise
        else:
            return state
    if saves:
        raise ValueError(f"{base}: none of {len(saves)} saves is whole: {problem}")
    return None


def _contents(base: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256((path / "state").read_bytes()).hexdigest() for path in sorted(base.glob("save-*"))
    }


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def calls(emit: Emit, *, folder: str) -> None:
    """One of each file-changing call, some of which fail."""
    base = Path(folder)
    (base / "a").mkdir()
    with open(base / "a/one", "wb") as file:
        file.write(b"x" * 10)
        file.flush()
        os.pwrite(file.fileno(), b"yy", 3)
        os.pwritev(file.fileno(), [b"z", b"w"], 20)
        file.truncate(15)
        os.posix_fallocate(file.fileno(), 0, 30)
    with open(base / "a/one", "ab") as file:
        file.write(b"end")
    os.symlink("a/one", base / "link")
    os.link(base / "a/one", base / "hard")
    os.rename(base / "a", base / "b")
    folder_handle = os.open(base, os.O_RDONLY)
    os.mkdir("c", dir_fd=folder_handle)
    handle = os.open("c/two", os.O_CREAT | os.O_WRONLY, dir_fd=folder_handle)
    os.writev(handle, [b"12", b"34"])
    os.fsync(handle)
    os.close(handle)
    os.close(folder_handle)
    shutil.copyfile(base / "hard", base / "c/three")
    os.chmod(base / "c/three", 0o600)
    (base / "c/three").unlink()
    for failing in (lambda: (base / "c").rmdir(), lambda: (base / "b").mkdir(), lambda: (base / "none").unlink()):
        try:
            failing()
        except OSError as error:
            emit(failed=error.errno)
    (base / "d").mkdir()
    (base / "d").rmdir()


def wait(emit: Emit, *, folder: str) -> None:
    """Never end, and leave a child that does not either."""
    if not os.fork():
        signal.pause()
    signal.pause()
