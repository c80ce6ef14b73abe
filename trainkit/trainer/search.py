"""Hyperparameter search: where a trial writes, what it sets, how it is judged, and who proposes it."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainkit.trainer import search_optuna, search_ray, search_wandb
from trainkit.trainer.enums import HPSearchBackend
from trainkit.trainer.search_parameters import apply_parameters as apply_parameters
from trainkit.trainer.user_metrics import losses, user_metrics


@dataclass(frozen=True)
class Backend:
    """A library that proposes trials.

    Args:
        name: which.
        package: what it is imported as.
        default_space: ``(trial) -> parameters``; what is searched unless the user says.
        run: ``(trainer, n_trials, direction, **kwargs) -> BestRun``, a list of them for several directions.
        trial_id: ``(trial) -> id``, which names the folder of the trial.
    """

    name: HPSearchBackend
    package: str
    default_space: Callable[[Any], Any]
    run: Callable[..., Any]
    trial_id: Callable[[Any], str]


BACKENDS = (
    Backend(HPSearchBackend.OPTUNA, "optuna", search_optuna.default_space, search_optuna.run, search_optuna.trial_id),
    Backend(HPSearchBackend.RAY, "ray", search_ray.default_space, search_ray.run, search_ray.trial_id),
    Backend(HPSearchBackend.WANDB, "wandb", search_wandb.default_space, search_wandb.run, search_wandb.trial_id),
)
"""In the order in which they are looked for."""


def backend_of(name: str | HPSearchBackend | None = None) -> Backend:
    """The library of a name; without one, the first of optuna, ray and wandb that is installed.

    Raises: ValueError for an unknown name; RuntimeError if the library is not installed, or is SigOpt, whose service
        has ended.

    Source: Trainer 4.57: ``hyperparameter_search``.
    """
    if name is None:
        found = next((backend for backend in BACKENDS if _installed(backend)), None)
        if found is None:
            packages = ", ".join(backend.package for backend in BACKENDS)
            raise RuntimeError(f"backend: no library for searches is installed, expected one of: {packages}")
        return found
    wanted = HPSearchBackend(name)
    if wanted == HPSearchBackend.SIGOPT:
        raise RuntimeError("backend: got 'sigopt', which is not served: its service has ended; use optuna")
    backend = _named(wanted)
    if not _installed(backend):
        raise RuntimeError(
            f"backend: got {wanted.value!r}, but {backend.package} is not installed; {_install(backend)}"
        )
    return backend


def _named(name: str) -> Backend:
    wanted = HPSearchBackend(name)
    return next(backend for backend in BACKENDS if backend.name == wanted)


def _installed(backend: Backend) -> bool:
    return importlib.util.find_spec(backend.package) is not None


def _install(backend: Backend) -> str:
    return "pip install 'ray[tune]'" if backend.package == "ray" else f"pip install {backend.package}"


def run_folder(output_dir: str, backend: str | None, trial: Any, hp_name: Callable[[Any], str] | None = None) -> str:
    """The folder of a run: ``output_dir``; of a trial ``run-<its number>``, or what the user calls it, in that.

    Args:
        output_dir: of the arguments.
        backend: name of the library, None outside of a search.
        trial: of the library, None outside of a search.
        hp_name: ``(trial) -> name``.

    Raises: ValueError for a name that leads out of ``output_dir``.

    Example:
        >>> from types import SimpleNamespace
        >>> run_folder("out", "optuna", SimpleNamespace(number=3)), run_folder("out", None, None)
        ('out/run-3', 'out')

    Source: Trainer 4.57: ``_get_output_dir``.
    """
    if backend is None or trial is None:
        return output_dir
    name = f"run-{_named(backend).trial_id(trial)}" if hp_name is None else hp_name(trial)
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"hp_name: got {name!r}, expected the name of a folder in output_dir")
    return str(Path(output_dir) / name)


def default_objective(metrics: Mapping[str, float]) -> float:
    """What a search optimises unless the user says: the sum of the user's metrics; without any, the loss.

    Of several data sets all metrics, or all losses, are added up.

    Args:
        metrics: of an evaluation.

    Raises: ValueError if there is neither.

    Example:
        >>> default_objective({"eval_loss": 2.0, "eval_f1": 0.5, "eval_runtime": 9.0})
        0.5
        >>> default_objective({"eval_loss": 2.0, "eval_runtime": 9.0, "epoch": 1.0})
        2.0

    Source: Trainer 4.57: ``default_compute_objective``.
    """
    found = user_metrics(metrics) or losses(metrics)
    if not found:
        raise ValueError(
            f"compute_objective: the evaluation gave {sorted(metrics)}, expected a metric or eval_loss; pass "
            "compute_objective, or give the data labels"
        )
    return sum(found.values())


def parameters_of(backend: str, trial: Any, hp_space: Callable[[Any], Any]) -> dict[str, Any]:
    """The hyperparameters of a trial, by argument name.

    Args:
        backend: name of the library.
        trial: of the library; for ray and wandb a mapping that holds the parameters itself.
        hp_space: ``(trial) -> parameters``, asked for trials of optuna.

    Raises: TypeError if they are no mapping.

    Source: Trainer 4.57: ``_hp_search_setup``.
    """
    optuna = HPSearchBackend(backend) == HPSearchBackend.OPTUNA
    found = hp_space(trial) if optuna else trial
    if not isinstance(found, Mapping):
        what = "hp_space: it returned" if optuna else "trial: got"
        raise TypeError(f"{what} {type(found).__name__}, expected a dict from argument names to values")
    return {name: value for name, value in found.items() if optuna or name not in ("wandb", "assignments", "metric")}


def should_prune(
    backend: str,
    trial: Any,
    objective: Any,
    step: int,
    *,
    metrics: Mapping[str, Any] | None = None,
    save: Callable[[str], None] | None = None,
) -> bool:
    """Report an evaluation during a trial, and say whether the trial is to end here. Called by all processes.

    Optuna decides for one objective, on the main process, and all processes follow; it does not prune for several.
    Ray stops trials itself and restarts some from what was reported, so it gets a checkpoint.

    Args:
        backend: name of the library.
        trial: of the library.
        objective: of this evaluation.
        step: updates done.
        metrics: of this evaluation, for ray.
        save: ``(folder) -> None`` writes a checkpoint into a folder; None reports without.

    Source: Trainer 4.57: ``_report_to_hp_search``.
    """
    wanted = HPSearchBackend(backend)
    if wanted == HPSearchBackend.OPTUNA:
        return search_optuna.should_prune(trial, objective, step)
    if wanted == HPSearchBackend.RAY:
        with tempfile.TemporaryDirectory() as folder:
            if save is not None:
                save(folder)
            search_ray.report({**(metrics or {}), "objective": objective}, None if save is None else folder)
    return False


def pruned(backend: str) -> Exception:
    """The exception that ends a trial of a library early.

    Raises: ValueError for a library that has none.
    """
    if HPSearchBackend(backend) != HPSearchBackend.OPTUNA:
        raise ValueError(f"backend: got {backend!r}, expected 'optuna': the others end trials themselves")
    return search_optuna.pruned()
