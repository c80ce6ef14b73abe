"""What the processes of an evaluation share: rows, losses and metrics, each row once."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from trainkit.accumulate import merge_metrics
from trainkit.types import Metrics

# Losses stay on the device until so many have come: one transfer instead of one per batch.
_LOSSES_AT_ONCE = 256


@dataclass(frozen=True)
class Ranks:
    """How the processes of an evaluation put their results together; the defaults are those of one process.

    Args:
        world: how many there are.
        pad: ``(tree, dim, value)``: each tensor filled up to the largest size over the ranks.
        gather: the rows of all ranks, one rank after the other, without those that only fill up the last batch.
        all_gather: the same of one tensor, with all rows.
        own_rows: how many of the rows of the batch at hand only this rank has (the first ones are these), from their
            number; None where no rank has others.
        is_last: whether the batch at hand is the last; None if nobody knows before.
    """

    world: int = 1
    pad: Callable[[Any, int, int], Any] = lambda tree, dim, value: tree
    gather: Callable[[Any], Any] = lambda tree: tree
    all_gather: Callable[[Tensor], Tensor] = lambda tensor: tensor
    own_rows: Callable[[int], int | None] = lambda rows: None
    is_last: Callable[[], bool] | None = None


def ranks_of(accelerator: Any, dataloader: Any, gather: Callable[[Any], Any] | None = None) -> Ranks:
    """The processes of an ``accelerate.Accelerator``.

    Args:
        accelerator: that prepared the loader.
        dataloader: one that is not prepared is taken to have no row twice.
        gather: in place of ``accelerator.gather_for_metrics``, where there are several.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    if not (hasattr(dataloader, "end_of_dataloader") and hasattr(dataloader, "remainder")):
        # accelerate would take the end of the training's loader for that of this one, and cut rows off.
        return Ranks() if world == 1 else Ranks(world, _padding(accelerator), accelerator.gather, accelerator.gather)

    def is_last() -> bool:
        return bool(getattr(dataloader, "is_last", dataloader.end_of_dataloader))

    def own_rows(rows: int) -> int | None:
        if not dataloader.end_of_dataloader or dataloader.remainder <= 0:
            return None
        return int(min(max(dataloader.remainder - rank * rows, 0), rows))

    if world == 1:
        return Ranks(is_last=is_last)
    return Ranks(
        world=world,
        pad=_padding(accelerator),
        gather=gather or accelerator.gather_for_metrics,
        all_gather=accelerator.gather,
        own_rows=own_rows,
        is_last=is_last,
    )


def _padding(accelerator: Any) -> Callable[[Any, int, int], Any]:
    return lambda tree, dim, value: accelerator.pad_across_processes(tree, dim=dim, pad_index=value)


class Losses:
    """The loss, weight and rows of every batch on this rank."""

    def __init__(self) -> None:
        self._open: list[tuple[Tensor, Tensor | float]] = []
        self._closed: list[Tensor] = []
        self._rows = array("q")
        self._device = torch.device("cpu")

    def add(self, loss: Any, weight: Tensor | float, rows: int) -> None:
        value = torch.as_tensor(loss).detach()
        # A new tensor, also of one number: a graph that is replayed writes into the old one again.
        mean = (value if value.dtype == torch.float64 else value.float()).mean()
        self._device = mean.device
        self._open.append((mean, weight))
        self._rows.append(rows)
        if len(self._open) == _LOSSES_AT_ONCE:
            self._close()

    def _close(self) -> None:
        losses = torch.stack([loss for loss, _ in self._open])
        weights = torch.stack([torch.as_tensor(weight, device=losses.device).reshape(()) for _, weight in self._open])
        # Waits for the device.
        self._closed.append(torch.stack([losses.cpu().double(), weights.cpu().double()], dim=1))
        self._open = []

    def table(self, ranks: Ranks) -> Table | None:
        """Of all ranks, as arrays [rank, batch]; None without a loss."""
        if self._open:
            self._close()
        if not self._closed:
            return None
        own = torch.cat([torch.cat(self._closed), torch.tensor(self._rows).double().unsqueeze(1)], dim=1)
        if ranks.world > 1:
            even = ranks.pad(own.to(self._device), 0, 0)
            own = ranks.all_gather(even).reshape(ranks.world, -1, 3).cpu()
        columns = own.reshape(ranks.world, -1, 3).numpy()
        return Table(columns[..., 0], columns[..., 1], columns[..., 2].astype(np.int64))


@dataclass(frozen=True)
class Table:
    losses: np.ndarray[Any, Any]
    weights: np.ndarray[Any, Any]
    rows: np.ndarray[Any, Any]


def mean_loss(table: Table) -> float:
    """sum_b rows_b * l_b / sum_b rows_b, where l_b is the weighted mean over ranks; a loss of no weight may be NaN."""
    parts = np.zeros_like(table.losses)
    np.multiply(table.losses, table.weights, where=table.weights > 0, out=parts)
    weights = table.weights.sum(axis=0)
    counted = weights > 0
    if not counted.any():
        return float("nan")
    rows = table.rows.sum(axis=0)[counted]
    return float((parts.sum(axis=0)[counted] / weights[counted] * rows).sum() / rows.sum())


def loss_per_row(table: Table | None, concat: bool) -> Any:
    """The loss of each row, which is that of its batch on its rank, in the order of the predictions."""
    if table is None:
        return None
    losses, rows = table.losses.astype(np.float32), table.rows
    if concat:
        return np.repeat(losses.T.reshape(-1), rows.T.reshape(-1))
    return [np.repeat(one, n) for one, n in zip(losses.T, rows.T, strict=True)]


def over_ranks(metrics: Metrics, ranks: Ranks) -> Metrics:
    """Metrics of all ranks as one."""
    if ranks.world == 1:
        return metrics
    states, structure = pytree.tree_flatten(metrics)
    foreign = [state for state in states if not isinstance(state, Tensor)]
    if foreign:
        raise TypeError(
            f"compute_metrics: a metric holds a {type(foreign[0]).__name__}, which ranks cannot exchange; expected a "
            "frozen dataclass of tensors, made known by trainkit.metrics.register"
        )
    every = [ranks.all_gather(state.unsqueeze(0)) for state in states]
    parts = [pytree.tree_unflatten([state[rank] for state in every], structure) for rank in range(ranks.world)]
    return functools.reduce(merge_metrics, parts)
