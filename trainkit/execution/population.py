"""Populations: many runs of one step at once, as one state with a leading axis of members.

For sweeps over seeds and first weights of small models, which alone leave a machine idle. A member is a whole
:class:`~trainkit.TrainState`; a population is the same record with every tensor stacked, so it is saved, compiled and looped
over like any other state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from trainkit import rng, tree
from trainkit.gradients import LossScale, checked, value_and_grad, weight_of
from trainkit.parts import part, run_parts_with
from trainkit.state import TrainState, remember_step, seed_of
from trainkit.types import Batch, GradientFn, Gradients, LossFn, Metrics, StepFn


def over_population(step: StepFn, *, batch_dim: int | None = None, rank: int = 0) -> StepFn:
    """One step of every member of a population.

    ``unstack_states(over_population(step)(stack_states(states), batch)[0])`` is ``[step(s, batch)[0] for s in states]``, by
    ``torch.vmap``. Metrics hold one number per member.

    The step must take its gradient with :func:`member_value_and_grad`, because ``torch.autograd.grad`` cannot run under
    ``vmap``. What ``vmap`` cannot batch, such as ``F.scaled_dot_product_attention``, runs member by member, and torch says
    so in a warning; fold the members into the batch or write attention as products where that is too slow.

    Random draws (dropout) differ between members and are a function of all members' keys and the step: the same
    population gives the same numbers again, but a member does not draw the masks that it would draw alone.

    Outside of a graph torch's fused optimizers run member by member, and donation frees nothing. Compiled as a whole, a
    population is one graph in the memory of the state it is given.

    Args:
        step: any pure StepFn on one state.
        batch_dim: None gives every member the same batch; a number is the axis of the members in the batch's tensors.
        rank: this process' place among the data-parallel ones.

    Returns: a StepFn on stacked states.

    Raises: ValueError, when called, for a state that is not stacked, or a step whose gradient cannot run under ``vmap``.

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

        return torch.vmap(one, in_dims=(0, batch_dim), randomness="different")(leaves, batch)  # type: ignore[no-any-return]

    def run(leaves: list[Tensor], structure: Any, batch: Batch) -> tuple[list[Tensor], Metrics]:
        if torch.compiler.is_compiling():
            return members(leaves, structure, batch)
        # A part that is compiled apart cannot be called under vmap.
        with run_parts_with(lambda name, fn: fn):
            return members(leaves, structure, batch)

    def population(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        _check_stacked(state)
        leaves, structure = pytree.tree_flatten(state)
        if torch.compiler.is_compiling():
            new, metrics = run(leaves, structure, batch)
            return pytree.tree_unflatten(new, structure), metrics
        with rng.seeded(seed_of(state, rank), state.step.device), _explained():
            new, metrics = part("loss", run)(leaves, structure, batch)
        after: TrainState = pytree.tree_unflatten(new, structure)
        remember_step(state, after)
        return after, metrics

    return population
