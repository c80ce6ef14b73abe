"""Trees of tensors: flat, locked TensorDicts keyed by name, and who may overwrite them.

The core is written without in-place arithmetic on what it was given. Whoever owns a tree and will not look at it
again can say so with :func:`donate`; :func:`writable` then hands out the tensors themselves instead of copies. So
one text serves the pure call and the call that needs no second set of buffers.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from tensordict import TensorDict

Ownership = dict[int, Tensor]
"""Tensors that may be overwritten, by ``id``."""


class NotDonatedError(ValueError):
    """Something that works only in memory that was given away was called outside of a donation scope."""


class _Scope:
    """What may be overwritten: tensors that were given, those of released trees, and copies made on the way.

    A step asks for every tensor that it has, so the answers are set operations and not loops. Released trees and copies
    are held weakly, so that a scope keeps no temporaries alive; ids are given again once their tensors are gone.
    """

    def __init__(self, outer: _Scope | None, given: Ownership) -> None:
        self.given: Ownership = given if outer is None else {**outer.given, **given}
        self.released: list[_Released] = [] if outer is None else [*outer.released]
        self.copies: dict[int, weakref.ref[Tensor]] = {} if outer is None else {**outer.copies}
        self.has_handed_out = False

    def own(self, tensors: list[Tensor]) -> bool:
        ids = _ids(tensors)
        if ids <= self.given.keys():
            self.has_handed_out |= bool(ids)
            return True
        return any(ids <= released.ids() for released in self.released) or all(map(self.owns, tensors))

    def owns(self, tensor: Tensor) -> bool:
        if id(tensor) in self.given:
            self.has_handed_out = True
            return True
        copy = self.copies.get(id(tensor))
        return (copy is not None and copy() is tensor) or any(
            id(tensor) in released.ids() for released in self.released
        )

    def copy(self, tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        self.copies[id(copy)] = weakref.ref(copy)
        return copy


class _Released:
    """A tree that :func:`release` was given. It is looked at only once somebody asks: most are never written over."""

    def __init__(self, tree: TensorDict) -> None:
        self._tree = weakref.ref(tree)
        self._ids: frozenset[int] | None = None

    def ids(self) -> frozenset[int]:
        """The tensors that may be overwritten, by ``id``; none if they share memory, or are gone."""
        tree = self._tree()
        if tree is None:
            return _NOTHING
        if self._ids is None:
            tensors = leaves(tree)
            self._ids = _ids(tensors) if are_apart(tensors) else _NOTHING
        return self._ids


Kind: TypeAlias = "tuple[type[Tensor], torch.dtype, torch.device]"
"""What kernels for several tensors want to be the same."""
kind: Callable[[Tensor], Kind] = operator.attrgetter("__class__", "dtype", "device")

_NOTHING: frozenset[int] = frozenset()
_scope: ContextVar[_Scope | None] = ContextVar("scope", default=None)


def _open_scope() -> _Scope | None:
    return None if torch.compiler.is_compiling() else _scope.get()


_NO_BATCH = torch.Size([])


def frozen(mapping: Mapping[str, Any] | TensorDict | None = None) -> TensorDict:
    """A locked TensorDict without batch size from (nested) mappings of tensors; it refuses writes.

    Example:
        >>> frozen({"a.weight": torch.zeros(2)})["a.weight"]
        tensor([0., 0.])
    """
    # It imports torch's compiler, which takes as long as torch; many a program only asks for what there is.
    from tensordict import TensorDict

    if torch.compiler.is_compiling():
        # Inside a graph nobody can hold on to the tree, and locking there only warns.
        return TensorDict({} if mapping is None else mapping, batch_size=[])
    entries: dict[str, Any] = {} if mapping is None else dict(mapping.items())
    # To find that a tensor is no TensorDict takes ten times as long as to see that it is a tensor.
    if set(map(type, entries.values())) != {Tensor}:
        # A locked tree remembers every tree that it is put into, for ever; a shallow copy starts without memories.
        entries = {name: v.copy() if isinstance(v, TensorDict) else v for name, v in entries.items()}
    return TensorDict(entries, batch_size=_NO_BATCH, lock=True)


class Leaves(list[Tensor]):
    """The tensors of a flat tree, with what was found out about them. Nobody changes the list."""

    __slots__ = ("contiguous", "ids", "kinds")

    ids: frozenset[int] | None
    kinds: Collection[Kind] | None
    contiguous: bool | None

    def __reduce__(self) -> tuple[Any, ...]:
        # Of other tensors nothing is known.
        return list, (list(self),)


pytree.register_pytree_node(Leaves, lambda known: (list(known), None), lambda tensors, _: list(tensors))


def is_tree(value: Any) -> bool:
    """Whether a value is a TensorDict.

    Example:
        >>> is_tree(frozen()), is_tree({})
        (True, False)
    """
    from tensordict import TensorDict

    return isinstance(value, TensorDict)


def is_mapping(value: Any) -> bool:
    """Whether a value has entries by name: a mapping, or a TensorDict of any kind, which is none.

    Example:
        >>> is_mapping({}), is_mapping(frozen()), is_mapping([])
        (True, True, False)
    """
    if isinstance(value, Mapping):
        return True
    from tensordict import TensorDictBase

    return isinstance(value, TensorDictBase)


def leaves(tree: TensorDict) -> list[Tensor]:
    """The tensors of a flat tree (or mapping), in the order of its names; outside of graphs always the same list.

    So :func:`kinds` and :func:`are_contiguous` look at the tensors of a state once, and not in every step.
    """
    tensors: Any = tree.values()
    if torch.compiler.is_compiling() or under_vmap() or not hasattr(tree, "is_locked"):
        return list(tensors)
    memory = tree.__dict__
    kept = memory.get(_LEAVES)
    if type(kept) is not Leaves or len(kept) != len(tensors) or not all(map(operator.is_, kept, tensors)):
        kept = memory[_LEAVES] = Leaves(tensors)
        kept.ids = kept.kinds = kept.contiguous = None
    return kept


_LEAVES = "_trainkit_leaves"


def kinds(tensors: Sequence[Tensor]) -> Collection[Kind]:
    """The different kinds of some tensors: class, dtype and device.

    Example:
        >>> [(dtype, str(device)) for _, dtype, device in kinds([torch.zeros(2), torch.ones(1)])]
        [(torch.float32, 'cpu')]
    """
    found = tensors.kinds if type(tensors) is Leaves else None
    if found is None:
        found = dict.fromkeys(map(kind, tensors))
        if type(tensors) is Leaves:
            tensors.kinds = found
    return found


def _ids(tensors: Sequence[Tensor]) -> frozenset[int]:
    found = tensors.ids if type(tensors) is Leaves else None
    if found is None:
        found = frozenset(map(id, tensors))
        if type(tensors) is Leaves:
            tensors.ids = found
    return found


def noted(entries: dict[str, Tensor], kinds: Collection[Kind]) -> TensorDict:
    """A locked flat tree of plain contiguous tensors of known kinds, which nobody needs to look at; not in a graph."""
    from tensordict import TensorDict

    tree = TensorDict(entries, batch_size=_NO_BATCH, lock=True)
    known = leaves(tree)
    if type(known) is Leaves:
        known.kinds, known.contiguous = kinds, True
    return tree


def are_contiguous(tensors: Sequence[Tensor]) -> bool:
    """Whether all tensors are contiguous."""
    found = tensors.contiguous if type(tensors) is Leaves else None
    if found is None:
        found = all(map(Tensor.is_contiguous, tensors))
        if type(tensors) is Leaves:
            tensors.contiguous = found
    return found


def named(tree: TensorDict) -> dict[str, Tensor]:
    """The tensors of a flat tree by name.

    Example:
        >>> named(frozen({"w": torch.ones(1)}))
        {'w': tensor([1.])}
    """
    entries: Any = tree
    return dict(entries.items())


def like(tree: TensorDict, tensors: Sequence[Tensor]) -> TensorDict:
    """A tree with the names of ``tree`` and the given tensors; ``tree`` itself if they are its own."""
    own = named(tree)
    if len(own) == len(tensors) and all(map(operator.is_, own.values(), tensors)):
        return tree
    return frozen(dict(zip(own, tensors, strict=True)))


def map_tensors(fn: Callable[..., Tensor], tree: TensorDict, *others: TensorDict) -> TensorDict:
    """Apply ``fn`` to the tensors of flat trees with the same names, name by name.

    Example:
        >>> map_tensors(torch.add, frozen({"w": torch.ones(2)}), frozen({"w": torch.ones(2)}))["w"]
        tensor([2., 2.])
    """
    columns = [named(other) for other in others]
    return like(tree, [fn(tensor, *(column[name] for column in columns)) for name, tensor in named(tree).items()])


def zeros_like(tree: TensorDict, dtype: torch.dtype | None = None) -> TensorDict:
    """Zeros in the shapes of a flat tree, in ``dtype`` where it is given."""
    return like(tree, [torch.zeros_like(t, dtype=dtype) for t in leaves(tree)])


def clone(tree: Any) -> Any:
    """A copy of a tree (any pytree) that shares no memory with it."""
    return pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), tree)


def global_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The joint L2 norm of tensors, accumulated in at least float32.

    sqrt(sum_i ||t_i||^2); zero for no tensors.

    Example:
        >>> global_norm([torch.tensor([3.0]), torch.tensor([4.0])])
        tensor(5.)
    """
    tensors = tensors if isinstance(tensors, list) else list(tensors)
    if not tensors:
        return torch.zeros(())
    norms = _norms(tensors) if has_foreach() else [torch.linalg.vector_norm(t, dtype=_wide(t.dtype)) for t in tensors]
    return _replicated(norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms)))


def _norms(tensors: list[Tensor]) -> list[Tensor] | tuple[Tensor, ...]:
    found = kinds(tensors)
    if len(found) == 1:
        return torch._foreach_norm(tensors, 2.0, dtype=_wide(tensors[0].dtype))
    groups = [[t for t in tensors if kind(t) == one] for one in found]
    return [norm.to(tensors[0].device) for group in groups for norm in _norms(group)]


def _wide(dtype: torch.dtype) -> torch.dtype | None:
    """What to add up in, where it is not ``dtype``; saying it always is slower."""
    wide = torch.promote_types(dtype, torch.float32)
    return None if wide == dtype else wide


def has_foreach() -> bool:
    """Whether torch's kernels on lists of tensors may be called: not inside a graph, which fuses the plain operations
    itself, and not under ``torch.vmap``, for which they have no rule.

    Example:
        >>> has_foreach(), torch.vmap(lambda row: row + has_foreach())(torch.zeros(1))
        (True, tensor([0.]))
    """
    return not torch.compiler.is_compiling() and not under_vmap()


def under_vmap() -> bool:
    """Whether a ``torch.vmap`` (or another transform of ``torch.func``) is at work, eagerly or inside a graph."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """A 0-d bool tensor: no tensor holds an infinity or a NaN.

    One reduction per tensor (a sum is finite only if its terms are, but a sum of finite terms may overflow, so
    the extremes are looked at instead).

    Example:
        >>> all_finite([torch.ones(2), torch.tensor([3e38, 3e38])]), all_finite([torch.tensor([1.0, float("nan")])])
        (tensor(True), tensor(False))
    """
    witnesses = [w for t in tensors if t.numel() and not _is_discrete(t) for w in _witnesses(t)]
    return _replicated(torch.isfinite(torch.stack(witnesses)).all()) if witnesses else torch.ones((), dtype=torch.bool)


def _is_discrete(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def _witnesses(tensor: Tensor) -> Sequence[Tensor]:
    """Numbers that are all finite exactly where those of the tensor are."""
    if tensor.is_complex():
        return _witnesses(torch.view_as_real(tensor))
    if hasattr(tensor, "full_tensor"):
        # Spread over ranks: the largest of all may lose a NaN on the way, a sum of zeros and NaNs cannot.
        return [(tensor - tensor).sum()]
    return torch.aminmax(tensor)


def _replicated(number: Tensor) -> Tensor:
    """A 0-d result over tensors that are spread over ranks, as the ordinary tensor that every rank then has."""
    whole: Tensor = number.full_tensor() if hasattr(number, "full_tensor") else number
    return whole


def ownership(*trees: Any) -> Ownership:
    """The tensors of trees (any pytrees) as something :func:`donate` takes, for scopes that are opened often."""
    return {id(t): t for t in pytree.tree_leaves(trees) if isinstance(t, Tensor)}


class donate:
    """A scope in which :func:`writable` returns the tensors of ``trees`` (or of ``owned``) themselves.

    The caller promises not to read them afterwards. Scopes nest; the inner adds to the outer. Inside
    ``torch.compile`` it does nothing: there the compiler decides what can be reused. Written as a class, since a
    generator function costs a small step 10 microseconds more.
    """

    def __init__(self, *trees: Any, owned: Ownership | None = None) -> None:
        self._given = (owned or {}) if not trees else {**(owned or {}), **ownership(*trees)}
        self._token: Token[_Scope | None] | None = None
        self._scope: _Scope | None = None

    def __enter__(self) -> None:
        if not torch.compiler.is_compiling():
            self._scope = _Scope(_scope.get(), self._given)
            self._token = _scope.set(self._scope)

    def __exit__(self, *exception: object) -> None:
        if self._token is not None:
            _scope.reset(self._token)
            self._token = None

    @property
    def has_handed_out(self) -> bool:
        """Whether somebody got one of the tensors to write over it, so that what failed may have left it half done."""
        return self._scope is not None and self._scope.has_handed_out


def temporaries() -> AbstractContextManager[None]:
    """A scope in which :func:`release` has an effect: the open donation scope, or a new one that owns nothing yet."""
    return nullcontext() if torch.compiler.is_compiling() or _scope.get() is not None else donate()


@contextmanager
def keep() -> Iterator[None]:
    """Within the scope nothing is donated: for code that needs the old values after the new ones exist."""
    if torch.compiler.is_compiling():
        yield
        return
    token = _scope.set(None)
    try:
        yield
    finally:
        _scope.reset(token)


def release(tree: TensorDict) -> None:
    """Add a flat tree of temporaries to the donation scope if one is open: its maker has no more use for its tensors.

    They may be overwritten for as long as the tree itself exists. Tensors that share memory may not: autograd gives
    one gradient to all terms of a sum, and what is written over one of them would change the others.
    """
    scope = _open_scope()
    if scope is not None and has_foreach():
        scope.released.append(_Released(tree))


def are_apart(tensors: Sequence[Tensor]) -> bool:
    """Whether no two tensors overlap in memory, from the first to the last byte of each, so that each can be written
    over alone.

    Example:
        >>> w = torch.zeros(4)
        >>> are_apart([w, torch.zeros(2)]), are_apart([w, w[1:]]), are_apart([w[:2], w[2:]])
        (True, False, True)
    """
    if set(map(type, tensors)) <= _PLAIN and all(map(Tensor.is_contiguous, tensors)):
        starts, sizes = list(map(Tensor.data_ptr, tensors)), map(_NBYTES, tensors)
    else:
        starts, sizes = list(map(address, tensors)), map(_extent, tensors)
    ends = sorted(map(operator.add, starts, sizes))
    starts.sort()
    return all(map(operator.le, ends, starts[1:]))


_PLAIN = frozenset((Tensor, nn.Parameter))
_NBYTES = operator.attrgetter("nbytes")


def _extent(tensor: Tensor) -> int:
    """Bytes from the first to the last element."""
    own: Tensor = getattr(tensor, "_local_tensor", tensor)
    if own.is_contiguous():
        return own.nbytes
    return (1 + sum((size - 1) * stride for size, stride in zip(own.shape, own.stride(), strict=True))) * own.itemsize


def address(tensor: Tensor) -> int:
    """Where a tensor, or the own part of a sharded one, begins in memory; 0 for one without elements."""
    return getattr(tensor, "_local_tensor", tensor).data_ptr()


def writable(tensors: list[Tensor]) -> list[Tensor]:
    """Tensors that may be overwritten: the given list itself where all are donated, else copies of those that are not.

    Inside ``torch.compile`` always copies, which the compiler removes.
    """
    scope = _open_scope()
    if scope is None:
        return [t.clone() for t in tensors]
    return tensors if scope.own(tensors) else [t if scope.owns(t) else scope.copy(t) for t in tensors]


def is_donated(tensors: list[Tensor]) -> bool:
    """Whether :func:`writable` would hand out all of these tensors themselves.

    Example:
        >>> w = torch.zeros(1)
        >>> with donate(w):
        ...     print(is_donated([w]), is_donated([torch.zeros(1)]))
        True False
    """
    scope = _open_scope()
    return scope is not None and scope.own(tensors)


def assign(tree: TensorDict, tensors: Sequence[Tensor]) -> TensorDict:
    """A flat tree with new values: written over the old ones where those are donated, else a new tree.

    For small values (counters, reports): where the values are large, compute in :func:`writable` tensors instead.
    """
    own = leaves(tree)
    if not is_donated(own):
        return like(tree, tensors)
    for old, new in zip(own, tensors, strict=True):
        old.copy_(new)
    return tree


def incremented(count: Tensor) -> Tensor:
    """``count + 1``, written over ``count`` where that is donated."""
    if torch.compiler.is_compiling():
        return count + 1
    (new,) = writable([count])
    return new.add_(1)


def scaled(tree: TensorDict, factor: Tensor) -> TensorDict:
    """Every tensor times a 0-d factor, in its own dtype; ``tree`` itself for a factor of one that the host can see."""
    if not has_foreach():
        return like(tree, [(t * factor).to(t.dtype) for t in leaves(tree)])
    if factor.is_cpu and factor.item() == 1.0:
        return tree
    own = leaves(tree)
    out = writable(own)
    torch._foreach_mul_(out, factor)
    return tree if out is own else like(tree, out)
