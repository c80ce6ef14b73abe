"""Searches by Optuna: one objective or several, pruning, and several processes that train one trial together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

from trainkit.trainer.outputs import BestRun
from trainkit.trainer.search_trials import run_trial, searching

_OF_OPTIMIZE = ("timeout", "gc_after_trial", "catch", "callbacks", "show_progress_bar")


def default_space(trial: Any) -> dict[str, Any]:
    """Learning rate, epochs, seed and batch size, around usual values for fine-tuning.

    Source: Trainer 4.57: ``default_hp_space_optuna``.
    """
    return {
        "learning_rate": trial.suggest_float("learning_rate", 1e-6, 1e-4, log=True),
        "num_train_epochs": trial.suggest_int("num_train_epochs", 1, 5),
        "seed": trial.suggest_int("seed", 1, 40),
        "per_device_train_batch_size": trial.suggest_categorical("per_device_train_batch_size", [4, 8, 16, 32, 64]),
    }


def run(trainer: Any, n_trials: int, direction: str | list[str], **kwargs: Any) -> BestRun | list[BestRun] | None:
    """Search with a study of Optuna.

    Args:
        trainer: trains each trial.
        n_trials: how many.
        direction: ``minimize`` or ``maximize``; a list of them for objectives that are lists.
        kwargs: ``timeout`` (seconds), ``gc_after_trial``, ``catch``, ``callbacks``, ``show_progress_bar`` for
            ``Study.optimize``, the rest for ``optuna.create_study``.

    Returns: the best trial; for several directions those that no other beats in all. On the main process; else None.

    Raises:
        ValueError: ``n_jobs`` above 1.
        RuntimeError: no trial came to its end.

    Source: Trainer 4.57: ``hyperparameter_search``.
    """
    optuna: Any = import_module("optuna")

    if (jobs := kwargs.pop("n_jobs", 1)) != 1:
        raise ValueError(
            f"n_jobs: got {jobs!r}, expected 1: one trainer trains one trial at a time; start several processes with "
            "the same storage and study_name"
        )
    options = {name: kwargs.pop(name) for name in _OF_OPTIMIZE if name in kwargs}
    catch = options.get("catch", ())
    ends = (optuna.TrialPruned, *(catch if isinstance(catch, Iterable) else (catch,)))
    with searching(trainer) as reset:
        if trainer.args.process_index != 0:
            _follow(trainer, reset, ends)
            return None
        lead = _Leader(trainer, reset, ends)
        try:
            several = {"direction": direction} if isinstance(direction, str) else {"directions": direction}
            study = optuna.create_study(**several, **kwargs)
            study.optimize(lead, n_trials=n_trials, **options)
        finally:
            if not lead.training:
                _shared(None)
    return _best(study)


class _Leader:
    """The objective of a study. Remembers whether the other processes train; if not, they wait for the next trial.

    Args:
        trainer: trains each trial.
        reset: called before each.
        ends: errors of a trial after which all processes go on to the next one.
    """

    def __init__(self, trainer: Any, reset: Callable[[], None], ends: tuple[type[Exception], ...]) -> None:
        self.trainer, self.reset, self.ends = trainer, reset, ends
        self.training = False

    def __call__(self, trial: Any) -> Any:
        optuna: Any = import_module("optuna")

        self.reset()
        if self.trainer.args.world_size > 1:
            self.trainer.hp_space(trial)
            _shared(optuna.trial.FixedTrial(trial.params, trial.number))
        self.training = True
        try:
            value = run_trial(self.trainer, trial)
        except self.ends:
            self.training = False
            raise
        self.training = False
        return value


def _follow(trainer: Any, reset: Callable[[], None], ends: tuple[type[Exception], ...]) -> None:
    """Train each trial that the main process proposes, until it says that there is no more."""
    while (trial := _shared(None)) is not None:
        reset()
        with contextlib.suppress(*ends):
            run_trial(trainer, trial)


def _best(study: Any) -> BestRun | list[BestRun]:
    ended = [trial for trial in study.trials if trial.values is not None and trial.state.name == "COMPLETE"]
    if not ended:
        states = ", ".join(f"{trial.number} {trial.state.name.lower()}" for trial in study.trials)
        raise RuntimeError(f"search: no trial came to its end with a value; trials: {states or 'none'}")
    if len(study.directions) == 1:
        best = study.best_trial
        return BestRun(str(best.number), best.value, best.params)
    return [BestRun(str(best.number), best.values, best.params) for best in study.best_trials]


def should_prune(trial: Any, objective: Any, step: int) -> bool:
    """Report to the study and ask its pruner, on the main process; the others are told. Not for several objectives."""
    study = getattr(trial, "study", None)
    prune = False
    if study is not None and len(study.directions) == 1:
        trial.report(objective, step)
        prune = trial.should_prune()
    return bool(_shared(prune))


def trial_id(trial: Any) -> str:
    """The number of the trial in its study."""
    return str(trial.number)


def pruned() -> Exception:
    """The exception that tells a study that a trial ended early."""
    optuna: Any = import_module("optuna")

    found: Exception = optuna.TrialPruned()
    return found


def _shared(value: Any) -> Any:
    """What the main process passed, on all of them."""
    from accelerate.utils import broadcast_object_list

    shared = [value]
    broadcast_object_list(shared)
    return shared[0]
