"""AdamW: Adam with decoupled weight decay."""

from __future__ import annotations

from torch import Tensor

from trainkit.optim.adam import adam
from trainkit.optim.transform import Transform
from trainkit.types import Schedule


def adamw(
    learning_rate: float | Tensor | Schedule = 1e-3,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    amsgrad: bool = False,
    maximize: bool = False,
) -> Transform:
    """Adam with weight decay applied to the parameters, not to the gradient.

    theta <- theta (1 - lr wd);  m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;
    theta <- theta - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps).

    Args:
        learning_rate: number or schedule of the count; unit of the parameters per update.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the denominator after the root.
        weight_decay: per update and unit of learning rate. Leave biases and norms out of it with ``partition``.
        amsgrad: divide by the largest second moment so far.
        maximize: ascend.

    Raises: ValueError for rates outside of their ranges.

    Example:
        >>> import torch
        >>> from trainkit import tree
        >>> w = tree.frozen({"w": torch.tensor([1.0])})
        >>> tx = adamw(0.1, weight_decay=0.0)
        >>> tx.apply(w, tx.init(w), w)[0]["w"]
        tensor([0.9000])

    Source: Loshchilov and Hutter 2019, algorithm 2; matches torch.optim.AdamW (torch 2.13), whose kernels do the work.
    """
    return adam(
        learning_rate,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        amsgrad=amsgrad,
        maximize=maximize,
        decoupled_weight_decay=True,
    )
