"""``python -m benchmarks.data --json FILE``: loading, beside torch's DataLoader, transformers' Trainer and the disk.

- "arrow": rows of an arrow table (four columns of numbers) in shuffled batches of 32: ``Loader`` beside
  ``torch.utils.data.DataLoader`` with its default collate on the same ``datasets.Dataset`` in the format "torch", row
  by row and with the batched fetch that ``datasets`` offers to it, and beside what
  ``transformers.Trainer.get_train_dataloader`` makes of the same dataset. Lightning takes a DataLoader as it is.
- "resuming": the time from nothing to the first batch when a run goes on at batch 0, 10^3 and 10^6 of a file of tokens.
  "resuming_peer": the same for the Trainer's loader, skipped forward as it does it (``accelerate.skip_first_batches``),
  at 0, 10^3 and 10^4 batches of a table: it passes by each batch before, and its sampler makes a list of all rows.
- "disk" and "memory": a whole file of 1 GiB, rows of 1,024 tokens of 32 bits, in batches of 32, beside reading the
  arrow file in pieces of 1 MiB. It is an arrow file, whose dataset is open, or a file of tokens, which is opened in the
  turn. Opening the arrow file is measured by itself (``load_from_disk``): datasets looks into each part of it, and the
  system then reads what lies around. For "disk" the file is dropped from the system's memory before each turn, and it
  is checked that it is gone; for "memory" it is all there.

The ways take turns in every round; printed are medians and ratios. A peer that is not installed is left out.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import json
import mmap
import os
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, disable_progress_bars, load_from_disk
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from benchmarks.report import environment, in_turns, published, seconds
from trainkit.io.data import Loader, TokenFile
from trainkit.io.data.batching import WINDOW_ROWS

ROWS, BATCH, BATCHES = 100_000, 32, 300
SEQ_LEN, FILE_ROWS = 16, 33_000_000
POSITIONS, PEER_POSITIONS = (0, 10**3, 10**6), (0, 10**3, 10**4)
TOKENS, TOKEN_ROWS, PIECE = 1024, 1 << 18, 1 << 20
DONTNEED = 4
"""Of ``madvise``."""
RESIDENT = 0.01
"""Share of a dropped file that may still be in memory."""

LIBC = ctypes.CDLL(None, use_errno=True)
Ways = dict[str, Callable[[], float]]


def numbers(rows: int) -> Dataset:
    g = np.random.default_rng(0)
    columns = {"x": g.standard_normal(rows), "y": g.standard_normal(rows), "n": g.integers(0, 9, rows)}
    return Dataset.from_dict({**columns, "label": g.integers(0, 2, rows)})


class RowByRow(TorchDataset[Any]):
    """What a dataset class without ``__getitems__`` is to a DataLoader."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]


def trainer_loader(data: Dataset, folder: Path) -> Callable[[], Any] | None:
    """Makes the loader that transformers' Trainer trains on."""
    if importlib.util.find_spec("transformers") is None:
        print("transformers: not installed, left out")
        return None
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        use_cpu=True,
        report_to=[],
        remove_unused_columns=False,
    )
    make: Callable[[], Any] = Trainer(torch.nn.Linear(1, 1), arguments, train_dataset=data).get_train_dataloader
    return make


def drained(batches: Any, number: int | None = None) -> None:
    for _ in islice(batches, number):
        pass


def of_arrow(folder: Path, rounds: int) -> dict[str, list[float]]:
    data = numbers(ROWS)
    batched = DataLoader(data.with_format("torch"), batch_size=BATCH, shuffle=True)
    single = DataLoader(RowByRow(data.with_format("torch")), batch_size=BATCH, shuffle=True)
    ways: Ways = {
        "DataLoader, row by row": lambda: seconds(lambda: drained(single, BATCHES)),
        "DataLoader, batched": lambda: seconds(lambda: drained(batched, BATCHES)),
        "Loader": lambda: seconds(lambda: drained(Loader(data, batch_size=BATCH), BATCHES)),
    }
    make = trainer_loader(data, folder)
    if make is not None:
        theirs = make()
        ways["transformers.Trainer"] = lambda: seconds(lambda: drained(theirs, BATCHES))
    return in_turns(ways, rounds)


def of_resuming(folder: Path, rounds: int) -> dict[str, list[float]]:
    """From opening the file to the first batch; the position is what a checkpoint has."""
    path = folder / "resumed.bin"
    np.memmap(path, dtype=np.uint8, mode="w+", shape=(FILE_ROWS * SEQ_LEN + 1,)).flush()
    fresh = Loader(TokenFile(path, SEQ_LEN, dtype="uint8"), batch_size=BATCH).state_dict()

    def first(position: int) -> None:
        loader = Loader(TokenFile(path, SEQ_LEN, dtype="uint8"), batch_size=BATCH)
        windows, within = divmod(position, WINDOW_ROWS // BATCH)
        loader.load_state_dict(fresh | {"batch": position, "total": position, "window": windows, "within": within})
        next(iter(loader))

    return in_turns({f"batch {at}": partial(seconds, partial(first, at)) for at in POSITIONS}, rounds)


def of_peer_resuming(folder: Path, rounds: int) -> dict[str, list[float]]:
    make = trainer_loader(numbers((max(PEER_POSITIONS) + 1) * BATCH), folder)
    if make is None:
        return {}
    from accelerate import skip_first_batches  # type: ignore[import-untyped]

    def first(position: int) -> None:
        next(iter(skip_first_batches(make(), position)))

    return in_turns({f"batch {at}": partial(seconds, partial(first, at)) for at in PEER_POSITIONS}, rounds)


def token_ids() -> Any:
    return np.random.default_rng(0).integers(0, 50_000, TOKENS * TOKEN_ROWS, dtype=np.int32)


def on_disk(path: Path) -> Path:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path


def written_tokens(path: Path) -> Path:
    token_ids().tofile(path)
    return on_disk(path)


def written(folder: Path) -> Path:
    values = token_ids()
    offsets = np.arange(0, len(values) + 1, TOKENS, dtype=np.int32)
    table = pa.table({"input_ids": pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))})
    Dataset(table).save_to_disk(folder, num_shards=1)
    (path,) = folder.glob("*.arrow")
    return on_disk(path)


def resident(path: Path) -> float:
    """The share of a file's pages that are in the system's memory."""
    view = np.memmap(path, mode="r")
    pages = (ctypes.c_ubyte * -(-len(view) // mmap.PAGESIZE))()
    address = ctypes.c_void_p(view.ctypes.data)
    if LIBC.mincore(address, ctypes.c_size_t(len(view)), pages):
        raise OSError(ctypes.get_errno(), "mincore")
    return float((np.ctypeslib.as_array(pages) & 1).mean())


def unmapped(path: Path) -> None:
    """Take the pages of a file out of this process: those that a process has mapped stay in the system's memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            begin, end = (int(address, 16) for address in line.split()[0].split("-"))
            if ctypes.CDLL(None, use_errno=True).madvise(
                ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), DONTNEED
            ):
                raise OSError(ctypes.get_errno(), "madvise")


def dropped(path: Path) -> None:
    gc.collect()
    unmapped(path)
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    share = resident(path)
    if share > RESIDENT:
        raise RuntimeError(f"{path}: {share:.0%} of it stayed in memory; give --folder on a disk")


def read(path: Path) -> None:
    piece = bytearray(PIECE)
    with path.open("rb", buffering=0) as file:
        while file.readinto(piece):
            pass


def of_file(folder: Path, rounds: int) -> dict[str, dict[str, list[float]]]:
    path, tokens = written(folder / "arrow"), written_tokens(folder / "tokens.bin")
    opened = load_from_disk(str(path.parent))

    def loaded(data: Any, shuffle: bool) -> None:
        drained(Loader(data, batch_size=BATCH, shuffle=shuffle))

    def token_file() -> TokenFile:
        return TokenFile(tokens, TOKENS, dtype="int32", overlap=0)

    actions: dict[str, tuple[Path, Callable[[], None]]] = {
        "read": (path, partial(read, path)),
        "Loader, in order": (path, partial(loaded, opened, False)),
        "Loader, shuffled": (path, partial(loaded, opened, True)),
        "Loader of tokens, in order": (tokens, lambda: loaded(token_file(), False)),
        "Loader of tokens, shuffled": (tokens, lambda: loaded(token_file(), True)),
        "load_from_disk": (path, lambda: load_from_disk(str(path.parent))),
    }

    def turn(prepare: Callable[[Path], None], file: Path, action: Callable[[], None]) -> float:
        prepare(file)
        return seconds(action)

    def measured(prepare: Callable[[Path], None]) -> dict[str, list[float]]:
        turns = {name: partial(turn, prepare, *action) for name, action in actions.items()}
        # A disk of a virtual machine is quicker with what it gave not long ago.
        return in_turns(turns, len(turns) * max(1, rounds // len(turns)), rotated=True)

    return {"disk": measured(dropped), "memory": measured(read)}


Times = dict[str, dict[str, list[float]]]
PARTS: dict[str, Callable[[Path, int], Times]] = {
    "arrow": lambda folder, rounds: {"arrow": of_arrow(folder, rounds)},
    "resuming": lambda folder, rounds: {
        "resuming": of_resuming(folder, rounds),
        "resuming_peer": of_peer_resuming(folder, rounds),
    },
    "file": of_file,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file that the results are written to")
    parser.add_argument("--rounds", type=int, default=9, help="how often each way is measured")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is measured")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk that is measured; left as it was"
    )
    arguments = parser.parse_args()
    disable_progress_bars()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder, rounds = Path(name), arguments.rounds
        parts: Times = {}
        for part in arguments.parts:
            parts |= PARTS[part](folder, rounds)
    report: dict[str, Any] = {"environment": environment("benchmarks.data"), "rounds": rounds}
    for part, times in parts.items():
        if times:
            peer, *others = times
            report |= published(part, times, [(way, peer) for way in others])
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
