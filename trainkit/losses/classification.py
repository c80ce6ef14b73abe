"""Losses over classes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from trainkit.losses.checks import (
    at_least_float32,
    check_floating,
    check_labels,
    check_same_shape,
    check_share,
    extra_metrics,
    readable,
)
from trainkit.metrics import MetricFn
from trainkit.types import LossOutput


def classification(
    logits: Tensor,
    labels: Tensor,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    metrics: Mapping[str, MetricFn] | None = None,
) -> LossOutput:
    """Cross entropy over rows with one right class each.

    sum_i w[y_i] (-(1 - s) log p_i[y_i]) - s/C sum_c w[c] log p_i[c], p = softmax(logits), over the rows with
    y_i != ignore_index. The weight is sum_i w[y_i]: the number of rows, without ``class_weight``.

    Args:
        logits: [..., C], floating; classes last (``rearrange(x, "b c h w -> b h w c")`` for images of classes).
        labels: [...], integers.
        class_weight: [C], floating, w above; 1 without it.
        ignore_index: rows with this label count for nothing.
        label_smoothing: s, in [0, 1).
        metrics: more to report by name, functions of (logits, labels) such as ``trainkit.metrics.accuracy``.

    Raises: TypeError for labels that are no integers; ValueError for shapes that disagree, an empty batch, labels
        that are no class (looked at eagerly on the CPU only), or arguments out of range.

    Example:
        >>> classification(torch.zeros(3, 4), torch.tensor([0, 1, -100])).loss_sum / 2
        tensor(1.3863)

    Source: torch.nn.functional.cross_entropy (torch 2.13), whose mean is ``loss_sum / weight``.
    """
    labels = check_labels(labels, logits, ignore_index=ignore_index)
    check_share("label_smoothing", label_smoothing)
    if class_weight is not None and class_weight.shape != logits.shape[-1:]:
        raise ValueError(f"class_weight: shape {tuple(class_weight.shape)}, expected {tuple(logits.shape[-1:])}")
    scores, flat = at_least_float32(logits).reshape(-1, logits.shape[-1]), labels.flatten()
    class_weight = None if class_weight is None else class_weight.to(scores)
    loss_sum = F.cross_entropy(
        scores, flat, class_weight, reduction="sum", ignore_index=ignore_index, label_smoothing=label_smoothing
    )
    kept = flat != ignore_index
    weight = kept.sum()
    if class_weight is not None:
        weight = torch.where(kept, class_weight[torch.where(kept, flat, 0)], 0).sum().detach()
    return LossOutput(loss_sum, weight, extra_metrics(metrics, logits, labels, ignore_index))


def soft_classification(
    logits: Tensor,
    probabilities: Tensor,
    *,
    label_smoothing: float = 0.0,
    metrics: Mapping[str, MetricFn] | None = None,
) -> LossOutput:
    """Cross entropy against probabilities of classes: mixed images, annotators who disagree.

    sum_i sum_c -((1 - s) q_i[c] + s/C) log p_i[c], p = softmax(logits). The weight is the number of rows.

    Args:
        logits: [..., C], floating; classes last.
        probabilities: q, in the shape of the logits; sums to one over the last axis.
        label_smoothing: s, in [0, 1).
        metrics: more to report by name, functions of (logits, probabilities).

    Raises: TypeError for probabilities that are not floating; ValueError for shapes that disagree, an empty batch, or
        arguments out of range.

    Example:
        >>> soft_classification(torch.zeros(1, 2), torch.tensor([[0.3, 0.7]])).loss_sum
        tensor(0.6931)

    Source: torch.nn.functional.cross_entropy (torch 2.13) with class probabilities; Zhang et al. 2018 (mixup), eq. 2.
    """
    check_floating("logits", logits)
    check_floating("probabilities", check_same_shape("probabilities", probabilities, "logits", logits))
    check_share("label_smoothing", label_smoothing)
    scores = at_least_float32(logits).reshape(-1, logits.shape[-1])
    targets = probabilities.to(scores.dtype).reshape(scores.shape)
    loss_sum = F.cross_entropy(scores, targets, reduction="sum", label_smoothing=label_smoothing)
    return LossOutput(loss_sum, scores.shape[0], extra_metrics(metrics, logits, probabilities))


def multi_label(
    logits: Tensor,
    targets: Tensor,
    *,
    positive_weight: Tensor | None = None,
    metrics: Mapping[str, MetricFn] | None = None,
) -> LossOutput:
    """Binary cross entropy: each class is there or not, on its own.

    sum over elements of -(v t log sigmoid(x) + (1 - t) log(1 - sigmoid(x))). The weight is the number of elements.

    Args:
        logits: x, [..., C], floating.
        targets: t, in the shape of the logits; 0 or 1 in any dtype, or floating probabilities.
        positive_weight: v, [C]; 1 without it.
        metrics: more to report by name, functions of (logits, targets).

    Raises: TypeError for targets that are no tensor; ValueError for shapes that disagree, an empty batch, or targets
        outside of [0, 1] (looked at eagerly on the CPU only).

    Example:
        >>> multi_label(torch.zeros(2, 3), torch.ones(2, 3)).loss_sum / 6
        tensor(0.6931)

    Source: torch.nn.functional.binary_cross_entropy_with_logits (torch 2.13).
    """
    check_floating("logits", logits)
    check_same_shape("targets", targets, "logits", logits)
    if readable(targets):
        _check_unit_interval(targets)
    scores = at_least_float32(logits)
    loss_sum = F.binary_cross_entropy_with_logits(
        scores, targets.to(scores.dtype), reduction="sum", pos_weight=positive_weight
    )
    return LossOutput(loss_sum, scores.numel(), extra_metrics(metrics, logits, targets))


def _check_unit_interval(targets: Tensor) -> None:
    low, high = (float(extreme) for extreme in targets.aminmax())
    if low < 0 or high > 1:
        raise ValueError(
            f"targets: values from {low:g} to {high:g}, expected 0 to 1: one yes-or-no entry per class. For class "
            "indices use classification"
        )
