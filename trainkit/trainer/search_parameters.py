"""The hyperparameters of a trial, put into the arguments as their fields are declared."""

from __future__ import annotations

import copy
import math
import numbers
import typing
import warnings
from collections.abc import Mapping
from dataclasses import fields
from types import NoneType
from typing import Any

from trainkit.trainer.state import as_python

_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def apply_parameters(args: Any, parameters: Mapping[str, Any]) -> None:
    """Set fields of the arguments, each value read as its field is declared, and check the arguments again.

    Nothing is set if anything is refused. Names that the arguments do not have are left out with one warning.

    Args:
        args: a ``TrainingArguments``, changed in place.
        parameters: field to value, as a search library gives them.

    Raises: TypeError, ValueError naming the field, what came, and what is expected.

    Example:
        >>> from trainkit.trainer.arguments import TrainingArguments
        >>> args = TrainingArguments("out", report_to="none")
        >>> apply_parameters(args, {"learning_rate": "1e-3", "bf16": "False", "seed": 7.0})
        >>> args.learning_rate, args.bf16, args.seed
        (0.001, False, 7)

    Source: Trainer 4.57: ``_hp_search_setup``, which casts to the type of the value before and does not check.
    """
    known = {field.name for field in fields(args) if field.init}
    unknown = sorted(parameters.keys() - known)
    if unknown:
        warnings.warn(
            f"hp_space: {', '.join(unknown)}: no field of {type(args).__name__}, left out", UserWarning, stacklevel=3
        )
    hints = typing.get_type_hints(type(args))
    changed = copy.copy(args)
    for name, value in parameters.items():
        if name in known:
            setattr(changed, name, as_declared(name, value, hints[name]))
    changed.__post_init__()
    vars(args).update(vars(changed))


def as_declared(name: str, value: Any, declared: Any) -> Any:
    """A value as a field of a type wants it: text is read, whole floats become integers, NumPy's numbers Python's.

    Args:
        name: of the field, for errors.
        value: what came.
        declared: a type, or a union of types.

    Returns: the value itself where it fits already, or where none of the types is a boolean or a number.

    Raises: TypeError for None where it is not declared, ValueError for text that cannot be read.

    Example:
        >>> as_declared("bf16", "False", bool), as_declared("eval_steps", "0.5", float | None)
        (False, 0.5)
    """
    kinds = typing.get_args(declared) or (declared,)
    if value is None:
        if NoneType not in kinds and Any not in kinds:
            raise TypeError(f"{name}: got None, expected {_words(kinds)}")
        return None
    value = as_python(value)
    if any(_is(value, kind) for kind in kinds):
        return value
    for kind in (bool, int, float):
        if kind in kinds and (found := _READERS[kind](name, value)) is not None:
            return found
    if any(kind in kinds for kind in (bool, int, float)):
        raise ValueError(f"{name}: got {value!r}, expected {_words(kinds)}")
    return value


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is of a type as it stands; a boolean is no number."""
    if kind is Any:
        return True
    kind = typing.get_origin(kind) or kind
    return isinstance(kind, type) and isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool)


def _boolean(name: str, value: Any) -> bool | None:
    if isinstance(value, str):
        return _WORDS.get(value.strip().lower())
    return bool(value) if isinstance(value, numbers.Real) and value in (0, 1) else None


def _integer(name: str, value: Any) -> int | None:
    number = _number(name, value)
    if number is None or not math.isfinite(number):
        return None
    if not number.is_integer():
        warnings.warn(f"{name}: got {value!r} for an integer, which becomes {int(number)}", UserWarning, stacklevel=5)
    return int(value) if isinstance(value, str) and value.strip().lstrip("+-").isdigit() else int(number)


def _number(name: str, value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (str, numbers.Real)):
        return None
    try:
        return float(value)
    except ValueError:
        return None


_READERS: dict[type, typing.Callable[[str, Any], Any]] = {bool: _boolean, int: _integer, float: _number}


def _words(kinds: tuple[Any, ...]) -> str:
    return " or ".join("None" if kind is NoneType else getattr(kind, "__name__", str(kind)) for kind in kinds)
