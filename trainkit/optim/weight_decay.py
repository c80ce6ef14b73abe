"""Weight decay as a transformation: its place in the chain decides which of the two kinds it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trainkit import tree
from trainkit.optim.torch_kernels import device_of
from trainkit.optim.transform import Transform, stateless, transform
from trainkit.types import OptState, Params, Schedule

Mask = Callable[[str, Tensor], bool]
"""``(name, parameter) -> bool``: whether it takes part. It may look at name, shape and dtype, not at values."""


def add_weight_decay(rate: float | Schedule, mask: Mask | None = None) -> Transform:
    """Add the gradient of an L2 penalty: for the place *before* an optimizer.

    g <- g + rate * theta, the gradient of rate / 2 ||theta||^2.

    The optimizer then treats the penalty as it treats the gradient: momentum sums it, Adam divides it by the root of
    the second moment. That is "L2 regularisation"; for decay that the optimizer does not touch, use
    :func:`decouple_weight_decay` after it, or the ``weight_decay`` of ``adamw``.

    Args:
        rate: number or schedule of the count; per unit of the gradient.
        mask: which parameters decay; None for all. :func:`no_bias_or_norm` is the usual one.

    Raises: ValueError for a negative rate.

    Example:
        >>> w = tree.frozen({"w": torch.tensor([2.0])})
        >>> tx = add_weight_decay(0.1)
        >>> tx.update(w, tx.init(w), w)[0]["w"]
        tensor([2.2000])

    Source: matches ``weight_decay`` of torch.optim.SGD and torch.optim.Adam; Loshchilov and Hutter 2019, algorithm 2,
    line 6 (pink).
    """
    return _towards_params(rate, 1, mask)


def decouple_weight_decay(rate: float | Schedule, mask: Mask | None = None) -> Transform:
    """Shrink the parameters beside what the optimizer does: for the place *after* an optimizer.

    u <- u - rate * theta, so that theta + u is (1 - rate) theta plus the optimizer's own update.

    The rate is not multiplied by a learning rate. What torch.optim.AdamW does is
    ``rate = learning_rate * weight_decay``; with a schedule: ``scale(learning_rate, weight_decay)``.

    Args:
        rate: number or schedule of the count; the share of a parameter that one update removes.
        mask: which parameters decay; None for all.

    Raises: ValueError for a negative rate.

    Example:
        >>> w = tree.frozen({"w": torch.tensor([2.0])})
        >>> tx = decouple_weight_decay(0.1)
        >>> tx.apply(tree.frozen({"w": torch.zeros(1)}), tx.init(w), w)[0]["w"]
        tensor([1.8000])

    Source: Loshchilov and Hutter 2019, algorithm 2, line 12 (green), with eta * lambda as the rate.
    """
    return _towards_params(rate, -1, mask)


def no_bias_or_norm(name: str, param: Tensor) -> bool:
    """The mask of the weights that multiply: two axes or more, so neither biases nor gains of normalisations.

    Example:
        >>> [no_bias_or_norm("", torch.zeros(shape)) for shape in ((3,), (3, 3), (3, 3, 3, 3))]
        [False, True, True]

    Source: GPT-3 and nanoGPT decay what has two axes or more.
    """
    return param.dim() >= 2


def _towards_params(rate: float | Schedule, sign: int, mask: Mask | None) -> Transform:
    if callable(rate):
        return _scheduled(rate, sign, mask)
    if not rate >= 0:
        raise ValueError(f"rate: got {rate}, expected a number >= 0")
    factor = sign * float(rate)
    return stateless(lambda updates, params: _added(updates, params, factor, mask))


def _scheduled(rate: Schedule, sign: int, mask: Mask | None) -> Transform:
    def init(params: Params) -> OptState:
        return tree.frozen({"count": torch.zeros((), dtype=torch.int64, device=device_of(params))})

    def update(grads: Params, opt_state: OptState, params: Params, /, **extra: Any) -> tuple[Params, OptState]:
        (count,) = tree.leaves(opt_state)
        updates = _added(grads, params, sign * rate(count), mask)
        return updates, tree.assign(opt_state, [count + 1])

    return transform(init, update)


def _added(updates: Params, params: Params, factor: float | Tensor, mask: Mask | None) -> Params:
    """``updates + factor * params`` where the mask allows."""
    new, old = tree.named(updates), tree.named(params)
    names = [name for name, p in old.items() if mask is None or mask(name, p)]
    sums = _sums([new[name] for name in names], [old[name] for name in names], factor)
    return tree.like(updates, list((new | dict(zip(names, sums, strict=True))).values()))


def _sums(updates: list[Tensor], params: list[Tensor], factor: float | Tensor) -> list[Tensor]:
    if not tree.has_foreach():
        return [u + (factor * p).to(u.dtype) for u, p in zip(updates, params, strict=True)]
    out = tree.writable(updates)
    if not out:
        return out
    if isinstance(factor, float):
        torch._foreach_add_(out, params, alpha=factor)
    else:
        torch._foreach_add_(out, torch._foreach_mul(params, factor))
    return out
