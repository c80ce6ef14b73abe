"""What the Trainer's methods return."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple


class EvalPrediction:
    """What a metrics function receives; also unpacks as ``(predictions, label_ids[, inputs][, losses])``.

    Entries that are None are left out of the sequence: with losses and no inputs, index 2 is the losses.

    Args:
        predictions: an array, or a tuple of arrays, with a row per example.
        label_ids: the targets, in the same order.
        inputs: what the model was called with; only if asked for.
        losses: the loss of each example; only if asked for.

    Raises: IndexError for a negative index or one past the end.

    Example:
        >>> found = EvalPrediction([1, 2], [1, 3], losses=[0.0, 0.5])
        >>> predictions, label_ids, losses = found
        >>> found.inputs is None, found[2]
        (True, [0.0, 0.5])

    Source: Trainer 4.57: ``EvalPrediction``.
    """

    def __init__(self, predictions: Any, label_ids: Any, inputs: Any = None, losses: Any = None) -> None:
        self.predictions = predictions
        self.label_ids = label_ids
        self.inputs = inputs
        self.losses = losses
        self.elements: tuple[Any, ...] = (predictions, label_ids, *(x for x in (inputs, losses) if x is not None))

    def __iter__(self) -> Iterator[Any]:
        return iter(self.elements)

    def __getitem__(self, idx: int) -> Any:
        if not 0 <= idx < len(self.elements):
            raise IndexError(f"EvalPrediction: index {idx}, expected 0 to {len(self.elements) - 1}")
        return self.elements[idx]


class EvalLoopOutput(NamedTuple):
    """What an evaluation loop returns.

    Args:
        predictions: an array, or a tuple of arrays; None where only losses were wanted.
        label_ids: the targets; None without labels.
        metrics: by prefixed name.
        num_samples: examples that were seen.
    """

    predictions: Any
    label_ids: Any
    metrics: dict[str, float] | None
    num_samples: int | None


class PredictionOutput(NamedTuple):
    """What ``predict`` returns; the fields are those of :class:`EvalLoopOutput`."""

    predictions: Any
    label_ids: Any
    metrics: dict[str, float] | None


class TrainOutput(NamedTuple):
    """What ``train`` returns.

    Args:
        global_step: completed updates.
        training_loss: mean loss over the updates of this call.
        metrics: run time, rates, ``total_flos``, ``train_loss``, ``epoch``.
    """

    global_step: int
    training_loss: float
    metrics: dict[str, float]


class BestRun(NamedTuple):
    """The best trial of a hyperparameter search.

    Args:
        run_id: of the trial; the folder of its checkpoints ends with ``run-<run_id>``.
        objective: what was minimised or maximised; a list for several directions.
        hyperparameters: the values chosen, by argument name.
        run_summary: whatever the backend gives besides.
    """

    run_id: str
    objective: float | list[float]
    hyperparameters: dict[str, Any]
    run_summary: Any = None
