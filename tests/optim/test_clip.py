"""Clipping against torch.nn.utils and the formulas of the papers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor, nn

from trainkit import tree
from trainkit.optim.clip import adaptive_clip, clip_by_global_norm, clip_by_unit_norm, clip_by_value, unit_norms
from trainkit.optim.transform import Transform

shapes = st.lists(st.lists(st.integers(1, 9), max_size=4).map(tuple), min_size=1, max_size=6)


def random_tree(shapes: list[tuple[int, ...]], seed: int, dtype: torch.dtype = torch.float32) -> TensorDict:
    generator = torch.Generator().manual_seed(seed)
    return tree.frozen({str(i): torch.randn(s, generator=generator).to(dtype) for i, s in enumerate(shapes)})


def as_parameters(grads: TensorDict) -> list[nn.Parameter]:
    """Parameters of torch that have copies of these gradients."""
    parameters = []
    for g in grads.values():
        parameters.append(nn.Parameter(torch.zeros_like(g)))
        parameters[-1].grad = g.clone()
    return parameters


def updates_of(tx: Transform, grads: TensorDict, params: TensorDict | None = None) -> TensorDict:
    params = grads if params is None else params
    return tx.update(grads, tx.init(params), params)[0]


@given(
    shapes,
    st.integers(0, 99),
    st.sampled_from([1e-3, 0.5, 2.0, 1e3, math.inf]),
    st.sampled_from(["float32", "float64"]),
)
def test_global_norm_equals_clip_grad_norm_to_the_bit(
    shapes: list[tuple[int, ...]], seed: int, max_norm: float, dtype: str
) -> None:
    grads = random_tree(shapes, seed, getattr(torch, dtype))
    theirs = as_parameters(grads)
    norm = nn.utils.clip_grad_norm_(theirs, max_norm)
    tx = clip_by_global_norm(max_norm)
    updates, state = tx.update(grads, tx.init(grads), grads)
    assert torch.equal(tree.global_norm(grads.values()), norm)
    assert torch.equal(state["report"]["grad_norm"], norm.float())
    for ours, parameter in zip(updates.values(), theirs, strict=True):
        assert torch.equal(ours, parameter.grad)


@given(shapes, st.integers(0, 99), st.floats(0.998, 1.002))
def test_global_norm_near_the_limit_equals_clip_grad_norm_to_the_bit(
    shapes: list[tuple[int, ...]], seed: int, distance: float
) -> None:
    grads = random_tree(shapes, seed, torch.float32)
    max_norm = max(1e-6, distance * float(tree.global_norm(grads.values())))
    theirs = as_parameters(grads)
    nn.utils.clip_grad_norm_(theirs, max_norm)
    for ours, parameter in zip(updates_of(clip_by_global_norm(max_norm), grads).values(), theirs, strict=True):
        assert torch.equal(ours, parameter.grad)


@given(shapes, st.integers(0, 99))
def test_the_norm_of_half_precision_is_taken_in_float32(shapes: list[tuple[int, ...]], seed: int) -> None:
    grads = random_tree(shapes, seed, torch.bfloat16)
    exact = torch.cat([g.double().flatten() for g in grads.values()]).norm()
    norm = tree.global_norm(grads.values())
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm.double(), exact, rtol=1e-6, atol=0)
    assert all(u.dtype == torch.bfloat16 for u in updates_of(clip_by_global_norm(0.1), grads).values())


def test_the_norm_of_mixed_dtypes_is_that_of_all_numbers() -> None:
    mixed = [torch.tensor([1.0, 2.0], dtype=d) for d in (torch.float64, torch.float32, torch.bfloat16, torch.float64)]
    assert float(tree.global_norm(mixed)) == pytest.approx(math.sqrt(4 * 5.0), rel=1e-7)


def test_the_norm_of_nothing_is_zero() -> None:
    assert float(tree.global_norm([])) == 0.0


def test_an_infinite_max_norm_only_measures() -> None:
    grads = random_tree([(3, 4), (5,)], 0)
    updates = updates_of(clip_by_global_norm(math.inf), grads)
    assert all(torch.equal(u, g) for u, g in zip(updates.values(), grads.values(), strict=True))


def test_a_gradient_of_zero_stays_zero() -> None:
    zero = tree.frozen({"w": torch.zeros(3, 2)})
    for tx in (clip_by_global_norm(1.0), clip_by_value(1.0), clip_by_unit_norm(1.0), adaptive_clip()):
        assert torch.equal(updates_of(tx, zero)["w"], zero["w"])


@given(shapes, st.integers(0, 99), st.floats(1e-3, 3.0))
def test_by_value_equals_clip_grad_value_to_the_bit(shapes: list[tuple[int, ...]], seed: int, limit: float) -> None:
    grads = random_tree(shapes, seed)
    theirs = as_parameters(grads)
    nn.utils.clip_grad_value_(theirs, limit)
    for ours, parameter in zip(updates_of(clip_by_value(limit), grads).values(), theirs, strict=True):
        assert torch.equal(ours, parameter.grad)


def test_by_value_keeps_nan() -> None:
    grads = tree.frozen({"w": torch.tensor([math.nan, math.inf, -math.inf])})
    assert torch.equal(updates_of(clip_by_value(2.0), grads)["w"][1:], torch.tensor([2.0, -2.0]))
    assert bool(torch.isnan(updates_of(clip_by_value(2.0), grads)["w"][0]))


@settings(max_examples=30)
@given(shapes, st.integers(0, 99), st.floats(1e-2, 3.0))
def test_by_unit_norm_equals_clip_grad_norm_on_each_unit_alone(
    shapes: list[tuple[int, ...]], seed: int, max_norm: float
) -> None:
    grads = random_tree(shapes, seed)
    updates = updates_of(clip_by_unit_norm(max_norm), grads)
    for name, grad in grads.items():
        units = grad.unbind(0) if grad.dim() > 1 else [grad]
        theirs = as_parameters(tree.frozen({str(i): unit for i, unit in enumerate(units)}))
        for parameter in theirs:
            nn.utils.clip_grad_norm_([parameter], max_norm)
        expected = torch.stack([p.grad for p in theirs]).reshape(grad.shape)
        torch.testing.assert_close(updates[name], expected, rtol=1e-6, atol=1e-7)


@settings(max_examples=30)
@given(shapes, st.integers(0, 99), st.floats(1e-2, 3.0))
def test_adaptive_clip_bounds_each_units_ratio_as_in_the_paper(
    shapes: list[tuple[int, ...]], seed: int, max_ratio: float
) -> None:
    grads, params = random_tree(shapes, seed, torch.float64), random_tree(shapes, seed + 1, torch.float64)
    updates = updates_of(adaptive_clip(max_ratio, eps=0.5), grads, params)
    for name, grad in grads.items():
        rows = [(grad, params[name], updates[name])]
        if grad.dim() > 1:
            rows = list(zip(grad, params[name], updates[name], strict=True))
        for g, w, u in rows:
            # Brock et al. 2021, eq. 3, written out.
            norm, bound = float(g.norm()), max(float(w.norm()), 0.5)
            expected = max_ratio * bound / norm * g if norm / bound > max_ratio else g
            torch.testing.assert_close(u, expected, rtol=1e-12, atol=1e-14)


def test_units_are_what_one_output_reads() -> None:
    weight = torch.arange(24.0).reshape(2, 3, 4)
    assert unit_norms(weight).shape == (2, 1, 1)
    torch.testing.assert_close(unit_norms(weight).flatten(), weight.flatten(1).norm(dim=1))
    assert unit_norms(torch.tensor([3.0, 4.0])).tolist() == [5.0]
    assert float(unit_norms(torch.tensor(-2.0))) == 2.0


@pytest.mark.parametrize(
    "tx", [clip_by_global_norm(0.1), clip_by_value(0.1), clip_by_unit_norm(0.1), adaptive_clip(0.1)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_kept(tx: Transform, dtype: torch.dtype) -> None:
    assert updates_of(tx, random_tree([(3, 4)], 0, dtype))["0"].dtype == dtype


@pytest.mark.parametrize("tx", [clip_by_global_norm(0.1), clip_by_value(0.1)])
def test_donated_gradients_are_clipped_in_their_own_memory(tx: Transform) -> None:
    grads = random_tree([(3, 4), (5,)], 0)
    state = tx.init(grads)
    with tree.donate(grads):
        updates, _ = tx.update(grads, state, grads)
    assert updates is grads


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: clip_by_global_norm(0.0), "max_norm: got 0.0, expected a positive number"),
        (lambda: clip_by_global_norm(math.nan), "max_norm: got nan"),
        (lambda: clip_by_value(-1.0), "max_value: got -1.0"),
        (lambda: clip_by_unit_norm(0.0), "max_norm: got 0.0"),
        (lambda: adaptive_clip(0.0), "max_ratio: got 0.0"),
        (lambda: adaptive_clip(eps=0.0), "eps: got 0.0"),
    ],
)
def test_limits_that_are_not_positive_are_refused(make: Callable[[], Transform], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_gradients_that_are_not_finite_are_not_hidden() -> None:
    grads = tree.frozen({"w": torch.tensor([1.0, math.inf])})
    tx = clip_by_global_norm(1.0)
    updates, state = tx.update(grads, tx.init(grads), grads)
    assert math.isinf(float(state["report"]["grad_norm"]))
    assert not bool(tree.all_finite(updates.values()))


def test_no_vector_norm_in_half_precision_overflows() -> None:
    large = torch.full((4,), 60000.0, dtype=torch.float16)
    assert float(tree.global_norm([large])) == pytest.approx(120000.0)


def norm_of(*tensors: Tensor) -> Tensor:
    return tree.global_norm(tensors)


def test_the_norm_under_vmap_is_each_members() -> None:
    a, b = torch.randn(3, 4, 2), torch.randn(3, 5)
    expected = torch.stack([norm_of(a[i], b[i]) for i in range(3)])
    torch.testing.assert_close(torch.vmap(norm_of)(a, b), expected)
