"""RMSprop: the gradient over its running size."""

from __future__ import annotations

from torch import Tensor
from torch.optim.rmsprop import rmsprop as torch_rmsprop

from trainkit import tree
from trainkit.optim.torch_kernels import (
    Memory,
    Rate,
    Slots,
    check_non_negative,
    has_complex,
    kernel_optimizer,
    loop_form,
    step_tensors,
)
from trainkit.optim.transform import Transform
from trainkit.types import Schedule


def rmsprop(
    learning_rate: float | Tensor | Schedule = 1e-2,
    *,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
    maximize: bool = False,
) -> Transform:
    """Divide the gradient by the root of its running mean square.

    g <- g + wd theta;  v <- a v + (1 - a) g^2;  with ``centered`` v - (running mean of g)^2 in the place of v;
    b <- mu b + g / (sqrt(v) + eps);  theta <- theta - lr b.

    Args:
        learning_rate: number or schedule of the count.
        alpha: a; decay rate of the mean square. No bias correction: the first steps are longer, up to 1 / sqrt(1 - a).
        eps: added after the root (TensorFlow's RMSprop adds it before).
        weight_decay: L2 penalty, added to the gradient.
        momentum: mu; 0 keeps no memory of past steps.
        centered: divide by the standard deviation.
        maximize: ascend.

    Raises: ValueError for negative numbers.

    Example:
        >>> import torch
        >>> w = tree.frozen({"w": torch.tensor([1.0])})
        >>> tx = rmsprop(0.1, alpha=0.75)
        >>> tx.apply(w, tx.init(w), w)[0]["w"]
        tensor([0.8000])

    Source: Tieleman and Hinton 2012, Coursera lecture 6.5; centered: Graves 2013, eq. 38 to 45; matches
    torch.optim.RMSprop (torch 2.13), whose kernels do the work.
    """
    check_non_negative(alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum)
    slots: Slots = {"square_avg": tree.zeros_like}
    if momentum:
        slots["momentum_buffer"] = tree.zeros_like
    if centered:
        slots["grad_avg"] = tree.zeros_like

    def kernel(params: list[Tensor], grads: list[Tensor], memory: Memory, step: Tensor, learning_rate: Rate) -> None:
        torch_rmsprop(
            params,
            grads,
            memory["square_avg"],
            memory.get("grad_avg", []),
            memory.get("momentum_buffer", []),
            step_tensors(step, params),
            lr=learning_rate,
            alpha=alpha,
            eps=eps,
            weight_decay=weight_decay,
            momentum=momentum,
            centered=centered,
            maximize=maximize,
            has_complex=has_complex(params),
            **loop_form(params),
        )

    return kernel_optimizer(kernel, slots, learning_rate)
