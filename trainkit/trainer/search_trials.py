"""What all searches do with a trainer: start each trial afresh, measure it, and leave the trainer as it was found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def searching(trainer: Any) -> Iterator[Callable[[], None]]:
    """A scope for trials. After it the trainer has the arguments of before, and a new model of ``model_init``.

    Args:
        trainer: a Trainer with ``model_init``.

    Yields: a function to call before each trial: it lets go of the model before, and sets all arguments back, so that
        what one trial set is not there in the next.
    """
    args = trainer.args
    before = dict(vars(args))

    def reset() -> None:
        release(trainer)
        vars(args).clear()
        vars(args).update(before)

    try:
        yield reset
    finally:
        reset()
        trainer._trial = None
        trainer.create_accelerator_and_postprocess()
        trainer._start_with_new_model(None)
        # What the last trial had made of its settings: the smoother of labels, the noise.
        trainer._take_searched_settings()
        if trainer.place_model_on_device:
            trainer._move_model_to_device(trainer.model, args.device)


def run_trial(
    trainer: Any,
    trial: Any,
    *,
    resume_from_checkpoint: str | None = None,
    at_end: Callable[[dict[str, Any]], object] | None = None,
) -> Any:
    """Train with the settings of a trial, and return its objective: of the last evaluation, or of one made at the end.

    Args:
        trainer: trains and evaluates.
        trial: of the library.
        resume_from_checkpoint: where the trial goes on.
        at_end: gets the metrics of an evaluation that was made at the end.
    """
    trainer.objective = None
    trainer.train(resume_from_checkpoint=resume_from_checkpoint, trial=trial)
    if trainer.objective is None:
        metrics = trainer.evaluate()
        trainer.objective = trainer.compute_objective(dict(metrics))
        if at_end is not None:
            at_end({**metrics, "objective": trainer.objective})
    return trainer.objective


def check_direction(direction: Any, backend: str) -> None:
    """Refuse what a library of one direction does not take.

    Raises: ValueError.
    """
    if direction not in ("minimize", "maximize"):
        raise ValueError(f"direction: got {direction!r}, expected 'minimize' or 'maximize' for {backend}")


def release(trainer: Any) -> None:
    """Let go of everything that holds a model's memory, so that two models are never there at once."""
    trainer.model = trainer.model_wrapped = None
    trainer.optimizer = trainer.lr_scheduler = None
    trainer._step = None
    handler = trainer.callback_handler
    handler.model = handler.optimizer = handler.lr_scheduler = None
    handler.train_dataloader = handler.eval_dataloader = None
    trainer.accelerator.free_memory()
