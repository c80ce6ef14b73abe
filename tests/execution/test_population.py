"""Populations: what stacks, what a member draws, what vmap refuses, and the same compiled."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from trainkit import (
    LossOutput,
    TrainState,
    apply_updates,
    init_ema,
    init_state,
    make_train_step,
    run,
    sharpness_aware,
    with_ema,
)
from trainkit.execution import compile_step
from trainkit.execution.activation import remat
from trainkit.execution.population import member_value_and_grad, over_population, stack_states, unstack_states
from trainkit.losses import classification, module_loss
from trainkit.optim import adamw, chain, clip_by_global_norm, sgd
from trainkit.state import host_step, seed_of
from trainkit.transforms import scan

MEMBERS = 3


def make_module(dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8, bias=False), nn.BatchNorm1d(8), nn.Dropout(dropout), nn.Linear(8, 4))


def make_states(make: Callable[[], nn.Module], tx: Any) -> list[TrainState]:
    return [init_state(make(), tx, seed=seed) for seed in range(MEMBERS)]


def make_batch(rows: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 3), torch.randint(0, 4, (rows,))


def assert_close(a: Any, b: Any) -> None:
    for x, y in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("strategy", ["eager", "split", "whole"])
def test_compiled_steps_equal_separate_runs(strategy: Any) -> None:
    module, tx = make_module(), chain(clip_by_global_norm(1.0), adamw(1e-2, eps=1e-3))
    loss = module_loss(module, classification)
    states, batches = make_states(make_module, tx), [make_batch() for _ in range(3)]
    step = compile_step(over_population(make_train_step(loss, tx, gradients=member_value_and_grad)), strategy=strategy)
    first = stack_states(states)
    (*_, last) = run(step, first, batches)
    alone = make_train_step(loss, tx)
    for member, state in zip(unstack_states(last.state), states, strict=True):
        (*_, expected) = run(alone, state, batches)
        assert_close(member, expected.state)
    explanation = step.explain()
    assert (explanation.strategy, explanation.compilations) == (strategy, 0 if strategy == "eager" else 1)
    assert not vars(first)
    with pytest.raises(RuntimeError, match="lock"):
        last.state.params["3.bias"] = torch.zeros(MEMBERS, 4)


def test_transforms_of_gradients_and_steps_go_inside() -> None:
    module, tx = make_module(), sgd(0.1, momentum=0.9)
    loss = module_loss(module, classification)
    states, batch = [init_ema(state) for state in make_states(make_module, tx)], make_batch()
    step = with_ema(apply_updates(sharpness_aware(member_value_and_grad(loss)), tx), 0.5)
    found, _ = over_population(step)(stack_states(states), batch)
    for member, state in zip(unstack_states(found), states, strict=True):
        assert_close(member, step(state, batch)[0])


def test_stacking_and_unstacking_share_nothing() -> None:
    states = make_states(make_module, adamw(1e-3))
    population = stack_states(states)
    members = unstack_states(population)
    for member, state in zip(members, states, strict=True):
        pairs = list(zip(pytree.tree_leaves(member), pytree.tree_leaves(state), strict=True))
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)
    pointers = [{t.untyped_storage().data_ptr() for t in pytree.tree_leaves(s)} for s in (population, *members)]
    assert len(set.union(*pointers)) == sum(map(len, pointers))


def test_only_states_of_one_kind_stack() -> None:
    one = init_state(nn.Linear(2, 1), sgd(0.1))
    for other in (
        init_state(nn.Linear(2, 1, bias=False), sgd(0.1)),
        init_state(nn.Linear(3, 1), sgd(0.1)),
        init_state(nn.Linear(2, 1).double(), sgd(0.1)),
        init_state(nn.Linear(2, 1), adamw(0.1)),
    ):
        with pytest.raises(ValueError, match="states: number 1 differs from number 0 in its names, shapes or dtypes"):
            stack_states([one, other])
    with pytest.raises(ValueError, match="states: none came, expected at least one"):
        stack_states([])


def test_a_single_state_is_no_population() -> None:
    tx = sgd(0.1)
    module = make_module()
    step = make_train_step(module_loss(module, classification), tx, gradients=member_value_and_grad)
    state = init_state(module, tx)
    for use in (lambda: over_population(step)(state, make_batch()), lambda: unstack_states(state)):
        with pytest.raises(ValueError, match=r"state: its step has shape \(\), .* stack_states"):
            use()


def test_the_usual_gradient_is_refused_with_the_way_out() -> None:
    tx = sgd(0.1)
    step = over_population(make_train_step(module_loss(make_module(), classification), tx))
    with pytest.raises(ValueError, match=r"step: .* does not work under vmap; make it with gradients=member_value"):
        step(stack_states(make_states(make_module, tx)), make_batch())


def test_other_errors_pass_as_they_are() -> None:
    tx, module = sgd(0.1), make_module()
    loss = remat(module_loss(module, classification), module, "0")
    step = over_population(make_train_step(loss, tx, gradients=member_value_and_grad))
    with pytest.raises(RuntimeError, match="saved tensor hooks"):
        step(stack_states(make_states(make_module, tx)), make_batch())


# -- draws ---------------------------------------------------------------------------------------------------------


def noise(params: Any, buffers: Any, x: Tensor) -> LossOutput:
    return LossOutput((params["weight"] * torch.rand(1000)).sum(), 1.0)


def draws(states: list[TrainState], step_number: int = 0) -> Tensor:
    """What each member drew: the gradient of :func:`noise`."""
    population = stack_states(states)
    population = population.replace(step=population.step + step_number)
    step = over_population(make_train_step(noise, sgd(1.0), gradients=member_value_and_grad))
    after, _ = step(population, torch.ones(1))
    return population.params["weight"] - after.params["weight"]


def test_members_draw_differently_and_depend_on_keys_and_step_alone() -> None:
    states = [init_state(nn.Linear(1000, 1, bias=False), sgd(1.0), seed=seed) for seed in range(MEMBERS)]
    before = torch.get_rng_state()
    first = draws(states)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    assert torch.equal(first, draws(states))
    assert not any(torch.allclose(first[i], first[i - 1], atol=0.1) for i in range(MEMBERS))
    others = [*states[:-1], states[-1].replace(key=torch.tensor(77))]
    assert not torch.allclose(first, draws(others), atol=0.1)
    assert not torch.allclose(first, draws(states, step_number=1), atol=0.1)


def test_a_population_of_one_has_the_seed_of_its_member() -> None:
    state = init_state(nn.Linear(2, 1), sgd(0.1), seed=5).replace(step=torch.tensor(3))
    assert seed_of(stack_states([state])) == seed_of(state)


def test_what_vmap_cannot_batch_runs_member_by_member_and_says_so() -> None:
    """Attention: correct, and slow."""

    def attention(params: Any, buffers: Any, x: Tensor) -> LossOutput:
        q, k, v = F.linear(x, params["weight"]).chunk(3, dim=-1)
        return LossOutput(F.scaled_dot_product_attention(q, k, v).square().sum(), len(x))

    tx = sgd(0.1)
    states = make_states(lambda: nn.Linear(4, 12, bias=False), tx)
    x = torch.randn(2, 2, 5, 4)
    step = make_train_step(attention, tx, gradients=member_value_and_grad)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found, _ = over_population(step)(stack_states(states), x)
    assert any("batching rule for aten::_scaled_dot_product" in str(warning.message) for warning in caught)
    for member, state in zip(unstack_states(found), states, strict=True):
        assert_close(member, make_train_step(attention, tx)(state, x)[0])


def test_several_updates_per_call_are_remembered_as_such() -> None:
    tx = sgd(0.1)
    loss = lambda params, buffers, x: LossOutput((params["weight"] * x).sum(), x.shape[0])  # noqa: E731
    step = over_population(scan(make_train_step(loss, tx, gradients=member_value_and_grad), 3))
    state = stack_states([init_state(nn.Linear(2, 1, bias=False), tx, seed=seed) for seed in (1, 2)])
    for calls in (1, 2):
        state, _ = step(state, torch.ones(3, 4, 2))
        assert (state.step.tolist(), host_step(state)) == ([3 * calls] * 2, 3 * calls)
