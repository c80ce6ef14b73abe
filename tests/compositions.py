"""Compositions to be drawn: models, losses, optimizers, precision, microbatches and transforms in any combination."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.optim.table import OPTIMIZERS
from trainkit import (
    TrainState,
    accumulate,
    evaluate,
    init_ema,
    live_value_and_grad,
    make_eval_step,
    make_train_step,
    raise_nonfinite,
    scan,
    sharpness_aware,
    skip_nonfinite,
    value_and_grad,
    with_ema,
)
from trainkit.execution import bf16_mixed, bf16_pure, fp16_mixed, full
from trainkit.losses import classification, module_loss
from trainkit.metrics import accuracy, counts, perplexity
from trainkit.optim import (
    adaptive_clip,
    by_rank,
    chain,
    clip_by_global_norm,
    clip_by_unit_norm,
    clip_by_value,
    partition,
    polyak,
    reduce_on_plateau,
    sgd,
)
from trainkit.optim import skip_nonfinite as skip_nonfinite_updates
from trainkit.optim.transform import Transform
from trainkit.transforms import with_average
from trainkit.types import LossFn, LossOutput

FEATURES, CLASSES = 4, 3


class Tied(nn.Module):
    """Words whose embedding is also the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, 4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, CLASSES, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        words = x.abs().sum(-1).to(torch.int64) % CLASSES
        logits: Tensor = self.head(torch.tanh(self.mix(self.embedding(words))))
        return logits


def _partly_frozen() -> nn.Module:
    module = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, CLASSES))
    module[0].requires_grad_(False)
    return module


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(FEATURES, CLASSES),
    "statistics": lambda: nn.Sequential(
        nn.Linear(FEATURES, 5, bias=False), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Linear(5, CLASSES)
    ),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, FEATURES)), nn.Conv1d(1, 4, 2), nn.GroupNorm(2, 4), nn.GELU(), nn.Flatten(),
        nn.Linear(12, CLASSES),
    ),
    "tied": Tied,
    "frozen": _partly_frozen,
    "attention": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.TransformerEncoderLayer(2, 1, 4, dropout=0.1, batch_first=True), nn.Flatten(),
        nn.Linear(4, CLASSES),
    ),
}  # fmt: skip
CLIPS: dict[str, Callable[[Transform], Transform]] = {
    "no clip": lambda tx: tx,
    "norm": lambda tx: chain(clip_by_global_norm(0.1), tx),
    "value": lambda tx: chain(clip_by_value(0.01), tx),
    "units": lambda tx: chain(clip_by_unit_norm(0.05), tx),
    "adaptive": lambda tx: chain(adaptive_clip(0.01), tx),
    "finite": skip_nonfinite_updates,
}
PRECISIONS = {"full": full, "bf16": bf16_mixed, "fp16": fp16_mixed, "pure bf16": bf16_pure}
TRANSFORMS: dict[str, Callable[[Any], Any]] = {
    "alone": lambda step: step,
    "ema": lambda step: with_ema(step, 0.9),
    "polyak": lambda step: with_average(step, polyak(start=1)),
    "skip": skip_nonfinite,
    "raise": raise_nonfinite,
    "scan": lambda step: scan(step, 2),
    "ema of what is not skipped": lambda step: with_ema(skip_nonfinite(step), 0.5),
}
GRADIENTS = ("functional", "live", "sharp")
KINDS = ("step", "gradient", "evaluation")


@dataclass(frozen=True)
class Composition:
    """What is composed, by name: ``kind`` is the function that comes out.

    Args:
        parts: microbatches; 0 for batches that are lists of them.
        rows: of each microbatch or batch of an evaluation, where those differ; their sum otherwise.
    """

    kind: str
    model: str
    optimizer: int
    options: int
    clip: str
    plateau: bool
    precision: str
    gradients: str
    parts: int
    transform: str
    rows: tuple[int, ...]

    def __post_init__(self) -> None:
        # Statistics over one row are refused.
        object.__setattr__(self, "parts", min(self.parts, sum(self.rows) // 2))


def compositions() -> st.SearchStrategy[Composition]:
    """Any of them."""
    return st.builds(
        Composition,
        kind=st.sampled_from(KINDS),
        model=st.sampled_from(sorted(MODELS)),
        optimizer=st.integers(0, len(OPTIMIZERS) - 1),
        options=st.integers(0, 2),
        clip=st.sampled_from(sorted(CLIPS)),
        plateau=st.booleans(),
        precision=st.sampled_from(sorted(PRECISIONS)),
        gradients=st.sampled_from(GRADIENTS),
        parts=st.integers(0, 3),
        transform=st.sampled_from(sorted(TRANSFORMS)),
        rows=st.lists(st.integers(2, 5), min_size=1, max_size=3).map(tuple),
    )


def compose(made: Composition, values: int, poison: float | None) -> tuple[Callable[..., Any], TrainState, Any]:
    """The function, a state and what it takes.

    Args:
        made: what is composed.
        values: seed of parameters and data.
        poison: a number that one input is replaced by.
    """
    draw = torch.Generator().manual_seed(values)
    fn, state = _function(made)
    params = {name: (torch.randn(p.shape, generator=draw) / 2).to(p.dtype) for name, p in state.params.items()}
    state = state.replace(
        params=pytree.tree_unflatten(list(params.values()), pytree.tree_structure(state.params)),
        key=torch.tensor(values),
        step=torch.tensor(values % 1000),
    )
    parts = [_batch(rows, draw) for rows in made.rows]
    if poison is not None:
        parts[-1]["x"][0, 0] = poison
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if made.kind == "evaluation":
        return fn, state, parts
    batch = parts if made.parts == 0 else whole
    return fn, state, [batch, batch] if made.transform == "scan" and made.kind == "step" else batch


def _batch(rows: int, draw: torch.Generator) -> dict[str, Tensor]:
    return {
        "x": torch.randn(rows, FEATURES, generator=draw),
        "y": torch.randint(0, CLASSES, (rows,), generator=draw),
    }


def _criterion(logits: Tensor, labels: Tensor) -> LossOutput:
    logits = logits.float()
    found = classification(logits, labels, metrics={"accuracy": accuracy, "counts": counts})
    weight = torch.as_tensor(found.weight)
    return LossOutput(
        found.loss_sum, weight, {**found.metrics, "perplexity": perplexity(found.loss_sum.detach(), weight)}
    )


def _loss(module: nn.Module, **options: Any) -> LossFn:
    dtype = next(module.parameters()).dtype
    return module_loss(module, _criterion, inputs=lambda b: b["x"].to(dtype), targets="y", **options)


@functools.cache
def _function(made: Composition) -> tuple[Callable[..., Any], TrainState]:
    torch.manual_seed(0)
    module = MODELS[made.model]()
    policy, tx = PRECISIONS[made.precision](), _optimizer(made)
    state = policy.init_state(module, tx)
    if made.kind == "evaluation":
        eval_step = make_eval_step(policy.loss(_loss(module, training=False)))
        return lambda state, batches: evaluate(eval_step, state, batches), state
    loss, number = _loss(module), None if made.parts == 0 else made.parts
    ways: dict[str, Callable[..., Any]] = {
        "functional": value_and_grad,
        "live": lambda loss, rank=0, unused="error", scale=None, mean=False: live_value_and_grad(module, loss),
        "sharp": lambda loss, rank=0, unused="error", scale=None, mean=False: sharpness_aware(value_and_grad(loss)),
    }
    gradients = ways[made.gradients] if made.precision != "fp16" else value_and_grad
    if made.kind == "gradient":
        return accumulate(gradients(policy.loss(loss)), number), state
    step = make_train_step(loss, tx, accumulate=number, precision=policy, gradients=gradients)
    return TRANSFORMS[made.transform](step), init_ema(state)


def _optimizer(made: Composition) -> Transform:
    row = OPTIMIZERS[made.optimizer]
    options = row.grid[made.options % len(row.grid)]
    tx = row.make(row.rate, **options)
    if row.matrices_only:
        tx = partition({"matrix": tx, "other": sgd(0.1)}, by_rank({2: "matrix"}, "other"))
    tx = CLIPS[made.clip](tx)
    return chain(tx, reduce_on_plateau(patience=0)) if made.plateau else tx
