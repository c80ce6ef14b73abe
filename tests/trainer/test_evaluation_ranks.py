"""Evaluation on several processes: what one process finds with the whole batches."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from trainkit.metrics import Mean
from trainkit.trainer.evaluation import EvaluationHooks, evaluate_batches
from trainkit.trainer.evaluation_ranks import Ranks, ranks_of


def mean_step(inputs: Tensor, loss_only: bool, ignore_keys: Any) -> Any:
    return inputs.mean(), inputs, inputs


def test_one_process_without_a_prepared_loader_asks_nobody() -> None:
    # Within a training, accelerate takes the end of the training's loader for that of any evaluation.
    accelerator = Accelerator(cpu=True)
    training = accelerator.prepare(DataLoader(range(3), batch_size=2))
    for _ in training:
        ranks = ranks_of(accelerator, DataLoader(range(7), batch_size=2))
        assert len(ranks.gather(torch.zeros(2))) == 2
    assert ranks == Ranks()


RANKS = """
import functools, json, sys
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.utils.data import DataLoader
from trainkit.metrics import accuracy, counts
from trainkit.trainer.evaluation import EvaluationHooks, evaluate_batches
from trainkit.trainer.evaluation_ranks import ranks_of

accelerator = Accelerator(cpu=True)
torch.manual_seed(0)
table = torch.nn.Embedding(11, 4)
IGNORED = -100

def collate(rows):
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    ids, labels = zip(*rows)
    return {"ids": pad(ids, padding_value=IGNORED), "labels": pad(labels, padding_value=IGNORED)}

def data(n):
    generator = torch.Generator().manual_seed(n)
    lengths = torch.randint(1, 6, (n,), generator=generator).tolist()
    rows = [torch.randint(0, 11, (length,), generator=generator) for length in lengths]
    return [(row, row % 4) for row in rows]

def step(by_row, inputs, loss_only, ignore_keys):
    with torch.no_grad():
        logits = table(inputs["ids"].clamp(min=0))
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), inputs["labels"], reduction="none")
    kept = inputs["labels"] != IGNORED
    loss = (losses.sum(1) / kept.sum(1)).mean() if by_row else losses.sum() / kept.sum()
    return loss, (logits, {"first": inputs["ids"][:, 0]}), inputs["labels"]

def tokens(inputs, rows):
    return (inputs["labels"] != IGNORED).sum()

def summed(prediction):
    kept = prediction.label_ids != IGNORED
    return {
        "right": int((prediction.predictions[0].argmax(-1) == prediction.label_ids)[kept].sum()),
        "ids": prediction.inputs.tolist() if prediction.inputs is not None else None,
        "first": prediction.predictions[1]["first"].tolist(),
        "losses": [] if prediction.losses is None else prediction.losses.tolist(),
    }

found = {}
for n in map(int, sys.argv[2].split(",")):
    for total in (4, 2):
        make = lambda: DataLoader(data(n), batch_size=total // accelerator.num_processes, collate_fn=collate)
        loader = accelerator.prepare(make())
        run = functools.partial(evaluate_batches, description="Evaluation")
        options = {"ranks": ranks_of(accelerator, loader), "main_input_name": "ids"}
        by_row = functools.partial(step, True)
        tokenwise = functools.partial(step, False)
        everything = EvaluationHooks(by_row, summed, include_for_metrics=["inputs", "loss"], **options)
        found[f"rows {n} {total}"] = run(everything, loader).metrics
        found[f"samples {n} {total}"] = [run(everything, loader).num_samples]
        merged = {"accuracy": accuracy, "counts": counts}
        first = lambda logits, labels: logits[0]
        hooks = EvaluationHooks(tokenwise, merged, loss_weight=tokens, preprocess_logits_for_metrics=first, **options)
        found[f"tokens {n} {total}"] = run(hooks, loader).metrics
        predicted = evaluate_batches(hooks, loader, description="Prediction")
        best = predicted.predictions.argmax(-1) * (predicted.label_ids != IGNORED)
        found[f"predict {n} {total}"] = [best.tolist(), predicted.metrics]

        def by_batch(prediction, compute_result, count=[0]):
            count[0] += len(prediction.label_ids)
            assert len(prediction.losses) == len(prediction.label_ids) == len(prediction.inputs["ids"])
            return {"count": count[0]} if compute_result else {}

        hooks = EvaluationHooks(
            by_row, by_batch, batch_eval_metrics=True, include_for_metrics=["inputs", "loss"], **options
        )
        found[f"batches {n} {total}"] = run(hooks, loader).metrics
print(json.dumps(found)) if accelerator.is_main_process else None
if dist.is_initialized():
    dist.destroy_process_group()
"""


def run_ranks(folder: Path, world: int, sizes: str) -> dict[str, Any]:
    script = folder / "ranks.py"
    script.write_text(RANKS)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world)}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder), sizes],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else None,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    outs = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world
    return dict(json.loads(outs[0].splitlines()[-1]))


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    sizes = "1,4,5,6,7,8"
    one, two = run_ranks(tmp_path, 1, sizes), run_ranks(tmp_path, 2, sizes)
    assert one.keys() == two.keys()
    for name, expected in one.items():
        found = two[name]
        if name.startswith("rows"):
            # Losses of rows are means over the batch of a rank.
            assert len(found.pop("eval_losses")) == len(expected.pop("eval_losses")) == int(name.split()[1])
            for key in ("eval_ids", "eval_first"):
                assert found.pop(key) == expected.pop(key), (name, key)
        assert approximately(found) == approximately(expected), name


def approximately(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: approximately(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [approximately(value) for value in tree]
    return round(tree, 5) if isinstance(tree, float) else tree


def test_rows_of_other_ranks_count_for_nothing() -> None:
    ranks = Ranks(own_rows=lambda rows: rows // 2)
    hooks = EvaluationHooks(mean_step, {"m": lambda logits, labels: Mean(logits.sum(), labels.numel())})
    hooks = dataclasses.replace(hooks, ranks=ranks)
    batches = [torch.tensor([1.0, 2.0, 30.0, 40.0]), torch.tensor([6.0, 50.0]), torch.tensor([70.0])]
    found = evaluate_batches(hooks, batches, description="Prediction")
    # A batch without own rows runs whole, and its predictions are left to `gather` to cut off.
    assert found.predictions.tolist() == [1.0, 2.0, 6.0, 70.0]
    assert found.num_samples == 3 and found.metrics == {"eval_loss": 3.0, "eval_m": 3.0}


def test_metrics_of_ranks_are_merged() -> None:
    mean = Mean(torch.tensor(1.0), torch.tensor(2.0))
    ranks = Ranks(
        world=2,
        all_gather=lambda t: torch.cat([t, t]),
        pad=lambda tree, dim, value: tree,
        own_rows=lambda rows: None,
    )
    hooks = EvaluationHooks(mean_step, {"m": lambda logits, labels: mean}, ranks=ranks)
    assert evaluate_batches(hooks, [torch.ones(2)], description="Evaluation").metrics["eval_m"] == 0.5
    unknown = EvaluationHooks(mean_step, {"m": lambda logits, labels: Unknown()}, ranks=ranks)
    with pytest.raises(TypeError, match="a metric holds a Unknown, which ranks cannot exchange"):
        evaluate_batches(unknown, [torch.ones(2)], description="Evaluation")


class Unknown:
    def merge(self, other: "Unknown") -> "Unknown":
        return self

    def compute(self) -> Tensor:
        return torch.ones(())
