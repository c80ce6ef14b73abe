"""Trees of tensors, and who may overwrite them."""

import gc
import math
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainkit import tree


def make(**values: float) -> Any:
    return tree.frozen({name: torch.full((2,), value) for name, value in values.items()})


# -- making and mapping --------------------------------------------------------------------------------------------


def test_a_frozen_tree_refuses_writes_and_keeps_the_tensors() -> None:
    w = torch.zeros(2)
    frozen = tree.frozen({"a.weight": w, "inner": {"b": torch.ones(1)}})
    assert frozen["a.weight"] is w
    assert frozen["inner"]["b"].tolist() == [1.0]
    for write in (lambda: frozen.set("c", w), lambda: frozen.__setitem__("a.weight", w), lambda: frozen.pop("inner")):
        with pytest.raises(RuntimeError, match="lock"):
            write()


def test_a_mapping_of_somebody_else_is_only_read() -> None:
    weights = torch.nn.Linear(2, 1).state_dict()
    before = set(vars(weights))
    assert tree.leaves(weights) == list(weights.values())
    assert set(vars(weights)) == before


def test_trees_that_were_part_of_others_are_not_kept_alive() -> None:
    part = make(w=1.0)
    alive = weakref.ref(tree.frozen({"part": part}))
    gc.collect()
    assert alive() is None


def test_like_returns_the_tree_itself_where_nothing_changed() -> None:
    one = make(a=1.0, b=2.0)
    a, b = tree.leaves(one)
    assert tree.like(one, [a, b]) is one
    changed = tree.like(one, [a, a])
    assert tree.named(changed) == {"a": a, "b": a}
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        tree.like(one, [a])


class TestLeaves:
    """The list is remembered with its tree, and with it what was found out about the tensors."""

    def test_are_one_list_for_as_long_as_the_tree_has_these_tensors(self) -> None:
        made = tree.frozen({"a": torch.zeros(2), "b": torch.ones(3, dtype=torch.float64)})
        known = tree.leaves(made)
        assert tree.leaves(made) is known
        assert [kind[1] for kind in tree.kinds(known)] == [torch.float32, torch.float64]
        assert tree.are_contiguous(known)
        with made.unlock_():
            made["b"] = torch.ones(3, 2).T
        assert [t.shape for t in tree.leaves(made)] == [(2,), (2, 3)]
        assert [kind[1] for kind in tree.kinds(tree.leaves(made))] == [torch.float32]
        assert not tree.are_contiguous(tree.leaves(made))

    def test_of_a_mapping(self) -> None:
        tensors = {"a": torch.zeros(2)}
        assert tree.leaves(tensors) == list(tensors.values())  # type: ignore[arg-type]

    def test_pass_through_pytrees_and_transforms(self) -> None:
        made = tree.frozen({"a": torch.ones(2)})
        known = tree.leaves(made)
        assert torch.utils._pytree.tree_leaves((known, 1)) == [known[0], 1]
        (grad,) = torch.func.grad(lambda tensors: tensors[0].square().sum())(known)
        assert torch.equal(grad, torch.full((2,), 2.0))

    def test_of_a_copy_are_not_those_of_the_original(self) -> None:
        made = tree.frozen({"a": torch.zeros(2)})
        assert tree.is_donated(tree.leaves(made)) is False
        with tree.donate(made):
            assert tree.is_donated(tree.leaves(made))
            copied = pickle.loads(pickle.dumps(made))
            assert not tree.is_donated(tree.leaves(copied))

    def test_do_not_outlive_the_tree(self) -> None:
        made = tree.frozen({"a": torch.zeros(2)})
        tensor = weakref.ref(tree.leaves(made)[0])
        del made
        gc.collect()
        assert tensor() is None


def test_map_pairs_by_name_and_not_by_position() -> None:
    one, other = make(a=1.0, b=2.0), make(b=20.0, a=10.0)
    assert [t.tolist() for t in tree.leaves(tree.map_tensors(torch.add, one, other))] == [[11.0] * 2, [22.0] * 2]
    with pytest.raises(KeyError, match="b"):
        tree.map_tensors(torch.add, one, make(a=1.0))


def test_zeros_and_clones_share_nothing() -> None:
    one = make(a=1.0)
    zeros, copy = tree.zeros_like(one, torch.float64), tree.clone({"x": one, "n": 3})
    assert zeros["a"].dtype == torch.float64
    assert not zeros["a"].any()
    assert copy["n"] == 3
    assert torch.equal(copy["x"]["a"], one["a"])
    assert copy["x"]["a"].data_ptr() != one["a"].data_ptr()


# -- reductions ----------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=4), min_size=1, max_size=4))
def test_the_global_norm_is_that_of_all_numbers(columns: list[list[float]]) -> None:
    expected = math.sqrt(math.fsum(x * x for column in columns for x in column))
    tensors = [torch.tensor(column) for column in columns]
    assert float(tree.global_norm(tensors)) == pytest.approx(expected, rel=1e-5, abs=1e-30)
    assert float(torch.vmap(lambda *t: tree.global_norm(t))(*(t[None] for t in tensors))) == pytest.approx(
        expected, rel=1e-5, abs=1e-30
    )


def test_the_global_norm_is_taken_wide_and_over_mixed_dtypes() -> None:
    # In float16 the squares overflow, and bfloat16 cannot count 4096 ones.
    halves = [torch.full((4,), 300.0, dtype=torch.float16), torch.ones(4096, dtype=torch.bfloat16)]
    assert float(tree.global_norm(halves)) == pytest.approx(math.sqrt(4 * 300**2 + 4096))
    assert tree.global_norm([torch.ones(1, dtype=torch.float64)]).dtype == torch.float64
    assert float(tree.global_norm([])) == 0.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", range(3))
def test_one_bad_number_is_enough(value: float, position: int) -> None:
    bad = torch.zeros(3)
    bad[position] = value
    assert not tree.all_finite([torch.ones(2), bad])


@pytest.mark.parametrize(
    "tensors",
    [
        [],
        [torch.empty(0)],
        [torch.tensor([2**62, 2**62])],
        [torch.full((9,), 3e38)],
        [torch.ones(2, dtype=torch.cfloat)],
    ],
)
def test_finite_numbers_are(tensors: list[Tensor]) -> None:
    assert tree.all_finite(tensors)


# -- who may overwrite ---------------------------------------------------------------------------------------------


def test_without_a_scope_everything_is_copied() -> None:
    w = torch.ones(2)
    (copy,) = tree.writable([w])
    copy.zero_()
    assert w.tolist() == [1.0, 1.0]


def test_in_a_scope_the_donated_tensors_are_handed_out_and_others_copied() -> None:
    mine, other = make(w=1.0), torch.ones(2)
    with tree.donate(mine):
        handed, copied = tree.writable([mine["w"], other])
        assert handed is mine["w"]
        assert copied is not other
        # A copy belongs to the scope: whoever asks next gets it itself.
        assert tree.writable([copied])[0] is copied
    assert tree.writable([mine["w"]])[0] is not mine["w"]


def test_scopes_nest_and_can_be_closed() -> None:
    outer, inner = torch.ones(1), torch.ones(1)
    with tree.donate(outer):
        with tree.donate(inner):
            assert tree.is_donated([outer, inner])
        assert tree.is_donated([outer])
        assert not tree.is_donated([inner])
        with tree.keep():
            assert not tree.is_donated([outer])
        with tree.temporaries():
            assert tree.is_donated([outer])


def test_a_scope_ends_with_an_error_too() -> None:
    mine = torch.ones(1)
    with pytest.raises(RuntimeError, match="inside"), tree.donate(mine):
        raise RuntimeError("inside")
    assert not tree.is_donated([mine])


def test_released_temporaries_may_be_overwritten_within_the_scope_only() -> None:
    made = torch.ones(1)
    released = tree.frozen({"w": made})
    tree.release(released)
    with tree.temporaries():
        assert not tree.is_donated([made])
        tree.release(released)
        assert tree.is_donated([made])
        assert not tree.is_donated([made, torch.ones(1)])
    assert not tree.is_donated([made])


def test_a_released_tensor_is_safe_again_once_its_tree_is_gone() -> None:
    made = torch.ones(1)
    with tree.temporaries():
        tree.release(tree.frozen({"w": made}))
        assert not tree.is_donated([made])


@pytest.mark.parametrize("view", [lambda t: t, lambda t: t.view(2, 1)], ids=["itself", "a view"])
def test_released_tensors_that_share_memory_are_copied_apart(view: Callable[[Tensor], Tensor]) -> None:
    made = torch.ones(2)
    released = tree.frozen({"a": made, "b": view(made), "c": torch.ones(2)})
    with tree.temporaries():
        tree.release(released)
        assert [t.flatten().tolist() for t in tree.leaves(tree.scaled(released, torch.tensor(3.0)))] == [[3.0, 3.0]] * 3
    assert made.tolist() == [1.0, 1.0]


def test_a_scope_keeps_no_temporary_alive_and_is_not_fooled_by_its_address() -> None:
    with tree.temporaries():
        made = torch.ones(1)
        released = tree.frozen({"w": made})
        tree.release(released)
        alive = weakref.ref(made)
        del made, released
        assert alive() is None
        assert not any(tree.is_donated([torch.ones(1)]) for _ in range(100))


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (lambda t: tree.scaled(t, torch.tensor(3.0)), 6.0),
        (lambda t: tree.assign(t, [torch.full((2,), 5.0)]), 5.0),
        (lambda t: tree.like(t, [tree.incremented(t["w"])]), 3.0),
    ],
    ids=["scaled", "assign", "incremented"],
)
@pytest.mark.parametrize("donated", [False, True])
def test_operations_write_over_what_is_donated_and_only_that(
    operation: Callable[[Any], Any], expected: float, donated: bool
) -> None:
    before = make(w=2.0)
    with tree.donate(before if donated else ()):
        after = operation(before)
    assert after["w"].tolist() == [expected] * 2
    assert before["w"].tolist() == [expected if donated else 2.0] * 2
    assert (after is before) == donated


def test_scaling_keeps_the_dtype() -> None:
    half = tree.frozen({"w": torch.ones(2, dtype=torch.bfloat16)})
    assert tree.scaled(half, torch.tensor(0.5))["w"].dtype == torch.bfloat16


def test_under_vmap_and_in_a_graph_results_are_the_same() -> None:
    def norm_of_doubled(rows: Tensor) -> Tensor:
        doubled = tree.scaled(tree.frozen({"w": rows}), torch.tensor(2.0))
        return tree.global_norm(tree.leaves(doubled)) + tree.incremented(rows).sum()

    rows = torch.arange(6.0).reshape(3, 2)
    expected = torch.stack([norm_of_doubled(row) for row in rows])
    torch.testing.assert_close(torch.vmap(norm_of_doubled)(rows), expected)
    compiled = torch.compile(norm_of_doubled, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(rows[0]), expected[0])


@pytest.mark.parametrize(
    ("make", "apart"),
    [
        (lambda t: [t, torch.zeros(9)], True),
        (lambda t: [t[:4], t[4:]], True),
        (lambda t: [t, t[1:]], False),
        (lambda t: [t[3:], t], False),
        (lambda t: [t.view(3, 3)[:, 0], t[4:5]], False),
        (lambda t: [t[:0], t[:0], t], True),
    ],
    ids=["others", "halves", "shifted", "shifted, first", "within a gap", "empty"],
)
def test_tensors_are_apart_if_no_bytes_are_shared(make: Callable[[torch.Tensor], Any], apart: bool) -> None:
    assert tree.are_apart(make(torch.zeros(9))) is apart
