"""A model alone, as other tools keep it: ``model.safetensors``, or shards with an index beside them."""

from __future__ import annotations

import itertools
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.io.checkpoint import files, lock, strict_json, tensors
from trainkit.io.checkpoint.errors import CheckpointError, DamageError
from trainkit.io.checkpoint.format import MODEL, flatten_state, safe_name, tensor_name_problem
from trainkit.io.checkpoint.partial import restore_partial
from trainkit.state import TrainState

INDEX = "model.safetensors.index.json"
_LISTED = 20
"""How many names an error lists of each kind."""


def export_model(
    model: TrainState | nn.Module | Mapping[str, Tensor],
    folder: str | Path,
    *,
    module: nn.Module | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> Path:
    """Write a model's tensors under their own names into a new folder, for other tools to read.

    One file ``model.safetensors``, or, where there is more than ``max_shard_bytes``, files
    ``model-00001-of-00003.safetensors`` and an index. Tensors keep their order over the shards, and one that is larger
    than a shard gets one for itself. The folder appears whole, or not at all.

    Args:
        model: a state (its parameters and buffers), a module, or tensors by name. Tied weights of a module are written
            once, under their first name.
        folder: must not exist yet, or be empty.
        module: of a state: leaves out what this module does not save itself (non-persistent buffers).
        max_shard_bytes: positive, of the tensors in a file.

    Returns: the folder.

    Raises:
        TypeError, ValueError: something cannot be stored; the text names it. Nothing was written.
        CheckpointError: there is something at ``folder``, or the system refused, with path and cause.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import load_file
        >>> with tempfile.TemporaryDirectory() as runs:
        ...     folder = export_model(nn.Linear(2, 1), Path(runs, "final"))
        ...     sorted(load_file(folder / "model.safetensors"))
        ['bias', 'weight']

    Source: the file names of transformers and huggingface_hub (``split_torch_state_dict_into_shards``).
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes: got {max_shard_bytes}, expected a positive number of bytes")
    named = _tensors_of(model, module)
    for name, tensor in named.items():
        _check_tensor(name, tensor)
    shards = _shards(named, max_shard_bytes)
    with new_folder(Path(folder)) as (fd, _):
        for file, shard in shards.items():
            slots = tensors.layout(shard)
            files.write_new(fd, file, itertools.chain([tensors.header(slots)], tensors.memory_in_order(slots, shard)))
        if len(shards) > 1:
            files.write_new(fd, INDEX, [_index(shards)])
    return Path(folder)


def read_model(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a folder with one or with shards, by name, on the CPU.

    Such files have no digest: a change of their values goes unnoticed, one of their form does not.

    Args:
        path: a file, or a folder with ``model.safetensors`` or ``model.safetensors.index.json``. No file may be a link.

    Raises: CheckpointError if a file is missing, a link, damaged, or no safetensors file; if an index names files
        elsewhere, or tensors that its files do not hold; or if there are a whole model and an index.

    Example:
        >>> read_model("runs/of_nobody")
        Traceback (most recent call last):
        trainkit.io.checkpoint.errors.DamageError: runs/of_nobody: cannot be read: No such file or directory ...
    """
    path = Path(path)
    if not path.is_dir():
        with files.reading(str(path)), files.opened(path.parent) as fd:
            return _read_file(fd, path.name, str(path))
    with files.reading(str(path)), files.opened(path) as fd:
        whole, sharded = files.exists(fd, MODEL), files.exists(fd, INDEX)
        if whole and sharded:
            raise CheckpointError(f"{path}: has both {MODEL} and {INDEX}; delete the one that is not meant")
        return _read_shards(fd, path) if sharded else _read_file(fd, MODEL, str(path / MODEL))


def import_model(path: str | Path, state: TrainState, *, module: nn.Module | None = None) -> TrainState:
    """The state with all its parameters and buffers taken from a model file.

    Values are copied into new tensors with the state's dtype, device and layout. Step, key and the optimizer's memory
    stay as they are. To take a part, see :func:`~trainkit.io.checkpoint.partial.restore_partial`.

    Args:
        path: as for :func:`read_model`.
        state: of the same model; not changed.
        module: the model, where the file may name tied weights otherwise or lack non-persistent buffers.

    Raises: CheckpointError as :func:`read_model`, and for names or shapes that differ, or complex numbers for
        real ones, which it lists.

    Example:
        >>> import tempfile
        >>> from trainkit import init_state
        >>> from trainkit.optim import sgd
        >>> one, two = (init_state(nn.Linear(2, 1), sgd(0.1)) for _ in range(2))
        >>> with tempfile.TemporaryDirectory() as runs:
        ...     same = import_model(export_model(one, Path(runs, "final")), two)
        >>> torch.equal(same.params["weight"], one.params["weight"])
        True
    """
    found = read_model(path)
    if module is not None:
        found = _under_first_names(found, module, path)
    new, report = restore_partial(state, found, ["*"])
    not_saved = set() if module is None else _names(state) - saved_names(module)
    missing = [name for name in report.missing if name not in not_saved]
    problems = {
        "only in the state": missing,
        "only in the file": report.unused,
        "of another shape": [f"{n} {theirs} for {own}" for n, (theirs, own) in report.shape_mismatches.items()],
        "complex, for real ones": report.complex_for_real,
    }
    lines = [f"{kind}: {_listed(names)}" for kind, names in problems.items() if names]
    if lines:
        hint = "" if module is not None else "\nGive module, if the names differ only by tied weights or buffers."
        raise CheckpointError(f"{path}: is another model than the state's:\n  " + "\n  ".join(lines) + hint)
    return new


@contextmanager
def new_folder(path: Path) -> Iterator[tuple[int, Path]]:
    """A scope in which a folder is filled beside ``path``, as its descriptor and path; it is renamed at the end.

    It is flushed to the disk with what was written into it. After an error nothing is left.

    Raises: CheckpointError if there is something at ``path``, or the system refused.
    """
    try:
        files.make_folder(path.parent)
        if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
            raise CheckpointError(f"{path}: is there already; expected a new or empty folder")
        staging = path.with_name(f".staging-{secrets.token_hex(8)}")
        staging.mkdir()
        try:
            with lock.occupied(staging):
                with files.opened(staging) as fd:
                    yield fd, staging
                    os.fsync(fd)
                with files.opened(path.parent) as parent:
                    files.rename(parent, staging.name, path.name)
                    os.fsync(parent)
        except BaseException:
            _remove(staging)
            raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror} (errno {error.errno})") from error


def flush_all(folder: int) -> None:
    """Flush every file of an open folder to the disk, with the rights that the folder's own imply."""
    mode = stat.S_IMODE(os.fstat(folder).st_mode) & 0o666
    for name in os.listdir(folder):
        if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            with files.opened(name, below=folder) as inner:
                flush_all(inner)
                os.fsync(inner)
            continue
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        try:
            os.fchmod(fd, mode)
            os.fsync(fd)
        finally:
            os.close(fd)


def saved_names(module: nn.Module) -> set[str]:
    """The first names of what a module saves: its parameters and its persistent buffers, tied ones once."""
    first = first_names(module)
    return {first[name] for name in module.state_dict() if name in first}


def first_names(module: nn.Module) -> dict[str, str]:
    """For every name of a parameter or buffer, the first name of that tensor.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> first_names(nn.Sequential(layer, layer))
        {'0.weight': '0.weight', '0.bias': '0.bias', '1.weight': '0.weight', '1.bias': '0.bias'}
    """
    first: dict[int, str] = {}
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}


def _tensors_of(model: Any, module: nn.Module | None) -> dict[str, Tensor]:
    if module is not None and not isinstance(model, TrainState):
        raise TypeError(f"module: only a state needs one, and model is a {type(model).__name__}")
    if isinstance(model, TrainState):
        own = flatten_state(model).model
        return own if module is None else {name: t for name, t in own.items() if name in saved_names(module)}
    if isinstance(model, nn.Module):
        first = first_names(model)
        return {name: t.detach() for name, t in model.state_dict().items() if first.get(name) == name}
    if not isinstance(model, Mapping):
        raise TypeError(f"model: got {type(model).__name__}, expected a TrainState, a module or tensors by name")
    return dict(model)


def _check_tensor(name: str, tensor: Any) -> None:
    problem = tensor_name_problem(name)
    if problem:
        raise ValueError(f"model: the name {name[:80]!r} {problem}")
    if type(tensor) not in (Tensor, nn.Parameter):
        raise TypeError(f"model: {name!r} is a {type(tensor).__name__}, expected a torch.Tensor")
    if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in tensors.CODES:
        raise ValueError(f"model: {name!r} is of {tensor.dtype} on {tensor.device}, which safetensors cannot hold")


def _shards(named: Mapping[str, Tensor], max_bytes: int) -> dict[str, dict[str, Tensor]]:
    """What goes into which file."""
    groups: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in named.items():
        own = tensor.numel() * tensor.itemsize
        if groups[-1] and size + own > max_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += own
    if len(groups) == 1:
        return {MODEL: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _index(shards: Mapping[str, Mapping[str, Tensor]]) -> bytes:
    size = sum(t.numel() * t.itemsize for shard in shards.values() for t in shard.values())
    weight_map = {name: file for file, shard in shards.items() for name in shard}
    return strict_json.encode({"metadata": {"total_size": size}, "weight_map": weight_map}, INDEX)


class _NoDigest:
    """Files of other tools bring no digest to compare with."""

    def update(self, data: Any, /) -> None:
        return


def _read_file(folder: int, name: str, what: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    with files.regular(folder, name, what) as (fd, size):
        for slot in tensors.read_header(fd, size, _NoDigest(), what):
            problem = tensor_name_problem(slot.name)
            if problem:
                raise DamageError(f"{what}: the name {slot.name[:80]!a} of a tensor {problem}")
            found[slot.name] = torch.empty(slot.shape, dtype=slot.dtype)
            tensors.fill(fd, tensors.memory_of(found[slot.name]), what)
    return found


def _read_shards(folder: int, path: Path) -> dict[str, Tensor]:
    weight_map = _weight_map(folder, path)
    found: dict[str, Tensor] = {}
    for file in dict.fromkeys(weight_map.values()):
        shard = _read_file(folder, file, str(path / file))
        expected = {name for name, where in weight_map.items() if where == file}
        if shard.keys() != expected:
            different = sorted(shard.keys() ^ expected)
            raise DamageError(f"{path / file}: holds other tensors than {INDEX} says: {_listed(different)}")
        found |= shard
    return {name: found[name] for name in weight_map}


def _weight_map(folder: int, path: Path) -> dict[str, str]:
    what = str(path / INDEX)
    index = strict_json.decode(files.read_small(folder, INDEX, strict_json.MAX_BYTES, what), what)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise DamageError(f"{what}: has no weight_map from tensors to files")
    for name, file in weight_map.items():
        if not safe_name(file) or not file.endswith(".safetensors"):
            raise DamageError(
                f"{what}: says that {name[:80]!a} is in {file!a:.200}; expected the plain name of a safetensors file"
            )
    return weight_map


def _under_first_names(found: Mapping[str, Tensor], module: nn.Module, path: str | Path) -> dict[str, Tensor]:
    """Tensors under the first name of what they are in the module."""
    first = first_names(module)
    renamed: dict[str, Tensor] = {}
    for name, tensor in found.items():
        own = first.get(name, name)
        if own in renamed and not torch.equal(renamed[own], tensor):
            raise CheckpointError(f"{path}: {name!r} and {own!r} differ, and are one tensor in the module")
        renamed[own] = tensor
    return renamed


def _names(state: TrainState) -> set[str]:
    return {*state.params.keys(), *state.buffers.keys()}


def _remove(folder: Path) -> None:
    try:
        with files.opened(folder.parent) as parent:
            files.remove_tree(parent, folder.name)
    except OSError:
        # The error that led here is the one to report.
        return


def _listed(names: Any) -> str:
    shown = list(names)[:_LISTED]
    rest = len(names) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")
