"""Sweeps of Weights & Biases: its server proposes the trials, an agent in this process runs them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from trainkit.trainer.outputs import BestRun
from trainkit.trainer.search_trials import check_direction, run_trial, searching
from trainkit.trainer.trackers import WandbCallback


def default_space(trial: Any) -> dict[str, Any]:
    """The configuration of a random sweep over learning rate, epochs, seed and batch size.

    Source: Trainer 4.57: ``default_hp_space_wandb``.
    """
    return {
        "method": "random",
        "metric": {"name": "objective", "goal": "minimize"},
        "parameters": {
            "learning_rate": {"distribution": "uniform", "min": 1e-6, "max": 1e-4},
            "num_train_epochs": {"distribution": "int_uniform", "min": 1, "max": 6},
            "seed": {"distribution": "int_uniform", "min": 1, "max": 40},
            "per_device_train_batch_size": {"values": [4, 8, 16, 32, 64]},
        },
    }


def run(
    trainer: Any,
    n_trials: int,
    direction: str,
    *,
    sweep_id: str | None = None,
    project: str | None = None,
    name: str | None = None,
    entity: str | None = None,
    metric: str = "eval/loss",
) -> BestRun:
    """Search with a sweep; the best trial is found here, by the trainer's objective.

    Args:
        trainer: trains each trial, and reports to wandb meanwhile.
        n_trials: how many.
        direction: ``minimize`` or ``maximize``.
        sweep_id: of a sweep that is there; else one is made.
        project: of the sweep.
        name: of a new sweep.
        entity: user or team.
        metric: what the server optimises, among what is logged.

    Returns: the best trial, with the sweep's id as its summary.

    Raises:
        ValueError: another direction.
        RuntimeError: no trial came to its end.

    Source: Trainer 4.57: ``hyperparameter_search``.
    """
    wandb: Any = import_module("wandb")

    check_direction(direction, "wandb")
    best: list[BestRun] = []
    known = any(type(c).__name__ == "WandbCallback" for c in trainer.callback_handler.callbacks)
    reporter = None if known else WandbCallback()
    with searching(trainer) as reset:
        if sweep_id is None:
            space = dict(trainer.hp_space(None))
            space["metric"] = {**space.get("metric", {}), "goal": direction, "name": metric}
            sweep_id = wandb.sweep({**space, "name": name} if name else space, project=project, entity=entity)

        def one_trial() -> None:
            reset()
            current = wandb.run or wandb.init()
            parameters = dict(wandb.config)
            value = run_trial(trainer, parameters)
            better = not best or (value < best[0].objective if direction == "minimize" else value > best[0].objective)
            if better:
                best[:] = [BestRun(current.id, value, parameters, sweep_id)]

        if reporter is not None:
            trainer.add_callback(reporter)
        try:
            wandb.agent(sweep_id, function=one_trial, count=n_trials, project=project, entity=entity)
        finally:
            if reporter is not None:
                trainer.remove_callback(reporter)
    if not best:
        raise RuntimeError(f"search: no trial of sweep {sweep_id} came to its end")
    return best[0]


def trial_id(trial: Any) -> str:
    """The id of the run in this process."""
    wandb: Any = import_module("wandb")

    return str(wandb.run.id)
