"""``from_torch``: classes of torch.optim, and other people's, as transformations, each beside the class itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.optim.table import assert_same_bits
from trainkit import LossOutput, init_state, make_train_step, tree
from trainkit.optim import from_torch
from trainkit.optim.transform import Transform, reports
from trainkit.types import Params

# -- other people's optimizers -------------------------------------------------------------------------------------


class Counting(Optimizer):
    """Memory of every kind that may be carried: Python numbers, flags, None, lists, made when first needed.

    It also has the bad habits that must not leak out: it writes into gradients, and remembers them without a copy.
    """

    def __init__(self, params: Any, lr: float = 0.1, decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "decay": decay, "calls": 0, "longest": -1.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["calls"] += 1
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["step"], state["rate"], state["odd"], state["unused"] = 0, 1.0, False, None
                    state["start"], state["pair"] = p.clone(), [torch.zeros_like(p), p.norm()]
                    state["before"] = p.grad
                p.grad.add_(p, alpha=group["decay"])
                state["step"] += 1
                state["rate"] *= 0.5 + 0.4 * (state["step"] % 3)
                state["odd"] = not state["odd"]
                total, size = state["pair"]
                total.mul_(0.9).add_(p.grad + (state["before"] if state["odd"] else 0.0) + 0.01 * state["start"])
                state["pair"] = [total, size + total.norm()]
                group["longest"] = max(group["longest"], float(total.norm()))
                state["before"] = p.grad
                # By hand into `data`, as old code does.
                p.data = p.data - group["lr"] * state["rate"] * total / (size + group["longest"] + group["calls"])


class Remembering(Optimizer):
    """Remembers its parameters and gradients themselves, not copies."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                p.add_(p.grad + 0.5 * state.get("slope", 0.0), alpha=-group["lr"])
                state["place"], state["slope"] = p, p.grad


class Noisy(Remembering):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            p.add_(torch.randn_like(p))


class InAttributes(Optimizer):
    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        self.calls = 0

    def step(self, closure: Any = None) -> None:
        self.calls += 1


class UnderItsOwnKey(InAttributes):
    def step(self, closure: Any = None) -> None:
        self.state["calls"] = {"n": 1}


class WithText(InAttributes):
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p]["phase"] = "warm"


class Growing(InAttributes):
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p].setdefault("past", []).append(p.detach().clone())


class TwoGroups(InAttributes):
    def __init__(self, params: Any, lr: float = 0.1) -> None:
        params = list(params)
        super().__init__([{"params": params[:1]}, {"params": params[1:]}], lr)


CLASSES: list[tuple[type[Optimizer], dict[str, Any]]] = [
    (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.2}),
    (torch.optim.SGD, {}),
    (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "foreach": True}),
    (torch.optim.Adam, {"amsgrad": True}),
    (torch.optim.AdamW, {"fused": True}),
    (torch.optim.NAdam, {}),
    (torch.optim.RAdam, {}),
    (torch.optim.Adamax, {}),
    (torch.optim.Adadelta, {}),
    (torch.optim.Adagrad, {"initial_accumulator_value": 0.1}),
    (torch.optim.Adafactor, {}),
    (torch.optim.RMSprop, {"centered": True, "momentum": 0.5}),
    (torch.optim.Rprop, {}),
    (torch.optim.ASGD, {"t0": 5.0}),
    (torch.optim.Muon, {}),
    (Counting, {}),
    (Remembering, {}),
]

every_class = pytest.mark.parametrize(
    ("cls", "options"), [pytest.param(c, o, id=f"{c.__name__}-{'-'.join(o)}") for c, o in CLASSES]
)


def schedule(count: Tensor) -> Tensor:
    return 0.1 / (1 + 0.5 * count.to(torch.float64))


def params_for(cls: type[Optimizer], dtype: torch.dtype = torch.float64) -> Params:
    draw = torch.Generator().manual_seed(0)
    shapes = {"wide": (3, 4), "tall": (5, 2)} | ({} if cls is torch.optim.Muon else {"bias": (4,), "scale": ()})
    return tree.frozen({name: torch.randn(shape, generator=draw, dtype=dtype) for name, shape in shapes.items()})


def grads_of(params: Params, step: int) -> Params:
    draw = torch.Generator().manual_seed(100 + step)
    return tree.map_tensors(lambda p: 0.5 * p + torch.randn(p.shape, generator=draw, dtype=p.dtype), params)


def run(tx: Transform, params: Params, steps: int) -> tuple[Params, Any]:
    opt_state = tx.init(params)
    for step in range(steps):
        params, opt_state = tx.apply(grads_of(params, step), opt_state, params)
    return params, opt_state


def run_class(cls: type[Optimizer], options: dict[str, Any], params: Params, steps: int, rates: Any) -> Params:
    parameters = {name: nn.Parameter(p.clone()) for name, p in params.items()}
    optimizer = cls(list(parameters.values()), lr=rates(0), **options)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rates(step)
        now = tree.frozen({name: p.detach() for name, p in parameters.items()})
        for name, g in grads_of(now, step).items():
            parameters[name].grad = g.clone()
        optimizer.step()
    return tree.frozen({name: p.detach() for name, p in parameters.items()})


# -- beside the class --------------------------------------------------------------------------------------------------


@every_class
def test_equals_the_class_bit_for_bit(cls: type[Optimizer], options: dict[str, Any]) -> None:
    params = params_for(cls)
    found, opt_state = run(from_torch(cls, lr=0.05, **options), params, 20)
    assert_same_bits(found, run_class(cls, options, params, 20, lambda step: 0.05))
    assert int(opt_state["count"]) == 20
    assert reports(opt_state)["learning_rate"].item() == pytest.approx(0.05)


@every_class
def test_equals_the_class_under_a_schedule(cls: type[Optimizer], options: dict[str, Any]) -> None:
    params = params_for(cls)
    found, opt_state = run(from_torch(cls, lr=schedule, **options), params, 20)
    assert_same_bits(found, run_class(cls, options, params, 20, lambda step: float(schedule(torch.tensor(step)))))
    assert reports(opt_state)["learning_rate"].item() == pytest.approx(float(schedule(torch.tensor(19))))


@every_class
def test_continues_from_a_copied_state_in_another_transformation(cls: type[Optimizer], options: dict[str, Any]) -> None:
    params = params_for(cls)
    halfway, opt_state = run(from_torch(cls, lr=schedule, **options), params, 5)
    whole, _ = run(from_torch(cls, lr=schedule, **options), params, 8)
    again = from_torch(cls, lr=schedule, **options)
    halfway, opt_state = tree.clone((halfway, opt_state))
    for step in range(5, 8):
        halfway, opt_state = again.apply(grads_of(halfway, step), opt_state, halfway)
    assert_same_bits(halfway, whole)


@every_class
def test_state_has_its_form_from_the_start(cls: type[Optimizer], options: dict[str, Any]) -> None:
    def form(found: Any) -> dict[Any, Any]:
        return {path: (t.shape, t.dtype, t.device) for path, t in found.items(True, True)}

    params = params_for(cls, torch.float32)
    tx = from_torch(cls, lr=0.05, **options)
    first = form(tx.init(params))
    for steps in (1, 3):
        after, opt_state = run(tx, params, steps)
        assert form(opt_state) == first
        assert form(after) == form(params)


@every_class
def test_leaves_its_inputs_as_they_were(cls: type[Optimizer], options: dict[str, Any]) -> None:
    tx = from_torch(cls, lr=schedule, **options)
    for steps in (0, 2):
        params, opt_state = run(tx, params_for(cls), steps)
        grads = grads_of(params, steps)
        before = tree.clone((grads, opt_state, params))
        first, second = (tx.apply(grads, opt_state, params) for _ in range(2))
        tx.apply(grads, first[1], first[0])
        for given, copy in zip((grads, opt_state, params), before, strict=True):
            assert_same_bits(given, copy)
        for a, b in zip(first, second, strict=True):
            assert_same_bits(a, b)


@every_class
def test_donated_equals_pure(cls: type[Optimizer], options: dict[str, Any]) -> None:
    tx = from_torch(cls, lr=schedule, **options)
    params, opt_state = run(tx, params_for(cls), 2)
    donated, donated_state = tree.clone((params, opt_state))
    pointers = {name: t.data_ptr() for name, t in donated.items()}
    for step in range(2, 5):
        grads = grads_of(params, step)
        params, opt_state = tx.apply(grads, opt_state, params)
        with tree.donate(donated, donated_state, grads):
            donated, donated_state = tx.apply(grads, donated_state, donated)
    assert_same_bits(donated, params)
    assert_same_bits(donated_state, opt_state)
    assert {name: t.data_ptr() for name, t in donated.items()} == pointers


@every_class
def test_memory_is_apart_from_parameters_and_gradients(cls: type[Optimizer], options: dict[str, Any]) -> None:
    def storages(found: Any) -> set[int]:
        return {t.untyped_storage().data_ptr() for t in found.values(True, True)}

    tx = from_torch(cls, lr=0.1, **options)
    params, opt_state = tree.clone(run(tx, params_for(cls), 2))
    grads = grads_of(params, 2)
    with tree.donate(params, opt_state, grads):
        params, opt_state = tx.apply(grads, opt_state, params)
    assert not storages(opt_state) & (storages(params) | storages(grads))


def test_donated_moments_keep_their_memory() -> None:
    params = params_for(torch.optim.Adam)
    tx = from_torch(torch.optim.Adam, lr=0.1)
    params, opt_state = tree.clone(run(tx, params, 1))
    pointers = {path: t.data_ptr() for path, t in opt_state.items(True, True)}
    with tree.donate(params, opt_state):
        _, after = tx.apply(grads_of(params, 1), opt_state, params)
    assert {path: t.data_ptr() for path, t in after.items(True, True)} == pointers


def test_two_runs_of_one_transformation_do_not_mix() -> None:
    tx = from_torch(Counting, lr=0.1)
    one, other = params_for(Counting), tree.map_tensors(torch.cos, params_for(Counting))
    alone = [run(tx, start, 4)[0] for start in (one, other)]
    states = [tx.init(one), tx.init(other)]
    now = [one, other]
    for step in range(4):
        for i in (0, 1):
            now[i], states[i] = tx.apply(grads_of(now[i], step), states[i], now[i])
    for found, expected in zip(now, alone, strict=True):
        assert_same_bits(found, expected)


def test_numbers_travel_as_tensors_under_readable_names() -> None:
    params = params_for(Counting)
    _, opt_state = run(from_torch(Counting, lr=0.1), params, 3)
    assert opt_state["memory"]["step"]["wide"].item() == 3
    assert opt_state["memory"]["odd"]["wide"].dtype == torch.bool
    assert opt_state["memory"]["pair/0"]["wide"].shape == (3, 4)
    assert tree.leaves(opt_state["memory"]["unused"]) == []
    assert opt_state["group"]["calls"].item() == 3
    assert sorted(opt_state["group"].keys()) == ["calls", "longest"]


def test_finding_the_layout_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    from_torch(Noisy, lr=0.1).init(params_for(Noisy))
    assert torch.equal(torch.get_rng_state(), before)


def test_no_parameters_are_no_work() -> None:
    tx, nothing = from_torch(torch.optim.Adam, lr=0.1), tree.frozen()
    after, _ = tx.apply(nothing, tx.init(nothing), nothing)
    assert tree.leaves(after) == []


def test_under_vmap_equals_one_by_one() -> None:
    tx = from_torch(torch.optim.Adam, lr=0.1)
    draw = torch.Generator().manual_seed(0)
    stacked = torch.randn(3, 4, generator=draw, dtype=torch.float64)

    def two_steps(w: Tensor) -> Tensor:
        params = tree.frozen({"w": w})
        opt_state = tx.init(tree.frozen({"w": stacked[0]}))
        for _ in range(2):
            params, opt_state = tx.apply(tree.map_tensors(torch.cos, params), opt_state, params)
        return params["w"]

    torch.testing.assert_close(torch.vmap(two_steps)(stacked), torch.stack([two_steps(row) for row in stacked]))


@pytest.mark.usefixtures("fresh_compiler")
def test_runs_beside_a_graph_and_says_so_where_only_a_graph_will_do() -> None:
    params = params_for(torch.optim.Adam)
    tx = from_torch(torch.optim.Adam, lr=0.1)
    opt_state, grads = tx.init(params), grads_of(params, 0)
    expected, _ = tx.apply(grads, opt_state, params)
    with torch.no_grad():
        found, _ = torch.compile(tx.apply, backend="eager")(grads, opt_state, params)
        assert_same_bits(found, expected)
        updates, _ = torch.compile(tx.update, backend="eager")(grads, opt_state, params)
        assert_same_bits(updates, tree.map_tensors(torch.sub, expected, params))
        with pytest.raises(
            torch._dynamo.exc.Unsupported, match=r"from_torch\(Adam\) runs a Python object.*strategy='split'"
        ):
            torch.compile(lambda *args: tx.apply(*args), backend="eager", fullgraph=True)(grads, opt_state, params)


def test_trains_in_a_step_like_a_plain_loop() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(3, 1), torch.randn(8, 3)
    tx = from_torch(torch.optim.Adam, lr=0.1)
    state = init_state(model, tx)
    step = make_train_step(
        lambda params, buffers, x: LossOutput(nn.functional.linear(x, **params).square().sum(), 8), tx
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(5):
        state, _ = step(state, x)
        optimizer.zero_grad()
        (model(x).square().sum() / 8).backward()
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(state.params[name], p.detach())


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (InAttributes, r"InAttributes changes its attributes \['calls'\] in a step"),
        (UnderItsOwnKey, r"UnderItsOwnKey keeps memory under \['calls'\]"),
        (WithText, r"state\['phase'\] holds str, expected tensors, numbers or None"),
        (Growing, r"memory of Growing .* changes its structure between the first and the second step"),
        (TwoGroups, r"TwoGroups splits its parameters into 2 groups, expected one"),
    ],
)
def test_memory_that_cannot_be_carried_is_refused(cls: type[Optimizer], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_torch(cls, lr=0.1).init(params_for(cls))


def test_closures_and_other_things_are_refused() -> None:
    with pytest.raises(ValueError, match=r"LBFGS\.step needs a closure"):
        from_torch(torch.optim.LBFGS)
    with pytest.raises(TypeError, match=r"expected a subclass of torch\.optim\.Optimizer"):
        from_torch(nn.Linear)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="give the class, not an object"):
        from_torch(torch.optim.SGD([nn.Parameter(torch.zeros(1))]))  # type: ignore[arg-type]
