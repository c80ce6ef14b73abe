"""Argument classes of third parties that derive from TrainingArguments, and the settings that they make the default."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import trainkit
from tests.tiny import transformers_config
from tests.trainer.test_client_surface import SETTINGS
from tests.trainer.tiny import make_net, make_rows


@dataclass
class TheirConfig(trainkit.TrainingArguments):
    """Other defaults, new fields, more done after the beginning."""

    _VALID_DICT_FIELDS = [*trainkit.TrainingArguments._VALID_DICT_FIELDS, "prompts"]  # noqa: RUF012

    learning_rate: float = field(default=1e-3, metadata={"help": "other than there"})
    logging_steps: float = field(default=10)
    gradient_checkpointing: bool = field(default=True)
    bf16: bool | None = field(default=None)
    average_tokens_across_devices: bool = field(default=False)
    max_length: int | None = field(default=1024)
    prompts: dict[str, str] | str | None = field(default=None)
    model_init_kwargs: dict[str, Any] | str | None = field(default=None)

    def __post_init__(self) -> None:
        self.bf16 = not self.fp16 if self.bf16 is None else self.bf16
        super().__post_init__()
        self.prediction_loss_only = True
        self.ddp_broadcast_buffers = False

    def to_dict(self) -> dict[str, Any]:
        found = super().to_dict()
        del found["model_init_kwargs"]
        return found

    def get_warmup_steps(self, num_training_steps: int) -> int:
        return 1


@dataclass
class Mixed:
    margin: float = 0.5


@dataclass
class MixedConfig(Mixed, TheirConfig):
    """With another dataclass before it."""


@pytest.mark.filterwarnings("ignore:old names of arguments:FutureWarning")
@pytest.mark.parametrize("cls", [TheirConfig, MixedConfig])
def test_other_defaults_and_fields(cls: Any, tmp_path: Path) -> None:
    args = cls(output_dir=str(tmp_path), report_to="none", use_cpu=True, prompts='{"a": "b"}')
    assert (args.learning_rate, args.logging_steps, args.max_length, args.bf16) == (1e-3, 10, 1024, True)
    assert args.gradient_checkpointing and args.prediction_loss_only and args.ddp_broadcast_buffers is False
    assert args.prompts == {"a": "b"} and "model_init_kwargs" not in args.to_dict()
    changed = dataclasses.replace(args, include_inputs_for_metrics=True, remove_unused_columns=False)
    assert type(changed) is cls and not changed.remove_unused_columns and changed.max_length == 1024
    again = cls(**{k: v for k, v in args.to_dict().items() if k not in ("hub_token", "push_to_hub_token")})
    assert again.to_dict() == args.to_dict()


def test_their_configuration_trains(tmp_path: Path) -> None:
    args = MixedConfig(
        output_dir=str(tmp_path), **{**SETTINGS, "learning_rate": 0.1}, bf16=False, gradient_checkpointing=False
    )
    trainer = trainkit.Trainer(make_net(), args, train_dataset=make_rows(8), eval_dataset=make_rows(4))
    trainer.train()
    rates = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    # The warm-up is the override's.
    assert rates == pytest.approx([0.0, 0.1, 0.1 * 2 / 3, 0.1 / 3])
    assert isinstance(trainer.evaluate(), Mapping)


@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": True}, {"use_reentrant": False}])
@pytest.mark.parametrize("by", ["arguments", "hand"])
def test_gradient_checkpointing(by: str, kwargs: Any, tmp_path: Path) -> None:
    def trained(**settings: Any) -> Any:
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers_config("LlamaConfig", num_hidden_layers=2))
        if by == "hand" and settings:
            model.gradient_checkpointing_enable(kwargs)
        args = trainkit.TrainingArguments(
            str(tmp_path),
            **{**SETTINGS, "eval_strategy": "no", "save_strategy": "no"},
            **(settings if by != "hand" else {}),
        )
        rows = [{"input_ids": torch.arange(5) + i, "labels": torch.arange(5) + i} for i in range(6)]
        trainer = trainkit.Trainer(model, args, train_dataset=rows)
        trainer.train()
        return dict(trainer.model.state_dict())

    changed = trained(gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)
    torch.testing.assert_close(changed, trained())
