"""Batches to their device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from trainkit.trainer import foreign


def moved(
    data: Any, device: torch.device | str, *, non_blocking: bool = False, inner: Callable[[Any], Any] | None = None
) -> Any:
    """A tree with its tensors on a device: mappings, lists, tuples and named tuples, and objects that have ``to``.

    Args:
        data: of any kind; it is not changed.
        device: where to.
        non_blocking: do not wait for the copies.
        inner: moves what a mapping or sequence holds; this function does, unless it is given.

    Example:
        >>> moved({"x": (torch.ones(1), "text")}, "cpu")
        {'x': (tensor([1.]), 'text')}

    Source: Trainer 4.57: _prepare_input.
    """
    if isinstance(data, Tensor):
        return data.to(device, non_blocking=non_blocking)
    placed = functools.partial(Tensor.to, device=device, non_blocking=non_blocking)
    return _mapped(placed, data, lambda other: other.to(device), inner)


def placing(device: torch.device | str | None, pin_memory: bool, non_blocking: bool) -> Callable[[Any], Any] | None:
    """How a batch gets to its device.

    Args:
        device: where to; None for the host.
        pin_memory: copy to a CUDA device from page-locked memory, without waiting.
        non_blocking: do not wait for the copies.

    Returns: a function of the batch; None where it stays in host memory.

    Example:
        >>> placing("cpu", True, False) is None
        True
    """
    where = torch.device("cpu" if device is None else device)
    if where.type == "cpu":
        return None
    if not (pin_memory and where.type == "cuda"):
        return lambda batch: moved(batch, where, non_blocking=non_blocking)
    # Nobody else writes to what was just page-locked, and torch keeps it until the copy is done.
    return lambda batch: moved(_mapped(_pinned, batch), where, non_blocking=True)


def _pinned(tensor: Tensor) -> Tensor:
    return tensor.pin_memory() if tensor.device.type == "cpu" else tensor


def _mapped(
    fn: Callable[[Tensor], Tensor],
    data: Any,
    place: Callable[[Any], Any] | None = None,
    inner: Callable[[Any], Any] | None = None,
) -> Any:
    """A tree with ``fn`` of its tensors, and ``place`` of what knows itself how it is moved; ``inner`` of its parts."""
    each: Callable[[Any], Any] = functools.partial(_mapped, fn, place=place) if inner is None else inner
    if isinstance(data, Tensor):
        return fn(data)
    kind: Any = type(data)
    is_tree = kind is dict or (
        isinstance(data, Mapping) and not foreign.is_instance(data, "tensordict", "TensorDictBase")
    )
    if not is_tree and hasattr(data, "to"):
        return data if place is None else place(data)
    if is_tree:
        return kind({key: each(value) for key, value in data.items()})
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return kind(*map(each, data))
    if isinstance(data, (tuple, list)):
        return kind(map(each, data))
    return data
