"""How the Trainer takes one update: as one call of a StepFn, or microbatch by microbatch through ``training_step``.

Both leave the same numbers. The first is used wherever nothing is overridden that works on single microbatches.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from trainkit import rng, tree
from trainkit.accumulate import accumulate
from trainkit.functional import functional
from trainkit.gradients import value_and_grad
from trainkit.optim import chain, clip_by_global_norm
from trainkit.optim.live import live
from trainkit.optim.object_rule import has_object_rule, object_rule, part_counters, write_rates
from trainkit.state import host_step, init_state
from trainkit.step import apply_updates
from trainkit.types import Buffers, LossFn, LossOutput, Metrics, Params

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


def _put_together(parts: Any, share: Any) -> Microbatch:
    inputs, items = parts
    return Microbatch(inputs, items, share)


# The share is one number for all groups of a size, so that it is no input of a graph.
pytree.register_pytree_node(
    Microbatch,
    lambda one: ([one.inputs, one.items], one.share),
    _put_together,
    flatten_with_keys_fn=lambda one: (
        [(pytree.GetAttrKey("inputs"), one.inputs), (pytree.GetAttrKey("items"), one.items)],
        one.share,
    ),
)


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


def live_group_loss(compute_loss: ComputeLoss) -> LossFn:
    """The same for states whose tensors are the module's own: nothing is exchanged, and the module is written into."""

    def loss(params: Params, buffers: Buffers, batch: Microbatch) -> LossOutput:
        return LossOutput(_scalar(compute_loss(batch.inputs, batch.items)), batch.share)

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


_REQUIRES_GRAD = operator.attrgetter("requires_grad")


class LiveRun:
    """A module and its torch optimizer, trained by one call of a StepFn per group of microbatches, in their own memory.

    step = apply_updates(accumulate(value_and_grad(loss)), chain(clip_by_global_norm, update)), by ``compile_step``. The
    update is the object's own ``step()`` (:func:`~trainkit.optim.live`); compiled, its rule over its memory where there
    is one (:func:`~trainkit.optim.object_rule`), so that the whole step is one graph. Parameters that somebody
    freezes or unfreezes are so from the next update on.

    Args:
        module: the model.
        compute_loss: as for :func:`whole_group_loss`.
        optimizer: holds the module's own parameters.
        max_grad_norm: None or 0 clips nothing.
        compiled: whether to compile.
        seed: of the run.
        step: completed updates.
    """

    def __init__(
        self,
        module: nn.Module,
        compute_loss: ComputeLoss,
        optimizer: Optimizer,
        *,
        max_grad_norm: float | None,
        compiled: bool,
        seed: int,
        step: int,
    ) -> None:
        self._module, self._compute_loss, self._optimizer = module, compute_loss, optimizer
        self._max_grad_norm, self._compiled, self._seed = max_grad_norm, compiled, seed
        self._begin(step)

    def _begin(self, step: int) -> None:
        """A step for the parameters that are trained now."""
        # Inductor comes with it, whose import takes as long as all the rest of the Trainer.
        from trainkit.execution import compile_step

        named = {name: p for name, p in self._module.named_parameters() if p.requires_grad}
        self._parameters = list(self._module.parameters())
        self._trained = list(map(_REQUIRES_GRAD, self._parameters))
        self._has_rule = self._compiled and has_object_rule(self._optimizer)
        update = object_rule(self._optimizer, named) if self._has_rule else live(self._optimizer, named)
        if self._max_grad_norm:
            update = chain(clip_by_global_norm(self._max_grad_norm), update)
        if self._compiled:
            gradient: Any = functools.partial(value_and_grad, whole_group_loss(self._module, self._compute_loss))
            strategy: Any = "whole" if self._has_rule else "split"
        else:
            own = tree.frozen(named)
            gradient = functools.partial(value_and_grad, live_group_loss(self._compute_loss), attach=lambda state: own)
            strategy = "eager"
        one = apply_updates(gradient(unused="omit", mean=True), update)
        several = apply_updates(accumulate(gradient(unused="omit")), update)
        self._one, self._several = compile_step(one, strategy=strategy), compile_step(several, strategy=strategy)
        state = init_state(self._module, update, seed=self._seed, copy=False)
        self._state = state.replace(step=torch.full_like(state.step, step))

    def __call__(self, group: list[Microbatch]) -> Metrics:
        """One update; metrics are ``loss`` and, where gradients are clipped, ``grad_norm``."""
        if list(map(_REQUIRES_GRAD, self._parameters)) != self._trained:
            self.close()
            self._begin(host_step(self._state))
        if self._has_rule:
            write_rates(self._optimizer, self._state.opt_state["1"] if self._max_grad_norm else self._state.opt_state)
        if len(group) == 1:
            self._state, metrics = self._one(self._state, group[0])
        else:
            self._state, metrics = self._several(self._state, group)
        return metrics

    def close(self) -> None:
        """Leave the optimizer as its own ``step()`` needs it."""
        if self._has_rule:
            part_counters(self._optimizer)


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
