"""Uploads, by huggingface_hub itself to a hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from tests.trainer.stand_in_hub import StandInHub
from trainkit.trainer import hub
from trainkit.trainer.arguments import TrainingArguments
from trainkit.trainer.state import TrainerState


@pytest.fixture
def there() -> Iterator[StandInHub]:
    made = StandInHub()
    yield made
    made.close()


@pytest.fixture
def api(there: StandInHub) -> HfApi:
    return HfApi(endpoint=there.endpoint, token="hf_default")


def make_args(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(str(folder), report_to="none", use_cpu=True, hub_token="hf_own", **options)


def checkpoint(folder: Path, step: int, shards: int = 1, extra: str | None = None) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "config.json").write_text(f'{{"step": {step}}}')
    (path / "trainer_state.json").write_text("{}")
    if extra is not None:
        (path / extra).write_text("x")
    if shards == 1:
        (path / "model.safetensors").write_bytes(b"weights %d" % step)
        return path
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    for name in names:
        (path / name).write_bytes(name.encode())
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(enumerate(names))}))
    return path


def test_a_repository_is_made_once_and_named_by_the_folder(tmp_path: Path, there: StandInHub, api: HfApi) -> None:
    args = make_args(tmp_path / "tiny", hub_private_repo=True)
    assert hub.create_repository(args, api=api) == hub.create_repository(args, "hf_other", api=api) == "me/tiny"
    assert [(made["name"], made["private"]) for made in there.created] == [("tiny", True)] * 2
    assert there.tokens == ["Bearer hf_own", "Bearer hf_other"]


def test_a_run_is_uploaded_without_checkpoints_and_what_is_being_written(
    tmp_path: Path, there: StandInHub, api: HfApi
) -> None:
    checkpoint(tmp_path, 3)
    (tmp_path / ".staging-1").mkdir()
    for name in ("model.safetensors", "README.md", "_private.txt", ".staging-1/a", ".lock"):
        (tmp_path / name).write_text(name)
    args = make_args(tmp_path, hub_revision="dev")
    found = hub.upload_run(args, "me/tiny", message="done", api=api)
    assert found.oid == "a" * 40
    assert there.commits == [
        {"message": "done", "branch": "dev", "added": ["README.md", "model.safetensors"], "deleted": []}
    ]
    later = hub.upload_run(args, "me/tiny", message="later", blocking=False, revision="main", api=api)
    assert later.result(timeout=30).oid == "a" * 40
    assert there.commits[-1]["branch"] == "main"


@pytest.mark.parametrize(
    ("strategy", "paths"),
    [
        ("end", []),
        ("every_save", [""]),
        ("checkpoint", ["", "last-checkpoint/"]),
        ("all_checkpoints", ["", "checkpoint-3/"]),
    ],
)
def test_the_strategy_says_what_of_a_checkpoint_is_uploaded(
    tmp_path: Path, there: StandInHub, api: HfApi, strategy: str, paths: list[str]
) -> None:
    args = make_args(tmp_path, hub_strategy=strategy)
    folder = checkpoint(tmp_path, 3)
    hub.wait_for(hub.push_checkpoint(args, TrainerState(global_step=3), "me/tiny", folder, api=api))
    own = ["config.json", "model.safetensors", "training_args.json"]
    whole = ["config.json", "model.safetensors", "trainer_state.json"]
    expected = [sorted(own if not path else [path + name for name in whole]) for path in paths]
    assert [sorted(commit["added"]) for commit in there.commits] == expected
    messages = ["Training in progress, step 3", "Training in progress, step 3, checkpoint"][: len(paths)]
    assert [commit["message"] for commit in there.commits] == messages


def test_a_run_that_saves_by_epochs_says_the_epoch(tmp_path: Path, there: StandInHub, api: HfApi) -> None:
    args = make_args(tmp_path, save_strategy="epoch")
    state = TrainerState(global_step=8, epoch=2.0)
    hub.wait_for(hub.push_checkpoint(args, state, "me/tiny", checkpoint(tmp_path, 8), api=api))
    assert there.commits[0]["message"] == "Training in progress, epoch 2"


def test_all_shards_and_the_processing_class_come_along(tmp_path: Path, there: StandInHub, api: HfApi) -> None:
    class Processor:
        def save_pretrained(self, folder: str) -> None:
            Path(folder, "tokenizer.json").write_text("{}")

    folder = checkpoint(tmp_path / "elsewhere", 2, shards=3)
    args = make_args(tmp_path / "run")
    jobs = hub.push_checkpoint(args, TrainerState(), "me/tiny", folder, Processor(), api=api)
    hub.wait_for(jobs)
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    expected = ["config.json", *names, "model.safetensors.index.json", "tokenizer.json", "training_args.json"]
    assert sorted(there.files) == sorted(expected)
    assert all(there.files[name] == name.encode() for name in names)
    assert b"hf_own" not in there.files["training_args.json"]


def test_the_last_checkpoint_is_never_a_mixture_of_two(tmp_path: Path, there: StandInHub, api: HfApi) -> None:
    args = make_args(tmp_path, hub_strategy="checkpoint")
    jobs = None
    for step, extra in ((1, "rng_state_7.pth"), (2, None)):
        jobs = hub.push_checkpoint(
            args, TrainerState(), "me/tiny", checkpoint(tmp_path, step, extra=extra), None, jobs, api=api
        )
        hub.wait_for(jobs)
    stored = {name for name in there.files if name.startswith("last-checkpoint/")}
    assert stored == {f"last-checkpoint/{name}" for name in ("config.json", "model.safetensors", "trainer_state.json")}
    assert there.files["last-checkpoint/model.safetensors"] == b"weights 2"


@pytest.mark.parametrize("always", [False, True])
def test_nothing_is_begun_while_an_upload_runs_unless_asked_for(
    tmp_path: Path, there: StandInHub, api: HfApi, always: bool
) -> None:
    args = make_args(tmp_path, hub_always_push=always)
    there.hold.clear()
    first = hub.push_checkpoint(args, TrainerState(global_step=1), "me/tiny", checkpoint(tmp_path, 1), api=api)
    assert first is not None and not first.is_done()
    second = hub.push_checkpoint(
        args, TrainerState(global_step=2), "me/tiny", checkpoint(tmp_path, 2), None, first, api=api
    )
    assert second is not None and len(second.jobs) == (2 if always else 1)
    there.hold.set()
    hub.wait_for(second)
    steps = [commit["message"].rpartition(" ")[2] for commit in there.commits]
    assert steps == (["1", "2"] if always else ["1"])


def test_an_upload_that_failed_is_told_of_at_the_next_save_and_the_run_goes_on(
    tmp_path: Path, there: StandInHub, api: HfApi
) -> None:
    args = make_args(tmp_path)
    there.refuse = 403
    jobs = hub.push_checkpoint(args, TrainerState(), "me/tiny", checkpoint(tmp_path, 1), api=api)
    assert jobs is not None
    deadline = time.monotonic() + 30
    while not jobs.is_done() and time.monotonic() < deadline:
        time.sleep(0.01)
    there.refuse = None
    with pytest.warns(hub.UploadWarning, match="an upload to me/tiny failed: HfHubHTTPError: 403"):
        jobs = hub.push_checkpoint(args, TrainerState(), "me/tiny", checkpoint(tmp_path, 2), None, jobs, api=api)
    # Told of once: the end of the run has nothing to say about it.
    hub.wait_for(jobs)
    assert there.files["model.safetensors"] == b"weights 2"


def test_an_upload_that_failed_is_told_of_at_the_end(tmp_path: Path, there: StandInHub, api: HfApi) -> None:
    args = make_args(tmp_path)
    there.refuse = 403
    jobs = hub.push_checkpoint(args, TrainerState(), "me/tiny", checkpoint(tmp_path, 1), api=api)
    with pytest.warns(hub.UploadWarning, match="403"):
        hub.wait_for(jobs)


def test_an_upload_that_is_waited_for_raises(tmp_path: Path, there: StandInHub, api: HfApi) -> None:
    (tmp_path / "config.json").write_text("{}")
    there.refuse = 403
    with pytest.raises(HfHubHTTPError, match="403"):
        hub.upload_run(make_args(tmp_path), "me/tiny", api=api)


def test_jobs_that_wait_can_be_taken_back(tmp_path: Path, there: StandInHub, api: HfApi) -> None:
    args = make_args(tmp_path, hub_strategy="checkpoint")
    there.hold.clear()
    jobs = hub.push_checkpoint(args, TrainerState(), "me/tiny", checkpoint(tmp_path, 1), api=api)
    assert jobs is not None
    jobs.cancel()
    there.hold.set()
    hub.wait_for(jobs)
    assert jobs.is_done()
    assert not any(name.startswith("last-checkpoint") for name in there.files)


def test_tags_of_a_model_are_added_and_nothing_is_changed() -> None:
    class Model:
        model_tags = ("lora",)

    given = {"tags": ["mine"], "license": "mit"}
    assert hub.with_model_tags(given, Model()) == {"tags": ["mine", "lora"], "license": "mit"}
    assert given["tags"] == ["mine"] and Model.model_tags == ("lora",)
    assert hub.with_model_tags({"license": "mit"}, object()) == {"license": "mit"}


RUN = """
import sys
import warnings
from tests.trainer.tiny import make_net, make_rows
from trainkit.trainer.arguments import TrainingArguments
from trainkit.trainer.trainer import Trainer

args = TrainingArguments(
    sys.argv[1], report_to="none", use_cpu=True, max_steps=2, save_steps=1, push_to_hub=True, hub_always_push=True,
    hub_strategy="all_checkpoints", hub_token="hf_own", eval_strategy="steps", eval_steps=1,
)
warnings.simplefilter("error", UserWarning)
rows = make_rows(8)
trainer = Trainer(make_net(), args, train_dataset=rows, eval_dataset=rows)
trainer.train()
trainer.push_to_hub(tags="mine")
"""


@pytest.mark.slow
def test_a_run_brings_its_checkpoints_and_its_model_to_the_hub(tmp_path: Path, there: StandInHub) -> None:
    environment = {**os.environ, "HF_ENDPOINT": there.endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"}
    subprocess.run([sys.executable, "-c", RUN, str(tmp_path / "tiny")], check=True, timeout=300, env=environment)
    assert [commit["message"] for commit in there.commits] == [
        "Training in progress, step 1",
        "Training in progress, step 1, checkpoint",
        "Training in progress, step 2",
        "Training in progress, step 2, checkpoint",
        "End of training",
    ]
    roots = {name.partition("/")[0] for name in there.files}
    files = {"README.md", "model.safetensors", "training_args.json"}
    assert roots == {*files, "checkpoint-1", "checkpoint-2"}
    for step in (1, 2):
        for name in ("manifest.json", "trainer_state.json", "model.safetensors"):
            stored = (tmp_path / "tiny" / f"checkpoint-{step}" / name).read_bytes()
            assert there.files[f"checkpoint-{step}/{name}"] == stored
    assert there.files["model.safetensors"] == there.files["checkpoint-2/model.safetensors"]
    assert b"- mine" in there.files["README.md"] and b"| 2    |" in there.files["README.md"]


def test_without_the_package_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        hub.create_repository(make_args(tmp_path))
