"""Parameters that a callback freezes or unfreezes in the middle of a run, beside transformers 4.57.1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import trainkit
from tests.trainer.tiny import SETTINGS, make_net, make_rows


def trained(package: Any, folder: Path, *, freeze_at: int, thaw_at: int, **options: Any) -> dict[str, Tensor]:
    """The weights after a run in which the first layer is frozen for some updates."""

    class Freezing(package.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            model.first.requires_grad_(not freeze_at <= state.global_step < thaw_at)

    model = make_net()
    # An optimizer that has all parameters, frozen or not.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=options.pop("fused"))
    trainer = package.Trainer(
        model=model,
        args=package.TrainingArguments(str(folder), max_steps=6, **SETTINGS, **options),
        train_dataset=make_rows(),
        callbacks=[Freezing()],
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
    )
    trainer.train()
    return model.state_dict()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("freeze_at", "thaw_at"), [(2, 4), (0, 3), (3, 9)])
def test_are_left_alone_meanwhile(fused: bool, freeze_at: int, thaw_at: int, tmp_path: Path) -> None:
    spell = {"freeze_at": freeze_at, "thaw_at": thaw_at, "fused": fused}
    ours, theirs = (trained(package, tmp_path / package.__name__, **spell) for package in (trainkit, transformers))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, msg=lambda text, name=name: f"{name}: {text}")


def test_are_left_alone_in_a_compiled_run(tmp_path: Path) -> None:
    spell: dict[str, Any] = {"freeze_at": 2, "thaw_at": 4, "fused": True}
    eager, compiled = (trained(trainkit, tmp_path / str(flag), torch_compile=flag, **spell) for flag in (False, True))
    for name, tensor in eager.items():
        torch.testing.assert_close(compiled[name], tensor, msg=lambda text, name=name: f"{name}: {text}")
