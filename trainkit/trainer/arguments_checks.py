"""What ``TrainingArguments`` refuses, and how it completes what was left open.

Each function takes the arguments, and either raises, naming the field, or sets fields. All of them may run again on the
arguments that they left behind: a second run changes nothing.
"""

from __future__ import annotations

import dataclasses
import datetime
import inspect
import json
import logging
import math
import numbers
import os
import socket
import sys
from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch

from trainkit.trainer.accelerator_config import AcceleratorConfig
from trainkit.trainer.enums import (
    DebugOption,
    HubStrategy,
    IntervalStrategy,
    OptimizerNames,
    SaveStrategy,
    SchedulerType,
)
from trainkit.trainer.secrets import hidden, text_without_secrets
from trainkit.trainer.tracker_names import tracker_list

if TYPE_CHECKING:
    from trainkit.trainer.arguments import TrainingArguments

LOG_LEVELS = {
    "detail": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
    "passive": -1,
}
TOKENS = ("hub_token", "push_to_hub_token")
# name: lowest, first value that is too high, whether None is allowed.
_INTEGERS: dict[str, tuple[float, float, bool]] = {
    "per_device_train_batch_size": (1, math.inf, False),
    "per_device_eval_batch_size": (1, math.inf, False),
    "gradient_accumulation_steps": (1, math.inf, False),
    "eval_accumulation_steps": (1, math.inf, True),
    "torch_empty_cache_steps": (1, math.inf, True),
    "dataloader_prefetch_factor": (1, math.inf, True),
    "dataloader_num_workers": (0, math.inf, False),
    "warmup_steps": (0, math.inf, False),
    "ddp_timeout": (1, math.inf, False),
    "ddp_bucket_cap_mb": (1, math.inf, True),
    "max_steps": (-math.inf, math.inf, False),
    "seed": (-math.inf, math.inf, False),
    "data_seed": (-math.inf, math.inf, True),
    "save_total_limit": (-math.inf, math.inf, True),
}
_JUST_ABOVE_ONE = math.nextafter(1.0, 2.0)
# No lowest value: infinite ones are numbers too.
_FLOATS: dict[str, tuple[float | None, float, bool]] = {
    "learning_rate": (0.0, math.inf, False),
    "weight_decay": (0.0, math.inf, False),
    "adam_beta1": (0.0, 1.0, False),
    "adam_beta2": (0.0, 1.0, False),
    "adam_epsilon": (0.0, math.inf, False),
    "warmup_ratio": (0.0, _JUST_ABOVE_ONE, False),
    "label_smoothing_factor": (0.0, _JUST_ABOVE_ONE, False),
    "num_train_epochs": (-math.inf, math.inf, False),
    "logging_steps": (-math.inf, math.inf, False),
    "save_steps": (-math.inf, math.inf, False),
    "eval_steps": (-math.inf, math.inf, True),
    "eval_delay": (0.0, math.inf, True),
    "neftune_noise_alpha": (-math.inf, math.inf, True),
    "max_grad_norm": (None, math.inf, True),
}
_WORDS_FOR_BOOLEANS = ("true", "false", "yes", "no", "1", "0", "")
# What was left at its default is silent; the default, and what the field belongs to.
_UNSERVED: dict[str, tuple[Any, str]] = {
    "tpu_num_cores": (None, "TPUs"),
    "tpu_metrics_debug": (False, "TPUs"),
    "mp_parameters": ("", "SageMaker"),
    "fp16_opt_level": ("O1", "apex"),
}
_UNSERVED_VALUES = {
    "half_precision_backend": {"apex": "apex"},
    "optim": {"adamw_torch_xla": "XLA", "adamw_torch_npu_fused": "NPUs", "adamw_apex_fused": "apex"},
    "ddp_backend": {"hccl": "Habana devices", "cncl": "Cambricon devices", "mccl": "Moore Threads devices"},
}
_CHOICES = {
    "half_precision_backend": ("auto", "cpu_amp"),
    "ddp_backend": (None, "nccl", "gloo", "mpi", "ccl"),
    "log_level": tuple(LOG_LEVELS),
    "log_level_replica": tuple(LOG_LEVELS),
}


def read_text_forms(args: TrainingArguments) -> None:
    """Put back what a file or a command line holds as text: JSON objects, hidden tokens, infinite numbers.

    In JSON objects, texts that look like booleans or non-negative numbers become those.

    Raises: ValueError for text that starts like a JSON object and is none.
    """
    for name in TOKENS:
        if getattr(args, name) == hidden(name):
            setattr(args, name, None)
    for name in args._VALID_DICT_FIELDS:
        text = getattr(args, name)
        if isinstance(text, str) and text.startswith("{"):
            try:
                setattr(args, name, _typed(json.loads(text)))
            except json.JSONDecodeError as error:
                shown = text_without_secrets(text)
                raise ValueError(f"{name}: got {shown!r}, which is no JSON object: {error}") from error
    # JSON has no infinite numbers.
    if str(args.max_grad_norm) in ("Infinity", "-Infinity"):
        args.max_grad_norm = float(args.max_grad_norm)


def _typed(content: dict[str, Any]) -> dict[str, Any]:
    return {key: _typed_value(value) for key, value in content.items()}


def _typed_value(value: Any) -> Any:
    if isinstance(value, dict):
        return _typed(value)
    if not isinstance(value, str):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    if value.isdigit():
        return int(value)
    return float(value) if value.replace(".", "", 1).isdigit() else value


def check_values(args: TrainingArguments) -> None:
    """Refuse numbers that are none or out of range, words for booleans, and what is not among the choices.

    Raises: TypeError for a wrong type, ValueError for a wrong value.
    """
    for name, (low, end, optional) in _INTEGERS.items():
        _check_number(name, getattr(args, name), numbers.Integral, "an integer", low, end, optional)
    for name, (lowest, end, optional) in _FLOATS.items():
        _check_number(name, getattr(args, name), numbers.Real, "a number", lowest, end, optional)
    if args.num_train_epochs < 0 and args.max_steps <= 0:
        raise ValueError(f"num_train_epochs: got {args.num_train_epochs}, expected at least 0, or max_steps above 0")
    for name in _booleans(type(args)):
        value = getattr(args, name)
        if isinstance(value, str) and value.lower() in _WORDS_FOR_BOOLEANS:
            raise TypeError(f"{name}: got the text {value!r}, expected True or False")
    for name, choices in _CHOICES.items():
        if getattr(args, name) not in choices:
            known = ", ".join(str(choice) for choice in choices)
            raise ValueError(f"{name}: got {getattr(args, name)!r}, expected one of: {known}")


def _booleans(kind: type[TrainingArguments]) -> list[str]:
    """The fields, those of subclasses too, that are declared as booleans and as nothing else."""
    declared: dict[str, Any] = {}
    # Not by the types of the fields: the parser of transformers changes those.
    for base in reversed(kind.__mro__):
        declared.update(inspect.get_annotations(base))
    return [field.name for field in dataclasses.fields(kind) if declared.get(field.name) in (bool, "bool")]


def _check_number(name: str, value: Any, kind: Any, words: str, low: float | None, end: float, optional: bool) -> None:
    if value is None and optional:
        return
    if name == "warmup_steps" and isinstance(value, float):
        raise ValueError(f"warmup_steps: got {value!r}, expected an integer; for a share of the run use warmup_ratio")
    if not isinstance(value, kind) or isinstance(value, bool):
        hint = "; YAML 1.1 reads 1e-4 as text, write 1.0e-4" if isinstance(value, str) else ""
        raise TypeError(f"{name}: got {value!r} ({type(value).__name__}), expected {words}{hint}")
    if low is None:
        if math.isnan(value):
            raise ValueError(f"{name}: got nan, expected a number")
        return
    if math.isfinite(value) and low <= value < end:
        return
    bounds = [f"at least {low:g}"] if math.isfinite(low) else []
    if math.isfinite(end):
        bounds.append("at most 1" if end == _JUST_ABOVE_ONE else f"below {end:g}")
    raise ValueError(f"{name}: got {value!r}, expected {words} {' and '.join(bounds) or 'that is finite'}")


def refuse_unserved(args: TrainingArguments) -> None:
    """Refuse what belongs to hardware or services that trainkit does not serve.

    Raises: ValueError naming the field and what it belongs to.
    """
    for name, (default, owner) in _UNSERVED.items():
        if getattr(args, name) != default:
            raise unserved(name, getattr(args, name), owner, f"leave it at {default!r}")
    for name, values in _UNSERVED_VALUES.items():
        value = getattr(args, name)
        if value in values:
            raise unserved(name, value, values[value], "choose another")
    if DebugOption.TPU_METRICS_DEBUG in (args.debug or ()):
        raise unserved("debug", "tpu_metrics_debug", "TPUs", "leave it out")
    if args.use_mps_device and not torch.backends.mps.is_available():
        raise ValueError("use_mps_device: got True, but this machine has no MPS device; leave it at False")


def unserved(name: str, value: Any, owner: str, advice: str) -> ValueError:
    """The error for what trainkit leaves to others, with what to do about it."""
    return ValueError(f"{name}: got {value!r}, which is for {owner}; trainkit does not serve {owner}, {advice}")


def settle_paths(args: TrainingArguments) -> None:
    """``output_dir`` and ``logging_dir`` with ``~`` expanded; by default ``trainer_output`` and ``runs/...`` in it."""
    args.output_dir = os.path.expanduser("trainer_output" if args.output_dir is None else args.output_dir)
    if args.logging_dir is None:
        now = datetime.datetime.now().strftime("%b%d_%H-%M-%S")
        args.logging_dir = os.path.join(args.output_dir, "runs", f"{now}_{socket.gethostname()}")
    args.logging_dir = os.path.expanduser(args.logging_dir)


def library_log_level() -> int:
    """The level below which trainkit's loggers say nothing.

    That of the logger ``trainkit`` where one was set; else that of transformers, if it is loaded; else Python's.
    """
    logger = logging.getLogger("trainkit")
    if logger.level == logging.NOTSET and "transformers" in sys.modules:
        logger = logging.getLogger("transformers")
    return logger.getEffectiveLevel()


def settle_enums(args: TrainingArguments) -> None:
    """Turn names into members of their enumerations, and words into lists of them.

    Raises: ValueError naming the enumeration and its values.
    """
    args.eval_strategy = IntervalStrategy(args.eval_strategy)
    args.logging_strategy = IntervalStrategy(args.logging_strategy)
    args.save_strategy = SaveStrategy(args.save_strategy)
    args.hub_strategy = HubStrategy(args.hub_strategy)
    args.lr_scheduler_type = SchedulerType(args.lr_scheduler_type)
    args.optim = OptimizerNames(args.optim)
    words = args.debug.split() if isinstance(args.debug, str) else args.debug or []
    args.debug = [DebugOption(word) for word in words]
    args.report_to = tracker_list(args.report_to)
    if isinstance(args.include_num_input_tokens_seen, bool):
        args.include_num_input_tokens_seen = "all" if args.include_num_input_tokens_seen else "no"
    if args.include_num_input_tokens_seen not in ("all", "non_padding", "no"):
        raise ValueError(
            f"include_num_input_tokens_seen: got {args.include_num_input_tokens_seen!r}, expected one of: all, "
            "non_padding, no, or a boolean"
        )
    args.do_eval = args.do_eval or args.eval_strategy != IntervalStrategy.NO


def check_intervals(args: TrainingArguments) -> None:
    """Complete ``eval_steps``; make intervals above 1 integers.

    Raises: ValueError for an interval that is negative, that is 0 where one is needed, or above 1 and not integral.
    """
    if args.eval_strategy == "steps" and not args.eval_steps:
        if not args.logging_steps:
            raise ValueError(
                f"eval_steps: got {args.eval_steps} with logging_steps={args.logging_steps} and eval_strategy='steps', "
                "expected one of them above 0"
            )
        args.eval_steps = args.logging_steps
    if args.logging_strategy == "steps" and args.logging_steps == 0:
        raise ValueError("logging_steps: got 0 with logging_strategy='steps', expected a number above 0")
    for kind in ("logging", "eval", "save"):
        name = f"{kind}_steps"
        steps = getattr(args, name)
        if getattr(args, f"{kind}_strategy") != "steps":
            continue
        if steps < 0:
            raise ValueError(f"{name}: got {steps} with {kind}_strategy='steps', expected a number above 0")
        if steps > 1 and steps != int(steps):
            raise ValueError(f"{name}: got {steps}, expected an integer, or a share of the run below 1")
        if steps > 1:
            setattr(args, name, int(steps))


def check_best_model(args: TrainingArguments) -> None:
    """Complete the metric of the best model and its direction.

    Raises: ValueError if the best model would not be among those saved, or a plateau schedule had no evaluations.
    """
    if args.load_best_model_at_end and args.save_strategy != SaveStrategy.BEST:
        if args.eval_strategy != args.save_strategy:
            raise ValueError(
                f"load_best_model_at_end: got eval_strategy={str.__str__(args.eval_strategy)!r} and save_strategy="
                f"{str.__str__(args.save_strategy)!r}, expected the same for both, or save_strategy='best'"
            )
        if args.eval_strategy == IntervalStrategy.STEPS:
            _check_multiple(args.save_steps, args.eval_steps or 0)
    plateau = args.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU
    if plateau and args.eval_strategy == IntervalStrategy.NO:
        raise ValueError("lr_scheduler_type: got 'reduce_lr_on_plateau' with eval_strategy='no', expected evaluations")
    if (args.load_best_model_at_end or plateau) and args.metric_for_best_model is None:
        args.metric_for_best_model = "loss"
    if args.greater_is_better is None and args.metric_for_best_model is not None:
        args.greater_is_better = not args.metric_for_best_model.endswith("loss")


def _check_multiple(save_steps: float, eval_steps: float) -> None:
    got = f"load_best_model_at_end: got save_steps={save_steps} and eval_steps={eval_steps}"
    if save_steps and (save_steps < 1) != (eval_steps < 1):
        raise ValueError(f"{got}, a share of the run and a number of updates; expected two of the same kind")
    # Exact in decimals: as floats, 0.3 is no multiple of 0.1.
    if Fraction(str(save_steps)) % Fraction(str(eval_steps)) != 0:
        raise ValueError(f"{got}, expected save_steps to be a multiple of eval_steps")


def check_precision(args: TrainingArguments) -> None:
    """Refuse reduced precision that contradicts itself or that the hardware lacks. No flag is set.

    Raises: ValueError.
    """
    for fp16, bf16 in (("fp16", "bf16"), ("fp16_full_eval", "bf16_full_eval")):
        if getattr(args, fp16) and getattr(args, bf16):
            raise ValueError(f"{fp16}: got True together with {bf16}=True, expected at most one of them")
        if getattr(args, bf16) and not args.use_cpu and not accelerator_has_bf16():
            raise ValueError(
                f"{bf16}: got True, but there is no accelerator with bfloat16; set use_cpu=True to train on the CPU"
            )
    if args.tf32 and not accelerator_has_tf32():
        raise ValueError("tf32: got True, but there is no CUDA device of compute capability 8.0 or higher")


def accelerator_has_bf16() -> bool:
    """Whether the current accelerator computes in bfloat16."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    if torch.xpu.is_available():
        return bool(torch.xpu.is_bf16_supported())
    return torch.backends.mps.is_available() and torch.backends.mps.is_macos_or_newer(14, 0)


def accelerator_has_tf32() -> bool:
    """Whether the current CUDA device has TF32 matrix products."""
    return torch.cuda.is_available() and torch.version.cuda is not None and torch.cuda.get_device_capability()[0] >= 8


def settle_compile(args: TrainingArguments) -> None:
    """A backend or a mode asks for compilation; the backend is ``inductor`` by default."""
    if args.torch_compile_backend is not None or args.torch_compile_mode is not None:
        args.torch_compile = True
    if args.torch_compile and args.torch_compile_backend is None:
        args.torch_compile_backend = "inductor"


def check_data(args: TrainingArguments) -> None:
    """Complete the options of data and metrics.

    Raises: ValueError or TypeError.
    """
    config = args.accelerator_config = AcceleratorConfig.parse(args.accelerator_config)
    if config.use_configured_state and not _configured():
        raise ValueError(
            "accelerator_config: got use_configured_state=True, but no Accelerator or PartialState was made yet"
        )
    if args.use_cpu:
        args.dataloader_pin_memory = False
    if args.dataloader_num_workers == 0 and args.dataloader_prefetch_factor is not None:
        raise ValueError(
            f"dataloader_prefetch_factor: got {args.dataloader_prefetch_factor} with dataloader_num_workers=0, "
            "expected None or some workers"
        )
    unknown = [name for name in args.include_for_metrics if name not in ("inputs", "loss")]
    if unknown:
        raise ValueError(f"include_for_metrics: got {unknown}, expected some of: inputs, loss")
    if isinstance(args.label_names, str):
        raise TypeError(f"label_names: got the text {args.label_names!r}, expected a list of names")
    args.lr_scheduler_kwargs = {} if args.lr_scheduler_kwargs is None else args.lr_scheduler_kwargs
    for name in ("lr_scheduler_kwargs", "gradient_checkpointing_kwargs"):
        value = getattr(args, name)
        if value is not None and not isinstance(value, Mapping):
            raise TypeError(f"{name}: got {value!r}, expected a dict or a JSON object as text")


def _configured() -> bool:
    state = sys.modules.get("accelerate.state")
    return state is not None and bool(state.PartialState._shared_state)


def settle_parallelism(args: TrainingArguments) -> None:
    """``parallelism_config`` as accelerate's object, where it was given as a mapping.

    Raises: TypeError for anything else.
    """
    given = args.parallelism_config
    if isinstance(given, str):
        given = json.loads(given)
    if isinstance(given, Mapping):
        from accelerate.parallelism_config import ParallelismConfig

        args.parallelism_config = ParallelismConfig(**given)
    elif given is not None and type(given).__name__ != "ParallelismConfig":
        raise TypeError(f"parallelism_config: got {type(given).__name__}, expected a dict or a ParallelismConfig")
