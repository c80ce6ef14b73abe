"""What holds for every criterion: finite differences, additivity over splits, ignored labels, compiled graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainkit.accumulate import merge_metrics
from trainkit.losses import (
    causal_lm,
    causal_lm_head,
    classification,
    distillation,
    dpo,
    huber,
    linear_cross_entropy,
    masked_lm,
    mean_absolute_error,
    mean_squared_error,
    multi_label,
    soft_classification,
)
from trainkit.types import LossOutput

CLASSES = 5
IGNORE = -100
HEAD = torch.randn(CLASSES, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
CLASS_WEIGHT = torch.linspace(0.5, 2.0, CLASSES, dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """A criterion, and arguments whose first axis counts the rows; the first is what gradients are taken of."""

    name: str
    criterion: Callable[..., LossOutput]
    make: Callable[[int, torch.Generator], tuple[Tensor, ...]]
    ignores: bool = False


def _normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def _labels(*shape: int, generator: torch.Generator) -> Tensor:
    labels = torch.randint(CLASSES, shape, generator=generator)
    return labels.masked_fill(torch.rand(shape, generator=generator) < 0.3, IGNORE)


def _tokens(rows: int, g: torch.Generator) -> tuple[Tensor, ...]:
    return _normal(rows, 4, CLASSES, generator=g), _labels(rows, 4, generator=g)


def _hidden(rows: int, g: torch.Generator) -> tuple[Tensor, ...]:
    return _normal(rows, 4, 3, generator=g), _labels(rows, 4, generator=g)


def _rows(rows: int, g: torch.Generator) -> tuple[Tensor, ...]:
    return _normal(rows, CLASSES, generator=g), _labels(rows, generator=g)


def _soft(rows: int, g: torch.Generator) -> tuple[Tensor, ...]:
    return _normal(rows, CLASSES, generator=g), _normal(rows, CLASSES, generator=g).softmax(-1)


def _binary(rows: int, g: torch.Generator) -> tuple[Tensor, ...]:
    return _normal(rows, CLASSES, generator=g), torch.randint(2, (rows, CLASSES), generator=g)


def _numbers(rows: int, g: torch.Generator) -> tuple[Tensor, ...]:
    return _normal(rows, 2, generator=g), _normal(rows, 2, generator=g)


def _masked_numbers(rows: int, g: torch.Generator) -> tuple[Tensor, ...]:
    x, targets = _numbers(rows, g)
    mask = torch.rand(rows, 2, generator=g) < 0.6
    return x, targets.masked_fill(~mask, float("nan")), mask


def _teacher(rows: int, g: torch.Generator) -> tuple[Tensor, ...]:
    return _normal(rows, CLASSES, generator=g), _normal(rows, CLASSES, generator=g), _labels(rows, generator=g)


def _soft_teacher(rows: int, g: torch.Generator) -> tuple[Tensor, ...]:
    return _teacher(rows, g)[:2]


def _pairs(rows: int, g: torch.Generator) -> tuple[Tensor, ...]:
    return tuple(_normal(rows, generator=g) for _ in range(4))


def _with_mask(criterion: Callable[..., LossOutput]) -> Callable[..., LossOutput]:
    return lambda x, targets, mask: criterion(x, targets, mask=mask)


def _on_head(criterion: Callable[..., LossOutput], **options: Any) -> Callable[..., LossOutput]:
    return lambda hidden, labels: criterion(hidden, HEAD, labels, chunk_size=3, **options)


CASES = [
    Case("causal_lm", causal_lm, _tokens, ignores=True),
    Case("causal_lm_unshifted", partial(causal_lm, shift=False), _tokens, ignores=True),
    Case("causal_lm_all_terms", partial(causal_lm, label_smoothing=0.1, z_loss=0.3), _tokens, ignores=True),
    Case("masked_lm", masked_lm, _tokens, ignores=True),
    Case("causal_lm_head", _on_head(causal_lm_head), _hidden, ignores=True),
    Case("linear_cross_entropy", _on_head(linear_cross_entropy), _hidden, ignores=True),
    Case(
        "linear_cross_entropy_all_terms",
        _on_head(linear_cross_entropy, label_smoothing=0.1, z_loss=0.3),
        _hidden,
        ignores=True,
    ),
    Case("classification", classification, _rows, ignores=True),
    Case(
        "classification_all_terms",
        partial(classification, class_weight=CLASS_WEIGHT, label_smoothing=0.2),
        _rows,
        ignores=True,
    ),
    Case("soft_classification", partial(soft_classification, label_smoothing=0.1), _soft),
    Case("multi_label", partial(multi_label, positive_weight=CLASS_WEIGHT), _binary),
    Case("mean_squared_error", mean_squared_error, _numbers),
    Case("mean_squared_error_masked", _with_mask(mean_squared_error), _masked_numbers),
    Case("mean_absolute_error", mean_absolute_error, _numbers),
    Case("huber", partial(huber, delta=0.7), _numbers),
    Case("huber_masked", _with_mask(huber), _masked_numbers),
    Case("distillation", partial(distillation, temperature=3.0, alpha=0.4), _teacher, ignores=True),
    Case("distillation_soft", partial(distillation, alpha=1.0), _soft_teacher),
    Case("dpo", partial(dpo, beta=0.5, label_smoothing=0.1), _pairs),
]
IGNORING = [case for case in CASES if case.ignores]
# One graph per family is compiled.
COMPILED = [
    case
    for case in CASES
    if case.name
    in {
        "causal_lm_all_terms",
        "causal_lm_head",
        "classification_all_terms",
        "multi_label",
        "huber_masked",
        "distillation",
        "dpo",
    }
]


def _made(case: Case, rows: int, seed: int = 0) -> tuple[Tensor, ...]:
    return case.make(rows, torch.Generator().manual_seed(seed))


def _sum_and_grad(case: Case, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, LossOutput]:
    x = x.detach().requires_grad_()
    out = case.criterion(x, *rest)
    (grad,) = torch.autograd.grad(out.loss_sum, x)
    return out.loss_sum.detach(), grad, out


def _ids(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


@_ids(CASES)
def test_gradients_pass_finite_differences(case: Case) -> None:
    x, *rest = _made(case, 4)
    assert torch.autograd.gradcheck(lambda x: case.criterion(x, *rest).loss_sum, (x.requires_grad_(),))


@_ids(CASES)
def test_the_whole_is_the_sum_of_any_parts(case: Case) -> None:
    @settings(max_examples=10, deadline=None)
    @given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 2**31))
    def check(sizes: list[int], seed: int) -> None:
        arguments = _made(case, sum(sizes), seed)
        loss_sum, grad, whole = _sum_and_grad(case, *arguments)
        parts = [_sum_and_grad(case, *part) for part in zip(*(a.split(sizes) for a in arguments), strict=True)]
        torch.testing.assert_close(sum(part[0] for part in parts), loss_sum)
        torch.testing.assert_close(torch.cat([part[1] for part in parts]), grad)
        weight = torch.as_tensor(whole.weight, dtype=torch.float64)
        torch.testing.assert_close(sum(torch.as_tensor(p[2].weight, dtype=torch.float64) for p in parts), weight)
        merged = dict(parts[0][2].metrics)
        for part in parts[1:]:
            merged = merge_metrics(merged, dict(part[2].metrics))
        assert merged.keys() == whole.metrics.keys()
        for name, metric in whole.metrics.items():
            torch.testing.assert_close(merged[name].compute(), metric.compute(), equal_nan=True)

    check()


@_ids(IGNORING)
def test_ignored_labels_carry_no_weight(case: Case) -> None:
    x, *rest = _made(case, 6)
    loss_sum, grad, out = _sum_and_grad(case, x, *rest)
    ignored = rest[-1] == IGNORE
    if "causal_lm" in case.name and "unshifted" not in case.name:
        ignored = torch.cat([ignored[:, 1:], torch.ones_like(ignored[:, :1])], 1)
    changed = torch.where(ignored.unsqueeze(-1), 7.0, x)
    other_sum, _, other = _sum_and_grad(case, changed, *rest)
    assert ignored.any()
    assert not grad[ignored].any()
    torch.testing.assert_close(other_sum, loss_sum)
    assert torch.equal(torch.as_tensor(other.weight), torch.as_tensor(out.weight))


@_ids(IGNORING)
def test_all_labels_ignored_is_zero_and_not_nan(case: Case) -> None:
    x, *rest = _made(case, 3)
    rest[-1] = torch.full_like(rest[-1], IGNORE)
    loss_sum, grad, out = _sum_and_grad(case, x, *rest)
    assert loss_sum == 0
    assert out.weight == 0
    assert not grad.any()


@_ids(CASES)
def test_an_empty_batch_is_refused(case: Case) -> None:
    with pytest.raises(ValueError, match="holds nothing"):
        case.criterion(*(a[:0] for a in _made(case, 2)))


@_ids(CASES)
def test_missing_targets_are_refused(case: Case) -> None:
    x, *rest = _made(case, 2)
    with pytest.raises(TypeError, match="got NoneType, expected a"):
        case.criterion(x, None, *rest[1:])


@_ids(CASES)
def test_shapes_that_disagree_are_refused(case: Case) -> None:
    x, *rest = _made(case, 4)
    with pytest.raises(ValueError, match=r"shape \(3"):
        case.criterion(x, rest[0][:3], *rest[1:])


# The heads, whose weight has a dtype too, have their own test in test_language.py.
@_ids([case for case in CASES if case.make is not _hidden])
def test_narrow_dtypes_are_summed_in_float32(case: Case) -> None:
    arguments = [a.bfloat16() if a.is_floating_point() else a for a in _made(case, 4)]
    wide = [a.float() if a.is_floating_point() else a for a in arguments]
    loss_sum = case.criterion(*arguments).loss_sum
    assert loss_sum.dtype == torch.float32
    torch.testing.assert_close(loss_sum, case.criterion(*wide).loss_sum)


@_ids(COMPILED)
def test_compiles_with_its_gradient_in_one_graph(case: Case) -> None:
    def run(x: Tensor, *rest: Tensor) -> tuple[Any, ...]:
        out = case.criterion(x, *rest)
        (grad,) = torch.autograd.grad(out.loss_sum, x)
        return out.loss_sum.detach(), grad, torch.as_tensor(out.weight)

    x, *rest = _made(case, 4)
    x.requires_grad_()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        found = torch.compile(run, fullgraph=True, backend="aot_eager")(x, *rest)
    for one, other in zip(found, run(x, *rest), strict=True):
        torch.testing.assert_close(one, other)
