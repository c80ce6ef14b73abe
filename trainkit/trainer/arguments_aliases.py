"""Old names of arguments: what they mean now. One warning names all that were used."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from trainkit.trainer.arguments import TrainingArguments

_Alias: TypeAlias = "tuple[str, str, Callable[[TrainingArguments], bool]]"


def apply_aliases(args: TrainingArguments, also: Sequence[str] = ()) -> None:
    """Give the present fields what the old ones say.

    An old field that agrees with the present one is silent, so that arguments can be copied and read back.

    Args:
        args: the arguments, which are changed.
        also: further old names, with what to write.

    Warns: FutureWarning, once, with each old name and what to write.
    """
    used = [f"{old} (use {new})" for old, new, takes_effect in _ALIASES if takes_effect(args)]
    used += also
    if used:
        warnings.warn(f"old names of arguments: {', '.join(used)}", FutureWarning, stacklevel=4)


def _moved(args: TrainingArguments, name: str, value: Any) -> bool:
    """Set a field; whether that changed it."""
    changed = bool(getattr(args, name) != value)
    if changed:
        setattr(args, name, value)
    return changed


def _renamed(old: str, new: str, *unset: Any) -> _Alias:
    """A field that only has another name now; ``unset`` are its values that say nothing."""

    def takes_effect(args: TrainingArguments) -> bool:
        value = getattr(args, old)
        return value not in unset and _moved(args, new, value)

    return old, new, takes_effect


def _inputs_for_metrics(args: TrainingArguments) -> bool:
    wanted = [*dict.fromkeys([*args.include_for_metrics, "inputs"])]
    return args.include_inputs_for_metrics and _moved(args, "include_for_metrics", wanted)


def _hub_model_id(args: TrainingArguments) -> bool:
    name, owner = args.push_to_hub_model_id, args.push_to_hub_organization
    if name is None and owner is None:
        return False
    name = Path(args.output_dir or "").name if name is None else name
    return _moved(args, "hub_model_id", name if owner is None else f"{owner}/{name}")


_ALIASES: tuple[_Alias, ...] = (
    ("no_cuda", "use_cpu", lambda args: bool(args.no_cuda) and _moved(args, "use_cpu", True)),
    _renamed("per_gpu_train_batch_size", "per_device_train_batch_size", None, 0),
    _renamed("per_gpu_eval_batch_size", "per_device_eval_batch_size", None, 0),
    _renamed("fp16_backend", "half_precision_backend", None, "auto"),
    ("adafactor", "optim='adafactor'", lambda args: bool(args.adafactor) and _moved(args, "optim", "adafactor")),
    _renamed("torchdynamo", "torch_compile_backend", None),
    _renamed("push_to_hub_token", "hub_token", None),
    ("push_to_hub_model_id, push_to_hub_organization", "hub_model_id", _hub_model_id),
    ("include_inputs_for_metrics", "include_for_metrics=['inputs']", _inputs_for_metrics),
    ("use_mps_device", "nothing, an MPS device is found by itself", lambda args: bool(args.use_mps_device)),
)
