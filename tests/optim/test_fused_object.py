"""Steps by the kernel alone, beside a twin that makes all of its steps itself."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import register_optimizer_step_post_hook

from trainkit import tree
from trainkit.optim.fused_object import FusedSteps


class Pair:
    """Two equal layers with equal optimizers: one is stepped by :class:`FusedSteps` where that is possible."""

    def __init__(self, kind: Any = torch.optim.AdamW, **options: Any) -> None:
        torch.manual_seed(0)
        self.layers = [nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)) for _ in range(2)]
        self.layers[1].load_state_dict(self.layers[0].state_dict())
        self.objects = [kind(self._groups(layer), lr=0.05, fused=True, **options) for layer in self.layers]
        self.named = dict(self.layers[0].named_parameters())
        self.fused = FusedSteps(self.objects[0], self.named)
        self.generator = torch.Generator().manual_seed(1)

    @staticmethod
    def _groups(layer: nn.Module) -> list[dict[str, Any]]:
        named = dict(layer.named_parameters())
        return [
            {"params": [p for name, p in named.items() if "weight" in name], "weight_decay": 0.1},
            {"params": [p for name, p in named.items() if "bias" in name], "weight_decay": 0.0},
        ]

    def grads(self) -> dict[str, Tensor]:
        return {name: torch.randn(p.shape, generator=self.generator) for name, p in self.named.items()}

    def step(self, grads: dict[str, Tensor] | None = None) -> bool:
        """One step of both with the same gradients; whether it was made by the kernel alone."""
        grads = self.grads() if grads is None else grads
        made = self.fused.step(tree.frozen(grads))
        for layer, stepped in zip(self.layers, self.objects if not made else [None, self.objects[1]], strict=True):
            if stepped is not None:
                for name, p in layer.named_parameters():
                    p.grad = grads[name].clone() if name in grads else None
                stepped.step()
        self.check()
        return made

    def both(self, action: Callable[[Any], object]) -> None:
        for one in self.objects:
            action(one)

    def check(self) -> None:
        for a, b in zip(*(layer.parameters() for layer in self.layers), strict=True):
            assert torch.equal(a, b)
        mine, other = (one.state_dict() for one in self.objects)
        assert mine["param_groups"] == other["param_groups"]
        assert mine["state"].keys() == other["state"].keys()
        for key, memory in other["state"].items():
            assert {name: t.tolist() for name, t in mine["state"][key].items()} == {
                name: t.tolist() for name, t in memory.items()
            }


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
@pytest.mark.parametrize("maximize", [False, True])
def test_the_bits_are_those_of_the_object_under_a_schedule(kind: Any, maximize: bool) -> None:
    pair = Pair(kind, maximize=maximize)
    schedules = [LambdaLR(one, lambda step: 1 / (1 + step)) for one in pair.objects]
    made = []
    for _ in range(6):
        made.append(pair.step())
        for schedule in schedules:
            schedule.step()
    assert made == [False] + [True] * 5  # the first step makes the memory


def test_groups_with_equal_settings_are_one_call_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, sizes, kernel = Pair(), [], torch._fused_adamw_
    assert [pair.step() for _ in range(2)] == [False, True]

    def counting(params: list[Tensor], *args: Any, **kwargs: Any) -> None:
        sizes.append(len(params))
        kernel(params, *args, **kwargs)

    monkeypatch.setattr(torch, "_fused_adamw_", counting)
    pair.fused.step(tree.frozen(pair.grads()))
    pair.both(lambda one: one.param_groups[1].update(weight_decay=0.1))
    pair.fused.step(tree.frozen(pair.grads()))
    assert sizes == [2, 2, 4]


ACTIONS: dict[str, Callable[[Pair], object]] = {
    "step": Pair.step,
    "own step": lambda pair: _own_steps(pair),
    "saved and loaded": lambda pair: pair.both(lambda one: one.load_state_dict(copy.deepcopy(one.state_dict()))),
    "moments replaced": lambda pair: pair.both(_replace_moments),
    "counters replaced": lambda pair: pair.both(_replace_counters),
    "moved away and back": lambda pair: pair.both(_move_away_and_back),
    "other rate": lambda pair: pair.both(lambda one: one.param_groups[0].update(lr=0.01)),
    "equal groups": lambda pair: pair.both(lambda one: one.param_groups[1].update(one_of_settings(one))),
    "a gradient is missing": lambda pair: pair.step({k: g for k, g in pair.grads().items() if k != "1.bias"}),
    "gradients with gaps": lambda pair: pair.step({k: _with_gaps(g) for k, g in pair.grads().items()}),
}


def one_of_settings(one: Any) -> dict[str, Any]:
    return {name: value for name, value in one.param_groups[0].items() if name not in ("params", "param_names")}


def _own_steps(pair: Pair) -> None:
    grads = pair.grads()
    for layer, one in zip(pair.layers, pair.objects, strict=True):
        for name, p in layer.named_parameters():
            p.grad = grads[name].clone()
        one.step()
    pair.check()


def _replace_moments(one: Any) -> None:
    for memory in one.state.values():
        memory["exp_avg"] = memory["exp_avg"] * 0.5


def _replace_counters(one: Any) -> None:
    for memory in one.state.values():
        memory["step"] = memory["step"] + 3


def _move_away_and_back(one: Any) -> None:
    for memory in one.state.values():
        for tensor in memory.values():
            tensor.data = tensor.data.clone()


def _with_gaps(grad: Tensor) -> Tensor:
    return torch.stack([grad, grad], -1)[..., 0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(list(ACTIONS)), max_size=8))
def test_whatever_happens_to_the_object_in_between(actions: list[str]) -> None:
    pair = Pair()
    for name in [*actions, "step", "step"]:
        ACTIONS[name](pair)


def test_parameters_that_have_made_unequally_many_steps() -> None:
    pair = Pair()
    grads = pair.grads()
    assert not pair.step({name: grad for name, grad in grads.items() if name != "1.bias"})
    assert not pair.step()
    assert [pair.step() for _ in range(3)] == [True] * 3
    assert {float(memory["step"]) for memory in pair.objects[0].state.values()} == {4.0, 5.0}


def test_a_new_group_of_parameters_is_noticed() -> None:
    pair = Pair()
    assert [pair.step() for _ in range(2)] == [False, True]
    for layer, one in zip(pair.layers, pair.objects, strict=True):
        torch.manual_seed(3)
        layer.append(nn.Linear(2, 2))
        one.add_param_group({"params": list(layer[2].parameters())})
    pair.named = dict(pair.layers[0].named_parameters())
    assert not pair.step(), "two of its parameters have no name here"


@pytest.mark.parametrize(
    "options", [{"amsgrad": True}, {"fused": False}, {"fused": None}, {"lr": torch.tensor(0.05)}], ids=str
)
def test_settings_of_other_kernels_are_left_to_the_object(options: dict[str, Any]) -> None:
    layer = nn.Linear(2, 1)
    one = torch.optim.AdamW(layer.parameters(), **{"fused": True, **options})
    grads = {name: torch.ones_like(p) for name, p in layer.named_parameters()}
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    one.step()
    before = [p.detach().clone() for p in layer.parameters()]
    assert not FusedSteps(one, dict(layer.named_parameters())).step(tree.frozen(grads))
    assert all(map(torch.equal, before, layer.parameters()))


class TestSomebodyLooksOn:
    def test_hooks_of_the_object(self) -> None:
        pair, calls = Pair(), []
        pair.step()
        handle = pair.objects[0].register_step_pre_hook(lambda *_: calls.append(1))
        assert not pair.step()
        handle.remove()
        assert pair.step()
        assert calls == [1]

    def test_hooks_of_all_optimizers(self) -> None:
        pair = Pair()
        pair.step()
        handle = register_optimizer_step_post_hook(lambda *_: None)
        try:
            assert not pair.step()
        finally:
            handle.remove()
        assert pair.step()

    def test_a_step_of_the_users_own(self) -> None:
        pair = Pair()
        pair.step()
        own, calls = pair.objects[0].step, []
        pair.objects[0].step = lambda *args: (calls.append(1), own(*args))
        assert not pair.step()
        assert calls == [1]

    def test_a_step_of_the_users_own_made_like_that_of_the_class(self) -> None:
        pair, calls = Pair(), []
        pair.step()
        own = pair.objects[0].step

        @functools.wraps(torch.optim.AdamW.step)
        def step(*args: Any) -> Any:
            calls.append(1)
            return own(*args)

        pair.objects[0].step = step
        assert not pair.step()
        assert calls == [1]

    def test_a_patched_class(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls, own = [], torch.optim.AdamW.step

        def patched(self: Any, closure: Any = None) -> Any:
            calls.append(1)
            return own(self, closure)

        monkeypatch.setattr(torch.optim.AdamW, "step", patched)
        pair = Pair()
        assert [pair.step() for _ in range(2)] == [False, False]
        assert len(calls) == 4

    def test_a_subclass(self) -> None:
        class Mine(torch.optim.AdamW):
            pass

        pair = Pair(Mine)
        assert [pair.step() for _ in range(2)] == [False, False]
