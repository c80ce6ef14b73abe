"""Columns by the model's signature, and special tokens: as the Trainer of transformers does."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, Trainer, TrainingArguments

from tests.trainer.tiny import make_net
from trainkit.trainer.collators import default_data_collator
from trainkit.trainer.data import (
    ColumnsOnly,
    align_special_tokens,
    is_table,
    signature_columns,
    without_unused_columns,
)


def their_trainer(folder: Any, model: nn.Module, **options: Any) -> Trainer:
    return Trainer(model, TrainingArguments(str(folder), use_cpu=True, report_to=[]), **options)


def gpt(**changes: Any) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=12, n_positions=8, n_embd=4, n_layer=1, n_head=1, **changes))


def tokenizer(**special: str) -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["[PAD]", "[EOS]", "[BOS]", "a", "b"])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words)), **special)


@pytest.mark.parametrize(
    "model", [make_net(), gpt(), torch.nn.DataParallel(make_net())], ids=["net", "gpt", "parallel"]
)
def test_names_are_those_of_transformers(tmp_path: Any, model: nn.Module) -> None:
    bare = model.module if isinstance(model, nn.DataParallel) else model
    trainer = their_trainer(tmp_path, bare)
    trainer._set_signature_columns_if_needed()
    names = signature_columns(model, trainer.label_names)
    assert names is not None
    assert sorted(set(names)) == sorted(set(trainer._signature_columns))
    assert len(set(names)) == len(names)


class Open(nn.Module):
    def forward(self, *args: Any, **inputs: Any) -> Any:
        return inputs


def test_an_open_signature_keeps_everything() -> None:
    assert signature_columns(Open(), ["labels"]) is None
    data = Dataset.from_dict({"x": [1], "extra": [2]})
    assert without_unused_columns(data, None) is data
    rows = [{"x": 1, "extra": 2}]
    assert ColumnsOnly(lambda given: given, None)(rows) is rows


def test_unused_columns_are_dropped_and_named(caplog: pytest.LogCaptureFixture) -> None:
    data = Dataset.from_dict({"x": [1, 2], "text": ["a", "b"], "label": [0, 1]})
    with caplog.at_level(logging.INFO):
        left = without_unused_columns(data, ["x", "label", "labels"], "Training")
    assert left.column_names == ["x", "label"]
    assert data.column_names == ["x", "text", "label"]
    assert [record.getMessage() for record in caplog.records] == [
        "Columns of the Training set that the model does not take are left out: text."
    ]
    assert without_unused_columns(left, ["x", "label"]) is left


def test_a_data_set_without_one_used_column_is_refused() -> None:
    with pytest.raises(ValueError, match=r"none of its columns \(text\).*takes x, labels"):
        without_unused_columns(Dataset.from_dict({"text": ["a"]}), ["x", "labels"])


def test_tables_are_those_of_datasets() -> None:
    data = Dataset.from_dict({"x": [1]})
    assert is_table(data)
    assert not is_table(data.to_iterable_dataset())
    assert not is_table([{"x": 1}])


def test_a_collator_sees_only_the_kept_keys(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    rows: list[Any] = [{"x": i, "text": "a", "label": i} for i in range(3)]
    seen: list[Any] = []
    collator = ColumnsOnly(lambda given: seen.append(given) or given, ["x", "label"], "Training")
    with caplog.at_level(logging.INFO):
        collator(rows)
        collator([*rows, "no dict"])
    assert seen == [[{"x": i, "label": i} for i in range(3)], [{"x": i, "label": i} for i in range(3)] + ["no dict"]]
    assert len(caplog.records) == 1
    assert rows[0] == {"x": 0, "text": "a", "label": 0}
    theirs = their_trainer(tmp_path, make_net(), data_collator=lambda given: given)
    assert theirs._get_collator_with_removed_columns(lambda given: given)([{"x": 1, "text": "a"}]) == [{"x": 1}]


def test_the_default_collator_below_gives_the_same(tmp_path: Any) -> None:
    rows = [{"x": torch.ones(2), "text": "a", "other": [0] * i, "label": i} for i in range(3)]
    fast = ColumnsOnly(default_data_collator, ["x", "label"])(rows)
    slow = ColumnsOnly(lambda given: default_data_collator(given), ["x", "label"])(rows)
    assert list(fast) == list(slow) == ["labels", "x"]
    assert all(torch.equal(fast[name], slow[name]) for name in fast)


SPECIAL = [
    {"eos_token": "[EOS]", "bos_token": "[BOS]", "pad_token": "[PAD]"},
    {"eos_token": "[EOS]"},
    {"pad_token": "[EOS]", "eos_token": "[EOS]", "bos_token": "[EOS]"},
]


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("end", [5, [5, 6], [5, 1], None])
@pytest.mark.parametrize("has_generation", [True, False])
def test_tokens_are_aligned_as_by_transformers(
    tmp_path: Any, special: dict[str, str], end: Any, has_generation: bool
) -> None:
    ours, theirs = (gpt(bos_token_id=3, eos_token_id=4) for _ in range(2))
    for model in (ours, theirs):
        model.generation_config.eos_token_id = end
        if not has_generation:
            model.generation_config = None
    words = tokenizer(**special)
    their_trainer(tmp_path, theirs, processing_class=words)._align_special_tokens()
    align_special_tokens(ours, words)
    assert specials(ours) == specials(theirs)


def specials(model: Any) -> list[Any]:
    names = ("eos_token_id", "bos_token_id", "pad_token_id")
    configs = [config for config in (model.config, model.generation_config) if config is not None]
    found = [getattr(config, name) for config in configs for name in names]
    # Where the token stands among several already, transformers lists it twice.
    return [list(dict.fromkeys(one)) if isinstance(one, list) else one for one in found]


def test_aligned_tokens_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    model, words = gpt(eos_token_id=4), tokenizer(eos_token="[EOS]")
    assert align_special_tokens(model, words)["eos_token_id"] == 1
    assert len(caplog.records) == 1 and "eos_token_id" in caplog.records[0].getMessage()
    before = specials(model)
    assert align_special_tokens(model, words) == {}
    assert specials(model) == before and len(caplog.records) == 1


def test_nothing_to_align_is_no_error() -> None:
    assert align_special_tokens(make_net(), tokenizer(eos_token="[EOS]")) == {}
    assert align_special_tokens(gpt(), None) == {}
    assert align_special_tokens(gpt(), default_data_collator) == {}
