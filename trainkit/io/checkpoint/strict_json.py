"""JSON that comes back as it was, and that cannot hurt who reads it: limited in size, depth and number of values."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Any, NoReturn

from trainkit.io.checkpoint.errors import DamageError

MAX_BYTES = 16 * 2**20
MAX_DEPTH = 64
MAX_VALUES = 1_000_000
MAX_INT_BITS = 4096
MAX_MEMORY = 64 * 2**20
"""Bytes that the values may take beside a part that grows with the text."""
_MAX_INT_DIGITS = 1300
_TOKEN = re.compile(rb'"[^"]*"?|[][{},:]')
_COST = {ord('"'): 72, ord("{"): 256, ord("["): 120, ord(":"): 160, ord(","): 56, ord("}"): 0, ord("]"): 0}
"""Bytes that CPython takes at most for what each token stands for: a string, an object, an array, an entry, a value."""


def encode(value: Any, what: str) -> bytes:
    """A value as JSON, after a check that :func:`decode` gives the same value back.

    Args:
        value: dictionaries with string keys, lists, strings, integers below 2^4096, finite floats, booleans, None.
        what: its name for error messages.

    Raises:
        TypeError: something else is in it; the text says where.
        ValueError: a float is not finite, or a limit is passed.

    Example:
        >>> encode({"epoch": 3, "rows": [1, 2]}, "cursor")
        b'{"epoch":3,"rows":[1,2]}'
    """
    if _count(value, what, 1) > MAX_VALUES:
        raise ValueError(f"{what}: holds more than {MAX_VALUES} values; large data belongs into tensors")
    data = json.dumps(value, allow_nan=False, separators=(",", ":")).encode("ascii")
    problem = _excess(data)
    if problem:
        raise ValueError(f"{what}: {problem}")
    return data


def _count(value: Any, where: str, depth: int) -> int:
    """How many values there are, all of them checked."""
    if depth > MAX_DEPTH:
        raise ValueError(f"{where[:200]}: nested deeper than {MAX_DEPTH}")
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where}: has the key {key!r}, expected strings as keys")
        return 1 + sum(_count(child, f"{where}.{key}", depth + 1) for key, child in value.items())
    if isinstance(value, list):
        return 1 + sum(_count(child, f"{where}[{i}]", depth + 1) for i, child in enumerate(value))
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: is {value}, which JSON lacks; expected a finite number")
    if isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
        raise ValueError(f"{where}: is an integer of {value.bit_length()} bits, expected at most {MAX_INT_BITS}")
    if value is not None and not isinstance(value, (str, int, float)):
        raise TypeError(
            f"{where}: is a {type(value).__name__}, expected JSON: dict, list, str, int, float, bool or None "
            "(a tuple as list(...), a number of another library as int(...) or float(...))"
        )
    return 1


def decode(data: bytes, what: str) -> Any:
    """The value of JSON bytes that nobody has vouched for.

    Args:
        data: at most 16 MiB.
        what: the file, for error messages.

    Raises: DamageError for anything that :func:`encode` would not have written: bad syntax, a key twice, NaN, too
        deep, too much.

    Example:
        >>> decode(b'{"a":[1,2.5]}', "f.json")
        {'a': [1, 2.5]}
    """
    check_extent(data, what)
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_short,
        )
    except (ValueError, RecursionError) as error:
        raise DamageError(f"{what}: no valid JSON: {error}") from error


def check_extent(data: bytes, what: str) -> None:
    """Count before parsing: a parser would first build what is too much.

    Raises: DamageError if a limit is passed.
    """
    problem = _excess(data)
    if problem:
        raise DamageError(f"{what}: {problem}")


def _excess(data: bytes) -> str | None:
    """Which limit is passed."""
    # One other character makes Python store each of its neighbours in 4 bytes.
    limit = MAX_BYTES if data.isascii() else MAX_BYTES // 4
    if len(data) > limit:
        return f"{len(data)} bytes of JSON, expected at most {limit}"
    # Without escapes a string ends at the next quote.
    bare = data.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in data else data
    memory, depth = MAX_MEMORY + len(data), 0
    # One token at a time: a list of all would be larger than what is to be prevented.
    for match in _TOKEN.finditer(bare):
        token = bare[match.start()]
        memory -= _COST[token]
        if memory < 0:
            return f"holds more values than fit into {MAX_MEMORY} bytes"
        if token in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                return f"nested deeper than {MAX_DEPTH}"
        elif token in b"]}":
            depth -= 1
    return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice[:200]!a} is there twice")
    return found


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is too large for a float")
    return number


def _short(text: str) -> int:
    if len(text) > _MAX_INT_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)
