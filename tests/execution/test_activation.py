"""remat: the same numbers with fewer activations."""

import pytest
import torch
from torch import nn

from trainkit import LossOutput, functional, init_state, make_train_step, value_and_grad
from trainkit.execution import compile_step, remat
from trainkit.optim import sgd


class Net(nn.Module):
    def __init__(self, depth: int = 4, width: int = 32, dropout: float = 0.2):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 8 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(8 * width, width))
            for _ in range(depth)
        )

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def make_loss(module):
    model = functional(module)

    def loss(params, buffers, x):
        return LossOutput(model(params, buffers, x)[0].square().sum(), x.shape[0])

    return loss


def other_params(state):
    """Parameters that are not the module's own, which a recomputation could mistake them for."""
    return state.replace(params=state.params.apply(lambda t: t * 1.5).lock_())


def test_gradients_are_equal_bit_for_bit_with_dropout_and_foreign_parameters():
    net = Net()
    state, x = other_params(init_state(net, sgd(0.1), seed=5)), torch.randn(8, 32)
    plain = value_and_grad(make_loss(net))(state, x)
    again = value_and_grad(remat(make_loss(net), net, "blocks.*"))(state, x)
    assert torch.equal(plain.loss_sum, again.loss_sum)
    assert all(torch.equal(plain.grads[name], again.grads[name]) for name in plain.grads.keys())


def test_keeps_only_the_inputs_of_the_blocks():
    net = Net(dropout=0.0)
    state, x = init_state(net, sgd(0.1)), torch.randn(64, 32)
    parameters = {p.untyped_storage().data_ptr() for p in state.params.values()}

    def saved_bytes(loss):
        kept = {}

        def pack(t):
            if t.untyped_storage().data_ptr() not in parameters:
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            inputs = state.params.apply(lambda t: t.detach().requires_grad_())
            parameters.update(t.untyped_storage().data_ptr() for t in inputs.values())
            loss(inputs, state.buffers, x)
        return sum(kept.values())

    # Per block: two hidden tensors of 8 widths are given up, one input of one width stays.
    assert saved_bytes(remat(make_loss(net), net, "blocks.*")) < 0.2 * saved_bytes(make_loss(net))


@pytest.mark.parametrize("strategy", ["split", "whole"])
def test_compiled_equals_eager(strategy):
    net = Net(depth=2, dropout=0.0)
    loss, x = make_loss(net), torch.randn(8, 32)
    expected, _ = make_train_step(loss, sgd(0.01))(init_state(net, sgd(0.01)), x)
    step = compile_step(make_train_step(remat(loss, net, "blocks.*"), sgd(0.01)), strategy=strategy)
    found, _ = step(init_state(net, sgd(0.01)), x)
    assert step.explain().strategy == strategy
    for name in expected.params.keys():
        torch.testing.assert_close(found.params[name], expected.params[name], rtol=1e-4, atol=1e-5)


def test_a_pattern_without_match_is_refused():
    net = Net(depth=1)
    with pytest.raises(ValueError, match=r"pattern: 'layers.\*' matches no submodule; names look like 'blocks'"):
        remat(make_loss(net), net, "layers.*")
