"""Batches on a GPU. How they come one ahead is tested with the meta device in ``test_loader.py``."""

from __future__ import annotations

import pytest
import torch

from trainkit.io.data.loader import Loader

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("workers", [0, 2])
def test_memory_is_not_given_away_before_the_loop_is_done_with_it(workers: int) -> None:
    rows = torch.arange(64 * 250_000, dtype=torch.float32).view(64, 250_000)
    loader = Loader(rows, batch_size=4, seed=1, device="cuda", workers=workers)
    expected = [batch.double().sum() for batch in Loader(rows, batch_size=4, seed=1).epochs(2)]
    stream, found = torch.cuda.Stream(), []
    with torch.cuda.stream(stream):
        for batch in loader.epochs(2):
            # The loop is far behind, so that the memory of a batch would be taken for the next one if nobody held it.
            torch.cuda._sleep(50_000_000)
            found.append(batch.double().sum())
            del batch
    torch.cuda.synchronize()
    assert [float(a) for a in found] == [float(b) for b in expected]


def test_a_copy_does_not_wait_for_the_loop() -> None:
    batches = iter(Loader([torch.zeros(1000)] * 8, batch_size=2, device="cuda"))
    first = next(batches)
    torch.cuda._sleep(2_000_000_000)
    busy = torch.cuda.Event()
    busy.record()
    second = next(batches)
    assert first.is_cuda and second.is_cuda
    # Two batches came while the loop's stream was still at work.
    assert not busy.query()


def test_what_a_collator_makes_on_the_gpu_is_complete_when_it_comes() -> None:
    def collate(rows: list[int]) -> dict[str, torch.Tensor]:
        torch.cuda._sleep(50_000_000)
        return {"made": torch.tensor(rows, device="cuda") * 2, "host": torch.tensor(rows)}

    for i, batch in enumerate(Loader(list(range(12)), batch_size=3, shuffle=False, device="cuda", collate=collate)):
        assert batch["made"].tolist() == [2 * (3 * i + j) for j in range(3)]
        assert batch["host"].tolist() == [3 * i + j for j in range(3)]
