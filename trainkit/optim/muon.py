"""Muon: momentum, orthogonalised."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

from trainkit import tree
from trainkit.optim.torch_kernels import Memory, Rate, check_non_negative, check_real, kernel_optimizer
from trainkit.optim.transform import Transform
from trainkit.types import OptState, Params, Schedule


def muon(
    learning_rate: float | Tensor | Schedule = 1e-3,
    *,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
    eps: float = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: Literal["original", "match_rms_adamw"] | None = None,
) -> Transform:
    """Replace the momentum of each weight matrix by the nearest matrix with all singular values near 1.

    m <- mu m + (1 - mu) g;  u = mu m + (1 - mu) g with ``nesterov``, else m;
    theta <- theta (1 - lr wd) - lr s NewtonSchulz(u), s = sqrt(max(1, rows / columns)).

    For the matrices of hidden layers. Embeddings, heads, biases and norms belong to another optimizer: join the two
    with ``partition``.

    Args:
        learning_rate: number or schedule of the count.
        weight_decay: decoupled, per update and unit of learning rate.
        momentum: mu, in [0, 1).
        nesterov: look ahead along the momentum.
        ns_coefficients: of the quintic iteration, chosen for speed: singular values end between 0.7 and 1.2.
        eps: least norm that the iteration divides by.
        ns_steps: iterations, in bfloat16; below 100.
        adjust_lr_fn: "original" (also None) for the s above; "match_rms_adamw" for s = 0.2 sqrt(max(rows, columns)),
            with which a learning rate and decay tuned for AdamW can be kept.

    Raises: ValueError for numbers outside of their ranges; from ``init`` for parameters that are not real matrices,
        all named.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> w = tree.frozen({"w": torch.randn(4, 4)})
        >>> tx = muon(1.0, weight_decay=0.0)
        >>> updates, _ = tx.update(w, tx.init(w), w)
        >>> bool((torch.linalg.svdvals(updates["w"]) > 0.5).all())
        True

    Source: Jordan et al. 2024 ("Muon: an optimizer for hidden layers in neural networks"); "match_rms_adamw": Liu et
    al. 2025 ("Muon is scalable for LLM training"), sec. 2.2; matches torch.optim.Muon (torch 2.13), whose iteration
    does the work.
    """
    check_non_negative(weight_decay=weight_decay, eps=eps)
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum: got {momentum}, expected a number in [0, 1)")
    if len(ns_coefficients) != 3:
        raise ValueError(f"ns_coefficients: got {len(ns_coefficients)} numbers, expected 3")
    if not 0 <= ns_steps < 100:
        raise ValueError(f"ns_steps: got {ns_steps}, expected 0 to 99 iterations; 5 is usual")
    if adjust_lr_fn not in (None, "original", "match_rms_adamw"):
        raise ValueError(f"adjust_lr_fn: got {adjust_lr_fn!r}, expected 'original', 'match_rms_adamw' or None")

    def kernel(params: list[Tensor], grads: list[Tensor], memory: Memory, step: Tensor, learning_rate: Rate) -> None:
        for p, g, buffer in zip(params, grads, memory["momentum_buffer"], strict=True):
            buffer.lerp_(g, 1 - momentum)
            # A copy, because the iteration scales a bfloat16 argument in place.
            towards = g.lerp(buffer, momentum) if nesterov else buffer.clone()
            direction = _zeropower_via_newtonschulz(towards, ns_coefficients, ns_steps, eps)
            p.mul_(1 - learning_rate * weight_decay)
            p.sub_(direction.to(p.dtype) * _adjust_lr(learning_rate, adjust_lr_fn, p.shape))

    made = kernel_optimizer(kernel, {"momentum_buffer": tree.zeros_like}, learning_rate)

    def init(params: Params) -> OptState:
        check_real(params, "muon")
        _check_matrices(params)
        return made.init(params)

    return Transform(init, made.update, made.apply)


def _check_matrices(params: Params) -> None:
    found = [f"{name} {tuple(p.shape)}" for name, p in params.items() if p.dim() != 2]
    if found:
        raise ValueError(
            f"params: muon updates matrices, but these are none: {', '.join(found)}. Give them to another optimizer, "
            "such as adamw, and join both with trainkit.optim.partition"
        )
