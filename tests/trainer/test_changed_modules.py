"""What callbacks and forward passes do to the parameters of a run, beside transformers 4.57.1."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import trainkit
from tests.trainer.tiny import SETTINGS, make_net, make_rows

Act = Callable[[Any, Any, int], None]
"""``(model, optimizer, completed updates)``, at the beginning of an update."""

OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "fused": lambda params: torch.optim.AdamW(params, lr=0.05, fused=True),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
}
every_optimizer = pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def trained(package: Any, folder: Path, model: Any, make_optimizer: Any, act: Act | None = None, **options: Any) -> Any:
    """The trainer after a run of six updates."""

    class Acting(package.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if act is not None:
                act(model, optimizer, state.global_step)

    optimizer = make_optimizer(model.parameters())
    trainer = package.Trainer(
        model=model,
        args=package.TrainingArguments(str(folder), max_steps=6, **{**SETTINGS, **options}),
        train_dataset=make_rows(),
        callbacks=[Acting()],
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
    )
    trainer.train()
    return trainer


def assert_alike(one: Any, other: Any) -> None:
    for name, tensor in other.model.state_dict().items():
        torch.testing.assert_close(one.model.state_dict()[name], tensor, msg=lambda text, name=name: f"{name}: {text}")
    rows = [[log["loss"] for log in trainer.state.log_history if "loss" in log] for trainer in (one, other)]
    torch.testing.assert_close(*rows, rtol=1e-4, atol=1e-4)


def assert_as_transformers(
    folder: Path, make_model: Callable[[], Any], make_optimizer: Any, act: Act | None = None, **options: Any
) -> None:
    ours, theirs = (
        trained(package, folder / package.__name__, make_model(), make_optimizer, act, **options)
        for package in (trainkit, transformers)
    )
    assert_alike(ours, theirs)


def freezing(start: int, stop: int) -> Act:
    """Freeze the first layer for some updates."""
    return lambda model, optimizer, step: model.first.requires_grad_(not start <= step < stop)


@every_optimizer
@pytest.mark.parametrize(("start", "stop"), [(2, 4), (0, 3), (3, 9)])
def test_frozen_parameters_are_left_alone_meanwhile(make_optimizer: Any, start: int, stop: int, tmp_path: Path) -> None:
    assert_as_transformers(tmp_path, make_net, make_optimizer, freezing(start, stop))


def test_frozen_parameters_are_left_alone_in_a_compiled_run(tmp_path: Path) -> None:
    eager, compiled = (
        trained(trainkit, tmp_path / str(flag), make_net(), OPTIMIZERS["fused"], freezing(2, 4), torch_compile=flag)
        for flag in (False, True)
    )
    assert_alike(compiled, eager)


def replace_head(model: Any, optimizer: Any, step: int) -> None:
    """A new last layer, which the optimizer gets to know."""
    if step != 2:
        return
    old, new = model.second, nn.Linear(8, 3)
    nn.init.constant_(new.weight, 0.1)
    nn.init.zeros_(new.bias)
    model.second = new
    for p in old.parameters():
        optimizer.state.pop(p, None)
    known = {id(a): b for a, b in zip(old.parameters(), new.parameters(), strict=True)}
    for group in optimizer.param_groups:
        group["params"] = [known.get(id(p), p) for p in group["params"]]


@every_optimizer
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_replaced_part_is_trained(make_optimizer: Any, max_grad_norm: float, tmp_path: Path) -> None:
    assert_as_transformers(tmp_path, make_net, make_optimizer, replace_head, max_grad_norm=max_grad_norm)


class TrainsAPartItself(nn.Module):
    """Its forward pass calls ``backward()`` on a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.own = nn.Linear(4, 3), nn.Linear(4, 1)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if self.training:
            self.own(x).square().mean().backward()
        logits = self.first(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class FreezesByTurns(nn.Module):
    """Its forward pass freezes one of two parts, the other one next time."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])
        self.calls = 0

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        for i, part in enumerate(self.parts):
            part.requires_grad_(i == self.calls % 2)
        logits = sum(part(x) for part in self.parts)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Unfreezes(nn.Module):
    """A part of it is frozen until it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.first.requires_grad_(True)
        logits = self.last(self.first(x))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Sparse(nn.Module):
    """Its table gets sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(5, 4, sparse=True), nn.Linear(4, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.last(self.table(labels) + x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Hooked(nn.Module):
    """A hook of a parameter works on its ``grad``."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.first.weight.register_post_accumulate_grad_hook(_shrink)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.first(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def _shrink(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.mul_(0.1)


def seeded(kind: Callable[[], Any]) -> Callable[[], Any]:
    def make() -> Any:
        torch.manual_seed(0)
        return kind()

    return make


@every_optimizer
@pytest.mark.parametrize("kind", [TrainsAPartItself, FreezesByTurns, Hooked])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_what_a_forward_pass_does_to_gradients(
    make_optimizer: Any, kind: Any, accumulation: int, tmp_path: Path
) -> None:
    options = {"gradient_accumulation_steps": accumulation, "max_grad_norm": 0.5}
    assert_as_transformers(tmp_path, seeded(kind), make_optimizer, **options)


@every_optimizer
def test_a_forward_pass_may_unfreeze_what_the_optimizer_does_not_hold(make_optimizer: Any, tmp_path: Path) -> None:
    def make_other(params: Any) -> Any:
        return make_optimizer([p for p in params if p.requires_grad])

    assert_as_transformers(tmp_path, seeded(Unfreezes), make_other, max_grad_norm=0.5)


def test_sparse_gradients(tmp_path: Path) -> None:
    def make_optimizer(params: Any) -> Any:
        return torch.optim.SGD(params, lr=0.05)

    assert_as_transformers(tmp_path, seeded(Sparse), make_optimizer, max_grad_norm=0.0)


@every_optimizer
def test_a_gradient_that_a_callback_leaves_counts_once(make_optimizer: Any, tmp_path: Path) -> None:
    def probe(model: Any, optimizer: Any, step: int) -> None:
        if step == 2:
            model(x=torch.ones(1, 4), labels=torch.zeros(1, dtype=torch.long))["loss"].backward()

    assert_as_transformers(tmp_path, make_net, make_optimizer, probe)
