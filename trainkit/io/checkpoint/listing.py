"""Which checkpoints a folder has, in which order, and which of them is the newest whole one."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from trainkit.io.checkpoint import files, strict_json
from trainkit.io.checkpoint.errors import CheckpointError, CheckpointWarning, DamageError
from trainkit.io.checkpoint.format import MANIFEST
from trainkit.io.checkpoint.manifest import Manifest, decode_manifest

T = TypeVar("T")

_ATTEMPTS = 100
"""How often a folder is listed again when what it had was removed or replaced meanwhile."""
_NAME = re.compile(r"checkpoint-([0-9]{1,19})(\.replaced-[0-9a-f]{16})?")


Key = tuple[str, int, int]
"""Name, inode and time of the last change of a folder."""


@dataclass(frozen=True)
class Entry:
    """A folder with the name of a checkpoint: its manifest, or why it has none that can be read, and its key."""

    path: Path
    manifest: Manifest | None
    error: CheckpointError | None = None
    key: Key | None = None

    @property
    def order(self) -> tuple[int, int, str]:
        """(step, save counter, name). Without a manifest the step is that of the name."""
        step, counter = self.manifest.order if self.manifest else (step_in(self.path.name), -1)
        return step, counter, self.path.name


Known = dict[Key, Entry]
"""What was found."""


def name_of(step: int) -> str:
    """The name of the checkpoint of a step.

    Example:
        >>> name_of(20)
        'checkpoint-20'
    """
    return f"checkpoint-{step}"


def step_in(name: str) -> int:
    """The step in the name of a checkpoint; -1 for other names."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else -1


@contextmanager
def entered(path: Path) -> Iterator[int]:
    """The descriptor of a checkpoint, whose folder is no link.

    Raises: DamageError, CheckpointError.
    """
    with files.reading(str(path)), files.opened(path.parent) as parent, files.opened(path.name, below=parent) as folder:
        yield folder


def manifest_of(path: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises: DamageError, CheckpointError.
    """
    with entered(path) as folder:
        return read_manifest(folder, path)


def read_manifest(folder: int, path: Path) -> Manifest:
    """The manifest of an open checkpoint.

    Raises: DamageError, also for the manifest of another step than that of the folder's name; CheckpointError.
    """
    what = str(path / MANIFEST)
    manifest = decode_manifest(files.read_small(folder, MANIFEST, strict_json.MAX_BYTES, what), what)
    if step_in(path.name) not in (-1, manifest.step):
        raise DamageError(f"{what}: is of step {manifest.step}, in the folder of step {step_in(path.name)}")
    return manifest


def scan(folder: int, path: Path, known: Known | None = None) -> list[Entry]:
    """What has the name of a checkpoint in an open folder, oldest first. Only manifests are read.

    Args:
        folder: its descriptor.
        path: its path.
        known: what was found before and is not read again; becomes what is found now.
    """
    before = {} if known is None else dict(known)
    now: Known = {}
    for name in os.listdir(folder):
        if step_in(name) >= 0:
            try:
                key = _key(folder, name)
            except FileNotFoundError:
                # Removed since it was listed.
                continue
            now[key] = before[key] if key in before else _entry(folder, path / name, key)
    if known is not None:
        known.clear()
        # An error may pass.
        known.update((key, entry) for key, entry in now.items() if entry.manifest is not None)
    return sorted(now.values(), key=lambda entry: entry.order)


def remember(known: Known | None, folder: int, entry: Entry) -> None:
    """Add what was just written, so that it need not be read."""
    if known is not None:
        known[_key(folder, entry.path.name)] = entry


def _key(folder: int, name: str) -> Key:
    info = os.stat(name, dir_fd=folder, follow_symlinks=False)
    return name, info.st_ino, info.st_mtime_ns


def _entry(folder: int, path: Path, key: Key) -> Entry:
    try:
        with files.reading(str(path)), files.opened(path.name, below=folder) as fd:
            return Entry(path, read_manifest(fd, path), key=key)
    except CheckpointError as error:
        return Entry(path, None, error, key)


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints of a folder, oldest first: by (step, save counter) of their manifests, whatever the clock said.

    Only manifests are read: :func:`verify` tells whether one is whole.

    Args:
        folder: of a run; need not exist.

    Raises: CheckpointError if the folder cannot be read.

    Warns: CheckpointWarning for each one without a readable manifest, which is left out.

    Example:
        >>> checkpoints("runs/of_nobody")
        []
    """
    entries = _entries(Path(folder))
    for entry in entries:
        if entry.error is not None:
            _skipped(entry.path, entry.error, stacklevel=2)
    return [entry.path for entry in entries if entry.manifest is not None]


def newest(folder: Path, attempt: Callable[[Path], T], stacklevel: int) -> T | None:
    """What ``attempt`` makes of the newest checkpoint that it does not find damaged; None if there is no checkpoint.

    Raises: CheckpointError if there are some and all are damaged, and whatever else ``attempt`` raises.
    """
    told = set()
    for _ in range(_ATTEMPTS):
        causes = []
        for entry in reversed(_entries(folder)):
            try:
                if entry.error is not None:
                    raise entry.error
                return attempt(entry.path)
            except DamageError as error:
                if not _is_there(folder, entry):
                    # A writer at work has removed or replaced it since it was listed: there is a newer one.
                    break
                causes.append(str(error))
                if causes[-1] not in told:
                    told.add(causes[-1])
                    _skipped(entry.path, error, stacklevel + 1)
        else:
            if not causes:
                return None
            raise CheckpointError(
                f"{folder}: none of its {len(causes)} checkpoints is whole; the newest: {causes[0]}. "
                "Move them away to start anew"
            )
    raise CheckpointError(f"{folder}: its checkpoints are removed faster than they can be read; keep more of them")


def _entries(folder: Path) -> list[Entry]:
    if not folder.exists():
        return []
    with files.reading(str(folder)), files.opened(folder) as fd:
        return scan(fd, folder)


def _is_there(folder: Path, entry: Entry) -> bool:
    """Whether it is the folder that was listed, unchanged."""
    try:
        with files.opened(folder) as fd:
            return _key(fd, entry.path.name) == entry.key
    except OSError:
        return False


def _skipped(path: Path, error: CheckpointError, stacklevel: int) -> None:
    warnings.warn(f"{path.name} is passed over: {error}", CheckpointWarning, stacklevel=stacklevel + 1)
