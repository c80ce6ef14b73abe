"""Lion: the sign of a momentum."""

from __future__ import annotations

from torch import Tensor

from trainkit import tree
from trainkit.optim.torch_kernels import (
    Memory,
    Rate,
    check_betas,
    check_non_negative,
    check_real,
    each,
    kernel_optimizer,
)
from trainkit.optim.transform import Transform
from trainkit.types import OptState, Params, Schedule


def lion(
    learning_rate: float | Tensor | Schedule = 1e-4,
    *,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> Transform:
    """Move every parameter by the same amount, in the direction that its momentum points.

    u = sign(b1 m + (1 - b1) g);  theta <- theta - lr (u + wd theta);  m <- b2 m + (1 - b2) g.

    Half of Adam's memory. Its updates are larger: the authors use a learning rate 3 to 10 times smaller than AdamW's
    and a weight decay as many times larger.

    Args:
        learning_rate: number or schedule of the count.
        betas: b1, the share of the momentum in the direction, and b2, its decay rate; each in [0, 1).
        weight_decay: decoupled, per update and unit of learning rate.
        maximize: ascend.

    Raises: ValueError for rates outside of their ranges; from ``init`` for complex parameters.

    Example:
        >>> import torch
        >>> w = tree.frozen({"w": torch.tensor([1.0, -3.0])})
        >>> tx = lion(0.1)
        >>> tx.apply(w, tx.init(w), w)[0]["w"]
        tensor([ 0.9000, -2.9000])

    Source: Chen et al. 2023, algorithm 2.
    """
    check_betas(betas)
    check_non_negative(weight_decay=weight_decay)
    beta1, beta2 = betas

    def kernel(params: list[Tensor], grads: list[Tensor], memory: Memory, step: Tensor, learning_rate: Rate) -> None:
        momentum = memory["exp_avg"]
        towards = -1.0 if maximize else 1.0
        direction = each("mul", momentum, beta1)
        each("add_", direction, grads, alpha=(1 - beta1) * towards)
        each("sign_", direction)
        each("mul_", direction, learning_rate)
        if weight_decay:
            each("mul_", params, 1 - learning_rate * weight_decay)
        each("sub_", params, direction)
        each("mul_", momentum, beta2)
        each("add_", momentum, grads, alpha=(1 - beta2) * towards)

    made = kernel_optimizer(kernel, {"exp_avg": tree.zeros_like}, learning_rate)

    def init(params: Params) -> OptState:
        check_real(params, "lion")
        return made.init(params)

    return Transform(init, made.update, made.apply)
