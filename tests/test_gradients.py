"""Three ways to a gradient, against the plain backward pass."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trainkit import LossOutput, functional, init_state, live_value_and_grad, per_example_grads, value_and_grad
from trainkit.losses import classification, module_loss
from trainkit.metrics import Mean
from trainkit.optim import sgd
from trainkit.state import seed_of


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))


def make_batch(rows=6):
    g = torch.Generator().manual_seed(1)
    return torch.randn(rows, 4, generator=g), torch.randint(0, 3, (rows,), generator=g)


@pytest.mark.parametrize("way", ["functional", "live"])
def test_equals_backward_with_the_same_seed(way):
    net, (x, y) = make_net(), make_batch()
    state = init_state(net, sgd(0.1), seed=7)
    if way == "functional":
        gradient = value_and_grad(module_loss(net, classification))
    else:
        gradient = live_value_and_grad(net, lambda params, buffers, b: classification(net(b[0]), b[1]))
    found = gradient(state, (x, y))
    torch.manual_seed(seed_of(state))
    expected = F.cross_entropy(net(x), y, reduction="sum")
    expected.backward()
    assert torch.equal(found.loss_sum, expected.detach())
    assert float(found.weight) == 6
    for name, p in net.named_parameters():
        assert torch.equal(found.grads[name], p.grad)


def test_live_leaves_data_and_grads_of_the_module_alone():
    net, batch = make_net(), make_batch()
    state = init_state(net, sgd(0.1))
    state = state.replace(params=state.params.apply(lambda t: t + 1).lock_())
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    before = {name: p.clone() for name, p in net.named_parameters()}
    live_value_and_grad(net, lambda params, buffers, b: classification(net(b[0]), b[1]))(state, batch)
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name])
        assert torch.equal(p.grad, torch.ones_like(p))


def test_per_example_gradients_equal_a_loop_and_add_up():
    net, (x, y) = make_net().double(), make_batch(5)
    x = x.double()
    loss = module_loss(net, classification, training=False)
    state = init_state(net, sgd(0.1))
    found = per_example_grads(loss)(state, (x, y))
    whole = value_and_grad(loss)(state, (x, y))
    for i in range(5):
        one = value_and_grad(loss)(state, (x[i : i + 1], y[i : i + 1]))
        for name in one.grads.keys():
            torch.testing.assert_close(found.grads[name][i], one.grads[name])
        torch.testing.assert_close(found.loss_sum[i], one.loss_sum)
    for name in whole.grads.keys():
        torch.testing.assert_close(found.grads[name].sum(0), whole.grads[name])
    assert float(found.weight.sum()) == 5


def test_ranks_draw_their_own_masks():
    net, batch = make_net(), make_batch()
    state, loss = init_state(net, sgd(0.1)), module_loss(net, classification)
    sums = {float(value_and_grad(loss, rank=rank)(state, batch).loss_sum) for rank in range(4)}
    assert len(sums) == 4


def test_a_parameter_without_gradient_is_named_or_zero():
    net, (x, y) = make_net(), make_batch()
    model = functional(net)

    def partial(params, buffers, batch):
        hidden = F.linear(batch[0], params["0.weight"])
        return LossOutput(hidden.sum(), len(batch[0]))

    state = init_state(net, sgd(0.1))
    with pytest.raises(ValueError, match=r"params: no gradient reached 0.bias, 3.weight, 3.bias"):
        value_and_grad(partial)(state, (x, y))
    found = value_and_grad(partial, unused="zero")(state, (x, y))
    assert float(found.grads["3.weight"].abs().sum()) == 0
    assert float(found.grads["0.weight"].abs().sum()) > 0
    with pytest.raises(ValueError, match="unused: got 'ignore', expected 'error' or 'zero'"):
        value_and_grad(partial, unused="ignore")
    assert model is not None


def test_the_gradient_of_a_plain_sum_can_be_trained_on():
    # Its strides are zero: one number in memory for all elements.
    loss = lambda params, buffers, x: LossOutput(params["bias"].sum() + params["weight"].sum(), len(x))  # noqa: E731
    found = value_and_grad(loss)(init_state(nn.Linear(3, 2), sgd(0.1)), torch.ones(4, 3))
    assert all(0 not in g.stride() for g in found.grads.values())


def test_metrics_come_detached():
    def loss(params, buffers, x):
        total = (params["weight"] * x).sum()
        return LossOutput(total, 1, {"twice": Mean(2 * total, torch.ones(()))})

    found = value_and_grad(loss)(init_state(nn.Linear(2, 1, bias=False), sgd(0.1)), torch.ones(1, 2))
    assert not found.metrics["twice"].total.requires_grad
    assert not found.loss_sum.requires_grad


@pytest.mark.parametrize("scale", [2.0**16, 3.0])
def test_a_loss_scale_leaves_the_gradient_as_it_is(scale):
    net, batch = make_net().double(), make_batch()
    batch = (batch[0].double(), batch[1])
    loss, state = module_loss(net, classification, training=False), init_state(net, sgd(0.1))
    plain = value_and_grad(loss)(state, batch)
    scaled = value_and_grad(loss, scale=lambda s: torch.tensor(scale))(state, batch)
    for name in plain.grads.keys():
        torch.testing.assert_close(scaled.grads[name], plain.grads[name])
