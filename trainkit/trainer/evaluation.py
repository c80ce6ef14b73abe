"""Evaluation over a loader: predictions, mean loss and metrics, on one process or several."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainkit.accumulate import merge_metrics
from trainkit.metrics import MetricFn, compute
from trainkit.trainer.accumulate_predictions import Predictions, batch_rows, leaves, nested_map, nested_truncate
from trainkit.trainer.dataloaders import length_of, with_last
from trainkit.trainer.evaluation_ranks import Losses, Ranks, Table, loss_per_row, mean_loss, over_ranks
from trainkit.trainer.mapped_pages import few_pages
from trainkit.trainer.outputs import EvalLoopOutput, EvalPrediction
from trainkit.types import Metrics

PADDING = -100
"""Fills up dimension 1 of predictions and labels; the label that losses ignore."""


def rows_as_weight(inputs: Any, rows: int) -> float:
    """A loss counts as much as its rows."""
    return float(rows)


@dataclass(frozen=True)
class EvaluationHooks:
    """What an evaluation calls, and what it has to know.

    Args:
        prediction_step: ``(inputs, prediction_loss_only, ignore_keys=...) -> (loss, logits, labels)``.
        compute_metrics: ``(EvalPrediction) -> dict`` of everything, at the end; with ``batch_eval_metrics``
            ``(EvalPrediction, compute_result=is_last) -> dict``, of each batch; or functions
            ``(logits, labels) -> Metric`` by name, whose results are merged and which keep no row.
        preprocess_logits_for_metrics: ``(logits, labels) -> what is kept of the logits``, before they are gathered.
        on_prediction_step: called after each batch.
        prepare_input: moves a tree to the device.
        num_examples: of a loader with a length, whose data have none.
        loss_weight: ``(inputs, rows)``: what the loss of this rank weighs among those of the same step. Number of items
            if a loss is a mean over items, so that several ranks give what one would with the whole batch.
        ranks: the processes.
        batch_eval_metrics: metrics of each batch; nothing is kept, unless predictions are what is wanted.
        include_for_metrics: of "inputs" and "loss", what ``compute_metrics`` gets besides.
        main_input_name: of the inputs, what it gets.
        eval_batch_size: rows of a batch that holds no tensor with rows.
        concat: False leaves predictions as lists, an entry per batch.
        spill_bytes: of host memory, for predictions, labels and inputs each; more goes to a file.
        folder: for that file.
    """

    prediction_step: Callable[..., tuple[Any, Any, Any]]
    compute_metrics: Callable[..., Any] | Mapping[str, MetricFn] | None = None
    preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None
    on_prediction_step: Callable[[], object] = lambda: None
    prepare_input: Callable[[Any], Any] = lambda tree: tree
    num_examples: Callable[[Any], int] | None = None
    loss_weight: Callable[[Any, int], Tensor | float] = rows_as_weight
    ranks: Ranks = field(default_factory=Ranks)
    batch_eval_metrics: bool = False
    include_for_metrics: Sequence[str] = ()
    main_input_name: str = "input_ids"
    eval_batch_size: int | None = None
    concat: bool = True
    spill_bytes: int = 2**30
    folder: str | Path | None = None


def evaluate_batches(
    hooks: EvaluationHooks,
    dataloader: Any,
    *,
    description: str,
    prediction_loss_only: bool = False,
    ignore_keys: Sequence[str] | None = None,
    metric_key_prefix: str = "eval",
    times: Mapping[str, float] | None = None,
) -> EvalLoopOutput:
    """Predictions, labels and metrics over a loader; the model is in evaluation mode already.

    loss = sum_b rows_b * l_b / sum_b rows_b,  l_b = sum_r w_br * l_br / sum_r w_br, over batches b and ranks r; rows
    that only fill up the last batch are in none of these.

    Args:
        hooks: what to call.
        dataloader: batches.
        description: "Prediction" keeps the rows also where metrics are computed batch by batch.
        prediction_loss_only: neither predictions nor labels.
        ignore_keys: outputs of the model that are no predictions.
        metric_key_prefix: in front of every metric, with an underscore.
        times: seconds that this evaluation took to prepare, by name; they go into the metrics.

    Returns: predictions and labels as arrays (or trees of arrays), metrics as numbers.

    Raises:
        TypeError: ``compute_metrics`` gives no mapping, or is a mapping of anything but functions.
        ValueError: a batch without the inputs that are asked for, or that differs in structure from the others.

    Example:
        >>> step = lambda inputs, loss_only, ignore_keys: (inputs.mean(), inputs, inputs)
        >>> hooks = EvaluationHooks(step, lambda found: {"largest": found.predictions.max()})
        >>> batches = [torch.tensor([1.0, 2.0]), torch.tensor([6.0])]
        >>> evaluate_batches(hooks, batches, description="Evaluation").metrics
        {'eval_loss': 3.0, 'eval_largest': 6.0}

    Source: Trainer 4.57: ``evaluation_loop``.
    """
    _check_metrics(hooks.compute_metrics)
    by_batch = hooks.batch_eval_metrics or isinstance(hooks.compute_metrics, Mapping)
    run = _Run(hooks, keep=not by_batch or description == "Prediction")
    is_last = hooks.ranks.is_last
    batches = with_last(dataloader) if is_last is None else ((inputs, is_last()) for inputs in dataloader)
    for inputs, last in batches:
        run.take(inputs, last, prediction_loss_only, ignore_keys)
    wanted = hooks.compute_metrics is not None and not prediction_loss_only and description != "Prediction"
    if wanted and run.batches and not run.had_labels:
        warnings.warn(
            "compute_metrics: not called, since no batch gave both predictions and labels; see label_names",
            UserWarning,
            stacklevel=2,
        )
    return run.output(dataloader, metric_key_prefix, times or {})


def prediction_loop(
    hooks: EvaluationHooks,
    dataloader: Any,
    *,
    description: str,
    prediction_loss_only: bool = False,
    ignore_keys: Sequence[str] | None = None,
    metric_key_prefix: str = "eval",
    times: Mapping[str, float] | None = None,
) -> EvalLoopOutput:
    """The older form of :func:`evaluate_batches`: logits are not preprocessed, rows are always joined.

    Args: as there.

    Raises: ValueError for a loader without a length or a batch size.

    Source: Trainer 4.57: ``prediction_loop``.
    """
    if length_of(dataloader) is None:
        raise ValueError("dataloader: it has no length; use evaluation_loop (use_legacy_prediction_loop=False)")
    if getattr(dataloader, "total_batch_size", None) is None and getattr(dataloader, "batch_size", None) is None:
        raise ValueError("dataloader: it has no batch_size; use evaluation_loop (use_legacy_prediction_loop=False)")
    return evaluate_batches(
        replace(hooks, preprocess_logits_for_metrics=None, concat=True),
        dataloader,
        description=description,
        prediction_loss_only=prediction_loss_only,
        ignore_keys=ignore_keys,
        metric_key_prefix=metric_key_prefix,
        times=times,
    )


class _Run:
    """One evaluation: what has been gathered so far."""

    def __init__(self, hooks: EvaluationHooks, *, keep: bool) -> None:
        self.hooks = hooks
        self.keep = keep
        self._call = hooks.compute_metrics if hooks.batch_eval_metrics and callable(hooks.compute_metrics) else None
        self.batches = 0
        self.observed = 0
        self.had_labels = False
        self._losses = Losses()
        self._kept = {name: self._container() for name in ("predictions", "labels", "inputs")}
        self._metrics: Mapping[str, Any] | None = None
        self._merged: Metrics | None = None

    def _container(self) -> Predictions:
        hooks = self.hooks
        return Predictions(padding=PADDING, concat=hooks.concat, spill_bytes=hooks.spill_bytes, folder=hooks.folder)

    def take(self, inputs: Any, last: bool, loss_only: bool, ignore_keys: Sequence[str] | None) -> None:
        hooks, ranks = self.hooks, self.hooks.ranks
        found = batch_rows(inputs)
        rows = found or hooks.eval_batch_size or 1
        own = ranks.own_rows(rows)
        count = rows if own is None else own
        # A rank of which no row counts runs its whole batch, since the others may wait for it inside of the model.
        inputs = first_rows(inputs, rows, own) if own else inputs
        weight = hooks.loss_weight(inputs, count) if count else 0.0
        main = self._main_input(inputs)
        loss, logits, labels = hooks.prediction_step(inputs, loss_only, ignore_keys=ignore_keys)
        self.batches += 1
        self.observed += count if found else 0
        self.had_labels |= logits is not None and labels is not None
        if loss is not None:
            self._losses.add(loss, weight, count)
        gathers = self.keep or self._call is not None
        if gathers:
            main, logits, labels = (self._padded(tree, own is not None) for tree in (main, logits, labels))
        if logits is not None and hooks.preprocess_logits_for_metrics is not None:
            logits = hooks.preprocess_logits_for_metrics(logits, labels)
        if isinstance(hooks.compute_metrics, Mapping):
            self._merge(hooks.compute_metrics, logits, labels, None if own is None else count)
        if gathers:
            main, logits, labels = (None if t is None else ranks.gather(t) for t in (main, logits, labels))
        if self.keep:
            for name, tree in (("inputs", main), ("predictions", logits), ("labels", labels)):
                if tree is not None:
                    self._kept[name].add(tree)
        hooks.on_prediction_step()
        if self._call is not None and logits is not None and labels is not None:
            extra = self._batch_extra(inputs, loss, rows)
            batch = EvalPrediction(predictions=logits, label_ids=labels, **extra)
            self._metrics = self._call(batch, compute_result=last)

    def _main_input(self, inputs: Any) -> Any:
        hooks = self.hooks
        if not self.keep or "inputs" not in hooks.include_for_metrics:
            return None
        if hooks.main_input_name not in inputs:
            raise ValueError(
                f"include_for_metrics: 'inputs' asks for the model's {hooks.main_input_name!r}, but the batch has "
                f"{', '.join(inputs)}; set main_input_name of the model's class"
            )
        return hooks.prepare_input(inputs[hooks.main_input_name])

    def _padded(self, tree: Any, uneven: bool) -> Any:
        if tree is None:
            return None
        # Where ranks left rows out, all get the same number again; `gather` drops those.
        even = self.hooks.ranks.pad(tree, 0, 0) if uneven else tree
        return self.hooks.ranks.pad(even, 1, PADDING)

    def _merge(self, metrics: Mapping[str, MetricFn], logits: Any, labels: Any, count: int | None) -> None:
        # The first batch counts also without rows, since all ranks need a metric of the same structure.
        if logits is None or labels is None or (count == 0 and self._merged is not None):
            return
        if count is not None:
            logits, labels = nested_truncate(logits, count), nested_truncate(labels, count)
        found = {name: fn(logits, labels) for name, fn in metrics.items()}
        self._merged = found if self._merged is None else merge_metrics(self._merged, found)

    def _batch_extra(self, inputs: Any, loss: Any, rows: int) -> dict[str, Any]:
        hooks, ranks = self.hooks, self.hooks.ranks
        extra: dict[str, Any] = {}
        if "inputs" in hooks.include_for_metrics:
            # As in 4.57 this is the whole batch.
            several = ranks.world > 1
            extra["inputs"] = ranks.gather(self._padded(hooks.prepare_input(inputs), True)) if several else inputs
        if "loss" in hooks.include_for_metrics and loss is not None:
            extra["losses"] = ranks.gather(torch.as_tensor(loss).detach().mean().repeat(rows))
        return extra

    def output(self, dataloader: Any, prefix: str, times: Mapping[str, float]) -> EvalLoopOutput:
        hooks = self.hooks
        table = self._losses.table(hooks.ranks)
        predictions, labels, inputs = (self._kept[name].result() for name in ("predictions", "labels", "inputs"))
        found = dict(denumpify(self._computed(table, predictions, labels, inputs)))
        if table is not None:
            found[f"{prefix}_loss"] = mean_loss(table)
        found.update({f"{prefix}_{name}": seconds for name, seconds in times.items()})
        return EvalLoopOutput(
            predictions=predictions,
            label_ids=labels,
            metrics=prefixed(found, prefix),
            num_samples=self._num_samples(dataloader),
        )

    def _computed(self, table: Table | None, predictions: Any, labels: Any, inputs: Any) -> Mapping[str, Any]:
        hooks = self.hooks
        if isinstance(hooks.compute_metrics, Mapping):
            return {} if self._merged is None else _values(over_ranks(self._merged, hooks.ranks))
        if self._call is not None:
            return {} if self._metrics is None else _mapping(self._metrics)
        if hooks.compute_metrics is None or predictions is None or labels is None:
            return {}
        losses = loss_per_row(table, hooks.concat) if "loss" in hooks.include_for_metrics else None
        everything = EvalPrediction(predictions=predictions, label_ids=labels, inputs=inputs, losses=losses)
        with few_pages(leaves((predictions, labels, inputs))):
            return _mapping(hooks.compute_metrics(everything))

    def _num_samples(self, dataloader: Any) -> int:
        dataset = getattr(dataloader, "dataset", None)
        known = length_of(dataset)
        if known is None:
            counted = getattr(dataset, "num_examples", 0)
            known = counted if isinstance(counted, int) else 0
        if not known and self.hooks.num_examples is not None and length_of(dataloader) is not None:
            known = int(self.hooks.num_examples(dataloader))
        if not known:
            ranks, seen = self.hooks.ranks, torch.tensor([self.observed])
            known = int(ranks.all_gather(self.hooks.prepare_input(seen)).sum()) if ranks.world > 1 else self.observed
        return known


def first_rows(tree: Any, rows: int, own: int) -> Any:
    """The first ``own`` of ``rows`` rows: of tensors with so many, and of lists with an entry per row.

    Example:
        >>> first_rows({"x": torch.arange(3), "names": ["a", "b", "c"], "scale": torch.tensor([2.0])}, 3, 2)
        {'x': tensor([0, 1]), 'names': ['a', 'b'], 'scale': tensor([2.])}
    """

    def by_row(leaf: Any) -> bool:
        return isinstance(leaf, (Tensor, np.ndarray)) and leaf.ndim > 0 and len(leaf) == rows

    def list_of_rows(part: Any) -> bool:
        return isinstance(part, (list, tuple)) and len(part) == rows and not all(map(by_row, part))

    return nested_map(
        lambda part: part[:own] if by_row(part) or list_of_rows(part) else part, tree, is_leaf=list_of_rows
    )


def prefixed(metrics: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Metrics with ``prefix_`` in front of every name that does not begin with it.

    Where two would get one name, the one without the prefix counts.

    Example:
        >>> prefixed({"m": 1.5, "eval_k": 2}, "eval")
        {'eval_k': 2, 'eval_m': 1.5}

    Source: Trainer 4.57: ``evaluation_loop``.
    """
    have = {name: value for name, value in metrics.items() if name.startswith(f"{prefix}_")}
    return {**have, **{f"{prefix}_{name}": value for name, value in metrics.items() if name not in have}}


def denumpify(metrics: Any) -> Any:
    """Metrics with NumPy's numbers and tensors of one element as Python numbers; the rest stays.

    Example:
        >>> denumpify({"a": np.float32(0.5), "b": [torch.tensor([2])]})
        {'a': 0.5, 'b': [2]}

    Source: Trainer 4.57: ``denumpify_detensorize``.
    """

    def plain(leaf: Any) -> Any:
        one = isinstance(leaf, np.generic) or (isinstance(leaf, Tensor) and leaf.numel() == 1)
        return leaf.item() if one else leaf

    return nested_map(plain, metrics)


def preparation_seconds(metrics: Mapping[str, Any], prefix: str) -> float:
    """The seconds of an evaluation that went into preparing it, and not into running it.

    Example:
        >>> preparation_seconds({"eval_loss": 1.0, "eval_model_preparation_time": 0.25}, "eval")
        0.25
    """
    names = ("model_preparation_time", "jit_compilation_time")
    return float(sum(metrics.get(f"{prefix}_{name}", 0.0) for name in names))


def _check_metrics(metrics: Any) -> None:
    if isinstance(metrics, Mapping):
        wrong = [name for name, fn in metrics.items() if not callable(fn)]
        if wrong:
            raise TypeError(
                f"compute_metrics: {wrong[0]!r} is a {type(metrics[wrong[0]]).__name__}; expected a function "
                "(logits, labels) -> Metric, such as trainkit.metrics.accuracy"
            )


def _mapping(metrics: Any) -> Mapping[str, Any]:
    if not isinstance(metrics, Mapping):
        raise TypeError(f"compute_metrics: it returned a {type(metrics).__name__}; expected a dict of numbers by name")
    return metrics


def _values(metrics: Metrics) -> dict[str, Any]:
    """As numbers and lists of numbers, which every log can hold."""
    return {name: v.tolist() if isinstance(v, Tensor) else v for name, v in compute(metrics).items()}
