"""What a step waits for when the trainers that are installed save, each with AdamW and the same parameters."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable
from functools import partial
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.report import seconds

PEERS = ("transformers", "lightning")


def versions() -> dict[str, str]:
    """Of the peers that are installed."""
    return {name: metadata.version(name) for name in PEERS if util.find_spec(name)}


def missing() -> list[str]:
    """What to print about those that are not."""
    return [f"{name} is not installed, and left out" for name in PEERS if not util.find_spec(name)]


def ways(module: nn.Module, folder: Path) -> dict[str, Callable[[], float]]:
    """A call each that saves, and tells how many seconds it took."""
    found: dict[str, Callable[[], float]] = {}
    if util.find_spec("transformers"):
        found["Trainer._save_checkpoint"] = _hugging_face(copy.deepcopy(module), folder / "transformers")
    if util.find_spec("lightning"):
        found["lightning"] = _lightning(copy.deepcopy(module), folder / "lightning", in_background=False)
        found["lightning, AsyncCheckpointIO"] = _lightning(copy.deepcopy(module), folder / "async", in_background=True)
    return found


def _hugging_face(module: nn.Module, folder: Path) -> Callable[[], float]:
    """``_save_checkpoint``: weights, optimizer, scheduler, random states and progress; the one before is deleted."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(str(folder), save_total_limit=1, use_cpu=True, report_to="none", optim="adamw_torch")
    trainer: Any = Trainer(model=module, args=arguments)
    trainer.create_optimizer_and_scheduler(num_training_steps=1000)
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()

    def save() -> float:
        trainer.state.global_step += 1
        return seconds(lambda: trainer._save_checkpoint(module, None))

    return save


def _lightning(module: nn.Module, folder: Path, *, in_background: bool) -> Callable[[], float]:
    """``save_checkpoint`` after one step; the one before is deleted."""
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.plugins.io import AsyncCheckpointIO
    from torch.utils.data import DataLoader

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)

    class Run(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            return self.module(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

    plugin = AsyncCheckpointIO() if in_background else None
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    width = next(module.parameters()).shape[-1]
    trainer: Any = Trainer(max_steps=1, accelerator="cpu", plugins=[plugin] if plugin else None, **quiet)
    with warnings.catch_warnings():
        # About workers of the loader, and a log.
        warnings.simplefilter("ignore")
        trainer.fit(Run(), DataLoader(torch.randn(2, width), batch_size=2))
    number = 0

    def save() -> float:
        nonlocal number
        (folder / f"{number}.ckpt").unlink(missing_ok=True)
        number += 1
        took = seconds(partial(trainer.save_checkpoint, folder / f"{number}.ckpt"))
        if plugin is not None:
            # Waits for the write, which would slow down what is measured next.
            plugin.teardown()
        return took

    return save
