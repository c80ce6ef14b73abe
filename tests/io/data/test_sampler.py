import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit.io.data.sampler import epoch_order, shuffled_batches
from trainkit.rng import fold_in, make_key

ROWS = torch.arange(11).unsqueeze(1) * torch.tensor([1, 100])


def take(n: int, *, seed: int = 0, start: int = 0, batch_size: int = 3) -> list[torch.Tensor]:
    return list(itertools.islice(shuffled_batches(ROWS, batch_size, seed=seed, start=start), n))


@given(start=st.integers(0, 20), batch_size=st.integers(1, 11), seed=st.integers(-(2**63), 2**63 - 1))
@settings(max_examples=50, deadline=None)
def test_resuming_gives_the_batches_that_were_left(start: int, batch_size: int, seed: int) -> None:
    whole = take(start + 5, seed=seed, batch_size=batch_size)
    resumed = take(5, seed=seed, start=start, batch_size=batch_size)
    assert all(torch.equal(a, b) for a, b in zip(whole[start:], resumed, strict=True))


def test_a_late_position_is_reached_without_the_batches_before_it() -> None:
    # A billion batches could not be drained.
    position = 10**9
    (late,) = take(1, seed=4, start=position)
    epoch, index = divmod(position, 3)
    assert torch.equal(late, ROWS[epoch_order(11, seed=4, epoch=epoch)[3 * index : 3 * index + 3]])


def test_an_epoch_shows_a_row_once_and_leaves_out_what_fills_no_batch() -> None:
    for epoch in range(3):
        shown = torch.cat(take(3, start=3 * epoch))[:, 0].tolist()
        assert len(shown) == len(set(shown)) == 9


def test_the_order_is_that_of_a_generator_seeded_by_seed_and_epoch() -> None:
    generator = torch.Generator().manual_seed(int(fold_in(make_key(7), 2)))
    assert torch.equal(epoch_order(100, seed=7, epoch=2), torch.randperm(100, generator=generator))


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(epoch_order(50, seed=s, epoch=e).tolist()) for s in range(3) for e in range(3)}
    assert len(orders) == 9


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    before = torch.get_rng_state()
    first = take(4)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    assert all(torch.equal(a, b) for a, b in zip(first, take(4), strict=True))


@pytest.mark.parametrize("batch_size", [0, 12])
def test_a_batch_that_the_rows_do_not_fill_is_refused_at_once(batch_size: int) -> None:
    with pytest.raises(ValueError, match=f"batch_size: got {batch_size} for 11 rows"):
        shuffled_batches(ROWS, batch_size, seed=0)


def test_a_negative_start_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="start: got -1"):
        shuffled_batches(ROWS, 2, seed=0, start=-1)
