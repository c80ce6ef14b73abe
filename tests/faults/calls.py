"""What a stopped system call is about to do: to which path, with which bytes, at which position."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.faults.seccomp import Stopped

_AT_FDCWD = -100
_DELETED = " (deleted)"

# What has to be refused or reported, since its effect on files cannot be seen from here.
BLIND = frozenset({"mmap", "splice", "io_uring_setup"})


@dataclass(frozen=True)
class Call:
    """A file-changing call, decoded. Plain values only, so that a record of calls can be kept in a file.

    Args:
        kind: open, write, truncate, allocate, fsync, syncfs, rename, unlink, rmdir, mkdir, link, symlink, chmod, or one
            of ``BLIND``.
        path: the file as it is named now; of a rename or link the source, of a symlink the new name.
        other: the target of a rename or link, the content of a symlink.
        offset: where bytes go.
        length: to which length a file is cut or extended.
        data: the bytes written.
        flags: of an open or rename.
        is_named: False for a file without a name in any folder.
    """

    kind: str
    path: str
    other: str = ""
    offset: int = 0
    length: int = 0
    data: bytes = b""
    flags: int = 0
    is_named: bool = True

    def is_below(self, root: str) -> bool:
        """Whether one of its paths is ``root`` or inside it."""
        ends = (self.path, self.other) if self.kind in ("rename", "link") else (self.path,)
        return any(end == root or end.startswith(root + "/") for end in ends)


def decode(call: Stopped) -> Call:
    """Read the arguments out of the stopped process.

    Raises: OSError if the process is gone.
    """
    return _DECODERS[call.name](call.thread, call.args)


def process_of(thread: int) -> int:
    """The process that a thread belongs to."""
    status = Path(f"/proc/{thread}/status").read_text()
    return int(status.split("Tgid:")[1].split()[0])


def _bytes(thread: int, address: int, size: int) -> bytes:
    with open(f"/proc/{thread}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        found = b""
        while len(found) < size and (part := memory.read(size - len(found))):
            found += part
        return found


def _string(thread: int, address: int) -> str:
    found = b""
    while b"\0" not in found:
        # Up to the end of the page: the next one may not exist.
        found += _bytes(thread, address + len(found), 4096 - (address + len(found)) % 4096)
    return os.fsdecode(found.partition(b"\0")[0])


def _at(thread: int, folder: int, address: int) -> str:
    name = _string(thread, address)
    folder = folder - (1 << 32) if (folder := folder & 0xFFFFFFFF) >> 31 else folder
    base = f"/proc/{thread}/cwd" if folder == _AT_FDCWD else f"/proc/{thread}/fd/{folder}"
    return name if name.startswith("/") else os.path.normpath(os.path.join(os.readlink(base), name))


def _cwd(thread: int, address: int) -> str:
    return _at(thread, _AT_FDCWD, address)


def _open_file(thread: int, descriptor: int) -> tuple[str, bool]:
    path = os.readlink(f"/proc/{thread}/fd/{descriptor}")
    return path.removesuffix(_DELETED), not path.endswith(_DELETED)


def _position(thread: int, descriptor: int, *, appends: bool = True) -> int:
    lines = Path(f"/proc/{thread}/fdinfo/{descriptor}").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    if appends and int(fields["flags"], 8) & os.O_APPEND:
        return os.stat(f"/proc/{thread}/fd/{descriptor}").st_size
    return int(fields["pos"])


def _write(thread: int, descriptor: int, data: bytes, offset: int | None) -> Call:
    path, is_named = _open_file(thread, descriptor)
    if not path.startswith("/"):
        return Call("write", path)
    at = _position(thread, descriptor) if offset is None else offset
    return Call("write", path, offset=at, data=data, is_named=is_named)


def _vector(thread: int, address: int, count: int) -> bytes:
    pairs = struct.iter_unpack("QQ", _bytes(thread, address, 16 * count))
    return b"".join(_bytes(thread, base, size) for base, size in pairs)


def _copied(thread: int, source: int, pointer: int, size: int) -> bytes:
    """What a copy inside the kernel would read."""
    start = struct.unpack("q", _bytes(thread, pointer, 8))[0] if pointer else _position(thread, source, appends=False)
    with open(f"/proc/{thread}/fd/{source}", "rb") as file:
        file.seek(start)
        return file.read(size)


def _copy_range(t: int, a: tuple[int, ...]) -> Call:
    offset = struct.unpack("q", _bytes(t, a[3], 8))[0] if a[3] else None
    return _write(t, a[2], _copied(t, a[0], a[1], a[4]), offset)


def _opened(path: str, flags: int) -> Call:
    return Call("open", path, flags=flags)


def _on_file(kind: str, t: int, descriptor: int, *, offset: int = 0, length: int = 0, flags: int = 0) -> Call:
    path, is_named = _open_file(t, descriptor)
    return Call(kind, path, offset=offset, length=length, flags=flags, is_named=is_named)


_DECODERS: dict[str, Callable[[int, tuple[int, ...]], Call]] = {
    "open": lambda t, a: _opened(_cwd(t, a[0]), a[1]),
    "creat": lambda t, a: _opened(_cwd(t, a[0]), os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    "openat": lambda t, a: _opened(_at(t, a[0], a[1]), a[2]),
    "openat2": lambda t, a: _opened(_at(t, a[0], a[1]), struct.unpack("Q", _bytes(t, a[2], 8))[0]),
    "write": lambda t, a: _write(t, a[0], _bytes(t, a[1], a[2]), None),
    "pwrite64": lambda t, a: _write(t, a[0], _bytes(t, a[1], a[2]), a[3]),
    "writev": lambda t, a: _write(t, a[0], _vector(t, a[1], a[2]), None),
    "pwritev": lambda t, a: _write(t, a[0], _vector(t, a[1], a[2]), a[3]),
    "pwritev2": lambda t, a: _write(t, a[0], _vector(t, a[1], a[2]), a[3]),
    "sendfile": lambda t, a: _write(t, a[0], _copied(t, a[1], a[2], a[3]), None),
    "copy_file_range": _copy_range,
    "truncate": lambda t, a: Call("truncate", _cwd(t, a[0]), length=a[1]),
    "ftruncate": lambda t, a: _on_file("truncate", t, a[0], length=a[1]),
    "fallocate": lambda t, a: _on_file("allocate", t, a[0], length=a[2] + a[3], flags=a[1]),
    "fsync": lambda t, a: _on_file("fsync", t, a[0]),
    "fdatasync": lambda t, a: _on_file("fsync", t, a[0]),
    "syncfs": lambda t, a: _on_file("syncfs", t, a[0]),
    "rename": lambda t, a: Call("rename", _cwd(t, a[0]), _cwd(t, a[1])),
    "renameat": lambda t, a: Call("rename", _at(t, a[0], a[1]), _at(t, a[2], a[3])),
    "renameat2": lambda t, a: Call("rename", _at(t, a[0], a[1]), _at(t, a[2], a[3]), flags=a[4]),
    "mkdir": lambda t, a: Call("mkdir", _cwd(t, a[0])),
    "mkdirat": lambda t, a: Call("mkdir", _at(t, a[0], a[1])),
    "rmdir": lambda t, a: Call("rmdir", _cwd(t, a[0])),
    "unlink": lambda t, a: Call("unlink", _cwd(t, a[0])),
    "unlinkat": lambda t, a: Call("rmdir" if a[2] & 0x200 else "unlink", _at(t, a[0], a[1])),
    "link": lambda t, a: Call("link", _cwd(t, a[0]), _cwd(t, a[1])),
    "linkat": lambda t, a: Call("link", _at(t, a[0], a[1]), _at(t, a[2], a[3])),
    "symlink": lambda t, a: Call("symlink", _cwd(t, a[1]), _string(t, a[0])),
    "symlinkat": lambda t, a: Call("symlink", _at(t, a[1], a[2]), _string(t, a[0])),
    "chmod": lambda t, a: Call("chmod", _cwd(t, a[0])),
    "fchmod": lambda t, a: _on_file("chmod", t, a[0]),
    "fchmodat": lambda t, a: Call("chmod", _at(t, a[0], a[1])),
    "fchmodat2": lambda t, a: Call("chmod", _at(t, a[0], a[1])),
    "mmap": lambda t, a: _on_file("mmap", t, a[4]) if a[4] < 1 << 31 else Call("mmap", ""),
    "splice": lambda t, a: _on_file("splice", t, a[2]),
    "io_uring_setup": lambda t, a: Call("io_uring_setup", ""),
}
