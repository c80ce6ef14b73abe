"""Optimizers as gradient transformations: an ``init`` and an ``update``, joined by ``chain``.

A transformation turns gradients into updates, and updates into other updates; new parameters are
``params + updates``. It has a second face, ``apply``, that gives the new parameters directly: torch's fused kernels
compute those and never materialise an update. Both faces mean the same; ``transform`` and ``optimizer`` derive
the one from the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from trainkit import tree
from trainkit.schedules import real_dtype
from trainkit.types import OptState, Params, Schedule


class InitFn(Protocol):
    """``(params) -> opt_state``."""

    def __call__(self, params: Params, /) -> OptState: ...


class UpdateFn(Protocol):
    """``(grads, opt_state, params, **extra) -> (updates, opt_state)``.

    ``extra`` holds what only some members of a chain need (``loss``: the mean loss, a 0-d tensor); a member ignores
    what it does not know.
    """

    def __call__(
        self, grads: Params, opt_state: OptState, params: Params, /, **extra: Any
    ) -> tuple[Params, OptState]: ...


@dataclass(frozen=True)
class Transform:
    """A gradient transformation.

    Args:
        init: ``(params) -> opt_state``.
        update: ``(grads, opt_state, params, **extra) -> (updates, opt_state)``; ``params + updates`` are the new ones.
        apply: ``(grads, opt_state, params, **extra) -> (params, opt_state)``, the same in one go.
    """

    init: InitFn
    update: UpdateFn
    apply: UpdateFn


def transform(init: InitFn, update: UpdateFn) -> Transform:
    """A transformation from its rule for updates; ``apply`` adds them to the parameters."""

    def apply(grads: Params, opt_state: OptState, params: Params, /, **extra: Any) -> tuple[Params, OptState]:
        updates, opt_state = update(grads, opt_state, params, **extra)
        return add_updates(params, updates), opt_state

    return Transform(init, update, apply)


def stateless(rule: Callable[[Params, Params], Params]) -> Transform:
    """A transformation without memory from ``(updates, params) -> updates``."""

    def update(grads: Params, opt_state: OptState, params: Params, /, **extra: Any) -> tuple[Params, OptState]:
        return rule(grads, params), opt_state

    return transform(lambda params: tree.frozen(), update)


def optimizer(init: InitFn, apply: UpdateFn) -> Transform:
    """A transformation from a rule that gives new parameters, as torch's kernels do; ``update`` subtracts."""

    def update(grads: Params, opt_state: OptState, params: Params, /, **extra: Any) -> tuple[Params, OptState]:
        with tree.keep():
            new, opt_state = apply(grads, opt_state, params, **extra)
        return tree.map_tensors(torch.sub, new, params), opt_state

    return Transform(init, update, apply)


def add_updates(params: Params, updates: Params) -> Params:
    """``params + updates``, in the dtype of the parameters."""
    new = tree.writable(tree.leaves(params))
    if not tree.has_foreach():
        return tree.like(params, [p + u.to(p.dtype) for p, u in zip(new, tree.leaves(updates), strict=True)])
    torch._foreach_add_(new, [u.to(p.dtype) for p, u in zip(new, tree.leaves(updates), strict=True)])
    return tree.like(params, new)


def identity() -> Transform:
    """Gradients pass as they are.

    Example:
        >>> grads = tree.frozen({"w": torch.ones(2)})
        >>> identity().update(grads, tree.frozen(), grads)[0] is grads
        True
    """
    return stateless(lambda updates, params: updates)


def chain(*transforms: Transform) -> Transform:
    """Transformations one after the other: each gets the updates of the one before.

    The state is a tree with one entry per member, under its position ("0", "1", ...).

    Example:
        >>> from trainkit.optim import clip_by_global_norm, sgd
        >>> w = tree.frozen({"w": torch.tensor([3.0, 4.0])})
        >>> tx = chain(clip_by_global_norm(1.0), sgd(1.0))
        >>> tx.update(w, tx.init(w), w)[0]["w"]
        tensor([-0.6000, -0.8000])

    Source: ``optax.chain``.
    """
    if not transforms:
        return identity()

    def init(params: Params) -> OptState:
        return tree.frozen({str(i): t.init(params) for i, t in enumerate(transforms)})

    def update(grads: Params, opt_state: OptState, params: Params, /, **extra: Any) -> tuple[Params, OptState]:
        updates, states = _through(transforms, grads, opt_state, params, extra)
        return updates, with_entries(opt_state, states)

    def apply(grads: Params, opt_state: OptState, params: Params, /, **extra: Any) -> tuple[Params, OptState]:
        updates, states = _through(transforms[:-1], grads, opt_state, params, extra)
        last = str(len(transforms) - 1)
        new, states[last] = transforms[-1].apply(updates, states[last], params, **extra)
        return new, with_entries(opt_state, states)

    return Transform(init, update, apply)


def _through(
    transforms: tuple[Transform, ...], updates: Params, opt_state: OptState, params: Params, extra: dict[str, Any]
) -> tuple[Params, dict[str, Any]]:
    states: dict[str, Any] = dict(opt_state.items())
    for i, t in enumerate(transforms):
        updates, states[str(i)] = t.update(updates, states[str(i)], params, **extra)
    return updates, states


def with_entries(opt_state: OptState, entries: dict[str, Any]) -> OptState:
    """``opt_state`` with these entries; itself where nothing changed."""
    own = dict(opt_state.items())
    if own.keys() == entries.keys() and all(entries[name] is old for name, old in own.items()):
        return opt_state
    return tree.frozen(entries)


def as_schedule(value: float | Tensor | Schedule) -> Schedule:
    """A hyper-parameter as a function of the step: a number becomes a constant.

    Raises: TypeError for anything else.
    """
    if callable(value):
        return value
    if isinstance(value, (int, float, Tensor)) and not isinstance(value, bool):
        return lambda step: torch.as_tensor(value, dtype=real_dtype(step.device), device=step.device)
    raise TypeError(f"schedule: got {type(value).__name__}, expected a number or a function of the step tensor")


REPORT = "report"
"""The entry of an optimizer state under which a transformation leaves 0-d tensors for the step's metrics."""


def reports(opt_state: OptState) -> dict[str, Tensor]:
    """All reported values (learning rate, gradient norm, loss scale) in an optimizer state, by name.

    Where several members report under one name, the later ones get their path in front.
    """
    found: dict[str, Tensor] = {}
    for path, entry in _entries(opt_state, ""):
        for name, value in entry.items():
            found[name if name not in found else f"{path}{name}"] = value
    return found


def _entries(opt_state: Any, path: str) -> Any:
    entries = dict(opt_state.items())
    if set(map(type, entries.values())) == {Tensor}:
        return
    for name, child in entries.items():
        # A tensor called "report" is the memory of a parameter of that name.
        if isinstance(child, Tensor):
            continue
        if name == REPORT:
            yield path, child
        else:
            yield from _entries(child, f"{path}{name}/")
