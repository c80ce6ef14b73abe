"""``run``: the loop as a generator. Its body belongs to the user."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from trainkit.state import TrainState, host_step
from trainkit.types import Batch, Metrics, StepFn


@dataclass(frozen=True)
class Record:
    """What one step leaves.

    Args:
        step: completed updates after it.
        state: the new state. With a donating step it is valid until the loop goes on.
        metrics: of this step alone; tensors, nobody has waited for them.
        batch: what was trained on.
    """

    step: int
    state: TrainState
    metrics: Metrics
    batch: Batch


def run(step: StepFn, state: TrainState, batches: Iterable[Batch]) -> Iterator[Record]:
    """Yield a record after every step.

    ``for record in run(step, state, batches)`` is ``for batch in batches: state, metrics = step(state, batch)``,
    and nothing is hidden in it: stop with ``break``, evaluate, log or save in the body, keep ``record.state``.

    Args:
        step: any StepFn, eager or compiled.
        state: the state to start from.
        batches: any iterable; its end ends the loop.

    Example:
        >>> from trainkit import LossOutput, init_state, make_train_step
        >>> from trainkit.optim import sgd
        >>> import torch
        >>> tx = sgd(0.1)
        >>> loss = lambda params, buffers, x: LossOutput((params["weight"] * x).sum(), x.shape[0])
        >>> state = init_state(torch.nn.Linear(2, 1, bias=False), tx)
        >>> [record.step for record in run(make_train_step(loss, tx), state, [torch.ones(1, 2)] * 3)]
        [1, 2, 3]

    Source: the generator ``training_steps`` of Levanter.
    """
    count = host_step(state)
    for batch in batches:
        state, metrics = step(state, batch)
        after = host_step(state)
        if after <= count:
            raise ValueError(f"step: returned a state at step {after} after {count}; a StepFn must advance state.step")
        count = after
        yield Record(count, state, metrics, batch)
