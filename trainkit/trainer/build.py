"""What the Trainer's constructor decides: checks before any side effect, the accelerator, placement, seeds."""

from __future__ import annotations

import inspect
import logging
import os
import random
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from trainkit.trainer.enums import ParallelMode
from trainkit.trainer.foreign import base_of, forward_parameters, is_peft_model, is_pretrained_model, takes_any_keyword
from trainkit.trainer.processing import check_processing
from trainkit.trainer.samplers import has_length


def check_constructor(
    args: Any,
    *,
    model: Any,
    model_init: Any,
    train_dataset: Any,
    eval_dataset: Any,
    data_collator: Any,
    compute_metrics: Any,
    optimizers: tuple[Any, Any],
    optimizer_cls_and_kwargs: Any,
    processing_class: Any,
) -> None:
    """Refuse arguments that cannot go together.

    Raises: RuntimeError, ValueError or TypeError, each naming the arguments (section 1.1 of the Trainer's surface).

    Source: Trainer 4.57: ``__init__``.
    """
    optimizer, scheduler = optimizers
    check_processing(processing_class)
    if model is None and model_init is None:
        raise RuntimeError("model: got neither a model nor model_init; expected one of them")
    if args.batch_eval_metrics and callable(compute_metrics) and not takes(compute_metrics, "compute_result"):
        raise ValueError("compute_metrics: with batch_eval_metrics=True it needs a parameter compute_result (bool)")
    if args.eval_strategy != "no" and eval_dataset is None:
        raise ValueError(
            f"eval_dataset: eval_strategy is {str(args.eval_strategy.value)!r} but there is no eval_dataset"
        )
    if args.metric_for_best_model is None and (args.save_strategy == "best" or args.load_best_model_at_end):
        raise ValueError(
            "metric_for_best_model: save_strategy='best' and load_best_model_at_end need the name of a metric"
        )
    if train_dataset is not None and not has_length(train_dataset) and args.max_steps <= 0:
        raise ValueError("max_steps: train_dataset has no length, so the number of updates must be given")
    if args.group_by_length and isinstance(train_dataset, torch.utils.data.IterableDataset):
        raise ValueError("group_by_length: the lengths of an IterableDataset are not known; set it to False")
    if optimizer is not None and optimizer_cls_and_kwargs is not None:
        raise RuntimeError("optimizers: got an optimizer and optimizer_cls_and_kwargs; pass one of them")
    if model_init is not None and (optimizer is not None or scheduler is not None):
        raise RuntimeError(
            "optimizers: with model_init each run makes a new model, which a given optimizer or scheduler would not "
            "know; override create_optimizer_and_scheduler"
        )
    if data_collator is not None and not callable(data_collator):
        raise TypeError(f"data_collator: got {type(data_collator).__name__}, expected a function of a list of samples")
    if args.fsdp and args.parallel_mode != ParallelMode.DISTRIBUTED:
        raise ValueError("fsdp: it spreads a model over processes, and this is the only one; start several (torchrun)")
    if args.fsdp and (optimizer is not None or scheduler is not None):
        raise RuntimeError("optimizers: FSDP replaces the parameters; override create_optimizer_and_scheduler")


def renamed(old: Any, new: Any, old_name: str, new_name: str) -> Any:
    """The value of an argument that may come under its old name, with a warning. Raises: ValueError for both."""
    if old is None:
        return new
    if new is not None:
        raise ValueError(f"{old_name}: it is the old name of {new_name}; pass one of them")
    one_warning(f"{old_name}: use {new_name}", FutureWarning)
    return old


def check_model(model: Any) -> None:
    """Refuse models that cannot be trained.

    Raises:
        TypeError: no module.
        ValueError: a headless base model, or a quantised model without adapters.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    if is_pretrained_model(model):
        base = getattr(model, "base_model", model)
        headless = base is model and not is_peft_model(model)
        # A base model returns hidden states; classes with a head have one beside it.
        if headless and type(model).__name__.endswith("Model") and not takes_any_loss(model):
            raise ValueError(
                f"model: {type(model).__name__} has no head and returns no loss; expected a class with one, such as "
                "...ForSequenceClassification"
            )
    quantised = getattr(model, "is_quantized", False) and not getattr(model, "_hf_peft_config_loaded", False)
    if quantised and not is_peft_model(model) and not _trainable_when_quantised(model):
        raise ValueError("model: it is quantised and its method cannot be trained; add adapters (PEFT) to it")


def takes_any_loss(model: Any) -> bool:
    """Whether ``forward`` has a parameter for labels, or returns a loss when asked."""
    return any("label" in name or name == "return_loss" for name in forward_parameters(model))


def _trainable_when_quantised(model: Any) -> bool:
    quantizer = getattr(model, "hf_quantizer", None)
    return bool(getattr(quantizer, "is_trainable", False))


def takes(fn: Callable[..., Any], name: str, *, position: int | None = None) -> bool:
    """Whether a function takes a keyword, or as many arguments as to have one at ``position``.

    Example:
        >>> takes(lambda a, b: 0, "b"), takes(lambda a, **more: 0, "b"), takes(lambda a, other: 0, "b", position=1)
        (True, True, True)
    """
    parameters = inspect.signature(fn).parameters.values()
    if any(p.name == name or p.kind is p.VAR_KEYWORD for p in parameters):
        return True
    by_place = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    any_place = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    return position is not None and (any_place or len(by_place) > position)


def call_model_init(model_init: Callable[..., Any], trial: Any) -> nn.Module:
    """The model of ``model_init``, which takes nothing or the trial.

    Raises: RuntimeError if it takes more, or returns None.
    """
    wanted = len(inspect.signature(model_init).parameters)
    if wanted > 1:
        raise RuntimeError(f"model_init: it takes {wanted} arguments, expected none or one (the trial)")
    model: nn.Module | None = model_init(trial) if wanted else model_init()
    if model is None:
        raise RuntimeError("model_init: it returned None, expected a model")
    return model


def accepts_loss_kwargs(model: Any) -> bool:
    """Whether the model divides its loss by ``num_items_in_batch`` itself.

    Its attribute ``accepts_loss_kwargs`` where there is one, else whether ``forward`` has a ``**kwargs``.
    """
    declared = getattr(base_of(model), "accepts_loss_kwargs", None)
    return takes_any_keyword(model) if declared is None else bool(declared)


def is_model_parallel(model: Any, device: torch.device) -> bool:
    """Whether the model is spread over devices already."""
    if getattr(model, "is_parallelizable", False) and getattr(model, "model_parallel", False):
        return True
    placed = getattr(model, "hf_device_map", None)
    if placed is None:
        return False
    devices = {torch.device(d) for d in placed.values() if d not in ("cpu", "disk")}
    return len(devices) > 1 or (len(devices) == 1 and next(iter(devices)) != device)


def set_log_level(args: Any) -> None:
    """Let trainkit's logger, and that of transformers if it is loaded, say what this process is asked to say.

    Source: Trainer 4.57: ``__init__``; "passive" leaves them as they are.
    """
    if (args.log_level if args.should_log else args.log_level_replica) != "passive":
        for name in ("trainkit", "transformers"):
            if name in sys.modules:
                logging.getLogger(name).setLevel(args.get_process_log_level())


def set_seed(seed: int, *, deterministic: bool = False) -> None:
    """Seed Python, NumPy and torch on all devices; with ``deterministic`` also ask for deterministic kernels.

    Source: ``set_seed`` and ``enable_full_determinism`` of transformers 4.57.
    """
    random.seed(seed)
    # NumPy's own generator object is what user code that calls np.random.* draws from.
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False


def one_warning(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the caller's caller."""
    warnings.warn(message, category, stacklevel=3)
