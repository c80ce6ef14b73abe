"""Precision policies: in which dtype parameters are kept, losses computed, updates rounded.

A policy changes a step in three places (the loss, the optimizer, the scale of the loss) and nothing else;
``make_train_step`` takes it as ``precision``. Make the first state with ``policy.init_state``, since a policy may
change the dtype of the parameters and the optimizer's memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainkit import rng, tree
from trainkit.gradients import LossScale
from trainkit.optim.loss_scale import current_loss_scale, dynamic_loss_scale
from trainkit.optim.transform import Transform, optimizer, with_entries
from trainkit.state import TrainState, init_state
from trainkit.types import Batch, Buffers, LossFn, LossOutput, OptState, Params


def _same_loss(loss: LossFn) -> LossFn:
    return loss


def _same_optimizer(optimizer: Transform) -> Transform:
    return optimizer


@dataclass(frozen=True)
class Precision:
    """A policy.

    Args:
        loss: what becomes of the loss function.
        optimizer: what becomes of the optimizer.
        scale: reads the loss scale out of the state; None without one.
        param_dtype: floating dtype that parameters are kept in; None leaves the module's.
    """

    loss: Callable[[LossFn], LossFn] = _same_loss
    optimizer: Callable[[Transform], Transform] = _same_optimizer
    scale: LossScale | None = None
    param_dtype: torch.dtype | None = None

    def init_state(self, module: nn.Module, optimizer: Transform, *, seed: int = 0, copy: bool = True) -> TrainState:
        """The first state under this policy; casts the module in place where the policy has a dtype for parameters."""
        if self.param_dtype is not None:
            module.to(self.param_dtype)
        return init_state(module, self.optimizer(optimizer), seed=seed, copy=copy)


def full() -> Precision:
    """Everything in the dtype that the module has.

    Example:
        >>> full().param_dtype is None
        True
    """
    return Precision()


def bf16_mixed() -> Precision:
    """Parameters, gradients and updates as they are; the loss under autocast to bfloat16. Needs no loss scale.

    Example:
        >>> bf16_mixed().scale is None
        True

    Source: torch.autocast; Kalamkar et al. 2019.
    """
    return Precision(loss=lambda loss: autocast(loss, torch.bfloat16))


def fp16_mixed(
    *,
    initial_scale: float = 2.0**16,
    growth_factor: float = 2.0,
    backoff_factor: float = 0.5,
    growth_interval: int = 2000,
) -> Precision:
    """The loss under autocast to float16, with a dynamic loss scale in the optimizer state; overflows are skipped.

    Args:
        initial_scale: the first scale.
        growth_factor: multiplies the scale after ``growth_interval`` finite updates.
        backoff_factor: multiplies it after an overflow.
        growth_interval: updates.

    Example:
        >>> from trainkit.optim import sgd
        >>> state = fp16_mixed(initial_scale=8.0).init_state(nn.Linear(2, 1), sgd(0.1))
        >>> current_loss_scale(state)
        tensor(8.)

    Source: Micikevicius et al. 2018, "Mixed precision training"; matches torch.autocast with torch.amp.GradScaler.
    """

    def scaled(optimizer: Transform) -> Transform:
        return dynamic_loss_scale(
            optimizer,
            initial=initial_scale,
            growth_factor=growth_factor,
            backoff_factor=backoff_factor,
            growth_interval=growth_interval,
        )

    return Precision(loss=lambda loss: autocast(loss, torch.float16), optimizer=scaled, scale=current_loss_scale)


def bf16_pure(*, seed: int = 0) -> Precision:
    """Parameters, activations and gradients in bfloat16; the update in float32, rounded stochastically into place.

    A bfloat16 number has 8 bits of mantissa: an update below 1/256 of a weight is lost when rounded to nearest, and is
    right on average when rounded up with the probability of its remainder. The optimizer's memory is float32.

    Args:
        seed: of the rounding.

    Example:
        >>> from trainkit.optim import sgd
        >>> state = bf16_pure().init_state(nn.Linear(2, 1), sgd(0.1))
        >>> state.params["weight"].dtype
        torch.bfloat16

    Source: Gupta et al. 2015, "Deep learning with limited numerical precision", sec. 3; Zamirai et al. 2020,
    "Revisiting BFloat16 training".
    """
    return Precision(
        optimizer=lambda optimizer: stochastically_rounded(optimizer, seed=seed), param_dtype=torch.bfloat16
    )


def autocast(loss: LossFn, dtype: torch.dtype) -> LossFn:
    """The loss under ``torch.autocast`` to ``dtype``, on the device of the parameters.

    Args:
        loss: any loss; it should sum in float32 itself (torch's loss functions do under autocast).
        dtype: ``torch.bfloat16`` or ``torch.float16``.

    Raises: ValueError for another dtype.

    Example:
        >>> params = tree.frozen({"w": torch.ones(2, 2)})
        >>> loss = lambda params, buffers, x: LossOutput((x @ params["w"]).sum(), x.shape[0])
        >>> autocast(loss, torch.bfloat16)(params, tree.frozen(), torch.ones(1, 2)).loss_sum.dtype
        torch.bfloat16

    Source: torch.autocast.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"dtype: got {dtype}, expected torch.bfloat16 or torch.float16")

    def cast(params: Params, buffers: Buffers, batch: Batch) -> LossOutput:
        device = tree.leaves(params)[0].device.type
        with torch.autocast(device, dtype):
            return loss(params, buffers, batch)

    return cast


def stochastically_rounded(tx: Transform, *, seed: int = 0) -> Transform:
    """Run an optimizer in float32 on parameters of another dtype, and round what it gives stochastically.

    p <- round(tx(float32(p))): up with the probability of the remainder, so that the expectation is exact.

    State: that of ``tx`` (in float32) and ``count``, from which, with the seed, every draw derives.

    Args:
        tx: any transformation.
        seed: of the rounding.

    Raises: ValueError at ``init`` for parameters that are neither bfloat16 nor float32.

    Example:
        >>> from trainkit.optim import sgd
        >>> w = tree.frozen({"w": torch.ones(1000, dtype=torch.bfloat16)})
        >>> tx = stochastically_rounded(sgd(2.0**-10))
        >>> after = tx.apply(w, tx.init(w), w)[0]["w"]
        >>> after.dtype, abs(float(after.double().mean()) - (1 - 2.0**-10)) < 2e-4
        (torch.bfloat16, True)
    """
    key = rng.make_key(seed)

    def init(params: Params) -> OptState:
        wrong = [name for name, p in tree.named(params).items() if p.dtype not in (torch.bfloat16, torch.float32)]
        if wrong:
            raise ValueError(f"params: {wrong[0]!r} is {params[wrong[0]].dtype}, expected bfloat16 or float32")
        device = tree.leaves(params)[0].device
        return tree.frozen(
            {"count": torch.zeros((), dtype=torch.int64, device=device), "inner": tx.init(_wide(params))}
        )

    def apply(grads: Params, opt_state: OptState, params: Params, /, **extra: Any) -> tuple[Params, OptState]:
        wide, inner = tx.apply(_wide(grads), opt_state["inner"], _wide(params), **extra)
        draw = rng.fold_in(key.to(opt_state["count"].device), opt_state["count"])
        rounded = [
            round_stochastically(value, old.dtype, rng.fold_in(draw, i))
            for i, (value, old) in enumerate(zip(tree.leaves(wide), tree.leaves(params), strict=True))
        ]
        count = tree.incremented(opt_state["count"])
        return tree.assign(params, rounded), with_entries(opt_state, {"count": count, "inner": inner})

    return optimizer(init, apply)


def round_stochastically(value: Tensor, dtype: torch.dtype, key: Tensor) -> Tensor:
    """Round a float32 tensor to bfloat16, up or down with the probabilities that keep its mean.

    The 16 low bits are a remainder r: a uniform 16-bit number is added to them and they are cut off, so the result is
    the next number away from zero with probability r / 2^16. Infinities and NaNs stay.

    Args:
        value: float32.
        dtype: ``torch.bfloat16``, or ``torch.float32`` for no change.
        key: int64 scalar; element i draws from ``fold_in(key, i)``.

    Example:
        >>> third = torch.full((30_000,), 1 / 3)
        >>> rounded = round_stochastically(third, torch.bfloat16, rng.make_key(0))
        >>> abs(float(rounded.double().mean()) - 1 / 3) < 2e-5, len(rounded.unique())
        (True, 2)
    """
    if dtype == value.dtype:
        return value
    index = torch.arange(value.numel(), device=value.device).view(value.shape)
    noise = (rng.fold_in(key, index) & 0xFFFF).to(torch.int32)
    bits = (value.view(torch.int32) + noise) & ~0xFFFF
    return torch.where(value.isfinite(), bits.view(torch.float32), value).to(dtype)


def _wide(params: Params) -> Params:
    """The parameters in float32; temporaries, which the update may overwrite."""
    wide = tree.map_tensors(lambda p: p.to(torch.float32, copy=True), params)
    tree.release(wide)
    return wide
