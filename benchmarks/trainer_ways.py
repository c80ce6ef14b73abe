"""One training, done by a loop written by hand, by trainkit's Trainer and by the trainers that are installed.

Each is a function that trains and calls ``tick`` after every update. All do the same work: the rows in an order drawn
anew in each epoch, default collation, clipping to norm 1, fused AdamW without decay, a rate that falls linearly; no
logs, no saves.
"""

from __future__ import annotations

import itertools
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata, util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.models import CONTEXT, VOCABULARY, make_model

RATE = 1e-3
PEERS = ("transformers", "accelerate", "lightning")


def versions() -> dict[str, str]:
    """Of the peers that are installed."""
    return {name: metadata.version(name) for name in PEERS if util.find_spec(name)}


class WithLoss(nn.Module):
    """A model that takes a row's entries by name and returns its loss, as trainers expect it."""

    def __init__(self, size: str) -> None:
        super().__init__()
        self.module = make_model(size)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.module(x)
        return {"loss": F.cross_entropy(logits.flatten(0, -2), labels.flatten()), "logits": logits}


@dataclass(frozen=True)
class Work:
    """What is trained.

    Args:
        size: of the model.
        rows: dicts of tensors.
        batch_size: rows per update.
        updates: of the whole run.
    """

    size: str
    rows: list[dict[str, Tensor]]
    batch_size: int
    updates: int


def make_rows(size: str, n: int) -> list[dict[str, Tensor]]:
    """Random rows for a model of ``benchmarks.models``."""
    generator = torch.Generator().manual_seed(1)
    if size == "mlp":
        x, labels = torch.randn(n, 32, generator=generator), torch.randint(0, 10, (n,), generator=generator)
    else:
        tokens = torch.randint(0, VOCABULARY, (n, CONTEXT + 1), generator=generator)
        x, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return [{"x": a, "labels": b} for a, b in zip(x.unbind(), labels.unbind(), strict=True)]


Tick = Callable[[], None]
Way = Callable[[Work, Tick], nn.Module]
"""Trains, and returns the trained model."""


def _parts(work: Work) -> tuple[nn.Module, Any, Any, Any]:
    """Model, loader, optimizer and schedule of a loop written by hand."""
    model = WithLoss(work.size)
    loader = DataLoader(work.rows, batch_size=work.batch_size, shuffle=True)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / work.updates)
    return model, loader, optimizer, schedule


def by_hand(work: Work, tick: Tick) -> nn.Module:
    """The usual loop."""
    model, loader, optimizer, schedule = _parts(work)
    for batch in _batches(loader, work.updates):
        model(**batch)["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        tick()
    return model


def _batches(loader: Any, updates: int) -> Iterator[Any]:
    """The batches of as many passes as it takes."""
    return itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), updates)


def _options(work: Work, folder: str) -> dict[str, Any]:
    """The arguments of the two Trainers."""
    return {
        "output_dir": folder,
        "max_steps": work.updates,
        "per_device_train_batch_size": work.batch_size,
        "learning_rate": RATE,
        "optim": "adamw_torch_fused",
        "lr_scheduler_type": "linear",
        "max_grad_norm": 1.0,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }


def _train(package: Any, work: Work, tick: Tick, **options: Any) -> nn.Module:
    class Ticks(package.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            tick()

    model = WithLoss(work.size)
    with tempfile.TemporaryDirectory() as folder:
        arguments = package.TrainingArguments(**_options(work, folder), **options)
        trainer = package.Trainer(model=model, args=arguments, train_dataset=work.rows, callbacks=[Ticks()])
        trainer.remove_callback(package.PrinterCallback)
        trainer.train()
    return model


def trainkit(work: Work, tick: Tick) -> nn.Module:
    """trainkit's Trainer."""
    import trainkit

    return _train(trainkit, work, tick)


def trainkit_compiled(work: Work, tick: Tick) -> nn.Module:
    """The same with ``torch_compile``."""
    import trainkit

    return _train(trainkit, work, tick, torch_compile=True)


def transformers(work: Work, tick: Tick) -> nn.Module:
    """The Trainer of transformers."""
    import transformers

    return _train(transformers, work, tick)


def accelerate(work: Work, tick: Tick) -> nn.Module:
    """The loop of accelerate's documentation."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, loader, optimizer, schedule = accelerator.prepare(*_parts(work))
    for batch in _batches(loader, work.updates):
        accelerator.backward(model(**batch)["loss"])
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        tick()
    trained: nn.Module = accelerator.unwrap_model(model)
    return trained


def lightning(work: Work, tick: Tick) -> nn.Module:
    """Lightning's Trainer."""
    from lightning.pytorch import Callback, LightningModule, Trainer

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    model, loader, optimizer, schedule = _parts(work)

    class Run(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            loss: Tensor = self.model(**batch)["loss"]
            return loss

        def configure_optimizers(self) -> Any:
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    class Ticks(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            tick()

    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    with warnings.catch_warnings():
        # About workers of the loader.
        warnings.simplefilter("ignore")
        trainer = Trainer(
            max_steps=work.updates, accelerator="cpu", gradient_clip_val=1.0, callbacks=[Ticks()], **quiet
        )
        trainer.fit(Run(), loader)
    return model


WAYS: dict[str, tuple[str, Way]] = {
    "by hand": ("torch", by_hand),
    "trainkit": ("trainkit", trainkit),
    "trainkit, compiled": ("trainkit", trainkit_compiled),
    "transformers": ("transformers", transformers),
    "accelerate": ("accelerate", accelerate),
    "lightning": ("lightning", lightning),
}
"""The package that a way needs, and the way."""


def missing() -> list[str]:
    """What to print about ways that cannot be measured."""
    return [f"{package} is not installed, and left out" for package in _packages() if not _is_there(package)]


def available() -> dict[str, Way]:
    """The ways that can be measured."""
    return {name: way for name, (package, way) in WAYS.items() if _is_there(package)}


def _packages() -> list[str]:
    return list(dict.fromkeys(package for package, _ in WAYS.values()))


def _is_there(package: str) -> bool:
    return util.find_spec(package) is not None


class Paused:
    """A training in a process of its own, which goes on for so many updates at each call.

    So several trainings take turns, each is set up and compiled once, and none shares its threads with another: torch's
    workers of one process wait for each other less patiently, the more of them there are.

    Args:
        command: runs a process that calls :func:`train_in_turns`.
    """

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self) -> float:
        """Seconds per update, over the updates of this call; the first also counts the set-up."""
        return self._next()

    def finish(self) -> float:
        """Let the training end, after the last call: the loss of the trained model."""
        loss = self._next()
        self._process.wait()
        return loss

    def close(self) -> None:
        """End the process, if it has not ended."""
        self._process.kill()
        self._process.communicate()

    def _next(self) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(_ANSWER):
                return float(line.removeprefix(_ANSWER))
        raise RuntimeError(f"{' '.join(self._process.args)}: it ended early")  # type: ignore[arg-type]


_ANSWER = "answer: "


def train_in_turns(way: Way, work: Work, updates: int) -> None:
    """The other side of :class:`Paused`: train, and after so many updates print their time and wait for a line.

    Args:
        way: trains.
        work: what.
        updates: per turn; divides those of the work.
    """
    done, begun = 0, time.perf_counter()
    sys.stdin.readline()

    def tick() -> None:
        nonlocal done, begun
        done += 1
        if done % updates == 0:
            print(f"{_ANSWER}{(time.perf_counter() - begun) / updates}", flush=True)
            sys.stdin.readline()
            begun = time.perf_counter()

    model = way(work, tick)
    if done != work.updates:
        raise RuntimeError(f"{way.__name__}: made {done} updates, expected {work.updates}")
    whole = {name: torch.stack([row[name] for row in work.rows]) for name in work.rows[0]}
    with torch.no_grad():
        print(f"{_ANSWER}{float(model.eval()(**whole)['loss'])}", flush=True)
