"""Every optimizer beside torch.optim, descending, and with arguments that make no sense."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.optim.table import (
    OPTIMIZERS,
    Options,
    Row,
    assert_close,
    assert_same_bits,
    every_optimizer,
    every_reference,
    random_tree,
    run,
    run_torch,
    schedule,
)
from trainkit import optim, tree
from trainkit.optim.transform import Transform, reports

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
