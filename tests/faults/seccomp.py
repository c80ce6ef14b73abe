"""Stop a process at its file-changing system calls: seccomp user notification, by ctypes.

The process installs a filter and hands the listening end to its supervisor. A call that the filter names then waits
until the supervisor has answered: go on, fail with an errno, or never return because the process was killed meanwhile.

Source: seccomp(2), seccomp_unotify(2) and linux/seccomp.h.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import struct
from dataclasses import dataclass

_libc = ctypes.CDLL(None, use_errno=True)

# Numbers of the system calls: asm/unistd_64.h and asm-generic/unistd.h. The generic table lacks what has an "at" form.
_X86_64 = {
    "write": 1, "open": 2, "mmap": 9, "pwrite64": 18, "writev": 20, "sendfile": 40, "fsync": 74, "fdatasync": 75,
    "truncate": 76, "ftruncate": 77, "rename": 82, "mkdir": 83, "rmdir": 84, "creat": 85, "link": 86, "unlink": 87,
    "symlink": 88, "chmod": 90, "fchmod": 91, "openat": 257, "mkdirat": 258, "unlinkat": 263, "renameat": 264,
    "linkat": 265, "symlinkat": 266, "fchmodat": 268, "splice": 275, "fallocate": 285, "pwritev": 296, "syncfs": 306,
    "renameat2": 316, "seccomp": 317, "copy_file_range": 326, "pwritev2": 328, "io_uring_setup": 425, "openat2": 437,
    "pidfd_getfd": 438, "fchmodat2": 452,
}  # fmt: skip
_GENERIC = {
    "mkdirat": 34, "unlinkat": 35, "symlinkat": 36, "linkat": 37, "renameat": 38, "truncate": 45, "ftruncate": 46,
    "fallocate": 47, "fchmod": 52, "fchmodat": 53, "openat": 56, "write": 64, "writev": 66, "pwrite64": 68,
    "pwritev": 70, "sendfile": 71, "splice": 76, "fsync": 82, "fdatasync": 83, "mmap": 222, "syncfs": 267,
    "renameat2": 276, "seccomp": 277, "copy_file_range": 285, "pwritev2": 287, "io_uring_setup": 425, "openat2": 437,
    "pidfd_getfd": 438, "fchmodat2": 452,
}  # fmt: skip
_MACHINES = {"x86_64": (0xC000003E, _X86_64), "aarch64": (0xC00000B7, _GENERIC)}

_O_CHANGES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_FLAGS_ARGUMENT = {"open": 1, "openat": 2}
_PROT_WRITE, _MAP_SHARED = 2, 1

_PR_SET_NO_NEW_PRIVS, _PR_SET_CHILD_SUBREAPER = 38, 36
_SET_MODE_FILTER, _FLAG_NEW_LISTENER = 1, 1 << 3
_RET_ALLOW, _RET_NOTIFY = 0x7FFF0000, 0x7FC00000
_LOAD, _IF_EQUAL, _IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_RECEIVE, _SEND, _IS_VALID = 0xC0502100, 0xC0182101, 0x40082102
_CONTINUE = 1


@dataclass(frozen=True)
class Stopped:
    """A call that waits for an answer: who made it, its name, its six arguments."""

    token: int
    thread: int
    name: str
    args: tuple[int, ...]


def _table() -> tuple[int, dict[str, int]]:
    machine = platform.machine()
    if machine not in _MACHINES:
        raise OSError(errno.ENOSYS, f"no system call table for {machine}; known are {', '.join(_MACHINES)}")
    return _MACHINES[machine]


def _filter(*, reads: bool) -> bytes:
    arch, numbers = _table()
    program = [(_LOAD, 0, 0, 4), (_IF_EQUAL, 1, 0, arch), (_RETURN, 0, 0, _RET_ALLOW), (_LOAD, 0, 0, 0)]
    for name, number in numbers.items():
        if name in ("seccomp", "pidfd_getfd"):
            continue
        tests: list[tuple[int, int]] = []
        if name in _FLAGS_ARGUMENT and not reads:
            tests = [(_FLAGS_ARGUMENT[name], _O_CHANGES)]
        if name == "mmap":
            tests = [(2, _PROT_WRITE), (3, _MAP_SHARED)]
        body = []
        for left, (argument, mask) in zip(range(len(tests), 0, -1), tests, strict=True):
            # Past the remaining tests and the notification to the instruction that allows.
            body += [(_LOAD, 0, 0, 16 + 8 * argument), (_IF_ANY_BIT, 0, 2 * left - 1, mask)]
        body += [(_RETURN, 0, 0, _RET_NOTIFY), (_RETURN, 0, 0, _RET_ALLOW)]
        program += [(_IF_EQUAL, 0, len(body), number), *body]
    program.append((_RETURN, 0, 0, _RET_ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def install(*, reads: bool = False) -> int:
    """Filter this process, its later threads and children; returns the descriptor that the supervisor listens on.

    Args:
        reads: whether opening for reading stops too.

    Raises: OSError where the kernel or the sandbox does not permit it.
    """
    program = _filter(reads=reads)
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS)")
    return _syscall("seccomp", _SET_MODE_FILTER, _FLAG_NEW_LISTENER, ctypes.c_char_p(header))


def adopt_orphans() -> None:
    """Processes whose parent dies below this one become its children, so that it can count and reap them."""
    if _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def receive(listener: int) -> Stopped | None:
    """The next stopped call; None if its process died meanwhile."""
    buffer = bytearray(80)
    try:
        fcntl.ioctl(listener, _RECEIVE, buffer)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINTR):
            return None
        raise
    token, thread, _, number, _, _, *args = struct.unpack("=QIIiIQ6Q", buffer)
    names = {number: name for name, number in _table()[1].items()}
    return Stopped(token, thread, names[number], tuple(args))


def is_waiting(listener: int, call: Stopped) -> bool:
    """Whether the call still waits, so that what was read of its process belongs to it."""
    try:
        fcntl.ioctl(listener, _IS_VALID, struct.pack("=Q", call.token))
    except OSError:
        return False
    return True


def let_run(listener: int, call: Stopped) -> None:
    """Have the kernel execute the call."""
    _answer(listener, struct.pack("=QqiI", call.token, 0, 0, _CONTINUE))


def fail(listener: int, call: Stopped, code: int) -> None:
    """Have the call return an errno; nothing is executed."""
    _answer(listener, struct.pack("=QqiI", call.token, 0, -code, 0))


def succeed(listener: int, call: Stopped, value: int) -> None:
    """Have the call return a value; nothing is executed."""
    _answer(listener, struct.pack("=QqiI", call.token, value, 0, 0))


def _answer(listener: int, response: bytes) -> None:
    try:
        fcntl.ioctl(listener, _SEND, response)
    except OSError as error:
        # The process was killed before it could be answered.
        if error.errno != errno.ENOENT:
            raise


def borrow(process: int, descriptor: int) -> int:
    """A descriptor for a file that another process has open, sharing its position."""
    handle = os.pidfd_open(process)
    try:
        return _syscall("pidfd_getfd", handle, descriptor, 0)
    finally:
        os.close(handle)


def _syscall(name: str, *args: object) -> int:
    result = _libc.syscall(_table()[1][name], *args)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return int(result)


def why_not() -> str:
    """Why calls cannot be stopped here; empty if they can."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            install()
        except OSError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        reason = answer.read()
    os.waitpid(child, 0)
    return reason
