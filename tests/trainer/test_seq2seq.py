"""Generation in evaluation, beside transformers' Seq2SeqTrainer on the same small T5."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration

from trainkit.trainer.arguments import TrainingArguments
from trainkit.trainer.outputs import EvalPrediction
from trainkit.trainer.seq2seq import Seq2SeqTrainer, allowed_length, generation_inputs, padding_token
from trainkit.trainer.seq2seq_arguments import Seq2SeqTrainingArguments

LENGTH = 7


def make_t5(seed: int = 0, **generation: Any) -> T5ForConditionalGeneration:
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=23, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0, dropout_rate=0.0
    )
    model = T5ForConditionalGeneration(config)
    options = {"max_length": LENGTH, "decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    model.generation_config = GenerationConfig(**{**options, **generation})
    return model


def rows(n: int = 5, source: int = 4, target: int = 3) -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(1)
    draw = lambda length: torch.randint(2, 23, (length,), generator=g)  # noqa: E731
    return [
        {"input_ids": draw(source), "attention_mask": torch.ones(source).long(), "labels": draw(target)}
        for _ in range(n)
    ]


def options(folder: Path, **given: Any) -> dict[str, Any]:
    fixed = {"output_dir": str(folder), "report_to": "none", "use_cpu": True, "predict_with_generate": True}
    return {**fixed, "per_device_eval_batch_size": 2, "disable_tqdm": False, **given}


def both(folder: Path, model: Any, compute_metrics: Any = None, **given: Any) -> tuple[Any, Any]:
    """Our trainer and the peer, each with its own copy of the model."""
    args = options(folder, **given)
    ours = Seq2SeqTrainer(copy.deepcopy(model), Seq2SeqTrainingArguments(**args), compute_metrics=compute_metrics)
    peer = transformers.Seq2SeqTrainer(
        copy.deepcopy(model), transformers.Seq2SeqTrainingArguments(**args), compute_metrics=compute_metrics
    )
    return ours, peer


@pytest.mark.parametrize(
    ("given", "gen_kwargs", "generation"),
    [
        ({}, {}, {}),
        ({"generation_max_length": 5}, {}, {}),
        ({"generation_num_beams": 2}, {}, {}),
        ({"generation_max_length": 5}, {"max_new_tokens": 2}, {}),
        ({}, {"max_length": 4, "num_beams": 2}, {}),
        ({}, {}, {"max_length": 2, "max_new_tokens": 5}),
        ({"predict_with_generate": False}, {}, {}),
        ({"prediction_loss_only": True}, {}, {}),
    ],
)
def test_predictions_equal_those_of_the_peer(
    tmp_path: Path, given: dict[str, Any], gen_kwargs: dict[str, Any], generation: dict[str, Any]
) -> None:
    ours, peer = both(tmp_path, make_t5(**generation), **given)
    # Full batches: the peer counts the loss of a last, shorter one as if it was full.
    found, expected = ours.predict(rows(6), **gen_kwargs), peer.predict(rows(6), **gen_kwargs)
    assert found.metrics["test_loss"] == pytest.approx(expected.metrics["test_loss"], rel=1e-5)
    for name in ("predictions", "label_ids"):
        a, b = getattr(found, name), getattr(expected, name)
        for one, other in zip(a if isinstance(a, tuple) else (a,), b if isinstance(b, tuple) else (b,), strict=True):
            if other is None:
                assert one is None
            else:
                np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_the_loss_is_the_mean_over_all_rows(tmp_path: Path) -> None:
    ours, _ = both(tmp_path, make_t5(), generation_max_length=2)
    alone = [ours.predict([row]).metrics["test_loss"] for row in rows(5)]
    assert ours.predict(rows(5)).metrics["test_loss"] == pytest.approx(sum(alone) / 5, rel=1e-5)


def test_metrics_get_the_sequences(tmp_path: Path) -> None:
    def metric(found: EvalPrediction) -> dict[str, float]:
        return {"width": found.predictions.shape[1], "sum": float(found.predictions.sum() + found.label_ids.sum())}

    ours, peer = both(tmp_path, make_t5(), metric)
    a, b = ours.evaluate(rows(), num_beams=2), peer.evaluate(rows(), num_beams=2)
    assert (a["eval_width"], a["eval_sum"]) == (b["eval_width"], b["eval_sum"])
    assert a["eval_width"] == LENGTH
    assert ours._gen_kwargs == peer._gen_kwargs == {"num_beams": 2}


def test_data_without_labels_are_predicted(tmp_path: Path) -> None:
    ours, _ = both(tmp_path, make_t5())
    found = ours.predict([{k: v for k, v in row.items() if k != "labels"} for row in rows()])
    assert found.predictions.shape == (5, LENGTH)
    assert found.label_ids is None and "test_loss" not in found.metrics


class Recording(T5ForConditionalGeneration):
    """Keeps what it is asked to generate with."""

    asked: list[dict[str, Any]]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        self.asked = [
            *getattr(self, "asked", []),
            {k: v for k, v in kwargs.items() if k in ("num_beams", "max_length")},
        ]
        return super().generate(*args, **kwargs)


def test_each_of_several_data_sets_is_generated_as_asked(tmp_path: Path) -> None:
    model = make_t5()
    model.__class__ = Recording
    args = Seq2SeqTrainingArguments(**options(tmp_path))
    trainer = Seq2SeqTrainer(
        model,
        args,
        eval_dataset={"a": rows(2), "b": rows(2)},
        compute_metrics=lambda found: {"n": len(found.label_ids)},
    )
    metrics = trainer.evaluate(num_beams=2, max_length=4)
    assert metrics["eval_a_n"] == metrics["eval_b_n"] == 2
    assert model.asked == [{"num_beams": 2, "max_length": 4}] * 2
    trainer.evaluate()
    assert model.asked[2:] == [{}, {}]


def test_the_loss_is_that_of_compute_loss(tmp_path: Path) -> None:
    class Doubled(Seq2SeqTrainer):
        def compute_loss(self, *args: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            loss, outputs = super().compute_loss(*args, return_outputs=True, **kwargs)
            return (2 * loss, outputs) if return_outputs else 2 * loss

    args = Seq2SeqTrainingArguments(**options(tmp_path))
    plain = Seq2SeqTrainer(make_t5(), args).predict(rows()).metrics["test_loss"]
    assert Doubled(make_t5(), args).predict(rows()).metrics["test_loss"] == pytest.approx(2 * plain)


def test_training_evaluates_with_generation(tmp_path: Path) -> None:
    args = Seq2SeqTrainingArguments(
        **options(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1, save_strategy="no", learning_rate=0.01)
    )
    trainer = Seq2SeqTrainer(
        make_t5(),
        args,
        train_dataset=rows(8),
        eval_dataset=rows(3),
        compute_metrics=lambda found: {"shape": found.predictions.shape[1]},
    )
    trainer.train()
    found = [entry["eval_shape"] for entry in trainer.state.log_history if "eval_shape" in entry]
    assert found == [LENGTH, LENGTH]


# -- configuration of generation ---------------------------------------------------------------------------------------


def test_the_configuration_of_the_arguments_is_that_of_every_model(tmp_path: Path) -> None:
    config = GenerationConfig(max_length=9, num_beams=3, decoder_start_token_id=0)
    args = Seq2SeqTrainingArguments(**options(tmp_path, generation_config=config, max_steps=1, save_strategy="no"))
    made: list[Any] = []

    def init() -> Any:
        made.append(make_t5())
        return made[-1]

    trainer = Seq2SeqTrainer(model_init=init, args=args, train_dataset=rows(2))
    trainer.train()
    assert len(made) == 2 and all(model.generation_config == config for model in made)
    assert made[0].generation_config is not config
    assert Seq2SeqTrainer(make_t5(), args).model.generation_config.num_beams == 3


def test_a_configuration_is_read_from_a_file_or_a_folder(tmp_path: Path) -> None:
    config = GenerationConfig(max_length=9)
    config.save_pretrained(tmp_path)
    for place in (
        tmp_path,
        str(tmp_path),
        tmp_path / "generation_config.json",
        str(tmp_path / "generation_config.json"),
    ):
        assert Seq2SeqTrainer.load_generation_config(place).max_length == 9
    copied = Seq2SeqTrainer.load_generation_config(config)
    assert copied == config and copied is not config


def test_a_configuration_that_contradicts_itself_is_refused() -> None:
    config = GenerationConfig()
    config.num_beams, config.early_stopping = 1, True
    with pytest.raises(ValueError, match="generation_config: GenerationConfig is invalid"):
        Seq2SeqTrainer.load_generation_config(config)


def test_arguments_without_generation_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="args: got TrainingArguments, expected Seq2SeqTrainingArguments"):
        Seq2SeqTrainer(make_t5(), TrainingArguments(str(tmp_path), report_to="none"))


# -- functions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "longest", "new", "expected"),
    [
        (3, 7, None, 7),
        (7, 7, None, None),
        (3, None, 4, 5),
        (6, 3, 4, None),
        (3, 3, 4, 5),
        (3, 9, 4, 9),
        (3, None, None, None),
    ],
)
def test_sequences_are_filled_up_to_what_is_allowed(
    length: int, longest: int | None, new: int | None, expected: int | None
) -> None:
    config = GenerationConfig(max_new_tokens=new)
    config.max_length = longest
    assert allowed_length(length, config) == expected


def test_inputs_of_the_decoder_made_of_labels_are_left_out() -> None:
    ids, longer = torch.ones(2, 3), torch.ones(2, 4)
    batch = {"input_ids": ids, "labels": ids, "decoder_input_ids": ids, "decoder_attention_mask": ids}
    assert set(generation_inputs(batch)) == {"input_ids", "labels"}
    assert set(generation_inputs({**batch, "decoder_input_ids": longer})) == set(batch)
    assert set(generation_inputs({"input_ids": ids, "decoder_input_ids": ids})) == {"input_ids", "decoder_input_ids"}


def test_the_token_that_fills_up() -> None:
    class Tokenizer:
        pad_token_id: int | None = 5
        eos_token_id = 6

    tokenizer, model = Tokenizer(), make_t5()
    assert padding_token(tokenizer, model) == 5
    tokenizer.pad_token_id = None
    assert padding_token(tokenizer, model) == 6
    assert padding_token(None, model) == 0
    with pytest.raises(ValueError, match="pad_token_id: neither"):
        padding_token(None, torch.nn.Linear(1, 1))
