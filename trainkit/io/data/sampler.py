"""Shuffled batches of a tensor's rows, read at an integer position."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from trainkit.io.data.order import epoch_order


def shuffled_batches(rows: Tensor, batch_size: int, *, seed: int, start: int = 0) -> Iterator[Tensor]:
    """Batches of rows without end, each epoch in its own order.

    Batch i holds the rows ``order[j * batch_size : (j + 1) * batch_size]`` of epoch e, with (e, j) = divmod(i, batches
    per epoch). So batch i needs one permutation and none of the batches before it. Rows that do not fill a batch at the
    end of an epoch are left out of it.

    Args:
        rows: tensor whose first axis counts the rows; a view will do, only a batch is copied.
        batch_size: rows per batch.
        seed: of the run.
        start: how many batches to leave out: the number that were trained on.

    Returns: an endless iterator of tensors of shape (batch_size, ...), in the dtype of ``rows``.

    Raises: ValueError if there are fewer rows than a batch needs, or ``start`` is negative.

    Example:
        >>> batches = shuffled_batches(torch.arange(4), 2, seed=0)
        >>> torch.cat([next(batches), next(batches)]).sort().values
        tensor([0, 1, 2, 3])
        >>> resumed = shuffled_batches(torch.arange(4), 2, seed=0, start=2)
        >>> torch.equal(next(batches), next(resumed))
        True
    """
    if not 1 <= batch_size <= len(rows):
        raise ValueError(f"batch_size: got {batch_size} for {len(rows)} rows, expected a number from 1 to {len(rows)}")
    if start < 0:
        raise ValueError(f"start: got {start}, expected the number of batches to leave out, at least 0")
    return _from(rows, batch_size, seed, start)


def _from(rows: Tensor, batch_size: int, seed: int, start: int) -> Iterator[Tensor]:
    first_epoch, first_batch = divmod(start, len(rows) // batch_size)
    for epoch in itertools.count(first_epoch):
        full = torch.split(epoch_order(len(rows), seed=seed, epoch=epoch), batch_size)[: len(rows) // batch_size]
        for chosen in full[first_batch if epoch == first_epoch else 0 :]:
            yield rows[chosen]
