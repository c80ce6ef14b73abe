"""Columns that are copied straight out of Arrow's memory, beside what Arrow itself takes out of them."""

from __future__ import annotations

from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainkit.io.data.arrow import ArrowRows, table_columns
from trainkit.io.data.ragged import Ragged

NUMBERS = st.sampled_from(["int8", "uint16", "int64", "float16", "float64"])


@st.composite
def columns(draw: Any) -> pa.ChunkedArray:
    """Numbers or lists of them in parts, some of them empty, some slices of something longer."""
    number = pa.type_for_alias(draw(NUMBERS))
    kind = draw(st.sampled_from(["number", "fixed", "even", "list", "large", "nested", "bool"]))
    types = {
        "number": number,
        "bool": pa.bool_(),
        "fixed": pa.list_(number, 2),
        "even": pa.list_(number),
        "list": pa.list_(number),
        "large": pa.large_list(number),
        "nested": pa.list_(pa.list_(number)),
    }
    value = np.float16 if number == pa.float16() else int
    width = {"number": None, "bool": None, "fixed": (2, 2), "even": (3, 3)}.get(kind, (0, 3))
    one: Any = st.booleans() if kind == "bool" else st.integers(0, 100).map(value)
    row = one if width is None else st.lists(one, min_size=width[0], max_size=width[1])
    row = st.lists(row, max_size=2) if kind == "nested" else row
    chunks = []
    for values in draw(st.lists(st.lists(row, max_size=6), min_size=1, max_size=4)):
        array = pa.array(values, types[kind])
        chunks.append(array.slice(draw(st.integers(0, len(values)))))
    return pa.chunked_array(chunks, types[kind])


def listed(column: Any) -> list[Any]:
    return [row.tolist() if isinstance(row, torch.Tensor) else row for row in column]


@given(column=columns(), data=st.data())
def test_rows_are_those_that_arrow_takes(column: pa.ChunkedArray, data: st.DataObject) -> None:
    if not len(column):
        return
    rows = data.draw(st.lists(st.integers(0, len(column) - 1), min_size=1, max_size=8))
    if data.draw(st.booleans()):
        rows = list(range(rows[0], len(column)))
    dataset = datasets.Dataset(pa.table({"x": column}))
    if data.draw(st.booleans()):
        dataset = dataset.select(list(range(len(column)))[::-1])
    found = ArrowRows(dataset).fetch(rows)["x"]
    expected = dataset.with_format("arrow")[rows]
    assert listed(found) == expected.column("x").to_pylist()
    by_arrow = table_columns(expected)["x"]
    assert type(found) is type(by_arrow)
    if isinstance(found, Ragged):
        found, by_arrow = found.values, by_arrow.values
    if isinstance(found, torch.Tensor) and found.numel():
        assert found.dtype == by_arrow.dtype


def test_long_rows_may_lie_far_apart() -> None:
    """One part in Arrow's own memory, which may be tens of TiB away from where files and other arrays are."""
    rows = np.arange(6 * 2**16).reshape(6, -1)
    own = pa.array(rows[:3].tolist(), pa.list_(pa.int64()))
    other = pa.ListArray.from_arrays(pa.array(range(0, 4 * 2**16, 2**16), pa.int32()), pa.array(rows[3:].reshape(-1)))
    dataset = datasets.Dataset(pa.table({"x": pa.chunked_array([own, other])}))
    found = ArrowRows(dataset).fetch([4, 1, 5, 0])["x"]
    assert np.array_equal(found.values.numpy().reshape(4, -1), rows[[4, 1, 5, 0]])


@pytest.mark.parametrize("values", [[1, None, 3], [[1], None, [2]], [[1, 2], [None], [3]]])
def test_a_column_with_nulls_is_left_to_arrow(values: list[Any]) -> None:
    dataset = datasets.Dataset.from_dict({"x": values, "y": [1, 2, 3]})
    found = ArrowRows(dataset).fetch([2, 1])
    assert listed(found["x"]) == [values[2], values[1]]
    assert found["y"].tolist() == [3, 2]


def test_a_null_outside_of_a_slice_is_not_seen() -> None:
    table = pa.table({"x": pa.array([[1, None], [2], [3, 4]])}).slice(1)
    assert listed(ArrowRows(datasets.Dataset(table)).fetch([1, 0])["x"]) == [[3, 4], [2]]


@pytest.mark.parametrize("rows", [[0, 1], [1, 0]])
def test_rows_are_in_memory_of_their_own(rows: list[int]) -> None:
    table = pa.table({"n": [1, 2], "fixed": pa.array([[1, 2], [3, 4]], pa.list_(pa.int64(), 2)), "list": [[1], [2]]})
    source = ArrowRows(datasets.Dataset(table))
    before = table.to_pydict()
    found = source.fetch(rows)
    found["n"].zero_(), found["fixed"].zero_(), found["list"].values.zero_()
    assert table.to_pydict() == before


def test_a_mapped_dataset_travels_by_name(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"x": np.arange(10**5)}).save_to_disk(tmp_path)
    source = ArrowRows(datasets.load_from_disk(tmp_path))
    source.fetch([7])
    sent = bytes(ForkingPickler.dumps(source))
    assert len(sent) < 10_000
    assert ForkingPickler.loads(sent).fetch([7, 3])["x"].tolist() == [7, 3]
