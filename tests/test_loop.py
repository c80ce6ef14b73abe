"""run and evaluate: nothing hidden in the loop, evaluation exact for any batches."""

import pytest
import torch
from torch import nn

from trainkit import evaluate, functional, init_state, make_eval_step, make_predict_step, make_train_step, run
from trainkit.losses import mean_squared_error, module_loss
from trainkit.optim import adamw


def make_parts():
    torch.manual_seed(0)
    net = nn.Linear(3, 1)
    loss = module_loss(net, mean_squared_error)
    return net, loss, make_train_step(loss, adamw(0.1)), init_state(net, adamw(0.1))


def batches(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(4, 3, generator=g), torch.randn(4, 1, generator=g)) for _ in range(n)]


def test_is_the_loop_that_it_says_it_is():
    _, _, step, state = make_parts()
    by_hand = state
    for record, batch in zip(run(step, state, batches(4)), batches(4), strict=True):
        by_hand, metrics = step(by_hand, batch)
        assert record.step == int(by_hand.step)
        assert torch.equal(record.state.params["weight"], by_hand.params["weight"])
        assert torch.equal(record.metrics["loss"].total, metrics["loss"].total)
        assert torch.equal(record.batch[0], batch[0])


def test_stops_where_the_body_stops_and_goes_on_from_there():
    _, _, step, state = make_parts()
    data = iter(batches(6))
    for record in run(step, state, data):
        if record.step == 2:
            break
    assert len(list(data)) == 4
    (*_, resumed) = run(step, record.state, batches(6)[2:])
    (*_, whole) = run(step, state, batches(6))
    assert resumed.step == whole.step == 6
    assert torch.equal(resumed.state.params["weight"], whole.state.params["weight"])


def test_a_step_that_stands_still_is_refused():
    _, _, _, state = make_parts()
    with pytest.raises(ValueError, match=r"a StepFn must advance state\.step"):
        list(run(lambda state, batch: (state, {}), state, batches(1)))


def test_evaluation_does_not_depend_on_the_batches():
    net, loss, _, state = make_parts()
    x, y = torch.randn(13, 3), torch.randn(13, 1)
    parts = list(zip(x.split([1, 7, 5]), y.split([1, 7, 5]), strict=True))
    found = evaluate(make_eval_step(loss), state, parts)
    torch.testing.assert_close(found["loss"].compute(), nn.functional.mse_loss(net(x), y).detach())
    assert not found["loss"].total.requires_grad
    with pytest.raises(ValueError, match="batches: none came"):
        evaluate(make_eval_step(loss), state, [])


def test_prediction():
    net, _, _, state = make_parts()
    x = torch.randn(5, 3)
    predicted = make_predict_step(lambda params, buffers, x: functional(net)(params, buffers, x)[0])(state, x)
    assert torch.equal(predicted, net(x).detach())
    assert not predicted.requires_grad
