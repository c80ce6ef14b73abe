"""Evaluation and prediction: the same losses, no update, constant memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from trainkit.accumulate import merge_metrics, num_rows
from trainkit.gradients import checked, weight_of
from trainkit.metrics import Mean
from trainkit.state import TrainState
from trainkit.types import Batch, Buffers, EvalFn, LossFn, Metrics, Params


def make_eval_step(loss: LossFn) -> EvalFn:
    """Metrics of a batch: ``loss`` as a mean, and those that the loss function returns.

    Give it a loss whose module runs in evaluation mode (``module_loss(..., training=False)``).

    Example:
        >>> from trainkit import LossOutput, init_state
        >>> from trainkit.optim import sgd
        >>> loss = lambda params, buffers, x: LossOutput((x - 1).square().sum(), x.shape[0])
        >>> state = init_state(torch.nn.Linear(2, 1), sgd(0.1))
        >>> make_eval_step(loss)(state, torch.tensor([3.0, 3.0]))["loss"].compute()
        tensor(4.)
    """

    @torch.no_grad()
    def evaluate(state: TrainState, batch: Batch) -> Metrics:
        num_rows(batch)
        out = checked(loss(state.params, state.buffers, batch))
        return {"loss": Mean(out.loss_sum, weight_of(out)), **out.metrics}

    return evaluate


def make_predict_step(predict: Callable[[Params, Buffers, Batch], Any]) -> Callable[[TrainState, Batch], Any]:
    """Outputs of a batch, without gradients: ``predict(params, buffers, batch)``.

    Example:
        >>> from trainkit import functional, init_state
        >>> from trainkit.optim import sgd
        >>> layer = torch.nn.Linear(2, 1)
        >>> model = functional(layer, training=False)
        >>> step = make_predict_step(lambda params, buffers, x: model(params, buffers, x)[0])
        >>> step(init_state(layer, sgd(0.1)), torch.ones(3, 2)).shape
        torch.Size([3, 1])
    """

    @torch.no_grad()
    def step(state: TrainState, batch: Batch) -> Any:
        return predict(state.params, state.buffers, batch)

    return step


def evaluate(step: EvalFn, state: TrainState, batches: Iterable[Batch]) -> Metrics:
    """Merge an evaluation over batches of any sizes: exact, in the memory of one batch.

    Raises: ValueError if there is no batch.
    """
    total: Metrics | None = None
    for batch in batches:
        metrics = step(state, batch)
        total = metrics if total is None else merge_metrics(total, metrics)
    if total is None:
        raise ValueError("batches: none came; evaluation needs at least one")
    return total
