"""Adafactor as the Trainer of transformers has it, with a learning rate of one's own.

``torch.optim.Adafactor`` is another rule: its step is always relative to the size of the parameter and bounded by
1 / sqrt(t), which this one's is only when asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Adafactor(Optimizer):
    """Adam's denominator factored into rows and columns, clipped by its root mean square.

    With beta = 1 - t^decay_rate and G^2 the squared gradient plus eps[0], for step t = 1, 2, ...:
    R <- beta R + (1 - beta) mean_columns(G^2),  C <- beta C + (1 - beta) mean_rows(G^2),  V = R C / mean(R);
    U = G / sqrt(V), U <- U / max(1, rms(U) / clip_threshold), p <- p - rate (weight_decay p + U).
    Tensors of less than two axes keep V itself. The arithmetic is at least float32.

    Args:
        params: tensors, or groups of them.
        lr: the learning rate; None with ``relative_step``.
        eps: added to the squared gradient, and the least scale of a parameter.
        clip_threshold: positive, the largest root mean square of an update in units of the rate.
        decay_rate: negative, exponent of the decay.
        beta1: of a running mean of the updates; None keeps none.
        weight_decay: decoupled, times the rate.
        scale_parameter: multiply the rate with max(eps[1], rms(p)).
        relative_step: take min(0.01, 1 / sqrt(t)) as the rate.
        warmup_init: with ``relative_step``, rise from 1e-6 t instead of starting at 0.01.

    Raises: ValueError for ``lr`` together with ``relative_step``, or ``warmup_init`` without it.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2, 2))
        >>> optimizer = Adafactor([w], lr=0.5, scale_parameter=False, relative_step=False)
        >>> w.grad = torch.ones(2, 2)
        >>> optimizer.step()
        >>> w.detach()
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]])

    Source: Shazeer and Stern 2018, algorithms 4 and 5; arguments and state of transformers.optimization.Adafactor 4.57.
    """

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
    ) -> None:
        if lr is not None and relative_step:
            raise ValueError(f"lr: got {lr} with relative_step=True, which makes its own; pass relative_step=False")
        if warmup_init and not relative_step:
            raise ValueError("warmup_init: True needs relative_step=True; with lr use a schedule instead")
        defaults = {
            "lr": lr,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "decay_rate": decay_rate,
            "beta1": beta1,
            "weight_decay": weight_decay,
            "scale_parameter": scale_parameter,
            "relative_step": relative_step,
            "warmup_init": warmup_init,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters in place from their ``.grad``.

        Args:
            closure: computes the loss and the gradients again; its result is returned.

        Raises: RuntimeError for a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    _update(p, p.grad, self.state[p], group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does, but leave the memory of narrow parameters in float32, as it was saved."""
        super().load_state_dict(state_dict)
        own = [p for group in self.param_groups for p in group["params"]]
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        for p, key in zip(own, saved, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][name] = value.detach().to(p.device, copy=True)


def _update(p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    if grad.is_sparse:
        raise RuntimeError("grad: it is sparse, which Adafactor cannot factor; use sparse=False in the embedding")
    grad = _wide(grad)
    if not state:
        state.update(_first_state(grad, group))
    state["step"] += 1
    wide = _wide(p)
    rate = _rate(wide, state, group)
    update = _direction(grad, state, group).mul_(rate)
    if group["beta1"] is not None:
        update = state["exp_avg"].mul_(group["beta1"]).add_(update, alpha=1 - group["beta1"])
    if group["weight_decay"] != 0:
        if isinstance(rate, Tensor):
            wide.sub_(wide * rate * group["weight_decay"])
        else:
            wide.add_(wide, alpha=-group["weight_decay"] * rate)
    wide.sub_(update)
    if wide is not p:
        p.copy_(wide)


def _first_state(grad: Tensor, group: dict[str, Any]) -> dict[str, Any]:
    state: dict[str, Any] = {"step": 0, "RMS": 0}
    if group["beta1"] is not None:
        state["exp_avg"] = torch.zeros_like(grad)
    if grad.dim() >= 2:
        state["exp_avg_sq_row"] = grad.new_zeros(grad.shape[:-1])
        state["exp_avg_sq_col"] = grad.new_zeros(grad.shape[:-2] + grad.shape[-1:])
    else:
        state["exp_avg_sq"] = torch.zeros_like(grad)
    return state


def _direction(grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """The gradient over the root of its running mean square, clipped by its own root mean square."""
    beta = 1.0 - math.pow(state["step"], group["decay_rate"])
    square = grad.square().add_(group["eps"][0])
    if grad.dim() >= 2:
        row = state["exp_avg_sq_row"].mul_(beta).add_(square.mean(-1), alpha=1.0 - beta)
        column = state["exp_avg_sq_col"].mul_(beta).add_(square.mean(-2), alpha=1.0 - beta)
        inverse_root = (row / row.mean(-1, keepdim=True)).rsqrt_().unsqueeze(-1) * column.unsqueeze(-2).rsqrt()
    else:
        inverse_root = state["exp_avg_sq"].mul_(beta).add_(square, alpha=1.0 - beta).rsqrt()
    update = inverse_root.mul_(grad)
    clipped: Tensor = update.div_((_rms(update) / group["clip_threshold"]).clamp_(min=1.0))
    return clipped


def _rate(p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> float | Tensor:
    rate = group["lr"]
    if group["relative_step"]:
        rate = min(1e-6 * state["step"] if group["warmup_init"] else 1e-2, 1 / math.sqrt(state["step"]))
    if not group["scale_parameter"]:
        return rate if isinstance(rate, Tensor) else float(rate)
    # Tensors, so that nobody waits for a device to tell the size.
    state["RMS"] = size = _rms(p)
    scaled: Tensor = size.clamp(min=group["eps"][1]) * rate
    return scaled


def _rms(t: Tensor) -> Tensor:
    size: Tensor = torch.linalg.vector_norm(t) / math.sqrt(t.numel())
    return size


def _wide(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t
