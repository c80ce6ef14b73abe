"""Schedules: functions of the step, and nothing more.

A schedule takes the number of completed updates (int64 tensor, 0-d in a step) and gives a float32 tensor of the same
shape. There is no scheduler to save, and a changing value never recompiles. The arithmetic is float64, rounded once
at the end, so a boundary value is the number that was asked for. Every schedule holds its last value after its end.

A tensor of many steps gives the values of all of them: ``schedule(torch.arange(1000))`` is the curve to plot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from numbers import Real
from typing import Literal

import torch
from torch import Tensor

from trainkit.types import Schedule

Shape = Literal["linear", "cosine", "1-sqrt"]
"""How a value falls from 1 to 0 as the progress p goes from 0 to 1: 1 - p, (1 + cos(pi p)) / 2, 1 - sqrt(p)."""

_FALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda p: 1 - p,
    "cosine": lambda p: (1 + torch.cos(math.pi * p)) / 2,
    "1-sqrt": lambda p: 1 - torch.sqrt(p),
}


def constant(value: float) -> Schedule:
    """The same value at every step.

    Args:
        value: any finite number.

    Raises: ValueError for anything else.

    Example:
        >>> constant(0.5)(torch.tensor([0, 1000]))
        tensor([0.5000, 0.5000])
    """
    value = _number("value", value)
    return lambda step: torch.full_like(step, value, dtype=torch.float32)


def linear(start: float, end: float, steps: int) -> Schedule:
    """A straight line.

    v(t) = start + (end - start) t / steps  for t < steps;  end  from there on.

    Args:
        start: the value at step 0.
        end: the value at ``steps`` and after.
        steps: positive, updates from one to the other.

    Raises: ValueError for a number that is not finite, or ``steps`` that is not a positive integer.

    Example:
        >>> linear(1.0, 0.0, 4)(torch.tensor([0, 1, 3, 4, 5]))
        tensor([1.0000, 0.7500, 0.2500, 0.0000, 0.0000])

    Source: matches torch.optim.lr_scheduler.LinearLR, and with :func:`warmup`
    transformers.get_linear_schedule_with_warmup.
    """
    return _fall(start, end, steps, "linear")


def cosine(peak: float, steps: int, *, final: float = 0.0, cycles: float = 0.5) -> Schedule:
    """Half a cosine wave, or ``cycles`` waves.

    v(t) = final + (peak - final) (1 + cos(2 pi cycles t / steps)) / 2  for t < steps;  v(steps)  from there on.

    Args:
        peak: the value at step 0.
        steps: positive, updates until the end.
        final: the lowest value, reached at ``steps`` for half a wave.
        cycles: positive, waves until the end.

    Raises: ValueError for a number that is not finite, ``steps`` or ``cycles`` that is not positive.

    Example:
        >>> cosine(1.0, 4, final=0.2)(torch.tensor([0, 1, 2, 3, 4, 5]))
        tensor([1.0000, 0.8828, 0.6000, 0.3172, 0.2000, 0.2000])

    Source: Loshchilov and Hutter 2017, eq. 5, without restarts. Up to ``steps`` it matches CosineAnnealingLR of torch
    and, with :func:`warmup`, transformers.get_cosine_schedule_with_warmup and its form with ``min_lr``; those two go
    up again after the end, this one does not.
    """
    peak, final, cycles = _number("peak", peak), _number("final", final), _positive("cycles", cycles)
    _count("steps", steps, 1)

    def schedule(step: Tensor) -> Tensor:
        wave = (1 + torch.cos(2 * math.pi * cycles * _progress(step, 0, steps))) / 2
        return _mix(final, peak, wave)

    return schedule


def cosine_with_restarts(peak: float, steps: int, *, cycles: int = 1, final: float = 0.0) -> Schedule:
    """``cycles`` falls of equal length, each from the peak.

    v(t) = final + (peak - final) (1 + cos(pi p)) / 2,  p = (cycles t / steps) mod 1,  for t < steps;
    final  from there on.

    Args:
        peak: the value at step 0 and after each restart.
        steps: positive, updates until the end of the last cycle.
        cycles: positive.
        final: what each cycle falls towards.

    Raises: ValueError for a number that is not finite, ``steps`` or ``cycles`` that is not a positive integer.

    Example:
        >>> cosine_with_restarts(1.0, 8, cycles=2)(torch.tensor([0, 2, 3, 4, 7, 8]))
        tensor([1.0000, 0.5000, 0.1464, 1.0000, 0.1464, 0.0000])

    Source: with :func:`warmup` it matches transformers.get_cosine_with_hard_restarts_schedule_with_warmup. The phase
    is taken from integers, so that rounding never misses a restart.
    """
    peak, final = _number("peak", peak), _number("final", final)
    _count("steps", steps, 1)
    _count("cycles", cycles, 1)

    def schedule(step: Tensor) -> Tensor:
        phase = _real(step * cycles % steps) / steps
        fall = torch.where(step < steps, _FALLS["cosine"](phase), 0.0)
        return _mix(final, peak, fall)

    return schedule


def cosine_warm_restarts(peak: float, period: int, *, factor: int = 1, final: float = 0.0) -> Schedule:
    """Falls without end, each ``factor`` times as long as the one before.

    v(t) = final + (peak - final) (1 + cos(pi c / T)) / 2, with c steps since the last restart and T = period factor^i
    in cycle i. Cycle i starts at period (factor^i - 1) / (factor - 1), for factor 1 at i period.

    Args:
        peak: the value at step 0 and after each restart.
        period: positive, length of the first cycle.
        factor: at least 1.
        final: what each cycle falls towards.

    Raises: ValueError for a number that is not finite, ``period`` or ``factor`` that is not a positive integer.

    Example:
        >>> cosine_warm_restarts(1.0, 2, factor=2)(torch.tensor([0, 1, 2, 4, 5, 6]))
        tensor([1.0000, 0.5000, 1.0000, 0.5000, 0.1464, 1.0000])

    Source: Loshchilov and Hutter 2017, eq. 5 (SGDR); matches torch.optim.lr_scheduler.CosineAnnealingWarmRestarts.
    """
    peak, final = _number("peak", peak), _number("final", final)
    _count("period", period, 1)
    _count("factor", factor, 1)

    def schedule(step: Tensor) -> Tensor:
        phase = _real(step % period) / period if factor == 1 else _growing_phase(_real(step), period, factor)
        return _mix(final, peak, _FALLS["cosine"](phase))

    return schedule


def _growing_phase(t: Tensor, period: int, factor: int) -> Tensor:
    """Where in its cycle the step is, in [0, 1)."""

    def start(cycle: Tensor) -> Tensor:
        return period * (factor**cycle - 1) / (factor - 1)

    cycle = torch.floor(torch.log(t * (factor - 1) / period + 1) / math.log(factor))
    # A logarithm next to an integer may round to the wrong side of it.
    cycle = cycle + (t >= start(cycle + 1)).to(t.dtype) - (t < start(cycle)).to(t.dtype)
    return (t - start(cycle)) / (period * factor**cycle)


def polynomial(peak: float, steps: int, *, power: float = 1.0, final: float = 0.0) -> Schedule:
    """A power of what remains.

    v(t) = final + (peak - final) (1 - t / steps)^power  for t < steps;  final  from there on.

    Args:
        peak: the value at step 0.
        steps: positive, updates until the end.
        power: positive; 1 is a straight line.
        final: the value at ``steps`` and after.

    Raises: ValueError for a number that is not finite, ``steps`` or ``power`` that is not positive.

    Example:
        >>> polynomial(1.0, 4, power=2.0)(torch.tensor([0, 1, 3, 4, 5]))
        tensor([1.0000, 0.5625, 0.0625, 0.0000, 0.0000])

    Source: matches torch.optim.lr_scheduler.PolynomialLR and, with :func:`warmup`,
    transformers.get_polynomial_decay_schedule_with_warmup (whose ``lr_end`` is 1e-7 unless given).
    """
    peak, final, power = _number("peak", peak), _number("final", final), _positive("power", power)
    _count("steps", steps, 1)
    return lambda step: _mix(final, peak, (1 - _progress(step, 0, steps)) ** power)


def exponential(start: float, factor: float, *, every: int = 1, staircase: bool = False) -> Schedule:
    """A constant ratio.

    v(t) = start factor^(t / every), with t / every rounded down for a staircase.

    Args:
        start: the value at step 0.
        factor: positive, what ``every`` updates multiply the value by.
        every: positive.
        staircase: jump at multiples of ``every`` and stay between them.

    Raises: ValueError for a number that is not finite, ``factor`` or ``every`` that is not positive.

    Example:
        >>> exponential(1.0, 0.25, every=2)(torch.tensor([0, 1, 2, 3]))
        tensor([1.0000, 0.5000, 0.2500, 0.1250])
        >>> exponential(1.0, 0.25, every=2, staircase=True)(torch.tensor([0, 1, 2, 3]))
        tensor([1.0000, 1.0000, 0.2500, 0.2500])

    Source: matches torch.optim.lr_scheduler.ExponentialLR, and StepLR as a staircase.
    """
    start, factor = _number("start", start), _positive("factor", factor)
    _count("every", every, 1)

    def schedule(step: Tensor) -> Tensor:
        exponent = _real(step // every) if staircase else _real(step) / every
        return (start * factor**exponent).to(torch.float32)

    return schedule


def inverse_sqrt(peak: float, timescale: int) -> Schedule:
    """Falls as one over the square root of the step, without end.

    v(t) = peak / sqrt(1 + t / timescale).

    Args:
        peak: the value at step 0.
        timescale: positive; after three times as many updates the value is half of the peak.

    Raises: ValueError for a number that is not finite, or ``timescale`` that is not a positive integer.

    Example:
        >>> inverse_sqrt(1.0, 100)(torch.tensor([0, 300, 9900]))
        tensor([1.0000, 0.5000, 0.1000])

    Source: Vaswani et al. 2017, eq. 3, is ``warmup(inverse_sqrt(peak, n), n)``; so is
    transformers.get_inverse_sqrt_schedule.
    """
    peak = _number("peak", peak)
    _count("timescale", timescale, 1)
    return lambda step: (peak / torch.sqrt(1 + _real(step) / timescale)).to(torch.float32)


def warmup(schedule: Schedule, steps: int, *, start: float = 0.0, shape: Shape = "linear") -> Schedule:
    """Rise to the first value of a schedule, then follow it from its beginning.

    v(t) = start + (schedule(0) - start) r(t / steps)  for t < steps;  schedule(t - steps)  from there on.

    ``schedule`` counts from the end of the warm-up: for n updates in all write ``warmup(cosine(peak, n - w), w)``.

    Args:
        schedule: what follows.
        steps: updates of the warm-up; 0 gives the schedule itself.
        start: the value at step 0.
        shape: of the rise r: linear p, cosine (1 - cos(pi p)) / 2, "1-sqrt" 1 - sqrt(1 - p).

    Raises: ValueError for a number that is not finite, negative ``steps``, or an unknown shape.

    Example:
        >>> warmup(linear(1.0, 0.0, 4), 2)(torch.tensor([0, 1, 2, 3, 6, 7]))
        tensor([0.0000, 0.5000, 1.0000, 0.7500, 0.0000, 0.0000])

    Source: Goyal et al. 2017, sec. 2.2; matches the ``_with_warmup`` schedules of transformers.
    """
    start, fall = _number("start", start), _fall_of("shape", shape)
    _count("steps", steps, 0)
    if steps == 0:
        return schedule

    def warmed(step: Tensor) -> Tensor:
        value = _real(schedule(torch.clamp(step - steps, min=0)))
        return _mix(start, value, fall(1 - _progress(step, 0, steps)))

    return warmed


def warmup_stable_decay(
    peak: float,
    *,
    warmup_steps: int,
    stable_steps: int,
    decay_steps: int,
    start: float = 0.0,
    final: float = 0.0,
    warmup_shape: Shape = "linear",
    decay_shape: Shape = "1-sqrt",
) -> Schedule:
    """Rise, stay at the peak, fall: a run can be extended from any point of the plateau.

    With w, s, d the three lengths, r and f the shapes of rise and fall:
    v(t) = start + (peak - start) r(t / w)  for t < w;  peak  for t < w + s;
    final + (peak - final) f((t - w - s) / d)  for t < w + s + d;  final  from there on.

    Args:
        peak: the value of the plateau.
        warmup_steps: w, may be 0.
        stable_steps: s, may be 0.
        decay_steps: d, positive.
        start: the value at step 0.
        final: the value after the decay.
        warmup_shape: as for :func:`warmup`.
        decay_shape: linear 1 - p, cosine (1 + cos(pi p)) / 2, "1-sqrt" 1 - sqrt(p).

    Raises: ValueError for a number that is not finite, a length that is too small, or an unknown shape.

    Example:
        >>> schedule = warmup_stable_decay(1.0, warmup_steps=2, stable_steps=3, decay_steps=4)
        >>> schedule(torch.tensor([0, 1, 2, 4, 5, 6, 9, 10]))
        tensor([0.0000, 0.5000, 1.0000, 1.0000, 1.0000, 0.5000, 0.0000, 0.0000])

    Source: Hu et al. 2024 (MiniCPM), sec. 4; the fall by 1 - sqrt is that of Hägele et al. 2024, sec. 3. Matches
    transformers.get_wsd_schedule, whose rise starts at ``min_lr_ratio`` and whose fall is "cosine" unless given.
    """
    _count("stable_steps", stable_steps, 0)
    _count("warmup_steps", warmup_steps, 0)
    after = join([constant(peak), _fall(peak, final, decay_steps, decay_shape, name="decay_steps")], [stable_steps])
    return warmup(after, warmup_steps, start=start, shape=warmup_shape)


def one_cycle(
    peak: float,
    steps: int,
    *,
    pct_start: float = 0.3,
    anneal_strategy: Shape = "cosine",
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    three_phase: bool = False,
) -> Schedule:
    """Rise to the peak and fall far below the start, within one run.

    With initial = peak / div_factor, minimum = initial / final_div_factor and a = pct_start steps - 1:
    initial -> peak  for t <= a;  peak -> minimum  for a < t <= steps - 1;  minimum  from there on.
    Three phases: initial -> peak  for t <= a;  peak -> initial  for a < t <= 2 a;  initial -> minimum  after that.

    Args:
        peak: the highest value.
        steps: updates of the whole run; the minimum is reached at the last of them, ``steps - 1``.
        pct_start: share of the steps in which the value rises, in (0, 1).
        anneal_strategy: how each phase goes from one value to the next.
        div_factor: peak over initial value.
        final_div_factor: initial value over minimum.
        three_phase: fall back to the initial value as fast as it rose, then to the minimum.

    Raises: ValueError for numbers that are not positive, or phases without a step.

    Example:
        >>> one_cycle(1.0, 10, pct_start=0.5, div_factor=4.0, anneal_strategy="linear")(torch.tensor([0, 2, 4, 9, 10]))
        tensor([2.5000e-01, 6.2500e-01, 1.0000e+00, 2.5000e-05, 2.5000e-05])

    Source: Smith and Topin 2018; matches torch.optim.lr_scheduler.OneCycleLR up to its last step.
    """
    peak, share = _number("peak", peak), _positive("pct_start", pct_start)
    initial = peak / _positive("div_factor", div_factor)
    minimum = initial / _positive("final_div_factor", final_div_factor)
    _count("steps", steps, 1)
    fall = _fall_of("anneal_strategy", anneal_strategy)
    top = share * steps - 1
    ends = [0.0, top, 2 * top, steps - 1.0] if three_phase else [0.0, top, steps - 1.0]
    values = [initial, peak, initial, minimum] if three_phase else [initial, peak, minimum]
    if any(end <= begin for begin, end in pairwise(ends)):
        raise ValueError(
            f"pct_start: {pct_start} of {steps} steps puts the phases' ends at {ends[1:]}, expected an increasing row; "
            "use more steps, or a share nearer to the middle"
        )

    def schedule(step: Tensor) -> Tensor:
        value = _mix(values[1], values[0], fall(_progress(step, ends[0], ends[1])))
        for i in range(1, len(values) - 1):
            phase = _mix(values[i + 1], values[i], fall(_progress(step, ends[i], ends[i + 1])))
            value = torch.where(_real(step) > ends[i], phase, value)
        return value

    return schedule


def join(schedules: Sequence[Schedule], boundaries: Sequence[int]) -> Schedule:
    """Schedules one after the other, each from its own beginning.

    v(t) = schedules[0](t)  for t < boundaries[0];  schedules[i](t - boundaries[i - 1])  from boundaries[i - 1] on.

    Args:
        schedules: at least one. All are evaluated at every step, which for 0-d tensors costs little.
        boundaries: one fewer, increasing; at a boundary the next schedule applies.

    Raises: ValueError if the numbers do not fit, or the boundaries do not increase.

    Example:
        >>> join([constant(1.0), linear(0.5, 0.0, 2)], [3])(torch.tensor([0, 2, 3, 4, 5]))
        tensor([1.0000, 1.0000, 0.5000, 0.2500, 0.0000])

    Source: ``optax.join_schedules``; with constants it matches torch.optim.lr_scheduler.MultiStepLR.
    """
    if not schedules or len(boundaries) != len(schedules) - 1:
        raise ValueError(
            f"boundaries: got {len(boundaries)} for {len(schedules)} schedules, expected one fewer than schedules"
        )
    for boundary in boundaries:
        _count("boundaries", boundary, 0)
    if any(b <= a for a, b in pairwise(boundaries)):
        raise ValueError(f"boundaries: got {list(boundaries)}, expected increasing steps")
    later = list(zip(boundaries, schedules[1:], strict=True))

    def joined(step: Tensor) -> Tensor:
        value = schedules[0](step)
        for boundary, schedule in later:
            value = torch.where(step >= boundary, schedule(torch.clamp(step - boundary, min=0)), value)
        return value

    return joined


def scale(schedule: Schedule, by: float | Schedule) -> Schedule:
    """A schedule times a number or another schedule.

    Args:
        schedule: any schedule.
        by: a finite number, or a schedule of the same step.

    Raises: ValueError for a number that is not finite.

    Example:
        >>> scale(linear(1.0, 0.0, 4), 0.5)(torch.tensor([0, 2]))
        tensor([0.5000, 0.2500])
    """
    other = by if callable(by) else constant(by)
    return lambda step: schedule(step) * other(step)


def real_dtype(device: torch.device) -> torch.dtype:
    """The widest floating dtype of a device: float64, except on MPS, which has none.

    Example:
        >>> real_dtype(torch.device("cpu"))
        torch.float64
    """
    return torch.float32 if device.type == "mps" else torch.float64


def _real(value: Tensor) -> Tensor:
    return value.to(real_dtype(value.device))


def _progress(step: Tensor, begin: float, end: float) -> Tensor:
    return torch.clamp((_real(step) - begin) / (end - begin), 0, 1)


def _mix(low: float, high: float | Tensor, share: Tensor) -> Tensor:
    """``high`` with weight ``share``, ``low`` with the rest: exact where the share is 0 or 1."""
    return (low * (1 - share) + high * share).to(torch.float32)


def _fall(start: float, end: float, steps: int, shape: Shape, *, name: str = "steps") -> Schedule:
    start, end, fall = _number("start", start), _number("end", end), _fall_of("shape", shape)
    _count(name, steps, 1)
    return lambda step: _mix(end, start, fall(_progress(step, 0, steps)))


def _fall_of(name: str, shape: str) -> Callable[[Tensor], Tensor]:
    if shape not in _FALLS:
        raise ValueError(f"{name}: got {shape!r}, expected one of {sorted(_FALLS)}")
    return _FALLS[shape]


def _number(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name}: got {value!r}, expected a finite number")
    return float(value)


def _positive(name: str, value: float) -> float:
    value = _number(name, value)
    if value <= 0:
        raise ValueError(f"{name}: got {value}, expected a positive number")
    return value


def _count(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: got {value!r}, expected an integer of at least {least}")
