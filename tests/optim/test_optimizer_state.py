"""Every optimizer: what it overwrites, what it keeps, and which tensors it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.optim.table import (
    Options,
    Row,
    assert_close,
    assert_same_bits,
    every_optimizer,
    every_option,
    grads_of,
    random_tree,
    run,
    schedule,
)
from trainkit import optim, tree
from trainkit.optim.transform import add_updates
from trainkit.types import Params

# -- purity and donation -------------------------------------------------------------------------------------------


@every_option
def test_leaves_its_inputs_as_they_were(row: Row, options: Options) -> None:
    tx = row.make(schedule, **options)
    params, opt_state = run(tx, row, random_tree(row, 0, torch.float32), 2)
    grads = grads_of(row, params, 2)
    before = tree.clone((grads, opt_state, params))
    first = tx.apply(grads, opt_state, params)
    tx.update(grads, opt_state, params)
    second = tx.apply(grads, opt_state, params)
    for given, copy in zip((grads, opt_state, params), before, strict=True):
        assert_same_bits(given, copy)
    for a, b in zip(first, second, strict=True):
        assert_same_bits(a, b)


@every_option
def test_donated_equals_pure_and_reuses_the_memory(row: Row, options: Options) -> None:
    tx = row.make(schedule, **options)
    params, opt_state = run(tx, row, random_tree(row, 0, torch.float32), 2)
    donated_params, donated_state = tree.clone((params, opt_state))
    pointers = {path: t.data_ptr() for path, t in donated_state.items(True, True)}
    param_pointers = {name: t.data_ptr() for name, t in donated_params.items()}
    for step in range(2, 5):
        grads = grads_of(row, params, step)
        params, opt_state = tx.apply(grads, opt_state, params)
        with tree.donate(donated_params, donated_state, grads):
            donated_params, donated_state = tx.apply(grads, donated_state, donated_params)
    assert_same_bits(donated_params, params)
    assert_same_bits(donated_state, opt_state)
    assert {path: t.data_ptr() for path, t in donated_state.items(True, True)} == pointers
    assert {name: t.data_ptr() for name, t in donated_params.items()} == param_pointers


@every_option
def test_update_then_add_equals_apply(row: Row, options: Options) -> None:
    tx = row.make(schedule, **options)
    params, opt_state = run(tx, row, random_tree(row, 0), 2)
    grads = grads_of(row, params, 2)
    updates, state_after_update = tx.update(grads, opt_state, params)
    applied, state_after_apply = tx.apply(grads, opt_state, params)
    assert_close(add_updates(params, updates), applied)
    assert_same_bits(state_after_update, state_after_apply)


# -- the state -----------------------------------------------------------------------------------------------------


@every_option
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_state_keeps_structure_shapes_and_dtypes(row: Row, options: Options, dtype: torch.dtype) -> None:
    def form(found: Any) -> dict[Any, Any]:
        return {path: (t.shape, t.dtype) for path, t in found.items(True, True)}

    params = random_tree(row, 0, dtype)
    tx = row.make(0.01, **options)
    first = tx.init(params)
    after, opt_state = run(tx, row, params, 3)
    assert form(opt_state) == form(first)
    assert form(after) == form(params)
    assert all(t.isfinite().all() for t in (*after.values(), *tree.leaves(opt_state.flatten_keys("/"))))


@every_optimizer
def test_memory_starts_apart_from_the_parameters(row: Row) -> None:
    params = random_tree(row, 0)
    taken = {t.untyped_storage().data_ptr() for t in params.values()}
    memory = row.make(0.1).init(params)
    assert not taken & {t.untyped_storage().data_ptr() for t in memory.flatten_keys("/").values()}


@every_optimizer
def test_number_and_constant_schedule_mean_the_same(row: Row) -> None:
    params = random_tree(row, 0)
    number, _ = run(row.make(0.125), row, params, 3)
    as_schedule, _ = run(row.make(lambda count: torch.full((), 0.125)), row, params, 3)
    as_tensor, _ = run(row.make(torch.tensor(0.125)), row, params, 3)
    assert_same_bits(number, as_schedule)
    assert_same_bits(number, as_tensor)


def test_the_count_itself_may_be_the_rate() -> None:
    params = tree.frozen({"w": torch.zeros(1)})
    tx = optim.sgd(lambda count: count)
    opt_state = tx.init(params)
    for expected in (0.0, -1.0, -3.0):
        with tree.donate(params, opt_state):
            params, opt_state = tx.apply(tree.frozen({"w": torch.ones(1)}), opt_state, params)
        assert params["w"].item() == expected


@every_optimizer
def test_no_parameters_are_no_work(row: Row) -> None:
    tx = row.make(0.1)
    nothing = tree.frozen()
    params, opt_state = tx.apply(nothing, tx.init(nothing), nothing)
    assert tree.leaves(params) == []
    assert int(opt_state["count"]) == 1


# -- layouts, dtypes, names ----------------------------------------------------------------------------------------


@every_optimizer
def test_gradients_in_any_memory_layout(row: Row) -> None:
    params = tree.frozen({"w": torch.randn(4, 3, dtype=torch.float64)})
    tx = row.make(0.1)
    opt_state = tx.init(params)
    transposed = torch.randn(3, 4, dtype=torch.float64).t()
    expanded = torch.ones((), dtype=torch.float64).expand(4, 3)
    for g in (transposed, expanded):
        found, _ = tx.apply(tree.frozen({"w": g}), opt_state, params)
        expected, _ = tx.apply(tree.frozen({"w": g.contiguous()}), opt_state, params)
        assert_same_bits(found, expected)


@every_optimizer
def test_donated_parameters_with_gaps_between_their_rows(row: Row) -> None:
    wide = torch.randn(4, 6, dtype=torch.float64)
    whole, gradient = wide.clone(), wide.cos()
    params = tree.frozen({"w": whole[:, :3]})
    tx = row.make(0.1)
    expected, _ = tx.apply(
        tree.frozen({"w": gradient[:, :3]}), tx.init(params), tree.frozen({"w": wide[:, :3].clone()})
    )
    with tree.donate(params):
        found, _ = tx.apply(tree.frozen({"w": gradient[:, :3]}), tx.init(params), params)
    assert found["w"].data_ptr() == whole.data_ptr()
    assert_close(found, expected)
    assert torch.equal(whole[:, 3:], wide[:, 3:])


@every_optimizer
def test_memory_in_another_layout_than_its_parameter(row: Row) -> None:
    # As after loading a contiguous checkpoint into transposed or channels-last parameters.
    contiguous = tree.frozen({"w": torch.randn(4, 3, dtype=torch.float64)})
    grads = tree.map_tensors(torch.cos, contiguous)
    tx = row.make(0.1)
    contiguous, opt_state = tx.apply(grads, tx.init(contiguous), contiguous)
    params = tree.frozen({"w": contiguous["w"].t().contiguous().t()})
    expected, memory = tx.apply(grads, opt_state, contiguous)
    found, after = tx.apply(grads, opt_state, params)
    assert_close(found, expected)
    assert_close(after.flatten_keys("/"), memory.flatten_keys("/"))


@every_optimizer
def test_parameters_of_several_dtypes(row: Row) -> None:
    params = random_tree(row, 0)
    names = list(params.keys())
    mixed = tree.frozen({n: p.to(torch.float32 if n == names[0] else torch.float64) for n, p in params.items()})
    found, _ = run_mixed(row, mixed)
    expected, _ = run_mixed(row, params)
    assert found[names[0]].dtype == torch.float32
    for name in names[1:]:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[names[0]].double(), expected[names[0]], rtol=1e-2, atol=1e-2)


def run_mixed(row: Row, params: Params) -> tuple[Params, Any]:
    tx = row.make(0.1)
    opt_state = tx.init(params)
    for step in range(3):
        params, opt_state = tx.apply(random_tree(row, 100 + step), opt_state, params)
    return params, opt_state


@every_optimizer
def test_gradients_are_matched_by_name(row: Row) -> None:
    params = random_tree(row, 0)
    grads = grads_of(row, params, 0)
    turned = tree.frozen({name: grads[name] for name in reversed(list(grads.keys()))})
    tx = row.make(0.1)
    expected, _ = tx.apply(grads, tx.init(params), params)
    found, _ = tx.apply(turned, tx.init(params), params)
    assert_same_bits(found, expected)
    lacking = tree.frozen({"other": torch.zeros(1)})
    with pytest.raises(KeyError, match=next(iter(params.keys()))):
        tx.apply(lacking, tx.init(params), params)
