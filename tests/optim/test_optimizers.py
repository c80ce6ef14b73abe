"""Every optimizer, against torch.optim or the paper's loop, and in the properties that all share.

A new optimizer is a row in ``OPTIMIZERS``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils import _pytree as pytree

from trainkit import optim, tree
from trainkit.optim.transform import Transform, add_updates, chain, reports
from trainkit.types import Params

Options = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """An optimizer under test.

    ``grid`` holds the options under which it must equal ``reference``, a class of torch.optim (None: a test of its own
    follows the paper). ``rate`` is a learning rate with which it descends.
    """

    make: Callable[..., Transform]
    reference: type[torch.optim.Optimizer] | None
    grid: tuple[Options, ...]
    rate: float
    matrices_only: bool = False
    complex: bool = False
    id: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", self.make.__name__)


ADAM = (
    {},
    {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1},
    {"amsgrad": True, "maximize": True, "weight_decay": 0.1},
)

OPTIMIZERS = [
    Row(
        optim.adam, torch.optim.Adam, (*ADAM, {"decoupled_weight_decay": True, "weight_decay": 0.1}), 0.1, complex=True
    ),
    Row(optim.adamw, torch.optim.AdamW, ADAM, 0.1, complex=True),
    Row(
        optim.sgd,
        torch.optim.SGD,
        (
            {},
            {"momentum": 0.9, "weight_decay": 0.1},
            {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
            {"momentum": 0.9, "nesterov": True},
            {"momentum": 0.9, "dampening": 0.3},
            {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1, "maximize": True},
            {"dampening": 0.3, "maximize": True},
        ),
        0.5,
        complex=True,
    ),
    Row(
        optim.rmsprop,
        torch.optim.RMSprop,
        (
            {},
            {"alpha": 0.9, "eps": 1e-4, "weight_decay": 0.1, "momentum": 0.8},
            {"centered": True, "maximize": True, "weight_decay": 0.1},
            {"centered": True, "momentum": 0.5},
        ),
        0.02,
        complex=True,
    ),
    Row(
        optim.adagrad,
        torch.optim.Adagrad,
        (
            {},
            {"lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.5, "eps": 1e-3},
            {"maximize": True, "weight_decay": 0.1},
        ),
        0.5,
        complex=True,
    ),
    Row(
        optim.nadam,
        torch.optim.NAdam,
        (
            {},
            {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1, "momentum_decay": 0.1},
            {"decoupled_weight_decay": True, "weight_decay": 0.1, "maximize": True},
        ),
        0.1,
        complex=True,
    ),
    Row(
        optim.radam,
        torch.optim.RAdam,
        (
            {},
            {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1},
            {"decoupled_weight_decay": True, "weight_decay": 0.1, "maximize": True},
        ),
        0.1,
        complex=True,
    ),
    Row(
        optim.adamax,
        torch.optim.Adamax,
        ({}, {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}, {"maximize": True, "weight_decay": 0.1}),
        0.1,
        complex=True,
    ),
    Row(
        optim.adafactor,
        torch.optim.Adafactor,
        (
            {},
            {"beta2_decay": -0.5, "eps": (1e-3, 1e-2), "d": 2.0, "weight_decay": 0.1},
            {"maximize": True, "weight_decay": 0.1},
        ),
        0.1,
    ),
    Row(
        optim.muon,
        torch.optim.Muon,
        (
            {},
            {"momentum": 0.8, "nesterov": False, "weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"},
            {"ns_steps": 3, "ns_coefficients": (2.0, -1.5, 0.5), "eps": 1e-5, "adjust_lr_fn": "original"},
        ),
        0.1,
        matrices_only=True,
    ),
    Row(
        optim.lion,
        None,
        ({}, {"betas": (0.8, 0.95), "weight_decay": 0.1}, {"maximize": True, "weight_decay": 0.1}),
        0.05,
    ),
    Row(
        optim.schedule_free_adamw,
        None,
        ({}, {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}, {"r": 1.0, "weight_lr_power": 1.0}),
        0.2,
    ),
]

every_optimizer = pytest.mark.parametrize("row", OPTIMIZERS, ids=lambda row: row.id)
every_option = pytest.mark.parametrize(
    ("row", "options"),
    [pytest.param(row, options, id=f"{row.id}{i}") for row in OPTIMIZERS for i, options in enumerate(row.grid)],
)
every_reference = pytest.mark.parametrize(
    ("row", "options"),
    [
        pytest.param(row, options, id=f"{row.id}{i}")
        for row in OPTIMIZERS
        if row.reference
        for i, options in enumerate(row.grid)
    ],
)


def schedule(count: Tensor) -> Tensor:
    """A rate that changes in every step, in float64 so that both sides use the same number."""
    return 0.1 / (1 + 0.5 * count.to(torch.float64))


def shapes_of(row: Row) -> dict[str, tuple[int, ...]]:
    if row.matrices_only:
        return {"wide": (3, 5), "tall": (4, 2)}
    return {"matrix": (3, 4), "vector": (5,), "scalar": (), "kernel": (2, 3, 2)}


def random_tree(row: Row, seed: int, dtype: torch.dtype = torch.float64) -> Params:
    draw = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return tree.frozen(
        {name: torch.randn(shape, generator=draw, dtype=wide).to(dtype) for name, shape in shapes_of(row).items()}
    )


def grads_of(row: Row, params: Params, step: int) -> Params:
    """Gradients that depend on the parameters, so that errors add up."""
    noise = random_tree(row, 100 + step, next(iter(params.values())).dtype)
    return tree.map_tensors(lambda p, n: 0.5 * p + n, params, noise)


def run(tx: Transform, row: Row, params: Params, steps: int) -> tuple[Params, Any]:
    opt_state = tx.init(params)
    for step in range(steps):
        params, opt_state = tx.apply(grads_of(row, params, step), opt_state, params)
    return params, opt_state


def run_torch(row: Row, options: Options, params: Params, steps: int, **form: bool) -> Params:
    assert row.reference is not None
    parameters = {name: torch.nn.Parameter(p.clone()) for name, p in params.items()}
    reference = row.reference(list(parameters.values()), **options, **form)
    for step in range(steps):
        reference.param_groups[0]["lr"] = float(schedule(torch.tensor(step)))
        now = tree.frozen({name: p.detach() for name, p in parameters.items()})
        for name, g in grads_of(row, now, step).items():
            parameters[name].grad = g
        reference.step()
    return tree.frozen({name: p.detach() for name, p in parameters.items()})


def assert_close(found: Params, expected: Params, rtol: float = 1e-12, atol: float = 1e-13) -> None:
    assert list(found.keys()) == list(expected.keys())
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def assert_same_bits(found: Any, expected: Any) -> None:
    paths = [(path, leaf) for path, leaf in found.items(include_nested=True, leaves_only=True)]
    assert {path for path, _ in paths} == set(expected.keys(include_nested=True, leaves_only=True))
    for path, leaf in paths:
        assert leaf.dtype == expected[path].dtype, path
        assert torch.equal(leaf, expected[path]), path


# -- against torch.optim -------------------------------------------------------------------------------------------


@every_reference
def test_equals_torch_over_twenty_steps(row: Row, options: Options) -> None:
    params = random_tree(row, 0)
    found, opt_state = run(row.make(schedule, **options), row, params, 20)
    assert_close(found, run_torch(row, options, params, 20))
    assert int(opt_state["count"]) == 20
    assert reports(opt_state)["learning_rate"].item() == pytest.approx(schedule(torch.tensor(19)).item(), rel=1e-6)


@pytest.mark.parametrize(
    "row", [r for r in OPTIMIZERS if r.id in ("adam", "adamw", "sgd", "adagrad")], ids=lambda r: r.id
)
def test_equals_the_fused_kernels_of_torch_bit_for_bit(row: Row) -> None:
    params = random_tree(row, 0, torch.float32)
    for options in row.grid:
        if "dampening" not in options:
            found, _ = run(row.make(schedule, **options), row, params, 20)
            assert_same_bits(found, run_torch(row, options, params, 20, fused=True))


@pytest.mark.parametrize("row", [r for r in OPTIMIZERS if r.complex], ids=lambda r: r.id)
def test_complex_parameters_equal_torch(row: Row) -> None:
    params = random_tree(row, 0, torch.complex128)
    for options in row.grid:
        found, _ = run(row.make(schedule, **options), row, params, 5)
        assert_close(found, run_torch(row, options, params, 5))


@pytest.mark.parametrize("row", [r for r in OPTIMIZERS if not r.complex], ids=lambda r: r.id)
def test_complex_parameters_are_refused_by_name(row: Row) -> None:
    with pytest.raises(ValueError, match=r"params: .*weight complex, expected real"):
        row.make(0.1).init(tree.frozen({"weight": torch.zeros(2, 2, dtype=torch.complex64)}))


@every_optimizer
def test_large_and_small_tensors_take_forms_of_one_meaning(row: Row) -> None:
    # Above 2^14 elements per tensor the plain loop runs in the place of the foreach one.
    draw = torch.Generator().manual_seed(0)
    params = tree.frozen({"w": torch.randn(160, 160, generator=draw, dtype=torch.float64)})
    grads = tree.map_tensors(torch.cos, params)
    tx = row.make(0.1)
    large, _ = tx.apply(grads, tx.init(params), params)
    if not row.matrices_only and row.id != "adafactor":
        rows = tree.frozen({str(i): r for i, r in enumerate(params["w"])})
        small, _ = tx.apply(tree.map_tensors(torch.cos, rows), tx.init(rows), rows)
        assert_close(tree.frozen({"w": torch.stack(tree.leaves(small))}), large)
    assert not torch.equal(large["w"], params["w"])


# -- against the papers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", next(r.grid for r in OPTIMIZERS if r.id == "lion"))
def test_lion_follows_the_paper(options: Options) -> None:
    row = next(r for r in OPTIMIZERS if r.id == "lion")
    params = random_tree(row, 0)
    found, _ = run(optim.lion(schedule, **options), row, params, 20)
    beta1, beta2 = options.get("betas", (0.9, 0.99))
    decay, sign = options.get("weight_decay", 0.0), -1.0 if options.get("maximize") else 1.0
    theta = {name: p.numpy().copy() for name, p in params.items()}
    m = {name: np.zeros_like(p) for name, p in theta.items()}
    for step in range(20):
        lr = 0.1 / (1 + 0.5 * step)
        grads = grads_of(row, tree.frozen({name: torch.as_tensor(p) for name, p in theta.items()}), step)
        for name, g in ((name, sign * g.numpy()) for name, g in grads.items()):
            update = np.sign(beta1 * m[name] + (1 - beta1) * g)
            theta[name] = theta[name] - lr * (update + decay * theta[name])
            m[name] = beta2 * m[name] + (1 - beta2) * g
    assert_close(found, tree.frozen({name: torch.as_tensor(p) for name, p in theta.items()}))


@pytest.mark.parametrize("options", next(r.grid for r in OPTIMIZERS if r.id == "schedule_free_adamw"))
@pytest.mark.parametrize("warmup", [False, True])
def test_schedule_free_follows_the_paper(options: Options, warmup: bool) -> None:
    row = next(r for r in OPTIMIZERS if r.id == "schedule_free_adamw")
    params = random_tree(row, 0)

    def rate(step: int) -> float:
        return 0.1 * min(1.0, step / 5) if warmup else 0.1

    tx = optim.schedule_free_adamw(lambda count: torch.tensor(rate(int(count)), dtype=torch.float64), **options)
    beta1, beta2 = options.get("betas", (0.9, 0.999))
    eps, decay = options.get("eps", 1e-8), options.get("weight_decay", 0.0)
    r, power = options.get("r", 0.0), options.get("weight_lr_power", 2.0)
    # The paper keeps x and z; y, where the gradient is taken, is made from them.
    x = {name: p.numpy().copy() for name, p in params.items()}
    z = {name: p.copy() for name, p in x.items()}
    v = {name: np.zeros_like(p) for name, p in x.items()}
    y, opt_state, total = params, tx.init(params), 0.0
    for step in range(20):
        lr, t = rate(step), step + 1
        expected_y = {name: (1 - beta1) * z[name] + beta1 * x[name] for name in x}
        assert_close(y, tree.frozen({name: torch.as_tensor(p) for name, p in expected_y.items()}), 1e-11, 1e-12)
        grads = grads_of(row, tree.frozen({name: torch.as_tensor(p) for name, p in expected_y.items()}), step)
        weight = t**r * lr**power
        total += weight
        share = weight / total if total else 0.0
        for name, g in ((name, g.numpy()) for name, g in grads.items()):
            v[name] = beta2 * v[name] + (1 - beta2) * g**2
            direction = g / (np.sqrt(v[name] / (1 - beta2**t)) + eps) + decay * expected_y[name]
            z[name] = z[name] - lr * direction
            x[name] = (1 - share) * x[name] + share * z[name]
        y, opt_state = tx.apply(grads, opt_state, y)
        averaged = optim.schedule_free_eval(opt_state, y)
        assert_close(averaged, tree.frozen({name: torch.as_tensor(p) for name, p in x.items()}), 1e-11, 1e-12)


def test_schedule_free_eval_finds_its_memory_inside_chain_and_partition() -> None:
    row = next(r for r in OPTIMIZERS if r.id == "schedule_free_adamw")
    params = random_tree(row, 0)
    y, state = run(optim.schedule_free_adamw(0.1), row, params, 3)
    expected = optim.schedule_free_eval(state, y)
    _, chained = run(chain(optim.identity(), optim.schedule_free_adamw(0.1)), row, params, 3)
    assert_same_bits(optim.schedule_free_eval(chained, y), expected)
    parts = {"free": optim.schedule_free_adamw(0.1), "rest": optim.sgd(0.1)}
    mixed, parted = run(optim.partition(parts, optim.by_rank({2: "free"}, "rest")), row, params, 3)
    found = optim.schedule_free_eval(parted, mixed)
    assert torch.equal(found["matrix"], expected["matrix"])
    assert found["vector"] is mixed["vector"]
    with pytest.raises(ValueError, match="no schedule-free memory"):
        optim.schedule_free_eval(optim.adamw(0.1).init(params), params)


# -- descent -------------------------------------------------------------------------------------------------------


def quadratic(w: Tensor) -> Tensor:
    target = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=w.dtype)
    return ((w - target).square() * torch.tensor([[0.1, 1.0], [0.3, 0.03]], dtype=w.dtype)).sum()


def valley(w: Tensor) -> Tensor:
    """Rosenbrock's function of both rows, with a milder valley."""
    x, y = w[:, 0], w[:, 1]
    return (0.1 * (1 - x).square() + 0.5 * (y - x.square()).square()).sum()


@every_optimizer
@pytest.mark.parametrize("function", [quadratic, valley])
def test_descends(row: Row, function: Callable[[Tensor], Tensor]) -> None:
    params = tree.frozen({"w": torch.tensor([[-1.0, 1.5], [-0.5, -1.0]], dtype=torch.float64)})
    steps = 400
    options = {"weight_decay": 0.0} if row.id in ("adamw", "muon") else {}
    tx = row.make(lambda count: row.rate * torch.cos(0.5 * math.pi * count / steps), **options)
    opt_state = tx.init(params)
    first = function(params["w"]).item()
    for _ in range(steps):
        w = params["w"].detach().requires_grad_()
        (g,) = torch.autograd.grad(function(w), w)
        params, opt_state = tx.apply(tree.frozen({"w": g}), opt_state, params)
    assert function(params["w"]).item() < 0.02 * first


# -- purity and donation -------------------------------------------------------------------------------------------


@every_option
def test_leaves_its_inputs_as_they_were(row: Row, options: Options) -> None:
    tx = row.make(schedule, **options)
    params, opt_state = run(tx, row, random_tree(row, 0, torch.float32), 2)
    grads = grads_of(row, params, 2)
    before = tree.clone((grads, opt_state, params))
    first = tx.apply(grads, opt_state, params)
    tx.update(grads, opt_state, params)
    second = tx.apply(grads, opt_state, params)
    for now, then in zip((grads, opt_state, params), before, strict=True):
        assert_same_bits(now, then)
    for a, b in zip(first, second, strict=True):
        assert_same_bits(a, b)


@every_option
def test_donated_equals_pure_and_reuses_the_memory(row: Row, options: Options) -> None:
    tx = row.make(schedule, **options)
    params, opt_state = run(tx, row, random_tree(row, 0, torch.float32), 2)
    donated_params, donated_state = tree.clone((params, opt_state))
    pointers = {path: t.data_ptr() for path, t in donated_state.items(True, True)}
    param_pointers = {name: t.data_ptr() for name, t in donated_params.items()}
    for step in range(2, 5):
        grads = grads_of(row, params, step)
        params, opt_state = tx.apply(grads, opt_state, params)
        with tree.donate(donated_params, donated_state, grads):
            donated_params, donated_state = tx.apply(grads, donated_state, donated_params)
    assert_same_bits(donated_params, params)
    assert_same_bits(donated_state, opt_state)
    assert {path: t.data_ptr() for path, t in donated_state.items(True, True)} == pointers
    assert {name: t.data_ptr() for name, t in donated_params.items()} == param_pointers


@every_option
def test_update_then_add_equals_apply(row: Row, options: Options) -> None:
    tx = row.make(schedule, **options)
    params, opt_state = run(tx, row, random_tree(row, 0), 2)
    grads = grads_of(row, params, 2)
    updates, state_after_update = tx.update(grads, opt_state, params)
    applied, state_after_apply = tx.apply(grads, opt_state, params)
    assert_close(add_updates(params, updates), applied)
    assert_same_bits(state_after_update, state_after_apply)


# -- the state -----------------------------------------------------------------------------------------------------


@every_option
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_state_keeps_structure_shapes_and_dtypes(row: Row, options: Options, dtype: torch.dtype) -> None:
    def form(found: Any) -> dict[Any, Any]:
        return {path: (t.shape, t.dtype) for path, t in found.items(True, True)}

    params = random_tree(row, 0, dtype)
    tx = row.make(0.01, **options)
    first = tx.init(params)
    after, opt_state = run(tx, row, params, 3)
    assert form(opt_state) == form(first)
    assert form(after) == form(params)
    assert all(t.isfinite().all() for t in (*after.values(), *tree.leaves(opt_state.flatten_keys("/"))))


@every_optimizer
def test_memory_starts_apart_from_the_parameters(row: Row) -> None:
    params = random_tree(row, 0)
    taken = {t.untyped_storage().data_ptr() for t in params.values()}
    memory = row.make(0.1).init(params)
    assert not taken & {t.untyped_storage().data_ptr() for t in memory.flatten_keys("/").values()}


@every_optimizer
def test_number_and_constant_schedule_mean_the_same(row: Row) -> None:
    params = random_tree(row, 0)
    number, _ = run(row.make(0.125), row, params, 3)
    as_schedule, _ = run(row.make(lambda count: torch.full((), 0.125)), row, params, 3)
    as_tensor, _ = run(row.make(torch.tensor(0.125)), row, params, 3)
    assert_same_bits(number, as_schedule)
    assert_same_bits(number, as_tensor)


def test_the_count_itself_may_be_the_rate() -> None:
    params = tree.frozen({"w": torch.zeros(1)})
    tx = optim.sgd(lambda count: count)
    opt_state = tx.init(params)
    for expected in (0.0, -1.0, -3.0):
        with tree.donate(params, opt_state):
            params, opt_state = tx.apply(tree.frozen({"w": torch.ones(1)}), opt_state, params)
        assert params["w"].item() == expected


@every_optimizer
def test_no_parameters_are_no_work(row: Row) -> None:
    tx = row.make(0.1)
    nothing = tree.frozen()
    params, opt_state = tx.apply(nothing, tx.init(nothing), nothing)
    assert tree.leaves(params) == []
    assert int(opt_state["count"]) == 1


# -- layouts, dtypes, names ----------------------------------------------------------------------------------------


@every_optimizer
def test_gradients_in_any_memory_layout(row: Row) -> None:
    params = tree.frozen({"w": torch.randn(4, 3, dtype=torch.float64)})
    tx = row.make(0.1)
    opt_state = tx.init(params)
    transposed = torch.randn(3, 4, dtype=torch.float64).t()
    expanded = torch.ones((), dtype=torch.float64).expand(4, 3)
    for g in (transposed, expanded):
        found, _ = tx.apply(tree.frozen({"w": g}), opt_state, params)
        expected, _ = tx.apply(tree.frozen({"w": g.contiguous()}), opt_state, params)
        assert_same_bits(found, expected)


@every_optimizer
def test_donated_parameters_with_gaps_between_their_rows(row: Row) -> None:
    wide = torch.randn(4, 6, dtype=torch.float64)
    whole, gradient = wide.clone(), wide.cos()
    params = tree.frozen({"w": whole[:, :3]})
    tx = row.make(0.1)
    expected, _ = tx.apply(
        tree.frozen({"w": gradient[:, :3]}), tx.init(params), tree.frozen({"w": wide[:, :3].clone()})
    )
    with tree.donate(params):
        found, _ = tx.apply(tree.frozen({"w": gradient[:, :3]}), tx.init(params), params)
    assert found["w"].data_ptr() == whole.data_ptr()
    assert_close(found, expected)
    assert torch.equal(whole[:, 3:], wide[:, 3:])


@every_optimizer
def test_memory_in_another_layout_than_its_parameter(row: Row) -> None:
    # As after loading a contiguous checkpoint into transposed or channels-last parameters.
    contiguous = tree.frozen({"w": torch.randn(4, 3, dtype=torch.float64)})
    grads = tree.map_tensors(torch.cos, contiguous)
    tx = row.make(0.1)
    contiguous, opt_state = tx.apply(grads, tx.init(contiguous), contiguous)
    params = tree.frozen({"w": contiguous["w"].t().contiguous().t()})
    expected, memory = tx.apply(grads, opt_state, contiguous)
    found, after = tx.apply(grads, opt_state, params)
    assert_close(found, expected)
    assert_close(after.flatten_keys("/"), memory.flatten_keys("/"))


@every_optimizer
def test_parameters_of_several_dtypes(row: Row) -> None:
    params = random_tree(row, 0)
    names = list(params.keys())
    mixed = tree.frozen({n: p.to(torch.float32 if n == names[0] else torch.float64) for n, p in params.items()})
    found, _ = run_mixed(row, mixed)
    expected, _ = run_mixed(row, params)
    assert found[names[0]].dtype == torch.float32
    for name in names[1:]:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[names[0]].double(), expected[names[0]], rtol=1e-2, atol=1e-2)


def run_mixed(row: Row, params: Params) -> tuple[Params, Any]:
    tx = row.make(0.1)
    opt_state = tx.init(params)
    for step in range(3):
        params, opt_state = tx.apply(random_tree(row, 100 + step), opt_state, params)
    return params, opt_state


@every_optimizer
def test_gradients_are_matched_by_name(row: Row) -> None:
    params = random_tree(row, 0)
    grads = grads_of(row, params, 0)
    turned = tree.frozen({name: grads[name] for name in reversed(list(grads.keys()))})
    tx = row.make(0.1)
    expected, _ = tx.apply(grads, tx.init(params), params)
    found, _ = tx.apply(turned, tx.init(params), params)
    assert_same_bits(found, expected)
    lacking = tree.frozen({"other": torch.zeros(1)})
    with pytest.raises(KeyError, match=next(iter(params.keys()))):
        tx.apply(lacking, tx.init(params), params)


# -- compiled and vectorised ---------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def float64_numbers() -> Iterator[None]:
    # torch keeps NAdam's product of momenta in the default dtype; in float32 a graph rounds it in another place.
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@every_optimizer
@pytest.mark.parametrize("rate", [schedule, 0.1], ids=["schedule", "number"])
@pytest.mark.usefixtures("fresh_compiler", "float64_numbers")
def test_compiles_once_with_the_gradients(row: Row, rate: Any) -> None:
    graphs = 0

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    # The options that use most of the kernel.
    tx = row.make(rate, **max(row.grid, key=len))

    def step(opt_state: Any, params: Params) -> tuple[Params, Any]:
        inputs = [p.detach().requires_grad_() for p in params.values()]
        with torch.enable_grad():
            loss = sum((p.square() * 0.5 + p.sin()).sum() for p in inputs)
            grads = torch.autograd.grad(loss, inputs)
        with torch.no_grad():
            return tx.apply(tree.like(params, grads), opt_state, params)

    params = random_tree(row, 0)
    eager = compiled = (params, tx.init(params))
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        fast = torch.compile(step, fullgraph=True, backend=counting)
        for _ in range(4):
            eager, compiled = step(*reversed(eager)), fast(*reversed(compiled))
    assert graphs == 1
    assert_close(compiled[0], eager[0])
    for path, leaf in compiled[1].items(True, True):
        # Rates and products of momenta are kept in float32.
        torch.testing.assert_close(
            leaf, eager[1][path], rtol=1e-6 if leaf.dtype == torch.float32 else 1e-10, atol=1e-12
        )


@pytest.mark.parametrize("options", next(r.grid for r in OPTIMIZERS if r.id == "adafactor"))
@pytest.mark.usefixtures("fresh_compiler")
def test_adafactor_has_the_same_rule_in_a_graph(options: Options) -> None:
    row = next(r for r in OPTIMIZERS if r.id == "adafactor")
    tx = row.make(schedule, **options)
    apply = torch.compile(tx.apply, fullgraph=True, backend="eager")
    found, _ = run(Transform(tx.init, tx.update, apply), row, random_tree(row, 0), 20)
    assert_close(found, run_torch(row, options, random_tree(row, 0), 20))


@every_optimizer
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.usefixtures("fresh_compiler", "float64_numbers")
def test_under_vmap_equals_one_by_one(row: Row, compiled: bool) -> None:
    members = [random_tree(row, seed) for seed in (0, 1, 2)]
    rates = torch.tensor([0.1, 0.01, 0.3], dtype=torch.float64)
    options = max(row.grid, key=len)

    def two_steps(params: dict[str, Tensor], memory: dict[str, Any], rate: Tensor) -> dict[str, Tensor]:
        tx = row.make(lambda count: rate, **options)
        now, opt_state = tree.frozen(params), tree.frozen(memory)
        for step in range(2):
            grads = tree.map_tensors(lambda p, step=step: torch.cos(p + step), now)
            now, opt_state = tx.apply(grads, opt_state, now)
        return dict(now.items())

    def first_memory(params: Params) -> dict[str, Any]:
        return row.make(0.1, **options).init(params).to_dict()

    inputs = [(dict(member.items()), first_memory(member), rate) for member, rate in zip(members, rates, strict=True)]
    stacked = pytree.tree_map(lambda *parts: torch.stack(parts), *inputs)
    batched = torch.vmap(two_steps)
    found = (torch.compile(batched, fullgraph=True, backend="eager") if compiled else batched)(*stacked)
    for i in range(len(members)):
        expected = two_steps(*inputs[i])
        # Muon's iteration rounds to bfloat16, and matrices in a batch are multiplied in another order.
        tolerance = (1e-2, 1e-2) if row.id == "muon" else (1e-10, 1e-12)
        assert_close(tree.frozen({name: t[i] for name, t in found.items()}), tree.frozen(expected), *tolerance)


# -- sharded -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    # One process is enough to need a sharding rule for every operation.
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@every_optimizer
def test_sharded_tensors_equal_whole_ones(row: Row, mesh: DeviceMesh) -> None:
    def sharded(whole: Params) -> Params:
        return tree.map_tensors(lambda t: distribute_tensor(t, mesh, [Shard(0) if t.dim() else Replicate()]), whole)

    options = max(row.grid, key=len)
    tx = row.make(schedule, **options)
    params = random_tree(row, 0)
    parts, opt_state, memory = sharded(params), tx.init(params), tx.init(sharded(params))
    for step in range(3):
        grads = random_tree(row, 100 + step)
        params, opt_state = tx.apply(grads, opt_state, params)
        parts, memory = tx.apply(sharded(grads), memory, parts)
    assert_close(tree.map_tensors(lambda t: t.full_tensor(), parts), params)


# -- bad arguments -------------------------------------------------------------------------------------------------

BAD = [
    (row.make, {"learning_rate": -1.0}, r"learning_rate: got -1.0, expected a number >= 0") for row in OPTIMIZERS
] + [
    (optim.adamw, {"betas": (1.0, 0.9)}, r"betas: got \(1.0, 0.9\), expected two numbers in \[0, 1\)"),
    (optim.adam, {"eps": -1e-8}, "eps: got -1e-08"),
    (optim.adamw, {"weight_decay": math.nan}, "weight_decay: got nan"),
    (optim.sgd, {"momentum": -0.1}, "momentum: got -0.1"),
    (optim.sgd, {"nesterov": True}, "nesterov: wants momentum > 0 and dampening 0, got 0.0 and 0.0"),
    (optim.sgd, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "got 0.9 and 0.1"),
    (optim.rmsprop, {"alpha": -1.0}, "alpha: got -1.0"),
    (optim.adagrad, {"lr_decay": -1.0}, "lr_decay: got -1.0"),
    (optim.adagrad, {"initial_accumulator_value": -1.0}, "initial_accumulator_value: got -1.0"),
    (optim.nadam, {"momentum_decay": -1.0}, "momentum_decay: got -1.0"),
    (optim.radam, {"betas": (0.9, 1.0)}, "betas: got"),
    (optim.adamax, {"betas": (-0.1, 0.9)}, "betas: got"),
    (optim.adafactor, {"beta2_decay": 0.8}, "beta2_decay: got 0.8, expected a number <= 0"),
    (optim.adafactor, {"d": 0.5}, "d: got 0.5, expected a number >= 1"),
    (optim.adafactor, {"eps": (-1.0, 1e-3)}, "eps1: got -1.0"),
    (optim.muon, {"momentum": 1.0}, r"momentum: got 1.0, expected a number in \[0, 1\)"),
    (optim.muon, {"ns_steps": 100}, "ns_steps: got 100"),
    (optim.muon, {"ns_coefficients": (1.0, 2.0)}, "ns_coefficients: got 2 numbers, expected 3"),
    (optim.muon, {"adjust_lr_fn": "none"}, "adjust_lr_fn: got 'none'"),
    (optim.lion, {"betas": (0.9, 1.0)}, "betas: got"),
    (optim.schedule_free_adamw, {"betas": (0.0, 0.9)}, r"betas: the first is 0.0, expected a number in \(0, 1\)"),
    (optim.schedule_free_adamw, {"r": -1.0}, "r: got -1.0"),
]


@pytest.mark.parametrize(("make", "options", "message"), BAD)
def test_bad_arguments_are_refused(make: Callable[..., Transform], options: Options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


@every_optimizer
def test_learning_rate_must_be_a_number_or_a_function(row: Row) -> None:
    with pytest.raises(TypeError, match="got str, expected a number or a function"):
        row.make("fast")


def test_muon_keeps_its_momentum_in_bfloat16() -> None:
    # torch's iteration scales a bfloat16 matrix in place.
    g = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    params = tree.frozen({"w": torch.zeros(4, 4, dtype=torch.bfloat16)})
    tx = optim.muon(0.1, momentum=0.5, nesterov=False)
    _, opt_state = tx.apply(tree.frozen({"w": g}), tx.init(params), params)
    assert torch.equal(opt_state["momentum_buffer"]["w"], 0.5 * g)


def test_muon_names_what_is_no_matrix_and_what_to_do() -> None:
    params = tree.frozen({"weight": torch.zeros(2, 2), "bias": torch.zeros(2), "conv": torch.zeros(2, 2, 1, 1)})
    with pytest.raises(ValueError, match=r"none: bias \(2,\), conv \(2, 2, 1, 1\).*partition"):
        optim.muon(0.1).init(params)
