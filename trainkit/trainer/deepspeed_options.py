"""The argument ``deepspeed``: its configuration read, its ``auto`` entries filled from the other arguments."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from trainkit.trainer.arguments_json import read_mapping

if TYPE_CHECKING:
    from trainkit.trainer.arguments import TrainingArguments

_BY_WIDTH: dict[str, Callable[[int], int]] = {
    "zero_optimization.reduce_bucket_size": lambda width: width * width,
    "zero_optimization.stage3_prefetch_bucket_size": lambda width: int(0.9 * width * width),
    "zero_optimization.stage3_param_persistence_threshold": lambda width: 10 * width,
}


def settle_deepspeed(args: TrainingArguments) -> None:
    """Check the configuration, and show it to transformers where that is loaded: ZeRO 3 splits models as they are made.

    ``args.deepspeed`` stays as it was given.

    Raises: ImportError without DeepSpeed, TypeError, ValueError, OSError for a configuration that cannot be used.
    """
    vars(args)["hf_deepspeed_config"] = None
    if not args.deepspeed:
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise ImportError("deepspeed: got a configuration, but the package is not installed; pip install deepspeed")
    config = deepspeed_config(args)
    owner = "transformers.integrations" if "transformers" in sys.modules else "accelerate.utils"
    # transformers keeps a weak reference to it.
    vars(args)["hf_deepspeed_config"] = importlib.import_module(f"{owner}.deepspeed").HfDeepSpeedConfig(config)


def deepspeed_config(args: TrainingArguments) -> dict[str, Any]:
    """The configuration with all entries ``auto`` filled that the arguments know. The argument is not changed.

    Raises: TypeError, OSError if it cannot be read; ValueError if it contradicts the arguments.
    """
    config = copy.deepcopy(read_mapping("deepspeed", args.deepspeed))
    _raise(fill_deepspeed(config, args, auto_find_batch_size=args.auto_find_batch_size))
    return config


def fill_deepspeed(config: dict[str, Any], args: TrainingArguments, *, auto_find_batch_size: bool = False) -> list[str]:
    """Replace ``auto`` by what the arguments say, in place.

    Args:
        config: DeepSpeed's configuration; what it does not mention is left out.
        args: the arguments of the run.
        auto_find_batch_size: batch sizes may differ.

    Returns: one line for each entry that says something else than the arguments.

    Source: transformers 4.57: ``HfTrainerDeepSpeedConfig.trainer_config_process``.
    """
    size, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    fp16, bf16 = args.fp16 or args.fp16_full_eval, args.bf16 or args.bf16_full_eval
    values: dict[str, tuple[Any, str]] = {
        "train_micro_batch_size_per_gpu": (size, "per_device_train_batch_size"),
        "gradient_accumulation_steps": (accumulation, "gradient_accumulation_steps"),
        "train_batch_size": (args.world_size * size * accumulation, "train_batch_size (calculated)"),
        "gradient_clipping": (args.max_grad_norm, "max_grad_norm"),
        "optimizer.params.lr": (args.learning_rate, "learning_rate"),
        "optimizer.params.betas": ([args.adam_beta1, args.adam_beta2], "adam_beta1 and adam_beta2"),
        "optimizer.params.eps": (args.adam_epsilon, "adam_epsilon"),
        "optimizer.params.weight_decay": (args.weight_decay, "weight_decay"),
        "scheduler.params.warmup_max_lr": (args.learning_rate, "learning_rate"),
        "fp16.enabled": (fp16, "fp16 or fp16_full_eval"),
        "bf16.enabled": (bf16, "bf16 or bf16_full_eval"),
    }
    if auto_find_batch_size:
        _fill_only(config, "train_micro_batch_size_per_gpu", values.pop("train_micro_batch_size_per_gpu")[0])
        _fill_only(config, "train_batch_size", values.pop("train_batch_size")[0])
    _fill_only(config, "scheduler.params.warmup_min_lr", 0)
    _fill_only(config, "amp.enabled", False)
    _fill_only(config, "amp.opt_level", args.fp16_opt_level)
    if args.save_on_each_node:
        config.setdefault("checkpoint", {})["use_node_local_storage"] = True
    return [line for key, (value, name) in values.items() for line in _filled(config, key, value, name)]


def finish_deepspeed(config: dict[str, Any], args: TrainingArguments, model: Any, num_training_steps: int) -> None:
    """Replace the last ``auto`` entries, in place: those that depend on the model and the length of the run.

    Raises: ValueError if the width of the model is not known, or an entry contradicts the arguments.

    Source: transformers 4.57: ``HfTrainerDeepSpeedConfig.trainer_config_finalize``.
    """
    wanted = [key for key in _BY_WIDTH if _get(config, key) == "auto"]
    if wanted:
        width = _width(getattr(model, "config", None))
        if width is None:
            raise ValueError(f"deepspeed: {wanted} are 'auto', but the model's config has no hidden_size; give numbers")
        stage = _get(config, "zero_optimization.stage")
        for key in wanted:
            if stage == 3 or "stage3" not in key:
                _fill_only(config, key, _BY_WIDTH[key](width))
    _raise(
        _filled(config, "scheduler.params.total_num_steps", num_training_steps, "the number of updates")
        + _filled(
            config, "scheduler.params.warmup_num_steps", args.get_warmup_steps(num_training_steps), "warmup_steps"
        )
    )


def _width(config: Any) -> int | None:
    owners: tuple[Any, ...] = (config, getattr(config, "text_config", None))
    for owner in owners:
        if getattr(owner, "hidden_size", None) is not None:
            return int(owner.hidden_size)
        if getattr(owner, "hidden_sizes", None):
            return int(max(owner.hidden_sizes))
    return None


def _parent(config: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    *path, last = key.split(".")
    for part in path:
        config = config.get(part) or {}
    return config, last


def _get(config: dict[str, Any], key: str) -> Any:
    parent, last = _parent(config, key)
    return parent.get(last)


def _fill_only(config: dict[str, Any], key: str, value: Any) -> None:
    parent, last = _parent(config, key)
    if parent.get(last) == "auto":
        parent[last] = value


def _filled(config: dict[str, Any], key: str, value: Any, name: str) -> list[str]:
    _fill_only(config, key, value)
    found = _get(config, key)
    return [] if found is None or found == value else [f"{key}={found!r}, but {name} is {value!r}"]


def _raise(conflicts: list[str]) -> None:
    if conflicts:
        raise ValueError(f"deepspeed: {'; '.join(conflicts)}. Expected 'auto' or the same value")
