"""Running averages against torch.optim.swa_utils and sums written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor, nn
from torch.optim import swa_utils

from trainkit import tree
from trainkit.optim.averaging import average, ema, polyak
from trainkit.types import Schedule


def params(i: int, dtype: torch.dtype = torch.float64) -> TensorDict:
    generator = torch.Generator().manual_seed(i)
    return tree.frozen({name: torch.randn(3, 2, generator=generator, dtype=dtype) for name in ("a", "b")})


def averages(rule: float | Schedule, steps: int) -> list[TensorDict]:
    """The average after each of ``steps`` updates, started from ``params(0)``."""
    mean, found = params(0), []
    for n in range(steps):
        share = rule(torch.tensor(n)) if callable(rule) else rule
        mean = average(mean, params(n + 1), share)
        found.append(mean)
    return found


def swa_averages(averaged: swa_utils.AveragedModel, module: nn.Linear, steps: list[int]) -> Tensor:
    for i in steps:
        module.weight.data.copy_(params(i)["a"])
        averaged.update_parameters(module)
    return averaged.module.weight.data


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 0.999])
def test_ema_equals_the_averaged_model_of_torch(decay: float) -> None:
    module = nn.Linear(2, 3, bias=False, dtype=torch.float64)
    averaged = swa_utils.AveragedModel(module, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(decay))
    # It starts from the first parameters it is shown.
    expected = swa_averages(averaged, module, list(range(11)))
    assert torch.equal(averages(1 - decay, 10)[-1]["a"], expected)
    torch.testing.assert_close(averages(ema(decay), 10)[-1]["a"], expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(("start", "every"), [(0, 1), (3, 1), (2, 4)])
def test_polyak_equals_the_swa_of_torch(start: int, every: int) -> None:
    module = nn.Linear(2, 3, bias=False, dtype=torch.float64)
    taken = [n + 1 for n in range(12) if n >= start and (n - start) % every == 0]
    expected = swa_averages(swa_utils.AveragedModel(module), module, taken)
    found = averages(polyak(start=start, every=every), 12)[-1]["a"]
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(found, torch.stack([params(i)["a"] for i in taken]).mean(0), rtol=1e-13, atol=1e-14)


def test_before_its_start_a_polyak_average_is_the_newest_parameters() -> None:
    found = averages(polyak(start=4), 4)
    assert all(torch.equal(mean["b"], params(n + 1)["b"]) for n, mean in enumerate(found))


@given(st.floats(0.0, 0.9999), st.integers(1, 12))
def test_debiased_ema_is_the_weighted_sum_over_the_sum_of_weights(decay: float, steps: int) -> None:
    weights = torch.tensor([decay ** (steps - i) for i in range(1, steps + 1)], dtype=torch.float64)
    expected = sum(w * params(i + 1)["a"] for i, w in enumerate(weights)) / weights.sum()
    torch.testing.assert_close(averages(ema(decay, debias=True), steps)[-1]["a"], expected, rtol=1e-9, atol=1e-10)


def test_warmup_follows_the_smaller_decay_until_the_wanted_one() -> None:
    share = ema(0.99, warmup=True)
    for n in (0, 1, 100, 889, 890, 891, 10_000):
        assert float(share(torch.tensor(n))) == pytest.approx(1 - min(0.99, (1 + n) / (10 + n)), rel=1e-12)


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_shares_of_nothing_and_all_are_exact(share: float, as_tensor: bool) -> None:
    old, new = params(0, torch.float32), params(1, torch.float32)
    found = average(old, new, torch.tensor(share) if as_tensor else share)
    assert all(torch.equal(found[name], (new if share else old)[name]) for name in ("a", "b"))


@pytest.mark.parametrize("share", [0.25, torch.tensor(0.25)], ids=["number", "tensor"])
def test_the_average_keeps_its_dtype_and_its_arguments(share: float | Tensor) -> None:
    old, new = params(0, torch.float32), params(1, torch.bfloat16)
    before = tree.clone((old, new))
    mean = average(old, new, share)
    assert mean["a"].dtype == torch.float32
    torch.testing.assert_close(mean["a"], 0.75 * old["a"] + 0.25 * new["a"].float())
    assert all(
        torch.equal(old[name], before[0][name]) and torch.equal(new[name], before[1][name]) for name in ("a", "b")
    )


@pytest.mark.parametrize("share", [0.25, torch.tensor(0.25)], ids=["number", "tensor"])
def test_a_donated_average_is_taken_in_its_own_memory(share: float | Tensor) -> None:
    old = params(0)
    expected = average(old, params(1), share)
    with tree.donate(old):
        assert average(old, params(1), share) is old
    assert torch.equal(old["a"], expected["a"])


@pytest.mark.parametrize("rule", [ema(0.9), ema(0.9, debias=True), ema(0.9, warmup=True), polyak(start=1, every=2)])
def test_rules_compile_into_one_graph_and_map_over_populations(rule: Schedule) -> None:
    torch._dynamo.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    def one(mean: Tensor, new: Tensor, n: Tensor) -> Tensor:
        return average(tree.frozen({"w": mean}), tree.frozen({"w": new}), rule(n))["w"]

    compiled = torch.compile(one, fullgraph=True, backend=count)
    old, new = params(0)["a"], params(1)["a"]
    for n in range(4):
        torch.testing.assert_close(compiled(old, new, torch.tensor(n)), one(old, new, torch.tensor(n)))
    assert len(graphs) == 1
    members = torch.vmap(one)(torch.stack([old, new]), torch.stack([new, old]), torch.tensor([1, 3]))
    torch.testing.assert_close(members[1], one(new, old, torch.tensor(3)))


def test_rules_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"decay: got 1.0, expected a number in \[0, 1\)"):
        ema(1.0)
    with pytest.raises(ValueError, match="debias, warmup: got both"):
        ema(0.9, debias=True, warmup=True)
    with pytest.raises(ValueError, match="start, every: got -1 and 1"):
        polyak(start=-1)
    with pytest.raises(ValueError, match="start, every: got 0 and 0"):
        polyak(every=0)
