"""Safetensors files, written and read in one pass beside their digest.

The layout is that of the safetensors library, which reads these files and is read by these functions. Its own writer
takes a path, does not flush to the disk, hides the number of an error, and would have to be read again for the digest;
its reader maps a file that may change after it was checked. Here one descriptor is opened, and each byte is touched
once.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from trainkit.io.checkpoint import strict_json
from trainkit.io.checkpoint.errors import DamageError

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float4_e2m1fn_x2: "F4",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The dtypes that can be stored, with their codes in a file. Safetensors has no complex128."""
DTYPES = {code: dtype for dtype, code in CODES.items()}
CHUNK = 8 * 2**20
"""Bytes that are digested and written at a time."""
PIECE = 2 * 2**20
"""Bytes that a thread reads at a time. Those before are digested meanwhile, from the processor's cache."""
_THREADS = 4
"""At most, of those that torch may have. What they wait for most is new memory, which the system clears."""
_AHEAD = 4
"""Pieces that are on their way."""
_PARTS = 1000
"""That the system takes at a time."""
_LENGTH = 8
_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a character, which JSON can write and UTF-8 cannot."""


class Hasher(Protocol):
    """What ``hashlib`` and ``xxhash`` give."""

    def update(self, data: Any, /) -> Any: ...


@dataclass(frozen=True)
class TensorRecord:
    """A tensor as it was written: the safetensors code of its dtype ("F32") and its shape."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies: bytes ``begin`` to ``end`` of what follows the header."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def record(self) -> TensorRecord:
        return TensorRecord(CODES[self.dtype], self.shape)


def tensor_records(tensors: Mapping[str, Tensor]) -> dict[str, TensorRecord]:
    """What a manifest says about tensors.

    Example:
        >>> str(tensor_records({"w": torch.zeros(2, 3)})["w"])
        'F32 [2, 3]'
    """
    return {name: TensorRecord(CODES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


def layout(tensors: Mapping[str, Tensor]) -> list[Slot]:
    """Where the tensors of a file lie: the widest elements first, so that each begins at a multiple of its element
    size, and by name among those.

    Example:
        >>> [(s.name, s.begin, s.end) for s in layout({"a": torch.zeros(3, dtype=torch.uint8), "b": torch.zeros(2)})]
        [('b', 0, 8), ('a', 8, 11)]
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    ends = list(itertools.accumulate(tensor.numel() * tensor.itemsize for _, tensor in ordered))
    begins = [0, *ends]
    return [
        Slot(name, tensor.dtype, tuple(tensor.shape), begin, end)
        for (name, tensor), begin, end in zip(ordered, begins, ends, strict=False)
    ]


def extent(slots: list[Slot]) -> int:
    """Bytes that the tensors of a file take."""
    return slots[-1].end if slots else 0


def header(slots: Iterable[Slot]) -> bytes:
    """The beginning of a file: the length of the header as 8 bytes, least significant first, and the header in JSON.

    Raises: DamageError if there are more tensors than :func:`read_header` takes: some 40,000.

    Source: the format section of the safetensors documentation.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for slot in slots:
        entries[slot.name] = {
            "dtype": CODES[slot.dtype],
            "shape": _shape_in_file(slot.shape, CODES[slot.dtype]),
            "data_offsets": [slot.begin, slot.end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    strict_json.check_extent(text, "the header of a file of tensors")
    text += b" " * (-len(text) % _LENGTH)
    return len(text).to_bytes(_LENGTH, "little") + text


def _shape_in_file(shape: tuple[int, ...], code: str) -> list[int]:
    # A file counts numbers; torch counts the bytes that hold two of them.
    return [*shape[:-1], 2 * shape[-1]] if code == "F4" and shape else list(shape)


def _shape_in_torch(shape: list[int], code: str) -> tuple[int, ...]:
    return (*shape[:-1], shape[-1] // 2) if code == "F4" and shape else tuple(shape)


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, without a copy.

    Example:
        >>> bytes(memory_of(torch.tensor([1, 2], dtype=torch.int16)))
        b'\\x01\\x00\\x02\\x00'
    """
    # A dimension of one element may have any stride.
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data


def memory_in_order(slots: Iterable[Slot], tensors: Mapping[str, Tensor]) -> Iterable[memoryview]:
    """The bytes of the tensors, slot by slot. One that is elsewhere or not contiguous is copied when its turn comes."""
    for slot in slots:
        if slot.end > slot.begin:
            yield memory_of(tensors[slot.name].detach().cpu().resolve_conj().resolve_neg().contiguous())


def read_header(fd: int, size: int, hasher: Hasher, what: str) -> list[Slot]:
    """The slots of a file that nobody has vouched for, in their order; the descriptor is left at the first of them.

    Args:
        fd: at the beginning of the file.
        size: of the file in bytes.
        hasher: is fed what is read.
        what: the file, for error messages.

    Raises: DamageError if this is no safetensors file of exactly this size.
    """
    first = _read(fd, min(_LENGTH, size), what)
    length = int.from_bytes(first, "little")
    if len(first) < _LENGTH or length > size - _LENGTH:
        raise DamageError(f"{what}: {size} bytes are too few for its header; it is truncated or no safetensors file")
    if length > strict_json.MAX_BYTES:
        raise DamageError(f"{what}: its header has {length} bytes, expected at most {strict_json.MAX_BYTES}")
    text = _read(fd, length, what)
    hasher.update(first)
    hasher.update(text)
    if not text.startswith(b"{"):
        raise DamageError(f"{what}: its header is no JSON object; it is no safetensors file")
    entries = strict_json.decode(text, what)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(map(_is_text, (*metadata, *metadata.values()))):
        raise DamageError(f"{what}: the __metadata__ in its header is no object of strings")
    slots = sorted(
        (_slot(name, entry, what) for name, entry in entries.items()), key=lambda slot: (slot.begin, slot.end)
    )
    ends = [0, *(slot.end for slot in slots)]
    if any(slot.begin != end for slot, end in zip(slots, ends, strict=False)) or ends[-1] != size - _LENGTH - length:
        raise DamageError(f"{what}: its tensors do not lie one after the other from the header to the end of the file")
    return slots


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not _SURROGATE.search(value)


def _slot(name: str, entry: Any, what: str) -> Slot:
    fits = isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"}
    fits = fits and isinstance(entry["dtype"], str) and entry["dtype"] in DTYPES
    if not fits or not _sizes(entry["shape"]) or not _sizes(entry["data_offsets"]):
        raise DamageError(f"{what}: its header says {entry!a:.200} of {name!a:.200}")
    dtype, shape = DTYPES[entry["dtype"]], _shape_in_torch(entry["shape"], entry["dtype"])
    begin, end = entry["data_offsets"] if len(entry["data_offsets"]) == 2 else (0, -1)
    if end - begin != math.prod(shape) * dtype.itemsize or entry["shape"] != _shape_in_file(shape, entry["dtype"]):
        raise DamageError(f"{what}: shape and extent of {name!a:.200} do not agree in its header")
    return Slot(name, dtype, shape, begin, end)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 64 and all(type(n) is int and 0 <= n < 2**63 for n in value)


class Reader:
    """Reads a file into memory, from where its descriptor stands, with some threads, and digests it in its order.

    What is filled must stay as it is until :meth:`finish`.

    Args:
        fd: of the file; it stays where it stands.
        hasher: is fed all that is read, in order.
        what: the file, for error messages.
    """

    def __init__(self, fd: int, hasher: Hasher, what: str) -> None:
        self._fd, self._hasher, self._what = fd, hasher, what
        self._at = os.lseek(fd, 0, os.SEEK_CUR)
        self._threads = ThreadPoolExecutor(min(_THREADS, torch.get_num_threads()))
        self._ahead: deque[tuple[Future[None], list[memoryview]]] = deque()
        self._parts: list[memoryview] = []
        self._size = 0

    def fill(self, memory: memoryview) -> None:
        """Let memory be filled with the next bytes: it is so after :meth:`finish`.

        Raises: DamageError if the file ends before what was filled earlier.
        """
        for start in range(0, len(memory), PIECE):
            part = memory[start : start + PIECE]
            # Small ones are collected: a thread that is told of each would cost more than it saves.
            self._parts.append(part)
            self._size += len(part)
            if self._size >= PIECE or len(self._parts) == _PARTS:
                self._read()
                self._digest(_AHEAD)

    def finish(self) -> None:
        """Wait until all memory is filled and digested.

        Raises: DamageError if the file ends before.
        """
        self._read()
        self._digest(0)

    def skim(self, count: int) -> None:
        """Digest the next bytes, and keep none of them.

        Raises: DamageError if the file ends before.
        """
        # One more than are on their way.
        pieces = [memoryview(bytearray(min(PIECE, count))) for _ in range(_AHEAD + 1)]
        for i, start in enumerate(range(0, count, PIECE)):
            self.fill(pieces[i % len(pieces)][: min(PIECE, count - start)])

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.finish()
        finally:
            self._threads.shutdown(cancel_futures=True)

    def _read(self) -> None:
        """Let a thread fill what was collected."""
        if self._parts:
            reading = self._threads.submit(_fill_at, self._fd, self._parts, self._at, self._what)
            self._ahead.append((reading, self._parts))
            self._at += self._size
            self._parts, self._size = [], 0

    def _digest(self, but: int) -> None:
        """All that is on its way but the last ones."""
        while len(self._ahead) > but:
            reading, parts = self._ahead.popleft()
            reading.result()
            for part in parts:
                self._hasher.update(part)


def _fill_at(fd: int, parts: list[memoryview], offset: int, what: str) -> None:
    while parts:
        count = os.preadv(fd, parts, offset)
        if count == 0:
            raise DamageError(f"{what}: ends too early")
        offset += count
        parts = _behind(parts, count)


def _behind(parts: list[memoryview], count: int) -> list[memoryview]:
    """What is left of memory after the first ``count`` bytes."""
    for i, part in enumerate(parts):
        if count < len(part):
            return [part[count:], *parts[i + 1 :]]
        count -= len(part)
    return []


def _read(fd: int, count: int, what: str) -> bytes:
    data = bytearray(count)
    fill(fd, memoryview(data), what)
    return bytes(data)


def fill(fd: int, memory: memoryview, what: str) -> None:
    """Fill memory with the next bytes of a file.

    Raises: DamageError if it ends before.
    """
    done = 0
    while done < len(memory):
        count = os.readv(fd, [memory[done:]])
        if count == 0:
            raise DamageError(f"{what}: ends too early")
        done += count


def empty_like(like: Tensor) -> Tensor:
    """New memory with the shape, dtype, device and strides of a tensor; contiguous where its elements share memory."""
    if _overlaps(like):
        return torch.empty(like.shape, dtype=like.dtype, device=like.device)
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)


def _overlaps(tensor: Tensor) -> bool:
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False
