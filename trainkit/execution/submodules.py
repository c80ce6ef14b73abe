"""Running chosen submodules of a module in another way, for the time of a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

Forwards = list[tuple[nn.Module, Callable[..., Any]]]


def matching(module: nn.Module, pattern: str) -> dict[str, nn.Module]:
    """The outermost submodules whose name matches, as a shell would match it, by name.

    Raises: ValueError if there is none; a few names are listed.

    Example:
        >>> list(matching(nn.Sequential(nn.Linear(1, 1), nn.ReLU()), "[01]"))
        ['0', '1']
    """
    found: dict[str, nn.Module] = {}
    for name, submodule in module.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if name and not inside and fnmatchcase(name, pattern):
            found[name] = submodule
    if not found:
        names = ", ".join(repr(name) for name, _ in list(module.named_modules())[1:6])
        raise ValueError(f"pattern: {pattern!r} matches no submodule; names look like {names}")
    return found


@contextmanager
def forwards(replacements: Forwards) -> Iterator[None]:
    """Within the scope, submodules run these functions as their ``forward``."""
    for submodule, forward in replacements:
        submodule.__dict__["forward"] = forward
    try:
        yield
    finally:
        for submodule, _ in replacements:
            del submodule.__dict__["forward"]
