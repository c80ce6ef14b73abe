"""Which of the numbers that an evaluation reports are results, and which only describe the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_RATES = ("runtime", "samples_per_second", "steps_per_second", "tokens_per_second")
_SPEED = (*_RATES, "jit_compilation_time", "model_preparation_time")


def user_metrics(metrics: Mapping[str, Any], *, prefix: str = "eval") -> dict[str, Any]:
    """The results of an evaluation besides its loss, under their names without the prefix.

    Everything under ``<prefix>_`` but losses of the evaluation loop, times, rates and memory; nothing else.

    Args:
        metrics: as ``evaluate`` returns or logs them; of several data sets too, whose names stay in front.
        prefix: of the evaluation.

    Example:
        >>> user_metrics({"eval_loss": 0.5, "eval_f1": 0.8, "eval_runtime": 3.0, "eval_mem_cpu_alloc_delta": 8})
        {'f1': 0.8}
    """
    own = {f"{name}_{what}" for name in _prefixes(metrics, prefix) for what in ("loss", *_SPEED)}
    start, memory = f"{prefix}_", f"{prefix}_mem_"
    return {
        name.removeprefix(start): value
        for name, value in metrics.items()
        if name.startswith(start) and name not in own and not name.startswith(memory)
    }


def losses(metrics: Mapping[str, Any], *, prefix: str = "eval") -> dict[str, float]:
    """The losses of the evaluation loop, by their full names: one for each data set.

    Example:
        >>> losses({"eval_a_loss": 1.0, "eval_a_runtime": 3.0, "eval_a_hinge_loss": 4.0})
        {'eval_a_loss': 1.0}
    """
    names = (f"{name}_loss" for name in _prefixes(metrics, prefix))
    return {name: metrics[name] for name in names if name in metrics}


def _prefixes(metrics: Mapping[str, Any], prefix: str) -> list[str]:
    """The prefix, and those of several data sets: every evaluation reports its run time."""
    ends = (name.removesuffix("_runtime") for name in metrics if name.endswith("_runtime"))
    return list(dict.fromkeys([prefix, *(end for end in ends if end.startswith(f"{prefix}_"))]))
