"""Reductions on a plateau against torch.optim.lr_scheduler.ReduceLROnPlateau."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from trainkit import tree
from trainkit.optim.adamw import adamw
from trainkit.optim.plateau import init_plateau, plateau, reduce_on_plateau
from trainkit.optim.sgd import sgd
from trainkit.optim.transform import chain
from trainkit.schedules import linear

options = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(["min", "max"]),
        "factor": st.sampled_from([0.1, 0.5, 0.9]),
        "patience": st.integers(0, 3),
        "threshold": st.sampled_from([0.0, 1e-4, 0.1]),
        "threshold_mode": st.sampled_from(["rel", "abs"]),
        "cooldown": st.integers(0, 3),
    }
)
# Few different values, so that ties and plateaus are common.
values = st.lists(st.sampled_from([0.5, 0.9, 1.0, 1.05, 2.0, math.nan]), min_size=1, max_size=30)


@given(options, values, st.sampled_from([0.0, 0.2]))
def test_the_scale_equals_torchs_learning_rate_after_every_look(
    options: dict[str, Any], values: list[float], least: float
) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = ReduceLROnPlateau(optimizer, min_lr=least, eps=0.0, **options)
    observe, state = plateau(min_scale=least, **options), init_plateau(torch.device("cpu"), mode=options["mode"])
    for value in values:
        scheduler.step(value)
        state = observe(state, torch.tensor(value, dtype=torch.float64))
        assert float(state["report"]["plateau_scale"]) == optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("face", ["apply", "update", "donated"])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_run_equals_a_loop_that_calls_the_scheduler_after_the_optimizer(face: str, kind: str) -> None:
    ours = {"adamw": adamw(0.25), "sgd": sgd(0.25, momentum=0.9)}[kind]
    tx = chain(ours, reduce_on_plateau(factor=0.5, patience=1, cooldown=1))
    parameter = nn.Parameter(torch.ones(3, dtype=torch.float64))
    make = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.25),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.25, momentum=0.9),
    }[kind]
    optimizer = make([parameter])
    scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=1, cooldown=1, eps=0.0)
    params = tree.frozen({"w": parameter.data.clone()})
    state = tx.init(params)
    for i in range(20):
        loss = torch.tensor(1 / (1 + min(i, 5)), dtype=torch.float64)
        grads = tree.frozen({"w": torch.randn(3, generator=torch.Generator().manual_seed(i), dtype=torch.float64)})
        parameter.grad = grads["w"].clone()
        optimizer.step()
        scheduler.step(loss)
        if face == "update":
            updates, state = tx.update(grads, state, params, loss=loss)
            params = tree.map_tensors(torch.add, params, updates)
        else:
            with tree.donate(grads, params, state) if face == "donated" else tree.keep():
                params, state = tx.apply(grads, state, params, loss=loss)
        torch.testing.assert_close(params["w"], parameter.data, rtol=1e-10, atol=1e-12)
    assert float(state["1"]["report"]["plateau_scale"]) == optimizer.param_groups[0]["lr"] / 0.25 < 0.2


def test_the_mean_of_several_losses_is_one_look() -> None:
    every, alone = plateau(patience=1, every=4), plateau(patience=1)
    state, expected = init_plateau(torch.device("cpu")), init_plateau(torch.device("cpu"))
    losses = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64).abs() + 1
    for i, loss in enumerate(losses):
        state = every(state, loss)
        if i % 4 == 3:
            expected = alone(expected, losses[i - 3 : i + 1].mean())
        assert float(state["report"]["plateau_scale"]) == float(expected["report"]["plateau_scale"])
    assert float(state["report"]["plateau_scale"]) < 1.0


def test_it_multiplies_a_schedule() -> None:
    tx = chain(sgd(linear(1.0, 0.0, 4)), reduce_on_plateau(factor=0.5, patience=0))
    w = tree.frozen({"w": torch.ones(1)})
    state, found = tx.init(w), []
    for _ in range(4):
        updates, state = tx.update(w, state, w, loss=torch.tensor(1.0))
        found.append(-float(updates["w"]))
    assert found == [1.0, 0.75, 0.25, 0.0625]


def test_without_a_loss_it_says_what_is_missing() -> None:
    tx = reduce_on_plateau()
    w = tree.frozen({"w": torch.ones(1)})
    with pytest.raises(TypeError, match="loss: got NoneType, expected a 0-d tensor; pass loss="):
        tx.update(w, tx.init(w), w)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"factor": 1.0}, r"factor: got 1.0, expected a number in \(0, 1\)"),
        ({"patience": -1}, "patience: got -1, expected at least 0"),
        ({"threshold": -0.1}, "threshold: got -0.1"),
        ({"threshold_mode": "relative"}, "threshold_mode: got 'relative', expected 'rel' or 'abs'"),
        ({"mode": "lower"}, "mode: got 'lower', expected 'min' or 'max'"),
        ({"cooldown": -1}, "cooldown: got -1"),
        ({"min_scale": -1.0}, "min_scale: got -1.0"),
        ({"every": 0}, "every: got 0, expected at least 1"),
    ],
)
def test_options_out_of_range_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reduce_on_plateau(**wrong)
