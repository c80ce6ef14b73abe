"""Model cards, beside those of transformers 4.57 for the same run."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import metadata_load
from transformers import modelcard

from trainkit.trainer.arguments import TrainingArguments
from trainkit.trainer.model_card import (
    hyperparameters,
    names_of_data,
    shown,
    table,
    task_of,
    training_results,
    write_model_card,
)
from trainkit.trainer.state import TrainerState

SPEED = {"eval_runtime": 1.5, "eval_samples_per_second": 2.0, "eval_steps_per_second": 1.0}
LOG: list[dict[str, Any]] = [
    {"eval_loss": 1.25, "eval_accuracy": 0.25, **SPEED, "epoch": 0.5, "step": 1},
    {"loss": 1.123456, "grad_norm": 1.0, "learning_rate": 0.1, "epoch": 1.0, "step": 2},
    {"eval_loss": 1.0, "eval_accuracy": 0.5, **SPEED, "epoch": 1.0, "step": 2},
    {"loss": 0.5, "learning_rate": 0.1, "epoch": 2.0, "step": 4},
    {"eval_loss": 0.75, "eval_accuracy": 0.66666667, **SPEED, "epoch": 2.0, "step": 4},
    {"train_runtime": 9.0, "train_loss": 0.8, "total_flos": 0.0, "epoch": 2.0, "step": 4},
]


class Net(torch.nn.Module):
    pass


def make_model(name: str = "someone/base") -> transformers.PreTrainedModel:
    config = transformers.DistilBertConfig(dim=8, hidden_dim=8, n_layers=1, n_heads=1, vocab_size=11, num_labels=2)
    model = transformers.DistilBertForSequenceClassification(config)
    model.config._name_or_path = name
    return model


def of_the_hub(name: str | None = "glue") -> datasets.Dataset:
    info = datasets.DatasetInfo(builder_name=name, config_name="mrpc")
    return datasets.Dataset.from_dict({"x": [1]}, info=info, split=datasets.Split.VALIDATION)


def write(folder: Path, log: list[dict[str, Any]] | None = None, model: Any = None, **options: Any) -> tuple[Any, str]:
    """The front matter and the text of a card."""
    write_model_card(
        folder,
        args=TrainingArguments(str(folder), report_to="none", use_cpu=True),
        state=TrainerState(log_history=LOG if log is None else log),
        model=Net() if model is None else model,
        **options,
    )
    path = folder / "README.md"
    return metadata_load(path), path.read_text()


def peer(folder: Path, model: Any, log: list[dict[str, Any]], data: Any = None, **options: Any) -> Any:
    """What transformers says of the same run."""
    trainer = SimpleNamespace(
        args=transformers.TrainingArguments(str(folder), report_to="none", use_cpu=True, **options),
        model=model,
        state=SimpleNamespace(log_history=log),
        eval_dataset=data,
        train_dataset=None,
        use_apex=False,
    )
    return modelcard.TrainingSummary.from_trainer(trainer, license="mit", model_name="tiny")


def sections(text: str) -> list[str]:
    return re.findall(r"^#+ .*$", text, flags=re.MULTILINE)


def test_a_card_has_the_structure_and_the_front_matter_of_the_peer(tmp_path: Path) -> None:
    model, data = make_model(), of_the_hub()
    found, text = write(tmp_path, model=model, datasets=(data, None), license="mit", model_name="tiny")
    summary = peer(tmp_path, model, LOG, data)
    expected = summary.to_model_card()
    assert sections(text) == sections(expected)
    assert found == summary.create_metadata()
    assert list(found) == list(summary.create_metadata())
    wanted = expected[expected.index("| Training Loss") :].split("\n\n")[0]
    assert wanted in text
    for line in ("- Loss: 0.75", "- Accuracy: 0.6667", "- learning_rate: 5e-05", "- num_epochs: 3.0"):
        assert line in text.splitlines() and line in expected.splitlines()
    assert "a fine-tuned version of [someone/base](https://huggingface.co/someone/base) on the glue dataset." in text


def test_the_card_of_a_plain_module_claims_nothing(tmp_path: Path) -> None:
    found, text = write(tmp_path / "my_run")
    assert list(found) == ["tags", "metrics", "model-index"]
    assert found["tags"] == ["generated_from_trainer"]
    assert found["model-index"] == [{"name": "my_run", "results": []}]
    assert "# my_run" in text and "trained from scratch on an unknown dataset." in text


@pytest.mark.parametrize("name", ["", "folder"])
def test_an_empty_name_or_a_local_folder_is_no_origin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    found, text = write(tmp_path, model=make_model(name))
    assert "base_model" not in found and "]()" not in text
    assert "trained from scratch" in text


def test_what_the_caller_says_wins(tmp_path: Path) -> None:
    found, text = write(
        tmp_path,
        model=make_model(),
        datasets=(of_the_hub(), None),
        language="de",
        license="mit",
        tags="mine",
        model_name="other",
        finetuned_from="x/y",
        tasks=["fill-mask"],
        dataset_tags=["a", "b"],
        dataset=["A", "B"],
        dataset_args=["one"],
    )
    assert found["language"] == ["de"] and found["license"] == "mit" and found["base_model"] == "x/y"
    assert found["tags"] == ["mine", "generated_from_trainer"] and found["datasets"] == ["a", "b"]
    results = found["model-index"][0]["results"]
    assert [result["dataset"]["type"] for result in results] == ["a", "b"]
    assert [result["dataset"].get("args") for result in results] == ["one", None]
    assert results[0]["task"] == {"name": "Masked Language Modeling", "type": "fill-mask"}
    assert results[0]["metrics"] == [{"name": "Accuracy", "type": "accuracy", "value": 0.66666667}]
    assert "on the A and the B datasets." in text


def test_tags_of_an_older_card_are_kept_only_if_tags_are_given(tmp_path: Path) -> None:
    assert write(tmp_path, tags=["old"])[0]["tags"] == ["old", "generated_from_trainer"]
    given = ["new"]
    assert write(tmp_path, tags=given)[0]["tags"] == ["new", "old", "generated_from_trainer"]
    assert given == ["new"]
    assert write(tmp_path)[0]["tags"] == ["generated_from_trainer"]


def test_a_card_that_cannot_be_read_is_replaced_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\ntags: [unclosed\n---\n")
    with pytest.warns(UserWarning, match="front matter cannot be read"):
        found, _ = write(tmp_path)
    assert found["tags"] == ["generated_from_trainer"]


def test_a_card_of_peft_is_completed_by_the_model(tmp_path: Path) -> None:
    class Adapted(Net):
        def create_or_update_model_card(self, folder: str) -> None:
            path = Path(folder, "README.md")
            path.write_text(path.read_text() + "\ncompleted\n")

    assert "completed" not in write(tmp_path, model=Adapted())[1]
    (tmp_path / "README.md").write_text("---\nlibrary_name: peft\n---\n")
    assert write(tmp_path, model=Adapted())[1].endswith("\ncompleted\n")


# -- results -----------------------------------------------------------------------------------------------------------


def test_rows_and_results_equal_those_of_the_peer() -> None:
    _, rows, results = modelcard.parse_log_history(LOG)
    assert training_results(LOG) == (rows, results)


def test_logs_that_count_tokens_do_not_end_the_training() -> None:
    counted = [
        {**entry, "train_runtime": 1.0, "num_input_tokens_seen": 5} if "loss" in entry else entry for entry in LOG
    ]
    _, rows, _ = modelcard.parse_log_history(counted)
    assert len(rows) == 1
    assert training_results(counted) == training_results(LOG)


def test_evaluations_after_training_give_results_but_no_row() -> None:
    rows, results = training_results([*LOG, {"eval_loss": 0.5, "eval_accuracy": 1.0, **SPEED, "epoch": 2.0, "step": 4}])
    assert len(rows) == 3 and results == {"Loss": 0.5, "Accuracy": 1.0}


def test_several_data_sets_share_a_row() -> None:
    log = [
        {"loss": 2.0, "step": 3},
        {"eval_a_loss": 1.0, "eval_a_f1": 0.5, "eval_a_runtime": 1.0, "epoch": 1.0, "step": 3},
        {"eval_b_loss": 3.0, "eval_b_runtime": 1.0, "epoch": 1.0, "step": 3},
        {"eval_a_loss": 0.5, "eval_a_f1": 0.75, "eval_a_runtime": 1.0, "epoch": 2.0, "step": 6},
        {"train_loss": 1.0, "step": 6},
    ]
    rows, results = training_results(log)
    first = {"Training Loss": 2.0, "Epoch": 1.0, "Step": 3, "A Loss": 1.0, "A F1": 0.5, "B Loss": 3.0}
    assert rows[0] == first and len(rows) == 2
    assert results == {"A Loss": 0.5, "A F1": 0.75}
    assert table(rows).splitlines()[-1] == "| 2.0           | 2.0   | 6    | 0.5    | 0.75 |        |"


def test_times_and_memory_are_no_results() -> None:
    entry = {"eval_loss": 1.0, **SPEED, "eval_model_preparation_time": 0.1, "eval_mem_cpu_alloc_delta": 5, "step": 1}
    assert training_results([entry])[1] == {"Loss": 1.0}


def test_a_run_without_evaluation_has_no_table(tmp_path: Path) -> None:
    _, text = write(tmp_path, log=[LOG[1], LOG[5]])
    assert "Training results" not in text and "achieves" not in text


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    log = [{"eval_loss": np.float32(0.5), "eval_f1": np.float64(0.25), "step": 1}]
    found, text = write(tmp_path, log=log, tasks="text-classification", dataset_tags="glue")
    assert found["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.25
    assert "- F1: 0.25" in text


def test_a_metric_with_a_value_per_class_is_a_list(tmp_path: Path) -> None:
    log = [{"eval_loss": 0.5, "eval_f1": np.array([0.25, 0.5]), "eval_recall": torch.tensor([1.0, 0.5]), "step": 1}]
    found, text = write(tmp_path, log=log, tasks="text-classification", dataset_tags="glue")
    values = {metric["type"]: metric["value"] for metric in found["model-index"][0]["results"][0]["metrics"]}
    assert values == {"f1": [0.25, 0.5], "recall": [1.0, 0.5]}
    assert "- F1: [0.25, 0.5]" in text


@pytest.mark.parametrize("value", [0.1, 0.12344, 1.0, 3, "No log", None, 123.456789, 1e-05])
def test_values_are_shown_as_the_peer_shows_them(value: Any) -> None:
    assert shown(value) == modelcard._maybe_round(value)


def test_small_values_keep_their_digits() -> None:
    assert modelcard._maybe_round(1.2345678e-06) == "0.0000"
    assert shown(1.2345678e-06) == "1.235e-06"


# -- names -------------------------------------------------------------------------------------------------------------


def test_the_task_of_every_class_that_the_peer_knows() -> None:
    expected = {
        name: task
        for task, mapping in modelcard.TASK_MAPPING.items()
        for name in modelcard._get_mapping_values(mapping)
    }
    assert len(expected) > 400
    for name, task in expected.items():
        model = object.__new__(type(name, (transformers.PreTrainedModel,), {}))
        assert task_of(model) == [task], name


def test_a_subclass_has_the_task_of_its_parent_and_a_plain_module_none() -> None:
    class Tuned(transformers.DistilBertForSequenceClassification):
        pass

    assert task_of(Tuned(make_model().config)) == ["text-classification"]
    assert task_of(type("BertForMaskedLM", (Net,), {})()) == []


def test_names_of_data() -> None:
    assert names_of_data(of_the_hub()) == {
        "dataset_tags": ["glue"],
        "dataset_args": ["mrpc"],
        "dataset_metadata": [{"config": "mrpc", "split": "validation"}],
    }
    assert names_of_data(of_the_hub("csv")) == names_of_data(of_the_hub(None)) == names_of_data([1, 2]) == {}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 4, "warmup_ratio": 0.1, "max_steps": 10},
        {
            "warmup_steps": 3,
            "label_smoothing_factor": 0.1,
            "lr_scheduler_type": "cosine",
            "per_device_eval_batch_size": 2,
        },
    ],
)
def test_hyperparameters_equal_those_of_the_peer(tmp_path: Path, options: dict[str, Any]) -> None:
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, **options)
    expected = peer(tmp_path, make_model(), LOG, **options).hyperparameters
    found = hyperparameters(args)
    assert list(found) == list(expected)
    assert {k: v for k, v in found.items() if k != "optimizer"} == {
        k: v for k, v in expected.items() if k != "optimizer"
    }
    assert found["optimizer"] == "adamw_torch_fused, betas=(0.9, 0.999), epsilon=1e-08"
