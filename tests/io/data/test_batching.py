import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainkit.io.data.batching import Batching, Windows, rank_part
from trainkit.io.data.order import RowOrder

LENGTHS = st.lists(st.integers(0, 30), min_size=1, max_size=60)


def epoch_batches(windows: Windows, epoch: int) -> list[list[int]]:
    return [rows.tolist() for window in range(windows.num_windows) for rows in windows.batches(epoch, window)]


@given(lengths=LENGTHS, batching=st.booleans(), group=st.booleans(), window=st.integers(1, 20), data=st.data())
def test_every_row_is_in_one_batch(
    lengths: list[int], batching: bool, group: bool, window: int, data: st.DataObject
) -> None:
    size = data.draw(st.integers(1, 6))
    options = {"batch_size": size, "window": window * size} if batching else {"max_tokens": 40, "window": window}
    plan = Batching(**options, group=group, shuffle=True)
    windows = Windows(RowOrder(len(lengths), seed=2, shuffle=True), plan, torch.tensor(lengths))
    for epoch in range(2):
        batches = epoch_batches(windows, epoch)
        assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
        assert windows.num_batches(epoch) == len(batches)
        for batch in batches:
            assert len(batch) <= size if batching else len(batch) * max(lengths[row] for row in batch) <= 40


@given(lengths=LENGTHS)
def test_a_budget_is_filled_as_far_as_the_next_row_allows(lengths: list[int]) -> None:
    # A plain loop over the rows.
    expected: list[list[int]] = [[]]
    for row, length in enumerate(lengths):
        longest = max([length, *(lengths[i] for i in expected[-1])])
        if expected[-1] and longest * (len(expected[-1]) + 1) > 40:
            expected.append([])
        expected[-1].append(row)
    cut = Batching(max_tokens=40).cut(len(lengths), torch.tensor(lengths))
    assert [places.tolist() for places in cut] == expected


@given(num_rows=st.integers(1, 50), size=st.integers(1, 8))
def test_dropped_is_only_what_fills_no_batch(num_rows: int, size: int) -> None:
    plan = Batching(batch_size=size, window=2 * size, drop_last=True)
    windows = Windows(RowOrder(num_rows, seed=0, shuffle=False), plan)
    batches = epoch_batches(windows, 0)
    assert batches == [list(range(i, i + size)) for i in range(0, num_rows - size + 1, size)]
    assert windows.num_batches(0) == len(batches)


def test_grouping_saves_padding_and_mixes_the_lengths_of_successive_batches() -> None:
    lengths = torch.randint(1, 500, (4096,))
    order = RowOrder(len(lengths), seed=0, shuffle=True)

    def padded(group: bool) -> int:
        windows = Windows(order, Batching(batch_size=16, window=1024, group=group, shuffle=True), lengths)
        return sum(len(rows) * int(lengths[rows].max()) for i in range(4) for rows in windows.batches(0, i))

    used = int(lengths.sum())
    assert padded(group=False) > 1.7 * used
    assert padded(group=True) < 1.05 * used
    windows = Windows(order, Batching(batch_size=16, window=1024, group=True, shuffle=True), lengths)
    means = torch.stack([lengths[rows].double().mean() for rows in windows.batches(0, 0)])
    assert abs(float(torch.corrcoef(torch.stack([means, torch.arange(64.0).double()]))[0, 1])) < 0.4
    assert not torch.equal(windows.batches(0, 0)[0], windows.batches(1, 0)[0])


@given(num_rows=st.integers(0, 100), world=st.integers(1, 20))
def test_ranks_share_a_batch_evenly(num_rows: int, world: int) -> None:
    parts = [rank_part(num_rows, rank, world) for rank in range(world)]
    assert [row for part in parts for row in part] == list(range(num_rows))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "batch_size, max_tokens: got None and None"),
        ({"batch_size": 2, "max_tokens": 4}, "exactly one"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"batch_size": True}, "batch_size: got True"),
        ({"batch_size": 2.0}, "batch_size: got 2.0"),
        ({"max_tokens": -1}, "max_tokens: got -1"),
        ({"batch_size": 3}, "window: got 4096 rows, expected a multiple of batch_size=3"),
        ({"max_tokens": 8, "drop_last": True}, "drop_last"),
    ],
)
def test_options_that_make_no_batches_are_refused(options: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Batching(**options)
