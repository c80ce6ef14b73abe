"""A dataclass becomes a command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TypeVar

Config = TypeVar("Config")


def parse(config: type[Config], *, description: str | None = None, args: Sequence[str] | None = None) -> Config:
    """An instance of a dataclass from command-line options: ``--seq-len 256`` sets ``seq_len``.

    Every field is an option; its help is the string below the field, its default the field's. ``--help`` prints
    them all and exits.

    Args:
        config: a dataclass with typed fields.
        description: what ``--help`` says first; None takes the docstring of the dataclass.
        args: the command line; None reads that of the process.

    Raises:
        ImportError: tyro is not installed; it comes with ``trainkit[recipes]``.
        SystemExit: after ``--help`` (code 0), or for an option that does not fit (code 2), explained on stderr.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Options:
        ...     steps: int = 1000
        >>> parse(Options, args=["--steps", "3"])
        Options(steps=3)

    Source: tyro.cli (tyro 1.0).
    """
    try:
        import tyro
    except ImportError as error:
        raise ImportError("command lines need tyro: pip install 'trainkit[recipes]'") from error
    return tyro.cli(config, prog=_command(), description=description, args=args)


def _command() -> str | None:
    """How the process was started, where that was ``python -m``; None leaves it to argparse."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return None if spec is None else f"python -m {spec.name}"
