"""Every optimizer inside a graph, under vmap and on sharded tensors: the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils import _pytree as pytree

from tests.optim.table import (
    Row,
    assert_close,
    every_optimizer,
    random_tree,
    schedule,
)
from trainkit import tree
from trainkit.types import Params

# -- compiled and vectorised ---------------------------------------------------------------------------------------


@pytest.fixture
def float64_numbers() -> Iterator[None]:
    # torch keeps NAdam's product of momenta in the default dtype; in float32 a graph rounds it in another place.
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@every_optimizer
@pytest.mark.parametrize("rate", [schedule, 0.1], ids=["schedule", "number"])
@pytest.mark.usefixtures("fresh_compiler", "float64_numbers")
def test_compiles_once_with_the_gradients(row: Row, rate: Any) -> None:
    graphs = 0

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    # The options that use most of the kernel.
    tx = row.make(rate, **max(row.grid, key=len))

    def step(opt_state: Any, params: Params) -> tuple[Params, Any]:
        inputs = [p.detach().requires_grad_() for p in params.values()]
        with torch.enable_grad():
            loss = sum((p.square() * 0.5 + p.sin()).sum() for p in inputs)
            grads = torch.autograd.grad(loss, inputs)
        with torch.no_grad():
            return tx.apply(tree.like(params, grads), opt_state, params)

    params = random_tree(row, 0)
    eager = compiled = (params, tx.init(params))
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        fast = torch.compile(step, fullgraph=True, backend=counting)
        for _ in range(4):
            eager, compiled = step(*reversed(eager)), fast(*reversed(compiled))
    assert graphs == 1
    assert_close(compiled[0], eager[0])
    for path, leaf in compiled[1].items(True, True):
        # Rates and products of momenta are kept in float32.
        torch.testing.assert_close(
            leaf, eager[1][path], rtol=1e-6 if leaf.dtype == torch.float32 else 1e-10, atol=1e-12
        )


@every_optimizer
@pytest.mark.usefixtures("fresh_compiler", "float64_numbers")
def test_a_warm_up_may_begin_at_a_rate_of_zero(row: Row) -> None:
    # A form that divides by the rate, as torch has for rates on the device, makes 0 / 0 of gradients that are 0.
    params = random_tree(row, 0)
    tx = row.make(lambda count: 0.1 * count.to(torch.float64), **row.grid[0])
    apply = torch.compile(tx.apply, fullgraph=True, backend="eager")
    expected = found = (params, tx.init(params))
    for step, grads in enumerate((tree.map_tensors(lambda p: p * (p > 0), params), random_tree(row, 1))):
        expected, found = tx.apply(grads, *reversed(expected)), apply(grads, *reversed(found))
        assert_close(found[0], expected[0])
        if step == 0:
            assert_close(found[0], params)


@every_optimizer
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.usefixtures("fresh_compiler", "float64_numbers")
def test_under_vmap_equals_one_by_one(row: Row, compiled: bool) -> None:
    members = [random_tree(row, seed) for seed in (0, 1, 2)]
    rates = torch.tensor([0.1, 0.01, 0.3], dtype=torch.float64)
    options = max(row.grid, key=len)

    def two_steps(params: dict[str, Tensor], memory: dict[str, Any], rate: Tensor) -> dict[str, Tensor]:
        tx = row.make(lambda count: rate, **options)
        now, opt_state = tree.frozen(params), tree.frozen(memory)
        for step in range(2):
            grads = tree.map_tensors(lambda p, step=step: torch.cos(p + step), now)
            now, opt_state = tx.apply(grads, opt_state, now)
        return dict(now.items())

    def first_memory(params: Params) -> dict[str, Any]:
        return row.make(0.1, **options).init(params).to_dict()

    inputs = [(dict(member.items()), first_memory(member), rate) for member, rate in zip(members, rates, strict=True)]
    stacked = pytree.tree_map(lambda *parts: torch.stack(parts), *inputs)
    batched = torch.vmap(two_steps)
    found = (torch.compile(batched, fullgraph=True, backend="eager") if compiled else batched)(*stacked)
    for i in range(len(members)):
        expected = two_steps(*inputs[i])
        # Muon's iteration rounds to bfloat16, and matrices in a batch are multiplied in another order.
        tolerance = (1e-2, 1e-2) if row.id == "muon" else (1e-10, 1e-12)
        assert_close(tree.frozen({name: t[i] for name, t in found.items()}), tree.frozen(expected), *tolerance)


# -- sharded -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    # One process is enough to need a sharding rule for every operation.
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@every_optimizer
def test_sharded_tensors_equal_whole_ones(row: Row, mesh: DeviceMesh) -> None:
    def sharded(whole: Params) -> Params:
        return tree.map_tensors(lambda t: distribute_tensor(t, mesh, [Shard(0) if t.dim() else Replicate()]), whole)

    options = max(row.grid, key=len)
    tx = row.make(schedule, **options)
    params = random_tree(row, 0)
    parts, opt_state, memory = sharded(params), tx.init(params), tx.init(sharded(params))
    for step in range(3):
        grads = random_tree(row, 100 + step)
        params, opt_state = tx.apply(grads, opt_state, params)
        parts, memory = tx.apply(sharded(grads), memory, parts)
    assert_close(tree.map_tensors(lambda t: t.full_tensor(), parts), params)
