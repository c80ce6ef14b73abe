"""The predictions of many batches as one array per leaf: in host memory or, past a limit, in a file."""

from __future__ import annotations

import math
import tempfile
import weakref
from array import array
from collections import UserDict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

Tree: TypeAlias = Any
"""Tensors in nested tuples, lists and mappings."""
Array: TypeAlias = "np.ndarray[Any, Any]"

_NUMPY_FLOATS = (torch.float16, torch.float32, torch.float64)


class Predictions:
    """Gathers a tree of tensors per batch and joins them once, at the end.

    Leaves are joined along dimension 0. Where dimension 1 differs between batches, shorter ones are padded on the
    right. Tensors leave the device at once; floats that NumPy lacks (bfloat16) become float32. Once the arrays take
    more than ``spill_bytes``, they and all later ones go to a file without a name, which the system removes together
    with its last user, even if the process is killed. Memory then grows no further; a ragged result is written to the
    disk twice.

    Args:
        padding: fills up dimension 1; becomes True in boolean leaves.
        concat: False keeps one tree per batch in a list; batches may then differ in structure.
        spill_bytes: of host memory, over all leaves.
        folder: where the file is made; None takes the system's folder for temporary files, which may lie in memory.

    Raises: ValueError for negative ``spill_bytes``.

    Example:
        >>> found = Predictions()
        >>> found.add((torch.tensor([[1, 2]]), torch.tensor([0.5])))
        >>> found.add((torch.tensor([[3, 4, 5]]), torch.tensor([0.25])))
        >>> found.result()
        (array([[   1,    2, -100], [   3,    4,    5]]), array([0.5 , 0.25], dtype=float32))

    Source: Trainer 4.57: ``EvalLoopContainer``, ``nested_concat``.
    """

    def __init__(
        self, *, padding: int = -100, concat: bool = True, spill_bytes: int = 2**30, folder: str | Path | None = None
    ) -> None:
        if spill_bytes < 0:
            raise ValueError(f"spill_bytes: got {spill_bytes}, expected a number of bytes, 0 or more")
        self._padding = padding
        self._concat = concat
        self._spill_bytes = spill_bytes
        self._folder = folder
        self._held = 0
        self._batches = 0
        self._roots: list[_Node] = []
        self._coming: tuple[Tree, list[torch.cuda.Event]] | None = None
        self._spilled = False
        self._shared: _Spool | None = None

    def add(self, tree: Tree) -> None:
        """Take the tensors of one more batch; copies from a GPU run beside the next forward pass.

        Raises:
            ValueError: the tree, or the shape of a leaf, does not fit the first batch; says where. The batch is left
                out. From a GPU this comes with the next call.
            TypeError: a leaf is neither a tensor, nor an array, nor None.
            OSError: the file cannot be written.
        """
        self._arrive()
        devices = {leaf.device for leaf in leaves(tree) if isinstance(leaf, Tensor) and leaf.is_cuda}
        if devices:
            pinned = nested_map(_to_pinned, tree)
            self._coming = pinned, [torch.cuda.current_stream(device).record_event() for device in devices]
        else:
            self._take(tree)

    def result(self) -> Tree:
        """The joined tree of NumPy arrays, or the list of one tree per batch; None if there was no batch.

        It is handed over: parts are freed while they are joined, and a second call gives None.
        """
        self._arrive()
        roots, self._roots = self._roots, []
        if not self._concat:
            return [_build(root, self._padding) for root in roots] or None
        return _build(roots[0], self._padding) if roots else None

    def _arrive(self) -> None:
        if self._coming is not None:
            (tree, events), self._coming = self._coming, None
            for event in events:
                event.synchronize()
            self._take(tree)

    def _take(self, tree: Tree) -> None:
        where = f"batch {self._batches}"
        arrays = nested_map(lambda leaf: _as_array(leaf, where), tree)
        known = self._roots[0] if self._concat and self._roots else None
        root = _plant(arrays) if known is None else known
        pairs = list(_pairs(root, arrays, where, ""))
        if known is None:
            self._roots.append(root)
            if self._spilled:
                self._spill([root])
        for column, leaf in pairs:
            column.add(leaf)
            self._held += leaf.nbytes
        self._batches += 1
        if not self._spilled and self._held > self._spill_bytes:
            self._spilled = True
            self._spill(self._roots)

    def _spill(self, roots: list[_Node]) -> None:
        for column in (column for root in roots for column in _columns(root)):
            if self._concat:
                column.spill(_Spool(self._folder))
            else:
                # A file per batch would soon be too many.
                self._shared = self._shared or _Spool(self._folder)
                column.spill(self._shared)


class _Spool:
    """Arrays one after the other in a file that has no name."""

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = folder
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._size = 0
        self._map: Array | None = None

    def append(self, part: Array) -> int:
        """Write an array; its offset in bytes, a multiple of its item size."""
        start = -(-self._size // part.itemsize) * part.itemsize
        try:
            self._file.seek(start)
            self._file.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
        except OSError as error:
            where = tempfile.gettempdir() if self.folder is None else self.folder
            message = f"predictions: {error.strerror} after {self._size} bytes in {where}; give a folder with more room"
            raise OSError(error.errno, message) from error
        self._size = start + part.nbytes
        return start

    def read(self, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An array that was appended, in memory of its own."""
        self._file.seek(offset)
        return np.frombuffer(self._file.read(math.prod(shape) * dtype.itemsize), dtype=dtype).reshape(shape)

    def view(self, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """A part of the file as an array; pages come into memory when they are touched, and can leave it."""
        size = math.prod(shape) * dtype.itemsize
        if not size:
            return np.empty(shape, dtype)
        if self._map is None or self._map.size < self._size:
            self._file.flush()
            # Writable, since metrics overwrite paddings in place; the file is nobody else's.
            self._map = np.memmap(self._file, dtype=np.uint8, mode="r+", shape=(self._size,))
        return self._map[offset : offset + size].view(dtype).reshape(shape)


class _Column:
    """What became of one leaf: its parts, in memory or in a file, and their sizes."""

    def __init__(self, first: Array) -> None:
        self._first = first.shape
        self._dtypes: list[np.dtype[Any]] = []
        # Plain integers in arrays: a million batches take some megabytes.
        self._rows, self._widths, self._kinds, self._offsets = array("q"), array("q"), array("B"), array("q")
        self._parts: deque[Array] = deque()
        self._spool: _Spool | None = None

    def misfit(self, part: Array) -> str | None:
        """Why a part cannot be joined to the first one."""
        # Numbers are rows of their own.
        if max(part.ndim, 1) == max(len(self._first), 1) and part.shape[2:] == self._first[2:]:
            return None
        wanted = ", ".join([*["*"] * min(len(self._first), 2), *map(str, self._first[2:])])
        return f"has shape {part.shape}; expected ({wanted}), as in the first batch"

    def add(self, part: Array) -> None:
        if part.dtype not in self._dtypes:
            self._dtypes.append(part.dtype)
        self._kinds.append(self._dtypes.index(part.dtype))
        self._rows.append(part.shape[0] if part.ndim else 1)
        self._widths.append(part.shape[1] if part.ndim > 1 else 1)
        if self._spool is None:
            # A copy: the model may write into its tensor again, or the tensor be a view of a far larger one.
            self._parts.append(np.array(part, order="C"))
        else:
            self._offsets.append(self._spool.append(part))

    def spill(self, spool: _Spool) -> None:
        """Move the parts to a file, where all later ones go."""
        self._spool = spool
        while self._parts:
            self._offsets.append(spool.append(self._parts.popleft()))

    def joined(self, padding: int) -> Array:
        """All parts as one array; they are given up."""
        shape = self._shape(sum(self._rows), max(self._widths))
        dtype = np.result_type(*self._dtypes)
        ragged = min(self._widths) < max(self._widths)
        if ragged and dtype.kind == "u":
            raise ValueError(
                f"predictions: lengths from {min(self._widths)} to {max(self._widths)} in dimension 1 need padding by "
                f"{padding}, which {dtype} cannot hold; convert to a signed dtype"
            )
        if len(self._rows) == 1 and not self._first:
            shape = ()
        if self._spool is None and len(self._parts) == 1:
            return self._parts.popleft()
        if self._spool is None:
            return self._join_in_memory(np.empty(shape, dtype), padding)
        if len(self._rows) == 1 or not (ragged or len(self._dtypes) > 1):
            return self._spool.view(self._offsets[0], shape, dtype)
        return self._join_in_file(self._spool, shape, dtype, padding)

    def _shape(self, rows: int, width: int) -> tuple[int, ...]:
        return (rows, width, *self._first[2:])[: max(len(self._first), 1)]

    def _join_in_memory(self, out: Array, padding: int) -> Array:
        start = 0
        while self._parts:
            part = np.atleast_1d(self._parts.popleft())
            _write(out[start : start + len(part)], part, padding)
            start += len(part)
        return out

    def _join_in_file(self, source: _Spool, shape: tuple[int, ...], dtype: np.dtype[Any], padding: int) -> Array:
        target = _Spool(source.folder)
        for rows, width, kind, offset in zip(self._rows, self._widths, self._kinds, self._offsets, strict=True):
            out = np.empty((rows, *shape[1:]), dtype)
            _write(out, source.read(offset, self._shape(rows, width), self._dtypes[kind]), padding)
            target.append(out)
        return target.view(0, shape, dtype)


def _write(out: Array, part: Array, padding: int) -> None:
    if part.ndim < 2:
        out[...] = part
    else:
        width = part.shape[1]
        out[:, :width] = part
        if width < out.shape[1]:
            out[:, width:] = padding


@dataclass(frozen=True)
class _Branch:
    """A container of the first batch."""

    kind: type
    keys: tuple[Any, ...]
    children: tuple[_Node, ...]


_Node: TypeAlias = "_Branch | _Column | None"


def _plant(tree: Tree) -> _Node:
    items = _items(tree)
    if items is None:
        return None if tree is None else _Column(tree)
    return _Branch(type(tree), tuple(key for key, _ in items), tuple(_plant(child) for _, child in items))


def _pairs(node: _Node, tree: Tree, where: str, path: str) -> Iterator[tuple[_Column, Array]]:
    """Each column with its new part; everything is compared."""
    place = f"predictions: {where}{f' at {path}' if path else ''}"
    items = _items(tree)
    if isinstance(node, _Branch):
        keys = None if items is None else tuple(key for key, _ in items)
        if items is None or type(tree) is not node.kind or set(keys or ()) != set(node.keys):
            raise ValueError(
                f"{place} has {_described(type(tree), keys)}; expected {_described(node.kind, node.keys)}, as in the "
                "first batch. Let the model return the same structure always, or add to ignore_keys what varies"
            )
        parts = dict(items)
        for key, child in zip(node.keys, node.children, strict=True):
            yield from _pairs(child, parts[key], where, f"{path}[{key!r}]")
    elif items is not None or (tree is None) is not (node is None):
        expected = "None" if node is None else "a tensor"
        raise ValueError(f"{place} has {_described(type(tree), None)}; expected {expected}, as in the first batch")
    elif node is not None:
        problem = node.misfit(tree)
        if problem is not None:
            raise ValueError(f"{place} {problem}")
        yield node, tree


def _described(kind: type, keys: tuple[Any, ...] | None) -> str:
    if kind is type(None):
        return "None"
    if issubclass(kind, np.ndarray):
        return "a tensor"
    if keys is None:
        return f"a {kind.__name__}"
    return f"a {kind.__name__} of {list(keys) if issubclass(kind, Mapping) else len(keys)}"


def _columns(node: _Node) -> Iterator[_Column]:
    if isinstance(node, _Branch):
        for child in node.children:
            yield from _columns(child)
    elif node is not None:
        yield node


def _build(node: _Node, padding: int) -> Tree:
    if isinstance(node, _Branch):
        return _container(node.kind, node.keys, [_build(child, padding) for child in node.children])
    return None if node is None else node.joined(padding)


def _items(tree: Tree) -> list[tuple[Any, Tree]] | None:
    if isinstance(tree, Mapping):
        return list(tree.items())
    return list(enumerate(tree)) if isinstance(tree, (list, tuple)) else None


def _container(kind: type, keys: tuple[Any, ...], children: list[Tree]) -> Tree:
    make: Callable[..., Tree] = kind
    if issubclass(kind, Mapping):
        entries = dict(zip(keys, children, strict=True))
        # A mapping of tensors only, such as a TensorDict, cannot hold arrays.
        return make(entries) if issubclass(kind, (dict, UserDict)) else entries
    return make(*children) if hasattr(kind, "_fields") else make(children)


def leaves(tree: Tree) -> Iterator[Any]:
    """What is in a tree besides its tuples, lists and mappings.

    Example:
        >>> list(leaves({"a": [1, 2], "b": (3,)}))
        [1, 2, 3]
    """
    items = _items(tree)
    if items is None:
        yield tree
    else:
        for _, child in items:
            yield from leaves(child)


def nested_map(fn: Callable[[Any], Any], tree: Tree, *, is_leaf: Callable[[Any], bool] | None = None) -> Tree:
    """The tree with ``fn`` of each leaf; tuples, lists and mappings keep their types.

    Args:
        fn: of a leaf.
        tree: of anything.
        is_leaf: containers that ``fn`` gets whole.

    Example:
        >>> nested_map(lambda x: x + 1, {"a": [1, 2], "b": (3,)})
        {'a': [2, 3], 'b': (4,)}
    """
    items = _items(tree)
    if items is None or (is_leaf is not None and is_leaf(tree)):
        return fn(tree)
    children = [nested_map(fn, child, is_leaf=is_leaf) for _, child in items]
    return _container(type(tree), tuple(key for key, _ in items), children)


def nested_detach(tree: Tree) -> Tree:
    """The tree with each tensor cut from its autograd graph; other leaves stay.

    Example:
        >>> nested_detach((torch.ones(1, requires_grad=True), None))
        (tensor([1.]), None)

    Source: Trainer 4.57: ``nested_detach``.
    """
    return nested_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)


def nested_numpify(tree: Tree) -> Tree:
    """The tree as NumPy arrays on the host; floats that NumPy lacks become float32. Waits for the device.

    Raises: TypeError for a leaf that is neither a tensor, nor an array, nor None.

    Example:
        >>> nested_numpify([torch.ones(2, dtype=torch.bfloat16)])
        [array([1., 1.], dtype=float32)]

    Source: Trainer 4.57: ``nested_numpify``.
    """
    return nested_map(lambda leaf: _as_array(leaf, "the tree"), tree)


def nested_truncate(tree: Tree, limit: int) -> Tree:
    """The first ``limit`` rows of each leaf; what has no rows stays.

    Example:
        >>> nested_truncate((np.arange(3), [np.arange(4)]), 2)
        (array([0, 1]), [array([0, 1])])

    Source: Trainer 4.57: ``nested_truncate``.
    """
    return nested_map(lambda leaf: leaf[:limit] if getattr(leaf, "ndim", 0) else leaf, tree)


def batch_rows(inputs: Tree) -> int | None:
    """The first dimension of the first tensor or array that has one; None if none has.

    Example:
        >>> batch_rows({"scale": torch.tensor(2.0), "input_ids": torch.zeros(3, 5)})
        3

    Source: Trainer 4.57: ``find_batch_size``.
    """
    shapes = (leaf.shape for leaf in leaves(inputs) if isinstance(leaf, (Tensor, np.ndarray)))
    return next((int(shape[0]) for shape in shapes if len(shape)), None)


def _for_numpy(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    lacks = tensor.is_floating_point() and tensor.dtype not in _NUMPY_FLOATS
    return tensor.float() if lacks else tensor


def _as_array(leaf: Any, where: str) -> Array | None:
    if leaf is None or isinstance(leaf, np.ndarray):
        return leaf
    if not isinstance(leaf, Tensor):
        raise TypeError(
            f"predictions: {where} holds a {type(leaf).__name__}; expected tensors in tuples, lists and mappings. "
            "Convert it, or add its key to ignore_keys"
        )
    return _for_numpy(leaf).cpu().numpy()


def _to_pinned(leaf: Any) -> Any:
    """A tensor of a GPU on its way to the host; one of the host is copied, as nobody may change it meanwhile."""
    if not isinstance(leaf, Tensor):
        return leaf
    if not leaf.is_cuda:
        return leaf.detach().clone()
    tensor = _for_numpy(leaf)
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
