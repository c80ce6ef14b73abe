"""Adamax: Adam in the infinity norm."""

from __future__ import annotations

from torch import Tensor
from torch.optim.adamax import adamax as torch_adamax

from trainkit import tree
from trainkit.optim.torch_kernels import (
    Memory,
    Rate,
    Slots,
    check_betas,
    check_non_negative,
    has_complex,
    kernel_optimizer,
    loop_form,
    step_tensors,
)
from trainkit.optim.transform import Transform
from trainkit.types import Schedule


def adamax(
    learning_rate: float | Tensor | Schedule = 2e-3,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> Transform:
    """Divide a running mean of the gradient by a decaying maximum of its size.

    g <- g + wd theta;  m <- b1 m + (1 - b1) g;  u <- max(b2 u, |g| + eps);
    theta <- theta - lr m / ((1 - b1^t) u).

    Args:
        learning_rate: number or schedule of the count.
        betas: decay rates of the mean and of the maximum, each in [0, 1).
        eps: keeps the maximum above zero.
        weight_decay: L2 penalty, added to the gradient.
        maximize: ascend.

    Raises: ValueError for rates outside of their ranges.

    Example:
        >>> import torch
        >>> w = tree.frozen({"w": torch.tensor([1.0])})
        >>> tx = adamax(0.1)
        >>> tx.apply(w, tx.init(w), w)[0]["w"]
        tensor([0.9000])

    Source: Kingma and Ba 2015, algorithm 2; matches torch.optim.Adamax (torch 2.13), whose kernels do the work.
    """
    check_betas(betas)
    check_non_negative(eps=eps, weight_decay=weight_decay)
    slots: Slots = {"exp_avg": tree.zeros_like, "exp_inf": tree.zeros_like}

    def kernel(params: list[Tensor], grads: list[Tensor], memory: Memory, step: Tensor, learning_rate: Rate) -> None:
        torch_adamax(
            params,
            grads,
            memory["exp_avg"],
            memory["exp_inf"],
            step_tensors(step, params),
            eps=eps,
            beta1=betas[0],
            beta2=betas[1],
            lr=learning_rate,
            weight_decay=weight_decay,
            maximize=maximize,
            has_complex=has_complex(params),
            **loop_form(params),
        )

    return kernel_optimizer(kernel, slots, learning_rate)
