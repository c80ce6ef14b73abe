"""The accelerator of the Trainer, and what is asked of it."""

from __future__ import annotations

import functools
import gc
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from trainkit.trainer.accelerator_config import accumulation_steps
from trainkit.trainer.accelerator_options import accelerator_options, apply_tf32, ddp_options
from trainkit.trainer.accumulate_predictions import nested_map
from trainkit.trainer.foreign import is_pretrained_model
from trainkit.trainer.processes import process_state


def make_accelerator(args: Any) -> Any:
    """A ``accelerate.Accelerator`` for the arguments.

    ``gradient_accumulation_kwargs["num_steps"]`` of ``accelerator_config`` becomes ``gradient_accumulation_steps``.

    Raises: ValueError for settings that exclude each other.

    Source: Trainer 4.57: ``create_accelerator_and_postprocess``.
    """
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration, DeepSpeedPlugin, FullyShardedDataParallelPlugin

    steps = accumulation_steps(args.accelerator_config, args.gradient_accumulation_steps)
    args.gradient_accumulation_steps = steps
    process_state(args)
    options = accelerator_options(args)
    apply_tf32(args)
    plugins: dict[str, Any] = {"parallelism_config": options["parallelism_config"]}
    if options["fsdp_plugin"] is not None:
        plugins["fsdp_plugin"] = FullyShardedDataParallelPlugin(**options["fsdp_plugin"])
    if options["deepspeed"] is not None:
        plugins["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=options["deepspeed"])
    AcceleratorState = sys.modules["accelerate.state"].AcceleratorState
    AcceleratorState._reset_state()
    return Accelerator(
        cpu=options["cpu"],
        mixed_precision=options["mixed_precision"],
        dataloader_config=DataLoaderConfiguration(**options["dataloader_config"]),
        **{name: plugin for name, plugin in plugins.items() if plugin is not None},
    )


def gather_function(accelerator: Any, *, use_object: bool) -> Callable[[Any], Any]:
    """Gathers evaluation tensors over processes, without the rows that were added to fill the last batch."""
    return functools.partial(accelerator.gather_for_metrics, use_gather_object=use_object)


def plugin_of(accelerator: Any, name: str) -> Any:
    """A plugin of the accelerator's state, or None."""
    return getattr(accelerator.state, name, None)


def enable_gradient_checkpointing(model: Any, kwargs: Any) -> None:
    """Let the model recompute activations in the backward pass, without reentry unless ``kwargs`` ask for it.

    Raises: ValueError for a model that cannot.
    """
    enable = getattr(model, "gradient_checkpointing_enable", None)
    if enable is None:
        raise ValueError(
            f"gradient_checkpointing: {type(model).__name__} has no gradient_checkpointing_enable; expected a model of "
            "transformers. For other modules use trainkit.execution.remat in a loop of your own"
        )
    enable(gradient_checkpointing_kwargs={"use_reentrant": False, **(kwargs or {})})


def wants_gradients_in_place(model: nn.Module) -> bool:
    """Whether parameters have hooks that run once their ``grad`` is complete, or get sparse gradients."""
    hooked = any(getattr(p, "_post_accumulate_grad_hooks", None) for p in model.parameters())
    return hooked or any(getattr(module, "sparse", False) is True for module in model.modules())


def recomputes_by_reentry(model: nn.Module) -> bool:
    """Whether a model of transformers recomputes by torch's reentrant form, which needs ``backward()`` on the loss.

    Example:
        >>> recomputes_by_reentry(nn.Linear(1, 1))
        False
    """
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            chosen = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
            if chosen.get("use_reentrant", True):
                return True
    return False


def set_ddp_options(accelerator: Any, args: Any, model: Any) -> None:
    """Options for DistributedDataParallel, as the arguments say.

    Source: Trainer 4.57: ``_wrap_model``.
    """
    from accelerate.utils import DistributedDataParallelKwargs

    unused = not (is_pretrained_model(model) and model.is_gradient_checkpointing)
    options = {"find_unused_parameters": unused, **ddp_options(args)}
    accelerator.ddp_handler = DistributedDataParallelKwargs(**options)


def give_group_up_last(model: Any) -> None:
    """Let a model that DistributedDataParallel has wrapped drop its process group after everything else it has.

    The last owner of a group joins its threads. When that is the reducer, it holds the lock of the interpreter, which
    a thread that has just finished a collective may wait for: after ``destroy_process_group()`` a process then hangs.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        # Attributes go in the order in which they were set.
        model.__dict__["process_group"] = model.__dict__.pop("process_group")


def with_batch_size(
    run: Callable[..., Any], batch_size: int, *, search: bool, keep: Callable[[], Callable[[], None]]
) -> Any:
    """Call ``run(batch_size=...)``; with ``search`` again with half the size after each out-of-memory error.

    Args:
        run: one attempt.
        batch_size: of the first attempt.
        search: whether to try smaller ones.
        keep: remembers where training starts and returns what puts everything back.

    Raises: RuntimeError if a batch of one row does not fit.
    """
    if not search:
        return run(batch_size=batch_size)
    restore = keep()
    while batch_size > 0:
        try:
            return run(batch_size=batch_size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            batch_size //= 2
        # After the error is gone, and with it what its traceback holds on to.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        restore()
    raise RuntimeError("auto_find_batch_size: a batch of one row does not fit into memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left.

    Example:
        >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("shapes"))
        (True, False)
    """
    texts = ("out of memory", "can't allocate memory", "cannot allocate memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(t in str(error).lower() for t in texts)


def snapshot(model: nn.Module) -> Callable[[], None]:
    """What puts the tensors of a module back as they are now. It holds a copy of them on the host."""
    before = {name: t.detach().to("cpu", copy=True) for name, t in model.state_dict().items()}

    def restore() -> None:
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(before[name])

    return restore


def traced(model: Any, dataloader: Any, prepare: Callable[[Any], Any]) -> Any:
    """The model traced with the first batch of a loader; the model itself, after one warning, where that fails.

    Source: Trainer 4.57: ``torch_jit_model_eval``.
    """
    try:
        example = prepare(next(iter(dataloader)))
        with torch.no_grad():
            trace: Any = torch.jit.trace
            made = trace(model.eval(), example_kwarg_inputs=example, strict=False)
            made = torch.jit.freeze(made)
            made(**example)
    except (RuntimeError, TypeError, ValueError, NameError, IndexError, StopIteration) as error:
        warnings.warn(f"jit_mode_eval: the model cannot be traced ({error}); it runs as it is", stacklevel=3)
        return model
    return made


def gathered(accelerator: Any, tensors: Any) -> Any:
    """A tree of tensors with the rows of all processes, one after the other; numbers become rows."""

    def rows(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return accelerator.gather(leaf.reshape(1) if leaf.dim() == 0 else leaf)

    return nested_map(rows, tensors)
