"""How the Trainer takes one update: as one call of a StepFn, or microbatch by microbatch through ``training_step``.

Both leave the same numbers. The first is used wherever nothing is overridden that works on single microbatches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainkit import rng
from trainkit.accumulate import accumulate
from trainkit.execution import compile_step
from trainkit.functional import functional
from trainkit.gradients import value_and_grad
from trainkit.optim import chain, clip_by_global_norm
from trainkit.optim.live import live
from trainkit.state import TrainState, init_state
from trainkit.step import apply_updates
from trainkit.types import Batch, Buffers, GradientFn, LossFn, LossOutput, Metrics, Params, StepFn

ComputeLoss = Callable[[Any, Any], Tensor]
"""``(inputs, number of items in the group) -> loss`` of one microbatch."""


@dataclass(frozen=True)
class Microbatch:
    """One microbatch of a group.

    Args:
        inputs: what the model is called with.
        items: labels counted over the whole group; None where nobody counts.
        share: what its loss counts in the divisor: 1 / n if the loss of the group is the sum over its n microbatches,
            1 if it is their mean.
    """

    inputs: Any
    items: Any
    share: float


torch.utils._pytree.register_dataclass(Microbatch)


def whole_group_loss(module: nn.Module, compute_loss: ComputeLoss) -> LossFn:
    """``compute_loss`` as a LossFn over a :class:`Microbatch`.

    The loss of a group is sum_i loss_i / sum_i share_i, which is the sum or the mean of the losses, as ``share`` says.

    Args:
        module: the model, whose tensors are exchanged while ``compute_loss`` runs.
        compute_loss: uses the module.
    """
    model = functional(module, call=compute_loss)

    def loss(params: Params, buffers: Buffers, batch: Microbatch) -> LossOutput:
        value, new_buffers = model(params, buffers, batch.inputs, batch.items)
        return LossOutput(_scalar(value), batch.share, buffers=new_buffers)

    return loss


def loss_of(outputs: Any, inputs: Any) -> Any:
    """The loss in a model's outputs: the entry ``loss`` of a mapping, or the first of a tuple.

    Raises: ValueError if a mapping has none, with the names of what there is.

    Example:
        >>> loss_of((torch.tensor(2.0), torch.zeros(3)), {})
        tensor(2.)
    """
    if isinstance(outputs, Mapping):
        if "loss" not in outputs:
            given = ", ".join(inputs) if isinstance(inputs, Mapping) else type(inputs).__name__
            raise ValueError(
                f"model: its output has no loss, only {', '.join(map(str, outputs))}; it was given {given}. Give "
                "labels that it knows, pass compute_loss_func, or override compute_loss"
            )
        return outputs["loss"]
    return outputs[0]


def _scalar(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"compute_loss: returned {got}, expected a tensor with one element")
    return value.reshape(())


def group_step(
    module: nn.Module, compute_loss: ComputeLoss, optimizer: Optimizer, *, max_grad_norm: float | None, strategy: Any
) -> StepFn:
    """One update of the live module and optimizer as a StepFn over a list of microbatches.

    step = apply_updates(accumulate(value_and_grad(loss)), chain(clip_by_global_norm, live(optimizer))), compiled, in
    the memory of the module.

    Args:
        module: the model.
        compute_loss: as for :func:`whole_group_loss`.
        optimizer: holds the module's own parameters.
        max_grad_norm: None or 0 clips nothing.
        strategy: "eager", or "split", which compiles the loss.

    Returns: a StepFn; metrics are ``loss`` and, where gradients are clipped, ``grad_norm``.
    """
    loss = whole_group_loss(module, compute_loss)
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    update = live(optimizer, named)
    if max_grad_norm:
        update = chain(clip_by_global_norm(max_grad_norm), update)
    alone = compile_step(apply_updates(value_and_grad(loss, unused="omit", mean=True), update), strategy=strategy)
    several = compile_step(apply_updates(_over_list(loss), update), strategy=strategy)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return alone(state, batch[0]) if len(batch) == 1 else several(state, batch)

    return step


def _over_list(loss: LossFn) -> GradientFn:
    return accumulate(value_and_grad(loss, unused="omit"))


def live_state(
    module: nn.Module, optimizer: Optimizer, *, max_grad_norm: float | None, seed: int, step: int
) -> TrainState:
    """The state whose tensors are those of the module, at ``step``."""
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    update = live(optimizer, named)
    if max_grad_norm:
        update = chain(clip_by_global_norm(max_grad_norm), update)
    state = init_state(module, update, seed=seed, copy=False)
    return state.replace(step=torch.full_like(state.step, step))


class Clip(Protocol):
    """``(parameters, max_norm) -> norm``."""

    def __call__(self, parameters: Any, max_norm: float, /) -> Any: ...


def seed_of_microbatch(seed: int, step: int, microbatch: int | None, rank: int = 0) -> int:
    """The seed of the random draws of a microbatch: the same that a StepFn has for it.

    Args:
        seed: of the run.
        step: completed updates.
        microbatch: its place in the group; None if it is the only one.
        rank: of this process.
    """
    key = int(rng.make_key(seed))
    if microbatch is not None:
        key = rng.fold_in_host(key, microbatch)
    return rng.fold_in_host(key, step, rank)


def filtered(total: Tensor, loss: Tensor, updates_since_log: Tensor | int) -> tuple[Tensor, Tensor]:
    """A loss that may be added to the logged one, and whether it had to be replaced: without a wait for the device.

    A NaN or infinite loss counts as the mean of what was summed since the last log: total / (1 + updates since).

    Example:
        >>> filtered(torch.tensor(4.0), torch.tensor(float("nan")), 1)
        (tensor(2.), tensor(True))
    """
    bad = ~torch.isfinite(loss)
    return torch.where(bad, total / (1 + updates_since_log), loss), bad


def inputs_of(group: Sequence[Any], prepare: Callable[[Any], Any], items: Any, normalised: bool) -> list[Microbatch]:
    """The microbatches of a group as a StepFn takes them."""
    share = 1.0 / len(group) if normalised else 1.0
    return [Microbatch(prepare(inputs), items, share) for inputs in group]


def overridden(obj: Any, base: type, names: Sequence[str]) -> list[str]:
    """Which of the methods a subclass, or the object itself, has replaced.

    Example:
        >>> class A:
        ...     def f(self): ...
        >>> class B(A):
        ...     def f(self): ...
        >>> overridden(B(), A, ["f"]), overridden(A(), A, ["f"])
        (['f'], [])
    """
    own: Mapping[str, Any] = getattr(obj, "__dict__", {})
    return [name for name in names if name in own or getattr(type(obj), name) is not getattr(base, name)]
