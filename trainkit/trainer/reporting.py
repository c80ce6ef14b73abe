"""Metrics about a run for people and files: rates, tables, JSON, memory."""

from __future__ import annotations

import datetime
import gc
import json
import os
import sys
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from trainkit.trainer.checkpoints import STATE
from trainkit.trainer.state import TrainerState, plain, read_object, write_whole


def speed_metrics(
    prefix: str,
    start_time: float,
    num_samples: float | None = None,
    num_steps: float | None = None,
    num_tokens: float | None = None,
) -> dict[str, float]:
    """Run time since a moment, and how much was done per second of it.

    Args:
        prefix: of the names: ``<prefix>_runtime`` and so on.
        start_time: ``time.time()`` at the beginning.
        num_samples: examples seen; None gives no rate.
        num_steps: updates or batches.
        num_tokens: tokens.

    Returns: ``_runtime`` in seconds to four decimals, ``_samples_per_second``, ``_steps_per_second`` and
        ``_tokens_per_second`` to three.

    Example:
        >>> list(speed_metrics("eval", time.time() - 2.0, num_samples=100))
        ['eval_runtime', 'eval_samples_per_second']

    Source: Trainer 4.57: ``speed_metrics``.
    """
    runtime = time.time() - start_time
    found = {f"{prefix}_runtime": round(runtime, 4)}
    if runtime == 0:
        return found
    for name, amount in (("samples", num_samples), ("steps", num_steps), ("tokens", num_tokens)):
        if amount is not None:
            found[f"{prefix}_{name}_per_second"] = round(amount / runtime, 3)
    return found


def metrics_format(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics as people read them, in a copy.

    Bytes (``_mem_``) in MB, times (``_runtime``) as h:mm:ss.cc, ``total_flos`` in GF (2^30), other floats to four
    decimals.

    Args:
        metrics: by name, as ``train``, ``evaluate`` and ``predict`` return them.

    Returns: the copy.

    Example:
        >>> metrics_format({"train_runtime": 61.25, "total_flos": 5e9, "train_mem_cpu_alloc_delta": 3 << 20})
        {'train_runtime': '0:01:01.25', 'total_flos': '4GF', 'train_mem_cpu_alloc_delta': '3MB'}

    Source: Trainer 4.57: ``metrics_format``.
    """
    return {name: _shown(name, value) for name, value in metrics.items()}


def _shown(name: str, value: Any) -> Any:
    if "_mem_" in name and isinstance(value, int):
        return f"{value >> 20}MB"
    if "_runtime" in name:
        whole = int(value)
        return f"{datetime.timedelta(seconds=whole)}.{int(abs(value - whole) * 100):02d}"
    if name == "total_flos":
        return f"{int(value) >> 30}GF"
    return round(value, 4) if isinstance(value, float) else value


def log_metrics(split: str, metrics: Mapping[str, Any]) -> None:
    """Print metrics as a table, sorted by name.

    Args:
        split: what they are of: ``train``, ``eval``, ``test``.
        metrics: by name.

    Example:
        >>> log_metrics("eval", {"eval_loss": 0.25, "epoch": 1.0})
        ***** eval metrics *****
          epoch     =  1.0
          eval_loss = 0.25

    Source: Trainer 4.57: ``log_metrics``.
    """
    shown = metrics_format(metrics)
    name_width = max((len(name) for name in shown), default=0)
    value_width = max((len(str(value)) for value in shown.values()), default=0)
    print(f"***** {split} metrics *****")
    for name in sorted(shown):
        print(f"  {name:<{name_width}} = {shown[name]!s:>{value_width}}")


def save_metrics(
    output_dir: str | os.PathLike[str], split: str, metrics: Mapping[str, Any], *, combined: bool = True
) -> None:
    """Write ``<split>_results.json``, and bring ``all_results.json`` up to date.

    Args:
        output_dir: an existing folder.
        split: first part of the file's name.
        metrics: by name; numbers of NumPy and torch become plain ones.
        combined: whether to add them to those in ``all_results.json``.

    Raises: ValueError if ``all_results.json`` is there and no JSON object; TypeError for a value that JSON cannot hold.
        Nothing is written then.

    Source: Trainer 4.57: ``save_metrics``.
    """
    folder = Path(output_dir)
    files = {folder / f"{split}_results.json": dict(metrics)}
    if combined:
        path = folder / "all_results.json"
        before = read_object(path) if path.exists() else {}
        files[path] = {**before, **metrics}
    texts = {path: json.dumps(values, indent=4, sort_keys=True, default=plain) for path, values in files.items()}
    for path, text in texts.items():
        write_whole(path, text)


def save_state(output_dir: str | os.PathLike[str], state: TrainerState) -> None:
    """Write ``trainer_state.json`` into a folder.

    Args:
        output_dir: an existing folder.
        state: of the run.

    Source: Trainer 4.57: ``save_state``.
    """
    state.save_to_json(Path(output_dir) / STATE)


class MemoryTracker:
    """Memory that the stages of a Trainer took: ``init``, ``train``, ``eval``, ``test``.

    For each stage ``<stage>_mem_cpu_alloc_delta`` is what this process holds at its end less what it held at its
    beginning, and ``_peaked_delta`` how much more than at the end it held in between; ``gpu`` is the same for the
    memory of tensors on the current accelerator, where there is one with such counters. All in bytes. A stage within a
    stage is not measured.

    The peak of the process is the kernel's own high-water mark, which Linux sets back at a stage's beginning. Where
    that is not possible the mark is of the whole life of the process, and a peak below it is not seen.

    Args:
        skip: measure nothing.

    Example:
        >>> tracker = MemoryTracker()
        >>> tracker.start("init"), tracker.stop("init"), tracker.start("eval")
        (None, None, None)
        >>> metrics = {"eval_loss": 1.0}
        >>> tracker.stop_and_update_metrics("eval", metrics)
        >>> [name for name in metrics if "cpu_alloc" in name]
        ['init_mem_cpu_alloc_delta', 'eval_mem_cpu_alloc_delta']

    Source: Trainer 4.57: ``TrainerMemoryTracker``.
    """

    def __init__(self, *, skip: bool = False) -> None:
        self.skip_memory_metrics = skip
        self.cur_stage: str | None = None
        self.init_reported = False
        self._begin: dict[str, dict[str, int]] = {}
        self._found: dict[str, dict[str, int]] = {}

    def start(self, stage: str) -> None:
        """Begin a stage, unless another one is under way."""
        if self.skip_memory_metrics or self.cur_stage not in (None, stage):
            return
        self.cur_stage = stage
        gc.collect()
        _reset_peaks()
        self._begin[stage] = {**_held(), "peak": _process_memory()[1]}

    def stop(self, stage: str) -> None:
        """End a stage, if it is the one under way."""
        if self.skip_memory_metrics or self.cur_stage != stage:
            return
        self.cur_stage = None
        peaks = _device_peak()
        mark, begin = _process_memory()[1], self._begin[stage]
        gc.collect()
        end = _held()
        # A mark that did not move is older than the stage: all that is known then are both ends.
        peaks["cpu"] = mark if mark > begin["peak"] else max(begin["cpu"], end["cpu"])
        self._found[stage] = {
            f"{kind}_{what}": value
            for kind in end
            for what, value in (
                ("alloc", end[kind] - begin[kind]),
                ("peaked", max(0, peaks[kind] - end[kind])),
            )
        }

    def stop_and_update_metrics(self, stage: str, metrics: dict[str, Any]) -> None:
        """End a stage and add what it took; the first one that reports brings ``init`` with it.

        Args:
            stage: the one under way; another one adds nothing.
            metrics: receives the names.
        """
        if self.skip_memory_metrics or self.cur_stage != stage:
            return
        self.stop(stage)
        report_init = not self.init_reported and "init" in self._found
        self.init_reported = True
        for name in (["init"] if report_init else []) + [stage]:
            metrics.update({f"{name}_mem_{key}_delta": value for key, value in self._found[name].items()})
        if report_init:
            metrics.update({f"before_init_mem_{k}": v for k, v in self._begin["init"].items() if k != "peak"})


def _held() -> dict[str, int]:
    """Bytes in use now."""
    found = {"cpu": _process_memory()[0]}
    if _counts_device_memory():
        found["gpu"] = torch.accelerator.memory_allocated()
    return found


def _process_memory() -> tuple[int, int]:
    """Bytes that this process holds in memory, and the high-water mark of it (0 where the system has none)."""
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        sizes = {name: value for name, _, value in (line.partition(":") for line in lines)}
        return int(sizes["VmRSS"].split()[0]) * 1024, int(sizes["VmHWM"].split()[0]) * 1024
    info = import_module("psutil").Process().memory_info()
    return int(info.rss), int(getattr(info, "peak_wset", 0))


def _device_peak() -> dict[str, int]:
    return {"gpu": torch.accelerator.max_memory_allocated()} if _counts_device_memory() else {}


def _reset_peaks() -> None:
    if _counts_device_memory():
        torch.accelerator.reset_peak_memory_stats()
    try:
        # 5 sets the mark back and touches nothing else: proc(5).
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        # Not Linux, or a sandbox: the mark then goes back to the beginning of the process, as the class says.
        return


def _counts_device_memory() -> bool:
    # MPS has an accelerator, but not its counters.
    return torch.accelerator.is_available() and torch.accelerator.current_accelerator() != torch.device("mps")
