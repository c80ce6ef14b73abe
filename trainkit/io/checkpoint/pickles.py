"""What a pickle would do, found out without doing it: whether it makes plain values in the time and memory of its size.

``torch.load(weights_only=True)`` runs no code of the file's choice, but some of what it does run takes a number and
makes an array of that size, or walks through all entries of what it is given; and a tuple of tuples that are one object
takes twice as long to hash with every level. So a file of 200 bytes could keep it busy for ever.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Collection, Iterator
from typing import NamedTuple

_REBUILD = r"torch\._utils\._rebuild_(?:tensor|tensor_v2|tensor_v3|parameter|sparse_tensor)"
_ATTRIBUTES = "torch._tensor._rebuild_from_type_v2"
_ENCODE = "_codecs.encode"
# They walk through what they are given, and a tensor may have more entries than bytes.
_WALKING = ("collections.Counter", "builtins.set", "__builtin__.set", "torch.Size")
_EMPTY = "collections.OrderedDict"
_NAMES = re.compile(
    rf"{_REBUILD}|{'|'.join(map(re.escape, (_ATTRIBUTES, _ENCODE, _EMPTY, *_WALKING)))}"
    r"|torch\.(?:cuda\.|storage\.)?\w*Storage|torch\.serialization\._get_layout|torch\.device"
    r"|torch\.(?:bool|(?:u?int|b?float|complex)\d+\w*)|torch\.nn\.parameter\.Parameter|torch\.Tensor"
    r"|(?:builtins|__builtin__)\.complex"
)
# The operations that torch reads. Bytes of a number that follows, and whether so many bytes follow that.
_FOLLOWED = {
    pickle.PROTO: (1, False),
    pickle.BINPUT: (1, False),
    pickle.LONG_BINPUT: (4, False),
    pickle.BINGET: (1, False),
    pickle.LONG_BINGET: (4, False),
    pickle.BININT: (4, False),
    pickle.BININT1: (1, False),
    pickle.BININT2: (2, False),
    pickle.BINFLOAT: (8, False),
    pickle.BINUNICODE: (4, True),
    pickle.SHORT_BINSTRING: (1, True),
    pickle.LONG1: (1, True),
}
_CONSTANTS = {
    pickle.NONE,
    pickle.NEWTRUE,
    pickle.NEWFALSE,
    pickle.BININT,
    pickle.BININT1,
    pickle.BININT2,
    pickle.BINFLOAT,
    pickle.LONG1,
}
_CONTAINERS = {pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.EMPTY_SET}
_TUPLES = {pickle.EMPTY_TUPLE: 0, pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3}
_PROTOCOL = b"\x02"
_LONGEST = 64
"""Longer texts are not the names of anything."""
_DEEPEST = 100
"""Levels of tuples in tuples; hashing one calls itself for each, unchecked."""
_REPEATED = 10_000
"""Entries that calls, keys and states may have beyond those that lie in the file: things that come more than once."""


class UnreasonableError(ValueError):
    """A pickle makes something else than plain values, or takes longer than its size."""


class _Item(NamedTuple):
    """A value on the stack.

    Args:
        weight: the entries of a tuple, and of the tuples in it, counted as often as they come.
        depth: levels of tuples.
        text: what a short text is.
        name: of what was looked up.
        entries: of a tuple, the first and the last.
        has_call: whether it is, or is a tuple with, what a call gave.
        held: one number, the entries of a list or dictionary so far, or of a text.
    """

    weight: int = 1
    depth: int = 0
    text: str = ""
    name: str = ""
    entries: tuple[_Item, ...] | None = None
    has_call: bool = False
    held: list[int] | None = None


_PLAIN, _MARK = _Item(), _Item()


def check_pickle(data: bytes, also: Collection[str] = ()) -> None:
    """Refuse a pickle that makes something else than tensors and plain values, or takes longer than its size.

    Args:
        data: the pickle.
        also: further names, with their modules, that it may look up and call.

    Raises: UnreasonableError, also for what is no pickle.

    Example:
        >>> import pickle
        >>> check_pickle(pickle.dumps({"betas": (0.9, 0.999)}, protocol=2))
        >>> check_pickle(pickle.dumps(print, protocol=2))
        Traceback (most recent call last):
            ...
        trainkit.io.checkpoint.pickles.UnreasonableError: it asks for '__builtin__.print', which is no part of ...
    """
    stack: list[_Item] = []
    memo: dict[bytes, _Item] = {}
    walked = 0
    try:
        for code, argument in _operations(data):
            if code in (pickle.BINPUT, pickle.LONG_BINPUT):
                memo[argument.rstrip(b"\0")] = stack[-1]
            elif code in (pickle.BINGET, pickle.LONG_BINGET):
                stack.append(memo[argument.rstrip(b"\0")])
            else:
                walked += _follow(code, argument, stack, len(data), also)
                if walked > len(data) + _REPEATED:
                    raise UnreasonableError(f"it walks through {walked} entries, in {len(data)} bytes")
    except (IndexError, KeyError) as error:
        raise UnreasonableError(f"it takes what it did not make ({type(error).__name__})") from error


def _operations(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The operations of a pickle up to its end, each with what follows it."""
    place = 0
    while (code := data[place : place + 1]) != pickle.STOP:
        begin = place = place + 1
        if code == pickle.GLOBAL:
            place = _after_line(data, _after_line(data, place))
        elif code in _FOLLOWED:
            width, is_length = _FOLLOWED[code]
            place += width
            if is_length:
                begin, place = place, place + int.from_bytes(data[begin:place], "little")
        if not code or place > len(data):
            raise UnreasonableError(f"it ends after {len(data)} bytes in the middle of an operation")
        yield code, data[begin:place]


def _after_line(data: bytes, place: int) -> int:
    end = data.find(b"\n", place)
    return end + 1 if end >= 0 else len(data) + 1


def _follow(code: bytes, argument: bytes, stack: list[_Item], size: int, also: Collection[str]) -> int:
    """Do what an operation does to the stack; how many entries of something it walks through."""
    if code in _CONSTANTS:
        stack.append(_PLAIN)
    elif code in _CONTAINERS:
        stack.append(_Item(held=[0]))
    elif code == pickle.BINUNICODE:
        text = argument.decode("utf-8", "replace") if len(argument) < _LONGEST else ""
        stack.append(_Item(text=text, held=[len(argument)]))
    elif code == pickle.SHORT_BINSTRING:
        stack.append(_Item(held=[len(argument)]))
    elif code == pickle.MARK:
        stack.append(_MARK)
    elif code in _TUPLES:
        stack.append(_tuple_of(_popped(stack, _TUPLES[code]), size))
    elif code == pickle.TUPLE:
        stack.append(_tuple_of(_popped_to_mark(stack), size))
    elif code in (pickle.APPEND, pickle.APPENDS):
        _fill(stack, _popped(stack, 1) if code == pickle.APPEND else _popped_to_mark(stack))
    elif code in (pickle.SETITEM, pickle.SETITEMS):
        pairs = _popped(stack, 2) if code == pickle.SETITEM else _popped_to_mark(stack)
        _fill(stack, pairs)
        return sum(key.weight for key in pairs[::2])
    elif code == pickle.GLOBAL:
        stack.append(_Item(name=_checked(argument, also)))
    elif code in (pickle.REDUCE, pickle.NEWOBJ):
        function, given = _popped(stack, 2)
        _check_call(function, given)
        stack.append(_Item(has_call=True, held=[0]))
        return _size_of(given)
    elif code == pickle.BUILD:
        (state,) = _popped(stack, 1)
        if state.has_call and state.entries is None:
            raise UnreasonableError("it makes the result of a call the state of an object")
        return _size_of(state)
    elif code == pickle.BINPERSID:
        _popped(stack, 1)
        stack.append(_PLAIN)
    elif code != pickle.PROTO or argument != _PROTOCOL:
        raise UnreasonableError(f"it has the operation {(code + argument)!r}, which no pickle of protocol 2 has")
    return 0


def _fill(stack: list[_Item], items: list[_Item]) -> None:
    """Put items into the container on the stack."""
    held = stack[-1].held
    if held is not None:
        held[0] += sum(item.weight for item in items)


def _size_of(item: _Item) -> int:
    """The entries that one walks through, of a container, a text, or a tuple with such."""
    own = item.weight if item.held is None else item.held[0]
    return own + sum(map(_size_of, item.entries or ()))


def _popped(stack: list[_Item], number: int) -> list[_Item]:
    return [stack.pop() for _ in range(number)][::-1]


def _popped_to_mark(stack: list[_Item]) -> list[_Item]:
    taken = []
    while (item := stack.pop()) is not _MARK:
        taken.append(item)
    return taken[::-1]


def _tuple_of(items: list[_Item], size: int) -> _Item:
    weight = 1 + sum(item.weight for item in items)
    depth = 1 + max((item.depth for item in items), default=0)
    if weight > size or depth > _DEEPEST:
        raise UnreasonableError(f"it has a tuple of {weight} entries and {depth} levels in {size} bytes")
    # No deeper than is looked at: the entries of entries would be kept for nothing.
    ends = tuple(item._replace(entries=None) for item in (items[:1] + items[1:][-1:]))
    return _Item(weight, depth, entries=ends, has_call=any(item.has_call for item in items))


def _checked(argument: bytes, also: Collection[str]) -> str:
    name = argument.decode("utf-8", "replace").removesuffix("\n").replace("\n", ".")
    if name not in also and not _NAMES.fullmatch(name):
        raise UnreasonableError(f"it asks for {name!a:.100}, which is no part of a tensor, a number or a container")
    return name


def _check_call(function: _Item, given: _Item) -> None:
    name = function.name
    if not name or given.entries is None:
        raise UnreasonableError(f"it calls {name or 'a value'!r}, or with something else than a tuple")
    bad = (
        (name == _EMPTY and given.weight > 1)
        or (name in _WALKING and given.has_call)
        or (name == _ENCODE and [item.text for item in given.entries[-1:]] != ["latin1"])
        or (name == _ATTRIBUTES and not (given.entries and re.fullmatch(_REBUILD, given.entries[0].name)))
        or name == "torch.Tensor"
    )
    if bad:
        raise UnreasonableError(f"it calls {name!r} with what no tensor and no container is made of")
