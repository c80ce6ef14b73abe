"""Metrics over any split beside torchmetrics and closed forms over the whole."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torchmetrics
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree
from torchmetrics import classification as tmc
from torchmetrics import regression as tmr

from trainkit.accumulate import merge_metrics
from trainkit.metrics import (
    BitsPerByte,
    Counts,
    Latest,
    Maximum,
    Mean,
    Metric,
    Minimum,
    Perplexity,
    Sum,
    accuracy,
    bits_per_byte,
    compute,
    counts,
    from_torchmetrics,
    perplexity,
    token_count,
    top_k_accuracy,
)

C = 4
splits = st.lists(st.integers(1, 5), min_size=1, max_size=5)
seeds = st.integers(0, 2**31)


def _rows(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    logits, labels = torch.randn(rows, C, generator=g), torch.randint(C, (rows,), generator=g)
    return logits, labels.masked_fill(torch.rand(rows, generator=g) < 0.2, -100)


def _merged(parts: list[Any]) -> Any:
    total = parts[0]
    for part in parts[1:]:
        total = total.merge(part)
    return total


SIMPLE: dict[str, tuple[Any, Any]] = {
    "Mean": (lambda x: Mean(x.sum(), torch.tensor(len(x))), lambda x: x.mean()),
    "Sum": (lambda x: Sum(x.sum()), lambda x: x.sum()),
    "Maximum": (lambda x: Maximum(x.max()), lambda x: x.max()),
    "Minimum": (lambda x: Minimum(x.min()), lambda x: x.min()),
    "Latest": (lambda x: Latest(x[-1]), lambda x: x[-1]),
    "Perplexity": (lambda x: perplexity(x.sum(), len(x)), lambda x: x.mean().exp()),
    "BitsPerByte": (lambda x: bits_per_byte(x.sum(), 3 * len(x)), lambda x: x.mean() / 3 / math.log(2)),
}


@pytest.mark.parametrize("name", SIMPLE)
@settings(max_examples=20, deadline=None)
@given(sizes=splits, seed=seeds)
def test_any_split_gives_the_whole(name: str, sizes: list[int], seed: int) -> None:
    make, whole = SIMPLE[name]
    x = torch.randn(sum(sizes), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = _merged([make(part) for part in x.split(sizes)])
    torch.testing.assert_close(found.compute(), whole(x))


@pytest.mark.parametrize("name", SIMPLE)
def test_merging_is_associative_and_leaves_its_arguments(name: str) -> None:
    a, b, c = (SIMPLE[name][0](torch.tensor(values)) for values in ([1.0, 5.0], [3.0], [2.0, 4.0, 0.5]))
    before = pytree.tree_map(Tensor.clone, (a, b, c))
    left, right = a.merge(b).merge(c), a.merge(b.merge(c))
    torch.testing.assert_close(left.compute(), right.compute())
    for one, other in zip(pytree.tree_leaves((a, b, c)), pytree.tree_leaves(before), strict=True):
        assert torch.equal(one, other)


def test_metrics_are_frozen_pytrees() -> None:
    logits, labels = _rows(6)
    made: list[Metric] = [make(torch.ones(2)) for make, _ in SIMPLE.values()] + [counts(logits, labels)]
    for metric in made:
        assert isinstance(metric, Metric)
        doubled = pytree.tree_map(lambda t: t * 2, metric)
        assert type(doubled) is type(metric)
        with pytest.raises(AttributeError):
            metric.other = 1  # type: ignore[attr-defined]


def test_the_extremes_keep_nans() -> None:
    nan = torch.tensor(float("nan"))
    for kind in (Maximum, Minimum):
        assert kind(nan).merge(kind(torch.tensor(1.0))).compute().isnan()
        assert kind(torch.tensor(1.0)).merge(kind(nan)).compute().isnan()


@settings(max_examples=20, deadline=None)
@given(sizes=splits, seed=seeds, k=st.integers(1, C))
def test_accuracy_is_that_of_torchmetrics(sizes: list[int], seed: int, k: int) -> None:
    logits, labels = _rows(sum(sizes), seed)
    reference = tmc.MulticlassAccuracy(C, top_k=k, average="micro", ignore_index=-100)
    if not (labels != -100).any():
        return
    parts = zip(logits.split(sizes), labels.split(sizes), strict=True)
    found = _merged([top_k_accuracy(x, y, k=k) for x, y in parts])
    torch.testing.assert_close(found.compute(), reference(logits, labels))
    if k == 1:
        torch.testing.assert_close(accuracy(logits, labels).compute(), reference(logits, labels))


def test_accuracy_counts_exactly() -> None:
    # In float32 sums of ones stop at 2^24.
    many = Mean(torch.tensor(2**24), torch.tensor(2**25))
    one = accuracy(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    assert many.merge(one).total == 2**24 + 1


@settings(max_examples=20, deadline=None)
@given(sizes=splits, seed=seeds)
def test_counts_give_the_scores_of_torchmetrics(sizes: list[int], seed: int) -> None:
    logits, labels = _rows(sum(sizes), seed)
    found = _merged([counts(x, y) for x, y in zip(logits.split(sizes), labels.split(sizes), strict=True)]).compute()
    if not (labels != -100).any():
        return
    for name, reference in (
        ("precision", tmc.MulticlassPrecision(C, average=None, ignore_index=-100)),
        ("recall", tmc.MulticlassRecall(C, average=None, ignore_index=-100)),
        ("f1", tmc.MulticlassF1Score(C, average=None, ignore_index=-100)),
        ("macro_f1", tmc.MulticlassF1Score(C, average="macro", ignore_index=-100)),
    ):
        torch.testing.assert_close(found[name], reference(logits, labels))


def test_shapes_with_more_axes_count_alike() -> None:
    logits, labels = _rows(6)
    for function in (accuracy, counts):
        flat, cut = function(logits, labels), function(logits.reshape(2, 3, C), labels.reshape(2, 3))
        for one, other in zip(pytree.tree_leaves(flat), pytree.tree_leaves(cut), strict=True):
            assert torch.equal(one, other)


def test_the_ignored_label_can_be_another() -> None:
    logits, labels = _rows(8)
    other = labels.masked_fill(labels == -100, -1)
    assert accuracy(logits, other, ignore_index=-1).compute() == accuracy(logits, labels).compute()
    assert torch.equal(counts(logits, other, ignore_index=-1).actual, counts(logits, labels).actual)
    assert token_count(other, ignore_index=-1).compute() == token_count(labels).compute() == (labels != -100).sum()


@pytest.mark.parametrize("function", [accuracy, counts])
def test_labels_of_another_shape_are_refused(function: Any) -> None:
    with pytest.raises(ValueError, match=r"labels: shape \(6, 1\) for logits of shape \(6, 4\); expected \(6,\)"):
        function(torch.zeros(6, C), torch.zeros(6, 1, dtype=torch.int64))


@pytest.mark.parametrize("k", [0, C + 1])
def test_a_k_out_of_range_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"k: got {k}, expected 1 to {C}"):
        top_k_accuracy(*_rows(3), k=k)


def test_perplexity_and_bits_carry_no_graph() -> None:
    loss_sum = torch.ones((), requires_grad=True) * 2
    assert not perplexity(loss_sum, 2).compute().requires_grad
    assert not bits_per_byte(loss_sum, 2).compute().requires_grad


def test_bits_per_byte_is_the_code_length() -> None:
    probabilities = torch.tensor([0.5, 0.25], dtype=torch.float64)
    found = bits_per_byte(-probabilities.log().sum(), torch.tensor(6)).compute()
    torch.testing.assert_close(found, torch.tensor((1 + 2) / 6, dtype=torch.float64))


def test_compute_brings_every_dtype_to_the_host() -> None:
    big = 2**53 + 1
    values = compute(
        {
            "double": Latest(torch.tensor(1 / 3, dtype=torch.float64, requires_grad=True)),
            "half": Latest(torch.tensor(0.5, dtype=torch.bfloat16)),
            "count": Sum(torch.tensor(big)),
            "flag": Latest(torch.tensor(True)),
            "vector": Latest(torch.tensor([[1, 2], [3, 4]], dtype=torch.int32).t()),
            "nothing": Latest(torch.zeros(0)),
            "f1": Counts(*(torch.tensor([1, 1]) for _ in range(3))),
        }
    )
    assert (values["double"], values["half"], values["count"], values["flag"]) == (1 / 3, 0.5, big, True)
    assert [type(values[name]) for name in ("double", "count", "flag")] == [float, int, bool]
    assert torch.equal(values["vector"], torch.tensor([[1, 3], [2, 4]], dtype=torch.int32))
    assert values["nothing"].shape == (0,)
    assert values["f1/macro_f1"] == 1.0
    assert torch.equal(values["f1/recall"], torch.ones(2))


def test_compute_keeps_the_order_of_the_names() -> None:
    metrics = {name: Sum(torch.tensor(i)) for i, name in enumerate("bac")}
    assert list(compute(metrics).items()) == [("b", 0), ("a", 1), ("c", 2)]


def test_compute_of_nothing_is_nothing() -> None:
    assert compute({}) == {}


def test_metrics_pass_through_a_compiled_graph() -> None:
    def run(logits: Tensor, labels: Tensor) -> dict[str, Any]:
        one = {"accuracy": accuracy(logits, labels), "f1": counts(logits, labels), "tokens": token_count(labels)}
        more = {
            "perplexity": Perplexity(logits.sum(), torch.tensor(3)),
            "bits": BitsPerByte(logits.sum(), labels.sum()),
        }
        return merge_metrics({**one, **more}, {**one, "top": Maximum(logits.max())})

    arguments = _rows(6)
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(*arguments)
    expected = run(*arguments)
    assert found.keys() == expected.keys()
    for one, other in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(one, other)


class Range(torchmetrics.Metric):
    """States reduced by max, min and mean, which no metric of torchmetrics has all of."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("top", torch.tensor(-torch.inf), dist_reduce_fx="max")
        self.add_state("bottom", torch.tensor(torch.inf), dist_reduce_fx="min")
        self.add_state("middle", torch.tensor(0.0), dist_reduce_fx="mean")

    def update(self, preds: Tensor, target: Tensor) -> None:
        self.top, self.bottom = torch.maximum(self.top, preds.max()), torch.minimum(self.bottom, preds.min())
        self.middle = preds.sum()

    def compute(self) -> Tensor:
        return torch.stack([self.top, self.bottom, self.middle])


REFERENCES = {
    "f1 (sum)": lambda: tmc.MulticlassF1Score(C, ignore_index=-100),
    "confusion (sum of a matrix)": lambda: tmc.MulticlassConfusionMatrix(C, ignore_index=-100),
    "auroc (cat)": lambda: tmc.MulticlassAUROC(C, ignore_index=-100),
    "auroc in bins (sum)": lambda: tmc.MulticlassAUROC(C, thresholds=5, ignore_index=-100),
    "sum of squares": lambda: tmr.MeanSquaredError(),
}


def _for(name: str, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    logits, labels = _rows(rows, seed)
    return (logits[:, 0], logits[:, 1]) if "squares" in name else (logits.softmax(-1), labels.abs() % C)


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("sizes", [[12], [1, 11], [5, 4, 3], [3, 3, 1, 1, 4]])
def test_an_adapted_metric_of_parts_is_torchmetrics_of_the_whole(name: str, sizes: list[int]) -> None:
    preds, target = _for(name, 12, 5)
    reference = REFERENCES[name]()
    function = from_torchmetrics(reference)
    parts = [function(x, y) for x, y in zip(preds.split(sizes), target.split(sizes), strict=True)]
    before = pytree.tree_map(Tensor.clone, parts)
    found = _merged(parts).compute()
    expected = REFERENCES[name]()(preds, target)
    torch.testing.assert_close(found, expected)
    assert isinstance(parts[0], Metric)
    assert reference.update_count == 0
    for one, other in zip(pytree.tree_leaves(parts), pytree.tree_leaves(before), strict=True):
        assert torch.equal(one, other)


def test_max_min_and_mean_merge_as_torchmetrics_merges() -> None:
    function = from_torchmetrics(Range())
    x = torch.arange(6.0)
    parts = [function(part, part) for part in x.split([1, 2, 3])]
    # Means are over calls: sums 0, 3 and 12.
    expected = torch.tensor([5.0, 0.0, 5.0])
    torch.testing.assert_close(_merged(parts).compute(), expected)
    torch.testing.assert_close(parts[0].merge(parts[1].merge(parts[2])).compute(), expected)


def test_an_adapted_metric_is_a_pytree_and_merges_by_name() -> None:
    function = from_torchmetrics(tmc.MulticlassF1Score(C))
    logits, labels = _rows(6)
    one = {"f1": function(logits, labels.clamp(min=0))}
    copied = pytree.tree_map(Tensor.clone, one)
    whole = tmc.MulticlassF1Score(C)(torch.cat([logits] * 2), torch.cat([labels.clamp(min=0)] * 2))
    assert compute(merge_metrics(one, copied))["f1"] == pytest.approx(float(whole))


def test_a_failed_update_leaves_nothing_behind() -> None:
    function = from_torchmetrics(tmc.MulticlassF1Score(2))
    with pytest.raises(RuntimeError):
        function(torch.tensor([0, 1]), torch.tensor([0, 5]))
    assert function(torch.tensor([0, 1]), torch.tensor([0, 1])).compute() == 1


def test_what_is_no_torchmetric_is_refused() -> None:
    with pytest.raises(TypeError, match=r"metric: got function, expected a torchmetrics\.Metric"):
        from_torchmetrics(accuracy)  # type: ignore[arg-type]


def test_states_that_do_not_merge_are_refused() -> None:
    with pytest.raises(ValueError, match=r"metric: state '.*' of PearsonCorrCoef has no reduction among sum"):
        from_torchmetrics(tmr.PearsonCorrCoef())
