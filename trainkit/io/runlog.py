"""What a run leaves for its reader: one JSON object per line while it goes, a picture at its end."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from trainkit.accumulate import merge_metrics
from trainkit.metrics import Metric
from trainkit.types import Metrics

Row = Mapping[str, Any]


class JsonLines:
    """A file of rows, one JSON object each; a row is in the file when ``write`` returns.

    Args:
        path: the file; one of an earlier run is replaced, missing folders are made.
        until: a run that goes on from this step keeps the rows up to it, each of which has a ``step``. Rows after it,
            and a last line that was not finished, are left out: the run writes them again.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with JsonLines(Path(folder, "metrics.jsonl")) as log:
        ...         log.write(step=1, loss=torch.tensor(0.5))
        ...     read_jsonl(Path(folder, "metrics.jsonl"))
        [{'step': 1, 'loss': 0.5}]
    """

    def __init__(self, path: Path, *, until: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if until is None or not path.exists():
            self._file: TextIO = path.open("w", encoding="utf-8")
            return
        kept = path.with_name(f".{path.name}.kept")
        kept.write_text("".join(_lines_until(path, until)), encoding="utf-8")
        # Renamed, so that a run that ends here leaves the rows of one file or of the other.
        os.replace(kept, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, **row: Any) -> None:
        """Append a row. Tensors of one element become numbers; NaN and infinities, which JSON lacks, become strings."""
        line = json.dumps({name: _plain(value) for name, value in row.items()}, allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Wait until all rows are on the disk: before a checkpoint is saved, which then never knows more than they."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _lines_until(path: Path, step: int) -> Iterator[str]:
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["step"] <= step:
            yield line


class MetricWindow:
    """Metrics merged since they were last read, which a resumed run goes on with.

    Example:
        >>> import torch
        >>> from trainkit.metrics import Mean
        >>> window = MetricWindow()
        >>> window.add({"loss": Mean(torch.tensor(6.0), torch.tensor(2.0))})
        >>> resumed = MetricWindow(window.state_dict())
        >>> resumed.add({"loss": Mean(torch.tensor(0.0), torch.tensor(1.0))})
        >>> resumed.read(), resumed.read()
        ({'loss': 2.0}, {})
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        self._metrics: Metrics = {}
        self._saved: dict[str, Any] = dict(state or {})

    def add(self, metrics: Metrics) -> None:
        """Merge the metrics of a step."""
        known = self._saved.keys() & metrics.keys()
        before = {name: _restored(self._saved.pop(name), metrics[name]) for name in known}
        self._metrics = merge_metrics(merge_metrics(self._metrics, before), metrics)

    def read(self) -> dict[str, float]:
        """The value of each metric; the window is empty afterwards. Waits for the device.

        Raises: ValueError if a metric of the saved window did not come again.
        """
        if self._saved and self._metrics:
            raise ValueError(
                f"metrics: {sorted(self._saved)} of the saved window did not come again since; expected them"
            )
        values = {name: float(metric.compute()) for name, metric in self._metrics.items()}
        self._metrics = {}
        return values

    def state_dict(self) -> dict[str, list[Any]]:
        """The numbers of the window by metric: JSON, exact."""
        found = {name: [t.tolist() for t in pytree.tree_leaves(metric)] for name, metric in self._metrics.items()}
        return {**self._saved, **found}


def _restored(numbers: list[Any], like: Metric) -> Metric:
    leaves, structure = pytree.tree_flatten(like)
    tensors = [torch.tensor(n, dtype=t.dtype, device=t.device) for n, t in zip(numbers, leaves, strict=True)]
    metric: Metric = pytree.tree_unflatten(tensors, structure)
    return metric


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
    """The files and folders of a run, one line each: name, size, what it is.

    Args:
        folder: the run folder.
        notes: what each is, by its name.

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


def _kibibytes(path: Path) -> int:
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return math.ceil(sum(file.stat().st_size for file in files) / 1024)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.item()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
