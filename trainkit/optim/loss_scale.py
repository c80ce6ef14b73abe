"""Dynamic loss scaling for float16, with the scale in the optimizer's state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainkit import tree
from trainkit.optim.finite import guarded
from trainkit.optim.torch_kernels import device_of
from trainkit.optim.transform import REPORT, Transform, reports
from trainkit.schedules import real_dtype
from trainkit.types import OptState, Params

if TYPE_CHECKING:
    from trainkit.state import TrainState


def dynamic_loss_scale(
    tx: Transform,
    *,
    initial: float = 2.0**16,
    growth_factor: float = 2.0,
    backoff_factor: float = 0.5,
    growth_interval: int = 2000,
) -> Transform:
    """Keep a loss scale: skip the update and shrink the scale on overflow, grow it after a while without.

    Not finite: nothing changes but scale <- scale backoff_factor, tracker <- 0.
    Finite: the update runs, tracker <- tracker + 1; when it reaches growth_interval, scale <- scale growth_factor
    (unless that is infinite) and tracker <- 0.

    The scale is applied where the loss is, by ``value_and_grad(loss, scale=current_loss_scale)``, which divides the
    gradients by it; what arrives here is already the true gradient. Put everything that looks at gradients inside:
    ``dynamic_loss_scale(chain(clip_by_global_norm(1.0), adamw(3e-4)))``.

    Reports ``loss_scale`` (that of the next step) and ``skipped`` (1 for an update that was left out, else 0).

    Args:
        tx: the optimizer.
        initial: positive, the first scale.
        growth_factor: greater than 1.
        backoff_factor: in (0, 1).
        growth_interval: positive, finite updates in a row before the scale grows.

    Raises: ValueError for numbers out of these ranges.

    Example:
        >>> from trainkit.optim import sgd
        >>> w = tree.frozen({"w": torch.tensor([1.0])})
        >>> overflow = tree.frozen({"w": torch.tensor([float("inf")])})
        >>> tx = dynamic_loss_scale(sgd(0.5), initial=8.0, growth_interval=1)
        >>> after, state = tx.apply(overflow, tx.init(w), w)
        >>> after["w"], state["report"]["loss_scale"]
        (tensor([1.]), tensor(4.))
        >>> tx.apply(w, state, after)[1]["report"]["loss_scale"]
        tensor(8.)

    Source: Micikevicius et al. 2018, sec. 3.2; matches torch.amp.GradScaler (torch 2.13).
    """
    if not (initial > 0 and growth_factor > 1 and 0 < backoff_factor < 1 and growth_interval >= 1):
        raise ValueError(
            f"initial, growth_factor, backoff_factor, growth_interval: got {initial}, {growth_factor}, "
            f"{backoff_factor}, {growth_interval}, expected > 0, > 1, in (0, 1), >= 1"
        )

    def init(params: Params) -> dict[str, Any]:
        device = device_of(params)
        scale = torch.full((), initial, dtype=torch.float32, device=device)
        tracker = torch.zeros((), dtype=torch.int64, device=device)
        return {"growth": {"tracker": tracker}, REPORT: {"loss_scale": scale, "skipped": torch.zeros_like(scale)}}

    def after(opt_state: OptState, finite: Tensor) -> dict[str, Any]:
        (tracker,), (scale, _) = tree.leaves(opt_state["growth"]), tree.leaves(opt_state[REPORT])
        scale, tracker = next_scale(scale, tracker, finite, growth_factor, backoff_factor, growth_interval)
        return {
            "growth": tree.assign(opt_state["growth"], [tracker]),
            REPORT: tree.assign(opt_state[REPORT], [scale, (~finite).float()]),
        }

    return guarded(tx, init, after)


def next_scale(
    scale: Tensor, tracker: Tensor, finite: Tensor, growth_factor: float, backoff_factor: float, growth_interval: int
) -> tuple[Tensor, Tensor]:
    """The scale and the number of finite updates since its last change, after one more update.

    Args:
        scale: float32 scalar.
        tracker: integer scalar.
        finite: bool scalar, whether the update was finite.
        growth_factor: see :func:`dynamic_loss_scale`.
        backoff_factor: see :func:`dynamic_loss_scale`.
        growth_interval: see :func:`dynamic_loss_scale`.

    Example:
        >>> next_scale(torch.tensor(8.0), torch.tensor(1), torch.tensor(True), 2.0, 0.5, 2)
        (tensor(16.), tensor(0))

    Source: ``torch._amp_update_scale_`` (torch 2.13), whose results it has to the bit; written out, it needs no copies
    to stay pure and fuses with the rest of a graph.
    """
    wide = scale.to(real_dtype(scale.device))
    grown = (wide * growth_factor).to(scale.dtype)
    due = tracker + 1 == growth_interval
    larger = torch.where(due & torch.isfinite(grown), grown, scale)
    smaller = (wide * backoff_factor).to(scale.dtype)
    return torch.where(finite, larger, smaller), torch.where(finite & ~due, tracker + 1, 0)


def current_loss_scale(state: TrainState) -> Tensor:
    """The loss scale in the optimizer's state, wherever :func:`dynamic_loss_scale` stands in it.

    Raises: KeyError if there is none.

    Example:
        >>> from trainkit import init_state
        >>> from trainkit.optim import sgd
        >>> current_loss_scale(init_state(torch.nn.Linear(2, 1), dynamic_loss_scale(sgd(0.1), initial=8.0)))
        tensor(8.)
    """
    found = reports(state.opt_state)
    if "loss_scale" not in found:
        raise KeyError(
            f"state.opt_state: no loss scale among its reports {sorted(found)}; wrap the optimizer in "
            "dynamic_loss_scale before init_state"
        )
    return found["loss_scale"]
