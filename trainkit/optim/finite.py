"""Updates that are left out where a gradient is not finite, without asking the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from trainkit import tree
from trainkit.optim.torch_kernels import device_of
from trainkit.optim.transform import REPORT, Transform, UpdateFn, with_entries
from trainkit.types import OptState, Params

if TYPE_CHECKING:
    from tensordict import TensorDict

T = TypeVar("T", Tensor, "TensorDict")


def skip_nonfinite(tx: Transform) -> Transform:
    """Leave parameters and optimizer state as they are where any gradient holds an infinity or a NaN.

    The device makes the choice, number by number, so the host never waits for it; outside of a graph that takes a
    second set of parameters and state while the update runs. On a CPU the host looks, and nothing runs that is not
    needed. ``skipped`` is reported: 1 for an update that was left out, else 0.

    Args:
        tx: what to run. It sees zeros instead of the gradients that are not finite, so that no decomposition fails.

    Example:
        >>> from trainkit.optim import sgd
        >>> w = tree.frozen({"w": torch.tensor([1.0])})
        >>> bad = tree.frozen({"w": torch.tensor([float("nan")])})
        >>> tx = skip_nonfinite(sgd(0.5))
        >>> after, state = tx.apply(bad, tx.init(w), w)
        >>> after["w"], state["inner"]["count"], state["report"]["skipped"]
        (tensor([1.]), tensor(0), tensor(1.))

    Source: ``optax.apply_if_finite``, without its limit.
    """

    def init(params: Params) -> dict[str, Any]:
        return {REPORT: {"skipped": torch.zeros((), device=device_of(params))}}

    def after(opt_state: OptState, finite: Tensor) -> dict[str, Any]:
        return {REPORT: tree.assign(opt_state[REPORT], [(~finite).float()])}

    return guarded(tx, init, after)


def guarded(
    tx: Transform,
    init_own: Callable[[Params], dict[str, Any]],
    own_after: Callable[[OptState, Tensor], dict[str, Any]],
) -> Transform:
    """``tx`` where all gradients are finite, nothing elsewhere; with memory of its own about which it was.

    State: ``inner`` (that of ``tx``) and the entries of its own.

    Args:
        tx: what to run.
        init_own: its first entries, from the parameters.
        own_after: ``(opt_state, finite) -> entries``, the same ones after an update; ``finite`` is a 0-d bool tensor.
    """

    def init(params: Params) -> OptState:
        return tree.frozen({"inner": tx.init(params), **init_own(params)})

    def update(grads: Params, opt_state: OptState, params: Params, /, **extra: Any) -> tuple[Params, OptState]:
        return through(tx.update, tree.zeros_like(grads), grads, opt_state, params, extra)

    def apply(grads: Params, opt_state: OptState, params: Params, /, **extra: Any) -> tuple[Params, OptState]:
        return through(tx.apply, params, grads, opt_state, params, extra)

    def through(
        rule: UpdateFn, otherwise: Params, grads: Params, opt_state: OptState, params: Params, extra: dict[str, Any]
    ) -> tuple[Params, OptState]:
        finite, before = tree.all_finite(tree.leaves(grads)), opt_state["inner"]
        own = own_after(opt_state, finite)
        if not _is_free(finite):
            with tree.keep():
                out, inner = rule(_or_zero(finite, grads), before, params, **extra)
            out, inner = select(finite, out, otherwise), select(finite, inner, before)
        elif bool(finite):
            out, inner = rule(grads, before, params, **extra)
        else:
            out, inner = otherwise, before
        return out, with_entries(opt_state, {"inner": inner, **own})

    return Transform(init, update, apply)


def select(condition: Tensor, new: T, old: T) -> T:
    """``new`` where the condition holds, else ``old``: one tensor, or all tensors of nested trees with equal names.

    Where the old tensors are donated, the choice is written over them.

    Args:
        condition: 0-d bool tensor.
        new: a tree.
        old: a tree with the same names, shapes and dtypes.

    Example:
        >>> select(torch.tensor(False), torch.ones(1), torch.zeros(1))
        tensor([0.])
    """
    chosen: Any = _selected_tensor if isinstance(new, Tensor) else _selected_tree
    return cast("T", chosen(condition, new, old))


def _selected_tree(condition: Tensor, new: TensorDict, old: Any) -> TensorDict:
    return with_entries(old, {name: select(condition, child, old[name]) for name, child in dict(new.items()).items()})


def _selected_tensor(condition: Tensor, new: Tensor, old: Tensor) -> Tensor:
    if new is old:
        return old
    donated = tree.is_donated([old])
    if not _is_free(condition):
        return torch.where(condition, new, old, out=old) if donated else torch.where(condition, new, old)
    if not bool(condition):
        return old
    return old.copy_(new) if donated else new


def _is_free(condition: Tensor) -> bool:
    """Whether the host may look at the value without waiting: then it need not run both ways and choose."""
    return condition.is_cpu and tree.has_foreach()


def _or_zero(finite: Tensor, updates: Params) -> Params:
    return tree.map_tensors(lambda t: torch.where(finite, t, 0), updates)
