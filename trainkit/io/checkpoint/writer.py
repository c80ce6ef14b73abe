"""``save``, and what it shares with the :class:`Saver`: what is to be written, and who may write it where."""

from __future__ import annotations

import dataclasses
import secrets
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainkit import tree
from trainkit.io.checkpoint import commit, files, listing, lock, strict_json, tensors
from trainkit.io.checkpoint.errors import CheckpointError, CheckpointWarning
from trainkit.io.checkpoint.format import TRAINING_JSON, flatten_state, safe_name
from trainkit.io.checkpoint.manifest import FileRecord, Manifest, encode_manifest, plain_metrics, versions
from trainkit.state import TrainState

_DIVIDED = 2**15
"""Elements from which on torch divides the work on a tensor among its threads."""
Slots = dict[str, list[tensors.Slot]]
"""Where the tensors lie, by file."""


def save(
    folder: str | Path,
    state: TrainState,
    *,
    cursor: Any = None,
    metadata: Any = None,
    run_id: str | None = None,
    allow_nonfinite: bool = False,
) -> Path:
    """Write one checkpoint; it is durable when this returns, and until then the older ones are untouched.

    A checkpoint of the same run and step is replaced. Nothing else is deleted, beside what interrupted saves have left.

    Args:
        folder: of the run; made where it is missing.
        state: what to save; not changed.
        cursor: the position of the data, as JSON values.
        metadata: anything else, as JSON values. It is written as it is: keep secrets out of it.
        run_id: names the run, with 1 to 128 of ``A-Z a-z 0-9 . _ -``. None takes that of an open :class:`Saver` of
            this process, else that of the newest checkpoint in the folder, else a new one.
        allow_nonfinite: also save parameters with infinities or NaNs.

    Returns: the checkpoint, ``folder/checkpoint-<step>``.

    Raises:
        TypeError, ValueError: something cannot be stored; the text says what. Nothing was written.
        CheckpointError: a parameter is not finite; another process writes to the folder; it has the checkpoints of
            another run; or the system refused, with path and cause. Nothing was announced.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from trainkit import init_state
        >>> from trainkit.optim import sgd
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save(folder, init_state(nn.Linear(2, 1), sgd(0.1)), cursor={"batch": 0})
        ...     sorted(file.name for file in path.iterdir())
        ['manifest.json', 'model.safetensors', 'training.json', 'training.safetensors']
    """
    leaves = flatten_state(state)
    slots = {file: tensors.layout(own) for file, own in leaves.by_file().items()}
    draft = drafted(state.step, slots, cursor, metadata, None)
    check_run_id(run_id)
    if not allow_nonfinite:
        check_finite(draft.step, {name: leaves.model[name] for name in leaves.params})
    folder = Path(folder)
    with files.writing(folder), _locked(folder) as (fd, owner):
        notes = commit.remove_leftovers(fd, folder)
        run = run_for(listing.scan(fd, folder), folder, run_id or owner.run_id)
        parts = {file: tensors.memory_in_order(draft.slots[file], own) for file, own in leaves.by_file().items()}
        path, more = write(fd, folder, draft, parts, run)
    for note in notes + more:
        warnings.warn(note, CheckpointWarning, stacklevel=2)
    return path


@dataclass(frozen=True)
class Draft:
    """A checkpoint as far as it is known before its tensors are written; all of it was checked.

    Args:
        step: completed updates.
        slots: where the tensors lie, by file.
        training: the content of the JSON file.
        metrics: as the manifest keeps them.
    """

    step: int
    slots: Slots
    training: bytes
    metrics: dict[str, float | None]


def drafted(at: Tensor, slots: Slots, cursor: Any, metadata: Any, metrics: Mapping[str, float] | None) -> Draft:
    """What is to be written, and where its tensors lie.

    Args:
        at: the state's step.
        slots: where the tensors lie, by file.
        cursor: as it was given to be saved.
        metadata: likewise.
        metrics: likewise.

    Raises: TypeError, ValueError as :func:`save` says.
    """
    # Of a population it is that of the furthest member. The tensor itself is asked, since it is what is saved.
    step = int(at.max())
    if step < 0:
        raise ValueError(f"state.step: got {step}, expected at least 0")
    strict_json.encode(cursor, "cursor")
    strict_json.encode(metadata, "metadata")
    training = {"counters": {"step": step}, "cursor": cursor, "metadata": metadata}
    return Draft(
        step=step,
        slots=slots,
        training=strict_json.encode(training, TRAINING_JSON),
        metrics=plain_metrics(metrics),
    )


def write(
    folder: int,
    path: Path,
    draft: Draft,
    parts: Mapping[str, Iterable[memoryview]],
    run_id: str,
    known: listing.Known | None = None,
    others: frozenset[str] = frozenset(),
) -> tuple[Path, list[str]]:
    """Write a checkpoint into an open folder whose lock this process has.

    Args:
        folder: its descriptor.
        path: its path.
        draft: what to write.
        parts: the bytes of the tensors, by file.
        run_id: of the run.
        known: manifests that were read before.
        others: runs whose checkpoints may be replaced too.

    Returns: the checkpoint, and what its owner should be told.

    Raises: OSError, ValueError; nothing was announced then.
    """
    entries = listing.scan(folder, path, known)
    counter = 1 + max((entry.manifest.save_counter for entry in entries if entry.manifest), default=0)
    name = listing.name_of(draft.step)
    ours = {run_id, *others}
    own = any(e.path.name == name and e.manifest is not None and e.manifest.run_id in ours for e in entries)
    contents: dict[str, Iterable[files.Buffer]] = {
        file: _with_header(tensors.header(slots), parts[file]) for file, slots in draft.slots.items()
    }
    contents[TRAINING_JSON] = [draft.training]

    records = {file: {slot.name: slot.record for slot in slots} for file, slots in draft.slots.items()}
    manifest = Manifest(draft.step, counter, run_id, {}, records, draft.metrics, versions())

    def finish(written: dict[str, FileRecord]) -> bytes:
        return encode_manifest(dataclasses.replace(manifest, files=written))

    replaced = commit.commit(folder, name, contents, finish, own=own)
    listing.remember(known, folder, listing.Entry(path / name, manifest))
    if replaced is None:
        return path / name, []
    if own:
        return path / name, removed(folder, path, [replaced])
    return path / name, [f"{path / name}: what was there is no checkpoint of this run that can be read; now {replaced}"]


def removed(folder: int, path: Path, names: Iterable[str]) -> list[str]:
    """Delete checkpoints that are not needed any more.

    Returns: why one stays. The new one is durable, so this ends no run.
    """
    try:
        commit.remove(folder, names)
    except OSError as error:
        return [f"{path}: an older checkpoint cannot be deleted: {error.strerror} (errno {error.errno})"]
    return []


def _with_header(first: bytes, parts: Iterable[memoryview]) -> Iterator[files.Buffer]:
    yield first
    yield from parts


def check_finite(step: int, params: Mapping[str, Tensor]) -> None:
    """Refuse parameters that are not finite.

    Raises: CheckpointError naming the first such parameter.
    """
    numbers = {name: [_comparable(piece) for piece in _pieces(tensor)] for name, tensor in params.items()}
    pieces = [piece for own in numbers.values() for piece in own]
    devices = {piece.device for piece in pieces}
    if not all(tree.all_finite([t for t in pieces if t.device == device]) for device in devices):
        bad = next(name for name, own in numbers.items() if not tree.all_finite(own))
        raise CheckpointError(
            f"step {step}: parameter {bad!r} is not finite, and such a state is not saved; go back to the checkpoint "
            "before it, or say allow_nonfinite=True"
        )


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """Parts that torch looks at in this thread alone. Its other threads work for the step that runs meanwhile."""
    flat = tensor.detach()
    if not flat.is_cpu or not flat.is_contiguous() or flat.numel() < _DIVIDED:
        return (flat,)
    return torch.split(flat.view(-1), _DIVIDED - 1)


def _comparable(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.float4_e2m1fn_x2:
        # There is no infinity and no NaN among them.
        return tensor.view(torch.uint8)
    # torch does not compare numbers of 8 bits.
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor.resolve_conj()


def check_run_id(run_id: str | None) -> None:
    """Raises: ValueError if it is not None and no safe name."""
    if run_id is not None and not safe_name(run_id):
        raise ValueError(f"run_id: got {run_id!r}, expected 1 to 128 of A-Z a-z 0-9 . _ -")


def run_for(entries: Iterable[listing.Entry], folder: Path, run_id: str | None) -> str:
    """The run that a new checkpoint belongs to.

    Raises: CheckpointError if the folder has the checkpoints of another.
    """
    runs = [entry.manifest.run_id for entry in entries if entry.manifest]
    if run_id is None:
        return runs[-1] if runs else new_run_id()
    other = next((run for run in runs if run != run_id), None)
    if other is not None:
        raise CheckpointError(f"{folder}: has checkpoints of the run {other!r}, this is {run_id!r}; use another folder")
    return run_id


def new_run_id() -> str:
    """A name that no other run has."""
    return secrets.token_hex(8)


@contextmanager
def _locked(folder: Path) -> Iterator[tuple[int, lock.Lock]]:
    """The descriptor of the folder and its lock, while this process has it and this thread alone changes the folder."""
    files.make_folder(folder)
    with files.opened(folder) as fd, lock.alone(fd, folder) as own:
        yield fd, own
