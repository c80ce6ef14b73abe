"""A small model with its step, its state and its batches, beside the same in plain torch; small configurations."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from trainkit import LossOutput, TrainState, functional, init_state, make_train_step
from trainkit.metrics import perplexity
from trainkit.optim import adamw
from trainkit.types import Batch, Buffers, Params, StepFn


def make_module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1))


def make_step(module: nn.Module, optimizer: Any = None) -> StepFn:
    model = functional(module)

    def loss(params: Params, buffers: Buffers, batch: Batch) -> LossOutput:
        out, buffers = model(params, buffers, batch)
        squares = (out - 1).square().sum()
        return LossOutput(squares, batch.shape[0], {"ppl": perplexity(squares, batch.shape[0])}, buffers)

    return make_train_step(loss, adamw(0.05) if optimizer is None else optimizer)


def make_state(module: nn.Module) -> TrainState:
    return init_state(module, adamw(0.05), seed=3)


def batch_of(i: int, bad: bool = False) -> Tensor:
    rows = torch.randn(8, 4, generator=torch.Generator().manual_seed(i))
    if bad:
        rows[0, 0] = math.nan
    return rows


def torch_step(module: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = (module(batch) - 1).square().sum() / batch.shape[0]
    loss.backward()
    optimizer.step()
    return loss.detach()


def transformers_config(name: str, **options: Any) -> Any:
    """A configuration of transformers by the name of its class, of a small model without dropout."""
    import transformers

    cls = getattr(transformers, name)
    dropout = {option: 0.0 for option in inspect.signature(cls).parameters if "drop" in option}
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return cls(**{**dropout, **sizes, "vocab_size": 31, "max_position_embeddings": 64, **options})


def assert_equal(one: Any, two: Any) -> None:
    (a, spec_a), (b, spec_b) = pytree.tree_flatten(one), pytree.tree_flatten(two)
    assert spec_a == spec_b
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def assert_close(params: TensorDict, module: nn.Module, tolerance: float = 1e-5) -> None:
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(params[name], parameter.data, rtol=tolerance, atol=tolerance)
