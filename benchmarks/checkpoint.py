"""``python -m benchmarks.checkpoint --json FILE``: what a checkpoint costs a run, beside the usual ways to save.

The state is a small transformer's with AdamW: parameters and two moments, ``--mebibytes`` in all. In every round all
ways take turns on the same disk; printed are medians and ratios.

- How long a step is blocked: ``Saver.save`` beside a copy of all tensors into memory that is there already, and beside
  ``torch.save`` of the same tensors.
- A durable save (digests, flushed to the disk) beside ``safetensors.torch.save_file`` of the same tensors, flushed too
  and not; a verified load beside ``safetensors.torch.load_file``.
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

from benchmarks.report import environment, in_turns, published, seconds
from trainkit import TrainState, init_state
from trainkit.io.checkpoint import Retention, Saver, load, save
from trainkit.io.checkpoint.format import flatten_state
from trainkit.optim import adamw

WIDTH, ROUNDS = 512, 9


def make_state(mebibytes: int) -> TrainState:
    """A state of about that size: square matrices of 1 MiB and biases, as a transformer has."""
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(mebibytes // 3)]
    state = init_state(nn.Sequential(*layers), adamw(1e-3))
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


def blocking(state: TrainState, folder: Path) -> dict[str, Callable[[], float]]:
    """Ways to save, by how long they keep the loop."""
    tensors = tensors_of(state)
    memory = [torch.empty_like(t) for t in tensors.values()]
    saver = Saver(folder / "run", keep=Retention(last=1))

    def copy() -> None:
        for target, source in zip(memory, tensors.values(), strict=True):
            target.copy_(source)

    def in_background() -> float:
        saver.wait()
        return seconds(lambda: saver.save(state))

    def alone(action: Callable[[], float]) -> Callable[[], float]:
        def waited() -> float:
            saver.wait()
            return action()

        return waited

    return {
        "copy": alone(partial(seconds, copy)),
        "Saver.save": in_background,
        "torch.save": alone(partial(seconds, partial(torch.save, tensors, folder / "state.pt"))),
    }


def durable(state: TrainState, folder: Path) -> dict[str, Callable[[], float]]:
    """Ways to have a checkpoint on the disk, and to have it back."""
    tensors = tensors_of(state)
    plain, kept = folder / "plain.safetensors", save(folder / "kept", state)

    def ours() -> float:
        shutil.rmtree(folder / "one", ignore_errors=True)
        return seconds(lambda: save(folder / "one", state))

    return {
        "save_file": partial(seconds, partial(save_file, tensors, plain)),
        "save_file, flushed": partial(flushed, lambda path: save_file(tensors, path), plain),
        "save": ours,
        "load_file": partial(seconds, lambda: [t.clone() for t in load_file(plain).values()]),
        "load": partial(seconds, lambda: load(kept, state)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file that the results are written to")
    parser.add_argument("--mebibytes", type=int, default=256, help="size of the state")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="how often each way is measured")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    arguments = parser.parse_args()
    state = make_state(arguments.mebibytes)
    report: dict[str, Any] = {"environment": environment("benchmarks.checkpoint"), "mebibytes": arguments.mebibytes}
    for part, ways, pairs in (
        ("blocked", blocking, [("Saver.save", "copy"), ("Saver.save", "torch.save")]),
        ("durable", durable, [("save", "save_file"), ("save", "save_file, flushed"), ("load", "load_file")]),
    ):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            times = in_turns(ways(state, Path(folder)), arguments.rounds)
        report |= published(part, times, pairs)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
