"""One batch of evaluation, beside the method of transformers' Trainer 4.57."""

import inspect
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import can_return_loss as hf_can_return_loss
from transformers.utils import find_labels

from trainkit.trainer.prediction import (
    can_return_loss,
    default_ignore_keys,
    default_label_names,
    has_labels,
    label_values,
    logits_of,
    prediction_step,
    required_label_names,
)

MODELS = [
    transformers.BertForSequenceClassification,
    transformers.BertForPreTraining,
    transformers.BertForQuestionAnswering,
    transformers.GPT2LMHeadModel,
    transformers.CLIPModel,
    transformers.BertModel,
    transformers.MaskFormerForInstanceSegmentation,
    transformers.T5ForConditionalGeneration,
]


class Model(nn.Module):
    """Returns what it is told to."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor, labels: Tensor | None = None, label_weights: Tensor | None = None) -> Any:
        logits = self.layer(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        parts = {"loss": loss, "logits": logits, "hidden": logits * 2, "past_key_values": logits + 1}
        if self.kind == "output":
            return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=(logits * 2, logits))
        if self.kind == "one":
            return {"loss": loss, "logits": logits} if loss is not None else {"logits": logits}
        if self.kind == "dict":
            return {key: value for key, value in parts.items() if value is not None}
        if self.kind == "pair":
            return (logits,) if loss is None else (loss, logits)
        return tuple(value for value in parts.values() if value is not None)


def batch(labels: bool, rows: int = 4) -> dict[str, Tensor]:
    inputs = {"x": torch.randn(rows, 3)}
    return {**inputs, "labels": torch.randint(0, 2, (rows,))} if labels else inputs


def peer(model: nn.Module, folder: Path, **options: Any) -> transformers.Trainer:
    args = transformers.TrainingArguments(str(folder), use_cpu=True, report_to=[], disable_tqdm=True, **options)
    return transformers.Trainer(model, args)


def ours(trainer: transformers.Trainer, inputs: dict[str, Any], loss_only: bool, ignore: list[str] | None) -> Any:
    """The function over the callables of a real Trainer."""
    return prediction_step(
        trainer.model,
        inputs,
        loss_only,
        ignore,
        label_names=trainer.label_names,
        can_return_loss=trainer.can_return_loss,
        compute_loss=trainer.compute_loss,
        prepare_inputs=trainer._prepare_inputs,
        num_items=lambda inputs: trainer._get_num_items_in_batch([inputs], trainer.args.device),
        context=trainer.compute_loss_context_manager,
    )


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, tuple):
        assert len(found) == len(expected)
        for one, two in zip(found, expected, strict=True):
            assert_same(one, two)
    elif isinstance(expected, Tensor):
        assert torch.equal(found, expected) and not found.requires_grad
    else:
        assert found is expected


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignore", [None, [], ["hidden", "hidden_states"]])
@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("kind", ["output", "one", "dict", "pair", "tuple"])
def test_a_batch_gives_what_transformers_gives(
    tmp_path: Path, kind: str, labels: bool, ignore: list[str] | None, smoothing: float
) -> None:
    model = Model(kind)
    model.config = transformers.PretrainedConfig()
    trainer = peer(model, tmp_path, label_names=["labels"], label_smoothing_factor=smoothing)
    inputs = batch(labels)
    for loss_only in (False, True):
        expected = trainer.prediction_step(model, dict(inputs), loss_only, ignore_keys=ignore)
        assert_same(ours(trainer, dict(inputs), loss_only, ignore), expected)


def test_several_labels_are_a_tuple(tmp_path: Path) -> None:
    trainer = peer(Model("dict"), tmp_path, label_names=["labels", "label_weights"])
    inputs = {**batch(True), "label_weights": torch.ones(4)}
    found = ours(trainer, inputs, False, None)
    assert_same(found, trainer.prediction_step(trainer.model, inputs, False))
    assert len(found[2]) == 2


@pytest.mark.parametrize("cls", MODELS)
def test_names_are_those_that_transformers_finds(cls: type) -> None:
    # Without its weights: only the signature is looked at.
    model = cls.__new__(cls)
    nn.Module.__init__(model)
    assert default_label_names(model) == find_labels(cls)
    assert can_return_loss(model) == hf_can_return_loss(cls)
    assert set(required_label_names(model, find_labels(cls))) <= set(inspect.signature(cls.forward).parameters)


def test_a_compiled_or_wrapped_model_keeps_its_names() -> None:
    model = Model("dict")
    model.config = transformers.PretrainedConfig(keys_to_ignore_at_inference=["a"])
    for wrapped in (torch.compile(model), nn.DataParallel(model)):
        assert default_label_names(wrapped) == ["labels", "label_weights"]
        assert default_ignore_keys(wrapped) == ["a"]


def test_ignored_keys() -> None:
    model = Model("dict")
    assert default_ignore_keys(model) == []
    model.config = object()
    assert default_ignore_keys(model) == ["past_key_values"]


class QuestionAnswering(nn.Module):
    def forward(self, x: Any, start_positions: Any = None, end_positions: Any = None) -> None: ...


class Needs(nn.Module):
    def forward(self, x: Any, labels: Any, label_weights: Any = None) -> None: ...


def test_an_optional_label_may_be_missing() -> None:
    model = Model("dict")
    names = default_label_names(model)
    required = required_label_names(model, names)
    inputs = batch(True)
    assert has_labels(inputs, names, False, required=required)
    assert torch.equal(label_values(inputs, names), inputs["labels"])
    assert not has_labels(batch(False), names, False, required=required)
    with pytest.warns(UserWarning, match="the batch has labels but no label_weights, so there is no loss"):
        assert not has_labels(inputs, names, False)


def test_a_needed_label_may_not_be_missing() -> None:
    for model, given, missing in (
        (QuestionAnswering(), "start_positions", "end_positions"),
        (Needs(), "label_weights", "labels"),
    ):
        names = default_label_names(model)
        required = required_label_names(model, names)
        assert has_labels(dict.fromkeys(names, 1), names, False, required=required)
        with pytest.warns(UserWarning, match=f"has {given} but no {missing}"):
            assert not has_labels({given: 1}, names, False, required=required)


@pytest.mark.parametrize(
    ("wanted", "able", "expected"), [(None, True, True), (None, False, False), (True, False, True)]
)
def test_a_model_that_labels_itself(wanted: bool | None, able: bool, expected: bool) -> None:
    assert has_labels({"return_loss": wanted}, [], able) is expected
    assert label_values({}, []) == ()


def test_logits_of_what_4_57_takes_apart() -> None:
    rows = torch.randn(1, 3)
    # A bare tensor is the logits: 4.57 drops its first row, or the dimension of a batch of one row.
    assert logits_of(rows, with_loss=True) is rows
    assert logits_of(rows) is rows
    assert logits_of(torch.tensor(1.0), with_loss=True) == ()
    assert logits_of({"loss": 1, "a": None, "b": rows}, with_loss=True) is rows
    assert logits_of({"loss": 1, "b": 2}) == (1, 2)
    assert logits_of([1, 2, 3], with_loss=True) == [2, 3]


def test_a_batch_that_is_no_mapping_is_refused() -> None:
    with pytest.raises(TypeError, match="inputs: a batch is a list; expected a mapping"):
        prediction_step(
            Model("dict"), [torch.ones(1)], False, label_names=[], can_return_loss=False, compute_loss=lambda: (0, 0)
        )


def test_what_is_called_and_when() -> None:
    model, seen = Model("dict"), []

    @contextmanager
    def context() -> Any:
        seen.append("in")
        yield
        seen.append("out")

    def compute_loss(model: Any, inputs: dict[str, Any], return_outputs: bool, num_items_in_batch: Any) -> Any:
        seen.append(num_items_in_batch)
        assert return_outputs and not torch.is_grad_enabled()
        inputs.pop("labels")
        return torch.tensor([1.0, 3.0]), {"logits": inputs["x"]}

    inputs = batch(True)
    options: Any = {
        "label_names": ["labels"],
        "can_return_loss": False,
        "compute_loss": compute_loss,
        "prepare_inputs": dict,
        "num_items": lambda inputs: len(inputs["labels"]),
        "context": context,
        "on_outputs": lambda outputs: seen.append(sorted(outputs)),
    }
    loss, logits, labels = prediction_step(model, inputs, False, **options)
    assert float(loss) == 2.0 and logits is not None and torch.equal(labels, inputs["labels"])
    assert seen == ["in", 4, "out"]
    prediction_step(model, batch(False), False, **options)
    assert seen[3:] == ["in", ["hidden", "logits", "past_key_values"], "out"]
