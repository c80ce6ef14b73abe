"""The words of the core: what a loss, a gradient, a step and an evaluation take and return."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from torch import Tensor

if TYPE_CHECKING:
    from tensordict import TensorDict

    from trainkit.metrics import Metric
    from trainkit.state import TrainState

    Tree: TypeAlias = TensorDict
    Params: TypeAlias = TensorDict
    Buffers: TypeAlias = TensorDict
    OptState: TypeAlias = TensorDict
else:
    Tree = Any
    """A nested tree of tensors. tensordict is imported with the first tree, so at run time this stands for any type."""
    Params = Any
    """Trainable tensors, keyed by the names of ``module.named_parameters()``."""
    Buffers = Any
    """What the module needs and no gradient reaches: its buffers and its frozen parameters, by their names."""
    OptState = Any
    """The memory of an optimizer: a nested tree of tensors."""

Batch: TypeAlias = Any
"""A tree of tensors (mapping, tuple, TensorDict, tensor) whose first axis counts the rows."""
Metrics: TypeAlias = "dict[str, Metric]"
"""Mergeable quantities by name."""
Schedule: TypeAlias = Callable[[Tensor], Tensor]
"""A function of the step (0-d tensor: completed updates) that gives a 0-d float tensor."""


@dataclass(frozen=True)
class LossOutput:
    """What a loss returns: a sum, how much was summed, and what to report.

    The mean loss is ``loss_sum / weight``; the division is left to whoever knows the total weight, over all
    microbatches and ranks, so that ragged parts cannot bias the result.

    Args:
        loss_sum: 0-d floating tensor, the sum over the weighted items, attached to the autograd graph.
        weight: 0-d tensor (or number), how much was summed: tokens, rows. No gradient flows through it.
        metrics: mergeable quantities to report.
        buffers: the module's buffers after the forward pass; None where they did not change.
    """

    loss_sum: Tensor
    weight: Tensor | float
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    buffers: Buffers | None = None


@dataclass(frozen=True)
class Gradients:
    """The gradient of ``loss_sum`` (not of the mean), with everything needed to divide it once.

    Args:
        grads: one tensor per parameter, under the parameter's name, in its shape.
        loss_sum: 0-d tensor, detached.
        weight: 0-d tensor; ``grads / weight`` is the gradient of the mean loss.
        metrics: mergeable quantities.
        buffers: the module's buffers after the forward pass.
        factor: 0-d tensor, what ``grads`` were multiplied with already: 1 / weight. None for those of the sum, which
            alone can be added to others.
    """

    grads: Params
    loss_sum: Tensor
    weight: Tensor
    metrics: Metrics
    buffers: Buffers
    factor: Tensor | None = None


class LossFn(Protocol):
    """``(params, buffers, batch) -> LossOutput``."""

    def __call__(self, params: Params, buffers: Buffers, batch: Batch, /) -> LossOutput: ...


class GradientFn(Protocol):
    """``(state, batch) -> Gradients``."""

    def __call__(self, state: TrainState, batch: Batch, /) -> Gradients: ...


class StepFn(Protocol):
    """``(state, batch) -> (state, metrics)``: one optimizer update."""

    def __call__(self, state: TrainState, batch: Batch, /) -> tuple[TrainState, Metrics]: ...


class EvalFn(Protocol):
    """``(state, batch) -> metrics``: no update."""

    def __call__(self, state: TrainState, batch: Batch, /) -> Metrics: ...
