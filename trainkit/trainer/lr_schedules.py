"""The learning-rate schedules of the Trainer by name: factors of the step, and torch schedulers over them.

A factor is a plain function of the number of completed updates; the learning rate of a parameter group is its first
rate times the factor. With w updates of warm-up and T in all, p = (s - w) / max(1, T - w) is the progress after the
warm-up, and unless a schedule says otherwise the factor rises as s / max(1, w) until s = w.

These are Python's numbers, which ``LambdaLR`` multiplies with, and they go on after the end as those of transformers do
(a cosine rises again). For steps that are compiled there is ``trainkit.schedules``: tensors, which stay at their end.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

Factor = Callable[[int], float]
"""``(completed updates) -> factor of the base learning rate``."""

PLATEAU = "reduce_lr_on_plateau"
"""The one schedule that looks at a metric instead of the step."""


def make_lr_scheduler(
    name: str,
    optimizer: Optimizer,
    num_warmup_steps: int | None = None,
    num_training_steps: int | None = None,
    kwargs: Mapping[str, Any] | None = None,
    greater_is_better: bool | None = None,
) -> LRScheduler:
    """A torch scheduler for one of the Trainer's schedules.

    Each is a ``LambdaLR`` over :func:`lr_factor`, except ``reduce_lr_on_plateau``, which is torch's
    ``ReduceLROnPlateau``. Nothing of the arguments is stored in its ``state_dict``, so a resumed run follows the
    arguments that it is given now.

    Args:
        name: as for :func:`lr_factor`, or "reduce_lr_on_plateau"; a string or an enum of strings.
        optimizer: of which every group gets its own first rate times the factor.
        num_warmup_steps: w, updates; needed by all but "constant" and "reduce_lr_on_plateau".
        num_training_steps: T, updates.
        kwargs: further arguments of the schedule, or of ``ReduceLROnPlateau``.
        greater_is_better: whether the metric of a plateau is to grow: its ``mode`` unless ``kwargs`` has one.

    Raises:
        ValueError: an unknown name, a length that is missing, or a number out of range.
        TypeError: an argument that the schedule does not know.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
        >>> make_lr_scheduler("linear", optimizer, 2, 10).get_last_lr()
        [0.0]

    Source: Trainer 4.57: ``create_scheduler``.
    """
    name, kwargs = str(getattr(name, "value", name)), dict(kwargs or {})
    if name == PLATEAU:
        _check_known(name, kwargs, _parameters_after(ReduceLROnPlateau, "optimizer"))
        if greater_is_better is not None:
            kwargs.setdefault("mode", "max" if greater_is_better else "min")
        return ReduceLROnPlateau(optimizer, **kwargs)
    factor = lr_factor(name, num_warmup_steps, num_training_steps, kwargs, base_lr=_base_lr(optimizer))
    return LambdaLR(optimizer, factor)


def lr_factor(
    name: str,
    num_warmup_steps: int | None = None,
    num_training_steps: int | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    base_lr: float | None = None,
) -> Factor:
    """The factor of a schedule as a function of the step.

    After the warm-up, f(s) is

    - ``linear``: (T - s) / max(1, T - w), and 0 from T on;
    - ``cosine``: (1 + cos(2 pi c p)) / 2 with ``num_cycles`` c = 0.5;
    - ``cosine_with_restarts``: (1 + cos(pi (c p mod 1))) / 2 with ``num_cycles`` c = 1, and 0 from T on;
    - ``polynomial``: e + (1 - e) (1 - p)^q with ``lr_end`` = 1e-7, e = lr_end / base_lr, ``power`` q = 1, and e from T
      on;
    - ``constant``: 1, without warm-up; ``constant_with_warmup``: 1;
    - ``inverse_sqrt``: 1 / sqrt((s + k - w) / k) with ``timescale`` k = w, or 10,000 for w = 0;
    - ``cosine_with_min_lr``: m + (1 - m) (1 + cos(2 pi c p)) / 2 with ``num_cycles`` c = 0.5 and one of ``min_lr_rate``
      m and ``min_lr`` = m base_lr;
    - ``cosine_warmup_with_min_lr``: the same one update ahead, p = (s - w + 1) / max(1, T - w); the warm-up is
      (s + 1) / max(1, w), or with ``warmup_lr_rate`` r it is r + (1 - r) s / max(1, w - 1);
    - ``warmup_stable_decay``: 1 for S updates, m + (1 - m) g(q) with q = (s - w - S) / max(1, D) for D updates, then m.
      ``num_decay_steps`` D, ``num_stable_steps`` S = T - w - D, ``min_lr_ratio`` m = 0. ``decay_type`` g: "linear"
      1 - q, "cosine" (1 + cos(2 pi c q)) / 2 with ``num_cycles`` c = 0.5, "1-sqrt" 1 - sqrt(q). The warm-up is
      m + (1 - m) h(s / max(1, w)), ``warmup_type`` h: "linear" x, "cosine" (1 - cos(pi x)) / 2, "1-sqrt"
      1 - sqrt(1 - x).

    Args:
        name: one of the above; a string or an enum of strings.
        num_warmup_steps: w, updates.
        num_training_steps: T, updates.
        kwargs: the arguments named above.
        base_lr: the optimizer's learning rate, for schedules that end at a rate and not at a factor.

    Returns: a function of an integer, of at most one argument, that can be pickled.

    Raises: as :func:`make_lr_scheduler`; ValueError also for "reduce_lr_on_plateau", which is no function of the step.

    Example:
        >>> factor = lr_factor("linear", 2, 10)
        >>> [factor(s) for s in (0, 1, 2, 6, 10, 11)]
        [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]

    Source: Trainer 4.57: ``create_scheduler`` (``transformers.get_scheduler``).
    """
    name, given = str(getattr(name, "value", name)), dict(kwargs or {})
    kind = _KINDS.get(name)
    if kind is None:
        raise ValueError(f"lr_scheduler_type: got {name!r}, expected one of {sorted(_KINDS)} (or {PLATEAU!r})")
    _check_known(name, given, kind.options)
    lengths = {"warmup": num_warmup_steps, "total": num_training_steps}
    for length in kind.lengths:
        _check_length(name, length, lengths[length])
    prepared = kind.prepare({**kind.options, **given}, num_warmup_steps or 0, num_training_steps, base_lr)
    return partial(kind.factor, **{key: value for key, value in lengths.items() if key in kind.lengths}, **prepared)


def is_plateau(scheduler: Any) -> bool:
    """Whether a scheduler is stepped with a metric after each evaluation, and not with each update.

    Example:
        >>> is_plateau(None)
        False
    """
    return isinstance(scheduler, ReduceLROnPlateau)


def current_rate(scheduler: Any, optimizer: Any) -> float:
    """The learning rate of the first group, as it is logged.

    That of the scheduler, or of the optimizer where there is no scheduler, or one that looks at a metric.

    Args:
        scheduler: a torch scheduler (any object with ``get_last_lr``), or None.
        optimizer: with ``param_groups``.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
        >>> current_rate(make_lr_scheduler("linear", optimizer, 2, 10), optimizer), current_rate(None, optimizer)
        (0.0, 0.0)

    Source: Trainer 4.57: ``_get_learning_rate``.
    """
    if scheduler is None or is_plateau(scheduler):
        return float(optimizer.param_groups[0]["lr"])
    return float(scheduler.get_last_lr()[0])


# -- formulas: s completed updates, warmup w, total T ----------------------------------------------------------------


def _constant(s: int) -> float:
    return 1.0


def _constant_with_warmup(s: int, *, warmup: int) -> float:
    return _rise(s, warmup) if s < warmup else 1.0


def _linear(s: int, *, warmup: int, total: int) -> float:
    return _rise(s, warmup) if s < warmup else max(0.0, (total - s) / max(1, total - warmup))


def _cosine(s: int, *, warmup: int, total: int, num_cycles: float, min_lr_rate: float = 0.0) -> float:
    return _rise(s, warmup) if s < warmup else _wave(_progress(s, warmup, total), num_cycles, min_lr_rate)


def _cosine_one_ahead(
    s: int, *, warmup: int, total: int, num_cycles: float, min_lr_rate: float, warmup_lr_rate: float | None
) -> float:
    if s >= warmup:
        return _wave(_progress(s + 1, warmup, total), num_cycles, min_lr_rate)
    if warmup_lr_rate is None:
        return (s + 1) / max(1, warmup)
    return warmup_lr_rate + (1 - warmup_lr_rate) * s / max(1, warmup - 1)


def _cosine_with_restarts(s: int, *, warmup: int, total: int, num_cycles: float) -> float:
    if s < warmup:
        return _rise(s, warmup)
    p = _progress(s, warmup, total)
    return 0.0 if p >= 1 else _wave(num_cycles * p % 1.0, 0.5, 0.0)


def _polynomial(s: int, *, warmup: int, total: int, lr_end: float, power: float, base_lr: float) -> float:
    if s < warmup:
        return _rise(s, warmup)
    remaining = 0.0 if s > total else (1 - _progress(s, warmup, total)) ** power
    return ((base_lr - lr_end) * remaining + lr_end) / base_lr


def _inverse_sqrt(s: int, *, warmup: int, timescale: int) -> float:
    return _rise(s, warmup) if s < warmup else 1 / math.sqrt((s + timescale - warmup) / timescale)


def _warmup_stable_decay(
    s: int,
    *,
    warmup: int,
    num_decay_steps: int,
    num_stable_steps: int,
    warmup_type: str,
    decay_type: str,
    min_lr_ratio: float,
    num_cycles: float,
) -> float:
    decayed = s - warmup - num_stable_steps
    if s < warmup:
        share = _RISES[warmup_type](_rise(s, warmup))
    elif decayed < 0:
        share = 1.0
    elif decayed < num_decay_steps:
        share = _FALLS[decay_type](decayed / max(1, num_decay_steps), num_cycles)
    else:
        share = 0.0
    return share if share == 1.0 else max(0.0, share * (1 - min_lr_ratio) + min_lr_ratio)


def _rise(s: int, warmup: int) -> float:
    return s / max(1, warmup)


def _progress(s: int, warmup: int, total: int) -> float:
    return (s - warmup) / max(1, total - warmup)


def _wave(p: float, cycles: float, floor: float) -> float:
    return max(0.0, (1 + math.cos(2 * math.pi * cycles * p)) / 2 * (1 - floor) + floor)


_RISES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: x,
    "cosine": lambda x: (1 - math.cos(math.pi * x)) / 2,
    "1-sqrt": lambda x: 1 - math.sqrt(1 - x),
}
_FALLS: dict[str, Callable[[float, float], float]] = {
    "linear": lambda q, cycles: 1 - q,
    "cosine": lambda q, cycles: _wave(q, cycles, 0.0),
    "1-sqrt": lambda q, cycles: 1 - math.sqrt(q),
}

# -- the table: which lengths and options a schedule takes, and how options become arguments of its formula ------------

_Options = dict[str, Any]
_Prepare = Callable[[_Options, int, "int | None", "float | None"], _Options]


def _as_given(options: _Options, warmup: int, total: int | None, base_lr: float | None) -> _Options:
    for name, value in options.items():
        _check_number(name, value)
    return options


def _polynomial_options(options: _Options, warmup: int, total: int | None, base_lr: float | None) -> _Options:
    base, end = _needed_rate("polynomial", base_lr), _check_number("lr_end", options["lr_end"])
    if not base > end:
        raise ValueError(f"lr_end: got {end}, expected less than the optimizer's learning rate {base}")
    return {**_as_given(options, warmup, total, base_lr), "base_lr": base}


def _timescale(options: _Options, warmup: int, total: int | None, base_lr: float | None) -> _Options:
    timescale = options["timescale"]
    if timescale is None:
        timescale = warmup or 10_000
    if _check_number("timescale", timescale) <= 0:
        raise ValueError(f"timescale: got {timescale}, expected a positive number of updates")
    return {"timescale": timescale}


def _with_floor(options: _Options, warmup: int, total: int | None, base_lr: float | None) -> _Options:
    rate, share = options.pop("min_lr"), options.pop("min_lr_rate")
    if (rate is None) == (share is None):
        raise ValueError(f"lr_scheduler_kwargs: min_lr={rate} and min_lr_rate={share}, expected exactly one of them")
    if share is None:
        share = _check_number("min_lr", rate) / _needed_rate("min_lr", base_lr)
    for name, value in options.items():
        if value is not None:
            _check_number(name, value)
    return {**options, "min_lr_rate": _check_number("min_lr_rate", share)}


def _stable_options(options: _Options, warmup: int, total: int | None, base_lr: float | None) -> _Options:
    decay, stable = options["num_decay_steps"], options["num_stable_steps"]
    if decay is None:
        raise TypeError("lr_scheduler_kwargs: warmup_stable_decay needs num_decay_steps, the updates of its decay")
    if stable is None:
        if total is None:
            raise ValueError("num_training_steps: missing; warmup_stable_decay needs it, or num_stable_steps")
        # Negative where warm-up and decay leave nothing between them: the decay then starts part of the way down.
        stable = total - warmup - int(_check_number("num_decay_steps", decay))
    for name, shapes in (("warmup_type", _RISES), ("decay_type", _FALLS)):
        if options[name] not in shapes:
            raise ValueError(f"{name}: got {options[name]!r}, expected one of {list(shapes)}")
    for name in ("num_decay_steps", "min_lr_ratio", "num_cycles"):
        _check_number(name, options[name])
    return {**options, "num_stable_steps": int(_check_number("num_stable_steps", stable))}


@dataclass(frozen=True)
class _Kind:
    factor: Callable[..., float]
    lengths: tuple[str, ...] = ("warmup", "total")
    options: Mapping[str, Any] = field(default_factory=dict)
    prepare: _Prepare = _as_given


_FLOOR = {"num_cycles": 0.5, "min_lr": None, "min_lr_rate": None}
_STABLE = {
    "num_decay_steps": None,
    "num_stable_steps": None,
    "warmup_type": "linear",
    "decay_type": "cosine",
    "min_lr_ratio": 0.0,
    "num_cycles": 0.5,
}
_KINDS: dict[str, _Kind] = {
    "linear": _Kind(_linear),
    "cosine": _Kind(_cosine, options={"num_cycles": 0.5}),
    "cosine_with_restarts": _Kind(_cosine_with_restarts, options={"num_cycles": 1}),
    "polynomial": _Kind(_polynomial, options={"lr_end": 1e-7, "power": 1.0}, prepare=_polynomial_options),
    "constant": _Kind(_constant, lengths=()),
    "constant_with_warmup": _Kind(_constant_with_warmup, lengths=("warmup",)),
    "inverse_sqrt": _Kind(_inverse_sqrt, lengths=("warmup",), options={"timescale": None}, prepare=_timescale),
    "cosine_with_min_lr": _Kind(_cosine, options=_FLOOR, prepare=_with_floor),
    "cosine_warmup_with_min_lr": _Kind(
        _cosine_one_ahead, options={**_FLOOR, "warmup_lr_rate": None}, prepare=_with_floor
    ),
    "warmup_stable_decay": _Kind(_warmup_stable_decay, lengths=("warmup",), options=_STABLE, prepare=_stable_options),
}

SCHEDULES = (*_KINDS, PLATEAU)
"""The names of all schedules."""


def _check_known(name: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    unknown = sorted(given.keys() - known.keys())
    if unknown:
        raise TypeError(f"lr_scheduler_kwargs: {name} does not know {unknown}; it takes {sorted(known) or 'none'}")


def _parameters_after(fn: Any, first: str) -> dict[str, Any]:
    return {name: p.default for name, p in inspect.signature(fn).parameters.items() if name != first}


def _check_length(name: str, which: str, value: int | None) -> None:
    argument = "num_warmup_steps" if which == "warmup" else "num_training_steps"
    if value is None:
        raise ValueError(f"{argument}: missing; the schedule {name} needs it")
    if value < 0:
        raise ValueError(f"{argument}: got {value}, expected a number of updates >= 0")


def _check_number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"lr_scheduler_kwargs: {name} is {value!r}, expected a finite number")
    return value


def _needed_rate(what: str, base_lr: float | None) -> float:
    if not base_lr:
        raise ValueError(f"base_lr: got {base_lr}; {what} needs the learning rate of the optimizer, and not zero")
    return base_lr


def _base_lr(optimizer: Optimizer) -> float | None:
    rate = optimizer.defaults.get("lr")
    return None if rate is None else float(rate)
