"""What the arguments mean for accelerate and for torch's global flags, as values: nothing is set by asking."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any

import torch

from trainkit.trainer.arguments_checks import accelerator_has_tf32
from trainkit.trainer.deepspeed_options import deepspeed_config
from trainkit.trainer.fsdp_options import fsdp_plugin_options
from trainkit.trainer.processes import wants_cpu

if TYPE_CHECKING:
    from trainkit.trainer.arguments import TrainingArguments


def accelerator_options(args: TrainingArguments) -> dict[str, Any]:
    """What an ``accelerate.Accelerator`` for these arguments is made with.

    Returns: by name
        ``cpu``: bool;
        ``mixed_precision``: "fp16" or "bf16"; where neither is asked for that of ``accelerate launch``, else "no";
        ``dataloader_config``: the keyword arguments of ``DataLoaderConfiguration``;
        ``ddp_kwargs``: those of ``DistributedDataParallelKwargs`` that were set;
        ``fsdp_plugin``: those of ``FullyShardedDataParallelPlugin``, or None;
        ``deepspeed``: the completed configuration for ``DeepSpeedPlugin(hf_ds_config=...)``, or None;
        ``parallelism_config``: a ``ParallelismConfig``, or None.

    Example:
        >>> from trainkit.trainer.arguments import TrainingArguments
        >>> options = accelerator_options(TrainingArguments("out", bf16=True, use_cpu=True, report_to="none"))
        >>> options["mixed_precision"], options["cpu"], options["dataloader_config"]["even_batches"]
        ('bf16', True, True)

    Source: Trainer 4.57: ``create_accelerator_and_postprocess``.
    """
    config: Any = args.accelerator_config
    loading = {
        k: v for k, v in config.to_dict().items() if k not in ("gradient_accumulation_kwargs", "use_configured_state")
    }
    if loading.get("non_blocking") and not args.dataloader_pin_memory:
        warnings.warn(
            "accelerator_config: non_blocking copies wait all the same from memory that is not pinned; set "
            "dataloader_pin_memory=True",
            stacklevel=2,
        )
    return {
        "cpu": wants_cpu(args),
        "mixed_precision": mixed_precision(args),
        "dataloader_config": {**loading, "data_seed": args.data_seed},
        "ddp_kwargs": ddp_options(args),
        "fsdp_plugin": fsdp_plugin_options(args),
        "deepspeed": deepspeed_config(args) if args.deepspeed else None,
        "parallelism_config": args.parallelism_config,
    }


def mixed_precision(args: TrainingArguments) -> str:
    """The dtype of autocast: "fp16", "bf16", that which ``accelerate launch`` was asked for, or "no"."""
    if args.fp16:
        return "fp16"
    return "bf16" if args.bf16 else os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def ddp_options(args: TrainingArguments) -> dict[str, Any]:
    """The options of ``DistributedDataParallel`` that were given; the others are the Trainer's to choose."""
    options = {
        "find_unused_parameters": args.ddp_find_unused_parameters,
        "bucket_cap_mb": args.ddp_bucket_cap_mb,
        "broadcast_buffers": args.ddp_broadcast_buffers,
    }
    return {name: value for name, value in options.items() if value is not None}


def wanted_tf32(args: TrainingArguments) -> bool | None:
    """Whether the arguments ask for TF32: ``tf32``, else yes with ``torch_compile`` unless in fp16; None: as it is."""
    if args.tf32 is not None:
        return args.tf32
    return True if args.torch_compile and (args.bf16 or not args.fp16) else None


def apply_tf32(args: TrainingArguments) -> bool | None:
    """Switch TF32 for matrix products and convolutions on CUDA, for the whole process.

    Returns: what was set; None if the arguments leave it alone or the device has no TF32.
    """
    wanted = wanted_tf32(args)
    if wanted is None or not accelerator_has_tf32():
        return None
    torch.backends.cuda.matmul.allow_tf32 = wanted
    torch.backends.cudnn.allow_tf32 = wanted
    return wanted
