"""Training that goes on from a checkpoint, beside the same training without a break."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.trainer.tiny import SETTINGS, make_net, make_rows, without_times
from trainkit import Trainer, TrainingArguments
from trainkit.io.checkpoint import CheckpointError, CheckpointWarning
from trainkit.trainer.callbacks import EarlyStoppingCallback, TrainerCallback
from trainkit.trainer.checkpoints import load_weights, numbered, verify

ARGUMENTS: dict[str, Any] = {**SETTINGS, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1}
ROOT = Path(__file__).parents[2]


class ByMicrobatch(Trainer):
    """Its updates are not one call."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().training_step(*args, **kwargs)


WAYS = {"one call": Trainer, "microbatches": ByMicrobatch}


def make(folder: Path, arguments: dict[str, Any] | None = None, cls: Any = Trainer, seed: int = 0, **given: Any) -> Any:
    args = TrainingArguments(str(folder), **{**ARGUMENTS, **(arguments or {})})
    net = make_net(seed=seed, dropout=0.4)
    return cls(**{"model": net, "args": args, "train_dataset": make_rows(7), **given})


def entries(trainer: Any, after: int = 0) -> list[dict[str, Any]]:
    """Logged numbers of steps, without the times and what is said at the end of a call."""
    return [log for log in trainer.state.log_history if log["step"] > after and "train_runtime" not in log]


def assert_same_weights(one: Any, other: Any) -> None:
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[name]), name


RUNS: dict[str, dict[str, Any]] = {
    "one microbatch": {},
    "accumulation": {"gradient_accumulation_steps": 2, "num_train_epochs": 3},
    "a ragged last group": {"gradient_accumulation_steps": 3},
    "workers": {"dataloader_num_workers": 2, "gradient_accumulation_steps": 2},
    "dropped last batch": {"dataloader_drop_last": True},
    "half an epoch": {"num_train_epochs": 1.5},
    "cosine and warm-up": {"lr_scheduler_type": "cosine", "warmup_steps": 2},
    "sgd": {"optim": "sgd", "weight_decay": 0.1},
    "grouped by length": {"group_by_length": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("run", RUNS)
def test_every_checkpoint_goes_on_as_if_there_had_been_no_break(run: str, way: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {}
    if run == "grouped by length":
        # A length that differs by row: the model sees the sum.
        given = {"train_dataset": lengths(), "data_collator": summed}
    whole = make(tmp_path / "whole", RUNS[run], WAYS[way], **given)
    whole.train()
    assert whole.state.global_step > 2
    for step in range(1, whole.state.global_step):
        went_on = make(tmp_path / f"from-{step}", {**RUNS[run], "save_strategy": "no"}, WAYS[way], seed=step, **given)
        # The global random state of another process.
        torch.rand(step)
        result = went_on.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert result.global_step == whole.state.global_step
        assert entries(went_on) == entries(whole)
        assert_same_weights(went_on, whole)
        assert went_on.state.epoch == whole.state.epoch
        # Of this call only.
        mean = np.mean([log["loss"] for log in entries(whole, after=step)])
        assert result.training_loss == pytest.approx(mean, rel=1e-5)


def lengths() -> list[dict[str, Any]]:
    rows = make_rows(7)
    return [{"input_ids": [0] * (1 + i % 3), **row} for i, row in enumerate(rows)]


def summed(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {"x": torch.stack([row["x"] for row in rows]), "labels": torch.tensor([row["labels"] for row in rows])}


class Stream(torch.utils.data.IterableDataset[Any]):
    """Seven rows in each pass, which nobody knows before."""

    def __iter__(self) -> Any:
        return iter(make_rows(7))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_stream_goes_on_in_the_pass_that_it_was_in(accumulation: int, tmp_path: Path) -> None:
    arguments = {"max_steps": 10, "gradient_accumulation_steps": accumulation}
    whole = make(tmp_path / "whole", arguments, train_dataset=Stream())
    whole.train()
    for step in range(1, 10):
        went_on = make(tmp_path / f"from-{step}", {**arguments, "save_strategy": "no"}, train_dataset=Stream())
        went_on.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert entries(went_on) == entries(whole)
        assert_same_weights(went_on, whole)


@pytest.mark.parametrize("way", WAYS)
def test_evaluations_do_not_disturb(way: str, tmp_path: Path) -> None:
    evaluated = {"eval_strategy": "steps", "eval_steps": 3}
    whole = make(tmp_path / "a", evaluated, WAYS[way], eval_dataset=make_rows(5, seed=1))
    whole.train()
    went_on = make(tmp_path / "b", evaluated, WAYS[way], eval_dataset=make_rows(5, seed=1), seed=1)
    went_on.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))
    assert [*map(without_times, entries(went_on))] == [*map(without_times, entries(whole))]
    assert_same_weights(went_on, whole)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("step", [1, 2, 4, 5, 7])
def test_a_log_over_a_break_is_a_mean_over_all_its_updates(step: int, way: str, tmp_path: Path) -> None:
    seldom = {"logging_steps": 3}
    whole = make(tmp_path / "a", seldom, WAYS[way])
    whole.train()
    went_on = make(tmp_path / "b", seldom, WAYS[way], seed=1)
    result = went_on.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
    assert entries(went_on) == entries(whole)
    # The mean of this call is over its own updates.
    each = make(tmp_path / "c", cls=WAYS[way])
    each.train()
    own = [log["loss"] for log in entries(each, after=step)]
    assert result.training_loss == pytest.approx(np.mean(own), rel=1e-5)


def test_losses_that_were_not_finite_are_counted_on(tmp_path: Path) -> None:
    rows = make_rows(7)
    rows[0] = {**rows[0], "x": torch.full((4,), torch.inf)}
    for name, steps in (("logged", 1), ("not logged", 3)):
        whole = make(
            tmp_path / name, {"logging_steps": steps, "max_grad_norm": 0, "learning_rate": 0.0}, train_dataset=rows
        )
        whole.train()
        assert entries(whole)[-1]["nonfinite_losses"] >= 1
        for step in (4, 5):
            went_on = make(
                tmp_path / f"{name} {step}",
                {"logging_steps": steps, "max_grad_norm": 0, "learning_rate": 0.0},
                train_dataset=rows,
            )
            went_on.train(resume_from_checkpoint=str(tmp_path / name / f"checkpoint-{step}"))
            assert entries(went_on) == entries(whole)


def test_a_damaged_sum_of_losses_is_refused(tmp_path: Path) -> None:
    make(tmp_path, {"max_steps": 2, "logging_steps": 3}).train()
    folder = tmp_path / "checkpoint-2"
    (folder / "loss_sum.json").write_text('{"loss": "much"}')
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"loss_sum\.json: expected loss"):
        make(tmp_path, {"logging_steps": 3}).train(resume_from_checkpoint=str(folder))


class Drawing(torch.utils.data.Dataset[Any]):
    """Rows with noise from the three global generators of this process."""

    def __init__(self) -> None:
        self.rows = make_rows(7)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        noise = torch.rand(4) + random.random() + float(np.random.rand())  # noqa: NPY002
        return {"x": self.rows[i]["x"] + 0.1 * noise, "labels": self.rows[i]["labels"]}


@pytest.mark.parametrize("step", [1, 3, 4, 5])
def test_what_the_data_draw_from_global_generators_goes_on(step: int, tmp_path: Path) -> None:
    arguments = {"gradient_accumulation_steps": 1}
    whole = make(tmp_path / "a", arguments, train_dataset=Drawing())
    whole.train()
    went_on = make(tmp_path / "b", arguments, train_dataset=Drawing())
    went_on.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
    assert entries(went_on) == entries(whole)
    assert_same_weights(went_on, whole)


# -- from the newest --------------------------------------------------------------------------------------------------


def test_true_means_the_newest_in_the_folder(tmp_path: Path) -> None:
    whole = make(tmp_path / "whole")
    whole.train()
    stopped = make(tmp_path / "run", callbacks=[StopAt(5)])
    stopped.train()
    assert [Path(p).name for p in numbered(tmp_path / "run")] == [f"checkpoint-{n}" for n in range(1, 6)]
    went_on = make(tmp_path / "run", seed=1)
    went_on.train(resume_from_checkpoint=True)
    assert entries(went_on) == entries(whole)
    assert_same_weights(went_on, whole)


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("way", WAYS)
def test_a_finished_run_has_nothing_more_to_do(way: str, tmp_path: Path) -> None:
    first = make(tmp_path, cls=WAYS[way])
    first.train()
    before = content(tmp_path)
    again = make(tmp_path, cls=WAYS[way], seed=1)
    steps: list[int] = []
    again.add_callback(Counting(steps))
    result = again.train(resume_from_checkpoint=True)
    assert not steps
    assert result.global_step == first.state.global_step
    assert result.training_loss == 0.0
    assert entries(again) == entries(first)
    assert_same_weights(again, first)
    assert content(tmp_path) == before


class Counting(TrainerCallback):
    def __init__(self, steps: list[int]) -> None:
        self.steps = steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(state.global_step)


DAMAGE = {
    "a flipped bit": lambda p: _flip(p / "model.safetensors"),
    "a cut file": lambda p: os.truncate(p / "optimizer.pt", 100),
    "a missing file": lambda p: (p / "scheduler.pt").unlink(),
    "an empty manifest": lambda p: (p / "manifest.json").write_text(""),
    "a state that is no JSON": lambda p: (p / "trainer_state.json").write_text("{"),
}


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_is_skipped(damage: str, tmp_path: Path) -> None:
    whole = make(tmp_path)
    whole.train()
    newest = whole.state.global_step
    DAMAGE[damage](tmp_path / f"checkpoint-{newest}")
    went_on = make(tmp_path, seed=1)
    with pytest.warns(CheckpointWarning, match=f"checkpoint-{newest} is skipped"):
        went_on.train(resume_from_checkpoint=True)
    assert entries(went_on) == entries(whole)
    assert_same_weights(went_on, whole)
    # Written anew.
    verify(tmp_path / f"checkpoint-{newest}")


def test_a_damaged_checkpoint_that_is_named_is_refused(tmp_path: Path) -> None:
    make(tmp_path, {"max_steps": 2}).train()
    _flip(tmp_path / "checkpoint-2" / "model.safetensors")
    trainer = make(tmp_path, seed=1)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())
    assert trainer.state.global_step == 0
    assert not trainer.is_in_train


def test_nothing_to_go_on_from(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no whole checkpoint"):
        make(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match=r"trainer_state\.json"):
        make(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize(
    "other",
    [{"gradient_accumulation_steps": 2}, {"per_device_train_batch_size": 4}, {"train_dataset": make_rows(14)}],
    ids=["accumulation", "batch size", "data"],
)
def test_another_place_in_the_data_is_told(other: dict[str, Any], tmp_path: Path) -> None:
    make(tmp_path, {"max_steps": 2}).train()
    given = {name: other.pop(name) for name in ("train_dataset",) if name in other}
    trainer = make(tmp_path, {"max_steps": 3, **other}, **given)
    with pytest.warns(
        UserWarning, match=r"(?s)after 2 updates it was at epoch 0.5.*goes on there|other settings"
    ) as told:
        trainer.train(resume_from_checkpoint=True)
    assert sum("it was at epoch 0.5, which now is epoch" in str(one.message) for one in told) == 1


def test_another_model_is_refused(tmp_path: Path) -> None:
    make(tmp_path, {"max_steps": 1}).train()
    with pytest.raises(CheckpointError, match="another model's"):
        make(tmp_path, model=torch.nn.Linear(2, 2)).train(resume_from_checkpoint=True)


def test_complex_weights_for_a_real_model_are_refused(tmp_path: Path) -> None:
    weights = make_net().state_dict()
    save_file({name: t.to(torch.complex64) for name, t in weights.items()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"another model's \(complex for real: first.bias"):
        load_weights(tmp_path, make_net(), strict=False)


# -- what counts after a change of settings ---------------------------------------------------------------------------


def test_the_settings_of_now_count(tmp_path: Path) -> None:
    make(tmp_path, {"save_steps": 2}).train()
    went_on = make(tmp_path, {"logging_steps": 2, "save_steps": 3, "num_train_epochs": 3}, seed=1)
    with pytest.warns(UserWarning, match="other settings"):
        went_on.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [log["step"] for log in entries(went_on, after=4)] == [6, 8, 10, 12]
    assert {"checkpoint-9", "checkpoint-12"} <= {p.name for p in tmp_path.iterdir()}
    assert "checkpoint-10" not in {p.name for p in tmp_path.iterdir()}
    assert went_on.state.max_steps == 12


def test_data_may_start_anew(tmp_path: Path) -> None:
    whole = make(tmp_path / "a")
    whole.train()
    went_on = make(tmp_path / "b", {"ignore_data_skip": True}, seed=1)
    result = went_on.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
    # The second epoch from its beginning: four batches where two were left, within the same number of updates.
    assert result.global_step == whole.state.global_step
    assert entries(went_on, after=6) != entries(whole, after=6)


def test_a_checkpoint_with_the_model_only(tmp_path: Path) -> None:
    make(tmp_path / "a", {"save_only_model": True}).train()
    went_on = make(tmp_path / "b", seed=1)
    with pytest.warns(CheckpointWarning, match=r"optimizer\.pt"):
        result = went_on.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
    assert result.global_step == 8
    # The rate begins at the schedule's beginning.
    assert [log["learning_rate"] for log in entries(went_on, after=6)] == pytest.approx([0.05, 0.05 * 7 / 8])


# -- callbacks ---------------------------------------------------------------------------------------------------------


def patient(folder: Path, restore: bool, **options: Any) -> Any:
    arguments = {
        "learning_rate": 0.0,
        "max_steps": 12,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "restore_callback_states_from_checkpoint": restore,
        **options,
    }
    stopping = EarlyStoppingCallback(early_stopping_patience=4)
    return make(folder, arguments, eval_dataset=make_rows(5, seed=1), callbacks=[stopping])


@pytest.mark.parametrize("restore", [True, False])
def test_patience_goes_on_where_it_was(restore: bool, tmp_path: Path) -> None:
    """At a rate of zero no evaluation is better than the first, so that the fifth stops the run."""
    whole = patient(tmp_path / "a", restore)
    whole.train()
    assert whole.state.global_step == 5
    went_on = patient(tmp_path / "b", restore)
    went_on.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert went_on.state.global_step == (5 if restore else 7)


# -- kills -------------------------------------------------------------------------------------------------------------

LONG: dict[str, Any] = {"max_steps": 200, "save_total_limit": 3}
CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
from tests.trainer.test_resume import LONG, make
trainer = make(Path({folder!r}), LONG)
print("ready", flush=True)
trainer.train(resume_from_checkpoint={resume!r})
print("done", flush=True)
"""


def start(folder: Path, resume: bool) -> subprocess.Popen[str]:
    code = CHILD.format(root=str(ROOT), folder=str(folder), resume=resume)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def kill(child: subprocess.Popen[str], folder: Path, step: int, later: float = 0.0) -> int:
    """Kill a run, some time after it has saved a step; the step of its newest checkpoint."""
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == "ready\n"
        deadline = time.monotonic() + 60
        while newest(folder) < step:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(later)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    return newest(folder)


def newest(folder: Path) -> int:
    found = numbered(folder) if folder.exists() else []
    return int(found[-1].rpartition("-")[2]) if found else 0


@pytest.mark.slow
def test_a_kill_at_any_time_leaves_only_whole_checkpoints(tmp_path: Path) -> None:
    reached = 0
    for attempt in range(6):
        with start(tmp_path, resume=attempt > 0) as child:
            # Within a save sooner or later.
            last = kill(child, tmp_path, reached + 1, later=0.013 * attempt)
        assert last > reached
        reached = last
        for path in numbered(tmp_path):
            verify(path)


@pytest.mark.slow
def test_a_killed_run_ends_as_one_that_was_not(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with start(folder, resume=False) as child:
        kill(child, folder, 3)
    with start(folder, resume=True) as again:
        assert again.communicate(timeout=300)[0].splitlines()[-1] == "done"
    whole = make(tmp_path / "whole", {**LONG, "save_strategy": "no"})
    whole.train()
    after = make(folder, LONG, seed=3)
    after.train(resume_from_checkpoint=True)
    assert entries(after) == entries(whole)
    assert_same_weights(after, whole)
    assert not [p.name for p in folder.iterdir() if p.name.startswith((".staging", ".trash"))]
