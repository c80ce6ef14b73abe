"""Exact accumulation of gradients over microbatches of any sizes and weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from trainkit import rng, tree
from trainkit.gradients import sums
from trainkit.state import TrainState, remember_step
from trainkit.types import Batch, GradientFn, Gradients, Metrics


def accumulate(gradient: GradientFn, n: int | None = None) -> GradientFn:
    """Sum the gradients, weights and metrics of microbatches.

    G = sum_i g_i,  W = sum_i w_i;  G / W is the gradient of the mean over the whole batch, for any split.

    Buffers pass from one microbatch to the next, as in a plain loop; the key of microbatch i is ``fold_in(key, i)``.

    Args:
        gradient: any GradientFn.
        n: how many parts to split a batch into, along the first axis of its tensors (sizes differ by at most one
            row). None: the batch is a sequence of microbatches already, of any lengths.

    Returns: a function ``(state, batch) -> Gradients`` with the memory of one microbatch's activations.

    Raises:
        ValueError: ``n`` is not positive; when called, the batch has fewer rows than ``n``, or no microbatch.

    Example:
        >>> from trainkit import LossOutput, init_state, value_and_grad
        >>> from trainkit.optim import sgd
        >>> loss = lambda params, buffers, x: LossOutput((params["weight"] * x).sum(), x.shape[0])
        >>> state = init_state(torch.nn.Linear(2, 1, bias=False), sgd(0.1))
        >>> accumulate(value_and_grad(loss), 2)(state, torch.ones(3, 2)).grads["weight"]
        tensor([[3., 3.]])

    Source: the sum-and-count form of flax's ``examples/lm1b/train.py``; matches ``gradient_accumulation_steps`` with
    ``num_items_in_batch`` of transformers 4.57.
    """
    if n is not None and n < 1:
        raise ValueError(f"n: got {n}, expected at least 1 microbatch")

    def accumulated(state: TrainState, batch: Batch) -> Gradients:
        parts = _sequence(batch) if n is None else split_batch(batch, n)
        with tree.temporaries():
            total = sums(gradient(_of_microbatch(state, 0), parts[0]))
            for i, part in enumerate(parts[1:], start=1):
                one = sums(gradient(_of_microbatch(state.replace(buffers=total.buffers), i), part))
                total = add_gradients(total, one)
        return total

    return accumulated


def add_gradients(total: Gradients, one: Gradients) -> Gradients:
    """The gradients of two batches together; ``buffers`` are those of the later one.

    A parameter that only one of them has a gradient of keeps that one.
    """
    names, others = tree.named(total.grads), tree.named(one.grads)
    both = [name for name in names if name in others]
    summed = tree.writable([names[name] for name in both])
    addends = [others[name] for name in both]
    if not tree.has_foreach():
        summed = [a + b for a, b in zip(summed, addends, strict=True)]
    elif both:
        torch._foreach_add_(summed, addends)
    grads = {**others, **names, **dict(zip(both, summed, strict=True))}
    return Gradients(
        grads=tree.like(total.grads, summed) if len(both) == len(grads) else tree.frozen(grads),
        loss_sum=total.loss_sum + one.loss_sum,
        weight=total.weight + one.weight,
        metrics=merge_metrics(total.metrics, one.metrics),
        buffers=one.buffers,
    )


def merge_metrics(a: Metrics, b: Metrics) -> Metrics:
    """Merge metrics name by name; a name that only one part has passes through.

    Example:
        >>> from trainkit.metrics import Mean
        >>> one = {"loss": Mean(torch.tensor(2.0), torch.tensor(1.0))}
        >>> merge_metrics(one, one)["loss"].total
        tensor(4.)
    """
    merged = dict(a)
    for name, metric in b.items():
        merged[name] = merged[name].merge(metric) if name in merged else metric
    return merged


def split_batch(batch: Batch, n: int) -> list[Batch]:
    """Cut a batch into ``n`` microbatches along the first axis; sizes differ by at most one row.

    Tensors without axes go to every part whole.

    Raises: ValueError for fewer rows than ``n``, or tensors that disagree about the number of rows.

    Example:
        >>> [len(part["x"]) for part in split_batch({"x": torch.arange(5)}, 2)]
        [3, 2]
    """
    rows = num_rows(batch)
    if rows < n:
        raise ValueError(f"batch: {rows} rows cannot make {n} microbatches; use n <= {rows} or a larger batch")
    flat, spec = pytree.tree_flatten(batch)
    columns: list[Sequence[Any]] = [
        leaf.tensor_split(n) if isinstance(leaf, Tensor) and leaf.dim() else [leaf] * n for leaf in flat
    ]
    return [pytree.tree_unflatten(list(part), spec) for part in zip(*columns, strict=True)]


def num_rows(batch: Batch) -> int:
    """The size of the first axis that all tensors of the batch share.

    Raises: ValueError if there is none, if it is zero, or if tensors disagree.
    """
    sizes = {leaf.shape[0] for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()}
    if len(sizes) != 1:
        raise ValueError(
            f"batch: its tensors have {sorted(sizes) or 'no'} rows along the first axis, expected one common number"
        )
    (rows,) = sizes
    if not rows:
        raise ValueError("batch: it has no rows; drop empty batches in the loader")
    return rows


def _sequence(batch: Batch) -> Sequence[Batch]:
    if not isinstance(batch, (list, tuple)) or not batch:
        raise ValueError(
            f"batch: got {type(batch).__name__}{' of length 0' if isinstance(batch, (list, tuple)) else ''}, expected "
            "a non-empty list of microbatches; pass n to split one batch"
        )
    return batch


def _of_microbatch(state: TrainState, i: int) -> TrainState:
    part = state.replace(key=rng.fold_in(state.key, i))
    remember_step(state, part, updates=0)
    return part
