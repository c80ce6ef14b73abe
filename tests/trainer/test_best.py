"""The best metric and the best checkpoint, beside a plain search and transformers 4.57."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from trainkit.trainer.best import (
    best_saved,
    best_update,
    evaluations_of,
    is_better,
    metric_key,
    plateau_metric,
)

VALUES = st.one_of(st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1.0, 2.0]), st.floats(-3, 3, width=16))


def reference(values: list[float], name: str, greater: bool) -> tuple[list[bool], Any]:
    """What transformers' own method says of evaluations that come one after the other."""
    trainer = SimpleNamespace(
        args=SimpleNamespace(metric_for_best_model=name, greater_is_better=greater, save_strategy="steps"),
        state=SimpleNamespace(best_metric=None, best_global_step=None, global_step=0),
    )
    determine = transformers.Trainer._determine_best_metric
    return [determine(trainer, {"eval_f1": value}, None) for value in values], trainer.state.best_metric


@given(st.lists(VALUES, max_size=8), st.booleans(), st.sampled_from(["f1", "eval_f1"]))
def test_the_best_metric_is_that_of_transformers(values: list[float], greater: bool, name: str) -> None:
    best, flags = None, []
    for value in values:
        update = best_update(
            {"eval_f1": value}, metric_for_best_model=name, greater_is_better=greater, best_metric=best
        )
        assert update.key == "eval_f1"
        flags.append(update.is_better)
        best = update.value if update.is_better else best
    expected_flags, expected = reference(values, name, greater)
    assert flags == expected_flags
    # Where nothing was better, 4.57 holds the infinity that it starts from.
    assert best == (None if expected is None or not any(flags) else expected)


def test_nan_and_ties_do_not_win() -> None:
    assert not is_better(math.nan, None, greater_is_better=True)
    assert not is_better(math.nan, 1.0, greater_is_better=False)
    assert not is_better(1.0, 1.0, greater_is_better=False)
    assert is_better(0.5, 1.0, greater_is_better=None)


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), torch.tensor(0.5), np.array([0.5]).mean()])
def test_values_of_any_kind_become_numbers(value: Any) -> None:
    assert plateau_metric({"eval_loss": value}, "loss") == 0.5
    assert type(plateau_metric({"eval_loss": value}, "loss")) is float


def test_what_is_missing_is_named() -> None:
    with pytest.raises(KeyError, match="'f1' means 'eval_f1', but the evaluation gave eval_loss, epoch"):
        best_update(
            {"eval_loss": 1.0, "epoch": 1}, metric_for_best_model="f1", greater_is_better=True, best_metric=None
        )
    with pytest.raises(KeyError, match="gave nothing"):
        plateau_metric({}, "loss")
    with pytest.raises(ValueError, match="metric_for_best_model: got None"):
        plateau_metric({"eval_loss": 1.0}, None)
    for value in ([1.0, 2.0], "high", torch.ones(2)):
        with pytest.raises(TypeError, match=r"'eval_f1' is .*; expected one number"):
            plateau_metric({"eval_f1": value}, "f1")


def test_keys_have_the_prefix_once() -> None:
    assert [metric_key(name) for name in ("loss", "eval_loss", "a_eval_loss")] == [
        "eval_loss",
        "eval_loss",
        "eval_a_eval_loss",
    ]


@given(st.dictionaries(st.integers(1, 9), VALUES), st.sets(st.integers(1, 9)), st.booleans())
def test_the_best_checkpoint_is_the_best_that_exists(
    evaluations: dict[int, float], saves: set[int], greater: bool
) -> None:
    sign, worst = (-1, -math.inf) if greater else (1, math.inf)
    candidates = [s for s in saves if s in evaluations and not math.isnan(evaluations[s]) and evaluations[s] != worst]
    expected = min(candidates, key=lambda s: (sign * evaluations[s], s), default=None)
    assert best_saved(evaluations, saves, greater_is_better=greater) == expected


def test_a_best_value_between_saves_does_not_hide_the_best_checkpoint() -> None:
    # In 4.57 the value at step 6 becomes the best, and nothing is ever loaded: step 6 was not saved, and 8 is worse.
    evaluations = {2: 0.9, 4: 0.5, 6: 0.1, 8: 0.4, 10: 0.45}
    assert best_saved(evaluations, [4, 8], greater_is_better=False) == 8
    assert best_saved(evaluations, [4, 8, 10], greater_is_better=True) == 4


def test_saves_at_each_new_best_have_a_best() -> None:
    saves, best = [], None
    evaluations = {1: 0.5, 2: 0.7, 3: 0.6, 4: 0.8}
    for step, value in evaluations.items():
        update = best_update({"eval_f1": value}, metric_for_best_model="f1", greater_is_better=True, best_metric=best)
        if update.is_better:
            best = update.value
            saves.append(step)
    assert saves == [1, 2, 4]
    assert best_saved(evaluations, saves, greater_is_better=True) == 4


def test_evaluations_are_read_from_a_log() -> None:
    log = [
        {"loss": 1.0, "step": 2},
        {"eval_f1": 0.1, "eval_loss": 2.0, "step": 2},
        {"eval_f1": 0.2, "step": 2},
        {"eval_loss": 1.0, "step": 4},
        {"train_runtime": 1.0},
    ]
    assert evaluations_of(log, "f1") == {2: 0.2}
    assert evaluations_of(log, "eval_loss") == {2: 2.0, 4: 1.0}
