"""What transformers' Trainer writes: its checkpoints.

The only module that unpickles, and only with ``torch.load(weights_only=True)``, which builds tensors, numbers, strings
and containers of them and nothing else.
"""

from __future__ import annotations

import json
import os
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from trainkit import tree
from trainkit.io.checkpoint import files
from trainkit.io.checkpoint.errors import CheckpointError, CheckpointWarning
from trainkit.io.checkpoint.format import flatten_tree, split_path, unflatten_tree
from trainkit.io.checkpoint.model_files import import_model
from trainkit.io.checkpoint.pickles import check_pickle
from trainkit.optim.transform import REPORT, Transform
from trainkit.state import TrainState, init_state
from trainkit.types import Params, Schedule

if TYPE_CHECKING:
    from tensordict import TensorDict

OPTIMIZER, SCHEDULER, PROGRESS = "optimizer.pt", "scheduler.pt", "trainer_state.json"
_MAX_PROGRESS_BYTES = 64 * 2**20
"""``trainer_state.json`` has the whole log: some hundred bytes for each of its rows."""
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_REAL = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32)
_Memory = dict[str, dict[str, Tensor]]
"""By slot ("exp_avg"), then by the name of the parameter."""


@dataclass(frozen=True)
class ImportedRun:
    """What :func:`import_hf_trainer` found.

    Args:
        state: weights, optimizer memory and step.
        epoch: the pass over the data in which the run stopped, from 0.
        batch: how many batches of that epoch were trained on.
        learning_rates: of each parameter group, for the next update.
        param_groups: the options of each group (``betas``, ``eps``, ``weight_decay``).
        names: of the parameters of each group.
        scheduler: the content of ``scheduler.pt``; None without that file.
        progress: the content of ``trainer_state.json``.
    """

    state: TrainState
    epoch: int
    batch: int
    learning_rates: tuple[float, ...]
    param_groups: tuple[Mapping[str, Any], ...]
    names: tuple[tuple[str, ...], ...]
    scheduler: Mapping[str, Any] | None
    progress: Mapping[str, Any]


def import_hf_trainer(
    folder: str | Path,
    module: nn.Module,
    optimizer: Transform,
    *,
    schedule: Schedule | None = None,
    groups: Sequence[Sequence[str]] | None = None,
    batches_per_epoch: int | None = None,
    accumulate: int = 1,
    seed: int = 0,
) -> ImportedRun:
    """A run of transformers' Trainer (4.57) with AdamW, to be continued from one of its checkpoints.

    The memory of the optimizer goes to wherever ``optimizer`` keeps that of an AdamW: ``adamw``, or
    ``from_torch(torch.optim.AdamW)``, alone or inside of ``chain`` and ``partition``. Each counter of updates becomes
    that of the checkpoint's optimizer, and so does what a schedule is read at.

    A checkpoint does not say which function its learning rate followed, nor how gradients were clipped. The optimizer
    is to be made as the Trainer made it; :func:`hf_decayed_names` has its rule for weight decay, and ``schedule`` is
    compared with the checkpoint. The Trainer's order of the data and its dropout come from generators that trainkit
    does not have; from here on both are trainkit's. The Trainer divides the loss of a causal model by all labels other
    than -100; where the first of a row is among them, which nothing predicts, that is less than the mean over the
    predictions.

    Args:
        folder: a ``checkpoint-<step>`` with model, ``optimizer.pt`` and ``trainer_state.json``.
        module: the model, with the same parameters trainable; its values do not matter.
        optimizer: gets the memory.
        schedule: the learning rate inside of ``optimizer``, to be checked.
        groups: the names of the parameters in each parameter group, in order. None takes the Trainer's own rule: one
            group of all, or those with weight decay and those without.
        batches_per_epoch: the length of the Trainer's data loader. None works it out from the checkpoint.
        accumulate: ``gradient_accumulation_steps``; needs ``batches_per_epoch`` if it is above 1.
        seed: from which dropout and all other randomness of the run derive.

    Returns: the state and where the data stood.

    Raises:
        CheckpointError: a file is missing, a link, damaged, or holds something else than tensors and numbers; or is of
            another model or optimizer than AdamW; the text names what differs.
        ValueError: ``optimizer`` keeps other memory than AdamW's; ``schedule`` gives another rate than the checkpoint;
            ``batches_per_epoch`` or ``groups`` is needed, or does not fit the checkpoint.

    Warns: CheckpointWarning if scheduler and optimizer made different numbers of steps.

    Example:
        >>> import tempfile
        >>> from trainkit.io.checkpoint.model_files import export_model
        >>> from trainkit.optim import adamw
        >>> module = nn.Linear(2, 1)
        >>> theirs = torch.optim.AdamW(module.parameters(), lr=0.1)
        >>> module(torch.ones(1, 2)).sum().backward()
        >>> theirs.step()
        >>> with tempfile.TemporaryDirectory() as runs:
        ...     folder = export_model(module, Path(runs, "checkpoint-1"))
        ...     torch.save(theirs.state_dict(), folder / "optimizer.pt")
        ...     _ = (folder / "trainer_state.json").write_text('{"global_step": 1, "epoch": 0.25}')
        ...     found = import_hf_trainer(folder, module, adamw(0.1))
        >>> int(found.state.opt_state["count"]), found.epoch, found.batch, found.learning_rates
        (1, 0, 1, (0.1,))

    Source: ``Trainer._save_checkpoint`` and ``Trainer.create_optimizer`` of transformers 4.57.1; torch.optim's
    ``state_dict``.
    """
    path = Path(folder)
    with files.reading(str(path)), files.opened(path) as fd:
        progress = _progress(fd, path)
        saved = _unpickled(fd, OPTIMIZER, path)
        scheduler = _unpickled(fd, SCHEDULER, path) if files.exists(fd, SCHEDULER) else None
    global_step, epoch, batch = _position(progress, batches_per_epoch, accumulate, path)
    fresh = init_state(module, optimizer, seed=seed)
    names = _names(saved, module, groups, path)
    memory = _memory(saved, names, fresh.params, path)
    count = _count(memory["step"], path)
    rates = tuple(float(group["lr"]) for group in saved["param_groups"])
    _check_schedule(schedule, scheduler, count, rates, path)
    state = import_model(path, fresh, module=module).replace(
        step=torch.full_like(fresh.step, global_step), opt_state=_placed(fresh.opt_state, memory, count)
    )
    options = tuple({k: v for k, v in group.items() if k != "params"} for group in saved["param_groups"])
    return ImportedRun(state, epoch, batch, rates, options, names, scheduler, progress)


def _progress(folder: int, path: Path) -> dict[str, Any]:
    what = f"{path / PROGRESS}"
    data = files.read_small(folder, PROGRESS, _MAX_PROGRESS_BYTES, what)
    try:
        found = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what}: no valid JSON: {error}") from error
    if not isinstance(found, dict) or type(step := found.get("global_step")) is not int or not 0 <= step < 2**63:
        raise CheckpointError(f"{what}: has no global_step; expected what transformers' Trainer writes")
    return found


def _unpickled(folder: int, name: str, path: Path) -> dict[str, Any]:
    what = f"{path / name}"
    with files.regular(folder, name, what) as (fd, size), os.fdopen(fd, "rb", closefd=False) as file:
        try:
            _check_parts(file, size, what)
            file.seek(0)
            check_pickle(torch._C.PyTorchFileReader(file).get_record("data.pkl"), _registered())
            file.seek(0)
            found = torch.load(file, map_location="cpu", weights_only=True)
        except CheckpointError:
            raise
        except Exception as error:  # Whatever a damaged or hostile file makes the unpickler raise.
            raise CheckpointError(f"{what}: cannot be read by torch.load(weights_only=True): {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{what}: holds a {type(found).__name__}, expected the state_dict of an optimizer")
    return found


def _check_parts(file: IO[bytes], size: int, what: str) -> None:
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
    if any(part.filename.endswith("/constants.pkl") for part in parts):
        # torch.load would hand it on to torch.jit.
        raise CheckpointError(f"{what}: is a TorchScript archive, expected a dictionary that torch.save wrote")
    packed = [part.filename for part in parts if part.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise CheckpointError(f"{what}: {packed[0]!a:.200} in it is compressed, which torch.save never does")
    total = sum(part.file_size for part in parts)
    if total > size:
        # Entries that share bytes, each of which would get memory of its own.
        raise CheckpointError(f"{what}: the files in it have {total} bytes together, it has {size}")


def _registered() -> set[str]:
    """The names that somebody in this process has told torch to trust."""
    found: list[Any] = torch.serialization.get_safe_globals()
    return {one[1] if isinstance(one, tuple) else f"{one.__module__}.{one.__qualname__}" for one in found}


def _position(progress: dict[str, Any], given: int | None, accumulate: int, path: Path) -> tuple[int, int, int]:
    """Completed updates, the epoch, and its batches that were trained on."""
    step, epochs = progress["global_step"], progress.get("epoch")
    if accumulate < 1 or (given is not None and given < 1):
        raise ValueError(f"batches_per_epoch, accumulate: got {given}, {accumulate}, expected positive numbers")
    if step == 0:
        return 0, 0, 0
    if not isinstance(epochs, (int, float)) or not 0 < epochs < 2**63 or not step / epochs < 2**63:
        raise CheckpointError(f"{path / PROGRESS}: has epoch {epochs!r} after {step} steps, expected a positive number")
    if given is None and accumulate > 1:
        raise ValueError(
            f"batches_per_epoch: needed for accumulate = {accumulate}, since the checkpoint does not say it"
        )
    batches = max(round(step / epochs), 1) if given is None else given
    # The rule by which the Trainer itself finds where it was.
    epoch, updates = divmod(step, -(-batches // accumulate))
    batch = updates * accumulate
    if abs(epoch + batch / batches - epochs) > 1e-6 * max(epochs, 1):
        raise ValueError(
            f"batches_per_epoch: with {batches} batches and accumulate = {accumulate}, {step} steps are "
            f"{epoch + batch / batches:.6g} epochs, but {path / PROGRESS} says {epochs:.6g}; give the length of the "
            "Trainer's data loader and its gradient_accumulation_steps"
        )
    return step, epoch, batch


def _names(
    saved: dict[str, Any], module: nn.Module, given: Sequence[Sequence[str]] | None, path: Path
) -> tuple[tuple[str, ...], ...]:
    """The names of the parameters in each group of the optimizer's state."""
    what = f"{path / OPTIMIZER}"
    found = saved.get("param_groups")
    if not isinstance(found, list) or not isinstance(saved.get("state"), dict) or not all(map(_is_group, found)):
        raise CheckpointError(f"{what}: has no state and param_groups; expected the state_dict of an optimizer")
    groups = _trainer_groups(module, len(found)) if given is None else given
    sizes, own = [len(group["params"]) for group in found], [len(group) for group in groups]
    if sizes != own:
        raise CheckpointError(
            f"{what}: its groups have {sizes} parameters, those of the module {own}; is it another model, are other "
            "parameters frozen, or is groups needed?"
        )
    return tuple(tuple(group) for group in groups)


def _is_group(group: Any) -> bool:
    return (
        isinstance(group, dict)
        and isinstance(group.get("params"), list)
        and all(type(index) is int for index in group["params"])
        and _is_number(group.get("lr"))
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and -(2**63) <= value < 2**63)


def _trainer_groups(module: nn.Module, num_groups: int) -> list[list[str]]:
    trainable = [name for name, p in module.named_parameters() if p.requires_grad]
    if num_groups == 1:
        return [trainable]
    if num_groups != 2:
        raise ValueError(f"groups: the checkpoint has {num_groups} of them; give the names of the parameters in each")
    decayed = hf_decayed_names(module)
    return [[name for name in trainable if name in decayed], [name for name in trainable if name not in decayed]]


def hf_decayed_names(module: nn.Module) -> set[str]:
    """The parameters that transformers' Trainer gives weight decay: all but those of layer norms, and those whose name
    has ``bias`` in it or says that they belong to a norm.

    Example:
        >>> hf_decayed_names(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
        {'0.weight'}

    Source: ``Trainer.get_decay_parameter_names`` of transformers 4.57.1.
    """
    norms = tuple(f"{name}." for name, m in module.named_modules() if name and isinstance(m, nn.LayerNorm))
    names = (name for name, _ in module.named_parameters() if not name.startswith(norms))
    return {name for name in names if not _NO_DECAY.search(name.lower())}


def _memory(saved: dict[str, Any], names: tuple[tuple[str, ...], ...], params: Params, path: Path) -> _Memory:
    """What AdamW remembers of each parameter, checked against the parameter."""
    what = f"{path / OPTIMIZER}"
    own = tree.named(params)
    unknown = sorted({name for group in names for name in group} ^ own.keys())
    if unknown:
        raise ValueError(
            f"groups: {unknown[0]!r} is in one of groups and parameters only; expected each parameter once"
        )
    memory: _Memory = {}
    for group, of in zip(saved["param_groups"], names, strict=True):
        for index, name in zip(group["params"], of, strict=True):
            values = saved["state"].get(index)
            if not isinstance(values, dict):
                raise CheckpointError(
                    f"{what}: has no memory for {name!r}; it never had a gradient. Freeze it (requires_grad=False)"
                )
            _check_adamw(values, own[name], f"{what}: of {name!r} it")
            for slot, value in values.items():
                memory.setdefault(slot, {})[name] = value.detach()
    uneven = [slot for slot, of in memory.items() if of.keys() != own.keys()]
    if uneven:
        raise CheckpointError(f"{what}: has {uneven[0]!r} for some parameters only")
    return memory


def _check_adamw(values: dict[Any, Any], parameter: Tensor, what: str) -> None:
    expected = {"step", *_MOMENTS[:2]}
    if not expected <= set(values) <= {"step", *_MOMENTS}:
        names = sorted(key[:50] if isinstance(key, str) else type(key).__name__ for key in values)
        raise CheckpointError(f"{what} has {names[:10]}, expected those of AdamW: {sorted(expected)}")
    for slot, value in values.items():
        shape = () if slot == "step" else tuple(parameter.shape)
        if type(value) is not Tensor or tuple(value.shape) != shape or not _has_numbers(value):
            found = f"{type(value).__name__} {tuple(getattr(value, 'shape', ()))}"
            if isinstance(value, Tensor) and tuple(value.shape) == shape:
                found += f" of {value.dtype}, {value.layout}, on {value.device}"
            raise CheckpointError(
                f"{what} has {slot!r} as {found}, expected a tensor of shape {shape}, of real numbers"
            )


def _has_numbers(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.dtype in _REAL


def _count(steps: dict[str, Tensor], path: Path) -> int:
    counts = {float(step) for step in steps.values()}
    count = next(iter(counts), 0.0)
    if len(counts) != 1 or not count.is_integer() or not 1 <= count < 2**53:
        raise CheckpointError(
            f"{path / OPTIMIZER}: its parameters were updated {sorted(counts)[:4]} times, expected one positive number"
        )
    return int(count)


def _check_schedule(
    schedule: Schedule | None, scheduler: dict[str, Any] | None, count: int, rates: tuple[float, ...], path: Path
) -> None:
    made = None if scheduler is None else scheduler.get("last_epoch")
    if isinstance(made, int) and made != count:
        warnings.warn(
            f"{path}: {SCHEDULER} made {made} steps and {OPTIMIZER} {count}; schedules go on from {count}",
            CheckpointWarning,
            stacklevel=3,
        )
    if schedule is not None:
        own = float(schedule(torch.tensor(count)))
        # float32 rates, and numbers that went through a product or two more.
        if any(abs(own - rate) > 1e-5 * abs(rate) + 1e-12 for rate in rates):
            raise ValueError(
                f"schedule: gives {own:.6g} after {count} updates, the checkpoint goes on with "
                f"{', '.join(f'{rate:.6g}' for rate in rates)}; expected the schedule of the Trainer's run"
            )


def _placed(opt_state: TensorDict, memory: _Memory, count: int) -> TensorDict:
    """The state with the memory of AdamW wherever it keeps such memory, and ``count`` in its counters."""
    filled: dict[str, Tensor] = {}
    places: Counter[tuple[str, str]] = Counter()
    strangers: list[str] = []
    for path, leaf in flatten_tree(opt_state).items():
        slot, name = ("", *split_path(path))[-2:]
        value = memory.get(slot, {}).get(name)
        if value is not None:
            places[slot, name] += 1
        elif slot == REPORT:
            value = leaf
        elif name == "count":
            value = torch.tensor(count)
        else:
            strangers.append(path)
            continue
        filled[path] = torch.empty_like(leaf).copy_(value)
    moments = [(slot, name) for slot in _MOMENTS for name in memory.get(slot, {})]
    lacking = [f"{slot}/{name}" for slot, name in moments if not places[slot, name]]
    twice = [f"{slot}/{name}" for slot, name in moments if places[slot, name] > 1]
    if strangers or lacking or twice:
        raise ValueError(
            f"optimizer: has no place for {lacking[:4]} of the checkpoint, several for {twice[:4]}, and keeps "
            f"{strangers[:4]}, which the checkpoint lacks; expected one adamw or from_torch(torch.optim.AdamW) for "
            "each parameter, with amsgrad as in the checkpoint. To start another optimizer with these weights, use "
            "import_model"
        )
    return unflatten_tree(opt_state, filled)


def read_torch_file(path: str | Path, *, numpy_state: bool = False) -> dict[str, Any]:
    """What ``torch.save`` wrote: a dictionary of tensors, numbers, strings and containers of them, and nothing else.

    Args:
        path: the file; a link is refused.
        numpy_state: also arrays of NumPy's unsigned integers, of which the state of its generator is made.

    Raises: CheckpointError for anything that cannot be read so.
    """
    path = Path(path)
    allowed = _numpy_state_types() if numpy_state else []
    with files.reading(str(path)), files.opened(path.parent) as folder, torch.serialization.safe_globals(allowed):
        return _unpickled(folder, path.name, path.parent)


def _numpy_state_types() -> list[Any]:
    core: Any = getattr(np, "_core", None) or np.core  # type: ignore[attr-defined,unused-ignore]
    return [core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]
