"""Classification losses beside torch.nn.functional."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainkit.losses import classification, multi_label, soft_classification
from trainkit.metrics import accuracy, counts

C = 4
WEIGHT = torch.tensor([0.5, 1.0, 2.0, 3.0])


def _arguments() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(8, C, generator=g), torch.tensor([0, 1, 2, 3, -100, 1, 1, -100])


@pytest.mark.parametrize("class_weight", [None, WEIGHT])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_mean_is_torchs(class_weight: Tensor | None, smoothing: float) -> None:
    logits, labels = _arguments()
    out = classification(logits, labels, class_weight=class_weight, label_smoothing=smoothing)
    expected = F.cross_entropy(logits, labels, class_weight, label_smoothing=smoothing)
    torch.testing.assert_close(out.loss_sum / out.weight, expected)


def test_classes_are_last_for_any_number_of_axes() -> None:
    logits, labels = _arguments()
    dense = classification(logits.reshape(2, 2, 2, C), labels.reshape(2, 2, 2))
    flat = classification(logits, labels)
    single = [classification(x, y).loss_sum for x, y in zip(logits, labels, strict=True)]
    assert torch.equal(dense.loss_sum, flat.loss_sum)
    torch.testing.assert_close(sum(single), flat.loss_sum)


def test_metrics_are_reported_by_name() -> None:
    logits, labels = _arguments()
    out = classification(logits, labels, metrics={"accuracy": accuracy, "f1": counts})
    kept = labels != -100
    torch.testing.assert_close(out.metrics["accuracy"].compute(), (logits.argmax(-1) == labels)[kept].float().mean())
    assert out.metrics["f1"].compute()["macro_f1"].dim() == 0


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.zeros(8), TypeError, "labels: dtype torch.float32, expected integers.*soft_classification"),
        (torch.zeros(8, 1, dtype=torch.int64), ValueError, r"labels: shape \(8, 1\).*expected \(8,\)"),
        (torch.tensor([0, 1, 2, 4, 0, 0, 0, -1]), ValueError, r"values from -1 to 4, expected 0 to 3 \(4 classes\)"),
        (torch.tensor([0, 1, 2, 4, 0, 0, 0, -100]), ValueError, "values from 0 to 4"),
        ([0, 1], TypeError, "labels: got list"),
    ],
)
def test_wrong_labels_are_refused(labels: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        classification(_arguments()[0], labels)


def test_ragged_class_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"class_weight: shape \(3,\), expected \(4,\)"):
        classification(*_arguments(), class_weight=torch.ones(3))


def test_logits_must_be_floating() -> None:
    with pytest.raises(TypeError, match=r"logits: dtype torch.int64, expected a floating one"):
        classification(torch.zeros(2, C, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))


def test_soft_targets_are_torchs_and_hard_ones_are_a_special_case() -> None:
    logits, labels = _arguments()
    targets = torch.rand(8, C, generator=torch.Generator().manual_seed(1)).softmax(-1)
    out = soft_classification(logits, targets, label_smoothing=0.1)
    torch.testing.assert_close(out.loss_sum / out.weight, F.cross_entropy(logits, targets, label_smoothing=0.1))
    kept = labels != -100
    hard = soft_classification(logits[kept], F.one_hot(labels[kept], C).float())
    torch.testing.assert_close(hard.loss_sum, classification(logits, labels).loss_sum)


def test_soft_targets_must_be_floating() -> None:
    with pytest.raises(TypeError, match=r"probabilities: dtype torch.int64"):
        soft_classification(torch.zeros(2, C), torch.zeros(2, C, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
@pytest.mark.parametrize("positive_weight", [None, WEIGHT])
def test_multi_label_is_torchs(dtype: torch.dtype, positive_weight: Tensor | None) -> None:
    logits, _ = _arguments()
    targets = torch.rand(8, C, generator=torch.Generator().manual_seed(1)) < 0.5
    out = multi_label(logits, targets.to(dtype), positive_weight=positive_weight)
    expected = F.binary_cross_entropy_with_logits(logits, targets.float(), pos_weight=positive_weight)
    torch.testing.assert_close(out.loss_sum / out.weight, expected)


@pytest.mark.parametrize("targets", [torch.full((2, C), 2), torch.full((2, C), -0.5)])
def test_multi_label_targets_outside_of_the_unit_interval_are_refused(targets: Tensor) -> None:
    with pytest.raises(ValueError, match=r"targets: values from .*expected 0 to 1"):
        multi_label(torch.zeros(2, C), targets)
