"""Orders and draws as literal numbers: a change of any of them would change the data of runs that are resumed.

If one of these has to change, the format of positions (``position.FORMAT``) has to change with it.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

from trainkit.io.data.batching import Batching, Windows
from trainkit.io.data.collate import masked_lm_batch
from trainkit.io.data.loader import Loader
from trainkit.io.data.mixing import Deal
from trainkit.io.data.order import RowOrder, epoch_order
from trainkit.io.data.packing import PackedStream
from trainkit.io.data.position import FORMAT

MANY = 1 << 20


def digest(numbers: Any) -> str:
    return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()[:16]


class Drawing(IterableDataset[int]):
    """A stream without a state that draws before and while it is read."""

    def __iter__(self) -> Iterator[int]:
        order = list(range(200))
        random.shuffle(order)
        return (row + 1000 * random.randrange(1000) for row in order)


class Documents:
    """A document of one to four drawn tokens for each row of a stream."""

    def __iter__(self) -> Iterator[list[int]]:
        return ([row % 1000] * (1 + row % 4) for row in Drawing())


def drawn(rows: list[int]) -> torch.Tensor:
    values = [random.random(), np.random.rand(), float(torch.rand((), dtype=torch.float64))]  # noqa: NPY002
    return torch.tensor(values, dtype=torch.float64)


def test_positions_have_the_format_that_these_numbers_are_of() -> None:
    assert FORMAT == 1


@pytest.mark.parametrize(
    ("seed", "epoch", "rows", "expected"),
    [
        (0, 0, 10, ([8, 7, 3, 1, 5, 9], "3b830450bc5a65a0")),
        (7, 3, 1000, ([711, 0, 662, 799, 266, 83], "410ea947abaf8bb0")),
        (2**64 - 1, 1, MANY, ([253562, 1004958, 249341, 47175, 947969, 886022], "598f55864fab904d")),
    ],
)
def test_the_order_of_few_rows(seed: int, epoch: int, rows: int, expected: Any) -> None:
    order = epoch_order(rows, seed=seed, epoch=epoch)
    assert (order[:6].tolist(), digest(order.tolist())) == expected
    assert torch.equal(RowOrder(rows, seed=seed, shuffle=True).at(epoch, 0, rows), order)


@pytest.mark.parametrize(
    ("seed", "epoch", "rows", "expected"),
    [
        (0, 0, MANY + 1, ([467201, 156972, 639467], "5552e95500d9d6f0")),
        (7, 3, 10**9, ([719664912, 402091446, 335841260], "b3475ce4cda17bcf")),
        (-5, 1, 2**62, ([2462165564925804842, 333245775567331927, 4341879928239937413], "ed1d8b835b62f2aa")),
    ],
)
def test_the_order_of_many_rows(seed: int, epoch: int, rows: int, expected: Any) -> None:
    order = RowOrder(rows, seed=seed, shuffle=True)
    first, last = order.at(epoch, 0, 4096), order.at(epoch, rows - 4096, rows)
    assert (first[:3].tolist(), digest([first.tolist(), last.tolist()])) == expected


def test_the_batches_of_a_window_that_is_grouped_by_length() -> None:
    lengths = torch.arange(4096) * 7 % 100
    plan = Batching(batch_size=32, group=True, shuffle=True, seed=3)
    batches = Windows(RowOrder(4096, seed=3, shuffle=True), plan, lengths).batches(2, 0)
    assert digest([batch.tolist() for batch in batches]) == "2c4b65f9caf2d250"


def test_the_order_of_a_mixture() -> None:
    assert digest(Deal([3, 1, 2], seed=5).at(1_000_000, 1_000_060).tolist()) == "f7bed2fdf18b60ae"


def test_the_rows_and_the_order_of_a_stream_that_draws() -> None:
    batches = Loader(Drawing(), batch_size=8, window=64, seed=3).epochs(2)
    assert digest([batch.tolist() for batch in batches]) == "6dddb538723fbb82"


@pytest.mark.parametrize(
    ("method", "expected"), [("best_fit", "b892bbb8013eb372"), ("concatenate", "6f0b6ebe153e2cb9")]
)
def test_the_rows_of_a_packed_stream(method: Any, expected: str) -> None:
    rows = PackedStream(Documents(), 16, method=method, window=50, seed=3)
    assert digest([[row[name].tolist() for name in ("input_ids", "segment_ids")] for row in rows]) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.6001321226990199, 0.27470917748643375, 0.6043866457833768]),
        ({"rank": 1, "world": 2}, [0.20964653708150438, 0.050292959157539174, 0.9999769747360769]),
    ],
)
def test_what_a_collator_draws(options: dict[str, int], expected: list[float]) -> None:
    batches = Loader(list(range(20)), batch_size=5, seed=3, collate=drawn, **options).epochs(2)
    assert list(batches)[6].tolist() == expected


def test_what_is_masked() -> None:
    rows = [{"input_ids": list(range(10, 210))}]
    batch = masked_lm_batch(rows, seed=3, position=(1, 2), mask_id=1, vocab_size=500, pad_id=0)
    assert digest(batch["input_ids"].tolist()) == "d322fdbadfab934e"
