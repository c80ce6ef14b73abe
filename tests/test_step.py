"""The training step beside the loop that everybody writes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainkit import (
    LossOutput,
    accumulate,
    apply_updates,
    functional,
    init_state,
    live_value_and_grad,
    make_train_step,
    run,
    value_and_grad,
)
from trainkit.execution import compile_step, member_value_and_grad
from trainkit.losses import classification, module_loss
from trainkit.optim import adamw, chain, clip_by_global_norm, sgd
from trainkit.optim.transform import stateless
from trainkit.rng import fold_in_host
from trainkit.types import Gradients

STEPS = 6


def make_module() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 8, bias=False), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 4))


def batches() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 3, generator=g), torch.randint(0, 4, (6,), generator=g)) for _ in range(STEPS)]


def plain_loop(microbatches: int) -> tuple[nn.Module, list[float], list[float]]:
    """The oracle: module, torch.optim, clip_grad_norm_, a rate that falls, dropout seeded as the state says."""
    module = make_module()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1.0, weight_decay=0.1)
    losses, norms = [], []
    for step, (x, y) in enumerate(batches()):
        total = 0.0
        for i, (part, labels) in enumerate(zip(x.chunk(microbatches), y.chunk(microbatches), strict=True)):
            key = fold_in_host(5, i) if microbatches > 1 else 5
            torch.manual_seed(fold_in_host(key, step, 0) % 2**64)
            loss = F.cross_entropy(module(part), labels, reduction="sum") / len(y)
            loss.backward()
            total += loss.item()
        optimizer.param_groups[0]["lr"] = 0.01 / (1 + step)
        norms.append(float(nn.utils.clip_grad_norm_(module.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return module, losses, norms


@pytest.mark.parametrize("microbatches", [1, 3])
@pytest.mark.parametrize("gradients", ["functional", "live"])
def test_equals_the_plain_loop(gradients: str, microbatches: int) -> None:
    module = make_module()
    tx = chain(clip_by_global_norm(0.5), adamw(lambda count: 0.01 / (1 + count), weight_decay=0.1))
    state = init_state(module, tx, seed=5)
    if gradients == "functional":
        step = make_train_step(module_loss(module, classification), tx, accumulate=microbatches)
        assert_same_run(run(step, state, batches()), microbatches, statistics=True)
    else:
        live = live_value_and_grad(
            module,
            lambda p, b, batch: LossOutput(
                F.cross_entropy(module(batch[0]), batch[1], reduction="sum"), 6 // microbatches
            ),
        )
        step = apply_updates(live if microbatches == 1 else accumulate(live, microbatches), tx)
        # A live module keeps its own statistics, which nothing in training mode reads.
        assert_same_run(run(step, state, batches()), microbatches, statistics=False)


def assert_same_run(records: Any, microbatches: int, *, statistics: bool) -> None:
    module, losses, norms = plain_loop(microbatches)
    found = list(records)
    assert [float(r.metrics["loss"].compute()) for r in found] == pytest.approx(losses, rel=1e-5)
    assert [float(r.metrics["grad_norm"].compute()) for r in found] == pytest.approx(norms, rel=1e-4)
    rates = [float(r.metrics["learning_rate"].compute()) for r in found]
    assert rates == pytest.approx([0.01 / (1 + i) for i in range(STEPS)])
    for name, p in module.named_parameters():
        torch.testing.assert_close(found[-1].state.params[name], p.detach(), rtol=1e-4, atol=1e-6)
    for name, b in module.named_buffers() if statistics else ():
        torch.testing.assert_close(found[-1].state.buffers[name], b)


def linear_loss(params: Any, buffers: Any, x: Tensor) -> LossOutput:
    return LossOutput((params["weight"] * x).sum(), len(x))


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("gradients", [value_and_grad, member_value_and_grad])
def test_parameters_that_are_added_share_a_gradient_and_are_updated_apart(gradients: Any, microbatches: int) -> None:
    """Autograd gives both terms of a sum the same tensor, which clipping in place would scale twice."""
    module = nn.ParameterDict({name: nn.Parameter(torch.ones(3)) for name in ("rows", "columns")})
    tx = chain(clip_by_global_norm(1.0), sgd(0.5))

    def loss(params: Any, buffers: Any, x: Tensor) -> LossOutput:
        return LossOutput((x * (params["rows"] + params["columns"])).square().sum(), len(x))

    x = torch.randn(4, 3)
    step = make_train_step(loss, tx, accumulate=microbatches, gradients=gradients)
    after, metrics = step(init_state(module, tx), x)
    (x * (module["rows"] + module["columns"])).square().sum().div(4).backward()
    norm = nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    torch.testing.assert_close(metrics["grad_norm"].compute(), norm)
    for name, p in module.items():
        torch.testing.assert_close(after.params[name], (p - 0.5 * p.grad).detach())


def test_what_is_done_to_a_gradient_that_is_the_factor_does_not_reach_the_metrics() -> None:
    """Autograd gives a number that the loss is a sum with the very tensor that the backward pass starts from."""
    module = nn.ParameterDict({name: nn.Parameter(torch.ones(1)) for name in ("weight", "bias")})
    tx = chain(clip_by_global_norm(0.5), sgd(0.1))

    def loss(params: Any, buffers: Any, x: Tensor) -> LossOutput:
        return LossOutput(params["bias"].sum() + (params["weight"] * x).sum(), 1)

    after, metrics = make_train_step(loss, tx)(init_state(module, tx), torch.tensor([2.0]))
    assert float(metrics["loss"].compute()) == 3.0
    torch.testing.assert_close(after.params["bias"], torch.tensor([1 - 0.1 * 0.5 / 5**0.5]))


def test_the_short_way_is_the_composition() -> None:
    module = make_module()
    tx, loss = sgd(0.1), module_loss(module, classification)
    state, (batch, *_) = init_state(module, tx), batches()
    short, _ = make_train_step(loss, tx, accumulate=2)(state, batch)
    written, _ = apply_updates(accumulate(value_and_grad(loss), 2), tx)(state, batch)
    assert all(torch.equal(a, b) for a, b in zip(short.params.values(), written.params.values(), strict=True))


def test_the_optimizer_gets_the_mean_gradient_and_the_mean_loss() -> None:
    seen: dict[str, Tensor] = {}

    def record(grads: Any, opt_state: Any, params: Any, /, **extra: Any) -> Any:
        seen.update(grad=grads["weight"].clone(), loss=extra["loss"].clone())
        return inner.apply(grads, opt_state, params, **extra)

    inner = sgd(0.1)
    layer = nn.Linear(2, 1, bias=False)
    state = init_state(layer, inner)
    apply_updates(value_and_grad(linear_loss), type(inner)(inner.init, inner.update, record))(
        state, torch.full((4, 2), 3.0)
    )
    assert seen["grad"].tolist() == [[3.0, 3.0]]
    torch.testing.assert_close(seen["loss"], 3 * state.params["weight"].sum())


def test_ranks_are_reduced_once_before_the_division() -> None:
    """Two ranks, one of which has three times the rows: the gradient is that of all rows together."""
    layer = nn.Linear(2, 1, bias=False)
    state = init_state(layer, sgd(0.1))
    here, there = torch.randn(2, 2), torch.randn(6, 2)
    calls: list[Gradients] = []

    def reduce(own: Gradients) -> Gradients:
        calls.append(own)
        other = value_and_grad(linear_loss)(state, there)
        grads = {name: g + other.grads[name] for name, g in own.grads.items()}
        return Gradients(
            type(own.grads)(grads), own.loss_sum + other.loss_sum, own.weight + other.weight, {}, own.buffers
        )

    found, metrics = make_train_step(linear_loss, sgd(0.1), accumulate=2, reduce=reduce)(state, here)
    expected, _ = make_train_step(linear_loss, sgd(0.1))(state, torch.cat([here, there]))
    torch.testing.assert_close(found.params["weight"], expected.params["weight"])
    assert float(metrics["loss"].weight) == 8
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_parameters_keep_their_dtype(dtype: torch.dtype) -> None:
    layer = nn.Linear(2, 1, bias=False, dtype=dtype)
    after, _ = make_train_step(linear_loss, sgd(0.5))(init_state(layer, sgd(0.5)), torch.ones(2, 2, dtype=dtype))
    assert after.params["weight"].dtype == dtype


def test_reports_of_the_optimizer_are_metrics_of_their_own() -> None:
    """What is reported lies in the optimizer's memory, which a donating step writes over; metrics must not change."""
    module = make_module()
    tx = chain(clip_by_global_norm(0.5), stateless(lambda updates, params: updates), sgd(lambda count: 1.0 + count))
    step = compile_step(make_train_step(module_loss(module, classification), tx), strategy="eager")
    found = list(run(step, init_state(module, tx), batches()))
    assert [float(r.metrics["learning_rate"].compute()) for r in found] == [1.0 + i for i in range(STEPS)]


def test_a_list_of_microbatches_is_a_batch() -> None:
    layer = nn.Linear(2, 1, bias=False)
    state, x = init_state(layer, sgd(0.1)), torch.randn(5, 2)
    whole, _ = make_train_step(linear_loss, sgd(0.1))(state, x)
    parts, _ = make_train_step(linear_loss, sgd(0.1), accumulate=None)(state, [x[:1], x[1:4], x[4:]])
    torch.testing.assert_close(parts.params["weight"], whole.params["weight"])


def test_a_module_that_is_trained_in_place_is_the_state() -> None:
    """``init_state(copy=False)`` with a donating step: one set of weights in memory, seen through the module."""
    module = make_module()
    tx = sgd(0.1)
    step = compile_step(make_train_step(module_loss(module, classification), tx), strategy="eager")
    (*_, last) = run(step, init_state(module, tx, copy=False), batches())
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        own = {**last.state.params, **last.state.buffers}[name]
        assert own.data_ptr() == tensor.data_ptr()


def test_functional_and_module_give_the_same_loss_afterwards() -> None:
    module = make_module().eval()
    tx = sgd(0.1)
    (*_, last) = run(make_train_step(module_loss(module, classification), tx), init_state(module, tx), batches())
    model: Callable[..., Any] = functional(module)
    logits, _ = model(last.state.params, last.state.buffers, batches()[0][0])
    module.load_state_dict({**last.state.params, **last.state.buffers})
    assert torch.equal(logits, module(batches()[0][0]))


def test_gradients_that_are_parts_of_others_are_scaled_once() -> None:
    """The gradient of what is joined is a view of the gradient of the whole."""

    def loss(params: Any, buffers: Any, c: torch.Tensor) -> LossOutput:
        whole = torch.cat([torch.zeros(2), params["b"]]) + params["a"]
        return LossOutput((whole * c[0]).sum(), len(c))

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(2))

    c = torch.arange(1.0, 5.0)
    batch = torch.stack([c] * 4)
    for step in (apply_updates(value_and_grad(loss), sgd(1.0)), make_train_step(loss, sgd(1.0))):
        after, _ = step(init_state(Two(), sgd(1.0)), batch)
        torch.testing.assert_close(after.params["a"], -c / 4)
        torch.testing.assert_close(after.params["b"], -c[2:] / 4)
    tx = chain(clip_by_global_norm(1.0), sgd(1.0))
    after, _ = make_train_step(loss, tx)(init_state(Two(), tx), batch)
    norm = torch.cat([c, c[2:]]).norm() / 4
    torch.testing.assert_close(after.params["a"], -c / 4 / norm, rtol=1e-5, atol=1e-6)
