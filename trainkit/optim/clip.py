"""Clipping of gradients: all together, unit by unit, number by number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainkit import tree
from trainkit.optim.torch_kernels import device_of
from trainkit.optim.transform import REPORT, Transform, stateless, transform, with_entries
from trainkit.types import OptState, Params

_EPS = 1e-6
_SURELY_BELOW = 0.999
"""Of a limit: below that no rounding makes a quotient of limit and norm less than 1."""


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
    _check_positive("max_norm", max_norm)

    def init(params: Params) -> OptState:
        return tree.frozen({REPORT: {"grad_norm": torch.zeros((), device=device_of(params))}})

    def update(grads: Params, opt_state: OptState, params: Params, /, **extra: Any) -> tuple[Params, OptState]:
        norm = tree.global_norm(tree.leaves(grads))
        new_state = with_entries(opt_state, {REPORT: tree.assign(opt_state[REPORT], [norm.float()])})
        if tree.has_foreach() and norm.is_cpu and norm.item() + _EPS < _SURELY_BELOW * max_norm:
            # One look at a number on the host is sooner done than the kernels that find a factor of 1.
            return grads, new_state
        return tree.scaled(grads, torch.clamp(max_norm / (norm + _EPS), max=1.0)), new_state

    return transform(init, update)


def clip_by_value(max_value: float) -> Transform:
    """Limit every number of the updates to [-max_value, max_value]. NaN stays NaN.

    Args:
        max_value: positive; same unit as the gradient of the mean loss.

    Raises: ValueError if ``max_value`` is not positive.

    Example:
        >>> w = tree.frozen({"w": torch.tensor([3.0, -0.5])})
        >>> clip_by_value(1.0).update(w, tree.frozen(), w)[0]["w"]
        tensor([ 1.0000, -0.5000])

    Source: Mikolov 2012, sec. 3.3; matches torch.nn.utils.clip_grad_value_ (torch 2.13).
    """
    _check_positive("max_value", max_value)

    def rule(updates: Params, params: Params) -> Params:
        out = tree.writable(tree.leaves(updates))
        if not tree.has_foreach():
            return tree.like(updates, [t.clamp(-max_value, max_value) for t in out])
        torch._foreach_clamp_min_(out, -max_value)
        torch._foreach_clamp_max_(out, max_value)
        return tree.like(updates, out)

    return stateless(rule)


def clip_by_unit_norm(max_norm: float) -> Transform:
    """Scale the updates of each unit so that their L2 norm is at most ``max_norm``.

    u_i <- u_i * min(1, max_norm / (||u_i|| + 1e-6)), with i over the units as in :func:`adaptive_clip`.

    Args:
        max_norm: positive; same unit as the gradient of the mean loss.

    Raises: ValueError if ``max_norm`` is not positive.

    Example:
        >>> w = tree.frozen({"w": torch.tensor([[3.0, 4.0], [0.3, 0.4]])})
        >>> clip_by_unit_norm(1.0).update(w, tree.frozen(), w)[0]["w"]
        tensor([[0.6000, 0.8000],
                [0.3000, 0.4000]])

    Source: the per-unit form of Pascanu et al. 2013, sec. 3.2; matches clip_grad_norm_ called on each unit alone.
    """
    _check_positive("max_norm", max_norm)

    def clipped(update: Tensor) -> Tensor:
        return update * torch.clamp(max_norm / (unit_norms(update) + _EPS), max=1.0).to(update.dtype)

    return stateless(lambda updates, params: tree.map_tensors(clipped, updates))


def adaptive_clip(max_ratio: float = 0.01, *, eps: float = 1e-3) -> Transform:
    """Scale the gradient of each unit to at most a share of the norm of its weights.

    g_i <- g_i * min(1, max_ratio * max(||w_i||, eps) / ||g_i||).

    A unit i is what one output reads: an entry of the first axis for two axes and more (rows of a Linear, filters of
    a convolution); the whole tensor for fewer (biases, gains). The paper leaves the last linear layer out: use
    ``masked``.

    Args:
        max_ratio: positive; largest ||g_i|| / ||w_i||.
        eps: positive; what a smaller norm of the weights is counted as, so that zero-initialised units can start.

    Raises: ValueError for numbers that are not positive.

    Example:
        >>> w = tree.frozen({"w": torch.tensor([[3.0, 4.0]])})
        >>> adaptive_clip(0.1).update(w, tree.frozen(), w)[0]["w"]
        tensor([[0.3000, 0.4000]])

    Source: Brock et al. 2021 (NFNets), eq. 3.
    """
    _check_positive("max_ratio", max_ratio)
    _check_positive("eps", eps)

    def clipped(update: Tensor, param: Tensor) -> Tensor:
        largest = max_ratio * unit_norms(param).clamp(min=eps)
        # A zero gradient makes the ratio infinite, and is kept as it is.
        return update * torch.clamp(largest / unit_norms(update), max=1.0).to(update.dtype)

    return stateless(lambda updates, params: tree.map_tensors(clipped, updates, params))


def unit_norms(tensor: Tensor) -> Tensor:
    """The L2 norm of each unit in at least float32, with axes of size one for those that were summed.

    Args:
        tensor: [units, ...], or a single unit of fewer than two axes.

    Example:
        >>> unit_norms(torch.tensor([[3.0, 4.0], [0.0, 1.0]])), unit_norms(torch.tensor([3.0, 4.0]))
        (tensor([[5.],
                [1.]]), tensor([5.]))
    """
    dims = tuple(range(1, tensor.dim())) if tensor.dim() > 1 else None
    wide = torch.promote_types(tensor.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=dims, keepdim=True, dtype=wide)
    return norms


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name}: got {value}, expected a positive number")
