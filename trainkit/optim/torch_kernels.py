"""What all optimizers on torch's functional kernels share: the calling convention of ``torch.optim``.

The kernels overwrite their arguments. They are given writable tensors (:func:`trainkit.tree.writable`), so the
transformation stays pure and costs nothing where its inputs are donated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trainkit import tree
from trainkit.optim.transform import REPORT, Schedule, Transform, as_schedule, optimizer
from trainkit.types import OptState, Params

Kernel = Callable[..., None]
Slots = dict[str, Callable[[Params], Params]]
"""Per-parameter memory by name, each with its first value."""


def kernel_optimizer(
    kernel: Callable[[list[Tensor], list[Tensor], dict[str, list[Tensor]], Tensor, Tensor], None],
    slots: Slots,
    learning_rate: float | Tensor | Schedule,
) -> Transform:
    """A transformation around a kernel that works in place on lists of tensors.

    State: ``count`` (int64, completed updates), one tree per slot, and the last learning rate as a report.

    Args:
        kernel: ``(params, grads, slots, count, learning_rate)``; overwrites ``params`` and the lists in ``slots``.
            ``count`` is the number of updates before this one.
        slots: the first value of each per-parameter memory.
        learning_rate: number or schedule, read at ``count``.
    """
    schedule = as_schedule(learning_rate)

    def init(params: Params) -> OptState:
        device = next(iter(params.values())).device
        count = torch.zeros((), dtype=torch.int64, device=device)
        rate = torch.zeros((), dtype=torch.float32, device=device)
        made = {name: make(params) for name, make in slots.items()}
        return tree.frozen({"count": count, **made, REPORT: {"learning_rate": rate}})

    def apply(grads: Params, opt_state: OptState, params: Params, /, **extra: Any) -> tuple[Params, OptState]:
        count = opt_state["count"]
        rate = schedule(count)
        new = tree.writable(params.values())
        memory = {name: tree.writable(opt_state[name].values()) for name in slots}
        # Equal names in equal order are what makes the lists line up.
        kernel(new, [grads[name].to(p.dtype) for name, p in params.items()], memory, count, rate)
        return tree.like(params, new), _after(opt_state, memory, count, rate)

    return optimizer(init, apply)


def _after(opt_state: OptState, memory: dict[str, list[Tensor]], count: Tensor, rate: Tensor) -> OptState:
    entries: dict[str, Any] = {name: tree.like(opt_state[name], tensors) for name, tensors in memory.items()}
    if torch.compiler.is_compiling():
        return tree.frozen({"count": count + 1, **entries, REPORT: {"learning_rate": rate.to(torch.float32)}})
    old = opt_state[REPORT]["learning_rate"]
    (new_count, new_rate) = tree.writable([count, old])
    new_count.add_(1)
    new_rate.copy_(rate)
    unchanged = new_count is count and new_rate is old and all(entries[name] is opt_state[name] for name in entries)
    return opt_state if unchanged else tree.frozen({"count": new_count, **entries, REPORT: {"learning_rate": new_rate}})


def step_tensors(count: Tensor, params: list[Tensor]) -> list[Tensor]:
    """The count as ``torch.optim`` wants it: one float tensor per parameter, each advanced by the kernel.

    Inside a graph the equal chains of arithmetic on them are merged into one.
    """
    dtype = torch.float64 if params[0].dtype == torch.float64 else torch.float32
    if torch.compiler.is_compiling():
        return [count.to(dtype) for _ in params]
    return list(count.to(dtype).expand(len(params)).clone().unbind())


def implementation(params: list[Tensor], *, fused: bool) -> dict[str, bool]:
    """Which of torch's implementations to call: fused where there is one, else foreach, eager; plain in a graph.

    Args:
        params: what is updated.
        fused: whether this optimizer has a fused kernel.
    """
    if torch.compiler.is_compiling():
        # The compiler fuses the plain form itself; tensors for rate and count keep it from specialising on numbers.
        return {"foreach": False, "fused": False} if fused else {"foreach": False}
    use_fused = fused and all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in params)
    return {"foreach": not use_fused, "fused": use_fused} if fused else {"foreach": True}
