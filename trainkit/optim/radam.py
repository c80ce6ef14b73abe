"""RAdam: Adam that waits until it knows the size of the gradient."""

from __future__ import annotations

from torch import Tensor
from torch.optim.radam import radam as torch_radam

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


def radam(
    learning_rate: float | Tensor | Schedule = 1e-3,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
) -> Transform:
    """Adam whose denominator comes in only once its variance is small, and then rectified.

    rho = 2 / (1 - b2) - 1;  rho_t = rho - 2 t b2^t / (1 - b2^t);  m, v as in Adam;
    while rho_t <= 5 theta <- theta - lr m / (1 - b1^t); then
    theta <- theta - lr r_t m / (1 - b1^t) sqrt(1 - b2^t) / (sqrt(v) + eps) with
    r_t = sqrt((rho_t - 4) (rho_t - 2) rho / ((rho - 4) (rho - 2) rho_t)).

    Args:
        learning_rate: number or schedule of the count.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the denominator after the root.
        weight_decay: L2 penalty on the gradient, or decay of the parameters, see ``decoupled_weight_decay``.
        decoupled_weight_decay: decay the parameters as AdamW does.
        maximize: ascend.

    Raises: ValueError for rates outside of their ranges.

    Example:
        >>> import torch
        >>> w = tree.frozen({"w": torch.tensor([2.0])})
        >>> tx = radam(0.1)
        >>> tx.apply(w, tx.init(w), w)[0]["w"]
        tensor([1.8000])

    Source: Liu et al. 2020, algorithm 2; matches torch.optim.RAdam (torch 2.13), whose kernels do the work.
    """
    check_betas(betas)
    check_non_negative(eps=eps, weight_decay=weight_decay)
    slots: Slots = {"exp_avg": tree.zeros_like, "exp_avg_sq": tree.zeros_like}

    def kernel(params: list[Tensor], grads: list[Tensor], memory: Memory, step: Tensor, learning_rate: Rate) -> None:
        torch_radam(
            params,
            grads,
            memory["exp_avg"],
            memory["exp_avg_sq"],
            step_tensors(step, params),
            beta1=betas[0],
            beta2=betas[1],
            lr=learning_rate,
            weight_decay=weight_decay,
            eps=eps,
            decoupled_weight_decay=decoupled_weight_decay,
            maximize=maximize,
            has_complex=has_complex(params),
            **loop_form(params),
        )

    return kernel_optimizer(kernel, slots, learning_rate)
