"""The experiment trackers that ``report_to`` may name, and which of them are installed. None of them is imported."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch

TRACKERS = (
    "azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte", "mlflow", "neptune", "swanlab",
    "tensorboard", "trackio", "wandb",
)  # fmt: skip


def installed_trackers() -> list[str]:
    """The trackers that ``report_to="all"`` means: those whose package is found, in the order of transformers.

    Azure ML counts without MLflow only, Flyte never, CodeCarbon not on ROCm. ``WANDB_DISABLED``,
    ``COMET_MODE=DISABLED`` and ``DISABLE_MLFLOW_INTEGRATION`` take theirs out. Costs about 50 microseconds per name
    that is not installed.

    Example:
        >>> set(installed_trackers()) <= set(TRACKERS)
        True

    Source: transformers 4.57: ``get_available_reporting_integrations``.
    """
    mlflow = _found("mlflow") and not is_set("DISABLE_MLFLOW_INTEGRATION")
    comet = _found("comet_ml") and os.environ.get("COMET_MODE", "").upper() != "DISABLED"
    there = {
        "azure_ml": not mlflow and _found("azureml") and _found("azureml.core"),
        "comet_ml": comet,
        "dagshub": _found("dagshub") and _found("mlflow"),
        "dvclive": _found("dvclive"),
        "mlflow": mlflow,
        "neptune": _found("neptune"),
        "tensorboard": _found("tensorboard") or _found("tensorboardX"),
        "wandb": _found("wandb") and not is_set("WANDB_DISABLED"),
        "codecarbon": torch.version.hip is None and _found("codecarbon"),
        "clearml": _found("clearml"),
        "swanlab": _found("swanlab"),
        "trackio": _found("trackio"),
    }
    return [name for name, found in there.items() if found]


def tracker_list(report_to: Any) -> list[str]:
    """``report_to`` as a list of names: None and "all" mean all installed ones, "none" means none.

    Raises: ValueError for a name that is not a tracker.

    Example:
        >>> tracker_list("wandb"), tracker_list(["none"])
        (['wandb'], [])
    """
    if report_to is None or report_to in ("all", ["all"]):
        return installed_trackers()
    if report_to in ("none", ["none"]):
        return []
    names = [report_to] if isinstance(report_to, str) else list(report_to)
    unknown = [name for name in names if name not in TRACKERS]
    if unknown:
        raise ValueError(f"report_to: got {unknown}, expected 'all', 'none' or some of: {', '.join(TRACKERS)}")
    return names


def _found(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def is_set(name: str, default: str = "FALSE") -> bool:
    """Whether an environment variable says yes."""
    return os.environ.get(name, default).upper() in ("1", "ON", "YES", "TRUE")
