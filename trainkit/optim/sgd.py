"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from torch import Tensor

from trainkit.optim.torch_kernels import Slots, kernel_optimizer
from trainkit.optim.transform import Transform
from trainkit.types import Schedule


def sgd(learning_rate: float | Tensor | Schedule = 1e-3) -> Transform:
    def kernel(params: list[Tensor], grads: list[Tensor], memory: dict[str, list[Tensor]], count: Tensor, lr: Tensor) -> None:
        for p, g in zip(params, grads, strict=True):
            p.sub_(lr.to(p.dtype) * g)

    return kernel_optimizer(kernel, Slots(), learning_rate)
