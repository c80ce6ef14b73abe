"""The optimizers under test, one row each, and what tests of all of them share.

A new optimizer is a row in ``OPTIMIZERS``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from trainkit import optim, tree
from trainkit.optim.transform import Transform
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


def row_of(name: str) -> Row:
    """The row of one optimizer."""
    return next(row for row in OPTIMIZERS if row.id == name)


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
