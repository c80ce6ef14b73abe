"""What goes wrong with data, and how it is told: which batch, which rows, which field, expected and found."""

from __future__ import annotations

from collections.abc import Sequence

SHOWN_ROWS = 16
"""Row numbers that a message lists before it counts the rest."""


class DataWarning(UserWarning):
    """The data are not quite what was asked for, and the run goes on."""


class BatchError(ValueError):
    """Rows that do not make a batch: a key is missing, shapes or dtypes differ, a value is no number.

    Args:
        message: the key, what was expected and what was found.
        position: which row of the batch is at fault, from 0; None if none is.

    Example:
        >>> BatchError("key 'x': expected int64, found str", position=3).position
        3
    """

    def __init__(self, message: str, position: int | None = None) -> None:
        super().__init__(message)
        self.position = position


class LoadError(RuntimeError):
    """A batch could not be loaded: a worker process ended, or an error cannot be raised again under its own type."""


class RowError(Exception):
    """Reading one row failed; the error itself is the cause. It does not leave the package.

    Args:
        row: the dataset index of the row.

    Example:
        >>> RowError(7).row
        7
    """

    def __init__(self, row: int) -> None:
        super().__init__(row)
        self.row = row


def cause_of(error: BaseException) -> BaseException:
    """What to tell of an error: of a :class:`RowError` the error that it stands for.

    Example:
        >>> error = RowError(7)
        >>> error.__cause__ = ValueError("bad pixel")
        >>> cause_of(error)
        ValueError('bad pixel')
    """
    return error.__cause__ or error if isinstance(error, RowError) else error


def explained(error: BaseException, where: str) -> BaseException:
    """An error of the same type that also says where it happened.

    The text is the old one and ``where``. A type that is not made from one text becomes a :class:`LoadError` that names
    the type.

    Args:
        error: what was raised.
        where: which batch and rows.

    Example:
        >>> explained(ValueError("bad pixel"), "batch 3")
        ValueError('bad pixel (batch 3)')
    """
    text = str(error.args[0]) if isinstance(error, KeyError) and len(error.args) == 1 else str(error)
    message = f"{text} ({where})" if text else where
    if not isinstance(error, StopIteration):
        try:
            again = type(error)(message)
        except Exception:  # Whatever a foreign constructor raises, the first error is the one to tell.
            again = None
        if again is not None and where in str(again):
            return again
    return LoadError(f"{type(error).__name__}: {message}")


def numbers(rows: Sequence[int]) -> str:
    """Row numbers for a message, the first ones and how many there are.

    Example:
        >>> numbers([4, 8]), numbers(range(100))
        ('[4, 8]', '[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, ...] (100 rows)')
    """
    shown = ", ".join(str(row) for row in rows[:SHOWN_ROWS])
    return f"[{shown}]" if len(rows) <= SHOWN_ROWS else f"[{shown}, ...] ({len(rows)} rows)"
