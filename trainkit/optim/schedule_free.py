"""Schedule-free AdamW: an average of the iterates in the place of a decaying rate."""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainkit import tree
from trainkit.optim.torch_kernels import (
    Memory,
    Rate,
    Slots,
    check_betas,
    check_non_negative,
    check_real,
    device_of,
    each,
    kernel_optimizer,
)
from trainkit.optim.transform import Transform
from trainkit.types import OptState, Params, Schedule

if TYPE_CHECKING:
    from tensordict import TensorDict

_AVERAGING = "averaging"


def schedule_free_adamw(
    learning_rate: float | Tensor | Schedule = 2.5e-3,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
) -> Transform:
    """AdamW whose evaluation weights are a running average, so that the rate need not decay.

    Three sequences: z takes the steps, x averages z, and y between them is where gradients are taken. The parameters
    of the training state are y; :func:`schedule_free_eval` gives x.

    v <- b2 v + (1 - b2) g^2;  u = g / (sqrt(v / (1 - b2^t)) + eps) + wd y;  z <- z - lr u;
    w_t = t^r max_{i<=t}(lr_i)^power;  c = w_t / sum_{i<=t} w_i;  x <- (1 - c) x + c z;  y = (1 - b1) z + b1 x.

    Memory: z and v, as much as Adam; x follows from y and z.

    Args:
        learning_rate: number, or a schedule that warms up and then stays: the average takes the place of a decay.
        betas: b1, the share of the average in y, in (0, 1); b2, decay rate of the second moment, in [0, 1).
        eps: added to the denominator after the root.
        weight_decay: decoupled, taken at y.
        r: power of t in the weights of the average; 0 weighs all steps of a constant rate alike.
        weight_lr_power: power of the largest learning rate so far in the weights; it lets warm-up steps count little.

    Raises: ValueError for rates outside of their ranges; from ``init`` for complex parameters.

    Example:
        >>> w = tree.frozen({"w": torch.tensor([1.0])})
        >>> tx = schedule_free_adamw(0.1)
        >>> y, state = tx.apply(w, tx.init(w), w)
        >>> y["w"], schedule_free_eval(state, y)["w"]
        (tensor([0.9000]), tensor([0.9000]))

    Source: Defazio et al. 2024, algorithm 1, with Adam's bias correction and the maximum over the rates of the authors'
    package schedulefree (1.4).
    """
    check_betas(betas)
    check_non_negative(eps=eps, weight_decay=weight_decay, r=r, weight_lr_power=weight_lr_power)
    beta1, beta2 = betas
    if not beta1 > 0:
        raise ValueError(
            f"betas: the first is {beta1}, expected a number in (0, 1): with 0, x does not follow from y and z"
        )

    def first_averaging(params: Params) -> TensorDict:
        numbers = {"beta1": beta1, "learning_rate_max": 0.0, "weight_sum": 0.0}
        dtype, device = _number_dtype(params), device_of(params)
        return tree.frozen({name: torch.tensor(x, dtype=dtype, device=device) for name, x in numbers.items()})

    slots: Slots = {
        "z": lambda params: tree.map_tensors(torch.clone, params),
        "exp_avg_sq": tree.zeros_like,
        _AVERAGING: first_averaging,
    }

    def kernel(params: list[Tensor], grads: list[Tensor], memory: Memory, step: Tensor, learning_rate: Rate) -> None:
        z, v = memory["z"], memory["exp_avg_sq"]
        _, largest, weight_sum = memory[_AVERAGING]
        t = step.to(largest.dtype)
        largest.copy_(torch.clamp(largest, min=learning_rate))
        weight = t**r * largest**weight_lr_power
        weight_sum.add_(weight)
        # A warm-up may begin at a rate of zero: nothing moves, and nothing is averaged.
        share = torch.where(weight_sum > 0, weight / weight_sum, 0.0)
        direction = _direction(params, grads, v, 1 - beta2**t)
        towards = each("sub", z, params)
        each("mul_", towards, share)
        each("add_", params, towards)
        each("add_", params, each("mul", direction, learning_rate * (beta1 * (1 - share) - 1)))
        each("sub_", z, each("mul_", direction, learning_rate))

    def _direction(params: list[Tensor], grads: list[Tensor], v: list[Tensor], correction: Tensor) -> list[Tensor]:
        each("mul_", v, beta2)
        each("addcmul_", v, grads, grads, value=1 - beta2)
        size = each("div", v, correction)
        each("sqrt_", size)
        each("add_", size, eps)
        direction = each("div", grads, size)
        return each("add_", direction, params, alpha=weight_decay) if weight_decay else direction

    made = kernel_optimizer(kernel, slots, learning_rate)

    def init(params: Params) -> OptState:
        check_real(params, "schedule_free_adamw")
        return made.init(params)

    return Transform(init, made.update, made.apply)


def schedule_free_eval(opt_state: OptState, params: Params) -> Params:
    """The averaged weights x, for evaluation and for keeping: x = y + (1 - 1 / b1) (z - y).

    Args:
        opt_state: of :func:`schedule_free_adamw`, or of a ``chain`` or ``partition`` that has it as a member;
            parameters that other members update are returned as they are.
        params: y, the parameters of the training state.

    Returns: a tree like ``params``; training goes on from ``params``, not from this.

    Raises: ValueError if the state holds no schedule-free memory.

    Example:
        >>> w = tree.frozen({"w": torch.tensor([1.0])})
        >>> tx = schedule_free_adamw(0.1)
        >>> schedule_free_eval(tx.init(w), w)["w"]
        tensor([1.])

    Source: Defazio et al. 2024, eq. 9 solved for x; ``optax.contrib.schedule_free_eval_params``.
    """
    found = list(_schedule_free_entries(opt_state))
    if not found:
        raise ValueError(
            f"opt_state: no schedule-free memory among {sorted(opt_state.keys())}; expected the state of "
            "schedule_free_adamw, alone or inside chain or partition"
        )
    averaged: dict[str, Any] = dict(params.items())
    for entry in found:
        factor = 1 - 1 / entry[_AVERAGING]["beta1"]
        averaged.update({name: params[name] + (z - params[name]) * factor for name, z in entry["z"].items()})
    return tree.like(params, list(averaged.values()))


def _schedule_free_entries(opt_state: Any) -> Any:
    if opt_state.get(_AVERAGING, None) is not None:
        yield opt_state
        return
    for child in opt_state.values():
        if not isinstance(child, Tensor):
            yield from _schedule_free_entries(child)


def _number_dtype(params: Params) -> torch.dtype:
    return reduce(torch.promote_types, (p.dtype for p in tree.leaves(params)), torch.float32)
