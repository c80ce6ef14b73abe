"""Metrics as monoids: ``merge`` is associative, ``compute`` is called once at the end.

So they add up exactly over microbatches, ranks and evaluation batches of any size, in constant memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from trainkit.types import Metrics

if TYPE_CHECKING:
    import torchmetrics


@runtime_checkable
class Metric(Protocol):
    """A mergeable quantity: a frozen pytree of tensors with an associative ``merge``."""

    def merge(self: Self, other: Self, /) -> Self:
        """The metric of both parts together."""
        ...

    def compute(self) -> Any:
        """The value, as a tensor or a mapping of tensors."""
        ...


Self = TypeVar("Self", bound=Metric)

MetricFn: TypeAlias = Callable[[Tensor, Tensor], Metric]
"""``(outputs, targets) -> Metric``, for example :func:`accuracy`."""


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


@dataclass(frozen=True)
class Sum:
    """A sum: tokens, bytes, floating-point operations. Counts stay exact in int64.

    Example:
        >>> Sum(torch.tensor(2)).merge(Sum(torch.tensor(3))).compute()
        tensor(5)
    """

    value: Tensor

    def merge(self, other: Sum, /) -> Sum:
        return Sum(self.value + other.value)

    def compute(self) -> Tensor:
        return self.value


@dataclass(frozen=True)
class Maximum:
    """The largest value, elementwise; NaN wins.

    Example:
        >>> Maximum(torch.tensor(2.0)).merge(Maximum(torch.tensor(3.0))).compute()
        tensor(3.)
    """

    value: Tensor

    def merge(self, other: Maximum, /) -> Maximum:
        return Maximum(torch.maximum(self.value, other.value))

    def compute(self) -> Tensor:
        return self.value


@dataclass(frozen=True)
class Minimum:
    """The smallest value, elementwise; NaN wins.

    Example:
        >>> Minimum(torch.tensor(2.0)).merge(Minimum(torch.tensor(3.0))).compute()
        tensor(2.)
    """

    value: Tensor

    def merge(self, other: Minimum, /) -> Minimum:
        return Minimum(torch.minimum(self.value, other.value))

    def compute(self) -> Tensor:
        return self.value


@dataclass(frozen=True)
class Perplexity:
    """exp(nats / tokens): the exponential of the mean, not the mean of exponentials.

    Example:
        >>> nats = torch.tensor([2.0, 4.0]).log()
        >>> Perplexity(nats[0], torch.tensor(1)).merge(Perplexity(nats[1], torch.tensor(1))).compute()
        tensor(2.8284)
    """

    total: Tensor
    weight: Tensor

    def merge(self, other: Perplexity, /) -> Perplexity:
        return Perplexity(self.total + other.total, self.weight + other.weight)

    def compute(self) -> Tensor:
        return torch.exp(self.total / self.weight)


@dataclass(frozen=True)
class BitsPerByte:
    """nats / bytes / ln 2: a loss that does not depend on the tokenizer.

    Example:
        >>> BitsPerByte(torch.tensor(2.0).log() * 3, torch.tensor(6)).compute()
        tensor(0.5000)
    """

    total: Tensor
    num_bytes: Tensor

    def merge(self, other: BitsPerByte, /) -> BitsPerByte:
        return BitsPerByte(self.total + other.total, self.num_bytes + other.num_bytes)

    def compute(self) -> Tensor:
        return self.total / self.num_bytes / math.log(2)


@dataclass(frozen=True)
class Counts:
    """Per class, how often it was predicted rightly, predicted at all, and there to be found (int64, [C]).

    precision = right / predicted, recall = right / actual, f1 = 2 right / (predicted + actual), each 0 where its
    denominator is 0; ``macro_f1`` is the mean of f1 over the classes that were predicted or actual.

    Example:
        >>> counts(torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0]]), torch.tensor([0, 1, 1])).compute()["macro_f1"]
        tensor(0.6667)
    """

    right: Tensor
    predicted: Tensor
    actual: Tensor

    def merge(self, other: Counts, /) -> Counts:
        return Counts(self.right + other.right, self.predicted + other.predicted, self.actual + other.actual)

    def compute(self) -> dict[str, Tensor]:
        seen = self.predicted + self.actual
        f1 = _ratio(2 * self.right, seen)
        return {
            "precision": _ratio(self.right, self.predicted),
            "recall": _ratio(self.right, self.actual),
            "f1": f1,
            "macro_f1": f1.sum() / (seen > 0).sum(),
        }


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole.clamp(min=1), 0.0)


def register(cls: type) -> None:
    """Make a frozen metric dataclass a pytree, so that it passes through compiled steps and ``scan``."""
    torch.export.register_dataclass(cls, serialized_type_name=f"trainkit.{cls.__name__}")


for _cls in (Mean, Latest, Sum, Maximum, Minimum, Perplexity, BitsPerByte, Counts):
    register(_cls)


def accuracy(logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Mean:
    """The share of labels that are the largest logit.

    Args:
        logits: [..., C].
        labels: [...], integers.
        ignore_index: labels that do not count.

    Raises: ValueError if labels are not shaped as logits without their last axis.

    Example:
        >>> accuracy(torch.tensor([[2.0, 1.0], [2.0, 1.0], [2.0, 1.0]]), torch.tensor([0, 1, -100])).compute()
        tensor(0.5000)
    """
    return top_k_accuracy(logits, labels, k=1, ignore_index=ignore_index)


def top_k_accuracy(logits: Tensor, labels: Tensor, *, k: int = 5, ignore_index: int = -100) -> Mean:
    """The share of labels among the ``k`` largest logits.

    Args:
        logits: [..., C].
        labels: [...], integers.
        k: from 1 to C.
        ignore_index: labels that do not count.

    Raises: ValueError if labels are not shaped as logits without their last axis, or ``k`` is out of range.

    Example:
        >>> top_k_accuracy(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([1]), k=2).compute()
        tensor(1.)
    """
    _check_rows(logits, labels)
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"k: got {k}, expected 1 to {logits.shape[-1]}, the number of classes")
    best = logits.argmax(-1, keepdim=True) if k == 1 else logits.topk(k, dim=-1).indices
    hits = (best == labels.unsqueeze(-1)).any(-1)
    kept = labels != ignore_index
    return Mean((hits & kept).sum(), kept.sum())


def counts(logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Counts:
    """What precision, recall and F1 need, in the memory of three numbers per class.

    Args:
        logits: [..., C]; the largest is the prediction.
        labels: [...], integers.
        ignore_index: labels that do not count.

    Raises: ValueError if labels are not shaped as logits without their last axis.

    Example:
        >>> counts(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 0])).compute()["recall"]
        tensor([0.5000, 0.0000])
    """
    _check_rows(logits, labels)
    kept = (labels != ignore_index).flatten()
    best, truth = logits.argmax(-1).flatten(), torch.where(kept, labels.flatten(), 0)
    zero = torch.zeros(logits.shape[-1], dtype=torch.int64, device=logits.device)
    one = kept.to(torch.int64)
    right = zero.index_add(0, truth, one * (best == truth))
    return Counts(right, zero.index_add(0, best, one), zero.index_add(0, truth, one))


def perplexity(loss_sum: Tensor, weight: Tensor | float) -> Perplexity:
    """The perplexity of a summed negative log-likelihood (nats) over ``weight`` tokens.

    Example:
        >>> perplexity(torch.tensor(2.0).log() * 3, 3).compute()
        tensor(2.)
    """
    return Perplexity(loss_sum.detach(), torch.as_tensor(weight, device=loss_sum.device))


def bits_per_byte(loss_sum: Tensor, num_bytes: Tensor | float) -> BitsPerByte:
    """The bits per byte of a summed negative log-likelihood (nats) over a text of ``num_bytes`` bytes.

    Example:
        >>> bits_per_byte(torch.tensor(2.0).log() * 3, 3).compute()
        tensor(1.)
    """
    return BitsPerByte(loss_sum.detach(), torch.as_tensor(num_bytes, device=loss_sum.device))


def token_count(labels: Tensor, *, ignore_index: int = -100) -> Sum:
    """How many labels count.

    Example:
        >>> token_count(torch.tensor([3, -100, 5])).compute()
        tensor(2)
    """
    return Sum((labels != ignore_index).sum())


def compute(metrics: Metrics) -> dict[str, Any]:
    """The values of all metrics on the host, with one transfer per device.

    Waits for the device once. Numbers come back as Python numbers, larger tensors as CPU tensors; a metric that
    computes a mapping gives one entry per key, under ``name/key``.

    Example:
        >>> compute({"loss": Mean(torch.tensor(3.0), torch.tensor(2)), "tokens": Sum(torch.tensor(7))})
        {'loss': 1.5, 'tokens': 7}
    """
    values = dict(entry for name, metric in metrics.items() for entry in _entries(name, metric.compute()))
    tensors = {name: value.detach() for name, value in values.items() if isinstance(value, Tensor)}
    for device in {t.device for t in tensors.values()}:
        names = [name for name, t in tensors.items() if t.device == device]
        fetched = _to_host([tensors[name] for name in names])
        values.update((name, t if t.dim() else t.item()) for name, t in zip(names, fetched, strict=True))
    return values


def _entries(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _entries(f"{name}/{key}", part)
    else:
        yield name, value


def _to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of one device, of any dtypes, copied to the CPU as one string of bytes."""
    as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in tensors]
    ends = list(accumulate(len(b) for b in as_bytes))
    host = torch.cat(as_bytes).cpu()
    # Each part gets its own storage: a view in a wider dtype needs an aligned start.
    parts = [host[end - len(b) : end].clone() for b, end in zip(as_bytes, ends, strict=True)]
    return [part.view(t.dtype).reshape(t.shape) for part, t in zip(parts, tensors, strict=True)]


def _check_rows(logits: Tensor, labels: Tensor) -> None:
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels: shape {tuple(labels.shape)} for logits of shape {tuple(logits.shape)}; expected "
            f"{tuple(logits.shape[:-1])}, one label per row of logits, with the classes on the last axis"
        )


@dataclass(frozen=True)
class TorchMetric:
    """The state of a ``torchmetrics`` metric as a value: made by :func:`from_torchmetrics`.

    Args:
        states: its accumulators by name.
        updates: int64 scalar, how many calls they hold; the weight of states that average.
        source: the adapter that knows the reductions; shared, not part of the tree.
    """

    states: dict[str, Tensor]
    updates: Tensor
    source: _TorchMetrics

    def merge(self, other: TorchMetric, /) -> TorchMetric:
        return self.source.merge(self, other)

    def compute(self) -> Any:
        return self.source.compute(self)


def _flatten(metric: TorchMetric) -> tuple[list[Any], _TorchMetrics]:
    return [metric.states, metric.updates], metric.source


def _unflatten(children: Iterable[Any], source: Any) -> TorchMetric:
    states, updates = children
    return TorchMetric(states, updates, source)


pytree.register_pytree_node(TorchMetric, _flatten, _unflatten)


def from_torchmetrics(metric: torchmetrics.Metric) -> Callable[..., TorchMetric]:
    """A ``torchmetrics`` metric as a function ``(preds, target) -> Metric``.

    States merge by the reductions they were declared with: sum, max, min, mean (weighted by the number of calls) and
    cat (memory grows with the data then). The given object is copied and stays as it was; synchronisation over
    processes is off in the copy, since whoever merges does that. For eager evaluation: torchmetrics checks
    values on the host, which a compiled graph cannot.

    Args:
        metric: any configured metric; for a collection, adapt its members one by one.

    Raises:
        ImportError: torchmetrics is missing.
        TypeError: not a torchmetrics metric.
        ValueError: a state with another reduction; it cannot be merged in pairs.

    Example:
        >>> from torchmetrics.classification import MulticlassF1Score
        >>> f1 = from_torchmetrics(MulticlassF1Score(num_classes=2))
        >>> one, two = f1(torch.tensor([0, 1]), torch.tensor([0, 1])), f1(torch.tensor([1]), torch.tensor([0]))
        >>> one.merge(two).compute()
        tensor(0.6667)

    Source: ``torchmetrics.Metric._reduce_states``, whose meaning ``merge`` has.
    """
    source = _TorchMetrics(metric)
    return source.update


class _TorchMetrics:
    """Runs a private copy of a metric; between calls the copy is empty."""

    def __init__(self, metric: torchmetrics.Metric) -> None:
        from torchmetrics import Metric as Base
        from torchmetrics.utilities import data

        if not isinstance(metric, Base):
            raise TypeError(f"metric: got {type(metric).__name__}, expected a torchmetrics.Metric")
        known: dict[Any, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
            data.dim_zero_sum: lambda a, b, share: a + b,
            data.dim_zero_max: lambda a, b, share: torch.maximum(a, b),
            data.dim_zero_min: lambda a, b, share: torch.minimum(a, b),
            data.dim_zero_mean: lambda a, b, share: a * share + b * (1 - share),
            data.dim_zero_cat: lambda a, b, share: torch.cat([a, b]),
        }
        foreign = [name for name, reduction in metric._reductions.items() if reduction not in known]
        if foreign:
            raise ValueError(
                f"metric: state {foreign[0]!r} of {type(metric).__name__} has no reduction among sum, max, min, mean "
                "and cat; collect predictions yourself for this metric"
            )
        self._reductions = {name: known[reduction] for name, reduction in metric._reductions.items()}
        self._worker = metric.clone()
        self._worker.sync_on_compute = False
        self._worker.reset()

    def update(self, *args: Any, **kwargs: Any) -> TorchMetric:
        worker = self._on(next(a.device for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)))
        try:
            worker.update(*args, **kwargs)
            states = {name: _joined(state) for name, state in worker.metric_state.items()}
        finally:
            worker.reset()
        return TorchMetric(states, torch.ones((), dtype=torch.int64, device=worker.device), self)

    def merge(self, a: TorchMetric, b: TorchMetric) -> TorchMetric:
        updates = a.updates + b.updates
        share = a.updates / updates
        states = {name: reduce(a.states[name], b.states[name], share) for name, reduce in self._reductions.items()}
        return TorchMetric(states, updates, self)

    def compute(self, metric: TorchMetric) -> Any:
        worker = self._on(metric.updates.device)
        try:
            for name, state in metric.states.items():
                # A list is what `update` appended to, and `compute` concatenates.
                setattr(worker, name, [state] if isinstance(worker.metric_state[name], list) else state)
            worker._update_count = int(metric.updates)
            return worker.compute()
        finally:
            worker.reset()

    def _on(self, device: torch.device) -> torchmetrics.Metric:
        return self._worker if self._worker.device == device else self._worker.to(device)


def _joined(state: Tensor | list[Tensor]) -> Tensor:
    return (
        torch.cat([part.reshape(-1) if not part.dim() else part for part in state])
        if isinstance(state, list)
        else state
    )
