"""Schedules beside those of transformers 4.57, with the vectors of the specification."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from transformers import SchedulerType, get_scheduler

from trainkit.trainer.layerwise import LayerwiseOptimizer
from trainkit.trainer.lr_schedules import SCHEDULES, current_rate, is_plateau, lr_factor, make_lr_scheduler

# w = 2, T = 10, s = 0 to 11; four decimals, as runs of the reference gave them.
VECTORS: list[tuple[str, dict[str, Any], list[float]]] = [
    ("linear", {}, [0, 0.5, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0, 0]),
    ("cosine", {}, [0, 0.5, 1, 0.9619, 0.8536, 0.6913, 0.5, 0.3087, 0.1464, 0.0381, 0, 0.0381]),
    (
        "cosine_with_restarts",
        {"num_cycles": 2},
        [0, 0.5, 1, 0.8536, 0.5, 0.1464, 1, 0.8536, 0.5, 0.1464, 0, 0],
    ),
    ("polynomial", {}, [0, 0.5, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 1e-7, 1e-7]),
    ("constant", {}, [1] * 12),
    ("constant_with_warmup", {}, [0, 0.5] + [1] * 10),
    ("inverse_sqrt", {}, [0, 0.5, 1, 0.8165, 0.7071, 0.6325, 0.5774, 0.5345, 0.5, 0.4714, 0.4472, 0.4264]),
    (
        "cosine_with_min_lr",
        {"min_lr_rate": 0.1},
        [0, 0.5, 1, 0.9657, 0.8682, 0.7222, 0.55, 0.3778, 0.2318, 0.1343, 0.1, 0.1343],
    ),
    (
        "cosine_warmup_with_min_lr",
        {"min_lr_rate": 0.1},
        [0.5, 1, 0.9657, 0.8682, 0.7222, 0.55, 0.3778, 0.2318, 0.1343, 0.1, 0.1343, 0.2318],
    ),
    ("warmup_stable_decay", {"num_decay_steps": 4}, [0, 0.5, 1, 1, 1, 1, 1, 0.8536, 0.5, 0.1464, 0, 0]),
]
# Options of each schedule, drawn for the comparison with the reference.
SHARE, CYCLES = st.floats(0.0, 1.0), st.floats(0.1, 5.0)
FLOOR = st.one_of(
    st.fixed_dictionaries({"min_lr_rate": SHARE}, optional={"num_cycles": CYCLES}),
    st.fixed_dictionaries({"min_lr": st.floats(0.0, 0.3)}, optional={"num_cycles": CYCLES}),
)
SHAPES = st.sampled_from(["linear", "cosine", "1-sqrt"])
OPTIONS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "linear": st.just({}),
    "cosine": st.fixed_dictionaries({}, optional={"num_cycles": CYCLES}),
    "cosine_with_restarts": st.fixed_dictionaries({}, optional={"num_cycles": st.integers(1, 4)}),
    "polynomial": st.fixed_dictionaries({}, optional={"lr_end": st.floats(0, 0.2), "power": st.floats(0.5, 3.0)}),
    "constant": st.just({}),
    "constant_with_warmup": st.just({}),
    "inverse_sqrt": st.just({}),
    "cosine_with_min_lr": FLOOR,
    "cosine_warmup_with_min_lr": st.tuples(FLOOR, st.fixed_dictionaries({}, optional={"warmup_lr_rate": SHARE})).map(
        lambda pair: {**pair[0], **pair[1]}
    ),
    "warmup_stable_decay": st.fixed_dictionaries(
        {"num_decay_steps": st.integers(0, 8)},
        optional={
            "num_stable_steps": st.integers(0, 8),
            "warmup_type": SHAPES,
            "decay_type": SHAPES,
            "min_lr_ratio": SHARE,
            "num_cycles": CYCLES,
        },
    ),
}


def make_optimizer(lr: float = 1.0) -> torch.optim.Optimizer:
    w, v = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    return torch.optim.SGD([{"params": [w]}, {"params": [v], "lr": 0.5}], lr=lr)


def rates(scheduler: Any, steps: int) -> list[list[float]]:
    found = []
    for _ in range(steps):
        found.append([group["lr"] for group in scheduler.optimizer.param_groups])
        scheduler.optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(("name", "kwargs", "expected"), VECTORS, ids=lambda v: v if isinstance(v, str) else "")
def test_has_the_values_of_the_specification(name: str, kwargs: dict[str, Any], expected: list[float]) -> None:
    factor = lr_factor(name, 2, 10, kwargs, base_lr=1.0)
    assert [factor(s) for s in range(12)] == pytest.approx(expected, abs=5e-5)
    found = rates(make_lr_scheduler(name, make_optimizer(), 2, 10, kwargs), 12)
    assert found == [pytest.approx([f, 0.5 * f], abs=5e-5) for f in expected]


@pytest.mark.parametrize("name", OPTIONS)
@given(data=st.data(), warmup=st.integers(0, 6), total=st.integers(1, 12), lr=st.sampled_from([0.3, 1.0, 2.5]))
def test_equals_transformers(name: str, data: st.DataObject, warmup: int, total: int, lr: float) -> None:
    kwargs = data.draw(OPTIONS[name])
    # There the reference divides by zero.
    assume(not (name == "polynomial" and warmup == total))
    given_optimizer, other = make_optimizer(lr), make_optimizer(lr)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        reference = get_scheduler(name, other, warmup, total, scheduler_specific_kwargs=kwargs)
    found = rates(make_lr_scheduler(name, given_optimizer, warmup, total, kwargs), total + 1)
    for own, expected in zip(found, rates(reference, total + 1), strict=True):
        assert own == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_knows_the_names_of_transformers() -> None:
    assert sorted(SCHEDULES) == sorted(member.value for member in SchedulerType)
    assert isinstance(make_lr_scheduler(SchedulerType.COSINE, make_optimizer(), 2, 10), LambdaLR)


def test_polynomial_with_nothing_after_the_warm_up_has_a_value() -> None:
    assert lr_factor("polynomial", 4, 4, base_lr=1.0)(4) == 1.0


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "reduce_lr_on_plateau"])
def test_arguments_it_does_not_know_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match=rf"lr_scheduler_kwargs: {name} does not know \['cycles'\]"):
        make_lr_scheduler(name, make_optimizer(), 2, 10, {"cycles": 3})


@pytest.mark.parametrize(
    ("name", "warmup", "total", "kwargs", "error", "message"),
    [
        ("lineaar", 2, 10, {}, ValueError, "lr_scheduler_type: got 'lineaar', expected one of .*'linear'"),
        ("linear", None, 10, {}, ValueError, "num_warmup_steps: missing; the schedule linear needs it"),
        ("linear", 2, None, {}, ValueError, "num_training_steps: missing"),
        ("linear", -1, 10, {}, ValueError, "num_warmup_steps: got -1"),
        ("cosine", 2, 10, {"num_cycles": "3"}, ValueError, "num_cycles is '3', expected a finite number"),
        ("cosine", 2, 10, {"num_cycles": float("nan")}, ValueError, "num_cycles is nan"),
        ("polynomial", 2, 10, {"lr_end": 2.0}, ValueError, "lr_end: got 2.0, expected less than .* 1.0"),
        ("inverse_sqrt", 2, 10, {"timescale": 0}, ValueError, "timescale: got 0, expected a positive number"),
        ("cosine_with_min_lr", 2, 10, {}, ValueError, "expected exactly one of them"),
        ("cosine_with_min_lr", 2, 10, {"min_lr": 0.1, "min_lr_rate": 0.1}, ValueError, "exactly one of them"),
        ("warmup_stable_decay", 2, 10, {}, TypeError, "needs num_decay_steps"),
        ("warmup_stable_decay", 2, None, {"num_decay_steps": 3}, ValueError, "num_training_steps: missing"),
        ("warmup_stable_decay", 2, 10, {"num_decay_steps": 3, "decay_type": "no"}, ValueError, "decay_type: got 'no'"),
        ("reduce_lr_on_plateau", 2, 10, {"patients": 3}, TypeError, r"does not know \['patients'\]"),
    ],
)
def test_bad_arguments_are_refused(
    name: str, warmup: int | None, total: int | None, kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    optimizer = make_optimizer()
    with pytest.raises(error, match=message):
        make_lr_scheduler(name, optimizer, warmup, total, kwargs)
    assert all("initial_lr" not in group for group in optimizer.param_groups)


def test_the_timescale_can_be_set() -> None:
    assert lr_factor("inverse_sqrt", 2, kwargs={"timescale": 8})(26) == 0.5


@pytest.mark.parametrize(("better", "kwargs", "mode"), [
    (True, {}, "max"), (False, {}, "min"), (None, {}, "min"), (True, {"mode": "min", "patience": 3}, "min"),
])  # fmt: skip
def test_a_plateau_looks_the_way_the_metric_improves(better: bool | None, kwargs: dict[str, Any], mode: str) -> None:
    scheduler = make_lr_scheduler("reduce_lr_on_plateau", make_optimizer(), 2, 10, kwargs, greater_is_better=better)
    assert isinstance(scheduler, ReduceLROnPlateau) and is_plateau(scheduler)
    assert (scheduler.mode, scheduler.patience) == (mode, kwargs.get("patience", 10))


def test_a_plateau_of_accuracy_keeps_the_rate_while_it_grows() -> None:
    scheduler: Any = make_lr_scheduler(
        "reduce_lr_on_plateau", make_optimizer(), kwargs={"patience": 0}, greater_is_better=True
    )
    for accuracy in (0.1, 0.2, 0.3):
        scheduler.step(accuracy)
    assert current_rate(scheduler, scheduler.optimizer) == 1.0
    scheduler.step(0.3)
    assert current_rate(scheduler, scheduler.optimizer) == pytest.approx(0.1)


def test_the_rate_is_that_of_the_scheduler() -> None:
    optimizer = make_optimizer()
    assert current_rate(None, optimizer) == 1.0
    scheduler = make_lr_scheduler("linear", optimizer, 2, 10)
    optimizer.step()
    scheduler.step()
    assert current_rate(scheduler, optimizer) == 0.5
    assert not is_plateau(scheduler)


def test_a_factor_can_be_pickled_and_its_state_holds_no_lengths() -> None:
    factor = pickle.loads(pickle.dumps(lr_factor("warmup_stable_decay", 2, 10, {"num_decay_steps": 4})))
    assert factor(7) == pytest.approx(0.8536, abs=5e-5)
    longer = make_lr_scheduler("linear", make_optimizer(), 2, 20)
    shorter = make_lr_scheduler("linear", make_optimizer(), 2, 10)
    for _ in range(6):
        shorter.optimizer.step()
        shorter.step()
    longer.load_state_dict(shorter.state_dict())
    longer.optimizer.step()
    longer.step()
    assert longer.get_last_lr()[0] == pytest.approx(13 / 18)


def test_the_state_of_the_scheduler_of_transformers_can_be_loaded() -> None:
    reference = get_scheduler("cosine", make_optimizer(), 2, 10)
    rates(reference, 5)
    scheduler = make_lr_scheduler("cosine", make_optimizer(), 2, 10)
    scheduler.load_state_dict(reference.state_dict())
    assert rates(scheduler, 4)[1:] == rates(reference, 4)[1:]


def test_layer_wise_optimizers_follow_the_schedule_in_the_backward_pass() -> None:
    w, v = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = LayerwiseOptimizer({p: torch.optim.SGD([p], lr=1.0) for p in (w, v)}, lr=1.0)
    scheduler = make_lr_scheduler("linear", optimizer, 2, 10)
    for _ in range(4):
        (w + 2 * v).sum().backward()
        optimizer.step()
        scheduler.step()
    assert w.item() == -(0 + 0.5 + 1 + 0.875) and v.item() == 2 * w.item()
