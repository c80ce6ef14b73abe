"""Adam, and the kernel that it shares with AdamW."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam as torch_adam

from trainkit import tree
from trainkit.optim.torch_kernels import (
    Memory,
    Rate,
    Slots,
    check_betas,
    check_non_negative,
    fused,
    has_complex,
    kernel_optimizer,
    loop_form,
    step_tensors,
)
from trainkit.optim.transform import Transform
from trainkit.types import Schedule


def adam(
    learning_rate: float | Tensor | Schedule = 1e-3,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
) -> Transform:
    """Steps of about the size of the learning rate, along a running mean of the gradient over its running size.

    g <- g + wd theta;  m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;
    theta <- theta - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps).

    Args:
        learning_rate: number or schedule of the count; unit of the parameters per update.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the denominator after the root.
        weight_decay: L2 penalty: goes into the gradient and so through the moments. :func:`adamw` is the other kind.
        amsgrad: divide by the largest second moment so far.
        maximize: ascend.
        decoupled_weight_decay: decay the parameters themselves, as :func:`adamw` does.

    Raises: ValueError for rates outside of their ranges.

    Example:
        >>> w = tree.frozen({"w": torch.tensor([1.0])})
        >>> tx = adam(0.1)
        >>> tx.apply(w, tx.init(w), w)[0]["w"]
        tensor([0.9000])

    Source: Kingma and Ba 2015, algorithm 1; amsgrad: Reddi et al. 2018; matches torch.optim.Adam (torch 2.13), whose
    kernels do the work.
    """
    check_betas(betas)
    check_non_negative(eps=eps, weight_decay=weight_decay)
    slots: Slots = {"exp_avg": tree.zeros_like, "exp_avg_sq": tree.zeros_like}
    if amsgrad:
        slots["max_exp_avg_sq"] = tree.zeros_like
    options: dict[str, Any] = {
        "amsgrad": amsgrad,
        "beta1": betas[0],
        "beta2": betas[1],
        "weight_decay": weight_decay,
        "eps": eps,
        "maximize": maximize,
    }
    op = torch._fused_adamw_ if decoupled_weight_decay else torch._fused_adam_

    def kernel(params: list[Tensor], grads: list[Tensor], memory: Memory, step: Tensor, learning_rate: Rate) -> None:
        m, v, largest = memory["exp_avg"], memory["exp_avg_sq"], memory.get("max_exp_avg_sq", [])
        if fused(op, params, [grads, m, v, largest], step, learning_rate, **options):
            return
        torch_adam(
            params,
            grads,
            m,
            v,
            largest,
            step_tensors(step, params),
            fused=False,
            has_complex=has_complex(params),
            decoupled_weight_decay=decoupled_weight_decay,
            lr=_not_zero(learning_rate),
            **options,
            **loop_form(params),
        )

    return kernel_optimizer(kernel, slots, learning_rate)


def _not_zero(rate: Rate) -> Rate:
    """A rate on the device, with the smallest useful number in the place of 0.

    torch's form for such rates divides the second moment by the rate, and 0 / 0 would make the first update of a
    warm-up from 0 a NaN wherever the gradient is 0. The factor leaves room for products with the bias corrections.
    """
    if not isinstance(rate, Tensor):
        return rate
    return torch.where(rate == 0, 1024 * torch.finfo(rate.dtype).tiny, rate)
