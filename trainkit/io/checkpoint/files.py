"""Files below an open folder: created new, flushed, never through a link.

All names are relative to a descriptor of their folder, so that nobody can exchange a folder on the way.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash

from trainkit.io.checkpoint.errors import CheckpointError, DamageError
from trainkit.io.checkpoint.manifest import FileRecord
from trainkit.io.checkpoint.tensors import CHUNK

Buffer = bytes | memoryview
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NOT_WHOLE = {errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.ESTALE, errno.EISDIR}
"""Errors of a file, as opposed to those of this process or its rights."""
_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}
_RENAME_EXCHANGE = 2


@contextmanager
def opened(path: str | Path, *, below: int | None = None) -> Iterator[int]:
    """A scope with the descriptor of a folder. Below another one a link is refused; a path of the user's may be one."""
    fd = os.open(path, _DIRECTORY | (0 if below is None else os.O_NOFOLLOW), dir_fd=below)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def regular(folder: int, name: str, what: str) -> Iterator[tuple[int, int]]:
    """A scope with the descriptor and the size of a regular file.

    Raises: DamageError if it is missing, a link, or something else than a file; CheckpointError if it may not be read.
    """
    with reading(what):
        # A pipe would make the call wait for somebody to write into it.
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise DamageError(f"{what}: is no regular file")
        with reading(what):
            yield fd, info.st_size
    finally:
        os.close(fd)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """A scope that turns errors of the system into those of a checkpoint, which name the file."""
    try:
        yield
    except OSError as error:
        cause = "is a link" if error.errno == errno.ELOOP else f"cannot be read: {error.strerror} (errno {error.errno})"
        kind = DamageError if error.errno in _NOT_WHOLE else CheckpointError
        raise kind(f"{what}: {cause}") from error


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """A scope that turns errors of the system into a CheckpointError with path and cause."""
    try:
        yield
    except OSError as error:
        where = folder if error.filename is None else f"{folder} ({error.filename})"
        raise CheckpointError(f"{where}: cannot save: {error.strerror} (errno {error.errno})") from error


def read_small(folder: int, name: str, limit: int, what: str) -> bytes:
    """A regular file of at most ``limit`` bytes."""
    with regular(folder, name, what) as (fd, size):
        if size > limit:
            raise DamageError(f"{what}: has {size} bytes, expected at most {limit}")
        data = b""
        # One more than there should be, should it grow meanwhile.
        while len(data) <= size and (part := os.read(fd, size + 1 - len(data))):
            data += part
        if len(data) != size:
            raise DamageError(f"{what}: changes while it is read")
        return data


def make_folder(path: Path) -> None:
    """Make a folder and those above it on the same disk, each durable in the one that holds it.

    Those that are there already are flushed too: a process that was killed may have made them and have come no further.
    """
    path.mkdir(parents=True, exist_ok=True)
    real = path.resolve()
    disk = real.stat().st_dev
    for above in real.parents:
        if above.stat().st_dev != disk or not os.access(above, os.R_OK):
            # What this process may not read it has not made.
            return
        with opened(above) as fd:
            os.fsync(fd)


def write_new(folder: int, name: str, parts: Iterable[Buffer]) -> FileRecord:
    """Write a file that did not exist, flush it to the disk, and say what was written.

    A flush that failed is not tried again: the kernel may have dropped what could not be written.
    """
    with _named(name):
        return _write_new(folder, name, parts)


def _write_new(folder: int, name: str, parts: Iterable[Buffer]) -> FileRecord:
    hasher = xxhash.xxh3_128()
    size = 0
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666, dir_fd=folder)
    try:
        for part in parts:
            memory = memoryview(part)
            for start in range(0, len(memory), CHUNK):
                chunk = memory[start : start + CHUNK]
                hasher.update(chunk)
                _write(fd, chunk)
            size += len(memory)
        os.fsync(fd)
    finally:
        os.close(fd)
    return FileRecord(size, hasher.hexdigest())


@contextmanager
def _named(name: str) -> Iterator[None]:
    """A scope whose errors say the name of the file; those of writing and flushing do not by themselves."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or name
        raise


def _write(fd: int, memory: memoryview) -> None:
    while len(memory):
        memory = memory[os.write(fd, memory) :]


def remove_tree(folder: int, name: str) -> None:
    """Delete a file, a link (not what it points to), or a folder with all that is in it, if it is still there."""
    # Somebody else may be about to delete it too.
    with suppress(FileNotFoundError):
        if not stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            os.unlink(name, dir_fd=folder)
            return
        with opened(name, below=folder) as fd:
            for entry in os.listdir(fd):
                remove_tree(fd, entry)
        os.rmdir(name, dir_fd=folder)


def exists(folder: int, name: str) -> bool:
    """Whether there is anything of this name, be it a link to nowhere."""
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def rename(folder: int, old: str, new: str) -> None:
    """Give an entry of a folder another name in it."""
    os.rename(old, new, src_dir_fd=folder, dst_dir_fd=folder)


def exchange(folder: int, one: str, two: str) -> bool:
    """Let two entries of a folder exchange their names in one step; False where the system cannot.

    Source: renameat2(2) with RENAME_EXCHANGE, Linux 3.15.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if libc.renameat2(folder, os.fsencode(one), folder, os.fsencode(two), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), two)
