"""Memory of the host that holds the copy of a state while it is written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainkit.io.checkpoint.format import MODEL, Leaves, check_leaves
from trainkit.io.checkpoint.tensors import Slot, layout, memory_of


@dataclass(frozen=True)
class Copy:
    """A copy of a state's leaves, laid out as in their files.

    Args:
        memory: the bytes behind the header, by file.
        params: the parameters by name, views of them.
    """

    memory: dict[str, memoryview]
    params: dict[str, Tensor]


class HostMemory:
    """One piece of memory per file, kept from copy to copy; page-locked where the state is on a GPU, which copies
    into it at the full rate of the bus.

    Example:
        >>> from torch import nn
        >>> from trainkit import init_state
        >>> from trainkit.io.checkpoint.format import flatten_state
        >>> from trainkit.optim import sgd
        >>> leaves = flatten_state(init_state(nn.Linear(2, 1), sgd(0.1)))
        >>> copy = HostMemory().take(leaves)
        >>> torch.equal(copy.params["weight"], leaves.model["weight"]), len(copy.memory["model.safetensors"])
        (True, 12)
    """

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}
        self._views: dict[str, list[Tensor]] = {}
        self._kinds: list[tuple[Any, ...]] = []
        self._slots: dict[str, list[Slot]] = {}

    def slots(self, leaves: Leaves) -> dict[str, list[Slot]]:
        """Where each leaf lies in its file. Worked out and checked once for all states of one kind.

        Raises: TypeError, ValueError if a leaf cannot be stored.
        """
        by_file = leaves.by_file()
        kinds = [(n, type(t), t.dtype, t.shape, t.device, t.layout) for own in by_file.values() for n, t in own.items()]
        if kinds != self._kinds:
            check_leaves(leaves)
            self._slots = {file: layout(own) for file, own in by_file.items()}
            self._kinds, self._views = kinds, {}
        return self._slots

    def take(self, leaves: Leaves) -> Copy:
        """Copy all leaves; the copies of the call before are gone. Returns when the devices are done with it.

        Raises: TypeError, ValueError if a leaf cannot be stored.
        """
        slots = self.slots(leaves)
        memory: dict[str, memoryview] = {}
        for file, own in leaves.by_file().items():
            flat = self._sized(file, slots[file][-1].end if slots[file] else 0, any(t.is_cuda for t in own.values()))
            if file not in self._views:
                views = {slot.name: _view(flat, slot) for slot in slots[file]}
                self._views[file] = [views[name] for name in own]
            _copy(self._views[file], list(own.values()))
            memory[file] = memory_of(flat)
        _wait_for({t.device for own in leaves.by_file().values() for t in own.values()})
        # Parameters come first among the tensors of the model.
        return Copy(memory, dict(zip(leaves.params, self._views[MODEL], strict=False)))

    def _sized(self, file: str, size: int, pinned: bool) -> Tensor:
        flat = self._memory.get(file)
        if flat is None or flat.numel() < size or (pinned and not flat.is_pinned()):
            flat = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned)
            self._memory[file] = flat
        return flat[:size]


def _view(flat: Tensor, slot: Slot) -> Tensor:
    return flat[slot.begin : slot.end].view(slot.dtype).view(slot.shape)


def _copy(into: list[Tensor], tensors: list[Tensor]) -> None:
    if into:
        torch._foreach_copy_([_plain(t) for t in into], [_plain(t.detach()) for t in tensors], non_blocking=True)


def _plain(tensor: Tensor) -> Tensor:
    # Not all of the dtypes of one byte have a kernel for copies; their bytes do.
    return tensor.resolve_neg().view(torch.uint8) if tensor.itemsize == 1 else tensor


def _wait_for(devices: Iterable[torch.device]) -> None:
    for device in devices:
        if device.type != "cpu":
            torch.accelerator.current_stream(device).synchronize()
