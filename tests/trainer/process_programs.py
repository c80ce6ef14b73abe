"""The program that test_two_processes.py runs in one process and, by several launchers, in two.

``python -m tests.trainer.process_programs FOLDER ROWS``: every case, with ``ROWS`` rows per process in a batch. Each
process writes what it saw to ``FOLDER/result-<rank>.json``.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.trainer.tiny import SETTINGS, make_net, make_rows
from trainkit import Trainer, TrainerCallback, TrainingArguments

CLASSES = 5


class Tagger(nn.Module):
    """Labels for every token, some of which do not count; divides its loss by the number of those that do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, tokens: Tensor, labels: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
        logits = self.head(torch.tanh(self.embedding(tokens)))
        if labels is None:
            return {"logits": logits}
        count = kwargs.get("num_items_in_batch")
        total = F.cross_entropy(logits.reshape(-1, CLASSES), labels.reshape(-1), ignore_index=-100, reduction="sum")
        return {"loss": total / ((labels != -100).sum() if count is None else count), "logits": logits}


def tagged(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of four tokens, of which row i has 1 + i % 4 labels that count."""
    g = torch.Generator().manual_seed(seed)
    tokens, labels = torch.randint(7, (n, 4), generator=g), torch.randint(CLASSES, (n, 4), generator=g)
    counts = (torch.arange(n) % 4 + 1)[:, None]
    labels = torch.where(torch.arange(4)[None] < counts, labels, -100)
    return [{"tokens": tokens[i], "labels": labels[i]} for i in range(n)]


def plain(folder: Path, rows: int, n: int = 11, **arguments: Any) -> Trainer:
    train, held_out = make_rows(n), make_rows(7, seed=1)
    return Trainer(
        make_net(),
        arguments_of(folder, rows, **arguments),
        train_dataset=train,
        eval_dataset=held_out,
        compute_metrics=seen,
    )


def counted(folder: Path, rows: int, n: int = 11, **arguments: Any) -> Trainer:
    torch.manual_seed(0)
    return Trainer(
        Tagger(),
        arguments_of(folder, rows, **arguments),
        train_dataset=tagged(n),
        eval_dataset=tagged(7, 1),
        compute_metrics=seen,
    )


def beside(folder: Path, rows: int) -> Trainer:
    """With a layer that is not in the model, but in the optimizer."""

    class WithHead(Trainer):
        head = nn.Linear(3, 3)

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = F.cross_entropy(self.head(outputs["logits"]), labels)
            return (loss, outputs) if return_outputs else loss

        def create_optimizer(self) -> Any:
            if self.optimizer is None:
                self.optimizer = torch.optim.SGD([*self.model.parameters(), *self.head.parameters()], lr=0.05)
            return self.optimizer

    torch.manual_seed(0)
    WithHead.head = nn.Linear(3, 3)
    return WithHead(make_net(), arguments_of(folder, rows), train_dataset=make_rows(12), eval_dataset=make_rows(7))


def arguments_of(folder: Path, rows: int, **changes: Any) -> TrainingArguments:
    given: dict[str, Any] = {
        **SETTINGS,
        "per_device_train_batch_size": rows,
        "per_device_eval_batch_size": 3 * rows // 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "eval_strategy": "epoch",
        "save_strategy": "steps",
        "save_steps": 2,
        "ddp_timeout": 60,
    }
    return TrainingArguments(str(folder), **{**given, **changes})


def seen(found: Any) -> dict[str, float]:
    """What shows every row, once."""
    return {
        "rows": float(len(found.label_ids)),
        "labels": float(np.asarray(found.label_ids).sum()),
        "logits": float(np.abs(found.predictions).sum()),
    }


CASES: dict[str, Any] = {
    "ragged": plain,
    "ragged, one row": lambda folder, rows: plain(folder, rows, n=9),
    "ragged, counted": counted,
    "ragged, counted, one row": lambda folder, rows: counted(folder, rows, n=9),
    "no accumulation": lambda folder, rows: plain(folder, rows, gradient_accumulation_steps=1),
    "drop_last": lambda folder, rows: plain(folder, rows, dataloader_drop_last=True),
    "workers": lambda folder, rows: plain(folder, rows, dataloader_num_workers=1),
    "beside": beside,
}


def weights(trainer: Any) -> dict[str, list[float]]:
    named = {n: p.detach().flatten().tolist() for n, p in trainer.model.named_parameters()}
    if hasattr(trainer, "head"):
        named.update({f"head.{n}": p.detach().flatten().tolist() for n, p in trainer.head.named_parameters()})
    return named


def whole_run(name: str, folder: Path, rows: int) -> dict[str, Any]:
    trainer = CASES[name](folder / "run", rows)
    trainer.train()
    found = {"log": trainer.state.log_history, "weights": weights(trainer), "evaluated": trainer.evaluate()}
    found["predicted"] = len(trainer.predict(trainer.eval_dataset).label_ids)
    if name != "beside":
        again = CASES[name](folder / "again", rows)
        again.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
        found["resumed"] = weights(again)
    return found


class Fails(TrainerCallback):
    """On the second process, in the second update: an error, after which the process lives on for a while."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.process_index == 1 and state.global_step == 1:
            raise ArithmeticError("on one process only")


@contextlib.contextmanager
def lives_on(seconds: float) -> Iterator[None]:
    try:
        yield
    except ArithmeticError:
        time.sleep(seconds)
        raise


def fail(folder: Path) -> None:
    """A run that fails in one of two processes; ``FOLDER/ended-<rank>`` says when."""
    trainer = plain(folder / "run", 2, ddp_timeout=8, save_strategy="no", eval_strategy="no")
    trainer.add_callback(Fails)
    begin = time.monotonic()
    try:
        with lives_on(25.0):
            trainer.train()
    finally:
        (folder / f"ended-{trainer.args.process_index}").write_text(str(time.monotonic() - begin))


def write_nothing(folder: Path) -> None:
    """A run whose second process may not write to any file."""
    rank = int(os.environ["RANK"])
    trainer = plain(folder / "alone", 2, save_only_model=True, save_strategy="epoch", load_best_model_at_end=True)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("train", trainer.evaluate())
    trainer.create_model_card()
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def main(folder: Path, rows: int) -> None:
    rank = int(os.environ.get("RANK", "0"))
    found = {name: whole_run(name, folder / f"case{i}", rows) for i, name in enumerate(CASES)}
    if "RANK" in os.environ:
        write_nothing(folder)
    (folder / f"result-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[2] == "fail":
        fail(Path(sys.argv[1]))
    else:
        main(Path(sys.argv[1]), int(sys.argv[2]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
