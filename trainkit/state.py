"""``TrainState``: everything that determines a run, beside the data, in one immutable record."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from trainkit import rng, tree
from trainkit.types import Buffers, OptState, Params, Tree

if TYPE_CHECKING:
    from trainkit.optim.transform import Transform


class SpentStateError(RuntimeError):
    """A state was used after a compiled step took its memory."""


@dataclass(frozen=True)
class TrainState:
    """The state of a run between two updates. A pytree whose leaves are tensors.

    Args:
        step: int64 scalar, completed optimizer updates.
        params: trainable tensors by name; what the optimizer updates.
        buffers: the module's buffers and frozen parameters by name; no gradient reaches them.
        opt_state: the optimizer's memory.
        key: int64 scalar from which every random draw of the run derives.
        extra: what step transforms keep for themselves (averaged weights, loss scale), under the transform's name.

    Example:
        >>> from trainkit.optim import sgd
        >>> state = init_state(nn.Linear(2, 1), sgd(0.1))
        >>> sorted(state.params.keys()), int(state.step)
        (['bias', 'weight'], 0)
    """

    step: Tensor
    params: Params
    buffers: Buffers
    opt_state: OptState
    key: Tensor
    extra: Tree

    def replace(self, **changes: Any) -> TrainState:
        """A new state with some fields exchanged; the rest is shared."""
        # What `dataclasses.replace` does, in half of the time.
        own = {name: getattr(self, name) for name in type(self).__dataclass_fields__ if name not in changes}
        return type(self)(**own, **changes)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has tensors of its own, of which nothing that is kept beside the fields would be true.
        return {name: value for name, value in self.__dict__.items() if name in TrainState.__dataclass_fields__}

    def __getattr__(self, name: str) -> Any:
        # Reached only for attributes that are missing, which for a field means that `spend` removed it.
        if name in TrainState.__dataclass_fields__:
            raise SpentStateError(
                f"state.{name}: this TrainState was given to a compiled step, which reused its memory. "
                "Use the state that the step returned, or compile with donate=False to keep both."
            )
        raise AttributeError(f"TrainState has no attribute {name!r}")


torch.export.register_dataclass(TrainState, serialized_type_name="trainkit.TrainState")


def spend(state: TrainState) -> None:
    """Mark a state as spent: every later access to a field raises :class:`SpentStateError`."""
    state.__dict__.clear()


def host_step(state: TrainState) -> int:
    """``state.step`` as a Python integer.

    Waits for the device the first time; states made by :func:`advance` remember the number, so that a loop
    on an accelerator never waits. Of a population it is that of the furthest member.
    """
    step: int = _read_once(state, "_host_step", state.step, lambda step: int(step.max()))
    return step


def _read_once(state: TrainState, name: str, tensor: Tensor, read: Callable[[Tensor], Any]) -> Any:
    """What ``read`` says of a tensor, kept with the state for as long as nobody writes into that tensor."""
    kept = state.__dict__.get(name)
    if kept is None or kept[0] is not tensor or kept[1] != tensor._version:
        kept = state.__dict__[name] = (tensor, tensor._version, read(tensor))
    return kept[2]


def advance(state: TrainState, **changes: Any) -> TrainState:
    """The state after one more update: ``step + 1`` and the changed fields."""
    new = state.replace(step=tree.incremented(state.step), **changes)
    if not torch.compiler.is_compiling():
        remember_step(state, new)
    return new


def remember_step(before: TrainState, after: TrainState, updates: int = 1) -> None:
    """Tell ``after`` its step on the host, if ``before`` knew its own, so that nobody needs to ask the device.

    What is known of the key is handed on too.
    """
    kept = before.__dict__.get("_host_step")
    if kept is not None:
        after.__dict__["_host_step"] = (after.step, after.step._version, kept[2] + updates)
    if "_host_key" in before.__dict__:
        after.__dict__["_host_key"] = before.__dict__["_host_key"]


def seed_of(state: TrainState, rank: int = 0) -> int:
    """The seed of the random draws of one gradient: ``fold_in(key, step, rank)``, as a Python integer.

    The keys of a population are folded into one another.

    Example:
        >>> from trainkit.optim import sgd
        >>> state = init_state(nn.Linear(2, 1), sgd(0.1), seed=3)
        >>> seed_of(state) == int(rng.fold_in(state.key, state.step, 0))
        True
    """
    keys = _read_once(state, "_host_key", state.key, lambda key: key.reshape(-1).tolist())
    return rng.fold_in_host(*keys, host_step(state), rank)


def attached_params(state: TrainState) -> Params:
    """The parameters as leaves of a new autograd graph: the same memory, requiring gradients.

    Kept with the state, since making them costs 1 microsecond per parameter and a step in place has the same ones
    again. Not once a loss has put a hook on one, which would otherwise run in later steps too.
    """
    kept = None if torch.compiler.is_compiling() else state.__dict__.get("_attached")
    if kept is None or any(map(_HOOKS, tree.leaves(kept))):
        kept = tree.like(state.params, [t.detach().requires_grad_() for t in tree.leaves(state.params)])
        if not torch.compiler.is_compiling():
            state.__dict__["_attached"] = kept
    return kept


_HOOKS = operator.attrgetter("_backward_hooks")


def init_state(
    module: nn.Module,
    optimizer: Transform,
    *,
    seed: int = 0,
    copy: bool = True,
    trainable: Collection[str] | None = None,
) -> TrainState:
    """The first state of a run.

    Parameters with ``requires_grad=False`` are frozen: they go beside the buffers and no optimizer sees them.
    Weights that are tied in the module appear once, under their first name.

    Args:
        module: the model, on the device and in the dtype it is to be trained in.
        optimizer: gives the first optimizer state.
        seed: from which dropout and all other randomness of the run derive.
        copy: False lets the state's tensors *be* the module's, which saves their memory; a compiled step that
            donates then trains the module itself in place.
        trainable: names of the parameters that are not frozen; None for those with ``requires_grad``.

    Returns: a state at step 0.

    Raises: ValueError if the module has no trainable parameter, lacks one that is named, or has one on the meta device.

    Example:
        >>> from trainkit.optim import adamw
        >>> int(init_state(nn.Linear(2, 1), adamw(1e-3), seed=7).key)
        7

    Source: the state record of flax.training.train_state.
    """
    named = dict(module.named_parameters())
    meta = [name for name, p in named.items() if p.is_meta]
    if meta:
        raise ValueError(f"module: parameter {meta[0]!r} is on the meta device; materialise it first (to_empty, load)")
    chosen = (
        {name: None for name, p in named.items() if p.requires_grad} if trainable is None else dict.fromkeys(trainable)
    )
    if unknown := [name for name in chosen if name not in named]:
        raise ValueError(f"trainable: {unknown[0]!r} is no parameter of the module, expected names out of its own")
    if not chosen:
        raise ValueError(
            f"module: {type(module).__name__} has {len(named)} parameters and none of them is trainable; "
            "expected at least one with requires_grad=True"
        )
    rest = {name: p for name, p in named.items() if name not in chosen} | dict(module.named_buffers())
    take = _copied if copy else _shared
    params = tree.frozen({name: take(p) for name, p in named.items() if name in chosen})
    device = next(named[name] for name in chosen).device
    return TrainState(
        step=torch.zeros((), dtype=torch.int64, device=device),
        params=params,
        buffers=tree.frozen({name: take(b) for name, b in rest.items()}),
        opt_state=optimizer.init(params),
        key=rng.make_key(seed),
        extra=tree.frozen(),
    )


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _shared(tensor: Tensor) -> Tensor:
    return tensor.detach()


def write_to(module: nn.Module, state: TrainState) -> None:
    """Copy the state's parameters and buffers into the module, in place.

    Raises: KeyError naming the first tensor that the module does not have.
    """
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    with torch.no_grad():
        for name, tensor in (tree.named(state.params) | tree.named(state.buffers)).items():
            if name not in own:
                raise KeyError(f"module has no parameter or buffer {name!r}; is the state another model's?")
            own[name].copy_(tensor)


def num_parameters(params: Params) -> int:
    """The number of elements over all parameters."""
    return sum(t.numel() for t in pytree.tree_leaves(params))
