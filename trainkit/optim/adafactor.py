"""Adafactor: second moments in the memory of a row and a column."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim._adafactor import adafactor as torch_adafactor

from trainkit import tree
from trainkit.optim.torch_kernels import (
    Memory,
    Rate,
    Slots,
    check_non_negative,
    check_real,
    is_plain,
    kernel_optimizer,
    loop_form,
    step_tensors,
)
from trainkit.optim.transform import Transform
from trainkit.types import OptState, Params, Schedule

if TYPE_CHECKING:
    from tensordict import TensorDict


def adafactor(
    learning_rate: float | Tensor | Schedule = 1e-2,
    *,
    beta2_decay: float = -0.8,
    eps: tuple[float | None, float] = (None, 1e-3),
    d: float = 1.0,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> Transform:
    """Adam's denominator factored into rows and columns, steps relative to the size of the parameter, no momentum.

    c = t^beta2_decay;  R <- R + c (row mean of g^2 - R);  C <- C + c (column mean of g^2 - C);
    V = R C / max(mean R, eps1)  (vectors keep V itself);  u = g / max(sqrt(V), eps1);  u <- u / max(1, RMS(u) / d);
    theta <- theta (1 - lr wd) - max(eps2, RMS(theta)) min(lr, 1 / sqrt(t)) u, RMS(theta) before the decay.

    Args:
        learning_rate: number or schedule of the count; the largest step relative to RMS(theta).
        beta2_decay: exponent, at most 0.
        eps: eps1 (None: the machine epsilon of the parameter's dtype) and eps2, the least size of a parameter.
        d: at least 1; updates of larger RMS are scaled down to it.
        weight_decay: decoupled, per update and unit of learning rate.
        maximize: ascend.

    Raises: ValueError for numbers outside of their ranges; from ``init`` for complex parameters.

    Example:
        >>> w = tree.frozen({"w": torch.ones(2, 2)})
        >>> tx = adafactor(0.1)
        >>> tx.apply(w, tx.init(w), w)[0]["w"]
        tensor([[0.9000, 0.9000],
                [0.9000, 0.9000]])

    Source: Shazeer and Stern 2018, algorithms 4 and 5, with the learning rate and eps1 as torch has them; matches
    torch.optim.Adafactor (torch 2.13), whose kernel does the work on a CPU. It reads three numbers per parameter on the
    host, which neither a graph nor an accelerator can afford, and has no form for sharded tensors: there the rule as
    written out here runs.
    """
    if not beta2_decay <= 0:
        raise ValueError(f"beta2_decay: got {beta2_decay}, expected a number <= 0")
    if not d >= 1:
        raise ValueError(f"d: got {d}, expected a number >= 1")
    eps1, eps2 = eps
    check_non_negative(eps1=0.0 if eps1 is None else eps1, eps2=eps2, weight_decay=weight_decay)
    # torch annotates eps1 as a number, and takes None.
    options: dict[str, Any] = {
        "d": d,
        "beta2_decay": beta2_decay,
        "weight_decay": weight_decay,
        "eps1": eps1,
        "eps2": eps2,
        "maximize": maximize,
    }
    slots: Slots = {"row_var": _row_zeros, "col_var": _column_zeros, "variance": _vector_zeros}

    def kernel(params: list[Tensor], grads: list[Tensor], memory: Memory, step: Tensor, learning_rate: Rate) -> None:
        matrix = [p.dim() > 1 for p in params]
        rows, columns = _spread(memory["row_var"], matrix), _spread(memory["col_var"], matrix)
        vectors = _spread(memory["variance"], [not m for m in matrix])
        if not loop_form(params)["capturable"] and all(is_plain(type(p)) for p in params):
            steps = step_tensors(step, params)
            torch_adafactor(params, grads, rows, columns, vectors, steps, lr=learning_rate, **options)
            return
        for p, g, row, column, vector in zip(params, grads, rows, columns, vectors, strict=True):
            t = step.to(p.device, torch.promote_types(p.dtype, torch.float32))
            share = t**beta2_decay
            size = torch.clamp(_rms(p), min=eps2) * torch.clamp(t.rsqrt(), max=learning_rate)
            least = torch.finfo(p.dtype).eps if eps1 is None else eps1
            if row is not None and column is not None:
                variance = _factored(g, row, column, share, least)
            else:
                variance = _towards(vector, g * g, share)
            update = variance.clamp(min=least * least).rsqrt_().mul_(g)
            size = size / torch.clamp(_rms(update) / d, min=1.0)
            if weight_decay:
                p.mul_(1 - learning_rate * weight_decay)
            p.add_(update * (size if maximize else -size))

    made = kernel_optimizer(kernel, slots, learning_rate)

    def init(params: Params) -> OptState:
        check_real(params, "adafactor")
        return made.init(params)

    return Transform(init, made.update, made.apply)


def _spread(tensors: list[Tensor], where: list[bool]) -> list[Any]:
    """The tensors at the places marked, None at the others."""
    rest = iter(tensors)
    return [next(rest) if marked else None for marked in where]


def _factored(g: Tensor, row: Tensor, column: Tensor, share: Tensor, least: float) -> Tensor:
    """The variance as the product of its row and column means, after they took in ``g``."""
    # A norm and its square need no second tensor as large as the gradient.
    _towards(row, torch.linalg.vector_norm(g, dim=-1, keepdim=True).square().div_(g.size(-1)), share)
    _towards(column, torch.linalg.vector_norm(g, dim=-2, keepdim=True).square().div_(g.size(-2)), share)
    return (row @ column).div_(row.mean(dim=-2, keepdim=True).clamp(min=least))


def _towards(average: Tensor, value: Tensor, share: Tensor) -> Tensor:
    # Not lerp_: its weight would have to be rounded to the dtype of the average.
    return average.add_((value - average) * share)


def _rms(t: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32))
    return norm / math.sqrt(max(t.numel(), 1))


def _row_zeros(params: Params) -> TensorDict:
    return _zeros_of(params, lambda p: p.new_zeros((*p.shape[:-1], 1)) if p.dim() > 1 else None)


def _column_zeros(params: Params) -> TensorDict:
    return _zeros_of(params, lambda p: p.new_zeros((*p.shape[:-2], 1, p.shape[-1])) if p.dim() > 1 else None)


def _vector_zeros(params: Params) -> TensorDict:
    return _zeros_of(params, lambda p: torch.zeros_like(p) if p.dim() <= 1 else None)


def _zeros_of(params: Params, make: Callable[[Tensor], Tensor | None]) -> TensorDict:
    made = {name: make(p) for name, p in tree.named(params).items()}
    return tree.frozen({name: zeros for name, zeros in made.items() if zeros is not None})
