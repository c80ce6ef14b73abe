"""Streams that worker processes read: the order of the loop itself, whatever the number of processes is."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import datasets
import pytest
import torch
from torch.utils.data import IterableDataset, get_worker_info

from trainkit.io.data.loader import Loader

ROWS, BATCH = 11, 2


class Counted(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(ROWS))


class Divided(IterableDataset[int]):
    """Gives each worker process of a DataLoader a part of the rows, as torch's documentation shows it."""

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        return iter(range(ROWS)) if info is None else iter(range(info.id, ROWS, info.num_workers))


class Plain:
    """An iterable of no library."""

    def __iter__(self) -> Iterator[dict[str, int]]:
        return ({"x": row} for row in range(ROWS))


def sharded(num_shards: int) -> datasets.IterableDataset:
    return datasets.Dataset.from_dict({"x": list(range(ROWS))}).to_iterable_dataset(num_shards=num_shards)


def doubled(row: dict[str, int]) -> dict[str, int]:
    return {"x": 2 * row["x"]}


STREAMS: dict[str, Any] = {
    "one shard": lambda: sharded(1),
    "two shards": lambda: sharded(2),
    "five shards": lambda: sharded(5),
    "mapped shards": lambda: sharded(3).map(doubled),
    "shuffled shards": lambda: sharded(4).shuffle(seed=5, buffer_size=3),
    "torch": Counted,
    "torch, divided": Divided,
    "plain": Plain,
}


def rows_of(batch: Any) -> list[int]:
    return (batch["x"] if isinstance(batch, dict) else batch).tolist()


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("kind", STREAMS)
def test_resumed_after_every_batch_with_another_number_of_workers(kind: str, shuffle: bool) -> None:
    def make(workers: int, prefetch: int = 2) -> Loader:
        return Loader(
            STREAMS[kind](), batch_size=BATCH, window=4, shuffle=shuffle, workers=workers, prefetch=prefetch, seed=7
        )

    whole = [rows_of(batch) for batch in make(0).epochs(2)]
    factor = 2 if kind == "mapped shards" else 1
    for half in (whole[: len(whole) // 2], whole[len(whole) // 2 :]):
        assert sorted(itertools.chain(*half)) == [factor * row for row in range(ROWS)]
    assert [rows_of(batch) for batch in make(3).epochs(2)] == whole
    found: list[list[int]] = []
    state: dict[str, Any] = make(0).state_dict()
    turns = itertools.cycle([(1, 1), (2, 3), (0, 2), (5, 4)])
    for workers, prefetch in itertools.islice(turns, len(whole)):
        loader = make(workers, prefetch)
        loader.load_state_dict(state)
        batches = loader.epochs(2)
        found.append(rows_of(next(batches)))
        state = json.loads(json.dumps(loader.state_dict()))
        batches.close()
    assert found == whole
    last = make(2)
    last.load_state_dict(state)
    assert list(last.epochs(2)) == []


def test_a_number_of_batches_ends_between_the_rows_of_a_shard() -> None:
    def loader(workers: int) -> Loader:
        return Loader(sharded(5), batch_size=3, batches=9, shuffle=False, workers=workers)

    assert len([*loader(2)]) == 9
    assert all(torch.equal(a["x"], b["x"]) for a, b in zip(loader(0), loader(4), strict=True))
