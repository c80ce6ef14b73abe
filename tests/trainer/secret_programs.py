"""The program that test_secrets.py runs: a Trainer that is given secrets in every way there is, and then fails.

``python -m tests.trainer.secret_programs CANARY`` trains, saves, evaluates, uploads and writes a card in the current
folder. Standard output and standard error hold what a user would print or see: representations, warnings, tracebacks.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tests.tiny import transformers_config
from tests.trainer.tiny import SETTINGS
from trainkit import HfArgumentParser, Trainer, TrainingArguments


@dataclass
class Arguments(TrainingArguments):
    """As a library extends them."""

    model_init_kwargs: dict[str, Any] | None = None
    tracker_api_key: str | None = None
    database_password: str | None = None


class Failure(Exception):
    """What the model raises when it is told to."""


def secret_settings(canary: str) -> dict[str, Any]:
    """Arguments, each with a secret of its own in it."""
    return {
        "hub_token": f"{canary}-hub",
        "hub_model_id": f"https://user:{canary}-id@hub.example/me/tiny",
        "tracker_api_key": f"{canary}-key",
        "database_password": f"{canary}-password",
        "model_init_kwargs": {"token": f"{canary}-model", "mirrors": [f"https://m.example/x?token={canary}-query&a=1"]},
        "fsdp_config": {"storage": {"auth_token": f"{canary}-nested"}},
        "logging_dir": "logs",
        "run_name": f"at https://{canary}-run@tracker.example/project",
    }


def make_trainer(canary: str) -> Trainer:
    import transformers

    torch.manual_seed(0)
    made: Any = transformers.BertForSequenceClassification
    model = made(transformers_config("BertConfig", num_labels=2))
    rows = [{"input_ids": torch.arange(4) + i, "labels": i % 2} for i in range(6)]
    settings: dict[str, Any] = {
        **SETTINGS,
        "save_strategy": "steps",
        "save_steps": 1,
        "report_to": "tensorboard",
        "max_steps": 2,
    }
    later: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "hub_always_push": True,
    }
    args = Arguments("out", push_to_hub=True, **settings, **later, **secret_settings(canary))
    # The repository has a name that the hub takes.
    trainer = Trainer(model, dataclasses.replace(args, hub_model_id="tiny"), train_dataset=rows, eval_dataset=rows)
    trainer.args.hub_model_id = args.hub_model_id
    return trainer


def failing(model: Any) -> None:
    """From now on its forward pass raises."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise Failure("in the model")

    model.forward = fail


def told(call: Callable[[], Any], expected: type[BaseException]) -> None:
    """Print the traceback of a call that fails."""
    try:
        call()
    except expected:
        traceback.print_exc()
    else:
        raise AssertionError(f"{call} did not fail")


def main(canary: str) -> None:
    warnings.simplefilter("always")
    trainer = make_trainer(canary)
    trainer.train()
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model("saved")
    trainer.push_to_hub()
    trainer.create_model_card(dataset="mine")
    args = trainer.args
    print(args, repr(args), args.to_json_string(), args.to_sanitized_dict(), trainer.state, trainer, sep="\n")
    broken = json.dumps({"api_key": f"{canary}-text", "url": f"https://{canary}@host"})[:-1]
    told(lambda: Arguments("out", use_cpu=True, lr_scheduler_kwargs=broken), ValueError)
    told(lambda: HfArgumentParser(Arguments).parse_args(["--model_init_kwargs", broken]), SystemExit)
    wrong: dict[str, Any] = {"learning_rate": "fast"}
    told(lambda: dataclasses.replace(args, **wrong), TypeError)
    failing(trainer.model)
    told(trainer.train, Failure)
    raise Failure("not caught")


if __name__ == "__main__":
    main(sys.argv[1])
