"""The loops that are compared: the same model, batch and arithmetic, written by hand and with trainkit.

Arithmetic of all: mean cross-entropy, gradient clipped to norm 1, AdamW with weight decay 0.1; the loss stays a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models import make_batch, make_model
from trainkit import LossOutput, functional, init_state, make_train_step
from trainkit.execution import compile_step, repeated
from trainkit.optim import adamw, chain, clip_by_global_norm

RATE = 1e-3


@dataclass(frozen=True)
class Loop:
    """A training loop, one step at a time.

    Args:
        step: trains once and returns the mean loss.
        persistent: the tensors that live between steps.
    """

    step: Callable[[], Tensor]
    persistent: Callable[[], list[Tensor]]


def by_hand(size: str, *, compiled: bool, depth: int | None = None) -> Loop:
    """The usual loop with fused AdamW; ``compiled`` puts ``torch.compile`` on the model and its loss, as in nanoGPT."""
    module, (x, y) = make_model(size, depth), make_batch(size)
    optimizer = torch.optim.AdamW(module.parameters(), lr=RATE, weight_decay=0.1, fused=True)

    def mean_loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(module(x).flatten(0, -2), y.flatten())

    forward = torch.compile(mean_loss) if compiled else mean_loss

    def step() -> Tensor:
        loss = forward(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def persistent() -> list[Tensor]:
        memory = [t for state in optimizer.state.values() for t in state.values()]
        return [*module.parameters(), *module.buffers(), *memory, x, y]

    return Loop(step, persistent)


def with_trainkit(size: str, *, strategy: Any, depth: int | None = None, regions: bool = False) -> Loop:
    """The same with trainkit; ``strategy`` as for ``compile_step``, which donates.

    ``regions`` lets the compiler treat the blocks as one that is called several times.
    """
    module, (x, y) = make_model(size, depth), make_batch(size)
    model = functional(module)

    def loss(params: Any, buffers: Any, batch: tuple[Tensor, Tensor]) -> LossOutput:
        logits, buffers = model(params, buffers, batch[0])
        total = F.cross_entropy(logits.flatten(0, -2), batch[1].flatten(), reduction="sum")
        return LossOutput(total, batch[1].numel(), buffers=buffers)

    optimizer = chain(clip_by_global_norm(1.0), adamw(RATE, weight_decay=0.1))
    state = init_state(module, optimizer, copy=False)
    whole_loss = repeated(loss, module, "blocks.*") if regions else loss
    train = compile_step(make_train_step(whole_loss, optimizer), strategy=strategy)

    def step() -> Tensor:
        nonlocal state
        state, metrics = train(state, (x, y))
        return metrics["loss"].compute()

    def persistent() -> list[Tensor]:
        tensors = torch.utils._pytree.tree_leaves(state)
        return [*tensors, x, y]

    return Loop(step, persistent)


LOOPS: dict[str, Callable[..., Loop]] = {
    "hand, eager": lambda size, depth=None: by_hand(size, compiled=False, depth=depth),
    "hand, compiled": lambda size, depth=None: by_hand(size, compiled=True, depth=depth),
    "trainkit, eager": lambda size, depth=None: with_trainkit(size, strategy="eager", depth=depth),
    "trainkit, compiled": lambda size, depth=None: with_trainkit(size, strategy="whole", depth=depth),
}
BY_DEPTH: dict[str, Callable[..., Loop]] = {
    "hand, compiled": LOOPS["hand, compiled"],
    "trainkit, compiled": LOOPS["trainkit, compiled"],
    "trainkit, repeated": lambda size, depth: with_trainkit(size, strategy="whole", depth=depth, regions=True),
}
PEER = {"trainkit, eager": "hand, eager", "trainkit, compiled": "hand, compiled"}
