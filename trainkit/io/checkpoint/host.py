"""Memory of the host that holds the copy of a state while it is written."""

from __future__ import annotations

import ctypes
import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainkit.io.checkpoint.format import Leaves, flatten_state
from trainkit.io.checkpoint.tensors import Slot, extent, layout, memory_of
from trainkit.state import TrainState
from trainkit.tree import is_tree

_LARGE = 2**17
"""Bytes from which on torch copies a tensor with several threads."""
_PIECE = 2**19
"""Bytes that a thread copies at a time: with twice as many, or half, two threads need a tenth longer for them."""
_THREADS = 4
"""At most, of those that torch may have."""
_FEW = 500
"""Small tensors that a thread copies at a time; as few are copied sooner than another thread is started."""
_PLAIN = {Tensor, nn.Parameter}
_kind = operator.attrgetter("dtype", "shape", "device")


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

    All that does not depend on values (names, checks, where each leaf goes) is worked out once for all states of one
    kind. With thousands of small leaves it would cost more than the copy.

    Example:
        >>> from trainkit import init_state
        >>> from trainkit.optim import sgd
        >>> state, host = init_state(nn.Linear(2, 1), sgd(0.1)), HostMemory()
        >>> copy = host.take(host.leaves(state))
        >>> torch.equal(copy.params["weight"], state.params["weight"]), len(copy.memory["model.safetensors"])
        (True, 12)
    """

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}
        self._structure: list[Any] = []
        self._kinds: list[Any] = []
        self._devices: set[torch.device] = set()
        self._of_bytes: set[int] = set()
        self._into: list[Tensor] = []
        self._large: dict[int, int] = {}
        self._small: list[int] = []
        self._into_small: list[Tensor] = []
        self._copy = Copy({}, {})
        self.slots: dict[str, list[Slot]] = {}
        """Where each leaf of the last state lies in its file."""

    def leaves(self, state: TrainState) -> list[Tensor]:
        """The tensors of a state, in the order in which :meth:`take` wants them.

        Raises: TypeError, ValueError if one cannot be stored.
        """
        tensors, structure = _walked(state)
        if structure != self._structure or not self._knows(tensors):
            leaves = flatten_state(state)
            # Should there not be enough memory, nothing is known any more.
            self._kinds = []
            self._lay_out(leaves)
            self._structure, self._kinds = structure, list(map(_kind, tensors))
        return tensors

    def _knows(self, tensors: list[Tensor]) -> bool:
        if len(tensors) != len(self._kinds) or not set(map(type, tensors)) <= _PLAIN:
            return False
        # One after the other: thousands of objects at a time would call the garbage collector.
        return all(map(operator.eq, map(_kind, tensors), self._kinds))

    def take(self, tensors: list[Tensor]) -> Copy:
        """Copy all leaves; the copies of the call before are gone. Returns when the devices are done with it.

        Args:
            tensors: of the state that :meth:`leaves` was asked for last.
        """
        large, small, into = self._large, self._small, self._into_small
        if not all(map(_is_plain_memory, (tensors[i] for i in large))):
            large = {i: address for i, address in large.items() if _is_plain_memory(tensors[i])}
            small = [i for i in range(len(tensors)) if i not in large]
            into = [self._into[i] for i in small]
        with _ordinary_tensors():
            rest = _as_copied(tensors, self._of_bytes, small)
        if all(device.type == "cpu" for device in self._devices):
            _in_threads([partial(_copy_tensors, *part) for part in _parts(into, rest)], _threads())
        else:
            # In this thread, whose stream is that of the steps: behind the last one, and before what may overwrite it.
            _copy_tensors(into, rest)
        copies = (copy for i, address in large.items() for copy in _by_piece(address, tensors[i]))
        # One does not fill the bus of every processor. Of more, half do, and on the other cores the threads of torch go
        # round for a while after a kernel.
        _in_threads(copies, max(2, _threads() // 2))
        _wait_for(self._devices)
        return self._copy

    def _lay_out(self, leaves: Leaves) -> None:
        by_file = leaves.by_file()
        tensors = [t for own in by_file.values() for t in own.values()]
        self.slots = {file: layout(own) for file, own in by_file.items()}
        self._devices = {t.device for t in tensors}
        self._of_bytes = {i for i, t in enumerate(tensors) if t.itemsize == 1}
        memory, views = {}, []
        with _ordinary_tensors():
            for file, own in by_file.items():
                flat = self._sized(file, extent(self.slots[file]), any(t.is_cuda for t in own.values()))
                at = {slot.name: slot for slot in self.slots[file]}
                views += [_view(flat, at[name]) for name in own]
                memory[file] = memory_of(flat)
            self._into = _as_copied(views, self._of_bytes, range(len(views)))
        # Parameters come first among the tensors of the model.
        self._copy = Copy(memory, dict(zip(leaves.params, views, strict=False)))
        large = (i for i, t in enumerate(tensors) if t.is_cpu and t.nbytes >= _LARGE)
        self._large = {i: views[i].data_ptr() for i in large}
        self._small = [i for i in range(len(tensors)) if i not in self._large]
        self._into_small = [self._into[i] for i in self._small]

    def _sized(self, file: str, size: int, pinned: bool) -> Tensor:
        flat = self._memory.get(file)
        if flat is None or flat.numel() < size or (pinned and not flat.is_pinned()):
            flat = self._memory[file] = _new(size, pinned)
        return flat[:size]


def _new(size: int, pinned: bool) -> Tensor:
    if pinned:
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
    # NumPy asks the system for large pages, which are copied into at a higher rate than torch's.
    return torch.from_numpy(np.empty(size, dtype=np.uint8))


def _walked(state: TrainState) -> tuple[list[Tensor], list[Any]]:
    """The leaves in the order of :func:`~.format.flatten_state`, and what tells their names."""
    tensors: list[Tensor] = []
    structure: list[Any] = []
    for part in (state.params, state.buffers):
        _visit(part, tensors, structure)
    tensors += [state.step, state.key]
    for part in (state.opt_state, state.extra):
        _visit(part, tensors, structure)
    return tensors, structure


def _visit(node: Any, tensors: list[Tensor], structure: list[Any]) -> None:
    entries = dict(node.items())
    plain = set(map(type, entries.values())) <= _PLAIN
    inner = None if plain else list(map(is_tree, entries.values()))
    structure.append((list(entries), inner))
    if inner is None:
        tensors += entries.values()
        return
    for child, is_inner in zip(entries.values(), inner, strict=True):
        if is_inner:
            _visit(child, tensors, structure)
        else:
            tensors.append(child)


def _view(flat: Tensor, slot: Slot) -> Tensor:
    return flat[slot.begin : slot.end].view(slot.dtype).view(slot.shape)


def _is_plain_memory(tensor: Tensor) -> bool:
    # Zeros that autograd makes have no memory, and the address 0.
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg() and tensor.data_ptr() != 0


def _threads() -> int:
    return min(_THREADS, torch.get_num_threads())


def _in_threads(copies: Iterable[Callable[[], object]], number: int) -> None:
    """Make all copies with up to ``number`` threads, each in the one that is the first to be free.

    torch would divide every tensor among its threads and have them wait for each other after each, which costs most
    where the processor has other work too.
    """
    todo = deque(copies)

    def work() -> None:
        while (copy := _next(todo)) is not None:
            copy()

    others = min(number, len(todo)) - 1
    if others < 1:
        work()
        return
    with ThreadPoolExecutor(others) as threads:
        working = [threads.submit(work) for _ in range(others)]
        work()
        for one in working:
            one.result()


def _next(todo: deque[Callable[[], object]]) -> Callable[[], object] | None:
    # Between a look whether there is one and taking it another thread may take it.
    with suppress(IndexError):
        return todo.popleft()
    return None


def _by_piece(into: int, tensor: Tensor) -> Iterator[Callable[[], object]]:
    """What copies a tensor's memory to an address, a piece at a time."""
    of, size = tensor.data_ptr(), tensor.nbytes
    for start in range(0, size, _PIECE):
        # Other threads run meanwhile. What NumPy and torch have for it takes as long again to be called.
        yield partial(ctypes.memmove, into + start, of + start, min(_PIECE, size - start))


def _parts(into: list[Tensor], of: list[Tensor]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Small tensors and what is copied into them, in parts that a thread takes."""
    return [(into[i : i + _FEW], of[i : i + _FEW]) for i in range(0, len(into), _FEW)]


def _copy_tensors(into: list[Tensor], of: list[Tensor]) -> None:
    with _ordinary_tensors():
        if into:
            torch._foreach_copy_(into, of, non_blocking=True)


def _as_copied(tensors: list[Tensor], of_bytes: set[int], wanted: Iterable[int]) -> list[Tensor]:
    # Their bytes need no kernel of each of the dtypes of one byte, which not every version and device has.
    return [tensors[i].resolve_neg().view(torch.uint8) if i in of_bytes else tensors[i] for i in wanted]


@contextmanager
def _ordinary_tensors() -> Iterator[None]:
    """A scope without autograd, whose new memory may be written to outside of ``torch.inference_mode`` too."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _wait_for(devices: Iterable[torch.device]) -> None:
    for device in devices:
        if device.type != "cpu":
            torch.accelerator.current_stream(device).synchronize()
