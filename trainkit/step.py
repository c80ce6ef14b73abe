"""One optimizer update as a pure function of the state and the batch."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch

from trainkit import tree
from trainkit.accumulate import accumulate as accumulated
from trainkit.accumulate import num_rows
from trainkit.gradients import LossScale, inverse, sums, value_and_grad
from trainkit.metrics import Latest, Mean
from trainkit.optim.transform import Transform, reports
from trainkit.parts import part
from trainkit.state import TrainState, advance
from trainkit.types import Batch, GradientFn, Gradients, LossFn, Metrics, OptState, StepFn

Reduce = Callable[[Gradients], Gradients]
"""Adds gradients, weights and metrics over ranks; the identity on one process."""


class PrecisionPolicy(Protocol):
    """What a precision policy changes about a step: the loss, the optimizer, the scale of the loss."""

    def loss(self, loss: LossFn, /) -> LossFn: ...

    def optimizer(self, optimizer: Transform, /) -> Transform: ...

    @property
    def scale(self) -> LossScale | None: ...


def apply_updates(gradient: GradientFn, optimizer: Transform, *, reduce: Reduce | None = None) -> StepFn:
    """Divide the gradient once by the total weight, if that is not done yet, and update the parameters.

    g = sum of gradients / sum of weights;  params, opt_state <- optimizer(g);  step <- step + 1.

    A total weight of zero (every label ignored) gives a zero gradient, not NaN.

    Args:
        gradient: gives sums and weights.
        optimizer: gets the gradient of the mean loss, and the mean loss as ``loss``.
        reduce: adds the gradients of all ranks; called once, before the division.

    Returns: a StepFn whose metrics are ``loss`` (mean), those of the loss, and what the optimizer reports.
    """

    reported = _Reports()

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with tree.temporaries():
            found = gradient(state, batch)
            if reduce is not None:
                found = reduce(sums(found))
            with torch.no_grad():
                factor = _factor(found) if found.factor is None else found.factor
                grads = tree.scaled(found.grads, factor) if found.factor is None else found.grads
                mean = found.loss_sum * factor
                params, opt_state = part("update", optimizer.apply)(grads, state.opt_state, state.params, loss=mean)
                after = advance(state, params=params, buffers=found.buffers, opt_state=opt_state)
        metrics: Metrics = {"loss": Mean(found.loss_sum, found.weight), **found.metrics}
        metrics.update((name, Latest(value.clone())) for name, value in reported.of(opt_state).items())
        return after, metrics

    return step


class _Reports:
    """What optimizer states report; of one that is updated in place it is found once."""

    def __init__(self) -> None:
        # One attribute, since other threads may take steps of other states.
        self._last: tuple[Callable[[], Any], dict[str, torch.Tensor]] = (lambda: None, {})

    def of(self, opt_state: OptState) -> dict[str, torch.Tensor]:
        if torch.compiler.is_compiling() or tree.under_vmap() or not getattr(opt_state, "is_locked", False):
            return reports(opt_state)
        known, found = self._last
        if known() is not opt_state:
            found = reports(opt_state)
            # No more than the small tensors of an old state is kept.
            self._last = weakref.ref(opt_state), found
        return found


def _factor(found: Gradients) -> torch.Tensor:
    """1 / weight, in the precision of the loss and in no less than float32."""
    return inverse(found.weight.to(torch.promote_types(found.loss_sum.dtype, torch.float32)))


def make_train_step(
    loss: LossFn,
    optimizer: Transform,
    *,
    accumulate: int | None = 1,
    precision: PrecisionPolicy | None = None,
    gradients: Callable[..., GradientFn] = value_and_grad,
    reduce: Reduce | None = None,
    rank: int = 0,
    unused: str = "error",
) -> StepFn:
    """The common training step: gradient, accumulation, optimizer.

    ``apply_updates(accumulate(value_and_grad(loss), n), optimizer)`` and nothing more; write that line yourself for
    anything else.

    Args:
        loss: ``(params, buffers, batch) -> LossOutput``.
        optimizer: a transformation; join several with ``chain``.
        accumulate: microbatches that each batch is split into; None if batches are lists of microbatches.
        precision: a policy of ``trainkit.execution.precision``; None computes in the parameters' dtype. Use
            ``policy.init_state`` or the policy's optimizer for the first state.
        gradients: how gradients are obtained, called as ``gradients(loss, rank=..., unused=..., scale=...,
            mean=...)``; ``mean`` allows to return them divided.
        reduce: adds gradients over ranks.
        rank: this process' place among the data-parallel ones.
        unused: what a parameter without gradient means, as for ``value_and_grad``.

    Returns: a pure StepFn.

    Raises: ValueError for a batch without rows or with fewer rows than microbatches, before anything changes.

    Example:
        >>> from trainkit import LossOutput, init_state
        >>> from trainkit.optim import sgd
        >>> loss = lambda params, buffers, x: LossOutput((params["weight"] * x).sum(), x.shape[0])
        >>> tx = sgd(0.5)
        >>> state = init_state(torch.nn.Linear(2, 1, bias=False), tx)
        >>> after, metrics = make_train_step(loss, tx)(state, torch.ones(4, 2))
        >>> after.params["weight"] - state.params["weight"]
        tensor([[-0.5000, -0.5000]])
    """
    scale = None
    if precision is not None:
        loss, optimizer, scale = precision.loss(loss), precision.optimizer(optimizer), precision.scale
    alone = accumulate == 1 and reduce is None
    gradient = gradients(loss, rank=rank, unused=unused, scale=scale, mean=alone)
    if accumulate != 1:
        gradient = accumulated(gradient, accumulate)
    step = apply_updates(gradient, optimizer, reduce=reduce)
    if accumulate is None:
        return step

    def checked_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        num_rows(batch)
        return step(state, batch)

    return checked_step
