"""Smaller updates when the loss stops falling."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from trainkit import tree
from trainkit.optim.torch_kernels import device_of
from trainkit.optim.transform import REPORT, Transform, transform, with_entries
from trainkit.schedules import real_dtype
from trainkit.types import OptState, Params

Observe = Callable[[OptState, Tensor], OptState]
"""``(state, value) -> state``: take one value of the watched quantity into account."""


def reduce_on_plateau(
    *,
    factor: float = 0.1,
    patience: int = 10,
    threshold: float = 1e-4,
    threshold_mode: Literal["rel", "abs"] = "rel",
    mode: Literal["min", "max"] = "min",
    cooldown: int = 0,
    min_scale: float = 0.0,
    every: int = 1,
) -> Transform:
    """Scale the updates down by ``factor`` when the mean loss has not improved for more than ``patience`` looks.

    u <- scale u, where scale starts at 1. Then the loss of this step is looked at, so that it acts from the next step
    on, as with a scheduler that is called after the optimizer. Stands after the optimizer, whose learning rate it
    multiplies: ``chain(adamw(3e-4), reduce_on_plateau())``. The loss comes with the update (``loss=``), from
    ``apply_updates``. To watch another quantity, use :func:`plateau` on the state yourself.

    The scale of the next step is reported as ``plateau_scale``.

    Args:
        factor: in (0, 1), what each reduction multiplies the scale by.
        patience: looks without improvement that are tolerated.
        threshold: how much better than the best so far counts as an improvement.
        threshold_mode: "rel": better than best (1 - threshold), or (1 + threshold) for "max"; "abs": than
            best - threshold, or + threshold.
        mode: whether the quantity should fall or rise.
        cooldown: looks after a reduction during which none counts as bad.
        min_scale: the scale never falls below.
        every: look at the mean of so many losses; single losses of small batches are noisy.

    Raises:
        ValueError: a number out of its range.
        TypeError: when called, no loss came.

    Example:
        >>> from trainkit.optim import chain, sgd
        >>> w = tree.frozen({"w": torch.tensor([1.0])})
        >>> tx = chain(sgd(1.0), reduce_on_plateau(factor=0.5, patience=0))
        >>> state = tx.init(w)
        >>> for loss in (3.0, 3.0, 3.0):
        ...     updates, state = tx.update(w, state, w, loss=torch.tensor(loss))
        ...     print(float(updates["w"]))
        -1.0
        -1.0
        -0.5

    Source: matches torch.optim.lr_scheduler.ReduceLROnPlateau (torch 2.13) with eps=0; its steps are our looks.
    """
    observe = plateau(
        factor=factor,
        patience=patience,
        threshold=threshold,
        threshold_mode=threshold_mode,
        mode=mode,
        cooldown=cooldown,
        min_scale=min_scale,
        every=every,
    )

    def init(params: Params) -> OptState:
        return init_plateau(device_of(params), mode=mode)

    def update(grads: Params, opt_state: OptState, params: Params, /, **extra: Any) -> tuple[Params, OptState]:
        loss = extra.get("loss")
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"loss: got {type(loss).__name__}, expected a 0-d tensor; pass loss= to update and apply, "
                "as apply_updates does"
            )
        (scale,) = tree.leaves(opt_state[REPORT])
        return tree.scaled(grads, scale), observe(opt_state, loss)

    return transform(init, update)


def init_plateau(device: torch.device, *, mode: Literal["min", "max"] = "min") -> OptState:
    """The state before anything was watched: a scale of 1 and the worst value as the best so far.

    Args:
        device: where the step runs.
        mode: that of the rule.

    Example:
        >>> float(init_plateau(torch.device("cpu"))["report"]["plateau_scale"])
        1.0
    """
    one = torch.ones((), dtype=real_dtype(device), device=device)
    none = torch.zeros((), dtype=torch.int64, device=device)
    watched = {
        "best": one * (math.inf if mode == "min" else -math.inf),
        "total": torch.zeros_like(one),
        "seen": none,
        "bad": none.clone(),
        "cooling": none.clone(),
    }
    return tree.frozen({"watched": watched, REPORT: {"plateau_scale": one}})


def plateau(
    *,
    factor: float = 0.1,
    patience: int = 10,
    threshold: float = 1e-4,
    threshold_mode: Literal["rel", "abs"] = "rel",
    mode: Literal["min", "max"] = "min",
    cooldown: int = 0,
    min_scale: float = 0.0,
    every: int = 1,
) -> Observe:
    """The rule of :func:`reduce_on_plateau` alone: a function from the state and one value to the next state.

    For values that no step knows, such as the loss of an evaluation. Arguments and errors are those of
    :func:`reduce_on_plateau`.

    Example:
        >>> observe, state = plateau(factor=0.5, patience=0), init_plateau(torch.device("cpu"))
        >>> for accuracy_error in (0.3, 0.3):
        ...     state = observe(state, torch.tensor(accuracy_error))
        >>> float(state["report"]["plateau_scale"])
        0.5
    """
    _check(factor, patience, threshold, threshold_mode, mode, cooldown, min_scale, every)
    sign = 1 if mode == "min" else -1

    def improved(value: Tensor, best: Tensor) -> Tensor:
        bound = best * (1 - sign * threshold) if threshold_mode == "rel" else best - sign * threshold
        return sign * value < sign * bound

    def look(value: Tensor, best: Tensor, bad: Tensor, cooling: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        better = improved(value, best)
        best = torch.where(better, value, best)
        bad = torch.where(better | (cooling > 0), 0, bad + 1)
        cooling = torch.clamp(cooling - 1, min=0)
        reduce = bad > patience
        scale = torch.where(reduce, torch.minimum(scale, torch.clamp(scale * factor, min=min_scale)), scale)
        return best, torch.where(reduce, 0, bad), torch.where(reduce, cooldown, cooling), scale

    def observe(state: OptState, value: Tensor) -> OptState:
        best, total, seen, bad, cooling = tree.leaves(state["watched"])
        (scale,) = tree.leaves(state[REPORT])
        total, seen = total + value.to(total.dtype), seen + 1
        due = seen == every
        old = (best, bad, cooling, scale)
        best, bad, cooling, scale = (
            torch.where(due, after, before) for after, before in zip(look(total / every, *old), old, strict=True)
        )
        watched = [best, torch.where(due, 0.0, total), torch.where(due, 0, seen), bad, cooling]
        return with_entries(
            state, {"watched": tree.assign(state["watched"], watched), REPORT: tree.assign(state[REPORT], [scale])}
        )

    return observe


def _check(
    factor: float,
    patience: int,
    threshold: float,
    threshold_mode: str,
    mode: str,
    cooldown: int,
    min_scale: float,
    every: int,
) -> None:
    if not 0 < factor < 1:
        raise ValueError(f"factor: got {factor}, expected a number in (0, 1)")
    if threshold_mode not in ("rel", "abs"):
        raise ValueError(f"threshold_mode: got {threshold_mode!r}, expected 'rel' or 'abs'")
    if mode not in ("min", "max"):
        raise ValueError(f"mode: got {mode!r}, expected 'min' or 'max'")
    for name, value, least in (
        ("patience", patience, 0),
        ("threshold", threshold, 0),
        ("cooldown", cooldown, 0),
        ("min_scale", min_scale, 0),
        ("every", every, 1),
    ):
        if not value >= least:
            raise ValueError(f"{name}: got {value}, expected at least {least}")
