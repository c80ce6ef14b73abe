"""``python -m benchmarks.step --json FILE``: trainkit's step beside the loop written by hand.

Per model size one process with an empty compile cache, in which the four loops take turns of ten steps: one after the
other every loop would find its code and data pushed out of the caches by the other three. Printed are the median step
time, its ratio to the peer with the range of that ratio over the fifths of the run, the peak memory of a step (all
tensors alive at once, from the allocator's own record), and the time of the first call, which compiles.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.loops import BY_DEPTH, LOOPS, PEER, Loop
from benchmarks.models import SIZES
from benchmarks.report import environment, seconds

TURNS = {"mlp": 200, "gpt-1m": 25, "gpt-10m": 10}
STEPS_PER_TURN = 10
PARTS = 5
ACROSS = "trainkit, compiled / hand, eager"
WARM_UP = 5
DEPTHS = (4, 8, 16)


def peak_bytes(loop: Loop) -> int:
    """Bytes of tensors alive at the worst moment of a step: what persists, and the highest sum of what came."""
    gc.collect()
    persistent = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in loop.persistent()}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        loop.step()
    changes = [
        e.nbytes()
        for e in sorted(record.profiler.kineto_results.events(), key=lambda e: e.start_ns())
        if e.name() == "[memory]"
    ]
    alive = worst = 0
    for change in changes:
        alive += change
        worst = max(worst, alive)
    return sum(persistent.values()) + worst


def measure(size: str) -> dict[str, Any]:
    """All four loops of one size, in this process."""
    loops = {name: make(size) for name, make in LOOPS.items()}
    first = {name: seconds(loop.step) for name, loop in loops.items()}
    losses = {name: [float(loop.step()) for _ in range(WARM_UP)] for name, loop in loops.items()}
    times: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(TURNS[size]):
        for name, loop in loops.items():
            times[name] += [seconds(loop.step) for _ in range(STEPS_PER_TURN)]
    memory = {name: peak_bytes(loop) for name, loop in loops.items()}
    medians = {name: median(values) for name, values in times.items()}
    pairs = {**{name: (name, peer) for name, peer in PEER.items()}, ACROSS: ("trainkit, compiled", "hand, eager")}
    return {
        "size": size,
        "steps": TURNS[size] * STEPS_PER_TURN,
        "threads": torch.get_num_threads(),
        "first_call_seconds": first,
        "losses": losses,
        "median_seconds": medians,
        "peak_bytes": memory,
        "time_ratio": {label: medians[name] / medians[peer] for label, (name, peer) in pairs.items()},
        "time_ratio_range": {label: ratio_range(times[name], times[peer]) for label, (name, peer) in pairs.items()},
        "memory_ratio": {name: memory[name] / memory[peer] for name, peer in PEER.items()},
    }


def ratio_range(times: list[float], of_peer: list[float]) -> tuple[float, float]:
    """The lowest and highest ratio of medians over consecutive parts of the run."""
    size = len(times) // PARTS
    parts = [slice(i * size, (i + 1) * size) for i in range(PARTS)]
    ratios = [median(times[part]) / median(of_peer[part]) for part in parts]
    return min(ratios), max(ratios)


def measure_depth(name: str, depth: int) -> dict[str, Any]:
    """The first call of one loop at one depth, in this process, with an empty compile cache."""
    loop = BY_DEPTH[name]("gpt-1m", depth)
    return {"loop": name, "depth": depth, "first_call_seconds": seconds(loop.step)}


def in_fresh_process(*arguments: str) -> Any:
    """Run one measurement in a process of its own, so that caches and compiled code of others do not count."""
    with tempfile.TemporaryDirectory() as cache:
        out = Path(cache) / "result.json"
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
        subprocess.run(
            [sys.executable, "-m", "benchmarks.step", "--out", str(out), *arguments], check=True, env=environment
        )
        return json.loads(out.read_text())


def show(result: dict[str, Any]) -> None:
    def ratio(label: str) -> str:
        low, high = result["time_ratio_range"][label]
        return f"{result['time_ratio'][label]:.3f} ({low:.3f}-{high:.3f})"

    print(f"\n{result['size']}  ({result['steps']} steps each, interleaved, {result['threads']} threads)")
    print(f"  {'loop':20} {'step ms':>9} {'ratio':>21} {'peak MiB':>9} {'ratio':>7} {'first call s':>13}")
    for name, step in result["median_seconds"].items():
        times = ratio(name) if name in PEER else ""
        memory = f"{result['memory_ratio'][name]:.3f}" if name in PEER else ""
        peak = result["peak_bytes"][name] / 2**20
        first = result["first_call_seconds"][name]
        print(f"  {name:20} {step * 1e3:9.3f} {times:>21} {peak:9.2f} {memory:>7} {first:13.1f}")
    print(f"  {ACROSS}: {ratio(ACROSS)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file that the results are written to")
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=SIZES, help="which models to measure")
    parser.add_argument("--no-depth", action="store_true", help="leave out the growth of the compile time with depth")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--depth", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.out:
        one = (
            measure(arguments.measure)
            if arguments.measure
            else measure_depth(arguments.depth[0], int(arguments.depth[1]))
        )
        arguments.out.write_text(json.dumps(one))
        return
    report: dict[str, Any] = {"environment": environment("benchmarks.step"), "steps": [], "compile_by_depth": []}
    for size in arguments.sizes:
        report["steps"].append(in_fresh_process("--measure", size))
        show(report["steps"][-1])
    if not arguments.no_depth:
        print(f"\nfirst call in seconds, gpt-1m with {DEPTHS} blocks")
        for name in BY_DEPTH:
            found = [in_fresh_process("--depth", name, str(depth)) for depth in DEPTHS]
            report["compile_by_depth"] += found
            print(f"  {name:20} " + "  ".join(f"{f['first_call_seconds']:6.1f}" for f in found))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
