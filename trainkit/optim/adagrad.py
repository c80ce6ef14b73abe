"""Adagrad: the gradient over the size of all gradients so far."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.adagrad import adagrad as torch_adagrad

from trainkit import tree
from trainkit.optim.torch_kernels import (
    Memory,
    Rate,
    check_non_negative,
    fused,
    has_complex,
    kernel_optimizer,
    loop_form,
    step_tensors,
)
from trainkit.optim.transform import Transform
from trainkit.types import Params, Schedule

if TYPE_CHECKING:
    from tensordict import TensorDict


def adagrad(
    learning_rate: float | Tensor | Schedule = 1e-2,
    *,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-10,
    maximize: bool = False,
) -> Transform:
    """Divide the gradient by the root of the sum of its squares: rare features keep a long step.

    g <- g + wd theta;  s <- s + g^2;  theta <- theta - lr / (1 + (t - 1) lr_decay) g / (sqrt(s) + eps).

    Args:
        learning_rate: number or schedule of the count.
        lr_decay: hyperbolic decay of the rate, on top of a schedule.
        weight_decay: L2 penalty, added to the gradient.
        initial_accumulator_value: the first s.
        eps: added after the root.
        maximize: ascend.

    Raises: ValueError for negative numbers.

    Example:
        >>> w = tree.frozen({"w": torch.tensor([3.0])})
        >>> tx = adagrad(0.5, initial_accumulator_value=16.0)
        >>> tx.apply(w, tx.init(w), w)[0]["w"]
        tensor([2.7000])

    Source: Duchi, Hazan and Singer 2011, fig. 1; matches torch.optim.Adagrad (torch 2.13), whose kernels do the work.
    """
    check_non_negative(
        lr_decay=lr_decay, weight_decay=weight_decay, initial_accumulator_value=initial_accumulator_value, eps=eps
    )
    options: dict[str, Any] = {"lr_decay": lr_decay, "weight_decay": weight_decay, "eps": eps, "maximize": maximize}

    def kernel(params: list[Tensor], grads: list[Tensor], memory: Memory, step: Tensor, learning_rate: Rate) -> None:
        if fused(torch._fused_adagrad_, params, [grads, memory["sum"]], step, learning_rate, **options):
            return
        torch_adagrad(
            params,
            grads,
            memory["sum"],
            step_tensors(step, params),
            fused=False,
            has_complex=has_complex(params),
            lr=learning_rate,
            **options,
            **loop_form(params, capturable=False),
        )

    def first_sum(params: Params) -> TensorDict:
        return tree.map_tensors(lambda p: torch.full_like(p, _on_both_axes(p, initial_accumulator_value)), params)

    return kernel_optimizer(kernel, {"sum": first_sum}, learning_rate)


def _on_both_axes(p: Tensor, value: float) -> float | complex:
    return complex(value, value) if p.is_complex() else value
