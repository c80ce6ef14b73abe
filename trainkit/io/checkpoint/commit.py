"""A checkpoint is there whole or not at all: the order in which it is written.

A new folder beside the others; every file written and flushed, the manifest last; the folder flushed; renamed to
its final name; the folder that holds it flushed. Only then it is announced, and only then older ones are removed.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from trainkit.io.checkpoint import files, lock
from trainkit.io.checkpoint.format import MANIFEST
from trainkit.io.checkpoint.manifest import FileRecord

STAGING = ".staging-"
TRASH = ".trash-"
_LEFT = re.compile(r"\.(staging|trash)-[0-9a-f]{16}")

Contents = Mapping[str, Iterable[files.Buffer]]
"""The parts of every file, by its name."""


Finish = Callable[[dict[str, FileRecord]], bytes]
"""The content of the manifest, from what was written."""


def commit(folder: int, name: str, contents: Contents, finish: Finish, *, own: bool) -> str | None:
    """Write a checkpoint. It is durable under its name when this returns.

    Args:
        folder: the open folder of the run, whose lock the caller has.
        name: of the checkpoint.
        contents: of the files beside the manifest.
        finish: gives the manifest, which is written last.
        own: whether what has that name already is an older checkpoint of this run, which may be deleted.

    Returns: the name that the older one has now, if there was one.

    Raises: OSError; nothing has changed then, with two exceptions. An error of the very last flush leaves the new
        checkpoint where it is, unannounced. Without an exchange of names, an error between the two renames leaves the
        older one under the name that was meant for it when there are two, where it still counts as a checkpoint.
    """
    staging = f"{STAGING}{secrets.token_hex(8)}"
    try:
        with _made(folder, staging) as (fd, mode), lock.occupied(staging, below=folder):
            written = {file: files.write_new(fd, file, parts) for file, parts in contents.items()}
            files.write_new(fd, MANIFEST, [finish(written)])
            os.fchmod(fd, mode)
            os.fsync(fd)
            replaced = publish(folder, staging, name, own=own)
    except BaseException:
        _discard(folder, staging)
        raise
    os.fsync(folder)
    return replaced


@contextmanager
def _made(folder: int, name: str) -> Iterator[tuple[int, int]]:
    """A new folder that nobody else may enter, open, and the mode that it is to have in the end."""
    os.mkdir(name, dir_fd=folder)
    with files.opened(name, below=folder) as fd:
        # What the umask and the folder above made of it: asking for the umask would change it for other threads.
        mode = stat.S_IMODE(os.fstat(fd).st_mode)
        os.fchmod(fd, 0o700)
        yield fd, mode


def publish(folder: int, staging: str, name: str, *, own: bool) -> str | None:
    """Give a filled and flushed folder its name. The caller flushes the folder that holds it.

    Args: as for :func:`commit`; ``staging`` is the name that it has.

    Returns: the name that what stood there has now, if there was something.
    """
    if not files.exists(folder, name):
        files.rename(folder, staging, name)
        return None
    if own and files.exchange(folder, staging, name):
        return staging
    # Under this name it still counts as a checkpoint, should the process end between the two calls.
    replaced = f"{name}.replaced-{secrets.token_hex(8)}"
    files.rename(folder, name, replaced)
    files.rename(folder, staging, name)
    return replaced


def _discard(folder: int, name: str) -> None:
    try:
        files.remove_tree(folder, name)
    except OSError:
        # The error that led here is the one to report, and the next start removes what is left.
        return


def remove(folder: int, names: Iterable[str]) -> None:
    """Delete checkpoints. A kill on the way leaves each whole under its name, or under one that the next start removes.

    Raises: OSError for the first one that cannot be deleted.
    """
    trash = []
    for name in names:
        trash.append(f"{TRASH}{secrets.token_hex(8)}")
        files.rename(folder, name, trash[-1])
    if trash:
        # Otherwise a power cut might leave the old name with half of the files.
        os.fsync(folder)
    for name in trash:
        files.remove_tree(folder, name)


def remove_leftovers(folder: int, path: Path) -> list[str]:
    """Delete what writers that died have left in an open folder, and nothing that a living one fills.

    Args:
        folder: open.
        path: of it, for error messages.

    Returns: a text for each one that could not be deleted.
    """
    left = [name for name in os.listdir(folder) if _LEFT.fullmatch(name) and not lock.is_occupied(folder, name)]
    if not left:
        return []
    # One of them may be what a checkpoint was exchanged for by a rename that is not on the disk yet.
    os.fsync(folder)
    problems = []
    for name in left:
        try:
            files.remove_tree(folder, name)
        except OSError as error:
            problems.append(f"{path / name}: left by an interrupted save and cannot be deleted: {error.strerror}")
    return problems
