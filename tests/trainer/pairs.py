"""Trainers of trainkit and of transformers 4.57 that are made alike."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from tests.trainer.scenarios import classes
from tests.trainer.tiny import SETTINGS, make_net, make_rows
from trainkit import Trainer, TrainingArguments


class Pair:
    """A trainer of each library, made alike."""

    def __init__(
        self, folder: Path, arguments: dict[str, Any] | None = None, make: Any = make_net, **given: Any
    ) -> None:
        self.all, self.results = [], []
        for library in ("ours", "theirs"):
            cls, args_cls = classes(library)
            args = args_cls(str(folder / library), **{**SETTINGS, **(arguments or {})})
            rows = {"train_dataset": make_rows(7), "eval_dataset": make_rows(5, seed=1)}
            self.all.append(cls(model=make(), args=args, **{**rows, **given}))
        self.ours, self.theirs = self.all

    def train(self) -> Pair:
        with warnings.catch_warnings():
            # Of transformers, whose rotation looks at times.
            warnings.filterwarnings("ignore", "mtime may not be reliable")
            self.results = [trainer.train() for trainer in self.all]
        return self

    def logs(self) -> list[Any]:
        return [trainer.state.log_history for trainer in self.all]

    def same(self, ask: Any) -> Any:
        """The answer of both, which must be one."""
        one, other = map(ask, self.all)
        assert one == other
        return one

    def close(self, ask: Any, tolerance: float = 1e-5) -> Any:
        one, other = map(ask, self.all)
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
        return one


def ours(folder: Path, arguments: dict[str, Any] | None = None, **given: Any) -> Trainer:
    args = TrainingArguments(str(folder), **{**SETTINGS, **(arguments or {})})
    return Trainer(**{"model": make_net(), "args": args, "train_dataset": make_rows(7), **given})
