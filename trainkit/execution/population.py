"""Populations: many runs of one step at once, as one state with a leading axis of members.

For sweeps over seeds and first weights of models so small that one alone leaves the machine idle. A member is a whole
:class:`~trainkit.TrainState`; a population is the same record with every tensor stacked, so it is compiled, saved and
looped over like any other state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from trainkit import rng, tree
from trainkit.gradients import (
    LossScale,
    check_unused,
    checked,
    draws_of,
    finished,
    multipliers,
    unreached,
    weight_of,
)
from trainkit.parts import part, run_parts_with
from trainkit.state import TrainState, host_step, remember_step, seed_of
from trainkit.types import Batch, GradientFn, Gradients, LossFn, LossOutput, Metrics, StepFn


def over_population(step: StepFn, *, batch_dim: int | None = None, rank: int = 0) -> StepFn:
    """One step of every member of a population.

    ``unstack_states(over_population(step)(stack_states(states), batch)[0])`` is ``[step(s, batch)[0] for s in
    states]``, by ``torch.vmap``. Metrics hold one number per member.

    The step has to take its gradients with :func:`member_value_and_grad`, since ``torch.autograd.grad`` does not work
    under ``vmap``. What ``vmap`` cannot batch, such as ``F.scaled_dot_product_attention``, runs member by member, and
    torch warns about it; where that is too slow, fold the members into the batch, or write attention as products.

    Random draws (dropout) differ between members. They are a function of all keys and of the step, so the same
    population gives the same numbers again; but a member does not draw what it would draw alone.

    Outside of a graph torch's fused optimizers run member by member, and donation saves no memory. Compiled as a whole,
    a population is one graph that works in the memory of the state it is given.

    Args:
        step: any pure StepFn on one state.
        batch_dim: None gives every member the same batch; a number is the axis of members in the batch's tensors.
        rank: this process' place among the data-parallel ones, so that each draws its own dropout.

    Returns: a StepFn on stacked states.

    Raises: ValueError, when called, for a state that is not stacked, or a step whose gradient cannot run under
        ``vmap``.

    Example:
        >>> from trainkit import LossOutput, init_state, make_train_step
        >>> from trainkit.optim import sgd
        >>> loss = lambda params, buffers, x: LossOutput((params["weight"] * x).sum(), x.shape[0])
        >>> tx = sgd(0.5)
        >>> step = make_train_step(loss, tx, gradients=member_value_and_grad)
        >>> members = [init_state(torch.nn.Linear(2, 1, bias=False), tx, seed=seed) for seed in range(3)]
        >>> population, metrics = over_population(step)(stack_states(members), torch.ones(4, 2))
        >>> population.params["weight"].shape, metrics["loss"].compute().shape
        (torch.Size([3, 1, 2]), torch.Size([3]))

    Source: ``jax.vmap`` over a train state; torch.func tutorial "Model ensembling".
    """

    def members(leaves: list[Tensor], structure: Any, batch: Batch) -> tuple[list[Tensor], Metrics]:
        def one(leaves: list[Tensor], batch: Batch) -> tuple[list[Tensor], Metrics]:
            after, metrics = step(pytree.tree_unflatten(leaves, structure), batch)
            return pytree.tree_leaves(after), metrics

        found: tuple[list[Tensor], Metrics] = torch.vmap(one, (0, batch_dim), randomness="different")(leaves, batch)
        return found

    # How far one call advances the step (several updates for ``scan``): asked of the device once.
    updates: int | None = None

    def population(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        _check_stacked(state)
        leaves, structure = pytree.tree_flatten(state)
        if torch.compiler.is_compiling():
            new, metrics = members(leaves, structure, batch)
            return pytree.tree_unflatten(new, structure), metrics
        whole, before = part("loss", members), host_step(state)
        # Parts compiled apart cannot be called from inside of vmap: the population is one part.
        with rng.seeded(seed_of(state, rank), state.step.device), run_parts_with(lambda name, fn: fn), _explained():
            new, metrics = whole(leaves, structure, batch)
        after = _state_of(new, structure)
        nonlocal updates
        if updates is None:
            updates = host_step(after) - before
        remember_step(state, after, updates)
        return after, metrics

    return population


def member_value_and_grad(
    loss: LossFn, *, rank: int = 0, unused: str = "error", scale: LossScale | None = None, mean: bool = False
) -> GradientFn:
    """The gradient of one member of a population: :func:`trainkit.value_and_grad` by ``torch.func.grad``.

    Give it to a step for :func:`over_population`: ``make_train_step(loss, tx, gradients=member_value_and_grad)``. It
    takes less than ``value_and_grad``: no activation checkpointing, and autograd functions need ``setup_context``.

    Args:
        loss: ``(params, buffers, batch) -> LossOutput``.
        rank: as for ``value_and_grad``, for a state alone; :func:`over_population` seeds the draws of all members.
        unused: "error" or "zero", as for ``value_and_grad``. Inside a graph a parameter that the loss does not use
            cannot be told from one whose gradient is zero, and "error" finds it outside only.
        scale: as for ``value_and_grad``.
        mean: as for ``value_and_grad``.

    Returns: a function ``(state, batch) -> Gradients``; pure.

    Raises (when called): as ``value_and_grad``.

    Example:
        >>> from trainkit import LossOutput, init_state
        >>> from trainkit.optim import sgd
        >>> loss = lambda params, buffers, x: LossOutput((params["weight"] * x).sum(), x.shape[0])
        >>> state = init_state(torch.nn.Linear(2, 1, bias=False), sgd(0.1))
        >>> member_value_and_grad(loss)(state, torch.ones(3, 2)).grads["weight"]
        tensor([[3., 3.]])
    """
    check_unused(unused, ("error", "zero"))

    def gradients(state: TrainState, batch: Batch) -> Gradients:
        names, params = list(tree.named(state.params)), tree.leaves(state.params)

        def top(attached: list[Tensor]) -> tuple[Tensor, tuple[Any, ...]]:
            out = checked(loss(tree.like(state.params, attached), state.buffers, batch))
            if unused == "error" and not torch.compiler.is_compiling():
                _check_used(out.loss_sum, names, attached)
            weight = weight_of(out)
            upscale, factor = multipliers(state, out.loss_sum, weight, scale, mean)
            start = upscale if factor is None else factor
            # TensorDicts do not pass through, their tensors do.
            buffers = state.buffers if out.buffers is None else out.buffers
            rest = out.loss_sum, weight, dict(out.metrics), tree.leaves(buffers)
            return out.loss_sum if start is None else out.loss_sum * start, rest

        with draws_of(state, rank):
            grads, (loss_sum, weight, metrics, buffers) = torch.func.grad(top, has_aux=True)(params)
        upscale, factor = multipliers(state, loss_sum, weight, scale, mean)
        if upscale is not None:
            grads = [(g / upscale).to(g.dtype) for g in grads]
        out = LossOutput(loss_sum, weight, metrics, tree.like(state.buffers, buffers))
        return finished(state, out, weight, tree.like(state.params, grads), factor)

    return gradients


def stack_states(states: Sequence[TrainState]) -> TrainState:
    """One state whose tensors are those of ``states``, stacked along a new first axis; it shares no memory with them.

    Args:
        states: at least one, of the same model and optimizer.

    Raises: ValueError for no state, or states that differ in structure, shapes or dtypes.

    Example:
        >>> from trainkit import init_state
        >>> from trainkit.optim import sgd
        >>> states = [init_state(torch.nn.Linear(2, 1), sgd(0.1), seed=seed) for seed in (3, 4)]
        >>> stack_states(states).key
        tensor([3, 4])
    """
    if not states:
        raise ValueError("states: none came, expected at least one")
    first, structure = pytree.tree_flatten(states[0])
    columns = [first]
    for i, state in enumerate(states[1:], start=1):
        leaves, own = pytree.tree_flatten(state)
        kinds = [(t.shape, t.dtype) for t in leaves]
        if own != structure or kinds != [(t.shape, t.dtype) for t in first]:
            raise ValueError(
                f"states: number {i} differs from number 0 in its names, shapes or dtypes; expected equal ones"
            )
        columns.append(leaves)
    return _state_of([torch.stack(row) for row in zip(*columns, strict=True)], structure)


def unstack_states(state: TrainState) -> list[TrainState]:
    """The members of a population, each a state of its own that shares no memory with it.

    Raises: ValueError for a state that is not stacked.

    Example:
        >>> from trainkit import init_state
        >>> from trainkit.optim import sgd
        >>> states = [init_state(torch.nn.Linear(2, 1), sgd(0.1), seed=seed) for seed in (3, 4)]
        >>> [int(state.key) for state in unstack_states(stack_states(states))]
        [3, 4]
    """
    _check_stacked(state)
    leaves, structure = pytree.tree_flatten(state)
    members = range(len(state.step))
    return [_state_of([t[i].clone() for t in leaves], structure) for i in members]


def _state_of(leaves: list[Tensor], structure: Any) -> TrainState:
    """A state from its tensors; its trees are locked again."""
    state: TrainState = pytree.tree_unflatten(leaves, structure)
    trees = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return state.replace(**{k: tree.frozen(t) for k, t in trees.items() if not isinstance(t, Tensor)})


def _check_stacked(state: TrainState) -> None:
    if state.step.dim() != 1:
        raise ValueError(
            f"state: its step has shape {tuple(state.step.shape)}, expected (members,); make a population of single "
            "states with stack_states"
        )


def _check_used(loss_sum: Tensor, names: list[str], params: list[Tensor]) -> None:
    reached, pending = set(), [loss_sum.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None and node not in reached:
            reached.add(node)
            pending.extend(parent for parent, _ in node.next_functions)
    ends = [torch.autograd.graph.get_gradient_edge(p).node for p in params]
    missing = [name for name, end in zip(names, ends, strict=True) if end not in reached]
    if missing:
        raise unreached(missing)


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "requires_grad_()" not in str(error):
            raise
        raise ValueError(
            "step: it takes its gradient with torch.autograd.grad, which does not work under vmap; make it with "
            "gradients=member_value_and_grad"
        ) from error
