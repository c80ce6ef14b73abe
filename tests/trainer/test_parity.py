"""The Trainer beside that of transformers 4.57: the same logs, rates, lengths, metrics and files.

Where docs/differences.md names a difference, the cases keep away from it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

from tests.trainer.pairs import Pair, ours
from tests.trainer.scenarios import accuracy
from tests.trainer.tiny import make_net, make_rows, without_times

# Written as JSON instead of a pickle; a list of files with digests.
RENAMED = {"training_args.bin": "training_args.json"}
ADDED = {"manifest.json"}


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(make_rows(8))


def trained(folder: Path, arguments: dict[str, Any], **given: Any) -> Pair:
    rows = {"train_dataset": make_rows(11), "eval_dataset": make_rows(7, seed=1)}
    return Pair(folder, arguments, **{**rows, **given}).train()


def assert_same_logs(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    assert [sorted(log) for log in map(without_times, ours)] == [sorted(log) for log in map(without_times, theirs)]
    for one, other in zip(map(without_times, ours), map(without_times, theirs), strict=True):
        for key, value in other.items():
            # 4.57 rounds the logged loss to four decimals.
            close = math.isclose(one[key], value, rel_tol=1e-5, abs_tol=6e-5 if key == "loss" else 1e-7)
            assert close, (key, one, other)


CASES: dict[str, dict[str, Any]] = {
    "plain": {"num_train_epochs": 2},
    "accumulation with a ragged end": {"gradient_accumulation_steps": 4, "num_train_epochs": 2},
    "drop_last": {"dataloader_drop_last": True, "num_train_epochs": 2},
    "max_steps": {"max_steps": 7, "logging_steps": 3},
    "part of an epoch": {"num_train_epochs": 1.5},
    "warm-up by ratio": {"warmup_ratio": 0.3, "num_train_epochs": 2},
    "warm-up by steps, cosine": {"warmup_steps": 2, "lr_scheduler_type": "cosine"},
    "constant": {"lr_scheduler_type": "constant"},
    "polynomial": {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}},
    "weight decay, no clipping": {"weight_decay": 0.1, "max_grad_norm": 0.0},
    "clipping": {"max_grad_norm": 0.1, "gradient_accumulation_steps": 2},
    "sgd": {"optim": "sgd"},
    "adafactor": {"optim": "adafactor"},
    "logged by epoch": {"logging_strategy": "epoch", "logging_first_step": True, "num_train_epochs": 2},
    "logged by ratio": {"logging_steps": 0.25, "num_train_epochs": 3},
    "evaluation by steps": {"eval_strategy": "steps", "eval_steps": 2},
    "evaluation by epoch": {"eval_strategy": "epoch", "num_train_epochs": 2},
    "evaluation delayed": {"eval_strategy": "steps", "eval_steps": 2, "eval_delay": 3, "eval_on_start": True},
    "saved and the best loaded": {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
        "save_total_limit": 2,
        "num_train_epochs": 2,
    },
    "saved by epoch": {"save_strategy": "epoch", "num_train_epochs": 2},
    "only the model is saved": {"save_strategy": "steps", "save_steps": 3, "save_only_model": True},
}


@pytest.mark.parametrize("name", CASES)
def test_runs_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    pair = trained(tmp_path, CASES[name], compute_metrics=accuracy)
    assert_same_logs(*pair.logs())
    one, other = pair.results
    assert one.global_step == other.global_step
    # Theirs sums rounded losses.
    assert math.isclose(one.training_loss, other.training_loss, rel_tol=1e-4)
    assert one.metrics.keys() == other.metrics.keys() | {"total_flos"}
    for name_of, tensor in pair.theirs.model.state_dict().items():
        torch.testing.assert_close(pair.ours.model.state_dict()[name_of], tensor, rtol=1e-4, atol=1e-6)
    assert files_in(tmp_path / "ours") == files_in(tmp_path / "theirs", add=True)


def files_in(folder: Path, *, add: bool = False) -> set[str]:
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if not add:
        return found
    folders = {name.rsplit("/", 1)[0] for name in found if "/" in name}
    renamed = {f"{head}{sep}{RENAMED.get(last, last)}" for head, sep, last in (name.rpartition("/") for name in found)}
    return renamed | {f"{each}/{name}" for each in folders for name in ADDED}


def test_a_stream_is_trained_on_as_in_transformers(tmp_path: Path) -> None:
    arguments = {"max_steps": 7, "gradient_accumulation_steps": 2}
    assert_same_logs(*trained(tmp_path, arguments, train_dataset=Stream()).logs())


def test_several_evaluation_sets(tmp_path: Path) -> None:
    sets = {"a": make_rows(5, seed=2), "b": make_rows(4, seed=3)}
    arguments = {"eval_strategy": "epoch"}
    assert_same_logs(*trained(tmp_path, arguments, eval_dataset=sets, compute_metrics=accuracy).logs())


def test_predictions_are_those_of_transformers(tmp_path: Path) -> None:
    rows = make_rows(8, seed=5)
    one, other = (trainer.predict(rows) for trainer in trained(tmp_path, {}).all)
    np.testing.assert_allclose(one.predictions, other.predictions, rtol=1e-4)
    np.testing.assert_array_equal(one.label_ids, other.label_ids)
    assert without_times(one.metrics).keys() == without_times(other.metrics).keys()
    assert math.isclose(one.metrics["test_loss"], other.metrics["test_loss"], rel_tol=1e-5)


def test_a_checkpoint_of_transformers_is_gone_on_from(tmp_path: Path) -> None:
    arguments = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 4}
    pair = trained(tmp_path, arguments)
    again = ours(tmp_path / "again", arguments, model=make_net(seed=1), train_dataset=make_rows(11))
    again.train(resume_from_checkpoint=str(tmp_path / "theirs" / "checkpoint-4"))
    assert_same_logs(*([log for log in t.state.log_history if "loss" in log] for t in (again, pair.theirs)))
