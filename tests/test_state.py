"""TrainState: what goes where, how it is replaced, and what the host knows of it."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from trainkit import LossOutput, TrainState, init_state, make_train_step, write_to
from trainkit.execution import compile_step
from trainkit.losses import module_loss
from trainkit.optim import adamw, sgd
from trainkit.rng import fold_in_host
from trainkit.state import advance, attached_params, host_step, num_parameters, seed_of, spend


class Tied(nn.Module):
    """An embedding that is the output layer as well, a frozen layer, statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.adapter = nn.Linear(3, 3).requires_grad_(False)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


def test_every_tensor_has_its_place_under_its_own_name() -> None:
    module = Tied()
    state = init_state(module, adamw(1e-3), seed=9)
    assert list(state.params.keys()) == ["embedding.weight", "norm.weight", "norm.bias"]
    frozen = ["adapter.weight", "adapter.bias"]
    statistics = ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]
    assert sorted(state.buffers.keys()) == sorted(frozen + statistics)
    assert sorted(state.opt_state["exp_avg"].keys()) == sorted(state.params.keys())
    assert (int(state.step), int(state.key), list(state.extra.keys())) == (0, 9, [])
    assert num_parameters(state.params) == 5 * 3 + 3 + 3


@pytest.mark.parametrize("copy", [True, False])
def test_the_state_is_a_copy_or_the_module_itself(copy: bool) -> None:
    module = Tied()
    state = init_state(module, sgd(0.1), copy=copy)
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, tensor in (*state.params.items(), *state.buffers.items()):
        assert torch.equal(tensor, own[name])
        assert (tensor.data_ptr() == own[name].data_ptr()) is not copy
        assert not tensor.requires_grad


def test_write_to_brings_a_state_back_into_the_module() -> None:
    module, other = Tied(), Tied()
    state = init_state(other, sgd(0.1))
    write_to(module, state)
    for one, two in zip(module.state_dict().items(), other.state_dict().items(), strict=True):
        assert one[0] == two[0]
        assert torch.equal(one[1], two[1])
    assert module.head.weight is module.embedding.weight


def test_a_state_is_a_pytree_of_tensors_with_named_paths() -> None:
    state = init_state(nn.Linear(2, 1), adamw(1e-3))
    paths, structure = pytree.tree_flatten_with_path(state)
    assert all(isinstance(leaf, torch.Tensor) for _, leaf in paths)
    rebuilt = pytree.tree_unflatten([leaf for _, leaf in paths], structure)
    assert isinstance(rebuilt, TrainState)
    assert torch.equal(rebuilt.params["weight"], state.params["weight"])


def test_replace_shares_the_rest_and_leaves_the_original() -> None:
    state = init_state(nn.Linear(2, 1), sgd(0.1))
    other = state.replace(key=torch.tensor(5))
    assert other.params is state.params
    assert (int(state.key), int(other.key)) == (0, 5)


def test_replace_keeps_what_a_subclass_adds_and_does_not_look_at_what_it_exchanges() -> None:
    @dataclass(frozen=True)
    class Noted(TrainState):
        note: int = 0

    state = init_state(nn.Linear(2, 1), sgd(0.1))
    fields = {name: getattr(state, name) for name in TrainState.__dataclass_fields__}
    assert Noted(**fields, note=7).replace(step=state.step + 1).note == 7
    spend(state)
    assert state.replace(**fields).params is fields["params"]


def test_the_host_knows_the_step_of_states_that_follow_one_it_knows() -> None:
    state = init_state(nn.Linear(2, 1), sgd(0.1))
    assert host_step(state) == 0
    after = advance(advance(state))
    assert (int(after.step), after.__dict__["_host_step"][-1], int(state.step)) == (2, 2, 0)
    # What is replaced is looked at again.
    assert host_step(after.replace(step=torch.tensor(7))) == 7


@pytest.mark.parametrize(("key", "step", "rank"), [(0, 0, 0), (3, 0, 0), (3, 11, 0), (3, 11, 2)])
def test_seeds_fold_key_step_and_rank(key: int, step: int, rank: int) -> None:
    state = init_state(nn.Linear(2, 1), sgd(0.1), seed=key).replace(step=torch.tensor(step))
    assert seed_of(state, rank) == fold_in_host(key, step, rank)


def test_leaves_for_autograd_share_the_memory_and_are_made_once() -> None:
    state = init_state(nn.Linear(2, 1), sgd(0.1))
    attached = attached_params(state)
    assert attached is attached_params(state)
    assert all(p.requires_grad and p.is_leaf for p in attached.values())
    assert attached["weight"].data_ptr() == state.params["weight"].data_ptr()
    # Another state's leaves are its own.
    other = state.replace(params=init_state(nn.Linear(2, 1), sgd(0.1)).params)
    assert attached_params(other)["weight"].data_ptr() == other.params["weight"].data_ptr()


def test_a_spent_state_keeps_nothing_alive() -> None:
    state = init_state(nn.Linear(2, 1), sgd(0.1))
    attached_params(state), host_step(state)
    spend(state)
    assert not vars(state)


@pytest.mark.parametrize("strategy", ["copy", "share"])
def test_frozen_parameters_are_used_and_not_trained(strategy: str) -> None:
    module = nn.Sequential(nn.Linear(2, 3).requires_grad_(False), nn.Linear(3, 1))
    state = init_state(module, adamw(0.1), copy=strategy == "copy")

    def loss(params: Any, buffers: Any, x: torch.Tensor) -> LossOutput:
        hidden = nn.functional.linear(x, buffers["0.weight"], buffers["0.bias"])
        return LossOutput(nn.functional.linear(hidden, params["1.weight"], params["1.bias"]).sum(), len(x))

    before = module[0].weight.clone()
    after, _ = make_train_step(loss, adamw(0.1))(state, torch.ones(3, 2))
    assert torch.equal(after.buffers["0.weight"], before)
    assert not torch.equal(after.params["1.weight"], state.params["1.weight"])


def test_a_step_that_is_written_into_is_read_again() -> None:
    state = init_state(nn.Linear(1, 1), sgd(0.1))
    assert host_step(state) == 0
    state.step.fill_(5)
    assert host_step(state) == 5


def test_a_copy_remembers_nothing_of_the_tensors_it_does_not_have() -> None:
    layer, x = nn.Linear(2, 1), torch.ones(3, 2)
    loss = module_loss(layer, lambda out, y: LossOutput(out.sum(), 3), inputs=lambda b: b, targets=lambda b: b)
    step = compile_step(make_train_step(loss, sgd(0.1)), strategy="eager")
    state, _ = step(init_state(layer, sgd(0.1)), x)
    again = copy.deepcopy(state)
    memory = again.params["weight"].data_ptr()
    before = state.params["weight"].clone()
    after, _ = step(again, x)
    assert after.params["weight"].data_ptr() == memory
    assert torch.equal(state.params["weight"], before)


def test_the_parameters_that_are_not_frozen_may_be_named() -> None:
    module = nn.Linear(2, 1)
    module.weight.requires_grad_(False)
    state = init_state(module, sgd(0.1), trainable=["weight"])
    assert (list(state.params.keys()), list(state.buffers.keys())) == (["weight"], ["bias"])
    with pytest.raises(ValueError, match="trainable: 'w' is no parameter"):
        init_state(module, sgd(0.1), trainable=["bias", "w"])
    with pytest.raises(ValueError, match="none of them is trainable"):
        init_state(module, sgd(0.1), trainable=[])
