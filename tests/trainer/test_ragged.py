"""The end of a pass that does not divide among processes: each row once, and weights that make a mean over all rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset

from trainkit.trainer.dataloaders import make_dataloader
from trainkit.trainer.ragged import OwnRows


class Stream(IterableDataset[int]):
    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Any:
        return iter(range(self.n))


def of_ranks(data: Any, world: int, size: int, drop_last: bool = False) -> list[list[tuple[list[int], float]]]:
    found = []
    for rank in range(world):
        loader = make_dataloader(
            data, batch_size=size, collate_fn=torch.tensor, rank=rank, world=world, drop_last=drop_last
        )
        own = OwnRows(loader, loader, rank, world)
        found.append([(batch.tolist(), own.share) for batch in own])
    return found


@given(n=st.integers(1, 30), world=st.integers(2, 4), size=st.integers(1, 4), stream=st.booleans())
def test_each_row_counts_once_and_the_mean_over_processes_is_that_over_rows(
    n: int, world: int, size: int, stream: bool
) -> None:
    ranks = of_ranks(Stream(n) if stream else list(range(n)), world, size)
    assert len({len(batches) for batches in ranks}) == 1
    seen: list[int] = []
    for together in zip(*ranks, strict=True):
        rows = [row for batch, share in together if share for row in batch]
        seen += rows
        mean = sum(share * sum(batch) / len(batch) for batch, share in together) / world
        assert mean == pytest.approx(sum(rows) / len(rows))
        # A process without rows of its own still takes part.
        assert all(batch for batch, _ in together)
    assert seen == list(range(n))


def test_without_the_last_batch_nothing_is_cut() -> None:
    ranks = of_ranks(list(range(11)), 2, 2, drop_last=True)
    assert ranks == [[([0, 1], 1.0), ([4, 5], 1.0)], [([2, 3], 1.0), ([6, 7], 1.0)]]


def test_other_loaders_and_batches_of_other_rows_are_passed_on() -> None:
    loader: DataLoader[int] = DataLoader(list(range(3)), batch_size=2)  # type: ignore[arg-type]
    assert [batch.tolist() for batch in OwnRows(loader, loader, 0, 2)] == [[0, 1], [2]]
    packed = make_dataloader(
        list(range(5)), batch_size=2, collate_fn=lambda rows: torch.tensor([rows]), rank=1, world=2
    )
    own = OwnRows(packed, packed, 1, 2)
    assert [(batch.tolist(), own.share) for batch in own] == [([[2, 3]], 1.0), ([[1, 2]], 1.0)]


def test_leaving_early_closes_the_loader() -> None:
    closed = []

    def batches() -> Any:
        try:
            yield from range(3)
        finally:
            closed.append(True)

    iterator = iter(OwnRows(None, batches(), 0, 2))
    assert next(iterator) == 0
    iterator.close()  # type: ignore[attr-defined]
    assert closed == [True]
