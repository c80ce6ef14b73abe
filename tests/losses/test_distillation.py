"""Distillation beside its closed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainkit.losses import distillation
from trainkit.metrics import accuracy


def _arguments() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 5, dtype=torch.float64, generator=g) for _ in range(2))
    return student, teacher, torch.tensor([0, 4, -100, 2, 2, 1])


def _soft(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p, q = ((x / temperature).softmax(-1) for x in (teacher, student))
    return temperature**2 * (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_mix_is_hintons(temperature: float, alpha: float) -> None:
    student, teacher, labels = _arguments()
    kept = labels != -100
    out = distillation(student, teacher, labels, temperature=temperature, alpha=alpha)
    soft = _soft(student[kept], teacher[kept], temperature).mean()
    hard = F.cross_entropy(student, labels)
    torch.testing.assert_close(out.loss_sum / out.weight, alpha * soft + (1 - alpha) * hard)
    torch.testing.assert_close(out.metrics["soft_loss"].compute(), soft)
    torch.testing.assert_close(out.metrics["hard_loss"].compute(), hard)
    assert out.weight == 5


def test_without_labels_every_row_counts() -> None:
    student, teacher, _ = _arguments()
    out = distillation(student, teacher, alpha=1.0)
    torch.testing.assert_close(out.loss_sum, _soft(student, teacher, 2.0).sum())
    assert out.weight == 6


def test_gradients_are_of_one_size_at_any_temperature() -> None:
    student, teacher, _ = _arguments()
    student, teacher = 0.01 * student, 0.01 * teacher
    student.requires_grad_()
    norms = [
        torch.autograd.grad(distillation(student, teacher, temperature=t, alpha=1.0).loss_sum, student)[0].norm()
        for t in (1.0, 10.0)
    ]
    torch.testing.assert_close(norms[0], norms[1], rtol=2e-2, atol=0)


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher, labels = _arguments()
    loss_sum = distillation(student.requires_grad_(), teacher.requires_grad_(), labels).loss_sum
    assert torch.autograd.grad(loss_sum, teacher, allow_unused=True) == (None,)


def test_metrics_see_the_student() -> None:
    student, teacher, labels = _arguments()
    out = distillation(student, teacher, labels, metrics={"accuracy": accuracy})
    torch.testing.assert_close(out.metrics["accuracy"].compute(), accuracy(student, labels).compute())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature: got 0.0"),
        ({"alpha": 1.5}, r"alpha: got 1.5, expected a number in \[0, 1\]"),
        ({"labels": None}, "labels: got None with alpha=0.5"),
        ({"labels": None, "alpha": 1.0, "metrics": {"accuracy": accuracy}}, "labels: got None"),
        ({"teacher_logits": torch.zeros(6, 4)}, r"teacher_logits: shape \(6, 4\), but student_logits has \(6, 5\)"),
        ({"labels": torch.full((6,), 9)}, "labels: values from 9 to 9"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    student, teacher, labels = _arguments()
    with pytest.raises(ValueError, match=message):
        distillation(**({"student_logits": student, "teacher_logits": teacher, "labels": labels} | options))
