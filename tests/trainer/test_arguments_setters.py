"""The fluent setters beside those of transformers 4.57."""

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import transformers

from tests.trainer.both_arguments import described, ours, restored, theirs
from trainkit.trainer.arguments import TrainingArguments


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    with restored():
        yield


SETTERS: list[tuple[str, dict[str, Any]]] = [
    ("set_training", {"learning_rate": 1e-3, "batch_size": 2, "num_epochs": 1, "gradient_checkpointing": True}),
    ("set_evaluate", {"strategy": "steps", "steps": 3, "delay": 1.0}),
    ("set_testing", {"batch_size": 3, "loss_only": True}),
    ("set_save", {"strategy": "best", "total_limit": 2}),
    ("set_logging", {"strategy": "epoch", "report_to": ["wandb"], "level": "info", "nan_inf_filter": True}),
    ("set_push_to_hub", {"model_id": "a/b", "strategy": "end", "token": "t", "private_repo": True, "revision": "r"}),
    ("set_optimizer", {"name": "sgd", "beta1": 0.5, "args": "a=1"}),
    ("set_lr_scheduler", {"name": "cosine", "warmup_ratio": 0.1, "max_steps": 4}),
    ("set_dataloader", {"train_batch_size": 2, "num_workers": 1, "prefetch_factor": 3, "sampler_seed": 5}),
]


class TestSetters:
    @pytest.mark.parametrize(("name", "given"), SETTERS, ids=[name for name, _ in SETTERS])
    def test_set_what_transformers_sets(self, name: str, given: dict[str, Any]) -> None:
        mine, peer = ours(), theirs()
        assert getattr(mine, name)(**given) is mine
        getattr(peer, name)(**given)
        assert described(mine) == described(peer)

    @pytest.mark.parametrize("name", [name for name, _ in SETTERS])
    def test_parameters_are_those_of_transformers(self, name: str) -> None:
        def table(kind: Any) -> list[tuple[str, Any]]:
            return [(p.name, p.default) for p in inspect.signature(getattr(kind, name)).parameters.values()]

        assert table(TrainingArguments) == table(transformers.TrainingArguments)

    @pytest.mark.parametrize("name", ["set_evaluate", "set_save", "set_logging"])
    def test_no_steps(self, name: str) -> None:
        with pytest.raises(ValueError, match="steps: got 0"):
            getattr(ours(), name)(strategy="steps", steps=0)

    def test_no_delay_is_zero(self) -> None:
        assert ours().set_evaluate("epoch").eval_delay == 0

    def test_no_tracker_is_an_empty_list(self) -> None:
        assert ours(report_to="wandb").set_logging().report_to == []
