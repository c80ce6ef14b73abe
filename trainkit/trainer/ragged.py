"""The end of a pass that does not divide among the processes: rows that only fill up a batch are not trained on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from trainkit.trainer.accumulate_predictions import batch_rows
from trainkit.trainer.dataloaders import TrainerDataLoader
from trainkit.trainer.evaluation import first_rows


class OwnRows:
    """The microbatches of one process, the last of a pass without the rows that fill it up.

    The batches of W processes are made equally large with rows from the start of the pass. Of R rows in the last batch
    of all processes, this one has r of its own. The mean over processes is the mean over the R rows if a loss, itself a
    mean over the r rows, counts ``share`` = r W / R. A process without a row of its own keeps one, which counts 0.

    Args:
        loader: the loader of the pass. One that is not the Trainer's own is passed on as it is.
        batches: what is left of its pass.
        rank: of this process.
        world: number of processes.

    Example:
        >>> import torch
        >>> from trainkit.trainer.dataloaders import make_dataloader
        >>> loader = make_dataloader(list(range(5)), batch_size=2, collate_fn=torch.tensor, rank=1, world=2)
        >>> [batch.tolist() for batch in loader]
        [[2, 3], [1, 2]]
        >>> own = OwnRows(loader, loader, 1, 2)
        >>> [(batch.tolist(), own.share) for batch in own]
        [([2, 3], 1.0), ([1], 0.0)]
    """

    def __init__(self, loader: Any, batches: Iterable[Any], rank: int, world: int) -> None:
        self._loader, self._batches, self._rank, self._world = loader, batches, rank, world
        self.share = 1.0

    def __iter__(self) -> Iterator[Any]:
        self.share = 1.0
        iterator = iter(self._batches)
        try:
            for batch in iterator:
                yield self._own(batch)
        finally:
            close = getattr(iterator, "close", None)
            if close is not None:
                close()

    def _own(self, batch: Any) -> Any:
        rows = self._rows_of_all()
        if rows is None:
            return batch
        size = self._loader.total_batch_size // self._world
        if batch_rows(batch) != size:
            return batch
        own = min(max(rows - self._rank * size, 0), size)
        self.share = own * self._world / rows
        return first_rows(batch, size, max(own, 1))

    def _rows_of_all(self) -> int | None:
        """Rows of the batch at hand over all processes, if it is the last and not whole."""
        loader = self._loader
        if not (isinstance(loader, TrainerDataLoader) and loader.end_of_dataloader and loader.remainder > 0):
            return None
        return int(loader.remainder)
