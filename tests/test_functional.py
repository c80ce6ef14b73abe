"""functional: the forward pass as a function, against torch.func.functional_call."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from trainkit import functional, init_state
from trainkit.optim import sgd
from trainkit.tree import frozen


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.out = nn.Linear(4, 4)
        self.out.weight = self.inner[0].weight

    def forward(self, x, *, shift=0.0):
        return self.out(self.inner(x)) + shift


def other(state):
    return state.replace(params=state.params.apply(lambda t: t + 1).lock_())


def test_equals_torchs_and_leaves_the_module_alone():
    net, x = Net(), torch.randn(8, 4)
    state = other(init_state(net, sgd(0.1)))
    own = {name: t.clone() for name, t in net.state_dict().items()}
    tensors = {**state.params, **{name: t.clone() for name, t in state.buffers.items()}}
    torch.manual_seed(0)
    expected = functional_call(net, tensors, (x,), {"shift": 2.0})
    torch.manual_seed(0)
    found, buffers = functional(net)(state.params, state.buffers, x, shift=2.0)
    assert torch.equal(found, expected)
    for name in buffers.keys():
        assert torch.equal(buffers[name], tensors[name])
    assert not torch.equal(buffers["inner.1.running_mean"], state.buffers["inner.1.running_mean"])
    assert all(torch.equal(t, own[name]) for name, t in net.state_dict().items())
    assert net.out.weight is net.inner[0].weight


def test_modes_are_set_and_put_back():
    net, x = Net(), torch.randn(8, 4)
    net.inner[2].eval()
    state = init_state(net, sgd(0.1))
    found, _ = functional(net, training=False)(state.params, state.buffers, x)
    net.eval()
    assert torch.equal(found, net(x))
    net.train()
    net.inner[2].eval()
    functional(net, training=True)(state.params, state.buffers, x)
    assert net.training
    assert not net.inner[2].training


def test_the_module_is_itself_again_after_an_error():
    net = Net()
    state = other(init_state(net, sgd(0.1)))
    with pytest.raises(RuntimeError):
        functional(net)(state.params, state.buffers, torch.randn(8, 5))
    assert isinstance(net.out.weight, nn.Parameter)
    assert net.out.weight is net.inner[0].weight


def test_missing_and_foreign_names_are_named():
    layer = nn.Linear(2, 1)
    with pytest.raises(KeyError, match="lack 'bias'"):
        functional(layer)(frozen({"weight": torch.ones(1, 2)}), frozen(), torch.ones(1, 2))
    given = frozen({"weight": torch.ones(1, 2), "bias": torch.ones(1), "gain": torch.ones(1)})
    with pytest.raises(KeyError, match="hold 'gain'"):
        functional(layer)(given, frozen(), torch.ones(1, 2))
