import itertools
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset, IterableDataset

from trainkit.io.data.errors import BatchError
from trainkit.io.data.loader import Loader
from trainkit.io.data.mixing import Deal, mix
from trainkit.io.data.ragged import Ragged


@given(
    counts=st.lists(st.integers(1, 7), min_size=1, max_size=4), start=st.integers(0, 10**12), number=st.integers(1, 40)
)
def test_any_part_of_a_deal_is_that_part_of_the_whole(counts: list[int], start: int, number: int) -> None:
    deal = Deal(counts, seed=3)
    part = deal.at(start, start + number).tolist()
    assert part == [source for i in range(start, start + number) for source in deal.at(i, i + 1).tolist()]
    counted = Counter(part)
    assert deal.before(start + number) == [n + counted[i] for i, n in enumerate(deal.before(start))]
    # Whole cycles have exactly the counts.
    cycle = Counter(deal.at(sum(counts) * 5, sum(counts) * 6).tolist())
    assert [cycle[i] for i in range(len(counts))] == counts


def test_shares_are_those_of_the_weights_in_any_thousand_rows() -> None:
    mixture = mix({"a": torch.arange(700), "b": torch.arange(50)}, {"a": 0.7, "b": 0.3}, rows=10_000)
    order = mixture.order(seed=1, shuffle=True)
    for start in (0, 3000, 9000):
        assert int((order.at(2, start, start + 1000) < 700).sum()) == 700


def test_a_source_is_read_to_its_end_before_it_is_read_again() -> None:
    mixture = mix([list(range(6)), list(range(100, 104))], [1, 2], rows=15)
    order = mixture.order(seed=0, shuffle=True)
    rows = torch.cat([order.at(epoch, 0, 15) for epoch in range(4)]).tolist()
    for first, size in ((0, 6), (6, 4)):
        own = [row - first for row in rows if first <= row < first + size]
        passes = [own[i : i + size] for i in range(0, len(own) - size + 1, size)]
        assert all(sorted(one) == list(range(size)) for one in passes)
        assert len({tuple(one) for one in passes}) > 1


def loaders() -> dict[str, Any]:
    def stream(n: int) -> datasets.IterableDataset:
        return datasets.Dataset.from_dict({"x": list(range(n))}).to_iterable_dataset()

    arrow = datasets.Dataset.from_dict({"x": list(range(100, 105))})
    return {
        "map": mix([{"x": torch.arange(7)}, arrow], [3, 1]),
        "streams": mix([stream(7), stream(3)], [3, 1]),
        "both": mix([stream(7), arrow], [2, 1]),
    }


@pytest.mark.parametrize("kind", ["map", "streams", "both"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_mixture_resumes_anywhere(kind: str, workers: int) -> None:
    def make(**options: Any) -> Loader:
        return Loader(loaders()[kind], batch_size=2, window=4, batches=14, **options)

    whole = [batch["x"].tolist() for batch in make()]
    assert len(whole) == 14
    for stop in range(0, 14, 1 if workers == 0 else 5):
        loader = make(workers=workers)
        batches = iter(loader)
        taken = [batch["x"].tolist() for batch in itertools.islice(batches, stop)]
        state = json.loads(json.dumps(loader.state_dict()))
        batches.close()
        resumed = make()
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        assert taken + [batch["x"].tolist() for batch in resumed] == whole


def test_rows_of_several_sources_keep_their_places() -> None:
    ragged = datasets.Dataset.from_dict({"ids": [[i] * (i + 1) for i in range(4)]})
    more = datasets.Dataset.from_dict({"ids": [[9, 9], [8]]})
    mixture = mix([ragged, more, [{"ids": [7, 7, 7]}]])
    found = mixture.fetch([5, 1, 4, 3])
    assert isinstance(found["ids"], Ragged)
    assert [row.tolist() for row in found["ids"]] == [[8], [1, 1], [9, 9], [3, 3, 3, 3]]
    assert [list(row["ids"]) for row in mixture.fetch([6, 0])] == [[7, 7, 7], [0]]
    assert mixture.lengths("ids").tolist() == [1, 2, 3, 4, 2, 1, 3]


def test_a_mixture_can_be_grouped_by_length() -> None:
    mixture = mix([{"ids": [[1] * n for n in range(1, 9)]}, {"ids": [[2] * n for n in range(1, 9)]}])
    batches = Loader(
        mixture,
        max_tokens=16,
        lengths="ids",
        group_by_length=True,
        window=16,
        collate=lambda c: torch.tensor([len(r) for r in c["ids"]]),
    )
    found = [batch.tolist() for batch in batches]
    assert sorted(itertools.chain(*found)) == sorted([*range(1, 9), *range(1, 9)])
    assert all(len(batch) * max(batch) <= 16 for batch in found)


@pytest.mark.parametrize(
    ("sources", "weights", "told"),
    [
        ([], None, "sources: got none"),
        ([[1], []], None, "'1' has no rows"),
        ([[1], [2]], [1], "expected a positive number for each"),
        ([[1], [2]], [1, 0], "expected a positive number for each"),
        ([[1], [2]], [1, float("nan")], "expected a positive number for each"),
        ([[1], [2]], [1, 1e-9], "at least 1 / 10000"),
        ([[1], [2], [3]], [0.3, 0.3, 1e-9], "at least 1 / 10000"),
        ([[1], [2], [3]], [1, 1, 1e-5], "at least 1 / 10000"),
        ({"a": [1]}, {"b": 1}, "got \\['b'\\] for the sources \\['a'\\]"),
    ],
)
def test_what_cannot_be_mixed_is_refused(sources: Any, weights: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        mix(sources, weights)


def test_only_the_ratio_of_weights_counts() -> None:
    for weights in ([3, 1], [0.75, 0.25], [3e-12, 1e-12], [3e200, 1e200]):
        described = mix([[1], [2]], weights).describe()
        assert described["counts"] == [3, 1]


@pytest.mark.parametrize("rows", [None, 8])
def test_a_mixture_in_a_mixture_keeps_its_weights(rows: int | None) -> None:
    def nested(inner: list[int]) -> Any:
        within = mix({"a": torch.arange(100), "b": torch.arange(100, 110)}, inner, rows=rows)
        return mix({"within": within, "c": torch.arange(1000, 1050)}, [1, 1], rows=160)

    def loader(inner: list[int], **options: Any) -> Loader:
        return Loader(nested(inner), batch_size=40, **options)

    for options in ({}, {"seed": 5}, {"shuffle": False}):
        drawn = torch.cat(list(loader([3, 1], **options).epochs(2)))
        shares = [int(((drawn >= low) & (drawn < high)).sum()) for low, high in ((0, 100), (100, 110), (1000, 1050))]
        assert shares == [120, 40, 160]
    # Each row of the small source is read before any is read again.
    counted = Counter(drawn[(drawn >= 100) & (drawn < 110)].tolist())
    assert set(counted.values()) == {4}
    with pytest.raises(ValueError, match="sources="):
        loader([1, 1]).load_state_dict(loader([3, 1]).state_dict())


def test_a_mixture_in_a_mixture_has_the_lengths_of_its_rows() -> None:
    within = mix([{"ids": [[1], [2, 2]]}, {"ids": [[3, 3, 3]]}])
    assert mix([{"ids": [[0, 0]]}, within]).lengths("ids").tolist() == [2, 1, 2, 3]


def test_an_error_in_a_mixture_in_a_mixture_names_both_sources() -> None:
    class Broken(Dataset[int]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> int:
            raise OSError("unplugged")

    within = mix({"list": [0], "disk": Broken()})
    with pytest.raises(OSError, match=r"unplugged \(rows \[.*\] of source 'disk'\) \(rows \[.*\] of source 'within'\)"):
        list(Loader(mix({"within": within, "other": [1]}), batch_size=6))


def test_a_mixture_in_a_mixture_with_a_stream_keeps_its_weights() -> None:
    stream = datasets.Dataset.from_dict({"x": [-1, -1]}).to_iterable_dataset()
    within = mix([{"x": [0] * 100}, {"x": [1] * 10}], [3, 1])
    batches = Loader(mix([stream, within]), batch_size=80, window=80, batches=1)
    assert Counter(next(iter(batches))["x"].tolist()) == {-1: 40, 0: 30, 1: 10}


def test_seed_and_shuffle_of_the_loader_reach_what_is_mixed_with_a_stream() -> None:
    def rows(**options: Any) -> list[int]:
        stream = datasets.Dataset.from_dict({"x": [-1]}).to_iterable_dataset()
        loader = Loader(mix([stream, {"x": torch.arange(50)}]), batch_size=10, window=10, batches=10, **options)
        return [x for batch in loader for x in batch["x"].tolist() if x >= 0]

    assert rows(shuffle=False) == list(range(50))
    assert rows(seed=1) == rows(seed=1) != rows(seed=2)
    assert sorted(rows(seed=1)) == sorted(rows(seed=2)) == list(range(50))


def test_an_error_of_a_stream_in_a_mixture_names_row_and_source() -> None:
    class Broken(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            yield from range(5)
            raise OSError("unplugged")

    with pytest.raises(
        OSError, match=r"unplugged \(row 5 of epoch 0 of source 'net'\) \(dataset index 1\d, in window 0"
    ):
        list(Loader(mix({"list": [0], "net": Broken()}), batch_size=4))


def test_sources_with_other_keys_are_named() -> None:
    mixture = mix({"a": {"x": torch.arange(2)}, "b": {"y": torch.arange(2)}})
    with pytest.raises(BatchError, match=r"expected the keys \['x'\] of 'a', found \['y'\] in 'b'"):
        next(iter(Loader(mixture, batch_size=4)))


def test_an_error_of_a_source_names_it() -> None:
    class Broken:
        num_rows = 3

        def fetch(self, indices: Any) -> Any:
            raise OSError("unplugged")

    with pytest.raises(OSError, match=r"unplugged \(rows .* of source 'disk'\) \(batch 0"):
        list(Loader(mix({"memory": [1, 2, 3], "disk": Broken()}), batch_size=6))
