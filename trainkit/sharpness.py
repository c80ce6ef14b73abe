"""Sharpness-aware minimisation: the gradient from where the loss is worst nearby."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from trainkit import tree
from trainkit.state import TrainState, remember_step
from trainkit.types import Batch, GradientFn, Gradients, Params


def sharpness_aware(gradient: GradientFn, rho: float = 0.05) -> GradientFn:
    """The gradient at the point of a ball around the parameters that the gradient points to.

    g = gradient(theta);  G = gradient(theta + rho g / ||g||), with the joint norm over all tensors.

    Loss, metrics and buffers are those of the first pass, at the parameters themselves. Both passes draw the same
    random numbers. Twice the cost of a gradient, and one more set of parameters in memory.

    ``sharpness_aware(accumulate(g, n))`` looks around once per batch; ``accumulate(sharpness_aware(g), n)`` once per
    microbatch, which the paper (m-sharpness, sec. 4.1) finds to generalise better.

    Args:
        gradient: any GradientFn.
        rho: positive, radius of the ball in the unit of the parameters.

    Raises: ValueError if ``rho`` is not positive.

    Example:
        >>> from trainkit import LossOutput, init_state, value_and_grad
        >>> from trainkit.optim import sgd
        >>> loss = lambda params, buffers, x: LossOutput((params["weight"] ** 2 * x).sum() / 2, x.shape[0])
        >>> state = init_state(torch.nn.Linear(1, 1, bias=False), sgd(0.1))
        >>> state = state.replace(params=tree.frozen({"weight": torch.tensor([[2.0]])}))
        >>> sharpness_aware(value_and_grad(loss), 0.5)(state, torch.ones(1, 1)).grads["weight"]
        tensor([[2.5000]])

    Source: Foret et al. 2021, eq. 2 and algorithm 1.
    """
    if not rho > 0:
        raise ValueError(f"rho: got {rho}, expected a positive number")

    def gradients(state: TrainState, batch: Batch) -> Gradients:
        # The second pass starts from the same buffers, so the first must not write over them.
        with tree.keep():
            first = gradient(state, batch)
        report: dict[str, Any] = {"loss_sum": first.loss_sum, "metrics": first.metrics, "buffers": first.buffers}
        nearby = state.replace(params=_worst_nearby(state.params, first.grads, rho))
        remember_step(state, nearby, updates=0)
        # The first gradient would only take memory during the second pass.
        del first
        return dataclasses.replace(gradient(nearby, batch), **report)

    return gradients


@torch.no_grad()
def _worst_nearby(params: Params, grads: Params, rho: float) -> Params:
    # A gradient of zero has no direction, and moves nothing.
    factor = rho / (tree.global_norm(tree.leaves(grads)) + 1e-12)
    return tree.map_tensors(lambda p, g: p + (factor * g).to(p.dtype), params, grads)
