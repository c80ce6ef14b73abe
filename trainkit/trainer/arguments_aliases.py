"""Old names of arguments: what they mean now. One warning names all that were used."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainkit.trainer.arguments import TrainingArguments


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


def _batch_size(kind: str) -> Callable[[TrainingArguments], bool]:
    def takes_effect(args: TrainingArguments) -> bool:
        size = getattr(args, f"per_gpu_{kind}_batch_size")
        return bool(size) and _moved(args, f"per_device_{kind}_batch_size", size)

    return takes_effect


def _inputs_for_metrics(args: TrainingArguments) -> bool:
    wanted = [*dict.fromkeys([*args.include_for_metrics, "inputs"])]
    return args.include_inputs_for_metrics and _moved(args, "include_for_metrics", wanted)


def _hub_model_id(args: TrainingArguments) -> bool:
    name, owner = args.push_to_hub_model_id, args.push_to_hub_organization
    if name is None and owner is None:
        return False
    name = Path(args.output_dir or "").name if name is None else name
    return _moved(args, "hub_model_id", name if owner is None else f"{owner}/{name}")


_ALIASES: tuple[tuple[str, str, Callable[[TrainingArguments], bool]], ...] = (
    ("no_cuda", "use_cpu", lambda args: bool(args.no_cuda) and _moved(args, "use_cpu", True)),
    ("per_gpu_train_batch_size", "per_device_train_batch_size", _batch_size("train")),
    ("per_gpu_eval_batch_size", "per_device_eval_batch_size", _batch_size("eval")),
    (
        "fp16_backend",
        "half_precision_backend",
        lambda args: (
            args.fp16_backend not in (None, "auto") and _moved(args, "half_precision_backend", args.fp16_backend)
        ),
    ),
    ("adafactor", "optim='adafactor'", lambda args: bool(args.adafactor) and _moved(args, "optim", "adafactor")),
    (
        "torchdynamo",
        "torch_compile_backend",
        lambda args: args.torchdynamo is not None and _moved(args, "torch_compile_backend", args.torchdynamo),
    ),
    (
        "push_to_hub_token",
        "hub_token",
        lambda args: args.push_to_hub_token is not None and _moved(args, "hub_token", args.push_to_hub_token),
    ),
    ("push_to_hub_model_id, push_to_hub_organization", "hub_model_id", _hub_model_id),
    ("include_inputs_for_metrics", "include_for_metrics=['inputs']", _inputs_for_metrics),
    ("use_mps_device", "nothing, an MPS device is found by itself", lambda args: bool(args.use_mps_device)),
)
