"""Floating-point operations of a batch, as the model itself estimates them."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn

_counts: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
"""Parameters outside of embeddings, per model: counting them walks the module tree twice."""
_silent: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models without an estimate: a module takes long to find that it lacks an attribute."""


def floating_point_ops(model: Any, inputs: Mapping[str, Any]) -> int:
    """The operations of one forward and backward pass: what the model's own method says, 0 where it has none.

    That of transformers' models is 6 * elements of the main input * parameters outside of embeddings; here the
    parameters are counted once per model, in the first call.

    Args:
        model: maybe with a method ``floating_point_ops(inputs)``.
        inputs: keyword arguments of the model.

    Example:
        >>> class Model(nn.Module):
        ...     def floating_point_ops(self, inputs):
        ...         return 2 * len(inputs["x"])
        >>> floating_point_ops(Model(), {"x": [1, 2, 3]}), floating_point_ops(nn.Linear(2, 1), {"x": [1]})
        (6, 0)

    Source: Trainer 4.57: ``floating_point_ops``.
    """
    is_module = isinstance(model, nn.Module)
    if is_module and model in _silent:
        return 0
    method = getattr(model, "floating_point_ops", None)
    if method is None:
        if is_module:
            _silent.add(model)
        return 0
    owner = getattr(method, "__self__", None)
    if owner is None or getattr(method, "__func__", None) is not _common_estimate():
        return int(method(inputs))
    if owner not in _counts:
        _counts[owner] = owner.num_parameters(exclude_embeddings=True)
    return 6 * int(owner.estimate_tokens(inputs)) * _counts[owner]


def _common_estimate() -> Any:
    """The method that transformers' models inherit; None where transformers is not imported."""
    module = sys.modules.get("transformers.modeling_utils")
    return getattr(getattr(module, "ModuleUtilsMixin", None), "floating_point_ops", None)
