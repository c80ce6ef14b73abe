import copy
import itertools
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from trainkit.io.data.ragged import Ragged
from trainkit.io.data.sources import TokenFile, as_source, row_lengths
from trainkit.io.data.stacking import stack
from trainkit.io.data.streams import IterableRows

NUM_ROWS = 25
COLUMNS = {
    "number": list(range(NUM_ROWS)),
    "half": [i / 2 for i in range(NUM_ROWS)],
    "flag": [i % 3 == 0 for i in range(NUM_ROWS)],
    "ids": [[i, i + 1, i + 2] for i in range(NUM_ROWS)],
    "matrix": [[[i, 1.5], [2.0, i]] for i in range(NUM_ROWS)],
}


def arrow() -> datasets.Dataset:
    parts = [
        datasets.Dataset.from_dict({name: column[a:b] for name, column in COLUMNS.items()})
        for a, b in ((0, 7), (7, 8), (8, NUM_ROWS))
    ]
    return datasets.concatenate_datasets(parts)


@given(rows=st.lists(st.integers(0, NUM_ROWS - 1), min_size=1, max_size=12))
def test_arrow_columns_are_those_of_the_torch_format(rows: list[int]) -> None:
    # Chunked, and through an index of selected rows.
    for dataset in (arrow(), arrow().select([*range(5, NUM_ROWS), *range(5)])):
        expected = dataset.with_format("torch")[rows]
        found = stack(as_source(dataset).fetch(rows))
        assert found.keys() == expected.keys()
        for name, column in expected.items():
            assert torch.equal(found[name].to(column.dtype), column)


@pytest.mark.parametrize("rows", [[3, 4, 5], [0], [24, 23], [5, 5, 7], [3, 5, 4, 6]])
def test_a_range_of_rows_is_no_other_than_the_rows(rows: list[int]) -> None:
    assert as_source(arrow()).fetch(rows)["number"].tolist() == rows


def test_lists_of_different_lengths_text_and_nulls_keep_their_rows() -> None:
    columns = {
        "ids": [[1, 2], [], [3]],
        "pairs": [[[1, 2]], [], [[3, 4], [5, 6]]],
        "text": ["a", "b", None],
        "x": [1, None, 3],
    }
    found = as_source(datasets.Dataset.from_dict(columns)).fetch([2, 0])
    assert isinstance(found["ids"], Ragged)
    assert [row.tolist() for row in found["ids"]] == [[3], [1, 2]]
    assert [row.tolist() for row in found["pairs"]] == [[[3, 4], [5, 6]], [[1, 2]]]
    assert found["text"] == [None, "a"]
    assert as_source(datasets.Dataset.from_dict(columns)).fetch([1, 0])["x"] == [None, 1]


def test_a_format_or_transform_of_the_user_is_kept() -> None:
    doubled = arrow().with_transform(lambda batch: {"twice": [2 * i for i in batch["number"]]})
    assert as_source(doubled).fetch([3, 1]) == {"twice": [6, 2]}
    assert set(as_source(arrow().with_format("numpy", columns=["half"])).fetch([3])) == {"half"}


def test_arrays_of_a_declared_shape_are_tensors() -> None:
    features = datasets.Features(
        {"image": datasets.Array2D((2, 3), "uint8"), "pair": datasets.Sequence(datasets.Value("int32"), 2)}
    )
    images = np.arange(24, dtype="uint8").reshape(4, 2, 3)
    dataset = datasets.Dataset.from_dict({"image": list(images), "pair": [[i, i] for i in range(4)]}, features=features)
    found = as_source(dataset).fetch([3, 0])
    assert torch.equal(found["image"], torch.from_numpy(images[[3, 0]]))
    assert torch.equal(found["pair"], torch.tensor([[3, 3], [0, 0]], dtype=torch.int32))


def test_a_batch_of_arrow_shares_no_memory_with_the_data() -> None:
    source = as_source(arrow())
    source.fetch([0, 1])["number"].fill_(99)
    assert source.fetch([0, 1])["number"].tolist() == [0, 1]


class Many:
    """A dataset that can fetch many rows at once, and must be asked so."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, row: int) -> int:
        raise AssertionError("asked row by row")

    def __getitems__(self, rows: list[int]) -> list[int]:
        return [10 * row for row in rows]


def test_a_dataset_is_asked_for_many_rows_at_once() -> None:
    assert as_source(Many()).fetch([4, 0]) == [40, 0]


def test_columns_in_memory() -> None:
    tensors = TensorDataset(torch.arange(4), torch.arange(8).view(4, 2))
    found = as_source(tensors).fetch([2, 0])
    assert [part.tolist() for part in found] == [[2, 0], [[4, 5], [0, 1]]]
    assert as_source(np.arange(4)).fetch([2, 0]).tolist() == [2, 0]
    with pytest.raises(ValueError, match="numbers of rows"):
        as_source({"x": torch.zeros(2), "y": torch.zeros(3)})


@given(num_tokens=st.integers(3, 60), seq_len=st.integers(1, 7), overlap=st.integers(0, 2))
def test_token_rows_are_slices_of_the_file(tmp_path_factory: Any, num_tokens: int, seq_len: int, overlap: int) -> None:
    folder = tmp_path_factory.mktemp("tokens")
    tokens = np.arange(num_tokens, dtype="uint16") + 40_000
    tokens.tofile(folder / "t.bin")
    np.save(folder / "t.npy", tokens)
    expected = [tokens[i : i + seq_len + overlap].tolist() for i in range(0, num_tokens, seq_len)]
    expected = [row for row in expected if len(row) == seq_len + overlap]
    if not expected:
        with pytest.raises(ValueError, match="a row needs"):
            TokenFile(folder / "t.bin", seq_len, dtype="uint16", overlap=overlap)
        return
    for source in (
        TokenFile(folder / "t.bin", seq_len, dtype="uint16", overlap=overlap),
        TokenFile(folder / "t.npy", seq_len, overlap=overlap),
    ):
        rows = list(range(source.num_rows))
        assert source.fetch(rows[::-1])["input_ids"].tolist() == expected[::-1]


def test_a_token_file_travels_by_name(tmp_path: Path) -> None:
    np.zeros(10**6, dtype="uint8").tofile(tmp_path / "t.bin")
    sent = bytes(ForkingPickler.dumps(TokenFile(tmp_path / "t.bin", 10, dtype="uint8")))
    assert len(sent) < 1000
    assert ForkingPickler.loads(sent).fetch([5])["input_ids"].tolist() == [[0] * 11]


def test_lengths_of_rows() -> None:
    ids = [[1, 2], [], [3]]
    dataset = datasets.Dataset.from_dict({"ids": ids, "n": [5, 6, 7], "text": ["ab", "ç", ""], "x": [0.5] * 3})
    assert row_lengths(dataset.select([2, 0]), "ids").tolist() == [1, 2]
    assert row_lengths(dataset, "n").tolist() == [5, 6, 7]
    assert row_lengths(dataset, "text").tolist() == [2, 1, 0]
    large = dataset.cast_column("text", datasets.Value("large_string"))
    assert row_lengths(large, "text").tolist() == [2, 1, 0]
    assert row_lengths({"ids": ids}, "ids").tolist() == [2, 0, 1]
    assert row_lengths({"ids": torch.zeros(2, 3)}, "ids").tolist() == [3, 3]
    for data, column, told in ((dataset, "y", "got 'y'"), (dataset, "x", "holds double"), ([{"a": 1}], "b", "got 'b'")):
        with pytest.raises(ValueError, match=told):
            row_lengths(data, column)


def test_a_shuffle_buffer_loses_no_row() -> None:
    # The stream's own state forgets what is in its buffer.
    stream = datasets.Dataset.from_dict({"x": list(range(30))}).to_iterable_dataset().shuffle(seed=1, buffer_size=8)
    whole = [row["x"] for row in stream]
    rows = IterableRows(copy.deepcopy(stream))
    reading = rows.read(0, None, 0)
    taken = [row["x"] for row in itertools.islice(reading, 11)]
    assert rows.state() is None
    assert taken + [row["x"] for row in IterableRows(stream).read(0, None, 11)] == whole
