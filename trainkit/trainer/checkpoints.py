"""The Trainer's checkpoints: the files of 4.57 in a folder that is there whole or not at all.

``checkpoint-N`` is filled beside its place, its files are flushed and listed with their digests in ``manifest.json``,
and then it gets its name. Nothing but tensors, numbers and strings is read back.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from trainkit.io.checkpoint import CheckpointError, CheckpointWarning, files, lock, read_model
from trainkit.io.checkpoint.commit import STAGING, publish, remove, remove_leftovers
from trainkit.io.checkpoint.interop import read_torch_file
from trainkit.io.checkpoint.model_files import first_names, flush_all
from trainkit.io.checkpoint.partial import is_complex_for_real
from trainkit.trainer.foreign import is_peft_model, is_pretrained_model, unwrapped
from trainkit.trainer.processing import write_processing
from trainkit.trainer.state import TrainerState

STATE, ARGUMENTS, MANIFEST = "trainer_state.json", "training_args.json", "manifest.json"
_SAME_PLACE = 1e-6
"""Epochs that two ways to count may differ by."""
OPTIMIZER, SCHEDULER, SCALER = "optimizer.pt", "scheduler.pt", "scaler.pt"
WEIGHTS, PICKLED_WEIGHTS, INDEX = "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"
_FORMAT = {"format": "trainkit.trainer", "version": 1}
_MAX_MANIFEST_BYTES = 16 * 2**20
_CHUNK = 2**20


# -- the folder ------------------------------------------------------------------------------------------------------


@contextmanager
def whole_folder(folder: Path, *, main: bool, wait: Callable[[], None]) -> Iterator[Path]:
    """A scope in which a checkpoint is filled beside its place; at the end it is there whole, and on the disk.

    An older folder of the same name is replaced. After an error nothing is left. Every process enters the scope.

    Args:
        folder: its place, ``.../checkpoint-N``.
        main: whether this process makes and renames the folder.
        wait: returns once every process has called it.

    Raises: CheckpointError if the system refused.
    """
    staging = folder.with_name(f"{STAGING}{_tag(folder.name)}")
    try:
        if main:
            files.make_folder(folder.parent)
            remove_interrupted(folder.parent)
            staging.mkdir()
        with lock.occupied(staging) if main else nullcontext():
            try:
                wait()
                yield staging
                wait()
                if main:
                    _publish(staging, folder)
            except BaseException:
                if main:
                    _remove(staging)
                raise
        wait()
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error.strerror} (errno {error.errno})") from error


def _tag(name: str) -> str:
    # Every process finds the same one, and the next start knows it as something that was left.
    return xxhash.xxh3_64_hexdigest(name.encode())


def _publish(staging: Path, folder: Path) -> None:
    with files.opened(staging) as fd:
        flush_all(fd)
        content = {**_FORMAT, "files": _digests(staging)}
        files.write_new(fd, MANIFEST, [json.dumps(content, indent=1, sort_keys=True).encode()])
        os.fsync(fd)
    with files.opened(folder.parent) as parent:
        replaced = publish(parent, staging.name, folder.name, own=True)
        os.fsync(parent)
        if replaced is not None:
            files.remove_tree(parent, replaced)


def remove_interrupted(folder: Path) -> None:
    """Delete what writers that died have left in a folder, if it is there, and nothing that a living one fills.

    Warns: CheckpointWarning for each one that cannot be deleted, or if the system does not show what is there.
    """
    try:
        with files.opened(folder) as fd:
            problems = remove_leftovers(fd, folder)
    except FileNotFoundError:
        return
    except OSError as error:
        problems = [f"{folder}: what interrupted saves may have left cannot be deleted: {error.strerror}"]
    for problem in problems:
        warnings.warn(problem, CheckpointWarning, stacklevel=2)


def _remove(path: Path) -> None:
    with files.opened(path.parent) as parent:
        if files.exists(parent, path.name):
            files.remove_tree(parent, path.name)


def _digests(folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()):
        found[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "xxh3_128": _digest(path)}
    return found


def _digest(path: Path) -> str:
    hasher = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest()


def verify(folder: str | Path) -> None:
    """Read every file that the manifest lists. A folder of transformers' Trainer has none; it needs its state.

    Raises: CheckpointError naming the file and what is wrong with it.
    """
    folder = Path(folder)
    if not (folder / STATE).is_file():
        raise CheckpointError(f"{folder}: has no {STATE}; expected a checkpoint of a Trainer")
    if not (folder / MANIFEST).exists():
        return
    for name, record in _listed(folder).items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{path}: is missing, though {MANIFEST} lists it")
        if path.stat().st_size != record.get("bytes") or _digest(path) != record.get("xxh3_128"):
            raise CheckpointError(
                f"{path}: is not what was written (size or digest); if you changed it on purpose, delete {MANIFEST}"
            )


def _listed(folder: Path) -> dict[str, dict[str, Any]]:
    what = str(folder / MANIFEST)
    with files.opened(folder) as fd:
        data = files.read_small(fd, MANIFEST, _MAX_MANIFEST_BYTES, what)
    try:
        content = json.loads(data)
        if content["format"] != _FORMAT["format"] or content["version"] != _FORMAT["version"]:
            raise CheckpointError(f"{what}: format {content['format']!r} version {content['version']!r} is not known")
        found: dict[str, dict[str, Any]] = content["files"]
        names_are_inside = all(not name.startswith("/") and ".." not in Path(name).parts for name in found)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{what}: cannot be read: {error}") from error
    if not names_are_inside:
        raise CheckpointError(f"{what}: names files outside of its folder")
    return found


def wanted(resume: str | bool | None, others: Mapping[str, Any], output_dir: str) -> str | None:
    """The checkpoint that ``train`` is asked to go on from.

    Args:
        resume: a folder; True for the newest whole one in ``output_dir``; None or False for none.
        others: further keywords of ``train``: ``model_path`` is the old name of ``resume``.
        output_dir: where True looks.

    Raises:
        TypeError: other keywords.
        ValueError: there is none to go on from.
        CheckpointError: the folder that was named is damaged.
    """
    if unknown := sorted(set(others) - {"model_path"}):
        raise TypeError(f"train: got unexpected keyword arguments {', '.join(unknown)}")
    if "model_path" in others:
        warnings.warn("model_path: use resume_from_checkpoint", FutureWarning, stacklevel=3)
        resume = others["model_path"]
    if resume is None or resume is False:
        return None
    if resume is not True:
        verify(resume)
        return str(resume)
    for folder in reversed(numbered(output_dir)):
        try:
            verify(folder)
        except CheckpointError as error:
            warnings.warn(f"{folder} is skipped: {error}", CheckpointWarning, stacklevel=3)
        else:
            return folder
    raise ValueError(f"resume_from_checkpoint: there is no whole checkpoint in {output_dir}")


# -- which ones ------------------------------------------------------------------------------------------------------


def numbered(output_dir: str | Path, prefix: str = "checkpoint") -> list[str]:
    """Folders ``<prefix>-N`` with a trainer state in them, the smallest N first.

    Raises: FileNotFoundError if there is no such folder.
    """
    name = re.compile(rf"{re.escape(prefix)}-(\d+)")
    found = [(int(m[1]), p) for p in Path(output_dir).iterdir() if (m := name.fullmatch(p.name)) and _is_own(p)]
    return [str(path) for _, path in sorted(found)]


def step_of(folder: str | Path) -> int:
    """The step in the name of a checkpoint.

    Example:
        >>> step_of("runs/checkpoint-20")
        20
    """
    return int(Path(folder).name.rpartition("-")[2])


def _is_own(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and (path / STATE).is_file()


def sorted_checkpoints(output_dir: str, prefix: str, use_mtime: bool, best: str | None) -> list[str]:
    """Checkpoints, the oldest first, the best moved up to the last but one if it is before that.

    Args:
        output_dir: the folder of the run.
        prefix: of their names.
        use_mtime: by the times of the folders instead of their numbers.
        best: the best one's path.

    Source: Trainer 4.57: ``_sorted_checkpoints``.
    """
    found = numbered(output_dir, prefix) if Path(output_dir).is_dir() else []
    if use_mtime:
        found.sort(key=lambda path: Path(path).stat().st_mtime)
    same = [path for path in found if best is not None and Path(path).resolve() == Path(best).resolve()]
    if same and found.index(same[0]) < len(found) - 2:
        found.remove(same[0])
        found.insert(len(found) - 1, same[0])
    return found


def rotate(found: Sequence[str], limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beyond ``limit``; with the best and the newest two different ones, two stay.

    Args:
        found: as :func:`sorted_checkpoints` gives them; the newest last.
        limit: None or 0 keeps all.
        best: the best one's path.
    """
    if limit is None or limit <= 0 or len(found) <= limit:
        return
    newest_is_best = best is None or Path(found[-1]).resolve() == Path(best).resolve()
    keep = 2 if limit == 1 and not newest_is_best else limit
    _remove_checkpoints(map(Path, found[: max(0, len(found) - keep)]))


def keep_only(best: str, found: Sequence[str]) -> None:
    """Delete all checkpoints but the best."""
    _remove_checkpoints(path for path in map(Path, found) if path.resolve() != Path(best).resolve())


def _remove_checkpoints(paths: Iterable[Path]) -> None:
    for path in paths:
        with files.opened(path.parent) as parent:
            remove(parent, [path.name])


# -- the model -------------------------------------------------------------------------------------------------------


def write_model(
    folder: str | Path, model: Any, *, processing: Any, args: Any, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """The model's files, those of its tokenizer or processor, and the arguments as JSON.

    Models of transformers and PEFT write their own; any other module's tensors go to ``model.safetensors``, tied ones
    once, under their first name.

    Args:
        folder: is made.
        model: wrapped or not.
        processing: what belongs to it, or None.
        args: the TrainingArguments.
        state_dict: its tensors, where they had to be gathered.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    module = unwrapped(model)
    if is_pretrained_model(module) or is_peft_model(module) or hasattr(module, "save_pretrained"):
        module.save_pretrained(  # type: ignore[operator]
            str(folder), state_dict=state_dict, safe_serialization=args.save_safetensors
        )
    else:
        _write_plain(Path(folder), module, state_dict, args.save_safetensors)
    write_processing(processing, folder)
    Path(folder, ARGUMENTS).write_text(args.to_json_string() + "\n", encoding="utf-8")


def _write_plain(folder: Path, module: nn.Module, state_dict: Mapping[str, Tensor] | None, safe: bool) -> None:
    named = dict(module.state_dict() if state_dict is None else state_dict)
    if not safe:
        torch.save(named, folder / PICKLED_WEIGHTS)
        return
    from safetensors.torch import save_file

    first = first_names(module)
    once = {name: t.detach().contiguous() for name, t in named.items() if first.get(name, name) == name}
    save_file(once, folder / WEIGHTS, metadata={"format": "pt"})


def load_weights(folder: str | Path, model: Any, *, strict: bool = True) -> tuple[list[str], list[str]]:
    """Weights of a checkpoint into the model, in place.

    Args:
        folder: with safetensors, sharded or not, a pickled state, or the files of an adapter.
        model: gets them.
        strict: refuse a file with other names than the model's.

    Returns: names that the file lacks, and names that the model lacks.

    Raises:
        ValueError: there are no weights in the folder.
        CheckpointError: other names or shapes, or complex numbers for real ones, before anything changes.
    """
    folder, module = Path(folder), unwrapped(model)
    if is_peft_model(module):
        return _load_adapters(folder, module)
    named = _weights_in(folder)
    first = first_names(module)
    own = module.state_dict()
    lacking = [n for n in own if n not in named and first.get(n, n) not in named and n not in _not_saved(module)]
    foreign = [n for n in named if n not in own]
    shapes = [n for n, t in named.items() if n in own and own[n].shape != t.shape]
    lossy = [n for n, t in named.items() if n in own and n not in shapes and is_complex_for_real(t, own[n])]
    if lossy or (strict and (lacking or foreign or shapes)):
        texts = {"missing": lacking, "not in the model": foreign, "of another shape": shapes, "complex for real": lossy}
        found = "; ".join(f"{text}: {', '.join(names[:5])}" for text, names in texts.items() if names)
        raise CheckpointError(f"{folder}: it is another model's ({found})")
    module.load_state_dict({n: t for n, t in named.items() if n in own and n not in shapes}, strict=False)
    if hasattr(module, "tie_weights"):
        module.tie_weights()  # type: ignore[operator]
    return lacking, foreign


def _not_saved(module: nn.Module) -> set[str]:
    return set(getattr(module, "_keys_to_ignore_on_save", None) or ())


def _weights_in(folder: Path) -> dict[str, Tensor]:
    if (folder / WEIGHTS).exists() or (folder / INDEX).exists():
        return read_model(folder)
    if (folder / PICKLED_WEIGHTS).exists():
        return read_torch_file(folder / PICKLED_WEIGHTS)
    raise ValueError(f"{folder}: has no weights; expected {WEIGHTS}, {INDEX} or {PICKLED_WEIGHTS}")


def _load_adapters(folder: Path, model: Any) -> tuple[list[str], list[str]]:
    for name in model.active_adapters if isinstance(model.active_adapters, list) else [model.active_adapter]:
        place = folder / name if (folder / name).is_dir() else folder
        if not any((place / f"adapter_model.{end}").exists() for end in ("safetensors", "bin")):
            raise ValueError(f"{place}: has no adapter; expected adapter_model.safetensors")
        model.load_adapter(str(place), name, is_trainable=True)
    return [], []


def report_load(result: Any, model: Any) -> None:
    """One warning with the names that a file lacked or had too much."""
    missing, unexpected = result
    if missing:
        warnings.warn(f"checkpoint: it lacks {', '.join(missing[:5])}, which stay as they were", stacklevel=3)
    if unexpected:
        warnings.warn(f"checkpoint: the model has no {', '.join(unexpected[:5])}", stacklevel=3)


# -- optimizer, schedule, randomness ----------------------------------------------------------------------------------


def write_optimizer(folder: str | Path, optimizer: Any, scheduler: Any, *, should_save: bool) -> None:
    """``optimizer.pt`` and ``scheduler.pt``."""
    if should_save:
        state = optimizer.state_dict()
        # Counters that parameters share would come back as one, which the next run would count up for each of them.
        torch.save(pytree.tree_map_only(Tensor, _apart, state), Path(folder, OPTIMIZER))
        torch.save(_plain(scheduler.state_dict()), Path(folder, SCHEDULER))


def _apart(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.dim() == 0 else tensor


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """The state of a scheduler without the functions in it, which come from the arguments anew."""
    return {name: value for name, value in state.items() if not callable(value)}


def load_optimizer(folder: str | Path, optimizer: Any, scheduler: Any) -> None:
    """Both, if both are there; otherwise one warning, and they start anew.

    The rate is computed anew for the schedule as it is now, which may have another length.
    """
    paths = Path(folder, OPTIMIZER), Path(folder, SCHEDULER)
    if not all(path.exists() for path in paths):
        text = f"{folder}: has no {OPTIMIZER} and {SCHEDULER}; optimizer and schedule start anew"
        warnings.warn(text, CheckpointWarning, stacklevel=3)
        return
    optimizer.load_state_dict(read_torch_file(paths[0]))
    scheduler.load_state_dict(read_torch_file(paths[1]))
    factors = getattr(scheduler, "lr_lambdas", None)
    if factors:
        rates = [base * f(scheduler.last_epoch) for base, f in zip(scheduler.base_lrs, factors, strict=True)]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates


def write_scaler(folder: str | Path, scaler: Any) -> None:
    """``scaler.pt``: the state of the loss scale."""
    torch.save(scaler.state_dict(), Path(folder, SCALER))


def load_scaler(folder: str | Path, scaler: Any) -> None:
    """The state of the loss scale, if there is one. Raises: CheckpointError if this run has no scale to take it."""
    path = Path(folder, SCALER)
    if not path.exists():
        return
    if scaler is None:
        raise CheckpointError(f"{path}: was written with fp16=True; this run has no loss scale")
    scaler.load_state_dict(read_torch_file(path))


# -- counters --------------------------------------------------------------------------------------------------------


def read_state(folder: str | Path) -> TrainerState:
    """``trainer_state.json``, its best checkpoint found beside the folder if the run was moved."""
    state = TrainerState.load_from_json(str(Path(folder, STATE)))
    best = state.best_model_checkpoint
    if best is not None and not Path(best).exists() and Path(folder).with_name(Path(best).name).exists():
        state.best_model_checkpoint = str(Path(folder).with_name(Path(best).name))
    return state


def warn_of_other_place(state: TrainerState, epoch: float) -> None:
    """One warning if the updates of a checkpoint were another part of the data than they are with the settings of now.

    Args:
        state: as it was stored, with the epoch that it had reached.
        epoch: where as many updates lead now, and where the run goes on.
    """
    if state.epoch is not None and abs(state.epoch - epoch) > _SAME_PLACE:
        warnings.warn(
            f"resume_from_checkpoint: after {state.global_step} updates it was at epoch {state.epoch:.4g}, which now "
            f"is epoch {epoch:.4g}: with another batch size, accumulation, number of processes or amount of data. The "
            "run goes on there, so some rows are left out or repeated; give the settings that it was written with",
            UserWarning,
            stacklevel=4,
        )


def warn_of_changes(args: Any, state: TrainerState, batch_size: int) -> None:
    """One warning with the settings that a checkpoint was written with and that are others now; those of now count."""
    now = {
        "logging_steps": args.logging_steps,
        "eval_steps": args.eval_steps,
        "save_steps": args.save_steps,
        "train_batch_size": batch_size,
    }
    then = {name: getattr(state, name, None) for name in now}
    different = [
        f"{name}: {then[name]} then, {value} now"
        for name, value in now.items()
        if value is not None and then[name] is not None and value >= 1 and then[name] != value
    ]
    if different:
        text = f"resume_from_checkpoint: other settings than when it was written ({'; '.join(different)})"
        warnings.warn(text, UserWarning, stacklevel=3)
