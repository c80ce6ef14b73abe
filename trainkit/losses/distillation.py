"""Learning from another model's outputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from trainkit.losses.checks import at_least_float32, check_floating, check_labels, check_same_shape, extra_metrics
from trainkit.metrics import Mean, Metric, MetricFn
from trainkit.types import LossOutput


def distillation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 2.0,
    alpha: float = 0.5,
    ignore_index: int = -100,
    metrics: Mapping[str, MetricFn] | None = None,
) -> LossOutput:
    """The teacher's soft targets and the true labels, mixed.

    sum over rows of alpha K^2 KL(p_teacher || p_student) + (1 - alpha) CE(labels, student), p = softmax(logits / K) and
    K the temperature; K^2 leaves the gradients in the size they have at K = 1. The weight is the number of rows (those
    with a label, where labels are given).

    Reports the means ``soft_loss`` (with K^2) and, with labels, ``hard_loss``.

    Args:
        student_logits: [..., C], floating.
        teacher_logits: in the same shape; no gradient flows to it.
        labels: [...], integers; None needs ``alpha=1``. Not shifted: use ``next_tokens`` for language models.
        temperature: K, positive.
        alpha: the share of the soft targets, in [0, 1].
        ignore_index: rows with this label count for nothing, in both terms.
        metrics: more to report by name, functions of (student_logits, labels); needs labels.

    Raises: TypeError for labels that are no integers; ValueError for shapes that disagree, an empty batch, labels
        that are no class (looked at eagerly on the CPU only), no labels where they are needed, or arguments out of
        range.

    Example:
        >>> same = torch.tensor([[2.0, 0.0, 1.0]])
        >>> distillation(same, same, alpha=1.0).loss_sum
        tensor(0.)

    Source: Hinton, Vinyals, Dean 2015, sec. 2.
    """
    check_floating("student_logits", student_logits)
    check_floating(
        "teacher_logits", check_same_shape("teacher_logits", teacher_logits, "student_logits", student_logits)
    )
    if not temperature > 0:
        raise ValueError(f"temperature: got {temperature}, expected a positive number")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: got {alpha}, expected a number in [0, 1]")
    if labels is None and (alpha < 1 or metrics):
        raise ValueError(f"labels: got None with alpha={alpha}; expected labels, or alpha=1 and no metrics of labels")
    student = at_least_float32(student_logits).reshape(-1, student_logits.shape[-1])
    teacher = teacher_logits.detach().to(student.dtype).reshape(student.shape)
    divergences = temperature**2 * _divergences(student / temperature, teacher / temperature)
    if labels is None:
        soft, rows = divergences.sum(), torch.tensor(len(student), device=student.device)
        return LossOutput(soft, rows, {"soft_loss": Mean(soft.detach(), rows)})
    flat = check_labels(labels, student_logits, ignore_index=ignore_index).flatten()
    kept = flat != ignore_index
    rows = kept.sum()
    soft = torch.where(kept, divergences, 0).sum()
    hard = F.cross_entropy(student, flat, reduction="sum", ignore_index=ignore_index)
    reported: dict[str, Metric] = {"soft_loss": Mean(soft.detach(), rows), "hard_loss": Mean(hard.detach(), rows)}
    reported.update(extra_metrics(metrics, student_logits, labels, ignore_index))
    return LossOutput(alpha * soft + (1 - alpha) * hard, rows, reported)


def _divergences(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(softmax(teacher) || softmax(student)) of each row."""
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
