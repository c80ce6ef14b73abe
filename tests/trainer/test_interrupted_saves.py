"""What killed and running saves leave in a folder: the one goes, the other stays."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.trainer.tiny import SETTINGS, make_net, make_rows
from trainkit import Trainer, TrainingArguments, init_state
from trainkit.io.checkpoint import CheckpointWarning, files, lock, save
from trainkit.io.checkpoint.commit import commit
from trainkit.io.checkpoint.model_files import new_folder
from trainkit.optim import sgd
from trainkit.trainer.checkpoints import numbered, remove_interrupted, whole_folder


def train(folder: Path, *, resume: bool = False) -> None:
    """One step, which is saved."""
    arguments = TrainingArguments(
        str(folder), **{**SETTINGS, "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    )
    Trainer(make_net(), arguments, train_dataset=make_rows(2)).train(resume_from_checkpoint=resume)


def interrupt(folder: Path) -> None:
    """What saves that were killed leave."""
    for name in (".staging-0123456789abcdef", ".trash-0123456789abcdef"):
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").touch()


def test_what_an_interrupted_save_left_is_gone_after_the_next_save(tmp_path: Path) -> None:
    interrupt(tmp_path / "run")
    with whole_folder(tmp_path / "run" / "checkpoint-1", main=True, wait=lambda: None) as staging:
        (staging / "trainer_state.json").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-1"]


def test_what_an_interrupted_save_left_is_gone_once_the_next_run_has_begun(tmp_path: Path) -> None:
    train(tmp_path / "run")
    interrupt(tmp_path / "run")
    # It has nothing left to do, so it does not save.
    train(tmp_path / "run", resume=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-1"]


def test_what_a_saver_is_writing_in_the_same_folder_stays(tmp_path: Path) -> None:
    def parts() -> Iterator[bytes]:
        yield b"begun"
        train(tmp_path / "run")
        yield b"done"

    (tmp_path / "run").mkdir()
    with files.opened(tmp_path / "run") as fd:
        commit(fd, "step-1", {"file": parts()}, lambda written: b"{}", own=True)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint-1", "step-1"]


def test_what_a_trainer_is_saving_stays_when_a_state_is_saved_beside_it(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "run" / "checkpoint-1", main=True, wait=lambda: None) as staging:
        (staging / "trainer_state.json").touch()
        save(tmp_path / "run", init_state(make_net(), sgd(0.1)), cursor={})
    assert numbered(tmp_path / "run") == [str(tmp_path / "run" / "checkpoint-1")]


def test_a_model_that_is_being_exported_to_the_same_folder_stays(tmp_path: Path) -> None:
    with new_folder(tmp_path / "run" / "final") as (_, staging):
        train(tmp_path / "run")
        (staging / "model.safetensors").touch()
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


def test_a_save_that_waits_for_other_processes_stays(tmp_path: Path) -> None:
    def wait() -> None:
        remove_interrupted(tmp_path / "run")

    with whole_folder(tmp_path / "run" / "checkpoint-1", main=True, wait=wait) as staging:
        (staging / "trainer_state.json").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-1"]


def test_two_runs_may_remove_the_same(tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / f".trash-{number:016x}" / "inner").mkdir(parents=True)
    with warnings.catch_warnings(record=True) as caught, ThreadPoolExecutor(4) as threads:
        warnings.simplefilter("always")
        list(threads.map(remove_interrupted, [tmp_path] * 4))
    assert [str(warning.message) for warning in caught] == []
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_no_folder_is_told(tmp_path: Path) -> None:
    remove_interrupted(tmp_path / "missing")
    (tmp_path / "run").touch()
    with pytest.warns(CheckpointWarning, match="run: what interrupted saves may have left cannot be deleted: Not a"):
        remove_interrupted(tmp_path / "run")


def test_what_another_trainer_is_saving_in_the_same_folder_stays(tmp_path: Path) -> None:
    staging = tmp_path / "run" / ".staging-0123456789abcdef"
    staging.mkdir(parents=True)
    with lock.occupied(staging):
        train(tmp_path / "run")
    assert staging.is_dir() and (tmp_path / "run" / "checkpoint-1").is_dir()
