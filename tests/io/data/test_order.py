import math
import resource

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainkit.io.data.order import MATERIALISED_ROWS, RowOrder, epoch_order, permuted
from trainkit.rng import fold_in, make_key

SEEDS = st.integers(-(2**63), 2**64 - 1)


def upper_bound(degrees: int) -> float:
    """Where a chi-square statistic lies above once in about a million times (Wilson and Hilferty 1931)."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + 4.9 * math.sqrt(spread)) ** 3


def chi_square(counts: torch.Tensor) -> float:
    expected = counts.sum() / counts.numel()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("num_rows", [*range(1, 70), 97, 100, 121, 122, 1000, 4099])
def test_every_number_of_rows_is_permuted(num_rows: int) -> None:
    for epoch in range(3):
        rows = permuted(torch.arange(num_rows), num_rows, seed=7, epoch=epoch)
        assert torch.equal(rows.sort().values, torch.arange(num_rows))


@given(num_rows=st.integers(1, 2**62), seed=SEEDS, data=st.data())
def test_a_place_alone_is_that_place_of_the_whole(num_rows: int, seed: int, data: st.DataObject) -> None:
    places = data.draw(st.lists(st.integers(0, num_rows - 1), min_size=1, max_size=5, unique=True))
    together = permuted(torch.tensor(places), num_rows, seed=seed, epoch=3)
    assert bool(((together >= 0) & (together < num_rows)).all())
    assert len(set(together.tolist())) == len(places)
    for place, row in zip(places, together.tolist(), strict=True):
        assert permuted(torch.tensor([place]), num_rows, seed=seed, epoch=3).tolist() == [row]


@pytest.mark.parametrize("num_rows", [2, 3, 4, pytest.param(5, marks=pytest.mark.slow)])
def test_all_permutations_of_few_rows_come_equally_often(num_rows: int) -> None:
    repeats = 20 * math.factorial(num_rows)
    seen: dict[tuple[int, ...], int] = {}
    for epoch in range(repeats):
        order = tuple(RowOrder(num_rows, seed=1, shuffle=True).at(epoch, 0, num_rows).tolist())
        seen[order] = seen.get(order, 0) + 1
    counts = torch.zeros(math.factorial(num_rows), dtype=torch.float64)
    counts[: len(seen)] = torch.tensor(list(seen.values()), dtype=torch.float64)
    assert chi_square(counts) < upper_bound(counts.numel() - 1)


@pytest.mark.parametrize("num_rows", [1000, 10**9])
def test_neighbours_land_anywhere(num_rows: int) -> None:
    # Position against row, and the distance between two neighbours, each in 20 parts.
    parts = 20
    start = torch.arange(0, num_rows - 1, max(1, (num_rows - 1) // 20_000))
    columns = []
    for epoch in range(1 if num_rows > 10**6 else 20):
        row = permuted(start, num_rows, seed=3, epoch=epoch)
        after = permuted(start + 1, num_rows, seed=3, epoch=epoch)
        columns.append(torch.stack([start, row, (after - row) % num_rows]))
    position, row, distance = (torch.cat(columns, dim=1) * parts) // num_rows
    for a, b in ((position, row), (row, distance)):
        counts = torch.bincount(a * parts + b, minlength=parts * parts).double()
        assert chi_square(counts) < upper_bound(parts * parts - 1)


def test_epochs_and_seeds_give_other_orders() -> None:
    rows = torch.arange(1000)
    orders = [permuted(rows, 1000, seed=s, epoch=e) for s in range(3) for e in range(3)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            # As many fixed points as any two permutations have: one on average.
            assert int((a == b).sum()) < 12


@pytest.mark.parametrize("num_rows", [10, MATERIALISED_ROWS, MATERIALISED_ROWS + 1, 10**9])
@pytest.mark.parametrize("shuffle", [False, True])
def test_parts_of_an_order_are_those_of_the_whole(num_rows: int, shuffle: bool) -> None:
    order = RowOrder(num_rows, seed=1, shuffle=shuffle)
    start = max(0, num_rows - 5000)
    whole = order.at(2, start, num_rows)
    assert torch.equal(torch.cat([order.at(2, start, start + 7), order.at(2, start + 7, num_rows)]), whole)
    assert len(whole.unique()) == len(whole)
    assert shuffle or torch.equal(whole, torch.arange(start, num_rows))
    assert not shuffle or not torch.equal(order.at(3, start, num_rows), whole)


def test_a_billion_rows_are_ordered_in_constant_memory() -> None:
    # A permutation of them would be 8 GB.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    order = RowOrder(10**9, seed=1, shuffle=True)
    for epoch in range(2):
        for start in range(0, 10**9, 10**8):
            assert len(order.at(epoch, start, start + 4096)) == 4096
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_few_rows_are_in_the_order_of_a_random_permutation() -> None:
    assert torch.equal(RowOrder(100, seed=4, shuffle=True).at(6, 10, 20), epoch_order(100, seed=4, epoch=6)[10:20])


@pytest.mark.parametrize(
    ("positions", "num_rows", "named"),
    [([5], 5, "positions: got 5 to 5"), ([-1], 5, "positions"), ([0], 0, "num_rows")],
)
def test_what_is_out_of_range_is_refused(positions: list[int], num_rows: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        permuted(torch.tensor(positions), num_rows, seed=0, epoch=0)


def test_the_order_of_an_epoch_is_that_of_a_generator_seeded_by_seed_and_epoch() -> None:
    generator = torch.Generator().manual_seed(int(fold_in(make_key(7), 2)))
    before = torch.get_rng_state()
    assert torch.equal(epoch_order(100, seed=7, epoch=2), torch.randperm(100, generator=generator))
    assert torch.equal(before, torch.get_rng_state())
    orders = {tuple(epoch_order(50, seed=s, epoch=e).tolist()) for s in range(3) for e in range(3)}
    assert len(orders) == 9
