"""Which activations are kept for the backward pass, and which are computed again."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from trainkit.execution.submodules import forwards, matching
from trainkit.functional import slots_of
from trainkit.types import Batch, Buffers, LossFn, LossOutput, Params


def remat(loss: LossFn, module: nn.Module, pattern: str) -> LossFn:
    """Recompute the activations inside of some submodules during the backward pass, instead of keeping them.

    Memory falls to the inputs of those submodules, for one more forward pass through them. Values do not change,
    dropout included: the random state is replayed.

    Args:
        loss: a loss that calls ``module``.
        module: the module whose submodules are meant.
        pattern: matched against the names of ``module.named_modules()``, as a shell would: ``"blocks.*"`` for every
            block. Inside a matched submodule nothing further is matched.

    Returns: a LossFn of the same meaning.

    Raises: ValueError if no submodule matches; a few names are listed.

    Example:
        >>> from trainkit import functional, init_state, value_and_grad
        >>> from trainkit.optim import sgd
        >>> net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> model = functional(net)
        >>> loss = lambda params, buffers, x: LossOutput(model(params, buffers, x)[0].sum(), x.shape[0])
        >>> state, x = init_state(net, sgd(0.1)), torch.randn(3, 2)
        >>> one, two = value_and_grad(loss)(state, x), value_and_grad(remat(loss, net, "[01]"))(state, x)
        >>> torch.equal(one.grads["0.weight"], two.grads["0.weight"])
        True

    Source: Chen et al. 2016, "Training deep nets with sublinear memory cost"; through torch.utils.checkpoint
    (non-reentrant).
    """
    recomputing = [(submodule, _recomputing(submodule)) for submodule in matching(module, pattern).values()]

    def checkpointed(params: Params, buffers: Buffers, batch: Batch) -> LossOutput:
        with forwards(recomputing):
            return loss(params, buffers, batch)

    return checkpointed


def _recomputing(submodule: nn.Module) -> Callable[..., Any]:
    """The submodule's forward, checkpointed.

    The recomputation happens when the module has its own tensors back, so those of the forward pass are handed
    along explicitly; buffers as they were before it, in copies, since it would write statistics a second time.
    Inside a graph recomputation is the compiler's, with the tensors it traced.
    """
    forward = submodule.forward
    slots = slots_of(submodule)
    buffers = {name for name, _ in submodule.named_buffers()}

    def with_tensors(tensors: list[Any], *args: Any, **kwargs: Any) -> Any:
        before = [holder[leaf] for places in slots.values() for holder, leaf in places]
        _put(slots, tensors)
        try:
            return forward(*args, **kwargs)
        finally:
            _put(slots, before)

    def recomputing(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        tensors = [holder[leaf] for places in slots.values() for holder, leaf in places]
        kept = [
            holder[leaf].clone() if name in buffers else holder[leaf]
            for name, places in slots.items()
            for holder, leaf in places
        ]
        passes = itertools.chain([tensors], itertools.repeat(kept))
        return checkpoint(lambda *a, **k: with_tensors(next(passes), *a, **k), *args, use_reentrant=False, **kwargs)

    return recomputing


def _put(slots: dict[str, list[tuple[dict[str, Any], str]]], tensors: list[Any]) -> None:
    places = [place for group in slots.values() for place in group]
    for (holder, leaf), tensor in zip(places, tensors, strict=True):
        holder[leaf] = tensor
