"""What a run leaves for its reader: one JSON object per line while it goes, a picture at its end."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from torch import Tensor

Row = Mapping[str, Any]


class JsonLines:
    """A file of rows, one JSON object each; a row is in the file when ``write`` returns.

    Args:
        path: the file; one of an earlier run is replaced, missing folders are made.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with JsonLines(Path(folder, "metrics.jsonl")) as log:
        ...         log.write(step=1, loss=torch.tensor(0.5))
        ...     read_jsonl(Path(folder, "metrics.jsonl"))
        [{'step': 1, 'loss': 0.5}]
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = path.open("w", encoding="utf-8")

    def write(self, **row: Any) -> None:
        """Append a row. Tensors of one element become numbers; NaN and infinities, which JSON lacks, become strings."""
        line = json.dumps({name: _plain(value) for name, value in row.items()}, allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a :class:`JsonLines` file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def plot_curves(rows: Iterable[Row], path: Path, names: Mapping[str, str], *, y_label: str) -> None:
    """A PNG with one curve over the step for each named quantity; rows that lack it are passed over.

    Args:
        rows: each with ``step``.
        path: the file to write.
        names: what to draw, with its label: ``{"loss": "training"}``.
        y_label: the quantity and its unit.

    Raises: ImportError if matplotlib is missing; it comes with ``trainkit[recipes]``.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'trainkit[recipes]'") from error
    # Without pyplot there is no global state and no window system to find.
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step (completed updates)", ylabel=y_label)
    kept = list(rows)
    for name, label in names.items():
        points = [(row["step"], float(row[name])) for row in kept if name in row]
        axes.plot(
            [step for step, _ in points],
            [value for _, value in points],
            label=label,
            marker="." if len(points) < 30 else None,
        )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def describe_folder(folder: Path, notes: Mapping[str, str]) -> str:
    """The files of a run, one line each: name, size, what it is.

    Args:
        folder: the run folder.
        notes: what each file is, by its name.

    Raises: FileNotFoundError for a file that is noted and does not exist.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "a.txt").write_bytes(bytes(2048))
        ...     print(describe_folder(Path(folder), {"a.txt": "zeros"}))
        /...
          a.txt      2 KiB  zeros
    """
    width = max(len(name) for name in notes)
    lines = [f"  {name:<{width}}  {_kibibytes(folder / name):>5} KiB  {note}" for name, note in notes.items()]
    return "\n".join([str(folder), *lines])


def _kibibytes(file: Path) -> int:
    return math.ceil(file.stat().st_size / 1024)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.item()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
