"""Evaluation: exact over batches of any sizes, and without an effect."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from trainkit import evaluate, functional, init_state, make_eval_step, make_predict_step
from trainkit.losses import classification, module_loss
from trainkit.metrics import accuracy
from trainkit.optim import sgd

MODULE = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))


def criterion(logits: Tensor, labels: Tensor) -> Any:
    return classification(logits, labels, metrics={"accuracy": accuracy})


LOSS = module_loss(MODULE, criterion, training=False)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_any_batches_give_the_mean_over_all_rows(sizes: list[int]) -> None:
    x, y = torch.randn(sum(sizes), 3), torch.randint(0, 2, (sum(sizes),))
    state = init_state(MODULE, sgd(0.1))
    batches = zip(x.split(sizes), y.split(sizes), strict=True)
    found = evaluate(make_eval_step(LOSS), state, batches)
    with torch.no_grad():
        logits = MODULE.eval()(x)
    MODULE.train()
    torch.testing.assert_close(found["loss"].compute(), F.cross_entropy(logits, y))
    assert float(found["accuracy"].compute()) == pytest.approx(float((logits.argmax(-1) == y).float().mean()))


def test_rows_that_count_for_nothing_count_for_nothing() -> None:
    state = init_state(MODULE, sgd(0.1))
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    step = make_eval_step(LOSS)
    ignored = (torch.randn(3, 3), torch.full((3,), -100))
    expected, found = evaluate(step, state, [(x, y)]), evaluate(step, state, [ignored, (x, y), ignored])
    torch.testing.assert_close(found["loss"].compute(), expected["loss"].compute())
    torch.testing.assert_close(found["accuracy"].compute(), expected["accuracy"].compute())


def test_neither_state_nor_module_nor_graph_is_touched() -> None:
    state = init_state(MODULE, sgd(0.1))
    before = {name: t.clone() for name, t in (*state.params.items(), *state.buffers.items())}
    metrics = make_eval_step(LOSS)(state, (torch.randn(4, 3), torch.zeros(4, dtype=torch.int64)))
    assert not metrics["loss"].total.requires_grad
    assert all(torch.equal(before[name], t) for name, t in (*state.params.items(), *state.buffers.items()))
    assert MODULE.training


def test_predictions_are_those_of_the_state() -> None:
    state, other = init_state(MODULE, sgd(0.1)), nn.Sequential(*[type(m)(*a) for m, a in _LAYERS])
    other.load_state_dict({**state.params, **state.buffers})
    model = functional(MODULE, training=False)
    x = torch.randn(4, 3)
    found = make_predict_step(lambda params, buffers, x: model(params, buffers, x)[0])(state, x)
    assert torch.equal(found, other.eval()(x))
    assert not found.requires_grad


_LAYERS = [(nn.Linear(3, 4), (3, 4)), (nn.BatchNorm1d(4), (4,)), (nn.Dropout(), (0.5,)), (nn.Linear(4, 2), (4, 2))]


def test_no_batches_are_an_error() -> None:
    with pytest.raises(ValueError, match="batches: none came; evaluation needs at least one"):
        evaluate(make_eval_step(LOSS), init_state(MODULE, sgd(0.1)), [])
