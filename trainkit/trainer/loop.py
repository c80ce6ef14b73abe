"""The loop of the Trainer: epochs, groups of microbatches, events. It remembers nothing and owns nothing.

What it calls are bound methods of whoever runs it, so an override in a subclass is what runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


class Control(Protocol):
    """The flags that callbacks raise."""

    should_training_stop: bool
    should_epoch_stop: bool


@dataclass(frozen=True)
class Plan:
    """How far a run goes, and from where.

    Args:
        num_epochs: passes over the data, counted from the beginning of the run.
        max_steps: updates after which it is over.
        accumulation: microbatches per update.
        batches_per_epoch: microbatches in one pass; None where the data have no length.
        start_epoch: the first pass that is not complete.
        skip: microbatches of that pass that were trained on already.
    """

    num_epochs: int
    max_steps: int
    accumulation: int
    batches_per_epoch: int | None
    start_epoch: int = 0
    skip: int = 0

    def epoch_at(self, epoch: int, batches: int) -> float:
        """The fractional epoch after so many microbatches of a pass.

        Data without length count against all microbatches of the run, as the Trainer of transformers does.

        Example:
            >>> Plan(num_epochs=2, max_steps=6, accumulation=2, batches_per_epoch=5).epoch_at(1, 4)
            1.8
        """
        whole = self.batches_per_epoch or self.max_steps * self.accumulation
        return epoch + batches / whole if whole else float(epoch)

    def group_size(self, batches: int) -> int:
        """Microbatches of the next update, after so many of the pass."""
        if self.batches_per_epoch is None:
            return self.accumulation
        return min(self.accumulation, self.batches_per_epoch - batches)


@dataclass(frozen=True)
class Hooks:
    """What the loop calls.

    Args:
        event: fires a callback event by name and keeps the control.
        control: the flags as they are now.
        global_step: completed updates.
        start_epoch: ``(epoch, skip) -> iterable`` the microbatches of a pass after those to skip.
        get_batch_samples: ``(iterator, n) -> (microbatches, item count)``.
        update: ``(microbatches, item count) -> UpdateResult``: one optimizer step.
        finished_update: ``(epoch as a float)``, after an update: counters, events.
        report: ``(epoch, grad norm)``: log, evaluate, save, as the flags say.
    """

    event: Callable[[str], Any]
    control: Callable[[], Control]
    global_step: Callable[[], int]
    start_epoch: Callable[[int, int], Iterable[Any]]
    get_batch_samples: Callable[[Iterator[Any], int], tuple[list[Any], Any]]
    update: Callable[[list[Any], Any], UpdateResult]
    finished_update: Callable[[float], None]
    report: Callable[[int, Tensor | float | None], None]


@dataclass(frozen=True)
class UpdateResult:
    """What one group of microbatches came to.

    Args:
        done: False if a callback stopped the group before its update.
        grad_norm: before clipping; None where nothing is clipped.
    """

    done: bool
    grad_norm: Tensor | float | None = None


def run_epochs(plan: Plan, hooks: Hooks, look: Callable[[], None]) -> None:
    """Train until the plan is fulfilled or a callback stops the run.

    A group of microbatches never spans two passes; the last group of a pass may be smaller, and is an update too.

    Args:
        plan: how far.
        hooks: what to call.
        look: called after each update, when all that belongs to it is done, the end of its pass too. A run that it
            ends by raising can go on from there.
    """
    grad_norm: Tensor | float | None = None
    for epoch in range(plan.start_epoch, plan.num_epochs):
        if hooks.global_step() >= plan.max_steps:
            return
        skip = plan.skip if epoch == plan.start_epoch else 0
        batches = hooks.start_epoch(epoch, skip)
        seen, grad_norm = _run_epoch(plan, hooks, look, epoch, skip, batches, grad_norm)
        if not seen:
            warnings.warn(
                f"train_dataset: it gave no batch in epoch {epoch}; training stops at step {hooks.global_step()} of "
                f"{plan.max_steps}. Give more data, or a smaller max_steps",
                UserWarning,
                stacklevel=2,
            )
            hooks.control().should_training_stop = True
        hooks.event("on_epoch_end")
        hooks.report(epoch, grad_norm)
        look()
        if hooks.control().should_training_stop:
            return


def _run_epoch(
    plan: Plan,
    hooks: Hooks,
    look: Callable[[], None],
    epoch: int,
    skip: int,
    batches: Iterable[Any],
    grad_norm: Tensor | float | None,
) -> tuple[bool, Tensor | float | None]:
    """One pass; whether there was a batch, and the last norm of the gradient."""
    iterator, done = iter(batches), skip
    try:
        while (wanted := plan.group_size(done)) > 0:
            if done > skip:
                look()
            group, items = hooks.get_batch_samples(iterator, wanted)
            if not group:
                break
            done += len(group)
            hooks.event("on_step_begin")
            result = hooks.update(group, items)
            if result.done:
                grad_norm = result.grad_norm
                hooks.finished_update(plan.epoch_at(epoch, done))
                hooks.report(epoch, grad_norm)
            control = hooks.control()
            if control.should_epoch_stop or control.should_training_stop:
                break
    finally:
        # Workers of the loader end with its iterator, also when the pass was left early.
        close = getattr(iterator, "close", None)
        if close is not None:
            close()
    return done > 0, grad_norm
