"""Preference losses beside their closed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trainkit.losses import dpo


def _arguments() -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(7, dtype=torch.float64, generator=g) for _ in range(4)]


@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_the_logistic_of_the_margin(beta: float, smoothing: float) -> None:
    chosen, rejected, ref_chosen, ref_rejected = arguments = _arguments()
    out = dpo(*arguments, beta=beta, label_smoothing=smoothing)
    margin = beta * ((chosen - rejected) - (ref_chosen - ref_rejected))
    right = 1 / (1 + torch.exp(-margin))
    torch.testing.assert_close(out.loss_sum, -((1 - smoothing) * right.log() + smoothing * (1 - right).log()).sum())
    assert out.weight == 7
    values = {name: metric.compute() for name, metric in out.metrics.items()}
    torch.testing.assert_close(values["reward_margin"], margin.mean())
    torch.testing.assert_close(values["reward_margin"], values["reward_chosen"] - values["reward_rejected"])
    torch.testing.assert_close(values["reward_accuracy"], (margin > 0).double().mean())


def test_the_smoothed_loss_is_least_at_the_margin_of_the_noise() -> None:
    margin = torch.tensor([0.25], dtype=torch.float64).logit().neg().requires_grad_()
    zero = torch.zeros(1, dtype=torch.float64)
    (grad,) = torch.autograd.grad(dpo(margin, zero, zero, zero, beta=1.0, label_smoothing=0.25).loss_sum, margin)
    torch.testing.assert_close(grad, zero)


def test_a_large_margin_overflows_nothing() -> None:
    far = torch.tensor([1e4])
    assert dpo(far, -far, 0 * far, 0 * far, beta=1.0).loss_sum == 0
    torch.testing.assert_close(dpo(-far, far, 0 * far, 0 * far, beta=1.0).loss_sum, torch.tensor(2e4))


def test_no_gradient_reaches_the_reference() -> None:
    chosen, rejected, *reference = (t.requires_grad_() for t in _arguments())
    loss_sum = dpo(chosen, rejected, *reference).loss_sum
    assert torch.autograd.grad(loss_sum, reference, allow_unused=True) == (None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta: got 0.0"),
        ({"label_smoothing": 0.5}, r"label_smoothing: got 0.5, expected a number in \[0, 0.5\)"),
        (
            {"ref_rejected_logps": torch.zeros(3)},
            r"ref_rejected_logps: shape \(3,\), but policy_chosen_logps has \(7,\)",
        ),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    names = ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    arguments: dict[str, Any] = dict(zip(names, _arguments(), strict=True))
    with pytest.raises(ValueError, match=message):
        dpo(**(arguments | options))
