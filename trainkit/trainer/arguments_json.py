"""Arguments as JSON: what checkpoints and trackers hold of them, and files that hold an argument."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from trainkit.trainer.secrets import hidden

_UNWRITABLE = ("device_mesh",)


def as_json(args: Any) -> dict[str, Any]:
    """The fields of a dataclass that its constructor takes, as plain values where they are known kinds.

    Enumerations become their values, configurations dicts, dtypes under a key ``dtype`` their short names; fields that
    end in ``_token`` are hidden. Nothing of the arguments is changed, and no container is shared with them.

    Source: transformers 4.57: ``TrainingArguments.to_dict``.
    """
    names = [field.name for field in dataclasses.fields(args) if field.init]
    content = {name: hidden(name) if name.endswith("_token") else _plain(getattr(args, name)) for name in names}
    return _short_dtypes(content)


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(item) for item in value)
    if isinstance(value, (type, str, torch.Tensor)):
        return value
    if callable(getattr(value, "to_dict", None)):
        return _plain(value.to_dict())
    if type(value).__name__ == "ParallelismConfig":
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        return {name: _plain(item) for name, item in fields.items() if name not in _UNWRITABLE}
    return value


def _short_dtypes(content: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts with each ``torch.dtype`` under a key ``dtype`` as its name without ``torch.``."""
    short: dict[str, Any] = {}
    for key, value in content.items():
        if key == "dtype" and isinstance(value, torch.dtype):
            value = str(value).removeprefix("torch.")
        short[key] = _short_dtypes(value) if isinstance(value, dict) else value
    return short


def read_mapping(name: str, given: Any) -> dict[str, Any]:
    """A configuration that was given as a mapping, or as the path of a JSON file with one, in a dict of its own.

    Args:
        name: of the argument, for errors.
        given: the mapping or the path.

    Raises: TypeError for anything else, OSError if the file cannot be read.

    Example:
        >>> read_mapping("deepspeed", {"gradient_clipping": 1.0})
        {'gradient_clipping': 1.0}
    """
    found = json.loads(Path(given).read_text(encoding="utf-8")) if isinstance(given, (str, Path)) else given
    if not isinstance(found, Mapping):
        raise TypeError(f"{name}: got {type(found).__name__}, expected a dict, a JSON object or the path of one")
    return dict(found)


def as_json_text(content: Mapping[str, Any]) -> str:
    """JSON text, two spaces per level. Infinities and NaN become the texts "Infinity", "-Infinity" and "NaN".

    Raises: TypeError naming the field that JSON cannot hold.

    Example:
        >>> print(as_json_text({"max_grad_norm": math.inf, "where": Path("out")}))
        {
          "max_grad_norm": "Infinity",
          "where": "out"
        }
    """
    return json.dumps({name: _writable(name, value) for name, value in content.items()}, indent=2, allow_nan=False)


def _writable(name: str, value: Any) -> Any:
    if value is None or isinstance(value, (int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value).replace("inf", "Infinity").replace("nan", "NaN")
    if isinstance(value, Mapping):
        return {str(key): _writable(name, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_writable(name, item) for item in value]
    if isinstance(value, (Path, torch.dtype, torch.device)):
        return str(value).removeprefix("torch.")
    raise TypeError(
        f"{name}: JSON cannot hold a {type(value).__name__}; override to_dict in the subclass that added it"
    )
