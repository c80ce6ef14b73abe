"""The rule of an AdamW object over its own memory, beside the object's own steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from trainkit import LossOutput, apply_updates, functional, init_state, value_and_grad
from trainkit.execution import compile_step
from trainkit.optim import chain, clip_by_global_norm
from trainkit.optim.object_rule import has_object_rule, object_rule, part_counters, write_rates


def make(seed: int = 0) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    decayed = [p for p in net.parameters() if p.dim() > 1]
    rest = [p for p in net.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0, "betas": (0.8, 0.9)}]
    object_ = torch.optim.AdamW(groups, lr=0.1, fused=True)
    return net, object_, LambdaLR(object_, lambda s: 1 / (1 + s))


def batches(n: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(5, 3, generator=g) for _ in range(n)]


def by_hand(net: nn.Module, object_: Any, schedule: Any, xs: list[Tensor]) -> None:
    for x in xs:
        (net(x).square().sum() / len(x)).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        object_.step()
        object_.zero_grad()
        schedule.step()


def with_rule(net: nn.Module, object_: Any, schedule: Any, xs: list[Tensor], strategy: Any) -> Any:
    model = functional(net)

    def loss(params: Any, buffers: Any, x: Tensor) -> LossOutput:
        out, buffers = model(params, buffers, x)
        return LossOutput(out.square().sum(), len(x), buffers=buffers)

    tx = chain(clip_by_global_norm(1.0), object_rule(object_, dict(net.named_parameters())))
    step = compile_step(apply_updates(value_and_grad(loss, unused="omit", mean=True), tx), strategy=strategy)
    state = init_state(net, tx, copy=False)
    for x in xs:
        write_rates(object_, state.opt_state["1"])
        state, _ = step(state, x)
        schedule.step()
    part_counters(object_)
    return step


def assert_alike(one: tuple[nn.Module, Any], other: tuple[nn.Module, Any], rtol: float) -> None:
    for p, q in zip(one[0].parameters(), other[0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=rtol / 100)
        for name in ("exp_avg", "exp_avg_sq", "step"):
            torch.testing.assert_close(one[1].state[p][name], other[1].state[q][name], rtol=rtol, atol=rtol / 100)


@pytest.mark.parametrize("strategy", ["eager", pytest.param("whole", marks=pytest.mark.slow)])
def test_the_object_is_where_its_own_steps_would_be(strategy: str) -> None:
    ours, theirs = make(), make()
    step = with_rule(*ours, batches(6), strategy)
    by_hand(*theirs, batches(6))
    assert step.explain().strategy == strategy
    assert_alike(ours[:2], theirs[:2], 1e-5 if strategy == "eager" else 3e-4)


def test_it_goes_on_from_the_object_and_the_object_from_it() -> None:
    ours, theirs = make(), make()
    xs = batches(9)
    by_hand(*ours, xs[:3])
    with_rule(*ours, xs[3:6], "eager")
    by_hand(*ours, xs[6:])
    by_hand(*theirs, xs)
    assert_alike(ours[:2], theirs[:2], 1e-5)


def test_other_objects_are_refused() -> None:
    w = [nn.Parameter(torch.zeros(1))]
    assert not has_object_rule(torch.optim.AdamW(w, amsgrad=True))
    with pytest.raises(TypeError, match=r"SGD, expected a torch\.optim\.AdamW"):
        object_rule(torch.optim.SGD(w, lr=0.1), {})


def test_a_memory_of_different_numbers_of_steps_is_refused() -> None:
    # One counter for both would correct the bias of one of them wrongly.
    v, w = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    adam = torch.optim.AdamW([v, w], lr=0.1)
    for late in (False, True):
        v.grad, w.grad = torch.ones(1), torch.ones(1) if late else None
        adam.step()
    assert not has_object_rule(adam)
    with pytest.raises(TypeError, match="equally many steps"):
        object_rule(adam, {"v": v, "w": w})
    assert has_object_rule(torch.optim.AdamW([{"params": [v]}, {"params": [w]}]))
