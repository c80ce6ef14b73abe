"""Stochastic gradient descent, with momentum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd as torch_sgd

from trainkit import tree
from trainkit.optim.torch_kernels import Memory, Rate, Slots, check_non_negative, fused, kernel_optimizer
from trainkit.optim.transform import Transform
from trainkit.types import Schedule


def sgd(
    learning_rate: float | Tensor | Schedule = 1e-3,
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> Transform:
    """Step against the gradient, or against a running sum of gradients.

    g <- g + wd theta;  m <- mu m + (1 - d) g, in the first update m <- g;
    theta <- theta - lr m, with ``nesterov`` theta <- theta - lr (g + mu m).

    The rate multiplies the momentum when it is used, not when it is summed: a changed rate acts at once on all of it
    (Sutskever et al. and some frameworks sum lr g instead).

    Args:
        learning_rate: number or schedule of the count.
        momentum: mu; 0 keeps no memory.
        dampening: d; how much of each new gradient is left out of the sum, from the second update on.
        weight_decay: L2 penalty, added to the gradient.
        nesterov: look ahead along the momentum; wants momentum and no dampening.
        maximize: ascend.

    Raises: ValueError for negative numbers, or ``nesterov`` without momentum or with dampening.

    Example:
        >>> w = tree.frozen({"w": torch.tensor([1.0])})
        >>> tx = sgd(0.5, momentum=0.5)
        >>> once, state = tx.apply(w, tx.init(w), w)
        >>> once["w"], tx.apply(w, state, once)[0]["w"]
        (tensor([0.5000]), tensor([-0.2500]))

    Source: Robbins and Monro 1951; Sutskever et al. 2013; matches torch.optim.SGD (torch 2.13), whose kernels do the
    work.
    """
    check_non_negative(momentum=momentum, weight_decay=weight_decay)
    if nesterov and (momentum == 0 or dampening != 0):
        raise ValueError(f"nesterov: wants momentum > 0 and dampening 0, got {momentum} and {dampening}")
    slots: Slots = {"momentum_buffer": tree.zeros_like} if momentum else {}

    def kernel(params: list[Tensor], grads: list[Tensor], memory: Memory, step: Tensor, learning_rate: Rate) -> None:
        buffers = memory.get("momentum_buffer", [])
        options: dict[str, Any] = {
            "weight_decay": weight_decay,
            "momentum": momentum,
            "dampening": dampening,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        if momentum and dampening:
            # torch starts from the first gradient, undamped. Zeros to start from are the same without dampening only.
            _add_damped(buffers, params, grads, step, momentum, dampening, weight_decay, maximize)
            grads, buffers = buffers, []
            options = {"weight_decay": 0.0, "momentum": 0.0, "dampening": 0.0, "nesterov": False, "maximize": False}
        if fused(torch._fused_sgd_, params, [grads, buffers], None, learning_rate, is_first_step=False, **options):
            return
        # The foreach form overwrites the gradients where nesterov is on.
        found: list[Tensor | None] = [*buffers] if buffers else [None] * len(params)
        torch_sgd(params, grads, found, lr=learning_rate, foreach=False, fused=False, **options)

    return kernel_optimizer(kernel, slots, learning_rate)


def _add_damped(
    buffers: list[Tensor],
    params: list[Tensor],
    grads: list[Tensor],
    step: Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    first = step == 1
    for buffer, p, g in zip(buffers, params, grads, strict=True):
        towards = -g if maximize else g
        if weight_decay:
            towards = towards.add(p, alpha=weight_decay)
        buffer.mul_(momentum).add_(torch.where(first.to(p.device), towards, towards * (1 - dampening)))
