"""A CUDA device: the same numbers as on the CPU, and no waiting for it inside the loop."""

import pytest
import torch
from torch import nn

from trainkit import init_state, make_train_step, run
from trainkit.execution import bf16_mixed, compile_step
from trainkit.losses import classification, module_loss
from trainkit.optim import adamw, chain, clip_by_global_norm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def make_net(device: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 4)).to(device)


def batches(device: str, n: int = 5):
    g = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(32, 16, generator=g), torch.randint(0, 4, (32,), generator=g)) for _ in range(n)]
    return [(x.to(device), y.to(device)) for x, y in pairs]


def optimizer():
    return chain(clip_by_global_norm(1.0), adamw(lambda count: 1e-3 * (count + 1)))


def losses(device: str, strategy: str, **kwargs) -> list[float]:
    net = make_net(device)
    step = compile_step(make_train_step(module_loss(net, classification), optimizer()), strategy=strategy, **kwargs)
    records = run(step, init_state(net, optimizer()), batches(device))
    found = [float(record.metrics["loss"].compute()) for record in records]
    assert step.explain().strategy == strategy
    return found


@pytest.mark.parametrize("strategy", ["eager", "split", "whole"])
def test_equals_the_cpu(strategy):
    assert losses("cuda", strategy) == pytest.approx(losses("cpu", "eager"), rel=1e-4)


def test_cuda_graphs_replay_the_step():
    found = losses("cuda", "whole", options={"triton.cudagraphs": True})
    assert found == pytest.approx(losses("cpu", "eager"), rel=1e-4)


@pytest.mark.parametrize("strategy", ["eager", "whole"])
def test_a_loop_does_not_wait_for_the_device(strategy):
    net = make_net("cuda")
    step = compile_step(make_train_step(module_loss(net, classification), optimizer()), strategy=strategy)
    data = batches("cuda")
    state, _ = step(init_state(net, optimizer()), data[0])
    state, _ = step(state, data[1])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for record in run(step, state, data[2:]):
            assert record.metrics["loss"].total.is_cuda
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_bf16_mixed_trains():
    net = make_net("cuda")
    policy = bf16_mixed()
    step = make_train_step(module_loss(net, classification), optimizer(), precision=policy)
    first, *_, last = run(step, policy.init_state(net, optimizer()), batches("cuda", 1) * 30)
    assert float(last.metrics["loss"].compute()) < float(first.metrics["loss"].compute())
