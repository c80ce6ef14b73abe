"""Losses that no log has told yet: a checkpoint between two logs keeps them, so that the next log is the same."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainkit.io.checkpoint import CheckpointError
from trainkit.trainer.state import read_object, write_whole


@dataclass(frozen=True)
class LossSum:
    """What one process will log, so far.

    Args:
        loss: sum of the losses of the updates since the last log, a number of float32.
        logged_at: the step of that log.
        nonfinite: losses of the whole run that were not finite.
    """

    loss: float
    logged_at: int
    nonfinite: int


def file_name(rank: int, world: int) -> str:
    """Of the file of a process.

    Example:
        >>> file_name(0, 1), file_name(1, 2)
        ('loss_sum.json', 'loss_sum_1.json')
    """
    return "loss_sum.json" if world <= 1 else f"loss_sum_{rank}.json"


def write(folder: str | Path, losses: LossSum, rank: int, world: int) -> None:
    """The file of this process in a checkpoint."""
    write_whole(Path(folder, file_name(rank, world)), json.dumps(asdict(losses)))


def read(folder: str | Path, rank: int, world: int) -> LossSum | None:
    """What this process had not logged; None where all was, or as many processes did not write it.

    Raises: CheckpointError for a file that holds something else.
    """
    path = Path(folder, file_name(rank, world))
    if not path.exists():
        return None
    try:
        found = read_object(path)
        return LossSum(float(found["loss"]), int(found["logged_at"]), int(found["nonfinite"]))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path}: expected loss, logged_at and nonfinite as numbers: {error!r}") from error


def nonfinite_in(log_history: Iterable[Mapping[str, Any]]) -> int:
    """How many losses of a run were not finite, as its last log that tells of some says.

    Example:
        >>> nonfinite_in([{"loss": 2.0, "nonfinite_losses": 1, "step": 1}, {"eval_loss": 2.0, "step": 1}])
        1
    """
    return int(max((log.get("nonfinite_losses", 0) for log in log_history), default=0))
