"""Averages of parameters over the course of a run.

Every average here has one form, ``mean <- mean + share (params - mean)``, and the kinds differ in the share of the
newest parameters, a function of how many there were before: constant for an exponential moving average, 1 / (n + 1)
for Polyak's and SWA's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainkit import tree
from trainkit.schedules import real_dtype
from trainkit.types import Params, Schedule


def average(mean: Params, params: Params, share: float | Tensor) -> Params:
    """One step of a running average.

    mean <- mean + share (params - mean), in the dtype of the mean; exact for shares of 0 and 1.

    Args:
        mean: the average so far.
        params: the newest parameters.
        share: in [0, 1], number or 0-d tensor; 1 - decay for an exponential average.

    Example:
        >>> average(tree.frozen({"w": torch.zeros(1)}), tree.frozen({"w": torch.ones(1)}), 0.25)["w"]
        tensor([0.2500])

    Source: with a number it matches torch.optim.swa_utils.get_ema_multi_avg_fn (torch 2.13).
    """
    old = tree.writable(tree.leaves(mean))
    new = [p.to(m.dtype) for m, p in zip(old, tree.leaves(params), strict=True)]
    if not tree.has_foreach():
        return tree.like(mean, [torch.lerp(m, p, _as_dtype(share, m)) for m, p in zip(old, new, strict=True)])
    if isinstance(share, Tensor):
        # The kernel for lists would ask the device for the number.
        return tree.like(mean, [m.lerp_(p, share.to(m.dtype)) for m, p in zip(old, new, strict=True)])
    torch._foreach_lerp_(old, new, share)
    return tree.like(mean, old)


def _as_dtype(share: float | Tensor, mean: Tensor) -> Tensor:
    return torch.as_tensor(share, dtype=mean.dtype, device=mean.device)


def ema(decay: float, *, debias: bool = False, warmup: bool = False) -> Schedule:
    """The share of the newest parameters in an exponential moving average, as a function of the count n from 0.

    Plain: 1 - decay. The first parameters, those it is started with, keep the weight decay^n.
    ``debias``: (1 - decay) / (1 - decay^(n + 1)), the average as if started from zero and divided by the sum of its
    weights, as Adam does it: the parameters it is started with have no weight.
    ``warmup``: at least 9 / (n + 10), so that a long memory forgets the first steps.

    Args:
        decay: in [0, 1); the memory is about 1 / (1 - decay) updates long.
        debias: see above.
        warmup: see above; not together with ``debias``.

    Raises: ValueError for a decay out of its range, or both options.

    Example:
        >>> [round(float(ema(0.75, debias=True)(torch.tensor(n))), 4) for n in range(3)]
        [1.0, 0.5714, 0.4324]
        >>> [round(float(ema(0.75, warmup=True)(torch.tensor(n))), 4) for n in (0, 26, 27)]
        [0.9, 0.25, 0.25]

    Source: Kingma and Ba 2015, sec. 3, for debiasing; tf.train.ExponentialMovingAverage(num_updates=n) for the warm-up.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay: got {decay}, expected a number in [0, 1)")
    if debias and warmup:
        raise ValueError("debias, warmup: got both, expected at most one; each deals with the first steps")

    def share(count: Tensor) -> Tensor:
        n = count.to(real_dtype(count.device))
        if debias:
            return (1 - decay) / (1 - decay ** (n + 1))
        return torch.clamp(9 / (n + 10), min=1 - decay) if warmup else torch.full_like(n, 1 - decay)

    return share


def polyak(*, start: int = 0, every: int = 1) -> Schedule:
    """The share of the newest parameters in an average with equal weights, as a function of the count n from 0.

    1 for n < start (the average is the newest); at start + i every it is 1 / (i + 1); 0 between those.

    Args:
        start: the first count that is averaged.
        every: take one in so many; for SWA the length of a cycle or an epoch.

    Raises: ValueError for a negative start or a step below one.

    Example:
        >>> share = polyak(start=2, every=2)
        >>> [round(float(share(torch.tensor(n))), 4) for n in range(7)]
        [1.0, 1.0, 1.0, 0.0, 0.5, 0.0, 0.3333]

    Source: Polyak and Juditsky 1992; Izmailov et al. 2018 (SWA), algorithm 1; matches torch.optim.swa_utils.
    """
    if start < 0 or every < 1:
        raise ValueError(f"start, every: got {start} and {every}, expected at least 0 and 1")

    def share(count: Tensor) -> Tensor:
        since = count - start
        taken = 1 / (torch.div(since, every, rounding_mode="floor") + 1).to(real_dtype(count.device))
        return torch.where(since < 0, 1.0, torch.where(since % every == 0, taken, 0.0))

    return share
