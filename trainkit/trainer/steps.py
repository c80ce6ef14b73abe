"""How the Trainer takes one update: as one call of a StepFn, or microbatch by microbatch through ``training_step``.

Both leave the same numbers. The first is used wherever nothing is overridden that works on single microbatches.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
from trainkit.optim.transform import Transform, transform
from trainkit.state import TrainState, host_step, init_state
from trainkit.step import apply_updates
from trainkit.types import Buffers, LossFn, LossOutput, Metrics, OptState, Params

if TYPE_CHECKING:
    from trainkit.execution.compile import CompiledStep

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
    # Even of a scalar it would be another node of the graph.
    return value.reshape(()) if value.dim() else value


def with_left_gradients(module: nn.Module) -> Transform:
    """Add what a backward pass of somebody else has left in the ``grad`` of parameters, and take it away there.

    So an auxiliary part that calls ``backward()`` in the forward pass is trained, as in a loop written by hand.
    """
    parameters = dict(module.named_parameters())

    def update(grads: Params, opt_state: OptState, params: Params, /, **extra: Any) -> tuple[Params, OptState]:
        left = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        if not left:
            return grads, opt_state
        for name in left:
            parameters[name].grad = None
        found: dict[str, Tensor] = {**tree.named(grads)}
        for name, grad in left.items():
            found[name] = found[name] + grad if name in found else grad
        return tree.frozen({name: found[name] for name in parameters if name in found}), opt_state

    return transform(lambda params: tree.frozen(), update)


def _entries(kept: Iterable[dict[str, Any]]) -> list[Any]:
    """What modules hold under their names."""
    return list(itertools.chain.from_iterable(map(dict.values, kept)))


def _are(some: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))


_REQUIRES_GRAD = operator.attrgetter("requires_grad")


@dataclass(frozen=True)
class _Steps:
    """What one set of trained parameters needs.

    Args:
        one: the step for one microbatch.
        several: the step for a group.
        update: of both.
        names: of the parameters that may be trained.
        watched: parameters of which the steps are for those that require gradients, or do not, as ``trained`` says.
        trained: see there.
        has_rule: whether the update is the optimizer's rule and not its ``step()``.
    """

    one: CompiledStep
    several: CompiledStep
    update: Transform
    names: list[str]
    watched: list[nn.Parameter]
    trained: list[bool]
    has_rule: bool


class LiveRun:
    """A module and its torch optimizer, trained by one call of a StepFn per group of microbatches, in their own memory.

    step = apply_updates(accumulate(value_and_grad(loss)), chain(clip_by_global_norm, update)), by ``compile_step``. The
    update is the object's own ``step()`` (:func:`~trainkit.optim.live`); compiled, its rule over its memory where there
    is one (:func:`~trainkit.optim.object_rule`), so that the whole step is one graph. Parameters that somebody
    freezes or unfreezes are so from the next update on; once some are exchanged a new run is needed
    (:meth:`is_of_its_module`).

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
        modules = list(module.modules())
        self._children = [m._modules for m in modules]
        self._own = [m._parameters for m in modules]
        self._structure, self._parameters = _entries(self._children), _entries(self._own)
        self._made: dict[Any, _Steps] = {}
        self._steps, self._state = self._begin(step)

    def is_of_its_module(self) -> bool:
        """Whether the module still has the parameters and the parts that it had: somebody may have exchanged some."""
        return _are(_entries(self._own), self._parameters) and _are(_entries(self._children), self._structure)

    def __call__(self, group: list[Microbatch]) -> Metrics:
        """One update; metrics are ``loss`` and, where gradients are clipped, ``grad_norm``."""
        if list(map(_REQUIRES_GRAD, self._steps.watched)) != self._steps.trained:
            self.close()
            self._steps, self._state = self._begin(host_step(self._state))
        if self._steps.has_rule:
            write_rates(self._optimizer, self._state.opt_state["1"] if self._max_grad_norm else self._state.opt_state)
        if len(group) == 1:
            self._state, metrics = self._steps.one(self._state, group[0])
        else:
            self._state, metrics = self._steps.several(self._state, group)
        return metrics

    def _begin(self, step: int) -> tuple[_Steps, TrainState]:
        """Steps and a state for the parameters that are trained now."""
        if not self._compiled:
            steps = self._eager_steps()
        else:
            has_rule = has_object_rule(self._optimizer)
            kind = has_rule, *(p.requires_grad for p in self._module.parameters())
            if kind not in self._made:
                self._made[kind] = self._compiled_steps(has_rule)
            steps = self._made[kind]
        state = init_state(self._module, steps.update, seed=self._seed, copy=False, trainable=steps.names)
        return steps, state.replace(step=torch.full_like(state.step, step))

    def _eager_steps(self) -> _Steps:
        """For all that the optimizer may train, since a forward pass, too, may freeze and unfreeze a part."""
        held = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        named = {n: p for n, p in self._module.named_parameters() if p.requires_grad or id(p) in held}
        own = tree.frozen(named)
        gradient = functools.partial(value_and_grad, live_group_loss(self._compute_loss), attach=lambda state: own)
        clip = [clip_by_global_norm(self._max_grad_norm)] if self._max_grad_norm else []
        every = dict(self._module.named_parameters())
        update = chain(with_left_gradients(self._module), *clip, live(self._optimizer, every))
        others = [p for name, p in self._module.named_parameters() if name not in named]
        return self._steps_of(gradient, update, named, others, strategy="eager")

    def _compiled_steps(self, has_rule: bool) -> _Steps:
        named = {name: p for name, p in self._module.named_parameters() if p.requires_grad}
        rule = object_rule(self._optimizer, named) if has_rule else live(self._optimizer, named)
        gradient = functools.partial(value_and_grad, whole_group_loss(self._module, self._compute_loss))
        strategy = "whole" if has_rule else "split"
        every = list(self._module.parameters())
        update = chain(clip_by_global_norm(self._max_grad_norm), rule) if self._max_grad_norm else rule
        return self._steps_of(gradient, update, named, every, strategy=strategy, has_rule=has_rule)

    def _steps_of(
        self,
        gradient: Any,
        update: Transform,
        named: Mapping[str, nn.Parameter],
        watched: list[nn.Parameter],
        *,
        strategy: Any,
        has_rule: bool = False,
    ) -> _Steps:
        # Inductor comes with it, whose import takes as long as all the rest of the Trainer.
        from trainkit.execution import compile_step

        one = apply_updates(gradient(unused="omit", mean=True), update)
        several = apply_updates(accumulate(gradient(unused="omit")), update)
        return _Steps(
            compile_step(one, strategy=strategy),
            compile_step(several, strategy=strategy),
            update,
            list(named),
            watched,
            list(map(_REQUIRES_GRAD, watched)),
            has_rule,
        )

    def close(self) -> None:
        """Leave the optimizer as its own ``step()`` needs it."""
        if self._steps.has_rule:
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
