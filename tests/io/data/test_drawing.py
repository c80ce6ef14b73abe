"""Data whose own code draws from the global generators: rows and order are the same after any resumption."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from trainkit.io.data.loader import Loader
from trainkit.io.data.mixing import mix
from trainkit.io.data.packing import PackedStream


class Numbers(IterableDataset[int]):
    """A stream of numbers."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows


class WithState(Numbers):
    """A stream with a state, which draws at each row."""

    place = 0

    def __iter__(self) -> Iterator[int]:
        while self.place < self.num_rows:
            self.place += 1
            yield self.place - 1 + 1000 * random.randrange(1000)
        self.place = 0

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


class Shuffled(Numbers):
    """Draws its order when it begins."""

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.num_rows))
        random.shuffle(order)
        return iter(order)


class Dropping(Numbers):
    """Draws its order, and at each row whether to give it."""

    def __iter__(self) -> Iterator[int]:
        for row in torch.randperm(self.num_rows).tolist():
            if random.random() + np.random.rand() < 1:  # noqa: NPY002
                yield row


class Noisy(Dataset[int]):
    """Map-style rows that are drawn."""

    def __len__(self) -> int:
        return 300

    def __getitem__(self, row: int) -> int:
        return row + 1000 * random.randrange(1000)


class Documents:
    """A document of one to three tokens for each row of a stream."""

    def __init__(self, rows: Numbers) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[list[int]]:
        return ([row] * (1 + row % 3) for row in self.rows)


DRAWN: dict[str, Any] = {
    "with a state": lambda: WithState(150),
    "shuffled": lambda: Shuffled(150),
    "dropping": lambda: Dropping(300),
    "mixed": lambda: mix([Dropping(90), WithState(40), Shuffled(70)], [3, 1, 2]),
    "mixed with rows": lambda: mix([WithState(40), Noisy()], [1, 3]),
    "packed": lambda: PackedStream(Documents(Dropping(300)), 5, window=7),
    "packed end to end": lambda: PackedStream(Documents(Dropping(300)), 5, method="concatenate"),
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("kind", DRAWN)
def test_a_stream_that_draws_draws_the_same_when_resumed(kind: str, shuffle: bool, workers: int) -> None:
    def make(workers: int = 0, seed: int = 3) -> Loader:
        return Loader(DRAWN[kind](), batch_size=8, window=16, shuffle=shuffle, seed=seed, batches=40, workers=workers)

    def drained(loader: Loader, stop: int | None = None) -> list[list[Any]]:
        rows = itertools.islice(loader, stop)
        return [(batch["input_ids"] if isinstance(batch, dict) else batch).tolist() for batch in rows]

    random.seed(1)
    before = random.getstate()
    whole = drained(make())
    assert random.getstate() == before
    assert kind.startswith("packed") or drained(make(seed=4)) != whole
    if kind == "shuffled":
        passes = list(itertools.chain(*whole))[:150]
        assert sorted(passes) == list(range(150)) != passes
    for stop in (1, 2, 9, 17, 30) if workers == 0 else (9,):
        random.seed(stop)
        np.random.seed(stop)  # noqa: NPY002
        torch.manual_seed(stop)
        loader = make(workers)
        head = drained(loader, stop)
        resumed = make()
        resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
        assert head + drained(resumed) == whole
