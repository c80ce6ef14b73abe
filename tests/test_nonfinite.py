"""Steps whose loss or parameters are not finite: taken back, or an end of the run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.tiny import assert_close, assert_equal, batch_of, make_module, make_state, make_step, torch_step
from trainkit import (
    LossOutput,
    TrainState,
    init_ema,
    init_state,
    make_train_step,
    raise_nonfinite,
    run,
    skip_nonfinite,
    tree,
    with_ema,
)
from trainkit.metrics import Latest, Mean
from trainkit.optim import sgd
from trainkit.state import host_step
from trainkit.transforms import NonfiniteError
from trainkit.types import Batch


@settings(max_examples=10, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=6))
def test_a_run_with_bad_batches_is_the_torch_run_without_them(bad: list[bool]) -> None:
    module = make_module()
    step, state = skip_nonfinite(make_step(module)), make_state(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05)
    losses, total = [], None
    for i, is_bad in enumerate(bad):
        state, metrics = step(state, batch_of(i, is_bad))
        total = metrics if total is None else {k: total[k].merge(m) for k, m in metrics.items()}
        if not is_bad:
            losses.append(torch_step(module, optimizer, batch_of(i)))
    assert total is not None
    assert_close(state.params, module)
    torch.testing.assert_close(state.buffers["1.running_var"], module[1].running_var)
    assert int(state.step) == host_step(state) == len(bad)
    assert float(total["skipped_steps"].compute()) == pytest.approx(bad.count(True) / len(bad))
    if losses:
        torch.testing.assert_close(total["loss"].compute(), torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)
        assert bool(torch.isfinite(total["ppl"].compute()))


@pytest.mark.parametrize("donated", [False, True])
def test_a_bad_step_changes_nothing_but_the_step(donated: bool) -> None:
    module = make_module()
    step = skip_nonfinite(with_ema(make_step(module), 0.9))
    state, _ = step(init_ema(make_state(module)), batch_of(0))
    before = tree.clone(state)
    with tree.donate(state) if donated else tree.keep():
        after, metrics = step(state, batch_of(1, bad=True))
    for field in ("params", "buffers", "opt_state", "extra", "key"):
        assert_equal(getattr(after, field), getattr(before, field))
    assert int(after.step) == 2
    assert (float(metrics["loss"].weight), float(metrics["loss"].total)) == (0.0, 0.0)
    # What does not add up is reported as it is.
    assert float(metrics["learning_rate"].compute()) == pytest.approx(0.05)
    if not donated:
        assert_equal(state, before)


def test_a_loss_alone_that_is_not_finite_is_enough() -> None:
    module = nn.Linear(2, 1, bias=False)
    tx = sgd(0.1)
    loss = lambda params, buffers, x: LossOutput((params["weight"] * 0).sum() + x.sum(), len(x))  # noqa: E731
    state = init_state(module, tx)
    after, metrics = skip_nonfinite(make_train_step(loss, tx))(state, torch.full((2, 2), math.inf))
    assert float(metrics["skipped_steps"].compute()) == 1.0
    assert_equal(after.opt_state, state.opt_state)


def test_the_first_bad_step_raises_with_the_state_before_it() -> None:
    module = make_module()
    step, state = raise_nonfinite(make_step(module)), make_state(module)
    records = list(run(step, state, [batch_of(0), batch_of(1)]))
    state, before = records[-1].state, tree.clone(records[-1].state)
    with (
        tree.donate(state),
        pytest.raises(NonfiniteError, match=r"step 3: loss is nan; .* in the error's .state") as caught,
    ):
        step(state, batch_of(2, bad=True))
    assert caught.value.state is state
    assert_equal(state, before)
    assert isinstance(caught.value, FloatingPointError)
    again, _ = step(caught.value.state, batch_of(2))
    assert int(again.step) == 3


def test_a_parameter_that_is_not_finite_is_named() -> None:
    module = nn.Linear(2, 1)
    tx = sgd(1.0)
    loss = lambda params, buffers, x: LossOutput(torch.sqrt(params["bias"] * 0).sum(), len(x))  # noqa: E731
    step = raise_nonfinite(make_train_step(loss, tx, unused="zero"))
    with pytest.raises(NonfiniteError, match="step 1: parameter 'bias' holds 1 NaN and 0 infinite numbers of 1"):
        step(init_state(module, tx), torch.ones(2, 2))


def test_a_step_taken_back_inside_raises_too_and_can_go_on() -> None:
    module = make_module()
    step = raise_nonfinite(skip_nonfinite(make_step(module)))
    state = make_state(module)
    with pytest.raises(NonfiniteError, match="step 1: not finite, and taken back") as caught:
        step(state, batch_of(0, bad=True))
    assert_equal(caught.value.state.params, state.params)
    after, _ = step(caught.value.state, batch_of(1))
    assert int(after.step) == 2


def test_a_mean_is_the_only_kind_of_loss_that_is_looked_at() -> None:
    """A metric that is called loss and is no mean (a latest value) is not mistaken for the step's loss."""

    def step(state: TrainState, batch: Batch) -> Any:
        one = torch.ones(())
        return state, {"loss": Mean(one, one), "other/loss": Latest(torch.tensor(math.nan))}

    _, metrics = skip_nonfinite(step)(make_state(make_module()), None)
    assert float(metrics["skipped_steps"].compute()) == 0.0
    assert isinstance(metrics["other/loss"], Latest)
