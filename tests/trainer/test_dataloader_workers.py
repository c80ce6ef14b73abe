"""Worker processes of the loader: the same batches, draws that can be repeated, and no process left over."""

from __future__ import annotations

import os
import random
import signal
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import RandomSampler

from tests.trainer.rows import Counted, Stream, loader_of, same
from tests.trainer.tiny import make_rows


def drawn(rows: list[Any]) -> Any:
    values = torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
    return {"rows": [int(row["labels"]) for row in rows], "drawn": torch.tensor(values)}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_draws_nothing_itself(workers: int) -> None:
    data = make_rows(8)
    loader = loader_of(data, sampler=RandomSampler(data), workers=workers)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index] # noqa: NPY002
    list(loader)
    after_it = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index] # noqa: NPY002
    assert torch.equal(before[0], after_it[0]) and before[1:] == after_it[1:]


def test_what_workers_draw_follows_from_seed_epoch_and_batch() -> None:
    data = make_rows(12)
    one = loader_of(data, collate_fn=drawn, workers=1)
    two = loader_of(data, collate_fn=drawn, workers=2)
    torch.rand(5)
    epochs = [list(one) for _ in range(2)]
    assert same([list(two) for _ in range(2)], epochs)
    values = {float(value) for epoch in epochs for batch in epoch for value in batch["drawn"]}
    assert len(values) == 2 * 6 * 3
    two.set_epoch(1)
    two.skip(4)
    assert same(list(two), epochs[1][4:])
    other = loader_of(data, collate_fn=drawn, workers=1, rank=1, world=2)
    assert not same(next(iter(other))["drawn"], epochs[0][0]["drawn"])
    evaluation = loader_of(data, collate_fn=drawn, workers=1, is_training=False)
    assert same(list(evaluation), list(evaluation))


def test_workers_of_a_stream_draw_anew_in_each_epoch() -> None:
    def collate(rows: list[Any]) -> Any:
        return torch.rand(1)

    loader = loader_of(Stream(4), collate_fn=collate, workers=1)
    passes = [torch.cat(list(loader)) for _ in range(2)]
    assert len(torch.cat(passes).unique()) == 4
    loader.set_epoch(0)
    assert torch.equal(torch.cat(list(loader)), passes[0])


class Pids(Counted):
    def __getitem__(self, i: int) -> Any:
        return {"x": i, "pid": os.getpid()}


def test_persistent_workers_go_on_and_give_the_same() -> None:
    data = Pids(8)
    loader = loader_of(data, sampler=RandomSampler(data), workers=2, persistent_workers=True)
    other = loader_of(data, sampler=RandomSampler(data))
    pids = []
    for epoch in (None, None, None, 9, 9, None):
        if epoch is not None:
            loader.set_epoch(epoch)
            other.set_epoch(epoch)
        batches = list(loader)
        assert same([batch["x"] for batch in batches], [batch["x"] for batch in other])
        pids.append({int(pid) for batch in batches for pid in batch["pid"]})
    assert pids[0] == pids[1] == pids[2] != pids[3] and len(pids[0]) == 2
    assert pids[4] == pids[5]
    # A pass that is left early.
    next(iter(loader))
    loader.set_epoch(0)
    other.set_epoch(0)
    assert same([batch["x"] for batch in loader], [batch["x"] for batch in other])
    last = set.union(*pids)
    del loader
    assert all(_has_ended(pid) for pid in last)


def _has_ended(pid: int) -> bool:
    until = time.monotonic() + 5
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


def test_persistent_workers_end_where_the_data_set_has_epochs() -> None:
    class Epochs(Pids):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __getitem__(self, i: int) -> Any:
            return {"x": i, "pid": self.epoch}

    loader = loader_of(Epochs(4), workers=1, persistent_workers=True)
    assert [[int(batch["pid"][0]) for batch in loader] for _ in range(3)] == [[0, 0], [1, 1], [2, 2]]


def test_workers_end_with_the_pass_and_outlive_a_stop_signal() -> None:
    loader = loader_of(Pids(8), workers=2)
    batches = iter(loader)
    pids = {int(next(batches)["pid"][0]), int(next(batches)["pid"][0])}
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    assert len(list(batches)) == 2
    assert all(_has_ended(pid) for pid in pids)
    batches = iter(loader)
    pids = {int(next(batches)["pid"][0])}
    batches.close()  # type: ignore[attr-defined]
    assert all(_has_ended(pid) for pid in pids)


class Broken(Counted):
    def __getitem__(self, i: int) -> Any:
        if i == 3:
            raise KeyError("broken")
        return super().__getitem__(i)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_data_is_raised_in_its_turn(workers: int) -> None:
    batches = iter(loader_of(Broken(6), workers=workers))
    next(batches)
    with pytest.raises(KeyError, match="broken"):
        next(batches)


def test_empty_data_give_no_batch() -> None:
    for workers in (0, 1):
        loader = loader_of([], workers=workers, persistent_workers=workers > 0)
        assert list(loader) == [] == list(loader)
        assert len(loader) == 0


def test_batches_come_on_their_device() -> None:
    for workers in (0, 1):
        for batch in loader_of(make_rows(4), device="meta", workers=workers):
            assert batch["x"].device.type == "meta"
