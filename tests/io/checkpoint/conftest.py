"""States to save, and a comparison that sees every bit."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from trainkit import TrainState, init_state
from trainkit.io.checkpoint.format import flatten_state
from trainkit.optim import adamw

Bits = dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]


def _bytes(tensor: Tensor) -> bytes:
    fresh = tensor.resolve_conj().clone(memory_format=torch.contiguous_format)
    return fresh.reshape(-1).view(torch.uint8).numpy().tobytes()


def _bits(state: TrainState) -> Bits:
    leaves = flatten_state(state)
    named = [(f"model:{n}", t) for n, t in leaves.model.items()] + [
        (f"training:{n}", t) for n, t in leaves.training.items()
    ]
    return {name: (t.dtype, tuple(t.shape), _bytes(t)) for name, t in named}


@pytest.fixture(scope="session")
def bits() -> Callable[[TrainState], Bits]:
    """All leaves of a state as bytes, by name."""
    return _bits


@pytest.fixture(scope="session")
def make_state() -> Callable[..., TrainState]:
    """A small state whose numbers depend on the step."""

    def make(step: int = 0, width: int = 3, key: int = 11) -> TrainState:
        torch.manual_seed(step)
        module = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))
        return init_state(module, adamw(1e-3), seed=key).replace(step=torch.tensor(step))

    return make
