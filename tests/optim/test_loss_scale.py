"""The loss scale against torch.amp.GradScaler and its kernel."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor, nn

from trainkit import tree
from trainkit.gradients import value_and_grad
from trainkit.optim.adamw import adamw
from trainkit.optim.clip import clip_by_global_norm
from trainkit.optim.groups import by_rank, partition
from trainkit.optim.loss_scale import current_loss_scale, dynamic_loss_scale, next_scale
from trainkit.optim.sgd import sgd
from trainkit.optim.transform import chain
from trainkit.state import init_state
from trainkit.step import apply_updates
from trainkit.types import Batch, Buffers, LossOutput, Params

factors = st.tuples(st.floats(1.01, 4.0), st.floats(0.1, 0.99), st.integers(1, 4))


@given(st.floats(1e-3, 1e38), st.lists(st.booleans(), min_size=1, max_size=20), factors)
def test_the_scale_equals_the_kernel_of_grad_scaler_to_the_bit(
    initial: float, finite: list[bool], factors: tuple[float, float, int]
) -> None:
    scale, tracker = torch.tensor(initial, dtype=torch.float32), torch.tensor(0)
    theirs, their_tracker = scale.clone().reshape(1), torch.zeros(1, dtype=torch.int32)
    for is_finite in finite:
        scale, tracker = next_scale(scale, tracker, torch.tensor(is_finite), *factors)
        torch._amp_update_scale_(theirs, their_tracker, torch.tensor([float(not is_finite)]), *factors)
        assert torch.equal(scale, theirs[0])
        assert int(tracker) == int(their_tracker)


def test_a_scale_never_grows_to_infinity() -> None:
    largest = torch.tensor(3e38)
    assert torch.equal(next_scale(largest, torch.tensor(0), torch.tensor(True), 2.0, 0.5, 1)[0], largest)


def overflowing(i: int) -> bool:
    return i in (2, 3, 9)


def linear_loss(params: Params, buffers: Buffers, batch: Batch) -> LossOutput:
    return LossOutput((params["weight"] * batch).sum(), batch.shape[0])


def batch_of(i: int) -> Tensor:
    rows = torch.randn(4, 2, generator=torch.Generator().manual_seed(i))
    return torch.full_like(rows, math.inf) if overflowing(i) else rows


@pytest.mark.parametrize("donated", [False, True])
def test_a_run_equals_a_loop_with_grad_scaler(donated: bool) -> None:
    module = nn.Linear(2, 1, bias=False)
    tx = dynamic_loss_scale(adamw(0.125), initial=256.0, growth_interval=3)
    state = init_state(module, tx)
    step = apply_updates(value_and_grad(linear_loss, scale=current_loss_scale), tx)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.125)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)
    for i in range(12):
        batch = batch_of(i)
        with tree.donate(state) if donated else tree.keep():
            state, metrics = step(state, batch)
        optimizer.zero_grad()
        scaler.scale((module.weight * batch).sum() / 4).backward()
        scaler.step(optimizer)
        scaler.update()
        assert float(current_loss_scale(state)) == scaler.get_scale()
        assert float(metrics["loss_scale"].compute()) == scaler.get_scale()
        assert float(metrics["skipped"].compute()) == overflowing(i)
        torch.testing.assert_close(state.params["weight"], module.weight.data, rtol=1e-5, atol=1e-6)


def test_gradients_reach_the_optimizer_without_the_scale() -> None:
    module = nn.Linear(2, 1, bias=False)
    for initial in (1.0, 2.0**14):
        tx = dynamic_loss_scale(sgd(0.5), initial=initial)
        state = init_state(module, tx)
        after, _ = apply_updates(value_and_grad(linear_loss, scale=current_loss_scale), tx)(state, torch.ones(4, 2))
        torch.testing.assert_close(after.params["weight"], module.weight.data - 0.5)


def test_clipping_inside_sees_the_true_norm() -> None:
    tx = dynamic_loss_scale(chain(clip_by_global_norm(1.0), sgd(1.0)), initial=1024.0)
    state = init_state(nn.Linear(2, 1, bias=False), tx)
    _, metrics = apply_updates(value_and_grad(linear_loss, scale=current_loss_scale), tx)(state, torch.ones(4, 2))
    assert float(metrics["grad_norm"].compute()) == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: tx,
        lambda tx: chain(clip_by_global_norm(1.0), tx),
        lambda tx: partition({"a": tx, "b": sgd(0.1)}, by_rank({2: "a"}, default="b")),
    ],
)
def test_the_scale_is_found_wherever_it_stands(wrap: object) -> None:
    state = init_state(nn.Linear(2, 1), wrap(dynamic_loss_scale(adamw(0.1), initial=32.0)))  # type: ignore[operator]
    assert float(current_loss_scale(state)) == 32.0


def test_a_state_without_scale_says_what_to_do() -> None:
    with pytest.raises(KeyError, match=r"no loss scale among its reports .*wrap the optimizer in dynamic_loss_scale"):
        current_loss_scale(init_state(nn.Linear(2, 1), sgd(0.1)))


def test_half_precision_gradients_that_would_vanish_survive() -> None:
    """A gradient of 2^-26 is zero in float16, and is there with a scale of 2^10."""

    def loss(params: TensorDict, buffers: Buffers, batch: Batch) -> LossOutput:
        return LossOutput(((params["weight"].half() * 2.0**-13).float() * 2.0**-13 * batch).sum(), batch.shape[0])

    module = nn.Linear(1, 1, bias=False)

    def grad(initial: float) -> float:
        state = init_state(module, dynamic_loss_scale(sgd(0.1), initial=initial))
        return float(value_and_grad(loss, scale=current_loss_scale)(state, torch.ones(1, 1)).grads["weight"])

    assert grad(1.0) == 0.0
    assert grad(2.0**10) == 2.0**-26


@pytest.mark.parametrize(
    "wrong", [{"initial": 0.0}, {"growth_factor": 1.0}, {"backoff_factor": 1.0}, {"growth_interval": 0}]
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="initial, growth_factor, backoff_factor, growth_interval: got"):
        dynamic_loss_scale(sgd(0.1), **wrong)  # type: ignore[arg-type]
