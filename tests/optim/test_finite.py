"""Updates that are left out: nothing may change, and nothing else may differ."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import nn
from torch.utils import _pytree as pytree

from trainkit import tree
from trainkit.optim.adamw import adamw
from trainkit.optim.clip import clip_by_global_norm
from trainkit.optim.finite import select, skip_nonfinite
from trainkit.optim.sgd import sgd
from trainkit.optim.transform import Transform, chain, transform
from trainkit.types import OptState, Params

BAD = [math.nan, math.inf, -math.inf]


def params() -> TensorDict:
    return tree.frozen({"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3)})


def grads(i: int, bad: float | None = None) -> TensorDict:
    generator = torch.Generator().manual_seed(i)
    found = {name: torch.randn(p.shape, generator=generator) for name, p in params().items()}
    if bad is not None:
        found["b"][1] = bad
    return tree.frozen(found)


def assert_equal(one: Any, two: Any) -> None:
    for a, b in zip(pytree.tree_leaves(one), pytree.tree_leaves(two), strict=True):
        assert torch.equal(a, b)


@given(st.lists(st.sampled_from([None, *BAD]), min_size=1, max_size=8), st.booleans())
def test_a_run_with_bad_gradients_is_the_torch_run_without_them(bads: list[float | None], donated: bool) -> None:
    tx = skip_nonfinite(adamw(0.1))
    now, state = params(), tx.init(params())
    parameters = {name: nn.Parameter(p.clone()) for name, p in params().items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    for i, bad in enumerate(bads):
        if donated:
            with tree.donate(now, state):
                now, state = tx.apply(grads(i, bad), state, now)
        else:
            now, state = tx.apply(grads(i, bad), state, now)
        assert float(state["report"]["skipped"]) == (bad is not None)
        if bad is None:
            for name, g in grads(i).items():
                parameters[name].grad = g
            optimizer.step()
    assert int(state["inner"]["count"]) == bads.count(None)
    for name, parameter in parameters.items():
        torch.testing.assert_close(now[name], parameter.data, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("donated", [False, True])
def test_a_bad_update_changes_no_bit_of_parameters_and_inner_state(bad: float, donated: bool) -> None:
    tx = skip_nonfinite(chain(clip_by_global_norm(1.0), adamw(0.1)))
    now, state = tx.apply(grads(0), tx.init(params()), params())
    before = tree.clone((now, state["inner"]))
    with tree.donate(now, state) if donated else tree.keep():
        after, state_after = tx.apply(grads(1, bad), state, now)
    assert_equal((after, state_after["inner"]), before)


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_update_is_zero(bad: float) -> None:
    tx = skip_nonfinite(sgd(0.1, momentum=0.9))
    _, state = tx.apply(grads(0), tx.init(params()), params())
    updates, after = tx.update(grads(1, bad), state, params())
    assert_equal(updates, tree.zeros_like(params()))
    assert_equal(after["inner"], state["inner"])


@pytest.mark.parametrize("face", ["apply", "update"])
def test_finite_gradients_pass_to_the_bit(face: str) -> None:
    plain, guarded = adamw(0.1), skip_nonfinite(adamw(0.1))
    expected, state = getattr(plain, face)(grads(0), plain.init(params()), params())
    found, wrapped = getattr(guarded, face)(grads(0), guarded.init(params()), params())
    assert_equal((found, wrapped["inner"]), (expected, state))


def decomposing() -> Transform:
    """An inner transformation whose decomposition raises for numbers that are not finite."""

    def update(grads: Params, opt_state: OptState, params: Params, /, **extra: Any) -> tuple[Params, OptState]:
        return tree.map_tensors(lambda g: torch.linalg.eigh(g @ g.T)[1] @ g, grads), opt_state

    return transform(lambda params: tree.frozen(), update)


def test_what_runs_inside_never_sees_a_bad_gradient() -> None:
    square = tree.frozen({"w": torch.eye(3)})
    bad = tree.frozen({"w": torch.full((3, 3), math.nan)})
    with pytest.raises(torch.linalg.LinAlgError):
        decomposing().update(bad, tree.frozen(), square)
    tx = skip_nonfinite(decomposing())
    assert_equal(tx.apply(bad, tx.init(square), square)[0], square)


def test_large_finite_gradients_are_not_mistaken() -> None:
    large = tree.frozen({"w": torch.full((2, 3), 3e38), "b": torch.full((3,), -3e38)})
    tx = skip_nonfinite(sgd(1e-38))
    _, state = tx.apply(large, tx.init(params()), params())
    assert float(state["report"]["skipped"]) == 0.0


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("condition", [True, False])
@pytest.mark.parametrize("donated", [True, False])
def test_select_chooses_through_nested_trees(condition: bool, donated: bool, device: str) -> None:
    new = tree.frozen({"a": torch.ones(2), "nested": {"b": torch.full((2,), 2, dtype=torch.int64)}}).to(device)
    old = tree.frozen({"a": torch.zeros(2), "nested": {"b": torch.zeros(2, dtype=torch.int64)}}).to(device)
    before = tree.clone((new, old))
    with tree.donate(old) if donated else tree.keep():
        found = select(torch.tensor(condition, device=device), new, old)
    assert_equal(found, before[0 if condition else 1])
    assert found["nested"]["b"].dtype == torch.int64
    if donated:
        assert found is old
    else:
        assert_equal((new, old), before)


@pytest.mark.parametrize("condition", [True, False])
def test_select_makes_the_same_choice_where_the_host_cannot_look(condition: bool) -> None:
    torch._dynamo.reset()
    new, old, flag = torch.tensor([1.0, math.nan]), torch.zeros(2), torch.tensor(condition)
    compiled = torch.compile(select, fullgraph=True, backend="eager")
    for found in (compiled(flag, new, old), torch.vmap(select)(flag[None], new[None], old[None])[0]):
        torch.testing.assert_close(found, new if condition else old, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [None, math.nan])
@pytest.mark.parametrize("donated", [True, False])
def test_on_a_gpu_the_choice_is_that_of_the_cpu(bad: float | None, donated: bool) -> None:
    tx = skip_nonfinite(adamw(0.1))
    expected, _ = tx.apply(grads(0, bad), tx.init(params()), params())
    now = tree.frozen({name: p.cuda() for name, p in params().items()})
    state = tx.init(now)
    with tree.donate(now, state) if donated else tree.keep():
        found, after = tx.apply(tree.frozen({name: g.cuda() for name, g in grads(0, bad).items()}), state, now)
    assert float(after["report"]["skipped"]) == (bad is not None)
    for name, p in expected.items():
        torch.testing.assert_close(found[name].cpu(), p, rtol=1e-6, atol=1e-6)


def test_select_returns_a_tree_that_did_not_change() -> None:
    same: Any = tree.frozen({"a": torch.zeros(2), "nested": {"b": torch.zeros(2)}})
    assert select(torch.tensor(True), same, same) is same
    tensor = torch.zeros(2)
    assert select(torch.tensor(False), tensor, tensor) is tensor


SHARDED = """
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from trainkit import tree
from trainkit.optim.adamw import adamw
from trainkit.optim.finite import skip_nonfinite
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=int(sys.argv[1]), world_size=2)
mesh = init_device_mesh("cpu", (2,))
shard = lambda t: tree.frozen({"w": distribute_tensor(t, mesh, [Shard(0)])})
params, bad, good = torch.ones(4, 3), torch.ones(4, 3), torch.ones(4, 3)
bad[3, 0] = float("nan")
for grad in (bad, good):
    tx = skip_nonfinite(adamw(0.1))
    after, state = tx.apply(shard(grad), tx.init(shard(params)), shard(params))
    skipped = state["report"]["skipped"]
    assert type(skipped) is torch.Tensor and float(skipped) == float(grad is bad), skipped
    assert torch.equal(after["w"].full_tensor(), params) == (grad is bad)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_one_shard_that_is_not_finite_stops_every_rank(tmp_path: Any) -> None:
    command = [sys.executable, "-c", SHARDED]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE) for rank in (0, 1)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors.decode()


@given(st.lists(st.floats(width=32), min_size=1, max_size=5))
def test_all_finite_is_math_isfinite_of_every_number(values: list[float]) -> None:
    assert bool(tree.all_finite([torch.zeros(2), torch.tensor(values)])) == all(map(math.isfinite, values))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_all_finite_looks_at_every_dtype_that_can_be_infinite(dtype: torch.dtype) -> None:
    others = [torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.bfloat16), torch.arange(3), torch.ones(0)]
    assert bool(tree.all_finite([*others, torch.ones(3, dtype=dtype)]))
    for bad in BAD:
        assert not bool(tree.all_finite([*others, torch.tensor([1.0, bad], dtype=dtype)]))
    assert bool(tree.all_finite([]))
