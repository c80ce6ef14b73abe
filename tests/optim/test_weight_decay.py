"""Weight decay against torch.optim: the place in the chain decides which kind it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from trainkit import tree
from trainkit.optim.adam import adam
from trainkit.optim.sgd import sgd
from trainkit.optim.transform import Transform, chain
from trainkit.optim.weight_decay import add_weight_decay, decouple_weight_decay, no_bias_or_norm
from trainkit.schedules import linear, scale

LR, DECAY = 2.0**-6, 0.25


def params() -> TensorDict:
    torch.manual_seed(0)
    return tree.frozen({"weight": torch.randn(4, 3, dtype=torch.float64), "bias": torch.randn(4, dtype=torch.float64)})


def grads(i: int) -> TensorDict:
    generator = torch.Generator().manual_seed(i + 1)
    return tree.map_tensors(lambda t: torch.randn(t.shape, generator=generator, dtype=t.dtype), params())


def ours(tx: Transform, steps: int = 20) -> TensorDict:
    now, state = params(), tx.init(params())
    for i in range(steps):
        now, state = tx.apply(grads(i), state, now)
    return now


def theirs(
    make: Callable[..., torch.optim.Optimizer], steps: int = 20, decay_bias: bool = True
) -> dict[str, nn.Parameter]:
    parameters = {name: nn.Parameter(t.clone()) for name, t in params().items()}
    groups = [{"params": [parameters["weight"]]}, {"params": [parameters["bias"]]}]
    if not decay_bias:
        groups[1]["weight_decay"] = 0.0
    optimizer = make(groups)
    for i in range(steps):
        for name, g in grads(i).items():
            parameters[name].grad = g
        optimizer.step()
    return parameters


def assert_close(found: TensorDict, expected: dict[str, nn.Parameter], rtol: float = 1e-11) -> None:
    for name, parameter in expected.items():
        torch.testing.assert_close(found[name], parameter.data, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("mask", [None, no_bias_or_norm])
def test_before_the_optimizer_it_is_torchs_l2(mask: Callable[..., bool] | None) -> None:
    tx = chain(add_weight_decay(DECAY, mask), sgd(LR, momentum=0.9))
    expected = theirs(
        lambda groups: torch.optim.SGD(groups, lr=LR, momentum=0.9, weight_decay=DECAY), decay_bias=mask is None
    )
    assert_close(ours(tx), expected)


def test_before_adam_it_is_what_torch_calls_adam_with_weight_decay() -> None:
    tx = chain(add_weight_decay(DECAY), adam(LR))
    assert_close(ours(tx), theirs(lambda groups: torch.optim.Adam(groups, lr=LR, weight_decay=DECAY)))


@pytest.mark.parametrize("mask", [None, no_bias_or_norm])
def test_after_adam_with_the_rate_times_the_decay_it_is_adamw(mask: Callable[..., bool] | None) -> None:
    tx = chain(adam(LR), decouple_weight_decay(LR * DECAY, mask))
    expected = theirs(lambda groups: torch.optim.AdamW(groups, lr=LR, weight_decay=DECAY), decay_bias=mask is None)
    assert_close(ours(tx), expected)


def test_a_schedule_is_read_at_the_number_of_updates() -> None:
    rate = linear(0.5, 0.0, 4)
    parameter = nn.Parameter(params()["weight"].clone())
    for i in range(6):
        with torch.no_grad():
            parameter.mul_(1 - max(0.5 - 0.125 * i, 0.0))
    zero = tree.zeros_like(params())
    for tx in (decouple_weight_decay(rate), chain(add_weight_decay(rate), sgd(1.0))):
        now, state = params(), tx.init(params())
        for _ in range(6):
            now, state = tx.apply(zero, state, now)
        torch.testing.assert_close(now["weight"], parameter.data, rtol=1e-12, atol=0)


def test_a_scheduled_rate_after_adam_is_adamw_with_a_scheduled_rate() -> None:
    rate = linear(2.0**-4, 2.0**-8, 16)
    parameters = {name: nn.Parameter(t.clone()) for name, t in params().items()}
    optimizer = torch.optim.AdamW(parameters.values(), weight_decay=DECAY)
    for i in range(20):
        for name, g in grads(i).items():
            parameters[name].grad = g
        optimizer.param_groups[0]["lr"] = float(rate(torch.tensor(i)))
        optimizer.step()
    tx = chain(adam(rate), decouple_weight_decay(scale(rate, DECAY)))
    assert_close(ours(tx), parameters)


def test_a_mask_that_lets_nothing_through_changes_nothing() -> None:
    tx = add_weight_decay(0.5, lambda name, p: False)
    updates, _ = tx.update(grads(0), tx.init(params()), params())
    assert all(torch.equal(updates[name], g) for name, g in grads(0).items())


def test_a_mask_sees_names() -> None:
    tx = add_weight_decay(0.5, lambda name, p: name == "bias")
    updates, _ = tx.update(grads(0), tx.init(params()), params())
    assert torch.equal(updates["weight"], grads(0)["weight"])
    torch.testing.assert_close(updates["bias"], grads(0)["bias"] + 0.5 * params()["bias"])


@pytest.mark.parametrize("rate", [0.5, linear(0.5, 0.0, 4)], ids=["number", "schedule"])
def test_updates_keep_their_dtype(rate: float) -> None:
    half = tree.map_tensors(lambda t: t.bfloat16(), params())
    tx = add_weight_decay(rate)
    assert tx.update(half, tx.init(half), half)[0]["weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("make", [add_weight_decay, decouple_weight_decay])
@pytest.mark.parametrize("rate", [-0.1, float("nan")])
def test_negative_rates_are_refused(make: Callable[[float], Transform], rate: float) -> None:
    with pytest.raises(ValueError, match=f"rate: got {rate}, expected a number >= 0"):
        make(rate)
