"""``python -m benchmarks.trainer --json FILE``: the Trainer beside a loop written by hand and the trainers installed.

- ``mlp``: seconds per update of a tiny MLP with its data loading, and ``gpt``: of a GPT of 10 million parameters. Each
  way is one run, in a process of its own, that stops after so many updates until it is its turn again; so set-up and
  compilation happen once, before the first turn ends, and that turn is left out. A turn of the MLP is one pass over
  its rows, the change of epochs included. After a share of the rounds the processes are started anew.
- ``evaluation``: 100,000 rows of 1,000 classes with a ``compute_metrics`` that is given everything, in fresh processes
  in turns. Memory is what the process holds at most beyond what it held before, after an evaluation of few rows:
  *resident* counts everything, *own* leaves out pages of files, which the system takes back when it needs memory.
- ``import``: of the name Trainer, in fresh processes in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from benchmarks.report import environment, in_turns, published, ratio, seconds
from benchmarks.trainer_ways import WAYS, Paused, Work, available, make_rows, missing, train_in_turns, versions

MLP = {"size": "mlp", "rows": 3200, "batch_size": 32, "updates": 100, "rounds": 80, "sets": 5, "ways": tuple(WAYS)}
GPT = {
    "size": "gpt-10m", "rows": 360, "batch_size": 12, "updates": 3, "rounds": 25, "sets": 1,
    "ways": ("by hand", "trainkit"),
}  # fmt: skip
SETTINGS: dict[str, Mapping[str, Any]] = {"mlp": MLP, "gpt": GPT}
"""``updates`` per turn."""
ROWS, FEATURES, CLASSES, EVAL_BATCH = 100_000, 16, 1000, 250
EVALUATING = ("transformers", "trainkit", "trainkit, merged")
EVALUATION_ROUNDS, IMPORT_ROUNDS = 3, 15
SAMPLED_EVERY = 0.005
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
"""The initial value, held: else glibc keeps freed arrays for a while, and the figure is not what the program holds."""


def of_updates(part: str, rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds per update of the ways in turns, and the loss over all rows that each ended with.

    The rounds are divided among several sets of processes: one process may be some percent faster than another of the
    same program for as long as it lives.
    """
    sets = int(SETTINGS[part]["sets"])
    times: dict[str, list[float]] = {}
    for _ in range(sets):
        found, losses = _of_processes(part, max(1, rounds // sets))
        for name, values in found.items():
            times.setdefault(name, []).extend(values)
    return times, losses


def _of_processes(part: str, rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    command = [sys.executable, "-m", "benchmarks.trainer", "--parts", part, "--rounds", str(rounds), "--train"]
    runs = {name: Paused([*command, name]) for name in available() if name in SETTINGS[part]["ways"]}
    try:
        times = in_turns(runs, rounds)
        return times, {name: run.finish() for name, run in runs.items()}
    finally:
        for run in runs.values():
            run.close()


def train_here(way: str, part: str, rounds: int) -> None:
    """In a process of its own: the run of one way, in turns with others."""
    setting = SETTINGS[part]
    rows = make_rows(setting["size"], setting["rows"])
    work = Work(setting["size"], rows, setting["batch_size"], setting["updates"] * (rounds + 1))
    train_in_turns(available()[way], work, setting["updates"])


class Classifier(nn.Module):
    """Little arithmetic, many logits."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layer(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Points(Dataset[dict[str, Tensor]]):
    """Rows that are views of two tensors."""

    def __init__(self, n: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(n, FEATURES, generator=generator)
        self.labels = torch.randint(0, CLASSES, (n,), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"x": self.x[i], "labels": self.labels[i]}


def accuracy_of_everything(prediction: Any) -> dict[str, float]:
    """The share of right answers, over all logits."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def evaluate_here(way: str) -> None:
    """In a process of its own: evaluate few rows; then, on a line from standard input, all. The result is printed."""
    import trainkit
    from trainkit.metrics import accuracy

    if way == "transformers":
        import transformers

        package: Any = transformers
    else:
        package = trainkit
    metrics = {"accuracy": accuracy} if way == "trainkit, merged" else accuracy_of_everything
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = package.TrainingArguments(
            folder,
            per_device_eval_batch_size=EVAL_BATCH,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        trainer = package.Trainer(model=Classifier(), args=arguments, compute_metrics=metrics)
        trainer.remove_callback(package.PrinterCallback)
        few, all_rows = Points(2 * EVAL_BATCH), Points(ROWS)
        trainer.evaluate(few)
        print("ready", flush=True)
        sys.stdin.readline()
        found: dict[str, float] = {}
        took = seconds(lambda: found.update(trainer.evaluate(all_rows)))
    print(json.dumps({"seconds": took, "loss": found["eval_loss"], "accuracy": found["eval_accuracy"]}), flush=True)


def evaluated(way: str) -> dict[str, float]:
    """One evaluation in a fresh process, whose memory is sampled from here."""
    command = [sys.executable, "-m", "benchmarks.trainer", "--evaluate", way]
    options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | ALLOCATOR, **options) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        while (line := process.stdout.readline()) != "ready\n":
            if not line:
                raise RuntimeError(f"{way}: the process ended before its evaluation")
        before, peak = _memory(process.pid), {"resident": 0, "own": 0}
        process.stdin.write("\n")
        process.stdin.flush()
        while process.poll() is None:
            now = _memory(process.pid)
            peak = {name: max(size, now[name]) for name, size in peak.items()}
            time.sleep(SAMPLED_EVERY)
        result = next(json.loads(line) for line in process.stdout if line.startswith('{"seconds"'))
    return {**result, **{name: float(size - before[name]) for name, size in peak.items()}}


def _memory(pid: int) -> dict[str, int]:
    """Bytes in memory of a process: all, and without pages of files. Zeros once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        lines = []
    sizes = {name: value.split()[0] for name, _, value in (line.partition(":") for line in lines) if value.strip()}
    resident = int(sizes.get("VmRSS", 0))
    return {"resident": resident * 1024, "own": (resident - int(sizes.get("RssFile", 0))) * 1024}


def of_evaluation(rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds, memory and results by way."""
    ways = [way for way in EVALUATING if way != "transformers" or way in versions()]
    found = [{way: evaluated(way) for way in ways} for _ in range(rounds)]
    return {part: {way: [one[way][part] for one in found] for way in ways} for part in found[0][ways[0]]}


def of_import(rounds: int) -> dict[str, list[float]]:
    """Seconds of fresh processes; those that import nothing but torch are the part that both share."""
    packages = ["torch", *(name for name in ("transformers",) if name in versions()), "trainkit"]
    statements = {name: "import torch" if name == "torch" else f"from {name} import Trainer" for name in packages}

    def run(statement: str) -> float:
        return seconds(partial(subprocess.run, [sys.executable, "-c", statement], check=True, capture_output=True))

    return in_turns({name: partial(run, statement) for name, statement in statements.items()}, rounds)


def show_evaluation(found: Mapping[str, Mapping[str, list[float]]]) -> dict[str, Any]:
    """Print the medians, and give them for the file of results."""
    medians = {part: {way: median(values) for way, values in ways.items()} for part, ways in found.items()}
    print(f"\nevaluation of {ROWS} rows of {CLASSES} classes, medians of {len(next(iter(found['seconds'].values())))}")
    print(f"  {'':20} {'seconds':>9} {'resident MiB':>13} {'own MiB':>9} {'accuracy':>9}")
    for way in found["seconds"]:
        sizes = (medians[name][way] / 2**20 for name in ("resident", "own"))
        numbers = "{:13.1f} {:9.1f}".format(*sizes)
        print(f"  {way:20} {medians['seconds'][way]:9.2f} {numbers} {medians['accuracy'][way]:9.5f}")
    ratios = {}
    peer, *others = found["seconds"]
    for part in ("seconds", "resident", "own"):
        for way in others:
            ratios[f"{part}: {way} / {peer}"] = ratio(found[part][way], found[part][peer])
    for name, one in ratios.items():
        print(f"  {name:46} {one['ratio']:.3f} ({one['lowest']:.3f}-{one['highest']:.3f})")
    return {"evaluation": medians, "evaluation_ratio": ratios}


def updates_part(part: str, rounds: int | None) -> dict[str, Any]:
    setting = SETTINGS[part]
    count = int(setting["rounds"]) if rounds is None else rounds
    times, losses = of_updates(part, count)
    peer, *others = times
    shown = {key: value for key, value in setting.items() if key != "ways"}
    report = published(part, times, [(way, peer) for way in others], decimals=3)
    return {**report, f"{part}_final_loss": losses, f"{part}_setting": {**shown, "rounds": count}}


def evaluation_part(rounds: int | None) -> dict[str, Any]:
    return show_evaluation(of_evaluation(EVALUATION_ROUNDS if rounds is None else rounds))


def import_part(rounds: int | None) -> dict[str, Any]:
    times = of_import(IMPORT_ROUNDS if rounds is None else rounds)
    others: Sequence[str] = [name for name in times if name != "trainkit"]
    return published("import", times, [("trainkit", name) for name in others])


PARTS: dict[str, Callable[[int | None], dict[str, Any]]] = {
    "mlp": partial(updates_part, "mlp"),
    "gpt": partial(updates_part, "gpt"),
    "evaluation": evaluation_part,
    "import": import_part,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file that the results are written to")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS, help="what is measured")
    parser.add_argument("--rounds", type=int, help="turns of each way, in the place of each part's own number")
    parser.add_argument("--train", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--evaluate", choices=EVALUATING, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train_here(arguments.train, arguments.parts[0], arguments.rounds)
        return
    if arguments.evaluate:
        evaluate_here(arguments.evaluate)
        return
    report: dict[str, Any] = {"environment": {**environment("benchmarks.trainer"), **versions()}}
    report["threads"] = torch.get_num_threads()
    for line in missing():
        print(line)
    for part in arguments.parts:
        report |= PARTS[part](arguments.rounds)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
