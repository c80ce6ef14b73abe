"""NAdam: Adam with Nesterov momentum."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim.nadam import nadam as torch_nadam
from torch.optim.optimizer import _get_scalar_dtype

from trainkit import tree
from trainkit.optim.torch_kernels import (
    Memory,
    Rate,
    Slots,
    check_betas,
    check_non_negative,
    copies_for,
    device_of,
    has_complex,
    kernel_optimizer,
    loop_form,
    step_tensors,
)
from trainkit.optim.transform import Transform
from trainkit.types import Params, Schedule

if TYPE_CHECKING:
    from tensordict import TensorDict


def nadam(
    learning_rate: float | Tensor | Schedule = 2e-3,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum_decay: float = 4e-3,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
) -> Transform:
    """Adam that looks ahead along its first moment, which is itself warmed up.

    mu_t = b1 (1 - 0.96^(t md) / 2);  m, v as in Adam;
    theta <- theta - lr (mu_{t+1} m / (1 - prod_{i<=t+1} mu_i) + (1 - mu_t) g / (1 - prod_{i<=t} mu_i))
    / (sqrt(v / (1 - b2^t)) + eps).

    The product of the mu is kept once for all parameters, as ``mu_product``.

    Args:
        learning_rate: number or schedule of the count.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the denominator after the root.
        weight_decay: L2 penalty on the gradient, or decay of the parameters, see ``decoupled_weight_decay``.
        momentum_decay: md; 0 holds mu at b1 / 2.
        decoupled_weight_decay: decay the parameters as AdamW does.
        maximize: ascend.

    Raises: ValueError for rates outside of their ranges.

    Example:
        >>> w = tree.frozen({"w": torch.tensor([1.0])})
        >>> tx = nadam(0.1, momentum_decay=0.0)
        >>> tx.apply(w, tx.init(w), w)[0]["w"]
        tensor([0.8944])

    Source: Dozat 2016, algorithm 2; matches torch.optim.NAdam (torch 2.13), whose kernels do the work.
    """
    check_betas(betas)
    check_non_negative(eps=eps, weight_decay=weight_decay, momentum_decay=momentum_decay)
    slots: Slots = {"exp_avg": tree.zeros_like, "exp_avg_sq": tree.zeros_like, "mu_product": _first_product}

    def kernel(params: list[Tensor], grads: list[Tensor], memory: Memory, step: Tensor, learning_rate: Rate) -> None:
        (product,) = memory["mu_product"]
        products = copies_for(params, product)
        torch_nadam(
            params,
            grads,
            memory["exp_avg"],
            memory["exp_avg_sq"],
            products,
            step_tensors(step, params),
            beta1=betas[0],
            beta2=betas[1],
            lr=learning_rate,
            weight_decay=weight_decay,
            momentum_decay=momentum_decay,
            eps=eps,
            decoupled_weight_decay=decoupled_weight_decay,
            maximize=maximize,
            has_complex=has_complex(params),
            **loop_form(params),
        )
        product.copy_(products[0])

    return kernel_optimizer(kernel, slots, learning_rate)


def _first_product(params: Params) -> TensorDict:
    dtype = _get_scalar_dtype()  # type: ignore[no-untyped-call]
    return tree.frozen({"mu_product": torch.ones((), dtype=dtype, device=device_of(params))})
