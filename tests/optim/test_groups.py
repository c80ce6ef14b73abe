"""Groups of parameters against parameter groups of torch.optim."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor, nn

from trainkit import tree
from trainkit.optim.adamw import adamw
from trainkit.optim.clip import clip_by_global_norm, clip_by_value
from trainkit.optim.groups import (
    Labels,
    by_module_kind,
    by_name,
    by_rank,
    first_label,
    freeze,
    masked,
    partition,
)
from trainkit.optim.muon import muon
from trainkit.optim.sgd import sgd
from trainkit.optim.transform import Transform, chain, reports
from trainkit.optim.weight_decay import no_bias_or_norm

SHAPES = {
    "embed.weight": (7, 4),
    "layer.weight": (4, 4),
    "layer.bias": (4,),
    "norm.weight": (4,),
    "head.weight": (7, 4),
}
RATES = {"fast": 2.0**-3, "slow": 2.0**-7}


def tensors(seed: int, dtype: torch.dtype = torch.float64) -> TensorDict:
    generator = torch.Generator().manual_seed(seed)
    return tree.frozen(
        {k: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for k, s in SHAPES.items()}
    )


def trained(tx: Transform, steps: int = 20, *, face: str = "apply", donated: bool = False) -> TensorDict:
    params = tensors(0)
    state = tx.init(params)
    for i in range(steps):
        grads = tensors(i + 1)
        if face == "update":
            updates, state = tx.update(grads, state, params)
            params = tree.map_tensors(torch.add, params, updates)
        elif donated:
            with tree.donate(params, state, grads):
                params, state = tx.apply(grads, state, params)
        else:
            params, state = tx.apply(grads, state, params)
    return params


def torch_trained(
    labels: Labels, make: Callable[[list[dict[str, object]]], torch.optim.Optimizer], steps: int = 20
) -> dict[str, Tensor]:
    """``torch.optim`` with one parameter group for each label, at the label's rate."""
    parameters = {name: nn.Parameter(t.clone()) for name, t in tensors(0).items()}
    groups: dict[str, list[nn.Parameter]] = {}
    for name, p in parameters.items():
        groups.setdefault(labels(name, p), []).append(p)
    optimizer = make([{"params": members, "lr": RATES[label]} for label, members in groups.items()])
    for i in range(steps):
        for name, g in tensors(i + 1).items():
            parameters[name].grad = g
        optimizer.step()
    return {name: p.data for name, p in parameters.items()}


KINDS = {
    "sgd": (lambda lr: sgd(lr, momentum=0.9), lambda groups: torch.optim.SGD(groups, momentum=0.9)),
    "adamw": (lambda lr: adamw(lr, weight_decay=0.1), lambda groups: torch.optim.AdamW(groups, weight_decay=0.1)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["apply", "update", "donated"])
def test_a_partition_equals_parameter_groups_of_torch(kind: str, mode: str) -> None:
    ours, theirs = KINDS[kind]
    labels = by_name({"*.bias": "slow", "norm.*": "slow"}, default="fast")
    tx = partition({label: ours(rate) for label, rate in RATES.items()}, labels)
    found = trained(tx, face="update" if mode == "update" else "apply", donated=mode == "donated")
    for name, expected in torch_trained(labels, theirs).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-11, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(["fast", "slow"]), min_size=len(SHAPES), max_size=len(SHAPES)))
def test_any_assignment_of_labels_equals_parameter_groups_of_torch(assigned: list[str]) -> None:
    chosen = dict(zip(SHAPES, assigned, strict=True))
    labels = by_name(chosen)
    tx = partition({label: sgd(rate, momentum=0.5) for label, rate in RATES.items()}, labels)
    expected = torch_trained(labels, lambda groups: torch.optim.SGD(groups, momentum=0.5), steps=5)
    for name, value in trained(tx, 5).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-11, atol=1e-12)


def test_muon_for_matrices_and_adamw_for_the_rest_is_each_alone() -> None:
    labels = first_label(by_name({"embed.*": "adamw", "head.*": "adamw"}), by_rank({2: "muon"}, default="adamw"))
    found = trained(partition({"muon": muon(2.0**-5), "adamw": adamw(2.0**-8)}, labels), 5)
    matrix = nn.Parameter(tensors(0)["layer.weight"].clone())
    others = {name: nn.Parameter(t.clone()) for name, t in tensors(0).items() if name != "layer.weight"}
    optimizers = [torch.optim.Muon([matrix], lr=2.0**-5), torch.optim.AdamW(others.values(), lr=2.0**-8)]
    for i in range(5):
        grads = tensors(i + 1)
        matrix.grad = grads["layer.weight"]
        for name, p in others.items():
            p.grad = grads[name]
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(found["layer.weight"], matrix.data, rtol=1e-6, atol=1e-7)
    for name, p in others.items():
        torch.testing.assert_close(found[name], p.data, rtol=1e-11, atol=1e-12)


def test_a_norm_in_a_partition_is_that_of_its_group() -> None:
    tx = partition({"m": clip_by_global_norm(1.0), "v": clip_by_value(100.0)}, by_rank({2: "m"}, default="v"))
    grads = tensors(1)
    updates, _ = tx.update(grads, tx.init(grads), grads)
    matrices = [name for name, shape in SHAPES.items() if len(shape) == 2]
    assert float(tree.global_norm([updates[name] for name in matrices])) == pytest.approx(1.0, rel=1e-5)
    assert torch.equal(updates["norm.weight"], grads["norm.weight"])


def test_every_label_has_a_subtree_and_its_reports_are_kept_apart() -> None:
    tx = partition({"a": sgd(0.25), "b": adamw(0.5)}, by_rank({2: "a"}, default="b"))
    state = tx.init(tensors(0))
    assert list(state.keys()) == ["a", "b"]
    _, state = tx.apply(tensors(1), state, tensors(0))
    assert {k: float(v) for k, v in reports(state).items()} == {"learning_rate": 0.25, "b/learning_rate": 0.5}


@pytest.mark.parametrize("face", ["apply", "update"])
def test_a_label_that_nothing_carries_is_allowed(face: str) -> None:
    tx = partition({"a": sgd(0.25), "nobody": adamw(0.5)}, lambda name, p: "a")
    for name, value in trained(tx, 3, face=face).items():
        torch.testing.assert_close(value, trained(sgd(0.25), 3)[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("label", ["unknown", None])
@pytest.mark.parametrize("call", ["init", "update", "apply"])
def test_a_label_without_transformation_names_the_parameter(label: str | None, call: str) -> None:
    params = tensors(0)
    state = partition({"known": sgd(0.1)}, lambda name, p: "known").init(params)
    tx = partition({"known": sgd(0.1)}, lambda name, p: label if name == "layer.bias" else "known")
    arguments = (params,) if call == "init" else (params, state, params)
    with pytest.raises(ValueError, match=rf"parameter 'layer.bias' got {label!r}, expected one of \['known'\]"):
        getattr(tx, call)(*arguments)


def test_masked_leaves_the_others_untouched() -> None:
    grads = tensors(1)
    tx = masked(clip_by_value(0.01), no_bias_or_norm)
    updates, _ = tx.update(grads, tx.init(grads), grads)
    for name, shape in SHAPES.items():
        if len(shape) == 2:
            assert float(updates[name].abs().max()) <= 0.01
        else:
            assert updates[name] is grads[name]


def test_masked_everywhere_and_nowhere_are_the_transformation_and_nothing() -> None:
    grads = tensors(1)
    for mask, expected in ((True, clip_by_value(0.01).update(grads, tree.frozen(), grads)[0]), (False, grads)):
        tx = masked(clip_by_value(0.01), lambda name, p, mask=mask: mask)
        updates, _ = tx.update(grads, tx.init(grads), grads)
        assert all(torch.equal(updates[name], expected[name]) for name in SHAPES)


@pytest.mark.parametrize("face", ["apply", "update"])
def test_frozen_parameters_stay_to_the_bit_and_the_others_train(face: str) -> None:
    tx = chain(
        clip_by_global_norm(1.0),
        partition({"on": sgd(0.1), "off": freeze()}, by_name({"layer.*": "on"}, default="off")),
    )
    before, after = tensors(0), trained(tx, 3, face=face)
    assert {name for name in SHAPES if not torch.equal(before[name], after[name])} == {"layer.weight", "layer.bias"}


def test_names_are_matched_in_order_whole_by_patterns_and_anywhere_by_expressions() -> None:
    labels = by_name({"layer.*": "first", "*.weight": "second", re.compile("bias$"): "third"}, default="last")
    cases = {
        "layer.weight": "first",
        "a.layer.weight": "second",
        "a.bias": "third",
        "bias.a": "last",
        "LAYER.x": "last",
    }
    assert {name: labels(name, torch.empty(0)) for name in cases} == cases
    assert by_name({"a": "x"})("b", torch.empty(0)) is None


def test_kinds_of_modules_are_found_through_subclasses_and_ties() -> None:
    class Wide(nn.Linear):
        pass

    model = nn.ModuleDict(
        {"embed": nn.Embedding(5, 3), "wide": Wide(3, 3), "norm": nn.LayerNorm(3), "head": nn.Linear(3, 5)}
    )
    model["head"].weight = model["embed"].weight
    labels = by_module_kind(model, {nn.Embedding: "embedding", nn.Linear: "matrix"}, default="rest")
    found = {name: labels(name, p) for name, p in model.named_parameters()}
    assert found == {
        "embed.weight": "embedding",
        "wide.weight": "matrix",
        "wide.bias": "matrix",
        "norm.weight": "rest",
        "norm.bias": "rest",
        "head.bias": "matrix",
    }


def test_ranks_without_a_label_have_none() -> None:
    assert by_rank({2: "matrix"})("w", torch.empty(3)) is None
    assert first_label(by_rank({2: "matrix"}))("w", torch.empty(3)) is None
    assert first_label(by_rank({2: "matrix"}), by_rank({1: "vector"}))("w", torch.empty(3)) == "vector"
