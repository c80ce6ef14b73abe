"""What all losses ask of their arguments, before they compute anything."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trainkit.metrics import Metric, MetricFn

IGNORED = -100
"""The label that metric functions see in the place of every ignored one."""


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor itself, or in float32 if its dtype is narrower: losses are summed in no less."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def readable(tensor: Tensor) -> bool:
    """Whether the values can be looked at without waiting: a plain CPU tensor, outside of graphs and of vmap."""
    if torch.compiler.is_compiling() or type(tensor) is not Tensor or not tensor.is_cpu:
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def check_floating(name: str, tensor: Tensor | None) -> Tensor:
    """A tensor of real numbers with at least one element.

    Raises: TypeError for None, no tensor, or another dtype; ValueError for an empty one.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, expected a floating tensor")
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: dtype {tensor.dtype}, expected a floating one")
    if not tensor.numel():
        raise ValueError(f"{name}: shape {tuple(tensor.shape)} holds nothing; drop empty batches in the loader")
    return tensor


def check_labels(labels: Tensor | None, logits: Tensor, *, ignore_index: int, classes: int | None = None) -> Tensor:
    """Class indices for logits, as int64.

    Their values are looked at where that costs no waiting: eagerly, on the CPU.

    Args:
        labels: integers, shaped as ``logits`` without the last axis.
        logits: [..., C], floating; checked too.
        ignore_index: the label that needs not be a class.
        classes: how many there are; the size of the last axis if None.

    Raises:
        TypeError: None, no tensor, or labels that are no integers.
        ValueError: shapes that disagree, nothing to learn from, or a label that is no class.
    """
    check_floating("logits", logits)
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: got {type(labels).__name__}, expected a tensor of class indices")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(
            f"labels: dtype {labels.dtype}, expected integers (class indices, int64). For numbers to predict use a "
            "regression loss, for probabilities of classes soft_classification, for yes-or-no labels multi_label"
        )
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels: shape {tuple(labels.shape)} for logits (or hidden states) of shape {tuple(logits.shape)}; "
            f"expected {tuple(logits.shape[:-1])}. Classes go on the last axis, and each row has one label"
        )
    labels = labels.long()
    if readable(labels):
        _check_range(labels, logits.shape[-1] if classes is None else classes, ignore_index)
    return labels


def _check_range(labels: Tensor, classes: int, ignore_index: int) -> None:
    low, high = (int(extreme) for extreme in labels.aminmax())
    if low >= 0 and high < classes:
        return
    low, high = (int(extreme) for extreme in torch.where(labels == ignore_index, 0, labels).aminmax())
    if low < 0 or high >= classes:
        raise ValueError(
            f"labels: values from {low} to {high}, expected 0 to {classes - 1} ({classes} classes), or "
            f"ignore_index={ignore_index}. Check the labels' mapping, or the size of the model's last layer"
        )


def check_same_shape(name: str, tensor: Tensor | None, reference_name: str, reference: Tensor) -> Tensor:
    """A tensor in the shape of another: losses do not broadcast, since [B, 1] against [B] would give [B, B].

    Raises: TypeError if it is no tensor; ValueError if shapes differ.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, expected a tensor like {reference_name}")
    if tensor.shape != reference.shape:
        raise ValueError(
            f"{name}: shape {tuple(tensor.shape)}, but {reference_name} has {tuple(reference.shape)}; expected equal "
            "shapes. Use squeeze, unsqueeze or reshape on one of them"
        )
    return tensor


def check_share(name: str, value: float) -> None:
    """A number in [0, 1).

    Raises: ValueError.
    """
    if not 0 <= value < 1:
        raise ValueError(f"{name}: got {value}, expected a number in [0, 1)")


def check_not_negative(name: str, value: float) -> None:
    """A finite number that is at least zero.

    Raises: ValueError.
    """
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name}: got {value}, expected a finite number >= 0")


def extra_metrics(
    functions: Mapping[str, MetricFn] | None, outputs: Tensor, targets: Tensor, ignore_index: int = IGNORED
) -> dict[str, Metric]:
    """The metrics that the user asked for, on detached outputs; ignored labels read -100."""
    if not functions:
        return {}
    if ignore_index != IGNORED:
        targets = targets.masked_fill(targets == ignore_index, IGNORED)
    return {name: function(outputs.detach(), targets) for name, function in functions.items()}
