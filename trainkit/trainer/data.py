"""What a model takes of the data: columns by its signature, and special tokens that agree with the tokenizer's."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

from trainkit.trainer import collators, foreign

_log = logging.getLogger(__name__)
_TOKENS = ("eos_token_id", "bos_token_id", "pad_token_id")


def is_table(dataset: Any) -> bool:
    """Whether a data set has columns that can be dropped once for all rows: a ``datasets.Dataset``.

    Example:
        >>> is_table([{"x": 1}])
        False
    """
    return foreign.is_hf_dataset(dataset)


def signature_columns(model: Any, label_names: Sequence[str]) -> list[str] | None:
    """The names that a model takes: those of ``forward``, then ``label``, ``label_ids`` and the label names.

    A model that takes everything by ``**kwargs`` and names nothing, takes every column. One that names some takes
    these: models of transformers have a ``**kwargs`` for options of their layers, not for columns.

    Args:
        model: below wrappers, and below PEFT.
        label_names: further names.

    Returns: the names; None for all.

    Example:
        >>> import torch
        >>> class Named(torch.nn.Module):
        ...     def forward(self, x, labels=None, **options): ...
        >>> class Open(torch.nn.Module):
        ...     def forward(self, **inputs): ...
        >>> signature_columns(Named(), ["labels"]), signature_columns(Open(), ["labels"])
        (['x', 'labels', 'options', 'label', 'label_ids'], None)

    Source: Trainer 4.57: _set_signature_columns_if_needed.
    """
    parameters = foreign.forward_parameters(model)
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    is_open = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if is_open and all(p.kind in several for p in parameters.values()):
        return None
    return list(dict.fromkeys([*parameters, "label", "label_ids", *label_names]))


def without_unused_columns(dataset: Any, columns: Sequence[str] | None, description: str | None = None) -> Any:
    """A ``datasets.Dataset`` with only some of its columns.

    Args:
        dataset: it is not changed.
        columns: to keep; None keeps all.
        description: of the data set, for the log.

    Returns: a data set; the same one if nothing is dropped.

    Raises: ValueError if no column would be left.

    Example:
        >>> from datasets import Dataset
        >>> without_unused_columns(Dataset.from_dict({"x": [1], "text": ["a"]}), ["x", "labels"]).column_names
        ['x']

    Source: Trainer 4.57: _remove_unused_columns.
    """
    unused = [] if columns is None else [name for name in dataset.column_names if name not in columns]
    if not unused:
        return dataset
    if len(unused) == len(dataset.column_names):
        raise ValueError(
            f"dataset: none of its columns ({', '.join(unused)}) is an input of the model, which takes "
            f"{', '.join(columns or ())}. Rename the columns, or pass remove_unused_columns=False"
        )
    _say_unused(unused, description)
    return dataset.remove_columns(unused)


class ColumnsOnly:
    """A collator that is shown only some fields of each row that is a dict.

    Args:
        collator: makes the batch.
        columns: to keep; None keeps all.
        description: of the data set, for the log, which lists what is left out once.

    Example:
        >>> ColumnsOnly(lambda rows: rows, ["x"])([{"x": 1, "text": "a"}])
        [{'x': 1}]

    Source: Trainer 4.57: _get_collator_with_removed_columns.
    """

    def __init__(
        self, collator: Callable[[list[Any]], Any], columns: Sequence[str] | None, description: str | None = None
    ) -> None:
        self.collator, self.description = collator, description
        self.columns = None if columns is None else frozenset(columns)
        self._has_said = columns is None

    def __call__(self, rows: list[Any]) -> Any:
        if self.columns is None:
            return self.collator(rows)
        if not self._has_said and rows and isinstance(rows[0], dict):
            self._has_said = True
            _say_unused([name for name in rows[0] if name not in self.columns], self.description)
        if collators.is_default(self.collator):
            return collators.stacked_rows(rows, self.columns)
        return self.collator([_kept(row, self.columns) if isinstance(row, dict) else row for row in rows])


def align_special_tokens(model: Any, processing_class: Any) -> dict[str, int | None]:
    """Let the configurations of a model follow the special tokens of its tokenizer.

    Where the end, begin or padding token of ``model.config`` or ``model.generation_config`` differs from the
    tokenizer's, both take the tokenizer's. The end tokens of the generation config may be several: the tokenizer's
    becomes the first of them, and the others stay. One warning in the log names what changed.

    Args:
        model: its configurations are changed; without ``config`` nothing happens.
        processing_class: a tokenizer, or a processor with a ``tokenizer``; with anything else nothing happens.

    Returns: what changed.

    Source: Trainer 4.57: _align_special_tokens.
    """
    tokenizer = processing_class
    if foreign.is_processor(processing_class):
        tokenizer = getattr(processing_class, "tokenizer", None)
    config = getattr(foreign.unwrapped(model), "config", None)
    if config is None or not foreign.is_tokenizer(tokenizer):
        return {}
    generation = getattr(foreign.unwrapped(model), "generation_config", None)
    changed: dict[str, int | None] = {}
    for name in _TOKENS:
        token = getattr(tokenizer, name)
        if getattr(config, name, None) == token and (generation is None or _has(generation, name, token)):
            continue
        changed[name] = token
        setattr(config, name, token)
        if generation is not None:
            setattr(generation, name, _with_first(generation, token) if name == "eos_token_id" else token)
    if changed:
        _log.warning("The tokenizer has other special tokens than the model; its configuration now has %s.", changed)
    return changed


def _has(generation: Any, name: str, token: int | None) -> bool:
    found = getattr(generation, name, None)
    return token in found if isinstance(found, (list, tuple)) else found == token


def _with_first(generation: Any, token: int | None) -> list[int]:
    found = getattr(generation, "eos_token_id", None)
    before = list(found) if isinstance(found, (list, tuple)) else [found]
    return [one for one in dict.fromkeys([token, *before]) if one is not None]


def _kept(row: dict[str, Any], columns: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name in columns}


def _say_unused(names: Sequence[str], description: str | None) -> None:
    if names:
        where = f" of the {description} set" if description else ""
        _log.info("Columns%s that the model does not take are left out: %s.", where, ", ".join(names))
