"""Schedules against their formulas at the boundaries, and against the schedulers of torch and transformers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import transformers
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

from trainkit import schedules
from trainkit.schedules import (
    constant,
    cosine,
    cosine_warm_restarts,
    cosine_with_restarts,
    exponential,
    inverse_sqrt,
    join,
    linear,
    one_cycle,
    polynomial,
    scale,
    warmup,
    warmup_stable_decay,
)
from trainkit.types import Schedule

PEAK = 0.3
WARM, TOTAL = 7, 40
# One rounding to float32 of the schedule under a warm-up, one of the result.
TOLERANCE = {"rtol": 2.5e-7, "atol": 1e-9}


def curve(schedule: Schedule, steps: int) -> torch.Tensor:
    return torch.stack([schedule(torch.tensor(t)) for t in range(steps)])


def scheduler_curve(make: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler], steps: int) -> torch.Tensor:
    """The learning rates that a loop of ``optimizer.step(); scheduler.step()`` uses."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return torch.tensor(rates, dtype=torch.float64).float()


TRANSFORMERS = {
    "constant_with_warmup": (
        warmup(constant(PEAK), WARM),
        lambda o: transformers.get_constant_schedule_with_warmup(o, WARM),
        TOTAL + 5,
    ),
    "linear": (
        warmup(linear(PEAK, 0.0, TOTAL - WARM), WARM),
        lambda o: transformers.get_linear_schedule_with_warmup(o, WARM, TOTAL),
        TOTAL + 5,
    ),
    "cosine": (
        warmup(cosine(PEAK, TOTAL - WARM), WARM),
        lambda o: transformers.get_cosine_schedule_with_warmup(o, WARM, TOTAL),
        TOTAL,
    ),
    "cosine_waves": (
        warmup(cosine(PEAK, TOTAL - WARM, cycles=1.5), WARM),
        lambda o: transformers.get_cosine_schedule_with_warmup(o, WARM, TOTAL, num_cycles=1.5),
        TOTAL,
    ),
    "cosine_with_min_lr": (
        warmup(cosine(PEAK, TOTAL - WARM, final=0.01), WARM),
        lambda o: transformers.optimization.get_cosine_with_min_lr_schedule_with_warmup(o, WARM, TOTAL, min_lr=0.01),
        TOTAL,
    ),
    "cosine_with_restarts": (
        warmup(cosine_with_restarts(PEAK, TOTAL - 8, cycles=4), 8),
        lambda o: transformers.get_cosine_with_hard_restarts_schedule_with_warmup(o, 8, TOTAL, num_cycles=4),
        TOTAL + 5,
    ),
    "polynomial": (
        warmup(polynomial(PEAK, TOTAL - WARM, power=2.0, final=1e-3), WARM),
        lambda o: transformers.get_polynomial_decay_schedule_with_warmup(o, WARM, TOTAL, lr_end=1e-3, power=2.0),
        TOTAL + 5,
    ),
    "inverse_sqrt": (
        warmup(inverse_sqrt(PEAK, WARM), WARM),
        lambda o: transformers.get_inverse_sqrt_schedule(o, WARM),
        TOTAL,
    ),
    "inverse_sqrt_timescale": (
        warmup(inverse_sqrt(PEAK, 100), WARM),
        lambda o: transformers.get_inverse_sqrt_schedule(o, WARM, timescale=100),
        TOTAL,
    ),
} | {
    f"wsd_{rise}_{fall}": (
        warmup_stable_decay(
            PEAK,
            warmup_steps=WARM,
            stable_steps=20,
            decay_steps=13,
            start=0.1 * PEAK,
            final=0.1 * PEAK,
            warmup_shape=rise,
            decay_shape=fall,
        ),
        lambda o, rise=rise, fall=fall: transformers.get_wsd_schedule(
            o, WARM, 13, num_stable_steps=20, warmup_type=rise, decay_type=fall, min_lr_ratio=0.1
        ),
        TOTAL + 5,
    )
    for rise, fall in (("linear", "cosine"), ("cosine", "1-sqrt"), ("1-sqrt", "linear"))
}

TORCH = {
    "linear": (
        linear(0.2 * PEAK, PEAK, 9),
        lambda o: lr_scheduler.LinearLR(o, start_factor=0.2, end_factor=1.0, total_iters=9),
        20,
    ),
    "cosine": (cosine(PEAK, 20, final=0.02), lambda o: lr_scheduler.CosineAnnealingLR(o, 20, eta_min=0.02), 20),
    "polynomial": (polynomial(PEAK, 9, power=1.7), lambda o: lr_scheduler.PolynomialLR(o, 9, power=1.7), 20),
    "exponential": (exponential(PEAK, 0.9), lambda o: lr_scheduler.ExponentialLR(o, 0.9), 30),
    "step": (exponential(PEAK, 0.5, every=4, staircase=True), lambda o: lr_scheduler.StepLR(o, 4, gamma=0.5), 30),
    "multi_step": (
        join([constant(PEAK), constant(PEAK * 0.1), constant(PEAK * 0.01)], [3, 11]),
        lambda o: lr_scheduler.MultiStepLR(o, [3, 11], gamma=0.1),
        20,
    ),
    "warm_restarts": (
        cosine_warm_restarts(PEAK, 5, final=0.01),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5, eta_min=0.01),
        33,
    ),
    "warm_restarts_doubling": (
        cosine_warm_restarts(PEAK, 3, factor=2),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, T_mult=2),
        200,
    ),
    "warm_restarts_tripling": (
        cosine_warm_restarts(PEAK, 7, factor=3),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 7, T_mult=3),
        300,
    ),
} | {
    f"one_cycle_{torch_name}_{three}": (
        one_cycle(PEAK, 30, pct_start=0.3, anneal_strategy=name, three_phase=three, div_factor=10.0),
        lambda o, torch_name=torch_name, three=three: lr_scheduler.OneCycleLR(
            o, PEAK, 30, pct_start=0.3, anneal_strategy=torch_name, three_phase=three, div_factor=10.0,
            cycle_momentum=False,
        ),
        30,
    )
    for name, torch_name in (("cosine", "cos"), ("linear", "linear"))
    for three in (False, True)
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_equals_the_schedule_of_transformers_at_every_step(name: str) -> None:
    schedule, make, steps = TRANSFORMERS[name]
    torch.testing.assert_close(curve(schedule, steps), scheduler_curve(make, steps), **TOLERANCE)


@pytest.mark.parametrize("name", TORCH)
def test_equals_the_scheduler_of_torch_at_every_step(name: str) -> None:
    schedule, make, steps = TORCH[name]
    # Torch multiplies step after step where a closed form divides once: its rounding adds up in float64.
    torch.testing.assert_close(curve(schedule, steps), scheduler_curve(make, steps), **TOLERANCE)


W = 4
BOUNDARIES = {
    "constant": (constant(PEAK), {0: PEAK, 10**9: PEAK}),
    "linear": (linear(PEAK, 0.1, 8), {0: PEAK, 7: 0.1 + (PEAK - 0.1) / 8, 8: 0.1, 9: 0.1, 10**9: 0.1}),
    "cosine": (
        cosine(PEAK, 8, final=0.1),
        {0: PEAK, 4: 0.2, 7: 0.1 + 0.2 * (1 + math.cos(math.pi * 7 / 8)) / 2, 8: 0.1, 9: 0.1, 10**9: 0.1},
    ),
    "cosine_with_restarts": (
        cosine_with_restarts(PEAK, 9, cycles=3, final=0.1),
        {0: PEAK, 2: 0.15, 3: PEAK, 5: 0.15, 6: PEAK, 8: 0.15, 9: 0.1, 10: 0.1, 10**9: 0.1},
    ),
    "cosine_warm_restarts": (
        cosine_warm_restarts(PEAK, 3, factor=2, final=0.1),
        {0: PEAK, 2: 0.15, 3: PEAK, 6: 0.2, 9: PEAK, 15: 0.2, 21: PEAK, 3 * (2**30 - 1): PEAK},
    ),
    "polynomial": (polynomial(PEAK, 8, power=3.0, final=0.1), {0: PEAK, 4: 0.125, 8: 0.1, 9: 0.1, 10**9: 0.1}),
    "exponential": (exponential(PEAK, 0.5, every=4), {0: PEAK, 4: PEAK / 2, 8: PEAK / 4}),
    "staircase": (exponential(PEAK, 0.5, every=4, staircase=True), {0: PEAK, 3: PEAK, 4: PEAK / 2, 7: PEAK / 2}),
    "inverse_sqrt": (inverse_sqrt(PEAK, 5), {0: PEAK, 15: PEAK / 2, 40: PEAK / 3}),
    "warmup": (
        warmup(linear(PEAK, 0.1, 8), W, start=0.05),
        {0: 0.05, 3: 0.05 + (PEAK - 0.05) * 0.75, 4: PEAK, 5: PEAK - 0.2 / 8, 12: 0.1, 13: 0.1},
    ),
    "warmup_stable_decay": (
        warmup_stable_decay(PEAK, warmup_steps=W, stable_steps=6, decay_steps=9, final=0.1),
        {0: 0.0, 3: PEAK * 0.75, 4: PEAK, 10: PEAK, 11: 0.1 + 0.2 * (2 / 3), 14: 0.1 + 0.2 / 3, 19: 0.1, 20: 0.1},
    ),
    "no_warmup_no_plateau": (
        warmup_stable_decay(PEAK, warmup_steps=0, stable_steps=0, decay_steps=4),
        {0: PEAK, 1: PEAK / 2, 4: 0.0},
    ),
    "one_cycle": (
        one_cycle(PEAK, 20, pct_start=0.5, div_factor=10.0, final_div_factor=3.0),
        {0: 0.03, 9: PEAK, 19: 0.01, 20: 0.01, 10**9: 0.01},
    ),
    "one_cycle_three_phases": (
        one_cycle(PEAK, 40, pct_start=0.25, div_factor=10.0, final_div_factor=3.0, three_phase=True),
        {0: 0.03, 9: PEAK, 18: 0.03, 39: 0.01, 40: 0.01},
    ),
    "join": (
        join([constant(PEAK), linear(0.2, 0.0, 4), constant(0.7)], [3, 6]),
        {0: PEAK, 2: PEAK, 3: 0.2, 5: 0.1, 6: 0.7, 7: 0.7},
    ),
    "scale": (scale(linear(PEAK, 0.1, 8), 0.5), {0: PEAK / 2, 8: 0.05}),
    "scale_by_schedule": (scale(linear(1.0, 0.0, 4), exponential(1.0, 0.5)), {0: 1.0, 1: 0.375, 2: 0.125, 4: 0.0}),
}  # fmt: skip


@pytest.mark.parametrize("name", BOUNDARIES)
def test_boundary_values_are_the_formula(name: str) -> None:
    schedule, values = BOUNDARIES[name]
    for step, expected in values.items():
        value = schedule(torch.tensor(step))
        assert value.dtype == torch.float32
        assert value.shape == ()
        # Values that were asked for are exact; those between have one rounding of their own.
        assert float(value) == pytest.approx(expected, rel=1.2e-7, abs=1e-12), step


@pytest.mark.parametrize(
    ("schedule", "step", "value"),
    [
        (linear(1e-3, 1e-5, 777), 777, 1e-5),
        (cosine(1e-3, 777, final=1e-5), 0, 1e-3),
        (cosine(1e-3, 777, final=1e-5), 777, 1e-5),
        (cosine_with_restarts(1e-3, 98, cycles=49), 2, 1e-3),  # 2 / 98 * 49 is a little less than 1.
        (cosine_with_restarts(1e-3, 49, cycles=7), 49, 0.0),
        (polynomial(1e-3, 777, power=0.3, final=1e-5), 777, 1e-5),
        (warmup(constant(1e-3), 777, start=1e-6), 0, 1e-6),
        (warmup(constant(1e-3), 777, start=1e-6), 777, 1e-3),
        (warmup_stable_decay(1e-3, warmup_steps=3, stable_steps=3, decay_steps=3, final=1e-5), 9, 1e-5),
    ],
)
def test_what_was_asked_for_is_reached_to_the_bit(schedule: Schedule, step: int, value: float) -> None:
    assert torch.equal(schedule(torch.tensor(step)), torch.tensor(value, dtype=torch.float32))


@given(period=st.integers(1, 10**6), factor=st.integers(2, 5), cycle=st.integers(0, 12))
@example(period=1, factor=3, cycle=5)  # log(243) / log(3) is a little less than 5.
def test_growing_cycles_start_exactly_where_the_sum_of_their_lengths_says(period: int, factor: int, cycle: int) -> None:
    start = sum(period * factor**i for i in range(cycle))
    schedule = cosine_warm_restarts(1.0, period, factor=factor)
    assert float(schedule(torch.tensor(start))) == 1.0
    before = (period * factor ** (cycle - 1) - 1) / (period * factor ** (cycle - 1)) if cycle else None
    if before is not None:
        expected = (1 + math.cos(math.pi * before)) / 2
        assert float(schedule(torch.tensor(start - 1))) == pytest.approx(expected, rel=1e-6, abs=1e-14)


@given(
    steps=st.integers(1, 500),
    warm=st.integers(0, 50),
    start=st.floats(0, 1),
    final=st.floats(0, 1),
    step=st.integers(0, 10**12),
)
def test_values_stay_between_their_ends(steps: int, warm: int, start: float, final: float, step: int) -> None:
    for schedule in (
        warmup(cosine(1.0, steps, final=final), warm, start=start),
        warmup(linear(1.0, final, steps), warm, start=start),
        warmup(polynomial(1.0, steps, final=final, power=2.5), warm, start=start),
        warmup(cosine_with_restarts(1.0, steps, cycles=3, final=final), warm, start=start),
        warmup_stable_decay(1.0, warmup_steps=warm, stable_steps=3, decay_steps=steps, start=start, final=final),
    ):
        value = float(schedule(torch.tensor(step)))
        assert min(start, final) - 1e-6 <= value <= 1 + 1e-6


@pytest.mark.parametrize("name", BOUNDARIES)
def test_a_tensor_of_steps_gives_the_curve(name: str) -> None:
    schedule, _ = BOUNDARIES[name]
    assert torch.equal(schedule(torch.arange(25)), curve(schedule, 25))


def test_all_compile_into_one_graph_that_serves_every_step() -> None:
    every = [schedule for schedule, _ in BOUNDARIES.values()]
    compiled_graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        compiled_graphs.append(graph)
        return torch._inductor.compile(graph, inputs)

    compiled = torch.compile(lambda t: torch.stack([s(t) for s in every]), fullgraph=True, backend=count)
    for step in (0, 1, 5, 17, 10**6):
        t = torch.tensor(step)
        torch.testing.assert_close(compiled(t), torch.stack([s(t) for s in every]), **TOLERANCE)
    assert len(compiled_graphs) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: constant(math.nan), r"value: got nan, expected a finite number"),
        (lambda: linear(0.1, 0.0, 0), r"steps: got 0, expected an integer of at least 1"),
        (lambda: linear(0.1, 0.0, 10.0), r"steps: got 10.0, expected an integer"),
        (lambda: linear(0.1, 0.0, True), r"steps: got True"),
        (lambda: cosine(0.1, 5, cycles=0.0), r"cycles: got 0.0, expected a positive number"),
        (lambda: cosine_with_restarts(0.1, 5, cycles=0), r"cycles: got 0"),
        (lambda: cosine_warm_restarts(0.1, 5, factor=0), r"factor: got 0"),
        (lambda: polynomial(0.1, 5, power=-1.0), r"power: got -1.0"),
        (lambda: exponential(0.1, 0.0), r"factor: got 0.0"),
        (lambda: inverse_sqrt("big", 5), r"peak: got 'big'"),
        (lambda: warmup(constant(1.0), -1), r"steps: got -1, expected an integer of at least 0"),
        (lambda: warmup(constant(1.0), 3, shape="cubic"), r"shape: got 'cubic', expected one of"),
        (
            lambda: warmup_stable_decay(1.0, warmup_steps=1, stable_steps=1, decay_steps=0),
            r"decay_steps: got 0, expected an integer of at least 1",
        ),
        (lambda: one_cycle(1.0, 3, pct_start=0.3), r"pct_start: 0.3 of 3 steps puts the phases' ends at"),
        (lambda: one_cycle(1.0, 30, pct_start=0.6, three_phase=True), r"expected an increasing row"),
        (lambda: one_cycle(1.0, 30, anneal_strategy="cos"), r"anneal_strategy: got 'cos'"),
        (lambda: join([], []), r"boundaries: got 0 for 0 schedules"),
        (lambda: join([constant(1.0)], [3]), r"boundaries: got 1 for 1 schedules, expected one fewer"),
        (lambda: join([constant(1.0)] * 3, [3, 3]), r"boundaries: got \[3, 3\], expected increasing"),
        (lambda: scale(constant(1.0), math.inf), r"value: got inf"),
    ],
)
def test_wrong_numbers_are_refused_by_name(make: Callable[[], Schedule], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_without_float64_the_arithmetic_is_float32() -> None:
    assert schedules.real_dtype(torch.device("mps")) == torch.float32
