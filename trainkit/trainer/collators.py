"""Rows to batches where the user gives no collator: as they are, or padded by a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from trainkit.trainer import foreign

Collator = Callable[[list[Any]], Any]
_LABELS = ("label", "label_ids")
_FAST_PAD = "Asking-to-pad-a-fast-tokenizer"


def default_data_collator(features: list[Any], return_tensors: str = "pt") -> Any:
    """Stack rows of equal shapes; ``label`` or ``label_ids`` becomes ``labels``.

    The first row decides. ``label`` (or, without it, ``label_ids``) is int64 where it is an integer, or a sequence of
    integers under ``label_ids``, and float32 otherwise. Tensors and arrays are stacked, other values become a tensor;
    None and text are left out. Rows that are tuples or tensors, which the Trainer of transformers refuses, give what
    ``torch.utils.data.default_collate`` gives.

    Args:
        features: rows: mappings, or objects whose attributes are the fields.
        return_tensors: "pt", nothing else.

    Returns: a dict of tensors of shape [rows, ...].

    Raises:
        KeyError: a row lacks a field of the first.
        ValueError: another kind of tensors; rows of different shapes.

    Example:
        >>> default_data_collator([{"x": [1.0, 2.0], "label": 1}, {"x": [3.0, 4.0], "label": 0}])
        {'labels': tensor([1, 0]), 'x': tensor([[1., 2.],
                [3., 4.]])}

    Source: Trainer 4.57: default_data_collator.
    """
    if return_tensors != "pt":
        raise ValueError(f"return_tensors: got {return_tensors!r}, expected 'pt'; trainkit works on torch tensors")
    return stacked_rows(features)


def stacked_rows(features: list[Any], keep: Collection[str] | None = None) -> Any:
    """:func:`default_data_collator`, of some fields only.

    Args:
        features: rows.
        keep: names of the fields of mappings; None for all.

    Returns: as above.

    Example:
        >>> stacked_rows([{"x": 1, "y": 2}, {"x": 3, "y": 4}], ["x"])
        {'x': tensor([1, 3])}
    """
    first = features[0]
    if not isinstance(first, Mapping):
        if isinstance(first, (tuple, list, Tensor, np.ndarray)):
            return default_collate(features)
        features = [vars(row) for row in features]
        first, keep = features[0], None
    batch: dict[str, Tensor] = {}
    label = _label_of(first, keep)
    if label is not None:
        batch["labels"] = _labels([row[label] for row in features], label)
    for name, value in first.items():
        if name in _LABELS or value is None or isinstance(value, str) or (keep is not None and name not in keep):
            continue
        batch[name] = _stacked([row[name] for row in features])
    return batch


def stacked_columns(columns: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """:func:`default_data_collator` of columns, in the form in which a source of ``trainkit.io.data`` gives them.

    Args:
        columns: tensors, :class:`~trainkit.io.data.ragged.Ragged` and lists, one entry per row.

    Returns: the same batch as of rows; None where only rows tell what it is: lists of different lengths, values that
        are no numbers.

    Example:
        >>> stacked_columns({"text": ["a", "b"], "label": torch.tensor([1, 0], dtype=torch.int8)})
        {'labels': tensor([1, 0])}
    """
    batch: dict[str, Tensor] = {}
    name = next((name for name in _LABELS if name in columns), None)
    if name is not None:
        whole = _whole(columns[name])
        # A sequence of integers counts as floats under `label`, for losses over several labels.
        is_class = whole is not None and not whole.is_floating_point() and (whole.dim() == 1) == (name == "label")
        if whole is None or (name == "label_ids" and (whole.dim() == 1 or whole.dtype == torch.bool)):
            return None
        batch["labels"] = whole.to(torch.int64 if is_class else torch.float32)
    for name, column in columns.items():
        if name in _LABELS or (isinstance(column, list) and (column[0] is None or isinstance(column[0], str))):
            continue
        whole = _whole(column)
        if whole is None:
            return None
        batch[name] = _as_python_gives(whole)
    return batch


@dataclass
class DataCollatorWithPadding:
    """Rows padded by a tokenizer (or a feature extractor of sequences); ``label`` or ``label_ids`` becomes ``labels``.

    Labels are not padded.

    Args:
        tokenizer: has ``pad``.
        padding: True or "longest", "max_length", or False.
        max_length: in tokens, for "max_length".
        pad_to_multiple_of: rounds the width up.
        return_tensors: what ``pad`` is asked for.

    Source: Trainer 4.57: DataCollatorWithPadding.
    """

    tokenizer: Any
    padding: bool | str = True
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def __call__(self, features: list[Any]) -> Any:
        # The advice to tokenize and pad in one call does not apply to a batch that is made anew in every epoch.
        advised = getattr(self.tokenizer, "deprecation_warnings", {})
        before = advised.get(_FAST_PAD, False)
        advised[_FAST_PAD] = True
        try:
            batch = self.tokenizer.pad(
                features,
                padding=self.padding,
                max_length=self.max_length,
                pad_to_multiple_of=self.pad_to_multiple_of,
                return_tensors=self.return_tensors,
            )
        finally:
            advised[_FAST_PAD] = before
        for name in _LABELS:
            if name in batch:
                batch["labels"] = batch.pop(name)
        return batch


def default_collator_for(processing_class: Any) -> Collator:
    """The collator where none is given: padding with a tokenizer or a feature extractor of sequences, else stacking.

    Args:
        processing_class: of the Trainer; may be None.

    Example:
        >>> default_collator_for(None) is default_data_collator
        True

    Source: Trainer 4.57: __init__.
    """
    if foreign.is_tokenizer(processing_class) or foreign.is_sequence_feature_extractor(processing_class):
        return DataCollatorWithPadding(processing_class)
    return default_data_collator


def is_default(collator: Any) -> bool:
    """Whether a collator is :func:`default_data_collator`, or that of transformers, which does the same.

    Example:
        >>> is_default(default_data_collator), is_default(len)
        (True, False)
    """
    named = getattr(collator, "__module__", None), getattr(collator, "__name__", None)
    return collator is default_data_collator or named == ("transformers.data.data_collator", "default_data_collator")


def _label_of(first: Mapping[str, Any], keep: Collection[str] | None) -> str | None:
    for name in _LABELS:
        if first.get(name) is not None and (keep is None or name in keep):
            return name
    return None


def _labels(values: list[Any], name: str) -> Tensor:
    first = values[0]
    if isinstance(first, Tensor):
        stacked = _stacked(values)
        if name == "label_ids":
            return stacked
        if first.numel() == 1:
            stacked = stacked.reshape(-1)
        return stacked.to(torch.float32 if stacked.is_floating_point() else torch.int64)
    is_class = isinstance(first, (int, np.integer)) if name == "label" else _begins_with_integer(first)
    return torch.as_tensor(np.stack(values) if isinstance(first, np.ndarray) else values).to(
        torch.int64 if is_class else torch.float32
    )


def _begins_with_integer(sequence: Sequence[Any]) -> bool:
    return isinstance(sequence[0], (int, np.integer)) and not isinstance(sequence[0], bool)


def _stacked(values: list[Any]) -> Tensor:
    first = values[0]
    if isinstance(first, Tensor):
        # `list` says that it is no tensor of tensors; one call, one copy.
        return torch.stack(values)
    if isinstance(first, np.ndarray):
        return torch.from_numpy(np.stack(values))
    return torch.tensor(values)


def _whole(column: Any) -> Tensor | None:
    """A column as one tensor, if its rows are numbers of one shape."""
    if isinstance(column, Tensor):
        return column
    # Whoever has one has imported its module, which takes longer to import than all of this package.
    if not foreign.is_instance(column, "trainkit.io.data.ragged", "Ragged"):
        return None
    lengths = column.lengths
    width = int(lengths[0])
    if not width or not bool((lengths == width).all()):
        return None
    dense: Tensor = column.values.view(len(column), width, *column.values.shape[1:])
    return dense


def _as_python_gives(tensor: Tensor) -> Tensor:
    """The dtype that ``torch.tensor`` gives Python numbers."""
    if tensor.dtype == torch.bool:
        return tensor
    return tensor.to(torch.get_default_dtype() if tensor.is_floating_point() else torch.int64)
