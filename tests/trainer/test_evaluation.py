"""Evaluation over a loader, beside the loops of transformers' Trainer 4.57."""

import functools
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from trainkit.metrics import accuracy, counts
from trainkit.trainer.dataloaders import make_dataloader
from trainkit.trainer.evaluation import (
    EvaluationHooks,
    denumpify,
    evaluate_batches,
    first_rows,
    prediction_loop,
    prefixed,
    preparation_seconds,
)
from trainkit.trainer.evaluation_ranks import ranks_of

LENGTHS = [3, 5, 2, 2, 4, 1, 3]


class Tagger(nn.Module):
    """A class per token; the loss is a mean over the tokens of a batch."""

    main_input_name = "ids"

    def __init__(self, kind: str = "dict") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.kind = kind
        self.table = nn.Embedding(11, 4)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.table(ids.clamp(min=0))
        pooled = logits.mean(1)
        if labels is None:
            return {"logits": logits, "pooled": pooled} if self.kind == "dict" else (logits, pooled)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        if self.kind == "dict":
            return {"loss": loss, "logits": logits, "pooled": pooled}
        return (loss, logits) if self.kind == "pair" else (loss, (logits, [pooled]))


def rows(labels: bool = True) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for length in LENGTHS:
        ids = torch.randint(0, 11, (length,), generator=generator)
        found.append({"ids": ids, "labels": ids % 4} if labels else {"ids": ids})
    return found


def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    pad = functools.partial(nn.utils.rnn.pad_sequence, batch_first=True)
    found = {"ids": pad([row["ids"] for row in batch])}
    if "labels" in batch[0]:
        found["labels"] = pad([row["labels"] for row in batch], padding_value=-100)
    return found


def peer(folder: Path, model: nn.Module, **options: Any) -> transformers.Trainer:
    functions = {name: options.pop(name) for name in list(options) if callable(options[name])}
    args = transformers.TrainingArguments(
        str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        per_device_eval_batch_size=2,
        label_names=["labels"],
        **options,
    )
    return transformers.Trainer(model, args, data_collator=collate, **functions)


def hooks_of(trainer: transformers.Trainer, loader: Any, **options: Any) -> EvaluationHooks:
    """What a Trainer gives to the function, from a real one."""
    args = trainer.args
    known: dict[str, Any] = {
        "prediction_step": functools.partial(trainer.prediction_step, trainer.model),
        "compute_metrics": trainer.compute_metrics,
        "preprocess_logits_for_metrics": trainer.preprocess_logits_for_metrics,
        "prepare_input": trainer._prepare_input,
        "num_examples": trainer.num_examples,
        "ranks": ranks_of(trainer.accelerator, loader),
        "batch_eval_metrics": args.batch_eval_metrics,
        "include_for_metrics": args.include_for_metrics,
        "main_input_name": trainer.model.main_input_name,
        "eval_batch_size": args.eval_batch_size,
        "concat": args.eval_do_concat_batches,
    }
    return EvaluationHooks(**{**known, **options})


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected), (type(found), type(expected))
    if isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, two in zip(found, expected, strict=True):
            assert_same(one, two)
    elif isinstance(expected, float):
        # 4.57 averages in float32.
        assert found == pytest.approx(expected, rel=1e-6)
    else:
        assert found == expected


def summary(prediction: Any) -> dict[str, Any]:
    """Every number that a metrics function can see."""

    def total(tree: Any) -> float:
        if isinstance(tree, (list, tuple)):
            return sum(map(total, tree))
        return float(tree.astype(np.float64).sum())

    return {f"part{i}": np.float64(total(part)) for i, part in enumerate(prediction)}


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "metrics": {"compute_metrics": summary},
    "everything": {"compute_metrics": summary, "include_for_metrics": ["inputs", "loss"]},
    "losses": {"compute_metrics": summary, "include_for_metrics": ["loss"], "eval_accumulation_steps": 1},
    "preprocess": {
        "compute_metrics": summary,
        "preprocess_logits_for_metrics": lambda logits, labels: (
            logits[0] if isinstance(logits, (tuple, list)) else logits
        ).argmax(-1),
    },
    "apart": {"compute_metrics": summary, "include_for_metrics": ["loss"], "eval_do_concat_batches": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ["dict", "pair", "nested"])
@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
def test_everything_is_as_in_transformers(
    tmp_path: Path, kind: str, labels: bool, options: dict[str, Any], drop_last: bool
) -> None:
    trainer = peer(tmp_path, Tagger(kind), dataloader_drop_last=drop_last, **options)
    loader = trainer.get_eval_dataloader(rows(labels))
    for ignore in (None, ["pooled"]):
        expected = trainer.evaluation_loop(loader, "Prediction", ignore_keys=ignore)
        expected.metrics.pop("eval_model_preparation_time")
        found = evaluate_batches(hooks_of(trainer, loader), loader, description="Prediction", ignore_keys=ignore)
        assert_same(tuple(found), tuple(expected))


def test_the_loss_alone(tmp_path: Path) -> None:
    trainer = peer(tmp_path, Tagger())
    loader = trainer.get_eval_dataloader(rows())
    expected = trainer.evaluation_loop(loader, "Evaluation", prediction_loss_only=True)
    found = evaluate_batches(
        hooks_of(trainer, loader), loader, description="Evaluation", prediction_loss_only=True, metric_key_prefix="eval"
    )
    assert found.predictions is None and found.label_ids is None and found.num_samples == len(LENGTHS)
    assert found.metrics == {"eval_loss": pytest.approx(expected.metrics["eval_loss"], rel=1e-6)}


@pytest.mark.parametrize("include", [[], ["inputs", "loss"]])
@pytest.mark.parametrize("description", ["Evaluation", "Prediction"])
def test_metrics_of_each_batch(tmp_path: Path, include: list[str], description: str) -> None:
    calls: list[Any] = []

    def compute_metrics(prediction: Any, compute_result: bool) -> dict[str, Any]:
        calls.append((tuple(prediction), compute_result))
        return {"calls": len(calls)} if compute_result else {}

    trainer = peer(
        tmp_path, Tagger(), compute_metrics=compute_metrics, batch_eval_metrics=True, include_for_metrics=include
    )
    loader = trainer.get_eval_dataloader(rows())
    expected = trainer.evaluation_loop(loader, description)
    expected_calls, calls = calls, []
    found = evaluate_batches(hooks_of(trainer, loader), loader, description=description)
    expected.metrics.pop("eval_model_preparation_time")
    assert_same(tuple(found), tuple(expected))
    assert [last for _, last in calls] == [False, False, False, True]
    for (one, _), (two, _) in zip(calls, expected_calls, strict=True):
        flat, other = (torch.utils._pytree.tree_leaves(dict(enumerate(part))) for part in (one, two))
        assert len(flat) == len(other) == (5 if include else 3) + (1 if include else 0)
        assert all(torch.equal(a, b) for a, b in zip(flat, other, strict=True))


def test_the_last_batch_is_known_without_accelerate() -> None:
    lasts: list[bool] = []
    hooks = EvaluationHooks(
        lambda inputs, loss_only, ignore_keys: (None, inputs, inputs),
        lambda prediction, compute_result: lasts.append(compute_result) or {},
        batch_eval_metrics=True,
    )
    for batches in ([torch.ones(1)] * 3, iter([torch.ones(1)] * 2), [], [torch.ones(1)]):
        evaluate_batches(hooks, batches, description="Evaluation")
    assert lasts == [False, False, True, False, True, True]


class Parts(IterableDataset):
    """Numbers, of which each worker reads its part: of two, one and four."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[Any]:
        info = torch.utils.data.get_worker_info()
        numbers = range(self.n)
        return iter(numbers if info is None else (numbers[:1], numbers[1:])[info.id])


class Unsized:
    """A sampler that does not say how many rows it gives."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(4))


@pytest.mark.parametrize(
    ("data", "options", "batches"),
    [
        (Parts(4), {}, 2),
        (Parts(5), {}, 3),
        (Parts(5), {"workers": 2}, 3),
        (list(range(4)), {}, 2),
        (list(range(4)), {"sampler": Unsized()}, 2),
    ],
    ids=["whole", "short", "workers", "list", "sampler"],
)
def test_the_last_batch_of_a_loader_of_our_own_is_known(data: Any, options: dict[str, Any], batches: int) -> None:
    loader = make_dataloader(data, batch_size=2, collate_fn=torch.tensor, seed=0, is_training=False, **options)
    lasts: list[bool] = []
    hooks = EvaluationHooks(
        lambda inputs, loss_only, ignore_keys: (None, inputs, inputs),
        lambda prediction, compute_result: lasts.append(compute_result) or ({"last": 1} if compute_result else {}),
        batch_eval_metrics=True,
        ranks=ranks_of(Accelerator(cpu=True), loader),
    )
    for _ in range(2):
        found = evaluate_batches(hooks, loader, description="Evaluation")
        assert found.metrics == {"eval_last": 1} and found.num_samples == (len(data) if type(data) is list else data.n)
    assert lasts == ([False] * (batches - 1) + [True]) * 2


@pytest.mark.parametrize("options", [{}, {"compute_metrics": summary, "include_for_metrics": ["inputs", "loss"]}])
def test_the_older_loop(tmp_path: Path, options: Any) -> None:
    trainer = peer(tmp_path, Tagger(), preprocess_logits_for_metrics=lambda logits, labels: 1 / 0, **options)
    loader = trainer.get_eval_dataloader(rows())
    with pytest.warns(FutureWarning):
        expected = trainer.prediction_loop(loader, "Prediction")
    found = prediction_loop(hooks_of(trainer, loader, concat=False), loader, description="Prediction")
    assert_same(tuple(found), tuple(expected))


def test_the_older_loop_needs_a_length_and_a_batch_size() -> None:
    hooks = EvaluationHooks(lambda *args, **kwargs: (None, None, None))
    with pytest.raises(ValueError, match="dataloader: it has no length"):
        prediction_loop(hooks, iter([]), description="Evaluation")
    with pytest.raises(ValueError, match="dataloader: it has no batch_size"):
        prediction_loop(hooks, [], description="Evaluation")


def step_of(loss: Callable[[Tensor], Any]) -> Callable[..., Any]:
    return lambda inputs, loss_only, ignore_keys: (loss(inputs), inputs, inputs)


@given(st.lists(st.lists(st.floats(-9, 9, width=16), min_size=1, max_size=4), min_size=1, max_size=6))
def test_batches_of_any_sizes_weigh_what_they_hold(values: list[list[float]]) -> None:
    batches = [torch.tensor(part) for part in values]
    found = evaluate_batches(EvaluationHooks(step_of(Tensor.mean)), batches, description="Evaluation")
    assert found.metrics["eval_loss"] == pytest.approx(float(torch.cat(batches).double().mean()), rel=1e-5, abs=1e-6)
    assert found.num_samples == sum(map(len, values))


def test_many_batches_in_several_transfers() -> None:
    values = torch.arange(700.0)
    found = evaluate_batches(EvaluationHooks(step_of(Tensor.mean)), values.split(1), description="Evaluation")
    assert found.metrics == {"eval_loss": 349.5}


def test_a_loss_that_is_not_a_number_is_seen() -> None:
    batches = [torch.tensor([1.0]), torch.tensor([math.nan])]
    found = evaluate_batches(EvaluationHooks(step_of(Tensor.mean)), batches, description="Evaluation")
    assert math.isnan(found.metrics["eval_loss"])
    weightless = EvaluationHooks(step_of(Tensor.mean), loss_weight=lambda inputs, rows: float(not inputs.isnan().any()))
    assert evaluate_batches(weightless, batches, description="Evaluation").metrics == {"eval_loss": 1.0}
    none = EvaluationHooks(step_of(Tensor.mean), loss_weight=lambda inputs, rows: 0)
    assert math.isnan(evaluate_batches(none, batches, description="Evaluation").metrics["eval_loss"])


def test_nothing_to_evaluate() -> None:
    found = evaluate_batches(EvaluationHooks(step_of(Tensor.mean), summary), [], description="Evaluation")
    assert tuple(found) == (None, None, {}, 0)


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(rows())


def test_samples_are_counted_where_the_data_have_no_length(tmp_path: Path) -> None:
    trainer = peer(tmp_path, Tagger())
    loader = trainer.get_eval_dataloader(Stream())
    found = evaluate_batches(hooks_of(trainer, loader), loader, description="Evaluation")
    assert found.num_samples == len(LENGTHS)
    sized = type("Sized", (list,), {})([torch.ones(2)] * 3)
    hooks = EvaluationHooks(step_of(Tensor.mean), num_examples=lambda loader: 10 * len(loader))
    assert evaluate_batches(hooks, sized, description="Evaluation").num_samples == 30
    sized.dataset = type("Shard", (), {"num_examples": 7})()
    assert evaluate_batches(hooks, sized, description="Evaluation").num_samples == 7


def test_metrics_of_trainkit_are_merged(tmp_path: Path) -> None:
    metrics = {"accuracy": accuracy, "counts": counts}
    trainer = peer(tmp_path, Tagger("pair"))
    loader = trainer.get_eval_dataloader(rows())
    everything = evaluate_batches(hooks_of(trainer, loader), loader, description="Prediction")
    for description in ("Evaluation", "Prediction"):
        hooks = hooks_of(trainer, loader, compute_metrics=metrics)
        found = evaluate_batches(hooks, loader, description=description)
        assert (found.predictions is None) is (description == "Evaluation")
        kept = everything.label_ids != -100
        right = everything.predictions.argmax(-1) == everything.label_ids
        assert found.metrics["eval_accuracy"] == pytest.approx(right[kept].mean())
        # Every log can hold lists.
        assert isinstance(found.metrics["eval_counts/recall"], list) and len(found.metrics["eval_counts/recall"]) == 4
        assert found.metrics["eval_loss"] == everything.metrics["eval_loss"]


def test_times_of_this_evaluation_are_reported() -> None:
    found = evaluate_batches(
        EvaluationHooks(step_of(Tensor.mean)),
        [torch.ones(1)],
        description="Evaluation",
        metric_key_prefix="test",
        times={"model_preparation_time": 0.25},
    )
    assert found.metrics == {"test_loss": 1.0, "test_model_preparation_time": 0.25}
    assert preparation_seconds(found.metrics, "test") == 0.25
    assert preparation_seconds({"test_loss": 1.0}, "test") == 0.0


def test_events_come_after_each_batch() -> None:
    order: list[str] = []
    hooks = EvaluationHooks(
        lambda inputs, loss_only, ignore_keys: order.append("step") or (None, inputs, inputs),
        lambda prediction, compute_result: order.append("metrics") or {},
        preprocess_logits_for_metrics=lambda logits, labels: order.append("preprocess") or logits,
        on_prediction_step=lambda: order.append("event"),
        batch_eval_metrics=True,
    )
    evaluate_batches(hooks, [torch.ones(1)] * 2, description="Evaluation")
    assert order == ["step", "preprocess", "event", "metrics"] * 2


def test_bad_metrics_are_named() -> None:
    batches = [torch.ones(1)]
    step = step_of(Tensor.mean)
    with pytest.raises(TypeError, match="compute_metrics: it returned a NoneType; expected a dict"):
        evaluate_batches(EvaluationHooks(step, lambda found: None), batches, description="Evaluation")
    with pytest.raises(TypeError, match="compute_metrics: 'f1' is a str; expected a function"):
        evaluate_batches(EvaluationHooks(step, {"f1": "f1"}), batches, description="Evaluation")
    hooks = EvaluationHooks(lambda inputs, loss_only, ignore_keys: (None, inputs, None), summary)
    with pytest.warns(UserWarning, match="compute_metrics: not called, since no batch gave both"):
        evaluate_batches(hooks, batches, description="Evaluation")
    hooks = EvaluationHooks(step, summary, include_for_metrics=["inputs"])
    with pytest.raises(ValueError, match="asks for the model's 'input_ids', but the batch has x"):
        evaluate_batches(hooks, [{"x": batches[0]}], description="Evaluation")


@given(st.dictionaries(st.sampled_from(["loss", "eval_loss", "m", "eval_k", "evaluation"]), st.integers()))
def test_prefixes(metrics: dict[str, int]) -> None:
    found = prefixed(metrics, "eval")
    assert all(name.startswith("eval_") for name in found)
    for name, value in metrics.items():
        key = name if name.startswith("eval_") else f"eval_{name}"
        assert found[key] == (metrics["loss"] if key == "eval_loss" and "loss" in metrics else value)


def test_numbers_are_as_in_transformers() -> None:
    metrics = {
        "a": np.float32(0.5),
        "b": (torch.tensor([2]), [np.int64(3)]),
        "c": {"d": np.ones(2), "e": torch.ones(2), "f": "text"},
    }
    found, expected = denumpify(metrics), transformers.trainer_utils.denumpify_detensorize(metrics)
    assert_same({**found, "c": found["c"]["d"]}, {**expected, "c": expected["c"]["d"]})
    assert torch.equal(found["c"]["e"], torch.ones(2)) and found["c"]["f"] == "text"


def test_rows_are_cut_where_there_are_rows() -> None:
    inputs = {"x": torch.zeros(3, 2), "masks": [torch.zeros(2), torch.zeros(3), torch.zeros(3)], "n": 3, "s": "abc"}
    found = first_rows(inputs, 3, 1)
    assert found["x"].shape == (1, 2) and len(found["masks"]) == 1 and len(found["masks"][0]) == 2
    assert found["n"] == 3 and found["s"] == "abc"
    assert [t.shape[0] for t in first_rows([torch.zeros(3), torch.zeros(3), torch.zeros(3)], 3, 2)] == [2, 2, 2]


MEMORY = """
import resource, sys
import torch
from trainkit.metrics import accuracy
from trainkit.trainer.evaluation import EvaluationHooks, evaluate_batches

ROWS, CLASSES, BATCH = int(sys.argv[1]), 1000, 100
torch.set_num_threads(1)
model = torch.nn.Linear(4, CLASSES)

def step(inputs, loss_only, ignore_keys):
    with torch.no_grad():
        logits = model(inputs["x"])
    return torch.nn.functional.cross_entropy(logits, inputs["labels"]), logits, inputs["labels"]

def batches(rows):
    for i in range(rows // BATCH):
        yield {"x": torch.randn(BATCH, 4), "labels": torch.randint(0, CLASSES, (BATCH,))}

def batch_metrics():
    hits = 0
    def compute_metrics(prediction, compute_result):
        nonlocal hits
        hits += int((prediction.predictions.argmax(-1) == prediction.label_ids).sum())
        return {"accuracy": hits / ROWS} if compute_result else {}
    return EvaluationHooks(step, compute_metrics, batch_eval_metrics=True)

def largest(prediction):
    return {"rows": len(prediction.predictions)}

KINDS = {
    "batch": batch_metrics,
    "merged": lambda: EvaluationHooks(step, {"accuracy": accuracy}),
    "spilled": lambda: EvaluationHooks(step, largest, spill_bytes=2**20, folder=sys.argv[3]),
}
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

evaluate_batches(KINDS[sys.argv[2]](), batches(1000), description="Evaluation")
before = peak()
found = evaluate_batches(KINDS[sys.argv[2]](), batches(ROWS), description="Evaluation")
assert found.num_samples == ROWS and len(found.metrics) == 2, found.metrics
print(peak() - before, ROWS * CLASSES * 4)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["batch", "merged", "spilled"])
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, kind: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, "100000", kind, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    grown, logits = map(int, run.stdout.split())
    assert grown <= logits / 20, f"{grown} bytes more for {logits} bytes of logits"
