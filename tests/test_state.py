"""TrainState: made from any module, immutable, a pytree, and spent when its memory is taken."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from trainkit import SpentStateError, TrainState, init_state, write_to
from trainkit.optim import adamw, sgd
from trainkit.state import advance, host_step, num_parameters, spend


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(3)


def test_names_are_the_modules_and_tied_weights_appear_once():
    state = init_state(Tied(), sgd(0.1))
    assert set(state.params.keys()) == {"embed.weight", "norm.weight", "norm.bias"}
    assert set(state.buffers.keys()) == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert num_parameters(state.params) == 15 + 6


def test_frozen_parameters_are_left_out_of_the_optimizer():
    module = Tied()
    module.norm.requires_grad_(False)
    state = init_state(module, adamw(1e-3))
    assert set(state.params.keys()) == {"embed.weight"}
    assert set(state.opt_state["exp_avg"].keys()) == {"embed.weight"}
    assert {"norm.weight", "norm.bias"} <= set(state.buffers.keys())


@pytest.mark.parametrize("copy", [True, False])
def test_copy_decides_whose_memory_it_is(copy):
    module = Tied()
    state = init_state(module, sgd(0.1), copy=copy)
    assert (state.params["embed.weight"].data_ptr() == module.embed.weight.data_ptr()) is not copy
    assert not state.params["embed.weight"].requires_grad


def test_nothing_can_be_set():
    state = init_state(nn.Linear(2, 1), sgd(0.1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.step = torch.ones(())
    for tree in (state.params, state.buffers, state.opt_state, state.extra):
        with pytest.raises(RuntimeError, match="lock"):
            tree["weight"] = torch.zeros(1, 2)


def test_is_a_pytree_of_tensors():
    state = init_state(Tied(), adamw(1e-3))
    leaves, spec = pytree.tree_flatten(state)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    assert len(leaves) == 2 + 3 + 3 + (2 * 3 + 2)
    back = pytree.tree_unflatten(leaves, spec)
    assert isinstance(back, TrainState)
    assert torch.equal(back.params["embed.weight"], state.params["embed.weight"])


def test_the_step_is_known_to_the_host_without_asking():
    state = init_state(nn.Linear(2, 1), sgd(0.1))
    assert host_step(state) == 0
    after = advance(advance(state))
    assert int(after.step) == host_step(after) == 2
    assert int(state.step) == 0


def test_a_spent_state_says_so():
    state = init_state(nn.Linear(2, 1), sgd(0.1))
    spend(state)
    with pytest.raises(SpentStateError, match=r"state.params: .*Use the state that the step returned.*donate=False"):
        state.params.keys()
    with pytest.raises(AttributeError, match="TrainState has no attribute 'weights'"):
        state.weights  # noqa: B018


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.ReLU(), "ReLU has 0 parameters and none of them is trainable"),
        (nn.Linear(2, 1).requires_grad_(False), "Linear has 2 parameters and none of them is trainable"),
        (nn.Linear(2, 1, device="meta"), "'weight' is on the meta device"),
    ],
)
def test_modules_that_cannot_be_trained(module, message):
    with pytest.raises(ValueError, match=message):
        init_state(module, sgd(0.1))


def test_writing_back():
    module = Tied()
    state = init_state(module, sgd(0.1))
    doubled = state.replace(params=state.params.apply(lambda t: 2 * t).lock_())
    write_to(module, doubled)
    assert torch.equal(module.head.weight, 2 * state.params["embed.weight"])
    with pytest.raises(KeyError, match=r"module has no parameter or buffer 'embed\.weight'"):
        write_to(nn.Linear(2, 1), state)
