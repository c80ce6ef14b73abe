"""Which evaluation is the best, and which of the saved checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class BestUpdate(NamedTuple):
    """What an evaluation means for the best metric.

    Args:
        key: the name in the metrics.
        value: as a Python number.
        is_better: whether it is the new best.
    """

    key: str
    value: float
    is_better: bool


def metric_key(name: str) -> str:
    """The key of a metric in an evaluation: its name with ``eval_`` in front, unless it is there.

    Example:
        >>> metric_key("loss"), metric_key("eval_loss")
        ('eval_loss', 'eval_loss')
    """
    return name if name.startswith("eval_") else f"eval_{name}"


def plateau_metric(metrics: Mapping[str, Any], name: str | None) -> float:
    """The metric that a plateau schedule watches.

    Args:
        metrics: of an evaluation, with their prefix.
        name: ``metric_for_best_model``, with or without ``eval_``.

    Raises:
        ValueError: there is no name.
        KeyError: there is no such metric.
        TypeError: the metric is not one number.

    Example:
        >>> plateau_metric({"eval_loss": 0.5}, "loss")
        0.5

    Source: Trainer 4.57: ``_evaluate``.
    """
    if name is None:
        raise ValueError(
            "metric_for_best_model: got None; expected the name of the metric to watch, such as 'eval_loss'"
        )
    key = metric_key(name)
    if key not in metrics:
        raise KeyError(
            f"metric_for_best_model: {name!r} means {key!r}, but the evaluation gave "
            f"{', '.join(metrics) or 'nothing'}. Choose one of these, or return it from compute_metrics; with several "
            "data sets, name one as in eval_a_loss"
        )
    try:
        return float(metrics[key])
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"metric_for_best_model: {key!r} is {metrics[key]!r}; expected one number") from error


def is_better(value: float, than: float | None, *, greater_is_better: bool | None) -> bool:
    """Whether a value is strictly better; NaN never is, and anything finite is better than None.

    Example:
        >>> is_better(1.0, 1.0, greater_is_better=True), is_better(0.5, 1.0, greater_is_better=False)
        (False, True)
    """
    if than is None:
        than = -math.inf if greater_is_better else math.inf
    return value > than if greater_is_better else value < than


def best_update(
    metrics: Mapping[str, Any],
    *,
    metric_for_best_model: str,
    greater_is_better: bool | None,
    best_metric: float | None,
) -> BestUpdate:
    """Compare an evaluation with the best so far. Ties keep the older one; NaN never wins.

    Args:
        metrics: of the evaluation, with their prefix.
        metric_for_best_model: with or without ``eval_``.
        greater_is_better: None means no.
        best_metric: of the evaluations before; None at the first.

    Raises: KeyError, TypeError as :func:`plateau_metric`.

    Example:
        >>> best_update({"eval_f1": 0.5}, metric_for_best_model="f1", greater_is_better=True, best_metric=0.4)
        BestUpdate(key='eval_f1', value=0.5, is_better=True)

    Source: Trainer 4.57: ``_determine_best_metric``.
    """
    value = plateau_metric(metrics, metric_for_best_model)
    better = is_better(value, best_metric, greater_is_better=greater_is_better)
    return BestUpdate(metric_key(metric_for_best_model), value, better)


def evaluations_of(log_history: Iterable[Mapping[str, Any]], metric_for_best_model: str) -> dict[int, float]:
    """The metric at each step that was evaluated, from a log; the last entry of a step counts.

    Example:
        >>> evaluations_of([{"loss": 2.0, "step": 1}, {"eval_loss": 1.5, "step": 2}], "loss")
        {2: 1.5}
    """
    key = metric_key(metric_for_best_model)
    return {int(entry["step"]): float(entry[key]) for entry in log_history if key in entry and "step" in entry}


def best_saved(evaluations: Mapping[int, float], saves: Iterable[int], *, greater_is_better: bool | None) -> int | None:
    """The step of the best checkpoint: the best value among the steps that were evaluated and saved.

    So a best value between two saves, whose weights are lost, does not hide the best ones that exist.

    Args:
        evaluations: value by step.
        saves: steps of the checkpoints that exist.
        greater_is_better: None means no.

    Returns: the step, the earliest of several that are equal; None where no checkpoint has a value that counts.

    Example:
        >>> best_saved({2: 0.1, 4: 0.3, 6: 0.2, 8: 0.3}, [4, 8], greater_is_better=False)
        4

    Source: Trainer 4.57: ``best_model_checkpoint``, of which it is the part that can be loaded.
    """
    best: int | None = None
    for step in sorted(set(saves) & evaluations.keys()):
        than = None if best is None else evaluations[best]
        if is_better(evaluations[step], than, greater_is_better=greater_is_better):
            best = step
    return best
