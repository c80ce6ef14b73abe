"""Runs that test_preemption.py starts as processes of their own, which send themselves SIGTERM in a part of a step."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.callback
from torch import Tensor

from tests.trainer.tiny import SETTINGS, Net, make_rows, without_times
from trainkit import Trainer, TrainerCallback, TrainingArguments

ARGUMENTS: dict[str, Any] = {
    **SETTINGS,
    "num_train_epochs": 2,
    # Between two logs, so that what was not told yet has to go on too.
    "logging_steps": 3,
    "eval_strategy": "steps",
    "eval_steps": 3,
}
"""Eight updates, four in each of two passes."""


@dataclass(frozen=True)
class Case:
    """One run and where it is asked to end.

    Args:
        folder: of the run.
        asks: (part, completed updates): SIGTERM there, each once; the part "error" fails then.
        arguments: changes to the arguments.
        by_microbatch: whether ``training_step`` is overridden.
        resume: go on from the newest checkpoint.
        rank: of this process, with ``port`` and ``world``.
        own: "handler" puts one of the user's before training, "thread" trains in one; "group" sends the signal to the
            workers of the data too; "search" tries three learning rates.
    """

    folder: Path
    asks: tuple[tuple[str, int], ...] = ()
    arguments: dict[str, Any] = field(default_factory=dict)
    by_microbatch: bool = False
    resume: bool = False
    rank: int = 0
    world: int = 1
    port: int = 0
    own: str = ""


class Asked:
    """Sends SIGTERM to this process in the parts of a case, each once."""

    def __init__(self, case: Case) -> None:
        self._left = list(case.asks)
        self._send = os.killpg if case.own == "group" else os.kill
        self.completed: Callable[[], int] = lambda: -1

    def __call__(self, part: str) -> None:
        if (part, self.completed()) in self._left:
            self._left.remove((part, self.completed()))
            self._send(os.getpid(), signal.SIGTERM)
            if part == "error":
                raise ArithmeticError("after the signal")


class AskingNet(Net):
    """Asks in its forward and its backward pass."""

    def __init__(self, ask: Asked) -> None:
        super().__init__(dropout=0.4)
        self._ask = ask

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        if self.training:
            self._ask("forward")
        found = super().forward(x, labels)
        if found["logits"].requires_grad:
            found["logits"].register_hook(lambda grad: self._ask("backward"))
        return found


class AskingRows(torch.utils.data.Dataset[Any]):
    """Asks while a row is read."""

    def __init__(self, ask: Asked, n: int) -> None:
        self._ask, self._rows = ask, make_rows(n)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Any:
        self._ask("data")
        return self._rows[i]


class Tells(TrainerCallback):
    """Asks at events, and writes down the steps of saves, and the end."""

    def __init__(self, ask: Asked, folder: Path, rank: int) -> None:
        self._ask, self._saves, self._ends = ask, folder / f"saves-{rank}", folder / f"ends-{rank}"

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        self._ask("log")

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        self._ask("evaluation")

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self._ask("epoch begin")

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self._ask("epoch end")

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._ask("begin")

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._ask("end")
        self._ask("error")

    def on_save(self, args: Any, state: Any, *others: Any, **kwargs: Any) -> None:
        with self._saves.open("a") as file:
            print(state.global_step, file=file)

    def on_train_end(self, args: Any, state: Any, *others: Any, **kwargs: Any) -> None:
        self._ask("train end")
        with self._ends.open("a") as file:
            print(state.global_step, file=file)


class AskingTrainer(Trainer):
    """Asks in the middle of a save."""

    def _save_rng_state(self, output_dir: str) -> None:
        self.model._ask("save")
        super()._save_rng_state(output_dir)


class ByMicrobatch(AskingTrainer):
    """Its updates are not one call."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().training_step(*args, **kwargs)


def make(case: Case) -> Trainer:
    torch.manual_seed(0)
    ask = Asked(case)
    trainer = (ByMicrobatch if case.by_microbatch else AskingTrainer)(
        None if case.own == "search" else AskingNet(ask),
        TrainingArguments(str(case.folder), **{**ARGUMENTS, **case.arguments}),
        train_dataset=AskingRows(ask, 7 if case.world == 1 else 14),
        eval_dataset=make_rows(5, seed=1),
        model_init=(lambda: AskingNet(ask)) if case.own == "search" else None,
        callbacks=[Tells(ask, case.folder, case.rank)],
    )
    ask.completed = lambda: trainer.state.global_step
    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(lambda *args: ask("update"))
    torch._dynamo.callback.on_compile_start(lambda *args: ask("compilation"))
    return trainer


def run(case: Case) -> None:
    """Train, and keep what the run came to in ``FOLDER/end-<rank>``."""
    torch.set_num_threads(1)
    # Workers of the data are forked, as in a program that nobody forked.
    multiprocessing.set_start_method("fork", force=True)
    case.folder.mkdir(parents=True, exist_ok=True)
    if case.own == "group":
        os.setpgid(0, 0)
    if case.world > 1:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(case.port), "WORLD_SIZE": str(case.world)}
        ranks = {"RANK": str(case.rank), "LOCAL_RANK": str(case.rank), "LOCAL_WORLD_SIZE": str(case.world)}
        os.environ.update(**address, **ranks)
    trainer = make(case)
    seen: list[int] = []
    if case.own == "handler":
        signal.signal(signal.SIGTERM, lambda *args: seen.append(trainer.state.global_step))
    if case.own == "thread":
        thread = threading.Thread(target=trainer.train)
        thread.start()
        thread.join()
    elif case.own == "search":
        trainer.hyperparameter_search(
            lambda trial: {"learning_rate": trial.suggest_float("rate", 0.1, 0.2)}, n_trials=3
        )
    else:
        trainer.train(resume_from_checkpoint=case.resume)
    end = {
        "weights": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "schedule": trainer.lr_scheduler.last_epoch,
        # The end of a call tells of that call only.
        "log": [without_times(log) for log in trainer.state.log_history if "train_runtime" not in log],
        "best": trainer.state.best_global_step,
        "seen": seen,
    }
    torch.save(end, case.folder / f"end-{case.rank}")
