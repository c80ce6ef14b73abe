"""A loss that is not finite: the log as 4.57 filters it, and a count that says so."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.scenarios import classes
from tests.trainer.tiny import SETTINGS, Net, make_net, make_rows


class Spoilt(torch.nn.Module):
    """A net whose loss is not finite at one call; the gradient is that of the net."""

    def __init__(self, net: Net, at: int, value: float) -> None:
        super().__init__()
        self.net, self.at, self.value, self.calls = net, at, value, 0

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        out = self.net(x, labels)
        self.calls += 1
        if self.calls == self.at:
            out["loss"] = out["loss"] + self.value
        return out


def logs(library: str, folder: Path, value: float, **options: Any) -> list[dict[str, float]]:
    cls, args_cls = classes(library)
    args = args_cls(str(folder), **{**SETTINGS, "max_steps": 6, "logging_steps": 2, **options})
    trainer = cls(model=Spoilt(make_net(), 3, value), args=args, train_dataset=make_rows(12))
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_log_is_that_of_transformers_and_the_loss_is_counted(tmp_path: Path, value: float) -> None:
    ours, theirs = logs("ours", tmp_path / "ours", value), logs("theirs", tmp_path / "theirs", value)
    assert [log["loss"] for log in ours] == pytest.approx([log["loss"] for log in theirs], abs=6e-5)
    assert [log.get("nonfinite_losses") for log in ours] == [None, 1, 1]


def test_without_the_filter_only_the_log_of_its_steps_has_it(tmp_path: Path) -> None:
    ours = logs("ours", tmp_path, math.nan, logging_nan_inf_filter=False)
    assert [math.isfinite(log["loss"]) for log in ours] == [True, False, True]
    assert not any("nonfinite_losses" in log for log in ours)
