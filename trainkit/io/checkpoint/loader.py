"""Reading checkpoints: everything is verified before anything is handed out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from trainkit.io.checkpoint import files, listing, strict_json, tensors
from trainkit.io.checkpoint.errors import CheckpointError, DamageError
from trainkit.io.checkpoint.format import MODEL, TRAINING, TRAINING_JSON, flatten_state, unflatten_state
from trainkit.io.checkpoint.manifest import Manifest, digest_of
from trainkit.io.checkpoint.tensors import TensorRecord, tensor_records
from trainkit.state import TrainState

_HOST_BYTES = 64 * 2**20
"""That are held on the host for tensors elsewhere, before they are copied there."""
_LISTED = 20
"""How many differences an error lists of each kind."""


@dataclass(frozen=True)
class Restored:
    """What a checkpoint gave back.

    Args:
        state: bit for bit the one that was saved.
        cursor: the position of the data, as it was given to ``save``.
        metadata: as it was given to ``save``.
        path: the checkpoint.
        step: completed updates.
        run_id: of the run that wrote it.
    """

    state: TrainState
    cursor: Any
    metadata: Any
    path: Path
    step: int
    run_id: str


def load(path: str | Path, like: TrainState) -> Restored:
    """The state, cursor and metadata of a checkpoint.

    One pass: bytes are read into new tensors and digested on the way, and nothing is returned unless all digests fit.

    Args:
        path: the folder of one checkpoint; no link.
        like: a state of the same model and optimizer, say that of ``init_state``. It gives the structure, the devices
            and the strides, and is not changed. Its values do not matter.

    Raises:
        DamageError: a file is not as it was written; the text names the file and the cause.
        CheckpointError: it is the checkpoint of another model or optimizer (the text lists the names and shapes that
            differ), or of a newer version of the format, or may not be read.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from trainkit import init_state
        >>> from trainkit.io.checkpoint import save
        >>> from trainkit.optim import adamw
        >>> state = init_state(nn.Linear(2, 1), adamw(1e-3))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save(folder, state, cursor={"batch": 7})
        ...     restored = load(path, init_state(nn.Linear(2, 1), adamw(1e-3), seed=5))
        >>> torch.equal(restored.state.params["weight"], state.params["weight"]), int(restored.state.key)
        (True, 0)
        >>> restored.cursor, restored.path.name
        ({'batch': 7}, 'checkpoint-0')
    """
    path = Path(path)
    leaves = flatten_state(like)
    with listing.entered(path) as folder:
        manifest = listing.read_manifest(folder, path)
        _check_like(manifest, leaves.by_file(), path)
        training = _training_json(folder, manifest, path)
        found = {file: _load_tensors(folder, file, manifest, own, path) for file, own in leaves.by_file().items()}
    return Restored(
        state=unflatten_state(like, found[MODEL], found[TRAINING]),
        cursor=training["cursor"],
        metadata=training["metadata"],
        path=path,
        step=manifest.step,
        run_id=manifest.run_id,
    )


def load_latest(folder: str | Path, like: TrainState) -> Restored | None:
    """What :func:`load` gives of the newest whole checkpoint: :func:`latest` and :func:`load` with each byte read once.

    Args:
        folder: of the run; need not exist.
        like: as for :func:`load`.

    Returns: None if the folder has no checkpoint.

    Raises: CheckpointError if it has some and all are damaged, and what :func:`load` raises of one that is whole.

    Warns: CheckpointWarning for each damaged one that is passed over, naming the file and the cause.

    Example:
        >>> from torch import nn
        >>> from trainkit import init_state
        >>> from trainkit.optim import sgd
        >>> load_latest("runs/of_nobody", init_state(nn.Linear(2, 1), sgd(0.1))) is None
        True
    """
    return listing.newest(Path(folder), lambda path: load(path, like), stacklevel=2)


def latest(folder: str | Path) -> Path | None:
    """The newest whole checkpoint of a folder, by (step, save counter); every byte of it was read and verified.

    Args:
        folder: of the run; need not exist.

    Returns: None if the folder has no checkpoint.

    Raises: CheckpointError if it has some and all are damaged: nothing is started anew without being told.

    Warns: CheckpointWarning for each damaged one that is passed over, naming the file and the cause.

    Example:
        >>> latest("runs/of_nobody") is None
        True
    """

    def whole(path: Path) -> Path:
        verify(path)
        return path

    return listing.newest(Path(folder), whole, stacklevel=2)


def verify(path: str | Path) -> Manifest:
    """Read all of a checkpoint and compare it with its manifest: names, sizes, digests, shapes.

    Files that the manifest does not name are not looked at.

    Args:
        path: the folder of one checkpoint; no link.

    Raises:
        DamageError: a file is not as it was written; the text names the file and the cause.
        CheckpointError: it is of a newer version of the format, or may not be read.

    Example:
        >>> verify("runs/of_nobody/checkpoint-3")
        Traceback (most recent call last):
        trainkit.io.checkpoint.errors.DamageError: runs/of_nobody/checkpoint-3: cannot be read: No such file or ...
    """
    path = Path(path)
    with listing.entered(path) as folder:
        manifest = listing.read_manifest(folder, path)
        _training_json(folder, manifest, path)
        for file in manifest.tensors:
            _read_tensors(folder, file, manifest, path, lambda reader, slots: reader.skim(tensors.extent(slots)))
    return manifest


def _training_json(folder: int, manifest: Manifest, path: Path) -> dict[str, Any]:
    what = str(path / TRAINING_JSON)
    data = files.read_small(folder, TRAINING_JSON, strict_json.MAX_BYTES, what)
    record = manifest.files[TRAINING_JSON]
    _check_size(len(data), record.size, what)
    _check_digest(digest_of(data), record.digest, what)
    fields = strict_json.decode(data, what)
    if not isinstance(fields, dict) or set(fields) != {"counters", "cursor", "metadata"}:
        raise DamageError(f"{what}: expected an object with counters, cursor and metadata")
    if fields["counters"] != {"step": manifest.step}:
        raise DamageError(f"{what}: its counters are not those of step {manifest.step}, which the manifest says")
    return fields


def _load_tensors(
    folder: int, file: str, manifest: Manifest, like: Mapping[str, Tensor], path: Path
) -> dict[str, Tensor]:
    """New tensors with what a file holds, on the devices and with the strides of ``like``."""
    found: dict[str, Tensor] = {}

    def read(reader: tensors.Reader, slots: list[tensors.Slot]) -> None:
        elsewhere: list[tuple[Tensor, Tensor]] = []
        held = 0
        for slot in slots:
            found[slot.name] = new = tensors.empty_like(like[slot.name])
            host = new
            if not (new.is_cpu and new.is_contiguous()):
                host = torch.empty(slot.shape, dtype=slot.dtype, device="cpu")
                elsewhere.append((new, host))
                held += host.nbytes
            reader.fill(tensors.memory_of(host))
            if held >= _HOST_BYTES:
                _move(reader, elsewhere)
                held = 0
        _move(reader, elsewhere)

    _read_tensors(folder, file, manifest, path, read)
    return found


def _move(reader: tensors.Reader, elsewhere: list[tuple[Tensor, Tensor]]) -> None:
    """Copy what the host holds to where it belongs."""
    reader.finish()
    for new, host in elsewhere:
        new.copy_(host)
    elsewhere.clear()


def _read_tensors(
    folder: int,
    file: str,
    manifest: Manifest,
    path: Path,
    read: Callable[[tensors.Reader, list[tensors.Slot]], None],
) -> None:
    """Let ``read`` read all tensors of a file in their order, and verify it."""
    what, record, hasher = str(path / file), manifest.files[file], xxhash.xxh3_128()
    with files.regular(folder, file, what) as (fd, size):
        _check_size(size, record.size, what)
        slots = tensors.read_header(fd, size, hasher, what)
        if {slot.name: slot.record for slot in slots} != dict(manifest.tensors[file]):
            raise DamageError(f"{what}: its header and the manifest do not speak of the same tensors")
        with tensors.Reader(fd, hasher, what) as reader:
            read(reader, slots)
    _check_digest(hasher.hexdigest(), record.digest, what)


def _check_size(size: int, expected: int, what: str) -> None:
    if size != expected:
        raise DamageError(f"{what}: has {size} bytes, {expected} were written; it is truncated or was changed")


def _check_digest(digest: str, expected: str, what: str) -> None:
    if digest != expected:
        raise DamageError(f"{what}: its digest is {digest}, {expected} was written; its content has changed")


def _check_like(manifest: Manifest, like: Mapping[str, Mapping[str, Tensor]], path: Path) -> None:
    """Refuse the checkpoint of another model, listing what differs."""
    lines = []
    for file, own in like.items():
        lines += _differences(manifest.tensors[file], tensor_records(own))
    if lines:
        raise CheckpointError(
            f"{path}: is the checkpoint of another model or optimizer than `like`:\n  " + "\n  ".join(lines)
        )


def _differences(stored: Mapping[str, TensorRecord], own: Mapping[str, TensorRecord]) -> list[str]:
    missing = [f"only in `like`: {name!r} {own[name]}" for name in own if name not in stored]
    more = [f"only in the checkpoint: {name!r} {stored[name]}" for name in stored if name not in own]
    other = [
        f"{name!r} is {stored[name]} in the checkpoint, {own[name]} in `like`"
        for name in own
        if name in stored and stored[name] != own[name]
    ]
    return [line for lines in (missing, more, other) for line in _cut(lines)]


def _cut(lines: list[str]) -> list[str]:
    rest = len(lines) - _LISTED
    return lines if rest <= 0 else [*lines[:_LISTED], f"... and {rest} more like this"]
