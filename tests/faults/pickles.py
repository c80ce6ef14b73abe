"""Files of ``torch.save`` as anybody may have made them: mutated bytes, operations, values, and attacks."""

from __future__ import annotations

import io
import pickle
import pickletools
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from itertools import pairwise
from random import Random
from typing import Any

import torch

_ROOT = "archive"
_PICKLE = f"{_ROOT}/data.pkl"
_NUMBERS = (-(2**63), -(2**31), -1, 0, 1, 2, 255, 2**16, 2**31 - 1, 2**31, 2**40, 2**62, 2**63, 2**64, 10**600)
_TEXTS = (
    "",
    "0",
    "1",
    "cpu",
    "cuda",
    "meta",
    "storage",
    "exp_avg",
    "step",
    "params",
    "lr",
    "x" * 300,
    "\udc80",
    "latin1",
)
_GLOBALS = (
    "os system", "posix system", "builtins eval", "__builtin__ exec", "builtins getattr", "builtins bytearray",
    "collections OrderedDict", "collections Counter", "collections defaultdict", "builtins set", "builtins complex",
    "_codecs encode", "torch Size", "torch Tensor", "torch FloatTensor", "torch device", "torch float16", "torch int64",
    "torch complex64", "torch qint8", "torch float8_e5m2", "torch LongStorage", "torch.storage UntypedStorage",
    "torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v3", "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_sparse_tensor", "torch._utils _rebuild_qtensor", "torch._utils _rebuild_nested_tensor",
    "torch._utils _rebuild_meta_tensor_no_storage", "torch._utils _rebuild_wrapper_subclass",
    "torch._tensor _rebuild_from_type_v2", "torch.serialization _get_layout", "torch.nn.parameter Parameter",
)  # fmt: skip
_OPERATIONS = tuple(
    code.code.encode("latin1")
    for code in pickletools.opcodes
    if code.arg is None and code.name not in ("STOP", "PROTO")
)


def packed(data: bytes, files: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A file with this pickle, and other files beside it."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive, warnings.catch_warnings():
        # Of names that are there twice.
        warnings.simplefilter("ignore")
        archive.writestr(_PICKLE, data)
        for name, content in ({"version": b"3\n", "byteorder": b"little"} | (files or {})).items():
            archive.writestr(f"{_ROOT}/{name}", content)
    return out.getvalue()


def mutated_torch_file(content: bytes, random: Random, edit: Callable[[bytes, Random], bytes]) -> bytes:
    """One that is another than it should be.

    Args:
        content: of a file that ``torch.save`` has written.
        random: draws.
        edit: changes some bytes.
    """
    kind = random.choice(
        ("bytes", "pickle", "operations", "operations", "values", "values", "values", "parts", "attack")
    )
    if kind == "bytes":
        return edit(content, random)
    if kind == "values":
        return _with_other_values(content, random)
    if kind == "attack":
        return packed(random.choice(sorted(ATTACKS.values())), {"data/0": bytes(4)})
    data, files = _unpacked(content)
    if kind == "parts":
        return packed(data, *_other_parts(files, random, edit))
    return packed(edit(data, random) if kind == "pickle" else _other_operations(data, random), files)


def _unpacked(content: bytes) -> tuple[bytes, dict[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    return parts.pop("data.pkl"), parts


def _other_parts(files: dict[str, bytes], random: Random, edit: Callable[[bytes, Random], bytes]) -> tuple[Any, int]:
    name = random.choice(sorted(files))
    kind = random.choice(("edit", "remove", "rename", "add", "compress"))
    if kind == "edit":
        files[name] = edit(files[name], random)
    elif kind == "remove":
        del files[name]
    elif kind == "rename":
        files[random.choice(("data/0", "data/99", "../data/0", "constants.pkl", "/etc/x", "data.pkl"))] = files.pop(
            name
        )
    elif kind == "add":
        files[random.choice(("code/x.py", "constants.pkl", "data/99", ".format_version", "extra"))] = b"1"
    return files, zipfile.ZIP_DEFLATED if kind == "compress" else zipfile.ZIP_STORED


def _other_operations(data: bytes, random: Random) -> bytes:
    """The operations of a pickle, of which some are others, missing, moved or there twice."""
    places = [place for _, _, place in pickletools.genops(data)] + [len(data)]
    parts = [data[begin:end] for begin, end in pairwise(places)]
    for _ in range(random.choice((1, 1, 1, 2, 5))):
        i, j = random.randrange(len(parts)), random.randrange(len(parts))
        kind = random.choice(("remove", "repeat", "swap", "number", "text", "global", "operation", "fetch"))
        if kind == "remove" and len(parts) > 1:
            del parts[i]
        elif kind == "repeat":
            parts[i] *= random.choice((2, 2, 1000))
        elif kind == "swap":
            parts[i], parts[j] = parts[j], parts[i]
        elif kind == "number":
            parts[_place(parts, b"KMJ\x8a", i)] = _integer(random.choice(_NUMBERS))
        elif kind == "text":
            parts[_place(parts, b"X", i)] = _text(random.choice(_TEXTS))
        elif kind == "global":
            parts[_place(parts, b"c", i)] = _global(random.choice(_GLOBALS))
        elif kind == "operation":
            parts.insert(i, random.choice(_OPERATIONS))
        else:
            parts.insert(i, b"h" + bytes([random.randrange(64)]))
    return b"".join(parts)


def _place(parts: list[bytes], kinds: bytes, start: int) -> int:
    """The next operation of these kinds, or the one at the start."""
    order = [*range(start, len(parts)), *range(start)]
    return next((i for i in order if parts[i][:1] and parts[i][0] in kinds), start)


def _integer(value: int) -> bytes:
    content = pickle.encode_long(value)
    return b"\x8a" + bytes([len(content)]) + content


def _text(value: str) -> bytes:
    content = value.encode("utf-8", "surrogatepass")
    return b"X" + len(content).to_bytes(4, "little") + content


def _global(name: str) -> bytes:
    module, _, attribute = name.partition(" ")
    return f"c{module}\n{attribute}\n".encode()


def _with_other_values(content: bytes, random: Random) -> bytes:
    """What ``torch.save`` makes of the dictionary with other values in it."""
    root = [torch.load(io.BytesIO(content), weights_only=True)]
    for _ in range(random.choice((1, 1, 2, 4))):
        node: Any = root
        while True:
            keys = list(node) if isinstance(node, dict) else range(len(node))
            if not keys:
                break
            key = random.choice(list(keys))
            if not isinstance(node[key], (dict, list)) or random.random() < 0.2:
                _change(node, key, random)
                break
            node = node[key]
        if not root:
            break
    out = io.BytesIO()
    torch.save(root[0] if root else None, out)
    return out.getvalue()


def _change(node: Any, key: Any, random: Random) -> None:
    kind = random.choice(("replace", "replace", "remove", "rename", "add", "take another", "deepen"))
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    if kind == "remove":
        del node[key]
    elif kind == "rename" and isinstance(node, dict):
        node[random.choice((*_NUMBERS, *_TEXTS, None, (1, 2), 0.5))] = node.pop(key)
    elif kind == "add" and isinstance(node, dict):
        node[random.choice((*_TEXTS, 7, -1))] = _leaf(node[key], random)
    elif kind == "add":
        node.insert(key, _leaf(node[key], random))
    elif kind == "take another":
        node[key] = node[random.choice(keys)]
    elif kind == "deepen":
        for _ in range(random.choice((1, 20, 100))):
            node[key] = random.choice(([node[key]], {"a": node[key]}, (node[key],)))
    else:
        node[key] = _leaf(node[key], random)


def _leaf(old: Any, random: Random) -> Any:
    shape = tuple(old.shape) if isinstance(old, torch.Tensor) and old.numel() < 100 else (2, 3)
    made: tuple[Callable[[], Any], ...] = (
        lambda: random.choice((*_NUMBERS, *_TEXTS, None, True, 0.5, float("nan"), float("inf"), 1e308, 1j)),
        lambda: random.choice(([], {}, (), set(), [0] * 100, OrderedDict(a=1), Counter("aab"), torch.Size([2]))),
        lambda: random.choice((torch.float16, torch.device("cpu"), torch.device("meta"), bytearray(3), b"abc")),
        lambda: torch.full(shape, random.choice((0.0, 1.0, -1.0, 0.5, 1e30, float("nan"), float("inf")))),
        lambda: torch.ones(shape, dtype=random.choice((torch.int64, torch.bool, torch.complex64, torch.float64))),
        lambda: torch.ones(shape, dtype=random.choice((torch.bfloat16, torch.float16, torch.float8_e5m2, torch.uint8))),
        lambda: torch.ones(shape, requires_grad=True),
        lambda: torch.nn.Parameter(torch.ones(shape)),
        lambda: torch.ones(shape, device="meta"),
        lambda: torch.ones(()).expand(random.choice((shape, (2**20, 2**20), (2**62,)))),
        lambda: torch.ones((3, *shape)).to_sparse(),
        lambda: torch.ones(shape, dtype=torch.complex64).conj().imag,
        lambda: torch.empty(random.choice(((0,), (0, 3), (1, *shape), shape[:-1]))),
    )
    return random.choice(made)()


def _shared_tuples(levels: int, width: int) -> bytes:
    """A tuple of tuples that are one object, each level ``width`` times; it becomes a key."""
    parts = [b"\x80\x02]K\x01\x85q\x00a"]
    for level in range(levels):
        parts.append(b"(" + (b"h" + bytes([level])) * width + b"tq" + bytes([level + 1]) + b"a")
    return b"".join(parts) + b"}h" + bytes([levels]) + b"K\x01s."


def _nested_tuples(levels: int) -> bytes:
    return b"\x80\x02}K\x01" + b"\x85" * levels + b"K\x01s."


def _call(name: str, *arguments: bytes) -> bytes:
    return _global(name) + b"(" + b"".join(arguments) + b"tR"


def _expanded(number: int, stride: int = 0) -> bytes:
    """A tensor of one number, seen ``number`` times."""
    storage = b"(" + _text("storage") + _global("torch FloatStorage") + _text("0") + _text("cpu") + b"K\x01tQ"
    sizes = _integer(number) + b"\x85" + _integer(stride) + b"\x85"
    return _call("torch._utils _rebuild_tensor_v2", storage, b"K\x00", sizes, b"\x89", _call("collections OrderedDict"))


class _Runs:
    """Unpickled, it runs a command."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


def _value(content: bytes) -> bytes:
    return b"\x80\x02}" + _text("state") + content + b"s."


def _often(given: bytes, user: bytes, use: bytes) -> bytes:
    """What is given (0 in the memo) used (by 1 in the memo) two hundred times."""
    return b"\x80\x02}" + _text("state") + b"](" + given + b"q\x00" + user + b"q\x01" + use * 200 + b"es."


def _attacks() -> dict[str, bytes]:
    import os

    number = _integer(2**36)
    return {
        "os.system": pickle.dumps(_Runs(os.system, "touch canary"), protocol=2),
        "eval": pickle.dumps(_Runs(eval, "open('canary', 'w')"), protocol=2),
        "exec in a value": pickle.dumps({"state": [_Runs(exec, "open('canary', 'w')")]}, protocol=2),
        "call in an argument": _value(_call("builtins getattr", _global("os path"), _text("join"))),
        "protocol 4": pickle.dumps(_Runs(os.mkdir, "canary"), protocol=4),
        "tuples of tuples": _shared_tuples(60, 2),
        "wide tuples of tuples": _shared_tuples(6, 200),
        "deep tuples": _nested_tuples(300_000),
        "deep lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        "list in itself": b"\x80\x02}" + _text("state") + b"]q\x00h\x00as.",
        "bytearray of a size": _value(_call("builtins bytearray", number)),
        "bytearray in a set": _value(_call("builtins set", _call("builtins bytearray", number))),
        "tensor of a size": _value(_call("torch FloatTensor", number)),
        "new tensor of a size": _value(_global("torch Tensor") + b"(" + number + b"t\x81"),
        "set of an expanded tensor": _value(_call("builtins set", _expanded(2**36))),
        "keys of an expanded tensor": _value(_call("collections OrderedDict", _expanded(2**36))),
        "call of an expanded tensor": _value(_expanded(2**36) + b")R"),
        "arguments out of an expanded tensor": _value(_global("builtins set") + _expanded(2**36) + b"R"),
        "state out of an expanded tensor": _value(_call("collections OrderedDict") + _expanded(2**36) + b"b"),
        "size of an expanded tensor": _value(_call("torch Size", _expanded(2**36))),
        "walk behind attributes": _value(
            _call("torch._tensor _rebuild_from_type_v2", _global("builtins set"), _global("torch Tensor"),
                  b"(" + _expanded(2**36) + b"t", b"}")
        ),
        "one list in many sets": _often(b"](" + b"K\x01" * 4000 + b"e", _global("builtins set"), b"h\x01h\x00\x85R"),
        "one text counted often": _often(_text("a" * 4000), _global("collections Counter"), b"h\x01h\x00\x85R"),
        "one text encoded often": _often(
            _text("a" * 4000), _global("_codecs encode"), b"h\x01h\x00" + _text("latin1") + b"\x86R"
        ),
        "one dictionary as many states": _often(
            b"}(" + b"".join(map(_integer, range(4000))) + b"u", _call("collections OrderedDict"), b"h\x01h\x00b"
        ),
        "one tuple as many keys": _often(b"(" + b"K\x01" * 4000 + b"t", b"}", b"}h\x00Ns"),
        "one tuple as many sizes": _often(b"(" + b"K\x01" * 4000 + b"t", _global("torch Size"), b"h\x01h\x00\x85R"),
        "punycode": _value(_call("_codecs encode", _text("".join(map(chr, range(256, 50_000)))), _text("punycode"))),
        "quantised tensor of a size": _value(
            _call("torch._utils _rebuild_qtensor", b"N", b"K\x00", number + b"\x85", b"K\x01\x85", b"N", b"\x89", b"}")
        ),
        "negative stride": _value(_expanded(2, -1)),
        "stride beyond the end": _value(_expanded(2, 2**40)),
        "negative size": _value(_expanded(-5)),
        "storage larger than its file": _value(_expanded(4).replace(b"K\x01tQ", number + b"tQ")),
    }  # fmt: skip


ATTACKS = _attacks()
"""Pickles, by what they do; those with a tensor want four bytes in ``data/0``."""
