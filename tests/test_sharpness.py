"""Sharpness-aware gradients against the closed form, the loop of the paper and accumulation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from trainkit import tree
from trainkit.accumulate import accumulate
from trainkit.functional import functional
from trainkit.gradients import value_and_grad
from trainkit.optim.sgd import sgd
from trainkit.sharpness import sharpness_aware
from trainkit.state import TrainState, init_state
from trainkit.step import apply_updates
from trainkit.types import Batch, Buffers, LossOutput, Params

RHO = 0.3


def make_module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.0), nn.Linear(6, 1))


def loss_of(module: nn.Module) -> Any:
    model = functional(module)

    def loss(params: Params, buffers: Buffers, batch: Batch) -> LossOutput:
        out, buffers = model(params, buffers, batch)
        return LossOutput((out - 1).square().sum(), batch.shape[0], buffers=buffers)

    return loss


def batch_of(i: int) -> Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(i))


def sam_step(module: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> float:
    """Foret et al. 2021, algorithm 1, on a live module; batch statistics are taken in the first pass only."""
    optimizer.zero_grad()
    loss = (module(batch) - 1).square().mean()
    loss.backward()
    buffers = [b.clone() for b in module.buffers()]
    parameters = list(module.parameters())
    before = [p.detach().clone() for p in parameters]
    norm = torch.cat([p.grad.flatten() for p in parameters]).norm()
    with torch.no_grad():
        for p in parameters:
            p.add_(RHO * p.grad / norm)
    optimizer.zero_grad()
    (module(batch) - 1).square().mean().backward()
    with torch.no_grad():
        for p, old in zip(parameters, before, strict=True):
            p.copy_(old)
        for b, old in zip(module.buffers(), buffers, strict=True):
            b.copy_(old)
    optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("donated", [False, True])
def test_a_run_equals_the_algorithm_of_the_paper(donated: bool) -> None:
    module, tx = make_module(), sgd(0.1, momentum=0.9)
    step = apply_updates(sharpness_aware(value_and_grad(loss_of(module)), RHO), tx)
    state = init_state(module, tx)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    for i in range(6):
        with tree.donate(state) if donated else tree.keep():
            state, metrics = step(state, batch_of(i))
        loss = sam_step(module, optimizer, batch_of(i))
        assert float(metrics["loss"].compute()) == pytest.approx(loss, rel=1e-5)
        for name, p in module.named_parameters():
            torch.testing.assert_close(state.params[name], p.data, rtol=1e-4, atol=1e-5)
        for name, b in module.named_buffers():
            torch.testing.assert_close(state.buffers[name], b, rtol=1e-4, atol=1e-5)


def test_on_a_quadratic_it_is_the_gradient_at_the_edge_of_the_ball() -> None:
    curvature = torch.tensor([[1.0, 4.0]])
    loss = lambda params, buffers, x: LossOutput((curvature * params["weight"] ** 2).sum() / 2 * len(x), len(x))  # noqa: E731
    state = init_state(nn.Linear(2, 1, bias=False), sgd(0.1))
    theta = state.params["weight"]
    direction = curvature * theta / (curvature * theta).norm()
    found = sharpness_aware(value_and_grad(loss), RHO)(state, torch.ones(5, 1))
    torch.testing.assert_close(found.grads["weight"] / found.weight, curvature * (theta + RHO * direction))
    assert torch.equal(found.loss_sum, value_and_grad(loss)(state, torch.ones(5, 1)).loss_sum)


def test_the_gradient_function_is_pure() -> None:
    module = make_module()
    gradient, state = sharpness_aware(value_and_grad(loss_of(module)), RHO), init_state(module, sgd(0.1))
    before = tree.clone(state)
    once, twice = gradient(state, batch_of(0)), gradient(state, batch_of(0))
    for a, b in zip(pytree.tree_leaves((state, once.grads)), pytree.tree_leaves((before, twice.grads)), strict=True):
        assert torch.equal(a, b)


def test_both_passes_draw_the_same_masks() -> None:
    draws: list[Tensor] = []

    def loss(params: Params, buffers: Buffers, batch: Batch) -> LossOutput:
        draws.append(torch.rand(4))
        return LossOutput((params["weight"] * batch).square().sum(), len(batch))

    sharpness_aware(value_and_grad(loss), RHO)(init_state(nn.Linear(2, 1, bias=False), sgd(0.1)), torch.ones(2, 2))
    assert len(draws) == 2
    assert torch.equal(*draws)


def test_around_an_accumulated_gradient_it_is_that_of_the_whole_batch() -> None:
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    gradient, state = value_and_grad(loss_of(module)), init_state(module, sgd(0.1))
    whole = sharpness_aware(gradient, RHO)(state, batch_of(0))
    split = sharpness_aware(accumulate(gradient, 3), RHO)(state, batch_of(0))
    parts = accumulate(sharpness_aware(gradient, RHO), 3)(state, batch_of(0))
    for name, g in whole.grads.items():
        torch.testing.assert_close(split.grads[name], g, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(parts.grads["0.weight"], whole.grads["0.weight"], rtol=1e-2)


def test_a_gradient_of_zero_moves_nothing() -> None:
    loss = lambda params, buffers, x: LossOutput((params["weight"] * 0).sum(), len(x))  # noqa: E731
    found = sharpness_aware(value_and_grad(loss))(init_state(nn.Linear(2, 1, bias=False), sgd(0.1)), torch.ones(2, 2))
    assert torch.equal(found.grads["weight"], torch.zeros(1, 2))


def test_it_is_one_graph_that_serves_every_step() -> None:
    torch._dynamo.reset()
    module, tx = make_module(), sgd(0.1)
    step, state = apply_updates(sharpness_aware(value_and_grad(loss_of(module)), RHO), tx), init_state(module, tx)
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(step, fullgraph=True, backend=count)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        for i in range(3):
            found, _ = compiled(state, batch_of(i))
            state, _ = step(state, batch_of(i))
            assert_close(found, state)
    assert len(graphs) == 1


def assert_close(one: TrainState, two: TrainState) -> None:
    for a, b in zip(pytree.tree_leaves(one), pytree.tree_leaves(two), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rho", [0.0, -1.0, math.nan])
def test_a_radius_that_is_not_positive_is_refused(rho: float) -> None:
    with pytest.raises(ValueError, match=f"rho: got {rho}, expected a positive number"):
        sharpness_aware(value_and_grad(loss_of(make_module())), rho)
