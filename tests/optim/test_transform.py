"""The laws of gradient transformations, on every transformation that is not itself an algorithm."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor
from torch.utils import _pytree as pytree

from trainkit import tree
from trainkit.optim.adamw import adamw
from trainkit.optim.clip import adaptive_clip, clip_by_global_norm, clip_by_unit_norm, clip_by_value
from trainkit.optim.finite import skip_nonfinite
from trainkit.optim.groups import by_name, by_rank, freeze, masked, partition
from trainkit.optim.loss_scale import dynamic_loss_scale
from trainkit.optim.plateau import reduce_on_plateau
from trainkit.optim.sgd import sgd
from trainkit.optim.transform import (
    REPORT,
    Transform,
    add_updates,
    as_schedule,
    chain,
    identity,
    reports,
    stateless,
)
from trainkit.optim.weight_decay import add_weight_decay, decouple_weight_decay, no_bias_or_norm
from trainkit.schedules import linear

STEPS = 5
SHAPES = {"embed.weight": (5, 3), "layer.weight": (3, 3), "layer.bias": (3,), "scale": ()}

TRANSFORMS: dict[str, Callable[[], Transform]] = {
    "identity": identity,
    "chain_of_nothing": chain,
    "clip_by_global_norm": lambda: chain(clip_by_global_norm(0.5), sgd(0.1)),
    "clip_alone": lambda: clip_by_global_norm(0.5),
    "clip_by_value": lambda: chain(clip_by_value(0.5), sgd(0.1)),
    "clip_by_unit_norm": lambda: chain(clip_by_unit_norm(0.5), sgd(0.1)),
    "adaptive_clip": lambda: chain(adaptive_clip(0.05), sgd(0.1)),
    "add_weight_decay": lambda: chain(add_weight_decay(0.1, no_bias_or_norm), sgd(0.1, momentum=0.9)),
    "scheduled_weight_decay": lambda: chain(add_weight_decay(linear(0.5, 0.0, 4)), sgd(0.1)),
    "decouple_weight_decay": lambda: chain(adamw(0.1, weight_decay=0.0), decouple_weight_decay(0.01)),
    "masked": lambda: chain(masked(clip_by_value(0.1), no_bias_or_norm), sgd(0.1)),
    "partition": lambda: partition(
        {"matrix": sgd(0.1, momentum=0.9), "rest": adamw(0.1), "none": adamw(1.0)},
        by_rank({2: "matrix"}, default="rest"),
    ),
    "partition_in_chain": lambda: chain(
        clip_by_global_norm(1.0),
        partition({"train": adamw(0.1), "rest": freeze()}, by_name({"layer.*": "train"}, "rest")),
    ),
    "skip_nonfinite": lambda: skip_nonfinite(chain(clip_by_global_norm(1.0), adamw(0.1))),
    "dynamic_loss_scale": lambda: dynamic_loss_scale(adamw(0.1), growth_interval=2),
    "reduce_on_plateau": lambda: chain(adamw(0.1), reduce_on_plateau(patience=0, factor=0.5)),
}


def tensors(seed: int, *, scale: float = 1.0) -> TensorDict:
    generator = torch.Generator().manual_seed(seed)
    return tree.frozen({name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()})


def loss(i: int) -> Tensor:
    return torch.tensor([3.0, 2.0, 2.0, 2.5, 1.0][i % 5])


def trained(tx: Transform, *, donated: bool = False, face: str = "apply") -> tuple[TensorDict, TensorDict]:
    """Parameters and optimizer state after a few updates."""
    params = tensors(0)
    state = tx.init(params)
    for i in range(STEPS):
        grads = tensors(i + 1)
        if face == "update":
            updates, state = tx.update(grads, state, params, loss=loss(i))
            params = add_updates(params, updates)
        elif donated:
            with tree.donate(grads, state, params):
                params, state = tx.apply(grads, state, params, loss=loss(i))
        else:
            params, state = tx.apply(grads, state, params, loss=loss(i))
    return params, state


def assert_same(one: object, two: object) -> None:
    """Equal to the bit, with equal structure."""
    (a, spec_a), (b, spec_b) = pytree.tree_flatten(one), pytree.tree_flatten(two)
    assert spec_a == spec_b
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("face", ["update", "apply"])
def test_inputs_stay_as_they_were_and_results_repeat(name: str, face: str) -> None:
    tx = TRANSFORMS[name]()
    params, grads = tensors(0), tensors(1)
    state = tx.init(params)
    before = tree.clone((params, grads, state))
    first = getattr(tx, face)(grads, state, params, loss=loss(0))
    torch.manual_seed(99)
    second = getattr(tx, face)(grads, state, params, loss=loss(0))
    assert_same((params, grads, state), before)
    assert_same(first, second)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_donated_equals_pure_to_the_bit(name: str) -> None:
    assert_same(trained(TRANSFORMS[name](), donated=True), trained(TRANSFORMS[name]()))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_both_faces_mean_the_same(name: str) -> None:
    params, state = trained(TRANSFORMS[name]())
    through_updates, other_state = trained(TRANSFORMS[name](), face="update")
    for key in SHAPES:
        # params + (new - params) rounds twice where apply rounds once.
        torch.testing.assert_close(through_updates[key], params[key], rtol=1e-5, atol=1e-6)
    assert pytree.tree_structure(state) == pytree.tree_structure(other_state)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_state_keeps_its_shapes_and_dtypes(name: str) -> None:
    tx = TRANSFORMS[name]()
    first, (_, last) = tx.init(tensors(0)), trained(tx)
    (a, spec_a), (b, spec_b) = pytree.tree_flatten(first), pytree.tree_flatten(last)
    assert spec_a == spec_b
    assert [(t.shape, t.dtype) for t in a] == [(t.shape, t.dtype) for t in b]


@pytest.mark.parametrize("name", TRANSFORMS)
def test_compiles_into_one_graph_that_serves_every_step(name: str) -> None:
    # Dynamo counts the graphs of one piece of code, and all chains are one.
    torch._dynamo.reset()
    tx = TRANSFORMS[name]()
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(tx.apply, fullgraph=True, backend=count)
    params = tensors(0)
    state = tx.init(params)
    for i in range(3):
        expected = tx.apply(tensors(i + 1), state, params, loss=loss(i))
        found = compiled(tensors(i + 1), state, params, loss=loss(i))
        for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        params, state = expected
    assert len(graphs) <= 1


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.filterwarnings("ignore:There is a performance drop.*:UserWarning")
def test_a_population_under_vmap_is_its_members(name: str) -> None:
    tx = TRANSFORMS[name]()
    members = [(tensors(10 + i), tx.init(tensors(20 + i)), tensors(20 + i)) for i in range(2)]
    alone = [tx.apply(*member, loss=loss(0)) for member in members]
    spec = pytree.tree_structure(members[0])

    def one(*leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(pytree.tree_leaves(tx.apply(*pytree.tree_unflatten(leaves, spec), loss=loss(0))))

    columns = zip(*(pytree.tree_leaves(member) for member in members), strict=True)
    together = torch.vmap(one)(*(torch.stack(column) for column in columns))
    for i in range(2):
        for a, b in zip(together, pytree.tree_leaves(alone[i]), strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-5, atol=1e-6)


MEMBERS = [
    lambda: clip_by_global_norm(0.7),
    lambda: add_weight_decay(0.1),
    lambda: clip_by_value(0.4),
    lambda: sgd(0.1, momentum=0.5),
    lambda: decouple_weight_decay(0.2),
    identity,
]


@given(st.lists(st.sampled_from(MEMBERS), min_size=1, max_size=4), st.data())
def test_chain_is_associative(members: list[Callable[[], Transform]], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(members)))
    flat = chain(*(make() for make in members))
    nested = chain(chain(*(make() for make in members[:cut])), chain(*(make() for make in members[cut:])))
    assert_same(trained(flat, face="update")[0], trained(nested, face="update")[0])


@pytest.mark.parametrize("face", ["update", "apply"])
def test_identity_changes_no_chain(face: str) -> None:
    plain = trained(chain(clip_by_value(0.5), sgd(0.1)), face=face)[0]
    assert_same(trained(chain(identity(), clip_by_value(0.5), identity(), sgd(0.1)), face=face)[0], plain)


def test_chain_runs_its_members_in_order_on_the_updates_of_the_one_before() -> None:
    double, add_one = (stateless(lambda u, p, f=f: tree.map_tensors(f, u)) for f in (lambda t: 2 * t, lambda t: t + 1))
    w = tree.frozen({"w": torch.tensor([3.0])})
    tx = chain(double, add_one)
    assert float(tx.update(w, tx.init(w), w)[0]["w"]) == 7.0
    assert float(tx.apply(w, tx.init(w), w)[0]["w"]) == 10.0


def test_optimizers_update_donated_parameters_in_their_own_memory() -> None:
    tx = chain(clip_by_global_norm(1.0), partition({"a": adamw(0.1), "b": sgd(0.1)}, by_rank({2: "a"}, default="b")))
    params, grads = tensors(0), tensors(1)
    state = tx.init(params)
    places = [t.data_ptr() for t in pytree.tree_leaves((params, state))]
    with tree.donate(params, grads, state):
        after, state_after = tx.apply(grads, state, params)
    assert after is params
    assert state_after is state
    assert [t.data_ptr() for t in pytree.tree_leaves((after, state_after))] == places


def test_updates_are_added_in_the_dtype_of_the_parameters() -> None:
    params, updates = tree.frozen({"w": torch.ones(2, dtype=torch.bfloat16)}), tree.frozen({"w": torch.full((2,), 0.5)})
    assert torch.equal(add_updates(params, updates)["w"], torch.full((2,), 1.5, dtype=torch.bfloat16))


def test_reports_of_one_name_are_told_apart_by_their_path() -> None:
    tx = chain(clip_by_global_norm(1.0), partition({"a": sgd(0.25), "b": sgd(0.5)}, by_rank({2: "a"}, default="b")))
    _, state = trained(tx)
    found = reports(state)
    assert set(found) == {"grad_norm", "learning_rate", "1/b/learning_rate"}
    assert (float(found["learning_rate"]), float(found["1/b/learning_rate"])) == (0.25, 0.5)


def test_a_parameter_called_like_the_entry_for_reports_is_no_report() -> None:
    params = tree.frozen({REPORT: torch.ones(2), "w": torch.ones(2)})
    tx = sgd(0.1, momentum=0.9)
    assert set(reports(tx.init(params))) == {"learning_rate"}


def test_a_number_is_a_constant_schedule_and_text_is_none() -> None:
    assert float(as_schedule(0.25)(torch.tensor(7))) == 0.25
    with pytest.raises(TypeError, match="schedule: got str, expected a number or a function of the step tensor"):
        as_schedule("cosine")
