"""What all measurements share: taking turns, ratios with their range, and where they were made."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch


def seconds(action: Callable[[], object]) -> float:
    """How long a call takes, by the wall clock."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def in_turns(
    actions: Mapping[str, Callable[[], float]], rounds: int, *, rotated: bool = False
) -> dict[str, list[float]]:
    """The seconds that each action reports of itself, in turns; the first round is left out.

    Rotated, each round begins with the action after the one that the last began with, for what depends on its place.
    """
    found: dict[str, list[float]] = {name: [] for name in actions}
    names = list(actions)
    for number in range(rounds + 1):
        first = number % len(names) if rotated else 0
        for name in names[first:] + names[:first]:
            found[name].append(actions[name]())
    return {name: values[1:] for name, values in found.items()}


def ratio(times: list[float], of_peer: list[float]) -> dict[str, float]:
    """The ratio of the medians, and of single rounds the median, the lowest and the highest ratio.

    The median of the rounds is the better one on a machine whose speed changes while they run.
    """
    rounds = [a / b for a, b in zip(times, of_peer, strict=True)]
    return {
        "ratio": median(times) / median(of_peer),
        "of_rounds": median(rounds),
        "lowest": min(rounds),
        "highest": max(rounds),
    }


def published(
    part: str, times: Mapping[str, list[float]], pairs: Sequence[tuple[str, str]], *, decimals: int = 1
) -> dict[str, Any]:
    """Print the medians of a part and the ratios of pairs (a way, its peer), and give them for the file of results."""
    medians = {name: median(values) for name, values in times.items()}
    ratios = {f"{a} / {b}": ratio(times[a], times[b]) for a, b in pairs}
    print(f"\n{part}, median of {len(next(iter(times.values())))}, in milliseconds")
    for name, value in medians.items():
        print(f"  {name:24} {value * 1e3:9.{decimals}f}")
    for name, found in ratios.items():
        rounds = f"of rounds {found['of_rounds']:.3f} ({found['lowest']:.3f}-{found['highest']:.3f})"
        print(f"  {name:46} {found['ratio']:.3f}, {rounds}")
    return {part: medians, f"{part}_ratio": ratios}


def environment(module: str) -> dict[str, Any]:
    """The command, hardware and versions that a figure comes with."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "command": f"python -m {module} {' '.join(sys.argv[1:])}".strip(),
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
