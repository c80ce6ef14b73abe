"""One writer per folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import stat
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from trainkit.io.checkpoint import files
from trainkit.io.checkpoint.errors import CheckpointError, CheckpointWarning

NAME = ".lock"
_OWNER_LIMIT = 4096
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}
_held: weakref.WeakSet[Lock] = weakref.WeakSet()


class Lock:
    """The right to write checkpoints into a folder, for as long as this object is open and its process lives.

    The system gives the lock back when its owner dies, however it dies; the next one then takes over. What the file
    says (host, process, since when) is only for the message to a second writer. Processes forked off do not hold it.

    Args:
        folder: is made where it is missing.

    Raises: CheckpointError naming the owner, at once, if another writer holds it; also one in this process.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, Lock(folder):
        ...     try:
        ...         Lock(folder)
        ...     except CheckpointError as error:
        ...         print(error)
        /...: is written to by process ... on ... since ...; end that run first, or give this one a folder of its own

    Source: flock(2).
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._fd: int | None = None
        self.mutex = threading.RLock()
        """Held by the thread of this process that is changing the folder."""
        self.run_id: str | None = None
        """Of the run that writes, where it has said it."""
        self.has_saver = False
        """Whether a saver writes by this lock. There is one at most."""
        self.is_brief = False
        """Whether it was made for one save of another thread, and goes with that."""
        with files.writing(self.folder):
            files.make_folder(self.folder)
        with files.writing(self.folder), files.opened(self.folder) as parent:
            info = os.fstat(parent)
            self.key = (info.st_dev, info.st_ino)
            self._fd = _open(parent, self.folder)
        try:
            with files.writing(self.folder):
                self._take(self._fd)
        except BaseException:
            self._close()
            raise
        _held.add(self)

    def _take(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"{self.folder}: is written to by {_owner(fd)}; end that run first, "
                "or give this one a folder of its own"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            warnings.warn(
                f"{self.folder}: this file system has no locks ({error.strerror}); a second writer will not be noticed",
                CheckpointWarning,
                stacklevel=4,
            )
        owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps(owner).encode(), 0)

    @property
    def is_open(self) -> bool:
        """Whether it was not given back yet."""
        return self._fd is not None

    def release(self) -> None:
        """Give the lock back, once no other thread is changing the folder. Doing it twice does nothing."""
        if not self.is_open:
            # In a process that was forked off, nobody would let go of the mutex.
            return
        with self.mutex:
            self._give_back()

    def _give_back(self) -> None:
        try:
            if self._fd is not None:
                os.ftruncate(self._fd, 0)
                # Closing would do, were there no process that was forked off and has not yet begun its own program.
                fcntl.flock(self._fd, fcntl.LOCK_UN)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        finally:
            self._close()

    def _close(self) -> None:
        fd, self._fd = self._fd, None
        _held.discard(self)
        if fd is not None:
            os.close(fd)

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __del__(self) -> None:
        if self._fd is not None:
            os.close(self._fd)


def held(folder: int) -> Lock | None:
    """The lock on an open folder, if this process has it."""
    info = os.fstat(folder)
    return next((lock for lock in _held if lock.key == (info.st_dev, info.st_ino)), None)


_making = threading.Lock()


@contextmanager
def alone(folder: int, path: Path) -> Iterator[Lock]:
    """A scope in which this process has the lock on an open folder and this thread alone changes the folder.

    Args:
        folder: its descriptor.
        path: its path.
    """
    while True:
        with _making:
            found = held(folder)
            own = Lock(path) if found is None else found
            own.is_brief = own.is_brief or found is None
        with own.mutex:
            # Whoever made it may have given it back while this thread waited.
            if own.is_open:
                try:
                    yield own
                finally:
                    if found is None:
                        own.release()
                return


def for_saver(folder: int, path: Path) -> tuple[Lock, bool]:
    """A lock on an open folder that is the saver's from now on, and whether it was made for it.

    Raises: CheckpointError if this process has a saver for the folder already.
    """
    while True:
        with _making:
            found = held(folder)
            own = Lock(path) if found is None else found
            if own.has_saver:
                raise CheckpointError(f"{path}: this process has a Saver for it already; close that one first")
            if not own.is_brief:
                own.has_saver = True
                return own, found is None
        with own.mutex:
            # The one who writes by it is done.
            continue


@contextmanager
def occupied(folder: str | Path, *, below: int | None = None) -> Iterator[None]:
    """A scope in which :func:`is_occupied` of a folder that is being filled is true, in every process of this machine.

    It ends with the process, however that dies. Where the file system has no locks nobody sees it.

    Args:
        folder: its path.
        below: the open folder that the path starts from.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as name, files.opened(name) as parent:
        ...     (new := Path(name, "new")).mkdir()
        ...     with occupied(new):
        ...         meanwhile = is_occupied(parent, "new")
        ...     print(meanwhile, is_occupied(parent, "new"))
        True False

    Source: flock(2).
    """
    with files.opened(folder, below=below) as fd:
        _try_lock(fd)
        try:
            yield
        finally:
            # Closing would do, were there no process that was forked off meanwhile.
            with suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_UN)


def is_occupied(parent: int, name: str) -> bool:
    """Whether another scope fills a folder below an open one; see :func:`occupied`."""
    # It may be gone meanwhile, or be no folder.
    with suppress(OSError), files.opened(name, below=parent) as fd:
        return not _try_lock(fd)
    return False


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            return False
    return True


def _open(parent: int, folder: Path) -> int:
    try:
        fd = os.open(NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o666, dir_fd=parent)
    except OSError as error:
        raise CheckpointError(f"{folder / NAME}: cannot be opened: {error.strerror} (errno {error.errno})") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CheckpointError(f"{folder / NAME}: is no regular file")
    return fd


def _owner(fd: int) -> str:
    try:
        owner = json.loads(os.pread(fd, _OWNER_LIMIT, 0))
        return f"process {int(owner['pid'])} on {str(owner['host'])[:200]!a} since {str(owner['since'])[:40]!a}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "another process that has not said its name yet"


def _forget_in_child() -> None:
    # The descriptors would keep the lock alive after its owner has died.
    for lock in list(_held):
        lock._close()
    # Another thread of the parent may have been making one.
    global _making
    _making = threading.Lock()


os.register_at_fork(after_in_child=_forget_in_child)
