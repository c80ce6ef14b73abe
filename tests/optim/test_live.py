"""An optimizer object in a step that donates, beside the plain loop with an object of the same class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils import _pytree as pytree

from tests.optim.table import assert_same_bits
from trainkit import LossOutput, functional, init_state, make_train_step, tree
from trainkit.execution import FallbackWarning, compile_step
from trainkit.optim import chain, clip_by_global_norm, live, sgd
from trainkit.optim.transform import reports
from trainkit.types import StepFn


class Dragging(Optimizer):
    """Writes into its gradients, keeps numbers, tensors and text, and counts its own steps."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.calls = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.calls += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["drag"] = p.grad.add_(state.get("drag", 0), alpha=0.5).clone()
                    state["phase"] = f"step {self.calls}"
                    p.sub_(state["drag"], alpha=group["lr"] / self.calls)


MAKERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw-fused": lambda params: torch.optim.AdamW(params, lr=0.05, fused=True),
    "sgd-momentum": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=0.1),
    "dragging": lambda params: Dragging(params, lr=0.05),
}
every_optimizer = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


class Net(nn.Module):
    """With a parameter that no output uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.unused = nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(torch.tanh(self.first(x)))
        return found


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def batch(i: int) -> Tensor:
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(i))


def factor(step: int) -> float:
    return 1 / (1 + 0.5 * step)


def plain_loop(make: Callable[[Any], Optimizer], steps: int) -> tuple[dict[str, Tensor], Optimizer]:
    model = net()
    optimizer = make(model.parameters())
    scheduler = LambdaLR(optimizer, factor)
    for i in range(steps):
        # The sum with the gradient 1 / 8 is what a step does, in float32.
        model(batch(i)).square().sum().backward(torch.tensor(1 / 8))
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return {name: p.detach() for name, p in model.named_parameters()}, optimizer


def loss_of(model: nn.Module) -> Any:
    call = functional(model)

    def loss(params: Any, buffers: Any, x: Tensor) -> LossOutput:
        out, _ = call(params, buffers, x)
        return LossOutput(out.square().sum(), x.shape[0])

    return loss


def step_of(model: nn.Module, tx: Any, **options: Any) -> StepFn:
    return compile_step(make_train_step(loss_of(model), tx, unused="omit"), **{"strategy": "eager", **options})


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())


@every_optimizer
def test_equals_the_plain_loop_bit_for_bit(make: Callable[[Any], Optimizer]) -> None:
    model = net()
    optimizer = make(model.parameters())
    scheduler = LambdaLR(optimizer, factor)
    tx = live(optimizer, named(model))
    state, step = init_state(model, tx, copy=False), step_of(model, tx)
    pointers = [p.data_ptr() for p in model.parameters()]
    for i in range(6):
        state, metrics = step(state, batch(i))
        assert metrics["learning_rate"].compute().item() == pytest.approx(0.05 * factor(i))
        scheduler.step()
    expected, other = plain_loop(make, 6)
    assert_same_bits(tree.frozen({name: p.detach() for name, p in model.named_parameters()}), tree.frozen(expected))
    assert_same_bits(state.params, tree.frozen(expected))
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert all(p.grad is None for p in model.parameters())
    own, reference = optimizer.state_dict(), other.state_dict()
    assert own["param_groups"] == reference["param_groups"]
    assert own["state"].keys() == reference["state"].keys() and len(own["state"]) == 4
    found, wanted = pytree.tree_leaves(own["state"]), pytree.tree_leaves(reference["state"])
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(found, wanted, strict=True))


@pytest.mark.usefixtures("fresh_compiler")
def test_in_a_graph_that_may_break_it_runs_beside_it() -> None:
    w = nn.Parameter(torch.zeros(2))
    tx = live(torch.optim.SGD([w], lr=0.1), {"w": w})
    params = tree.frozen({"w": w.detach()})
    opt_state = tx.init(params)
    run = torch.compile(lambda grads, *rest: tx.apply(tree.map_tensors(torch.neg, grads), *rest), backend="eager")
    with torch.no_grad(), tree.donate(params, opt_state):
        run(tree.frozen({"w": torch.ones(2)}), opt_state, params)
    torch.testing.assert_close(w.detach(), torch.tensor([0.1, 0.1]))


@pytest.mark.slow
def test_runs_beside_the_graph_of_the_loss() -> None:
    make = MAKERS["sgd-momentum"]
    model = net()
    tx = live(make(model.parameters()), named(model))
    step = step_of(model, chain(clip_by_global_norm(1e6), tx), strategy="split")
    state = init_state(model, chain(clip_by_global_norm(1e6), tx), copy=False)
    other = net()
    reference = make(other.parameters())
    for i in range(3):
        state, _ = step(state, batch(i))
        (other(batch(i)).square().sum() / 8).backward()
        reference.step()
        reference.zero_grad()
    for name, p in other.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).detach(), p.detach())


def test_clipping_before_it_equals_clip_grad_norm() -> None:
    make = MAKERS["adamw-fused"]
    model, other = net(), net()
    tx = chain(clip_by_global_norm(0.1), live(make(model.parameters()), named(model)))
    state, step = init_state(model, tx, copy=False), step_of(model, tx)
    reference = make(other.parameters())
    for i in range(3):
        state, metrics = step(state, batch(i))
        (other(batch(i)).square().sum() / 8).backward()
        norm = nn.utils.clip_grad_norm_(other.parameters(), 0.1)
        reference.step()
        reference.zero_grad()
        torch.testing.assert_close(metrics["grad_norm"].compute(), norm)
    for name, p in other.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).detach(), p.detach())


def test_its_state_is_a_report_and_nothing_else() -> None:
    model = net()
    tx = live(MAKERS["adamw-fused"](model.parameters()), named(model))
    opt_state = init_state(model, tx, copy=False).opt_state
    assert list(opt_state.keys(True, True)) == [("report", "learning_rate")]
    rate = reports(opt_state)["learning_rate"]
    assert rate.dtype == torch.float32 and rate.shape == ()


@every_optimizer
def test_a_call_outside_of_a_donation_changes_nothing(make: Callable[[Any], Optimizer]) -> None:
    model = net()
    optimizer = make(model.parameters())
    tx = live(optimizer, named(model))
    state = init_state(model, tx, copy=False)
    before = tree.clone(state.params)
    pure = make_train_step(loss_of(model), tx, unused="omit")
    with pytest.raises(ValueError, match=r"outside a donation scope.*compile_step\(step, donate=True\)"):
        pure(state, batch(0))
    with pytest.raises(ValueError, match="outside a donation scope"):
        step_of(model, tx, donate=False)(state, batch(0))
    with pytest.raises(ValueError, match="in a chain, the last place"):
        step_of(model, chain(tx, sgd(0.1)))(init_state(model, chain(tx, sgd(0.1)), copy=False), batch(0))
    assert_same_bits(state.params, before)
    assert not optimizer.state and all(p.grad is None for p in model.parameters())


def test_gradients_that_somebody_owns_or_shares_are_not_written_into() -> None:
    w = nn.Parameter(torch.zeros(2))
    v = nn.Parameter(torch.zeros(2))
    tx = live(Dragging([w, v], lr=1.0), {"w": w, "v": v})
    params = tree.frozen({"w": w.detach(), "v": v.detach()})
    opt_state, shared = tx.init(params), torch.ones(2)
    for _ in range(2):
        with tree.donate(params, opt_state):
            tx.apply(tree.frozen({"w": shared, "v": shared}), opt_state, params)
    assert shared.tolist() == [1.0, 1.0]
    # Steps of 1 and 1.5 / 2 in both.
    assert w.tolist() == v.tolist() == [-1.75, -1.75]


def test_gradients_are_taken_away_when_the_object_fails() -> None:
    class Failing(Dragging):
        def step(self, closure: Any = None) -> None:
            raise OSError("no disk")

    w = nn.Parameter(torch.zeros(2))
    tx = live(Failing([w], lr=1.0), {"w": w})
    params = tree.frozen({"w": w.detach()})
    opt_state = tx.init(params)
    with pytest.raises(OSError, match="no disk"), tree.donate(params, opt_state):
        tx.apply(tree.frozen({"w": torch.ones(2)}), opt_state, params)
    assert w.grad is None


def test_a_state_of_other_tensors_is_refused() -> None:
    model = net()
    tx = live(MAKERS["sgd-momentum"](model.parameters()), named(model))
    with pytest.raises(ValueError, match=r"params\['first.weight'\] is not the memory of the parameter.*copy=False"):
        init_state(model, tx)
    some = {name: p for name, p in named(model).items() if name != "last.bias"}
    with pytest.raises(ValueError, match=r"named: 'last\.bias' of the state is missing"):
        init_state(model, live(MAKERS["sgd-momentum"](model.parameters()), some), copy=False)
    state, step = init_state(model, tx, copy=False), step_of(model, tx)
    moved = state.replace(params=tree.clone(state.params))
    before = tree.clone(moved.params)
    with pytest.raises(ValueError, match="is not the memory of the parameter"):
        step(moved, batch(0))
    assert_same_bits(moved.params, before)


def test_a_class_is_refused() -> None:
    with pytest.raises(TypeError, match=r"expected an object of a torch\.optim\.Optimizer.*from_torch"):
        live(torch.optim.SGD, {})  # type: ignore[arg-type]


@pytest.mark.usefixtures("fresh_compiler")
def test_a_graph_of_the_whole_step_says_what_to_do() -> None:
    w = nn.Parameter(torch.zeros(2))
    tx = live(torch.optim.SGD([w], lr=0.1), {"w": w})
    params = tree.frozen({"w": w.detach()})
    opt_state = tx.init(params)
    run = torch.compile(lambda *args: tx.apply(*args), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"live\(SGD\) runs a Python object.*strategy='split'"):
        run(tree.frozen({"w": torch.ones(2)}), opt_state, params)


@pytest.mark.slow
def test_a_whole_graph_falls_back_to_split_and_says_why() -> None:
    layer = nn.Linear(2, 1)
    tx = live(torch.optim.SGD(layer.parameters(), lr=0.5), dict(layer.named_parameters()))
    model = functional(layer)
    loss = lambda params, buffers, x: LossOutput(model(params, buffers, x)[0].sum(), x.shape[0])  # noqa: E731
    step = compile_step(make_train_step(loss, tx), strategy="whole")
    before = layer.bias.detach().clone()
    with pytest.warns(FallbackWarning, match=r"live\(SGD\)"):
        step(init_state(layer, tx, copy=False), torch.ones(4, 2))
    torch.testing.assert_close(layer.bias.detach(), before - 0.5)
