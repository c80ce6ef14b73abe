"""``python -m benchmarks.checkpoint --json FILE``: what a checkpoint costs a run, beside the usual ways to save.

In every round all ways take turns on the same disk; printed are medians and ratios. Two states with AdamW: one of few
large leaves (``--mebibytes`` in all), one of 6,000 small ones.

- ``blocked``: how long a step waits. ``Saver.save`` beside a copy of all tensors into memory that is there already
  (``copy``) or is new (``clone``); beside ``torch.save`` of the same tensors, as it is and flushed to the disk, which
  is what ``Saver.save`` has done when it says that a checkpoint is there; and beside what the trainers that are
  installed do: Hugging Face's (``Trainer._save_checkpoint``) and Lightning's (``save_checkpoint``, also in its
  background).
- ``durable``: a blocking ``save`` (digests, flushed) beside ``safetensors.torch.save_file`` of the same tensors, as it
  is and flushed; a verified ``load`` beside ``safetensors.torch.load_file``.
- ``reading``: the throughput of a verified ``load`` beside that of reading the same files into one buffer, from the
  disk (the system has forgotten them) and from memory. Here a ratio is one of throughputs: the higher the better.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks import checkpoint_peers
from benchmarks.report import environment, in_turns, published, seconds
from trainkit import TrainState, init_state
from trainkit.io.checkpoint import Retention, Saver, load, save
from trainkit.io.checkpoint.format import flatten_state
from trainkit.optim import adamw

WIDTH, SMALL_WIDTH, SMALL_LEAVES, ROUNDS = 512, 32, 6000, 9
BUFFER = 8 * 2**20

Ways = dict[str, Callable[[], float]]


def make_module(layers: int, width: int) -> nn.Module:
    """Square matrices and biases, as a transformer has."""
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))


def make_state(module: nn.Module) -> TrainState:
    state = init_state(module, adamw(1e-3))
    memory = state.opt_state
    for name in ("exp_avg", "exp_avg_sq"):
        for tensor in memory[name].values():
            tensor.normal_()
    return state


def tensors_of(state: TrainState) -> dict[str, Tensor]:
    return {f"{file}/{name}": t for file, own in flatten_state(state).by_file().items() for name, t in own.items()}


def flushed(write: Callable[[Path], object], path: Path) -> float:
    """Seconds for writing a file and having it on the disk."""

    def both() -> None:
        write(path)
        with path.open("rb") as file:
            os.fsync(file.fileno())

    return seconds(both)


def blocking(module: nn.Module, folder: Path) -> Ways:
    """Ways to save, by how long they keep the loop."""
    state = make_state(module)
    tensors = tensors_of(state)
    memory = [torch.empty_like(t) for t in tensors.values()]
    saver = Saver(folder / "run", keep=Retention(last=1))

    def copy() -> None:
        for target, source in zip(memory, tensors.values(), strict=True):
            target.copy_(source)

    def in_background() -> float:
        return seconds(lambda: saver.save(state))

    def alone(action: Callable[[], float]) -> Callable[[], float]:
        def waited() -> float:
            saver.wait()
            return action()

        return waited

    ways: Ways = {
        "copy": partial(seconds, copy),
        "clone": partial(seconds, lambda: [t.clone() for t in tensors.values()]),
        "Saver.save": in_background,
        "torch.save": partial(seconds, lambda: torch.save(tensors, folder / "state.pt")),
        "torch.save, flushed": partial(flushed, lambda path: torch.save(tensors, path), folder / "flushed.pt"),
    }
    ways |= checkpoint_peers.ways(module, folder)
    return {name: alone(action) for name, action in ways.items()}


def durable(module: nn.Module, folder: Path) -> Ways:
    """Ways to have a checkpoint on the disk, and to have it back."""
    state = make_state(module)
    tensors = tensors_of(state)
    plain, kept = folder / "plain.safetensors", save(folder / "kept", state)

    def ours() -> float:
        shutil.rmtree(folder / "one", ignore_errors=True)
        return seconds(lambda: save(folder / "one", state))

    return {
        "save_file": partial(seconds, lambda: save_file(tensors, plain)),
        "save_file, flushed": partial(flushed, lambda path: save_file(tensors, path), plain),
        "save": ours,
        "load_file": partial(seconds, lambda: [t.clone() for t in load_file(plain).values()]),
        "load": partial(seconds, lambda: load(kept, state)),
    }


def reading(module: nn.Module, folder: Path) -> Ways:
    """Ways to read the files of one checkpoint."""
    state = make_state(module)
    kept = save(folder / "kept", state)
    buffer = memoryview(bytearray(BUFFER))

    def read() -> None:
        for path in kept.iterdir():
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    def cold(action: Callable[[], object]) -> float:
        for path in kept.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return seconds(action)

    load_it = partial(load, kept, state)
    return {
        "read, from disk": partial(cold, read),
        "load, from disk": partial(cold, load_it),
        "read, from memory": partial(seconds, read),
        "load, from memory": partial(seconds, load_it),
    }


PARTS: dict[str, tuple[Callable[[nn.Module, Path], Ways], list[tuple[str, str]]]] = {
    "blocked": (blocking, []),
    "blocked_small_leaves": (blocking, []),
    "durable": (durable, [("save", "save_file"), ("save", "save_file, flushed"), ("load", "load_file")]),
    "reading": (
        reading,
        [("read, from disk", "load, from disk"), ("read, from memory", "load, from memory")],
    ),
}
"""What is measured, and which ways are compared with which; without any, ``Saver.save`` with all others."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file that the results are written to")
    parser.add_argument("--mebibytes", type=int, default=256, help="size of the state with large leaves")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="how often each way is measured")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is measured")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    arguments = parser.parse_args()
    report: dict[str, Any] = {
        "environment": environment("benchmarks.checkpoint") | checkpoint_peers.versions(),
        "mebibytes": arguments.mebibytes,
        "small_leaves": SMALL_LEAVES,
    }
    for line in checkpoint_peers.missing():
        print(line)
    for part in arguments.parts:
        make_ways, pairs = PARTS[part]
        # A layer has two parameters, and each of them three leaves; those of a large matrix are of 1 MiB.
        small, large = (SMALL_LEAVES // 6, SMALL_WIDTH), (arguments.mebibytes // 3, WIDTH)
        module = make_module(*(small if part == "blocked_small_leaves" else large))
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            times = in_turns(make_ways(module, Path(folder)), arguments.rounds)
        report |= published(part, times, pairs or [("Saver.save", peer) for peer in times if peer != "Saver.save"])
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
