"""Rules of the protocol, each of which can be broken in the process of a run, to see that the campaigns notice."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainkit.io import checkpoint
from trainkit.io.checkpoint import commit, files, listing, loader, saver
from trainkit.io.data.loader import Loader

_STAGING = ".staging-"


def apply(name: str) -> None:
    """Break a rule for the rest of this process; "" breaks none."""
    if name:
        MUTATIONS[name]()


def _without_fsync(concerned: Callable[[os.stat_result, str], bool]) -> None:
    real = os.fsync

    def fsync(descriptor: Any) -> None:
        if not concerned(os.fstat(descriptor), os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))):
            real(descriptor)

    os.fsync = fsync


def _no_file_fsync() -> None:
    _without_fsync(lambda info, name: stat.S_ISREG(info.st_mode))


def _no_folder_fsync() -> None:
    _without_fsync(lambda info, name: name.startswith(_STAGING))


def _no_parent_fsync() -> None:
    _without_fsync(lambda info, name: stat.S_ISDIR(info.st_mode) and not name.startswith(_STAGING))


def _no_rename() -> None:
    real = files.rename

    def rename(folder: int, old: str, new: str) -> None:
        if not old.startswith(_STAGING):
            real(folder, old, new)
            return
        os.mkdir(new, dir_fd=folder)
        for name in os.listdir(f"/proc/self/fd/{folder}/{old}"):
            os.rename(f"{old}/{name}", f"{new}/{name}", src_dir_fd=folder, dst_dir_fd=folder)
        os.rmdir(old, dir_fd=folder)

    files.rename = rename


def _no_digest() -> None:
    loader._check_digest = lambda *_: None


def _announce_before() -> None:
    real = saver._write

    def write(target: Any, draft: Any, copy: Any, announce: Callable[[Path], None]) -> Any:
        announce(target.folder / listing.name_of(draft.step))
        return real(target, draft, copy, announce)

    saver._write = write


def _prune_before() -> None:
    real = saver._write

    def write(target: Any, draft: Any, copy: Any, announce: Callable[[Path], None]) -> Any:
        commit.remove(target.fd, [path.name for path in checkpoint.checkpoints(target.folder)])
        return real(target, draft, copy, announce)

    saver._write = write


def _other_key() -> None:
    real = checkpoint.load_latest

    def load_latest(folder: Any, like: Any) -> Any:
        found = real(folder, like)
        if found is not None:
            object.__setattr__(found, "state", found.state.replace(key=found.state.key + 1))
        return found

    checkpoint.load_latest = load_latest


def _no_position() -> None:
    Loader.load_state_dict = lambda *_: None  # type: ignore[method-assign]


def _swallow_errors() -> None:
    real = saver._Flight.collect

    def collect(self: Any, stacklevel: int) -> None:
        try:
            real(self, stacklevel)
        except checkpoint.CheckpointError:
            return

    saver._Flight.collect = collect  # type: ignore[method-assign]


def _no_lock() -> None:
    fcntl.flock = lambda *_: None


def _keep_leftovers() -> None:
    commit.remove_leftovers = lambda *_: []


MUTATIONS: dict[str, Callable[[], None]] = {
    "file fsync": _no_file_fsync,
    "folder fsync": _no_folder_fsync,
    "parent fsync": _no_parent_fsync,
    "rename": _no_rename,
    "digest": _no_digest,
    "announce after": _announce_before,
    "prune after": _prune_before,
    "random key": _other_key,
    "loader position": _no_position,
    "error propagation": _swallow_errors,
    "lock": _no_lock,
    "leftovers": _keep_leftovers,
}
