"""Floating-point operations beside those of transformers' models."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from trainkit.trainer import flops
from trainkit.trainer.flops import floating_point_ops


def tiny_bert(
    kind: type[BertForSequenceClassification] = BertForSequenceClassification,
) -> BertForSequenceClassification:
    return kind(
        BertConfig(
            vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=12,
        )
    )  # fmt: skip


def inputs(rows: int) -> dict[str, Any]:
    return {"input_ids": torch.ones(rows, 5, dtype=torch.int64)}


def test_equals_transformers_and_counts_parameters_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, walks = tiny_bert(), []
    expected = {rows: model.floating_point_ops(inputs(rows)) for rows in (1, 3)}
    walk = nn.Module.named_modules

    def counted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        walks.append(self)
        return walk(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "named_modules", counted)
    assert floating_point_ops(model, inputs(1)) == expected[1] > 0
    first = len(walks)
    assert [floating_point_ops(model, inputs(rows)) for rows in (3, 1, 3)] == [expected[3], expected[1], expected[3]]
    assert len(walks) == first > 0


def test_models_are_counted_apart_and_not_kept_alive() -> None:
    one, other = tiny_bert(), tiny_bert()
    other.classifier = nn.Linear(8, 50)
    assert floating_point_ops(one, inputs(1)) == one.floating_point_ops(inputs(1))
    assert floating_point_ops(other, inputs(1)) == other.floating_point_ops(inputs(1))
    gc.collect()
    before = len(flops._counts)
    del one
    gc.collect()
    assert len(flops._counts) == before - 1


def test_a_method_of_the_models_own_is_asked_every_time() -> None:
    class Own(BertForSequenceClassification):
        def floating_point_ops(self, input_dict: Any, exclude_embeddings: bool = True) -> int:
            return 7 * int(input_dict["input_ids"].numel())

    model = tiny_bert(Own)
    assert [floating_point_ops(model, inputs(rows)) for rows in (1, 2)] == [35, 70]


def test_a_wrapper_that_hands_attributes_on_counts_the_model_inside() -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inner"), name)

    model = tiny_bert()
    assert floating_point_ops(Wrapper(model), inputs(2)) == model.floating_point_ops(inputs(2))


def test_a_plain_module_has_none() -> None:
    assert floating_point_ops(nn.Linear(2, 2), {"x": torch.ones(1, 2)}) == 0
