"""Steps of a fused ``torch.optim.Adam`` or ``AdamW`` object, without what its wrapper spends on small parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from trainkit import tree
from trainkit.optim.torch_kernels import has_kernel, is_plain
from trainkit.types import Params

_SETTINGS = itemgetter("lr", "betas", "eps", "weight_decay", "maximize", "decoupled_weight_decay")
_MEMORY = ("step", "exp_avg", "exp_avg_sq")
_KIND = attrgetter("dtype", "device")
_Settings = tuple[Any, ...]


@dataclass(frozen=True)
class _Block:
    """Parameters whose groups have equal settings: what one call of the kernel takes."""

    names: list[str]
    params: list[Tensor]
    steps: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]


class FusedSteps:
    """``step()`` of one object, for as long as nothing about the object asks for its own.

    The wrapper of torch looks up every parameter, sorts them by device and advances a counter for each; for 34 tensors
    of 1,024 numbers that takes longer than the kernel. Here the counters are one tensor, of which the object holds a
    view for each parameter, so its own ``step()`` and ``state_dict()`` work at any time; and groups with equal settings
    are one call of the kernel.

    Args:
        optimizer_object: any optimizer.
        named: the module's parameters by name.
    """

    def __init__(self, optimizer_object: Optimizer, named: Mapping[str, nn.Parameter]) -> None:
        self._object = optimizer_object
        self._name_of = {id(p): name for name, p in named.items()}
        self._params: list[list[Any]] = []
        self._memory: list[Tensor] = []
        self._kind: Any = None
        self._counters = torch.zeros(0)
        self._steps: list[Tensor] = []
        self._places: list[int] = []
        self._pattern: tuple[int, ...] = ()
        self._blocks: dict[int, _Block] = {}

    @torch.no_grad()
    def step(self, grads: Params) -> bool:
        """One step with a gradient for each parameter; False, and nothing done, if the object has to make it itself."""
        if not _is_plain(self._object) or not (self._is_known() or self._learn()):
            return False
        tensors, named = tree.leaves(grads), tree.named(grads)
        if {(dtype, device) for _, dtype, device in tree.kinds(tensors)} != {self._kind}:
            return False
        calls = self._calls()
        rows = [[named[name] for name in block.names if name in named] for _, block in calls]
        is_whole = sum(map(len, self._params)) == len(tensors) == sum(map(len, rows))
        if not is_whole or not tree.are_contiguous(tensors):
            return False
        self._counters.add_(1)
        for (settings, block), row in zip(calls, rows, strict=True):
            _update(settings, block, row)
        # What its schedulers look for.
        self._object._opt_called = True  # type: ignore[attr-defined]
        return True

    def _is_known(self) -> bool:
        """Whether the object still holds the parameters and the memory that were looked at."""
        params = [group["params"] for group in self._object.param_groups]
        memories = self._object.state.values()
        return (
            len(params) == len(self._params) > 0
            and all(map(_are, params, self._params))
            and sum(map(len, memories)) == len(self._memory)
            and all(map(is_, _tensors_of(memories), self._memory))
            and list(map(Tensor.data_ptr, self._steps)) == self._places
        )

    def _learn(self) -> bool:
        """Look at an object that has made steps; False if its memory is not of the usual form."""
        params = [list(group["params"]) for group in self._object.param_groups]
        every = [p for row in params for p in row]
        memories = list(self._object.state.values())
        if set(map(id, every)) != set(map(id, self._object.state)) or not all(id(p) in self._name_of for p in every):
            return False
        if any(memory.keys() != set(_MEMORY) for memory in memories):
            return False
        tensors = [*every, *(memory[name] for memory in memories for name in _MEMORY[1:])]
        if len(set(map(_KIND, tensors))) != 1 or not all(map(Tensor.is_contiguous, tensors)):
            return False
        device = every[0].device
        if not all(map(is_plain, map(type, every))) or not has_kernel(torch._fused_adamw_, Tensor, device.type):
            return False
        self._kind = _KIND(every[0])
        steps = [memory["step"].to(device, torch.float32) for memory in memories]
        self._counters = torch.stack(steps)
        for memory, counter in zip(memories, self._counters.unbind(), strict=True):
            memory["step"] = counter
        self._steps = [memory["step"] for memory in memories]
        self._places = list(map(Tensor.data_ptr, self._steps))
        self._params, self._memory = params, list(_tensors_of(memories))
        self._pattern = ()
        return True

    def _calls(self) -> list[tuple[_Settings, _Block]]:
        settings = [_SETTINGS(group) for group in self._object.param_groups]
        pattern = tuple(map(settings.index, settings))
        if pattern != self._pattern:
            self._pattern = pattern
            self._blocks = {
                i: self._block([p for j, row in zip(pattern, self._params, strict=True) if i == j for p in row])
                for i in dict.fromkeys(pattern)
            }
        return [(settings[i], block) for i, block in self._blocks.items()]

    def _block(self, params: list[Any]) -> _Block:
        columns = [[self._object.state[p][name] for p in params] for name in _MEMORY]
        return _Block([self._name_of[id(p)] for p in params], params, *columns)


def _is_plain(optimizer_object: Any) -> bool:
    """Whether the object does what its class does, by the fused kernel, and nobody looks on."""
    kind = type(optimizer_object)
    if kind not in (torch.optim.Adam, torch.optim.AdamW):
        return False
    hooks = (
        optimizer_object._optimizer_step_pre_hooks
        or optimizer_object._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    )
    own = optimizer_object.__dict__.get("step")
    # The schedulers of torch put a wrapper there, which notes that it was called.
    is_noted = hasattr(own, "_wrapped_by_lr_sched") and getattr(own, "__wrapped__", None) is kind.step
    replaced = _without_hooks(kind.step) is not _STEP or not (own is None or is_noted)
    return not hooks and not replaced and all(map(_is_plain_group, optimizer_object.param_groups))


def _without_hooks(step: Any) -> Any:
    """The method of a class, without what torch puts around it when the first object is made."""
    return step.__wrapped__ if getattr(step, "hooked", False) else step


_STEP = _without_hooks(torch.optim.Adam.step)


def _is_plain_group(group: Mapping[str, Any]) -> bool:
    usual = group["fused"] and not group["amsgrad"] and not group["differentiable"]
    return bool(usual and group["params"] and isinstance(group["lr"], float))


def _tensors_of(memories: Iterable[dict[str, Any]]) -> Iterator[Tensor]:
    return chain.from_iterable(map(dict.values, memories))


def _are(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(map(is_, some, others))


def _update(settings: _Settings, block: _Block, grads: list[Tensor]) -> None:
    learning_rate, (beta1, beta2), eps, weight_decay, maximize, decoupled = settings
    kernel: Callable[..., None] = torch._fused_adamw_ if decoupled else torch._fused_adam_
    kernel(
        block.params,
        grads,
        block.exp_avgs,
        block.exp_avg_sqs,
        [],
        block.steps,
        lr=learning_rate,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=maximize,
        grad_scale=None,
        found_inf=None,
    )
