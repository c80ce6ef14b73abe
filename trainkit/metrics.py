"""Metrics as monoids: ``merge`` is associative, ``compute`` is called once at the end.

So they add up exactly over microbatches, ranks and evaluation batches of any size, in constant memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from trainkit.types import Metrics


@runtime_checkable
class Metric(Protocol):
    """A mergeable quantity: a frozen pytree of tensors with an associative ``merge``."""

    def merge(self: Self, other: Self, /) -> Self:
        """The metric of both parts together."""
        ...

    def compute(self) -> Any:
        """The value, as a tensor or a tree of tensors."""
        ...


Self = TypeVar("Self", bound=Metric)


@dataclass(frozen=True)
class Mean:
    """A weighted mean, kept as ``total`` and ``weight`` (0-d tensors).

    merge adds both; compute gives total / weight, NaN for weight zero.

    Example:
        >>> a, b = Mean(torch.tensor(6.0), torch.tensor(3.0)), Mean(torch.tensor(4.0), torch.tensor(1.0))
        >>> a.merge(b).compute()
        tensor(2.5000)
    """

    total: Tensor
    weight: Tensor

    def merge(self, other: Mean, /) -> Mean:
        return Mean(self.total + other.total, self.weight + other.weight)

    def compute(self) -> Tensor:
        return self.total / self.weight


@dataclass(frozen=True)
class Latest:
    """The most recent value (of a learning rate, a norm); merging keeps the right one."""

    value: Tensor

    def merge(self, other: Latest, /) -> Latest:
        return other

    def compute(self) -> Tensor:
        return self.value


def register(cls: type) -> None:
    """Make a frozen metric dataclass a pytree, so that it passes through compiled steps and ``scan``."""
    torch.export.register_dataclass(cls, serialized_type_name=f"trainkit.{cls.__name__}")


for _cls in (Mean, Latest):
    register(_cls)
