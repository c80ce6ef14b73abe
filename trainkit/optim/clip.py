"""Clipping of gradients."""

from __future__ import annotations

from typing import Any

import torch

from trainkit import tree
from trainkit.optim.transform import REPORT, Transform, transform
from trainkit.types import OptState, Params


def clip_by_global_norm(max_norm: float) -> Transform:
    """Scale all updates together so that their joint L2 norm is at most ``max_norm``.

    u <- u * min(1, max_norm / (||u|| + 1e-6)), with ||u|| over every tensor, in float32.

    The norm before clipping is reported as ``grad_norm``.

    Args:
        max_norm: positive (infinity only measures); same unit as the gradient of the mean loss.

    Raises: ValueError if ``max_norm`` is not positive.

    Example:
        >>> w = tree.frozen({"w": torch.tensor([3.0, 4.0])})
        >>> tx = clip_by_global_norm(1.0)
        >>> updates, state = tx.update(w, tx.init(w), w)
        >>> updates["w"], state["report"]["grad_norm"]
        (tensor([0.6000, 0.8000]), tensor(5.))

    Source: Pascanu et al. 2013, sec. 3.2; matches torch.nn.utils.clip_grad_norm_ (torch 2.13).
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm: got {max_norm}, expected a positive number")

    def init(params: Params) -> OptState:
        device = next(iter(params.values())).device
        return tree.frozen({REPORT: {"grad_norm": torch.zeros((), device=device)}})

    def update(grads: Params, opt_state: OptState, params: Params, /, **extra: Any) -> tuple[Params, OptState]:
        norm = tree.global_norm(grads.values())
        factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        return tree.scaled(grads, factor), tree.frozen({REPORT: {"grad_norm": norm.float()}})

    return transform(init, update)
