"""How long a run is, where it goes on, and how much there is in its batches: counts."""

from __future__ import annotations

import itertools
import math
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainkit.trainer import foreign
from trainkit.trainer.samplers import has_length
from trainkit.trainer.sharding import IterableDatasetShard

IGNORED = -100
"""The label of what counts for nothing."""


def run_length(
    args: Any, len_dataloader: int | None, num_examples: int, total_train_batch_size: int
) -> tuple[int, int, int, float, bool, int | None, int]:
    """How many passes and updates a run makes.

    With L batches per pass and GA of them per update, U = max(1, ceil(L / GA)) updates make a pass. By epochs:
    T = ceil(num_train_epochs * U) updates. By ``max_steps``: T of them, in ceil(T / U) passes; without a length in as
    many passes as it takes. ``max_steps=0`` is no update.

    Args:
        args: ``max_steps`` (negative: by epochs), ``num_train_epochs``, ``gradient_accumulation_steps``.
        len_dataloader: L on this process; None if it is not known.
        num_examples: rows of the data set.
        total_train_batch_size: rows per update over all processes.

    Returns: ``(num_train_epochs, num_update_steps_per_epoch, num_examples, num_train_samples, epoch_based,
        len_dataloader, max_steps)``.

    Raises: ValueError if the run is to be counted in epochs over data without length, or without one batch.

    Example:
        >>> from types import SimpleNamespace
        >>> args = SimpleNamespace(max_steps=-1, num_train_epochs=1.5, gradient_accumulation_steps=1)
        >>> run_length(args, 5, 10, 2)
        (2, 5, 10, 15.0, True, 5, 8)

    Source: Trainer 4.57: set_initial_training_values.
    """
    by_epochs, epochs = args.max_steps < 0, args.num_train_epochs
    if not len_dataloader and by_epochs:
        found = "no length" if len_dataloader is None else "no batch"
        raise ValueError(
            f"max_steps: got {args.max_steps}, but the training data have {found}, so that {epochs} epochs cannot be "
            "counted in updates; give a positive max_steps, or data with a length and at least one batch"
        )
    if not len_dataloader:
        samples = args.max_steps * total_train_batch_size
        passes = sys.maxsize if args.max_steps else 0
        return passes, max(args.max_steps, 1), samples, samples, False, len_dataloader, args.max_steps
    per_epoch = max(1, math.ceil(len_dataloader / args.gradient_accumulation_steps))
    if by_epochs:
        steps = math.ceil(epochs * per_epoch)
        return math.ceil(epochs), per_epoch, num_examples, num_examples * epochs, True, len_dataloader, steps
    passes, samples = math.ceil(args.max_steps / per_epoch), args.max_steps * total_train_batch_size
    return passes, per_epoch, num_examples, samples, False, len_dataloader, args.max_steps


def resume_position(global_step: int, updates_per_epoch: int, accumulation: int) -> tuple[int, int]:
    """Where a run goes on after ``global_step`` updates: in which pass, and after how many of its batches.

    Groups of batches never span passes, so this is (step div U, (step mod U) * GA).

    Args:
        global_step: completed updates.
        updates_per_epoch: U, at least 1.
        accumulation: GA, batches per update.

    Example:
        >>> resume_position(8, 3, 2)
        (2, 4)

    Source: Trainer 4.57: _inner_training_loop.
    """
    epochs, updates = divmod(global_step, updates_per_epoch)
    return epochs, updates * accumulation


def resume_position_in_stream(global_step: int, epoch: float, planned: int, accumulation: int) -> tuple[int, int]:
    """The same for data without a length, whose passes are as long as they turned out to be.

    Their fractional epoch counts the batches of a pass against those of all updates, and so tells both.

    Args:
        global_step: completed updates.
        epoch: that was reached.
        planned: updates of the run that reached it.
        accumulation: batches per update.

    Example:
        >>> resume_position_in_stream(5, 1.1, 10, 1), resume_position_in_stream(10, 1.0, 10, 1)
        ((1, 1), (0, 10))
    """
    whole = planned * accumulation
    if round(epoch * whole) == global_step * accumulation:
        return 0, global_step * accumulation
    first = math.floor(round(epoch * whole) / whole)
    return first, round((epoch - first) * whole)


def take_group(iterator: Iterator[Any], n: int) -> list[Any]:
    """The next ``n`` batches, or fewer where the iterator ends.

    Example:
        >>> take_group(iter("abc"), 2)
        ['a', 'b']

    Source: Trainer 4.57: get_batch_samples.
    """
    return list(itertools.islice(iterator, n))


def count_items(batches: Sequence[Any], label_key: str = "labels", *, shifted: bool = False) -> Tensor | None:
    """How many targets the loss of some batches is a mean over: labels that are not -100.

    A causal model compares the output at one position with the label of the next, so the first label of a row is no
    target; where a batch brings ``shift_labels``, the labels are shifted already and all of them count.

    Args:
        batches: mappings with a tensor under ``label_key``.
        label_key: name of the labels.
        shifted: whether the model leaves out the first label of each row.

    Returns: int64 scalar tensor where the labels are; None if there is nothing to count: no batches, no labels, or
        labels that are no tensors.

    Example:
        >>> batch = {"labels": torch.tensor([[5, 6, -100], [7, 8, 9]])}
        >>> count_items([batch]), count_items([batch], shifted=True)
        (tensor(5), tensor(3))

    Source: Trainer 4.57: get_batch_samples, which counts the first label of causal models too.
    """
    total: Tensor | None = None
    for batch in batches:
        labels = batch.get(label_key) if isinstance(batch, Mapping) else None
        if shifted and labels is not None:
            before = batch.get("shift_labels")
            labels = before if before is not None else labels[..., 1:] if isinstance(labels, Tensor) else labels
        if not isinstance(labels, Tensor) or labels.dim() == 0:
            return None
        found = (labels != IGNORED).sum()
        total = found if total is None else total + found.to(total.device)
    return total


def num_examples(dataloader: Any, batch_size: int) -> int:
    """Rows of the data set behind a loader, over all processes.

    Without a data set or its length: the batches of the loader times its own batch size.

    Args:
        dataloader: any loader.
        batch_size: for a loader that does not tell its own.

    Raises: TypeError if neither the data set nor the loader has a length.

    Example:
        >>> num_examples(torch.utils.data.DataLoader(range(10), batch_size=4), 8)
        10

    Source: Trainer 4.57: num_examples, which takes the batch size of training for any loader.
    """
    dataset: Any = getattr(dataloader, "dataset", None)
    dataset = dataset.dataset if isinstance(dataset, IterableDatasetShard) else dataset
    if has_length(dataset):
        return len(dataset)
    own = getattr(dataloader, "batch_size", None)
    if own is None:
        own = getattr(getattr(dataloader, "batch_sampler", None), "batch_size", None)
    return len(dataloader) * (own or batch_size)


def num_tokens(dataloader: Iterable[Any], max_steps: int | None = None) -> int:
    """Elements of ``input_ids`` in a loader; with ``max_steps`` those of its first batch times that.

    Args:
        dataloader: gives mappings.
        max_steps: batches to count; only the first is read. None counts one whole pass, which reads it.

    Returns: the count; where a batch has no ``input_ids``, with a warning that of the batches before it.

    Example:
        >>> num_tokens([{"input_ids": torch.ones(2, 4)}] * 3), num_tokens([{"input_ids": torch.ones(2, 4)}], 10)
        (24, 80)

    Source: Trainer 4.57: num_tokens.
    """
    total = 0
    for batch in dataloader:
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if ids is None:
            warnings.warn("num_tokens: a batch has no 'input_ids'; tokens are counted up to it", stacklevel=2)
            return total
        if max_steps is not None:
            return int(ids.numel()) * max_steps
        total += int(ids.numel())
    return total


def tokens_in(inputs: Any, model: Any, processing_class: Any, what: str | bool = "all") -> Tensor | int | None:
    """How many tokens of the model's main input a batch has.

    Args:
        inputs: a batch.
        model: its ``main_input_name`` is counted, "input_ids" by default.
        processing_class: its ``pad_token_id`` tells padding where there is no attention mask; may be None.
        what: "all" elements, or those that are not padding ("non_padding"); True and False are "all" and "no".

    Returns: a number; a scalar tensor on the device where it must be summed there; None for "no", or where the batch
        lacks the input.

    Example:
        >>> batch = {"input_ids": torch.tensor([[5, 0]]), "attention_mask": torch.tensor([[1, 0]])}
        >>> tokens_in(batch, None, None), tokens_in(batch, None, None, "non_padding")
        (2, tensor(1))

    Source: Trainer 4.57: _inner_training_loop.
    """
    name = getattr(foreign.unwrapped(model), "main_input_name", "input_ids")
    ids = inputs.get(name) if isinstance(inputs, Mapping) else None
    if what in ("no", False) or not isinstance(ids, Tensor):
        return None
    if what in ("all", True):
        return ids.numel()
    mask = inputs.get("attention_mask")
    if mask is not None:
        return torch.as_tensor(mask).sum()
    padding = getattr(processing_class, "pad_token_id", None)
    return ids.numel() if padding is None else (ids != padding).sum()
