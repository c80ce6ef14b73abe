"""``as_torch``: transformations as objects of torch.optim, beside torch's own optimizers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.optim.table import assert_same_bits
from trainkit import optim, tree
from trainkit.optim import as_torch, from_torch
from trainkit.optim.transform import Transform, chain
from trainkit.types import Params


def model_and_data() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    return model, torch.randn(8, 3, dtype=torch.float64)


def train(model: nn.Module, optimizer: Optimizer, x: Tensor, steps: int, scheduler: Any = None) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def assert_same_parameters(found: nn.Module, expected: nn.Module) -> None:
    for (name, p), q in zip(found.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("transform", "reference"),
    [
        (optim.adamw(0.01, weight_decay=0.1), partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)),
        (from_torch(torch.optim.Adagrad, lr=0.1), partial(torch.optim.Adagrad, lr=0.1)),
        (optim.sgd(0.1, momentum=0.9), partial(torch.optim.SGD, lr=0.1, momentum=0.9)),
    ],
    ids=["adamw", "from_torch", "sgd"],
)
def test_is_the_optimizer_that_it_transforms_as(transform: Transform, reference: Callable[..., Optimizer]) -> None:
    (model, x), (twin, _) = model_and_data(), model_and_data()
    pointers = [p.data_ptr() for p in model.parameters()]
    train(model, as_torch(transform, model), x, 20)
    train(twin, reference(twin.parameters()), x, 20)
    assert_same_parameters(model, twin)
    assert [p.data_ptr() for p in model.parameters()] == pointers


def test_schedulers_of_torch_drive_a_function_of_the_rate() -> None:
    (model, x), (twin, _) = model_and_data(), model_and_data()
    optimizer = as_torch(partial(optim.adamw, weight_decay=0.1), model, lr=0.05)
    reference = torch.optim.AdamW(twin.parameters(), lr=0.05, weight_decay=0.1)
    for m, o in ((model, optimizer), (twin, reference)):
        train(m, o, x, 20, torch.optim.lr_scheduler.ExponentialLR(o, 0.8))
    assert_same_parameters(model, twin)
    assert optimizer.param_groups[0]["lr"] == reference.param_groups[0]["lr"]


def test_own_rate_is_shown_and_cannot_be_set_in_vain() -> None:
    model, x = model_and_data()
    optimizer = as_torch(optim.adamw(lambda count: 0.5 / (1 + count)), model)
    train(model, optimizer, x, 2)
    assert float(optimizer.param_groups[0]["lr"]) == 0.25
    optimizer.param_groups[0]["lr"] = 0.1
    with pytest.raises(ValueError, match="the transformation has its own rate"):
        optimizer.step()
    optimizer = as_torch(optim.adamw(0.1), model)
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    with pytest.raises(ValueError, match="the transformation has its own rate"):
        train(model, optimizer, x, 1)


@pytest.mark.parametrize("make", [optim.adamw, optim.nadam, partial(from_torch, torch.optim.RMSprop)])
def test_state_dict_round_trip_continues_the_run(make: Callable[..., Transform], tmp_path: Any) -> None:
    (model, x), (twin, _) = model_and_data(), model_and_data()

    def optimizer_of(m: nn.Module) -> Optimizer:
        if make in (optim.adamw, optim.nadam):
            return as_torch(make, m, lr=0.05)
        return as_torch(chain(optim.clip_by_global_norm(0.1), make(lr=0.05)), m)

    optimizer = optimizer_of(model)
    train(model, optimizer, x, 3)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "file")
    saved = torch.load(tmp_path / "file", weights_only=True)
    twin.load_state_dict(saved["model"])
    other = optimizer_of(twin)
    other.load_state_dict(saved["optimizer"])
    train(model, optimizer, x, 3)
    train(twin, other, x, 3)
    assert_same_parameters(twin, model)


def test_load_state_dict_refuses_other_states_before_it_changes_anything() -> None:
    model, x = model_and_data()
    optimizer = as_torch(optim.adamw(0.1), model)
    train(model, optimizer, x, 1)
    before = tree.clone(optimizer.opt_state)
    with pytest.raises(ValueError, match="on one side only"):
        optimizer.load_state_dict(as_torch(optim.sgd(0.1), model).state_dict())
    wrong = optimizer.state_dict()
    wrong["state"] = {path: torch.zeros(7) for path in wrong["state"]}
    with pytest.raises(ValueError, match="other shapes"):
        optimizer.load_state_dict(wrong)
    assert_same_bits(optimizer.opt_state, before)


def test_closure_is_called_and_its_loss_handed_on() -> None:
    model, x = model_and_data()
    seen = []

    def update(grads: Params, opt_state: Any, params: Params, /, **extra: Any) -> tuple[Params, Any]:
        seen.append(extra["loss"])
        return tree.map_tensors(torch.neg, grads), opt_state

    optimizer = as_torch(optim.transform.transform(lambda params: tree.frozen(), update), model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    second = optimizer.step(closure)
    assert [float(loss) for loss in seen] == [first.item(), second.item()]
    assert second.item() < first.item()
    assert not seen[0].requires_grad


def test_parameters_without_gradient() -> None:
    model, x = model_and_data()
    extra = nn.Parameter(torch.ones(2, dtype=torch.float64))
    model.register_parameter("extra", extra)
    frozen = model.get_parameter("0.bias").requires_grad_(False)
    strict = as_torch(optim.adamw(0.1), model)
    with pytest.raises(ValueError, match="no gradient on extra"):
        train(model, strict, x, 1)
    before = frozen.clone()
    train(model, as_torch(optim.adamw(0.1, weight_decay=0.5), model, unused="zero"), x, 1)
    torch.testing.assert_close(extra.detach(), torch.full((2,), 0.95, dtype=torch.float64))
    assert torch.equal(frozen, before)


def test_bad_constructions_are_refused() -> None:
    model, _ = model_and_data()
    with pytest.raises(ValueError, match="lr: missing"):
        as_torch(optim.adamw, model)
    with pytest.raises(ValueError, match=r"lr: got 0\.1, but the transformation has its own rate"):
        as_torch(optim.adamw(0.1), model, lr=0.1)
    with pytest.raises(ValueError, match="unused: got 'skip'"):
        as_torch(optim.adamw(0.1), model, unused="skip")
    with pytest.raises(ValueError, match="none of 1 tensors is trainable"):
        as_torch(optim.adamw(0.1), [torch.zeros(1)])
    with pytest.raises(ValueError, match="a transformation has one group"):
        as_torch(optim.adamw(0.1), model).add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


def test_takes_named_parameters_and_bare_tensors() -> None:
    model, _ = model_and_data()
    named = as_torch(optim.adamw(0.1), model.named_parameters())
    bare = as_torch(optim.adamw(0.1), model.parameters())
    assert list(named.opt_state["exp_avg"].keys()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert list(bare.opt_state["exp_avg"].keys()) == ["0", "1", "2", "3"]
