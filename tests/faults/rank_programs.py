"""One of several processes that train together with the Trainer, saving often and telling what they do.

What a run tells: ``resumed`` (at which step) and ``process``, ``step`` with ``loss`` (exact), ``saved`` (announced as
durable), ``warning``, and at its end ``final``.
"""

from __future__ import annotations

import gc
import hashlib
import os
import sys
import tempfile
import warnings
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch.utils import _pytree as pytree

from tests.faults.trap import Emit
from tests.trainer.tiny import SETTINGS, make_net, make_rows
from trainkit import Trainer, TrainerCallback, TrainingArguments
from trainkit.io.checkpoint.commit import STAGING, TRASH
from trainkit.trainer.checkpoints import WEIGHTS, numbered

torch.set_num_threads(1)

WORLD, TIMEOUT = 2, 15
"""Processes, and the seconds for which one waits for the other."""
_LOGGED = ("step", "loss", "grad_norm", "learning_rate", "eval_loss")


def train(emit: Emit, *, folder: str, rank: int, port: int, workers: int = 0, steps: int = 12) -> None:
    """Train to step ``steps``, from the newest whole checkpoint if there is one.

    Args:
        emit: tells the supervisor.
        folder: of the run, shared by the processes.
        rank: which process this is.
        port: where process 0 listens.
        workers: processes that load data.
        steps: where to stop.
    """
    warnings.showwarning = lambda message, *_: emit(warning=f"{type(message).__name__}: {message}")
    _take_place(rank, port)
    trainer = _trainer(folder, steps, workers, _Tells(emit))
    trainer.train(resume_from_checkpoint=Path(folder).is_dir() and bool(numbered(folder)))
    emit(final=_final(Path(folder), trainer))
    torch.distributed.destroy_process_group()


def part(emit: Emit, *, folder: str, rank: int, port: int, workers: int = 0) -> None:
    """Train, destroy the process group, let go of the trainer, all while a thread of the group is not done with a
    collective: it has to wait for the interpreter, which this thread does not leave to others."""
    _take_place(rank, port)
    trainer = _trainer(folder, 2, workers, _Tells(emit))
    trainer.train()
    sys.setswitchinterval(1.0)
    for _ in range(3):
        trainer.accelerator.gather(torch.zeros(1000))
    torch.distributed.destroy_process_group()
    del trainer
    gc.collect()
    emit(final="parted")


def _take_place(rank: int, port: int) -> None:
    """What a launcher writes into the environment."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": WORLD, "WORLD_SIZE": WORLD}
    os.environ.update({name: str(value) for name, value in {**place, "RANK": rank, "LOCAL_RANK": rank}.items()})


def warm_up() -> None:
    """Train once in this process, alone, so that those forked off it find everything imported and looked up."""
    # What is printed here would be taken for an answer of the process that forks.
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        _trainer(folder, 4, 0, TrainerCallback()).train()
    AcceleratorState._reset_state(reset_partial_state=True)


def _trainer(folder: str, steps: int, workers: int, callback: TrainerCallback) -> Trainer:
    changes = {
        "max_steps": steps,
        "dataloader_num_workers": workers,
        "ddp_timeout": TIMEOUT,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 2,
        "eval_strategy": "steps",
        "eval_steps": 3,
    }
    return Trainer(
        make_net(dropout=0.2),
        TrainingArguments(folder, **{**SETTINGS, **changes}),
        train_dataset=make_rows(22),
        eval_dataset=make_rows(7, seed=1),
        callbacks=[callback],
    )


class _Tells(TrainerCallback):
    def __init__(self, emit: Emit) -> None:
        self._emit = emit

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._emit(resumed=state.global_step, process=os.getpid())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self._emit(step=state.global_step, loss=logs["loss"].hex())

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._emit(saved=state.global_step)


def _final(folder: Path, trainer: Any) -> dict[str, Any]:
    """The end of a run as values that can be compared: each tensor's bits, the log, the files."""
    log = [{name: float(entry[name]).hex() for name in _LOGGED if name in entry} for entry in trainer.state.log_history]
    return {
        "weights": _digest(trainer.model.state_dict()),
        "optimizer": _digest(trainer.optimizer.state_dict()),
        "log": log,
        "checkpoints": [Path(path).name for path in numbered(folder)],
        "saved weights": hashlib.sha256(Path(numbered(folder)[-1], WEIGHTS).read_bytes()).hexdigest(),
        "leftovers": sorted(path.name for path in folder.iterdir() if path.name.startswith((STAGING, TRASH))),
    }


def _digest(tree: Any) -> str:
    digest = hashlib.sha256()
    for leaf in pytree.tree_leaves(tree):
        digest.update(leaf.numpy().tobytes() if isinstance(leaf, torch.Tensor) else repr(leaf).encode())
    return digest.hexdigest()
