"""Seams of a step: where execution may run a part of it in its own way, without the part knowing.

A step is one function, but two of its parts can be compiled apart: the loss (with its backward pass) and the update.
The core calls them through :func:`part`; execution installs a runner for the time of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, TypeVar, cast

import torch

PartName = Literal["loss", "update"]
F = TypeVar("F", bound=Callable[..., object])
Runner = Callable[[PartName, Callable[..., object]], Callable[..., object]]

_runner: ContextVar[Runner | None] = ContextVar("runner", default=None)


def part(name: PartName, fn: F) -> F:
    """``fn``, or what the installed runner makes of it; inside a graph always ``fn``."""
    runner = None if torch.compiler.is_compiling() else _runner.get()
    return fn if runner is None else cast(F, runner(name, fn))


@contextmanager
def run_parts_with(runner: Runner) -> Iterator[None]:
    """Install a runner for the scope: ``(name, fn) -> fn`` of the same meaning."""
    token = _runner.set(runner)
    try:
        yield
    finally:
        _runner.reset(token)
