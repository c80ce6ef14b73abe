"""Default batches: those of transformers, of rows and of columns alike."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DataCollatorWithPadding as TheirPadding
from transformers import PreTrainedTokenizerFast, Wav2Vec2FeatureExtractor
from transformers import default_data_collator as theirs

from tests.trainer.tiny import make_rows
from trainkit.io.data.ragged import as_ragged
from trainkit.trainer.collators import (
    DataCollatorWithPadding,
    default_collator_for,
    default_data_collator,
    is_default,
    stacked_columns,
    stacked_rows,
)


def assert_same(ours: Any, expected: Any) -> None:
    assert list(ours) == list(expected)
    for name in expected:
        assert ours[name].dtype == expected[name].dtype
        torch.testing.assert_close(ours[name], expected[name], rtol=0, atol=0)


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2, "b": 3}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")


LABELS: list[Any] = [
    {"label": 1},
    {"label": True},
    {"label": 0.5},
    {"label": [1, 0, 1]},
    {"label": torch.tensor(2)},
    {"label": torch.tensor([2])},
    {"label": torch.tensor(0.5)},
    {"label": torch.tensor(True)},
    {"label": None, "label_ids": [1, 2]},
    {"label_ids": [1, 2]},
    {"label_ids": [1.5, 2]},
    {"label_ids": torch.tensor([1.5, 2])},
    {"label_ids": torch.tensor([1, 2], dtype=torch.int32)},
    {"labels": 3},
    {},
]


@pytest.mark.parametrize("label", LABELS, ids=str)
def test_labels_are_those_of_transformers(label: dict[str, Any]) -> None:
    rows = [{"x": torch.arange(3.0) + i, **label} for i in range(4)]
    assert_same(default_data_collator(rows), theirs(rows))


VALUES: list[Any] = [
    1, 2.5, True, [1, 2], [1.5, 2], [[1], [2]], torch.ones(2, 3), torch.tensor(4, dtype=torch.int16),
    np.arange(3, dtype=np.float64), np.float32(1.5), np.int64(3), None, "text",
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_values_are_those_of_transformers(value: Any) -> None:
    rows = [{"x": value, "y": i} for i in range(3)]
    assert_same(default_data_collator(rows), theirs(rows))


def test_objects_have_their_attributes_as_fields() -> None:
    rows = [SimpleNamespace(x=i, label=i) for i in range(3)]
    assert_same(default_data_collator(rows), theirs(rows))
    assert_same(stacked_rows(rows, ["nothing"]), theirs(rows))


def test_arrays_of_integers_are_classes() -> None:
    batch = default_data_collator([{"label": np.int64(1)}, {"label": np.int64(2)}])
    assert_same(batch, {"labels": torch.tensor([1, 2])})
    batch = default_data_collator([{"label_ids": np.array([1, 2])}])
    assert_same(batch, {"labels": torch.tensor([[1, 2]])})


def test_several_labels_as_a_tensor_stay_together() -> None:
    batch = default_data_collator([{"label": torch.tensor([0.0, 1.0])}, {"label": torch.tensor([1.0, 1.0])}])
    assert_same(batch, {"labels": torch.tensor([[0.0, 1.0], [1.0, 1.0]])})


def test_tuples_and_tensors_are_stacked_as_torch_does() -> None:
    x, y = default_data_collator([(torch.ones(2), 1), (torch.zeros(2), 0)])
    assert x.tolist() == [[1, 1], [0, 0]] and y.tolist() == [1, 0]
    assert default_data_collator([torch.ones(2)] * 3).shape == (3, 2)


def test_rows_that_differ_are_refused() -> None:
    with pytest.raises(KeyError, match="y"):
        default_data_collator([{"x": 1, "y": 1}, {"x": 1}])
    with pytest.raises(RuntimeError, match="equal size"):
        default_data_collator([{"x": torch.ones(2)}, {"x": torch.ones(3)}])
    with pytest.raises(ValueError, match="return_tensors: got 'np'"):
        default_data_collator([{"x": 1}], return_tensors="np")


def test_only_some_fields_can_be_kept() -> None:
    rows = [{"x": i, "text": "a", "extra": [0] * i, "label": i} for i in range(3)]
    assert list(stacked_rows(rows, {"x", "label"})) == ["labels", "x"]
    assert list(stacked_rows(rows, {"x"})) == ["x"]


COLUMN = st.sampled_from(["int", "float", "bool", "ints", "floats", "text"])


@given(st.dictionaries(st.sampled_from(["x", "y", "label", "label_ids", "labels"]), COLUMN, min_size=1), st.data())
def test_columns_give_the_batch_of_their_rows(kinds: dict[str, str], data: Any) -> None:
    n, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    draw = torch.Generator().manual_seed(n)
    columns: dict[str, Any] = {}
    for name, kind in kinds.items():
        whole = torch.randint(9, (n, width), generator=draw)
        if kind == "text":
            columns[name] = ["a"] * n
        elif kind.endswith("s"):
            columns[name] = as_ragged((whole if kind == "ints" else whole / 2).tolist())
        else:
            columns[name] = whole[:, 0].to({"int": torch.int16, "float": torch.float64, "bool": torch.bool}[kind])
    rows = [{k: v[i] if isinstance(v[i], str) else v[i].tolist() for k, v in columns.items()} for i in range(n)]
    batch = stacked_columns(columns)
    if batch is not None:
        assert_same(batch, theirs(rows))
    else:
        assert kinds.get("label") == "text" or "label_ids" in kinds


def test_columns_that_only_rows_tell_are_left_to_them() -> None:
    assert stacked_columns({"x": as_ragged([[1], [1, 2]])}) is None
    assert stacked_columns({"x": [{"a": 1}]}) is None
    assert stacked_columns({"x": [None, 1], "y": torch.ones(2)}) is not None


@pytest.mark.parametrize("options", [{}, {"pad_to_multiple_of": 4}, {"padding": "max_length", "max_length": 6}])
@pytest.mark.parametrize("label", [{}, {"label": 1}, {"label_ids": [1]}])
def test_padding_is_that_of_transformers(options: dict[str, Any], label: dict[str, Any]) -> None:
    words = tokenizer()
    rows = [{**words(text), **label} for text in ("a b", "a b a", "b")]
    ours, expected = DataCollatorWithPadding(words, **options)(rows), TheirPadding(words, **options)(rows)
    assert type(ours) is type(expected)
    assert_same(ours, expected)


def test_padding_gives_no_advice_and_leaves_the_tokenizer_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    words = tokenizer()
    before = dict(words.deprecation_warnings)
    DataCollatorWithPadding(words)([words("a"), words("a b")])
    assert not caplog.records
    assert words.deprecation_warnings.get("Asking-to-pad-a-fast-tokenizer", False) is False
    assert before.get("Asking-to-pad-a-fast-tokenizer", False) is False


def test_the_default_pads_with_what_can_pad() -> None:
    padding = default_collator_for(tokenizer())
    assert isinstance(padding, DataCollatorWithPadding)
    extractor = default_collator_for(Wav2Vec2FeatureExtractor())
    assert isinstance(extractor, DataCollatorWithPadding)
    assert default_collator_for(None) is default_data_collator
    assert default_collator_for(object()) is default_data_collator


def test_the_default_of_transformers_is_known() -> None:
    assert is_default(theirs) and is_default(default_data_collator)
    assert not is_default(torch.utils.data.default_collate)
    assert_same(default_data_collator(make_rows(3)), theirs(make_rows(3)))
