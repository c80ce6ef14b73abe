"""Searches by Ray Tune, whose trials run in processes of their own, each with a copy of the trainer."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from trainkit.trainer.outputs import BestRun
from trainkit.trainer.reporting import MemoryTracker
from trainkit.trainer.search_trials import check_direction, release, run_trial, searching

_NEED_REPORTS = ("AsyncHyperBandScheduler", "MedianStoppingRule", "HyperBandForBOHB", "PopulationBasedTraining")


def default_space(trial: Any) -> dict[str, Any]:
    """Learning rate, epochs, seed and batch size, around usual values for fine-tuning.

    Source: Trainer 4.57: ``default_hp_space_ray``, whose seed is no integer.
    """
    tune: Any = import_module("ray.tune")

    return {
        "learning_rate": tune.loguniform(1e-6, 1e-4),
        "num_train_epochs": tune.choice(list(range(1, 6))),
        "seed": tune.randint(1, 41),
        "per_device_train_batch_size": tune.choice([4, 8, 16, 32, 64]),
    }


def run(trainer: Any, n_trials: int, direction: str, **kwargs: Any) -> BestRun:
    """Search with ``ray.tune.run``.

    Args:
        trainer: copied to each trial, without its model; what it holds must be picklable.
        n_trials: samples of the space.
        direction: ``minimize`` or ``maximize``.
        kwargs: of ``ray.tune.run``; by default a trial has 1 CPU, and 1 GPU where this machine has one.

    Returns: the best trial by ``args.ray_scope``, with Ray's analysis as its summary.

    Raises:
        ValueError: another direction.
        RuntimeError: a scheduler that needs evaluations during training without them, or no trial came to its end.

    Source: Trainer 4.57: ``hyperparameter_search``.
    """
    tune: Any = import_module("ray.tune")

    check_direction(direction, "ray")
    _check_scheduler(trainer.args, kwargs.get("scheduler"))
    kwargs.setdefault("resources_per_trial", {"cpu": 1, **({"gpu": 1} if trainer.args.n_gpu else {})})
    kwargs.setdefault("progress_reporter", tune.CLIReporter(metric_columns=["objective"]))
    with searching(trainer):
        release(trainer)
        tracker, trainer._memory_tracker = trainer._memory_tracker, MemoryTracker(skip=True)
        handler = trainer.callback_handler
        callbacks = handler.callbacks
        handler.callbacks = [c for c in callbacks if type(c).__name__ != "TensorBoardCallback"]
        try:
            analysis = tune.run(
                tune.with_parameters(_trial, trainer=trainer),
                config=trainer.hp_space(None),
                num_samples=n_trials,
                **kwargs,
            )
        finally:
            trainer._memory_tracker = tracker
            handler.callbacks = callbacks
    best = analysis.get_best_trial(metric="objective", mode=direction[:3], scope=trainer.args.ray_scope)
    if best is None:
        raise RuntimeError("search: no trial of ray reported an objective")
    return BestRun(best.trial_id, best.last_result["objective"], best.config, analysis)


def _trial(config: dict[str, Any], trainer: Any) -> None:
    """One trial, in its own process; goes on from a checkpoint if Ray gives one."""
    tune: Any = import_module("ray.tune")

    def at_end(metrics: dict[str, Any]) -> None:
        report(metrics, None)

    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        run_trial(trainer, config, at_end=at_end)
        return
    with checkpoint.as_directory() as folder:
        found = next(Path(folder).glob("checkpoint-*"))
        run_trial(trainer, config, resume_from_checkpoint=str(found), at_end=at_end)


def report(metrics: dict[str, Any], folder: str | None) -> None:
    """Give Ray the metrics of the trial that runs in this process, and a checkpoint."""
    tune: Any = import_module("ray.tune")

    tune.report(metrics, checkpoint=None if folder is None else tune.Checkpoint.from_directory(folder))


def trial_id(trial: Any) -> str:
    """Ray's name of the trial that runs in this process."""
    tune: Any = import_module("ray.tune")

    return str(tune.get_context().get_trial_id())


def _check_scheduler(args: Any, scheduler: Any) -> None:
    name = type(scheduler).__name__
    if name in _NEED_REPORTS and (not args.do_eval or args.eval_strategy == "no"):
        raise RuntimeError(
            f"scheduler: {name} judges trials while they run, but eval_strategy is 'no'; set it to 'steps' or 'epoch'"
        )
