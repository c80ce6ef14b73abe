"""Nothing that a Trainer is given in confidence is in any byte that it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.secret_programs import secret_settings
from tests.trainer.stand_in_hub import StandInHub
from trainkit.trainer.arguments import TrainingArguments
from trainkit.trainer.secrets import is_secret, text_without_secrets, without_secrets
from trainkit.trainer.tracker_services import run_config

CANARY = "canary-7f3a"
ENVIRONMENT = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "PASSWORD")
ROOT = Path(__file__).parents[2]


@dataclass
class Run:
    """What a run left: its exit code, what it printed, and the bytes of each of its files."""

    code: int
    printed: dict[str, bytes]
    files: dict[str, bytes]
    uploaded: dict[str, bytes]


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder, home = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp(f"home-{CANARY}")
    there = StandInHub()
    environment = {
        **os.environ,
        **{name: f"{CANARY}-{name}" for name in ENVIRONMENT},
        "HTTPS_PROXY": f"http://user:{CANARY}@localhost:1",
        "NO_PROXY": "127.0.0.1",
        "HF_ENDPOINT": there.endpoint,
        "HOME": str(home),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "tests.trainer.secret_programs", CANARY]
    done = subprocess.run(command, env=environment, capture_output=True, cwd=folder)
    there.close()
    files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    return Run(done.returncode, {"output": done.stdout, "error": done.stderr}, files, there.files)


def test_all_was_written_that_could_hold_a_secret(left: Run) -> None:
    assert (left.code, left.printed["error"].splitlines()[-1]) == (1, b"Failure: not caught")
    assert left.printed["error"].count(b"Traceback (most recent call last)") > 4
    assert b"lr_scheduler_kwargs" in left.printed["output"] and b"<TRACKER_API_KEY>" in left.printed["output"]
    names = {Path(name).name.partition(".tfevents")[0] for name in left.files}
    assert names > {
        "training_args.json",
        "trainer_state.json",
        "README.md",
        "events.out",
        "optimizer.pt",
        "config.json",
    }
    assert {"README.md", "training_args.json"} <= left.uploaded.keys()


@pytest.mark.parametrize("kind", ["printed", "files", "uploaded"])
def test_no_secret_is_in_what_was_written(left: Run, kind: str) -> None:
    assert [name for name, content in getattr(left, kind).items() if CANARY.encode() in content] == []


def test_each_way_to_give_a_secret_would_be_noticed() -> None:
    """The program gives them to fields that are written down."""
    text = json.dumps({name: str(value) for name, value in secret_settings(CANARY).items()})
    assert text.count(CANARY) >= 7


class TestNames:
    @pytest.mark.parametrize(
        "name",
        ["token", "TOKEN", "hub_token", "use_auth_token", "accessToken", "api_key", "comet-api-key", "apikey"]
        + ["password", "db_passwd", "client_secret", "aws_secret_access_key", "private_key", "credentials"]
        + ["api_keys", "refresh_tokens", "Authorization", "github_token", "wandb-token", "pwd"],
    )  # fmt: skip
    def test_secrets(self, name: str) -> None:
        assert is_secret(name)
        assert without_secrets({"deep": [{name: CANARY}]}) == {"deep": [{name: f"<{name.upper()}>"}]}

    @pytest.mark.parametrize(
        "name",
        ["pad_token", "eos_token", "max_tokens", "include_tokens_per_second", "tokenizer", "key", "key_size", "seed"]
        + ["secretary", "token_type", "passing", "metric_for_best_model", "api", "hub_model_id"],
    )  # fmt: skip
    def test_others(self, name: str) -> None:
        assert without_secrets({name: "shown"}) == {name: "shown"}

    def test_numbers_and_nothing_are_no_secrets(self) -> None:
        content = {"token": None, "password": 3, "api_key": True}
        assert without_secrets(content) == content


class TestTexts:
    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            (f"https://user:{CANARY}@host:80/x", "https://<HIDDEN>@host:80/x"),
            (f"postgresql+pg://{CANARY}@host", "postgresql+pg://<HIDDEN>@host"),
            (f"https://user:{CANARY}@@host/x@y", "https://<HIDDEN>@host/x@y"),
            (f"s3://b/k?X-Amz-Signature={CANARY}&x=1#f", "s3://b/k?X-Amz-Signature=<HIDDEN>&x=1#f"),
            (f"at https://h/?a=1&sig={CANARY} and", "at https://h/?a=1&sig=<HIDDEN> and"),
            (f"{{'token' : '{CANARY}', 'x': 1", "{'token' : '<HIDDEN>', 'x': 1"),
            (f'{{"api_key":"{CANARY}', '{"api_key":"<HIDDEN>"'),
            (f'{{"password": "a\\"{CANARY}\\\\", "x": 1}}', '{"password": "<HIDDEN>", "x": 1}'),
            (f"https://host/x#access_token={CANARY}&x=1", "https://host/x#access_token=<HIDDEN>&x=1"),
        ],
    )
    def test_the_secret_is_hidden_and_the_rest_is_shown(self, text: str, shown: str) -> None:
        assert text_without_secrets(text) == shown
        assert text_without_secrets(shown) == shown

    @pytest.mark.parametrize(
        "text",
        ["a@b.c", "https://host/@me", "x?y=1&z=2", '{"pad_token": "</s>"}', "signature=x", "", "a." * 100_000],
    )
    def test_a_text_without_secrets_stays(self, text: str) -> None:
        assert text_without_secrets(text) == text


@dataclass
class Plain(TrainingArguments):
    """A subclass with a secret, whose representation is written by the decorator unless something prevents it."""

    api_key: str | None = None


class Named(Plain):
    def __repr__(self) -> str:
        return "named"


@dataclass
class Last(Named):
    more: int = 0


def make(kind: type[TrainingArguments], **options: Any) -> TrainingArguments:
    return kind("out", report_to="none", use_cpu=True, **options)


def test_a_subclass_shows_no_secret_and_keeps_a_representation_of_its_own() -> None:
    assert f"api_key={'<API_KEY>'}," in repr(make(Plain, api_key=CANARY))
    assert CANARY not in repr(make(Plain, api_key=CANARY))
    assert [repr(make(kind)) for kind in (Named, Last)] == ["named", "named"]


def test_arguments_give_their_secrets_to_code_and_not_to_files() -> None:
    """Libraries make new arguments out of ``to_dict``."""
    args = make(TrainingArguments, lr_scheduler_kwargs={"store": {"password": CANARY}}, hub_token=CANARY)
    assert args.to_dict()["lr_scheduler_kwargs"]["store"] == {"password": CANARY}
    assert args.to_dict()["hub_token"] == "<HUB_TOKEN>"
    for written in (args.to_json_string(), str(args.to_sanitized_dict()), str(run_config(args, None)), str(args)):
        assert CANARY not in written
        assert "<PASSWORD>" in written
