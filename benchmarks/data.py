"""``python -m benchmarks.data --json FILE``: loading, beside torch's DataLoader and beside reading a file.

- Rows of an arrow table (four columns of numbers) in shuffled batches of 32: ``Loader`` beside
  ``torch.utils.data.DataLoader`` with its default collate, on the same ``datasets.Dataset`` in the format "torch": row
  by row, and with the batched fetch that ``datasets`` offers to it.
- The time from nothing to the first batch when a run goes on at batch 0, 10^3 and 10^6 of a file of tokens.
- A whole file of tokens, which the system has in memory, beside reading the same bytes in pieces of the same size.

The ways take turns in every round; printed are medians and ratios.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from benchmarks.report import environment, in_turns, published, seconds
from trainkit.io.data import Loader, TokenFile
from trainkit.io.data.batching import WINDOW_ROWS

ROWS, BATCH, BATCHES = 100_000, 32, 300
SEQ_LEN, FILE_ROWS = 16, 33_000_000
READ_LEN, READ_BATCH = 1024, 64
POSITIONS = (0, 10**3, 10**6)


def arrow_rows() -> Dataset:
    g = np.random.default_rng(0)
    columns = {"x": g.standard_normal(ROWS), "y": g.standard_normal(ROWS), "n": g.integers(0, 9, ROWS)}
    return Dataset.from_dict({**columns, "label": g.integers(0, 2, ROWS)})


class RowByRow(TorchDataset[Any]):
    """What a dataset class without ``__getitems__`` is to a DataLoader."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]


def drained(batches: Any, number: int | None = None) -> None:
    for _ in islice(batches, number):
        pass


def of_arrow(rounds: int) -> dict[str, list[float]]:
    data = arrow_rows()
    batched = DataLoader(data.with_format("torch"), batch_size=BATCH, shuffle=True)
    single = DataLoader(RowByRow(data.with_format("torch")), batch_size=BATCH, shuffle=True)
    ways = {
        "DataLoader, row by row": lambda: seconds(lambda: drained(single, BATCHES)),
        "DataLoader, batched": lambda: seconds(lambda: drained(batched, BATCHES)),
        "Loader": lambda: seconds(lambda: drained(iter(Loader(data, batch_size=BATCH)), BATCHES)),
    }
    return in_turns(ways, rounds)


def of_resuming(folder: Path, rounds: int) -> dict[str, list[float]]:
    """From opening the file to the first batch; the position is what a checkpoint has."""
    path = folder / "resumed.bin"
    np.memmap(path, dtype=np.uint8, mode="w+", shape=(FILE_ROWS * SEQ_LEN + 1,)).flush()
    fresh = Loader(TokenFile(path, SEQ_LEN, dtype="uint8"), batch_size=BATCH).state_dict()

    def first(position: int) -> float:
        def resumed() -> None:
            loader = Loader(TokenFile(path, SEQ_LEN, dtype="uint8"), batch_size=BATCH)
            windows, within = divmod(position, WINDOW_ROWS // BATCH)
            loader.load_state_dict(fresh | {"batch": position, "total": position, "window": windows, "within": within})
            next(iter(loader))

        return seconds(resumed)

    return in_turns({f"batch {position}": partial(first, position) for position in POSITIONS}, rounds)


def of_reading(folder: Path, rounds: int) -> dict[str, list[float]]:
    """A file that is in memory already, so that the disk does not hide the work."""
    path, size = folder / "tokens.bin", READ_LEN * READ_BATCH * 1000
    path.write_bytes(np.random.default_rng(0).bytes(size + 1))

    def read() -> None:
        with path.open("rb", buffering=0) as file:
            while torch.frombuffer(bytearray(file.read(READ_LEN * READ_BATCH)), dtype=torch.uint8).numel() > 1:
                pass

    def loaded() -> None:
        drained(iter(Loader(TokenFile(path, READ_LEN, dtype="uint8"), batch_size=READ_BATCH, shuffle=False)))

    return in_turns({"read": partial(seconds, read), "Loader": partial(seconds, loaded)}, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file that the results are written to")
    parser.add_argument("--rounds", type=int, default=9, help="how often each way is measured")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        parts = {
            "arrow": of_arrow(arguments.rounds),
            "resuming": of_resuming(Path(name), arguments.rounds),
            "reading": of_reading(Path(name), arguments.rounds),
        }
    report: dict[str, Any] = {"environment": environment("benchmarks.data"), "rounds": arguments.rounds}
    for part, times in parts.items():
        peer, *others = times
        report |= published(part, times, [(way, peer) for way in others])
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
