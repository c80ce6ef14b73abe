"""Regression losses beside torch.nn.functional."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainkit.losses import huber, mean_absolute_error, mean_squared_error
from trainkit.types import LossOutput

PAIRS = [
    (mean_squared_error, F.mse_loss),
    (mean_absolute_error, F.l1_loss),
    (partial(huber, delta=0.4), partial(F.huber_loss, delta=0.4)),
]
every_loss = pytest.mark.parametrize(("loss", "reference"), PAIRS, ids=["squared", "absolute", "huber"])


def _arguments() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(5, 3, generator=g), torch.randn(5, 3, generator=g)


@every_loss
def test_the_mean_is_torchs(loss: Callable[..., LossOutput], reference: Callable[..., Tensor]) -> None:
    x, targets = _arguments()
    out = loss(x, targets)
    torch.testing.assert_close(out.loss_sum / out.weight, reference(x, targets))


@every_loss
def test_a_mask_leaves_elements_out_with_their_nans(
    loss: Callable[..., LossOutput], reference: Callable[..., Tensor]
) -> None:
    x, targets = _arguments()
    mask = torch.rand(5, 3, generator=torch.Generator().manual_seed(1)) < 0.5
    holes = targets.masked_fill(~mask, float("nan"))
    out = loss(x.requires_grad_(), holes, mask=mask)
    (grad,) = torch.autograd.grad(out.loss_sum, x)
    torch.testing.assert_close(out.loss_sum / out.weight, reference(x[mask], targets[mask]))
    assert not grad[~mask].any()
    assert grad[mask].all()


@every_loss
def test_an_empty_mask_weighs_nothing(loss: Callable[..., LossOutput], reference: Callable[..., Tensor]) -> None:
    x, targets = _arguments()
    out = loss(x, targets, mask=torch.zeros(5, 3, dtype=torch.bool))
    assert (out.loss_sum, out.weight) == (0, 0)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_targets_take_the_dtype_of_the_predictions(
    loss: Callable[..., LossOutput], reference: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    x, _ = _arguments()
    targets = torch.arange(15).reshape(5, 3)
    out = loss(x, targets.to(dtype))
    assert out.loss_sum.dtype == torch.float32
    torch.testing.assert_close(out.loss_sum, reference(x, targets.float(), reduction="sum"))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((torch.zeros(4, 1), torch.zeros(4)), {}, ValueError, r"targets: shape \(4,\), but predictions has \(4, 1\)"),
        ((torch.zeros(4), torch.zeros(4) > 1), {}, TypeError, "targets: dtype torch.bool"),
        ((torch.zeros(4), torch.zeros(4) * 1j), {}, TypeError, "targets: dtype torch.complex64"),
        ((torch.zeros(4, dtype=torch.int64), torch.zeros(4)), {}, TypeError, "predictions: dtype torch.int64"),
        ((torch.zeros(4), torch.zeros(4)), {"mask": torch.ones(4)}, TypeError, "mask: dtype torch.float32"),
        ((torch.zeros(4), torch.zeros(4)), {"mask": torch.ones(3) > 0}, ValueError, "mask: shape"),
    ],
)
def test_wrong_arguments_are_refused(arguments: Any, options: Any, error: type[Exception], message: str) -> None:
    for loss, _ in PAIRS:
        with pytest.raises(error, match=message):
            loss(*arguments, **options)


@pytest.mark.parametrize("delta", [0.0, -1.0, float("nan")])
def test_a_delta_that_is_not_positive_is_refused(delta: float) -> None:
    with pytest.raises(ValueError, match="delta: got"):
        huber(*_arguments(), delta=delta)
