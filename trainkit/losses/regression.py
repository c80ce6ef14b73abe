"""Losses over numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from trainkit.losses.checks import at_least_float32, check_floating, check_same_shape, extra_metrics
from trainkit.metrics import MetricFn
from trainkit.types import LossOutput


def mean_squared_error(
    predictions: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    metrics: Mapping[str, MetricFn] | None = None,
) -> LossOutput:
    """The squared error: sum (x - t)^2 over elements. The weight is their number.

    Args:
        predictions: x, floating, any shape.
        targets: t, real, in the same shape; taken to the dtype of the predictions (float32 or wider).
        mask: bool, in the same shape; False leaves an element out, whatever its target holds (NaN too).
        metrics: more to report by name, functions of (predictions, targets).

    Raises: TypeError for a dtype that is no number; ValueError for shapes that differ (nothing broadcasts) or an
        empty batch.

    Example:
        >>> mean_squared_error(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])).loss_sum
        tensor(5.)

    Source: torch.nn.functional.mse_loss (torch 2.13).
    """
    return _over_elements(partial(F.mse_loss, reduction="none"), predictions, targets, mask, metrics)


def mean_absolute_error(
    predictions: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    metrics: Mapping[str, MetricFn] | None = None,
) -> LossOutput:
    """The absolute error: sum |x - t| over elements. The weight is their number.

    Args:
        predictions: x, floating, any shape.
        targets: t, real, in the same shape; taken to the dtype of the predictions (float32 or wider).
        mask: bool, in the same shape; False leaves an element out, whatever its target holds (NaN too).
        metrics: more to report by name, functions of (predictions, targets).

    Raises: TypeError for a dtype that is no number; ValueError for shapes that differ (nothing broadcasts) or an
        empty batch.

    Example:
        >>> mean_absolute_error(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])).loss_sum
        tensor(3.)

    Source: torch.nn.functional.l1_loss (torch 2.13).
    """
    return _over_elements(partial(F.l1_loss, reduction="none"), predictions, targets, mask, metrics)


def huber(
    predictions: Tensor,
    targets: Tensor,
    *,
    delta: float = 1.0,
    mask: Tensor | None = None,
    metrics: Mapping[str, MetricFn] | None = None,
) -> LossOutput:
    """The Huber loss, quadratic near zero and linear beyond: the weight is the number of elements.

    sum of e^2 / 2 where |e| <= delta, delta (|e| - delta / 2) elsewhere, e = x - t.

    Args:
        predictions: x, floating, any shape.
        targets: t, real, in the same shape; taken to the dtype of the predictions (float32 or wider).
        delta: positive, in the unit of the targets.
        mask: bool, in the same shape; False leaves an element out, whatever its target holds (NaN too).
        metrics: more to report by name, functions of (predictions, targets).

    Raises: TypeError for a dtype that is no number; ValueError for shapes that differ (nothing broadcasts), an empty
        batch, or ``delta`` that is not positive.

    Example:
        >>> huber(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 5.0])).loss_sum
        tensor(3.)

    Source: Huber 1964; torch.nn.functional.huber_loss (torch 2.13).
    """
    if not delta > 0:
        raise ValueError(f"delta: got {delta}, expected a positive number")
    return _over_elements(partial(F.huber_loss, reduction="none", delta=delta), predictions, targets, mask, metrics)


def _over_elements(
    error: Callable[[Tensor, Tensor], Tensor],
    predictions: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    metrics: Mapping[str, MetricFn] | None,
) -> LossOutput:
    check_floating("predictions", predictions)
    check_same_shape("targets", targets, "predictions", predictions)
    if targets.is_complex() or targets.dtype == torch.bool:
        raise TypeError(f"targets: dtype {targets.dtype}, expected real numbers")
    x = at_least_float32(predictions)
    t = targets.to(x.dtype)
    more = extra_metrics(metrics, predictions, targets)
    if mask is None:
        return LossOutput(error(x, t).sum(), x.numel(), more)
    if check_same_shape("mask", mask, "predictions", predictions).dtype != torch.bool:
        raise TypeError(f"mask: dtype {mask.dtype}, expected bool")
    # The target is replaced before the arithmetic: zero times a NaN behind a mask would be NaN in the gradient.
    return LossOutput(error(x, torch.where(mask, t, x.detach())).sum(), mask.sum(), more)
