"""Files as anybody may have made them: mutated, their digests made to fit, given to all that read them."""

from __future__ import annotations

import codecs
import ctypes
import json
import os
import resource
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load as loaded_by_safetensors
from torch import nn

from tests.faults.judge import Case, Reference, Tally, workspace
from tests.faults.pickles import mutated_torch_file
from tests.faults.server import Server
from tests.faults.trap import Emit, Plan
from trainkit import init_state
from trainkit.io import checkpoint
from trainkit.optim import adamw

FILES = Case("files", "tests.faults.fuzz:read")
THEIRS = Case("theirs", "tests.faults.fuzz:read", {"only": "theirs"})
"""A checkpoint of the Trainer of transformers alone."""
SECONDS = 5
"""That reading one file may compute."""
MEMORY = 64 * 2**20
"""Bytes that it may take beside three times what it reads."""
_PART = 500
_MANIFEST = "manifest.json"
_HEADER = 8

# What may be called while something is read: everything else that is audited would change files or run code.
_HARMLESS = {
    "open",
    "os.listdir",
    "os.scandir",
    "object.__getattr__",
    "object.__setattr__",
    "sys._getframe",
    "builtins.id",
    "_thread.start_new_thread",
}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def fuzz(server: Server, case: Case, reference: Reference, *, number: int, seed: int = 0, first: int = 0) -> Tally:
    """Mutate files and read them: a ``CheckpointError`` refuses them, or they give what another reader finds in them.

    Args:
        server: runs the case.
        case: calls :func:`read`.
        reference: not needed.
        number: how many mutations.
        seed: of all draws.
        first: the number of the first one.
    """
    tally = Tally()
    for begin in range(first, first + number, _PART):
        count = min(_PART, first + number - begin)
        with workspace() as root:
            arguments = {**case.arguments, "folder": str(root), "first": begin, "number": count, "seed": seed}
            outcome = server.run(case.program, arguments, Plan(trace=False, limit=600.0))
        for i, verdict, problem in outcome.told("read"):
            tally.note(f"fuzz/{case.name}/{i}", [problem] if problem else [], verdict)
        if outcome.code:
            i = outcome.told("begun")[-1]
            tally.note(f"fuzz/{case.name}/{i}", [f"ended: by {-outcome.code or outcome.code}\n{outcome.stderr}"])
    return tally


def read(emit: Emit, *, folder: str, first: int = 0, number: int = 0, seed: int = 0, only: str = "") -> None:
    """Mutate and read ``number`` times, under limits of memory and time and an eye on what is reached.

    ``only`` names the one folder that is read; "" for all.

    Tells which one has ``begun``, and of each what came of its being ``read``: its number, "refused" or "read", and
    what is wrong.
    """
    base = Path(folder)
    subjects = [subject for subject in make_subjects(base) if only in ("", subject.folder.name)]
    random = Random(0)
    codecs.lookup("latin1")
    # Some errors of torch show a tensor, and the first one that is shown imports what it takes.
    repr(torch.zeros(1))
    for subject in subjects:
        # What is imported and looked up on the way to an error is so before anybody watches.
        for _ in range(20):
            attempt(subject, mutated(subject, random))
    watch = Watch(base)
    for i in range(first, first + number):
        emit(begun=i)
        random = Random(f"fuzz {seed} {i}")
        subject = random.choice(subjects)
        emit(read=(i, *attempt(subject, mutated(subject, random), watch.over)))
    emit(final={})


@dataclass(frozen=True)
class Subject:
    """Files that are read together.

    Args:
        folder: where they are.
        files: those that may be mutated, as they should be.
        read: reads them, and gives what it has found.
        check: raises AssertionError if that is not what is in the files.
    """

    folder: Path
    files: Mapping[str, bytes]
    read: Callable[[], Any]
    check: Callable[[Any], None] = lambda found: None


def make_subjects(base: Path) -> list[Subject]:
    """A checkpoint beside an older one, a model in one file, one in shards, and a checkpoint of the Trainer of
    transformers."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    like = init_state(module, adamw(0.1))
    older = checkpoint.save(base / "run", like.replace(step=torch.tensor(3)), cursor=[1], run_id="run")
    newer = checkpoint.save(base / "run", like.replace(step=torch.tensor(5)), cursor={"rows": 5}, metadata=["x", 0.5])
    whole = checkpoint.export_model(module, base / "whole")
    shards = checkpoint.export_model(module, base / "shards", max_shard_bytes=30)
    theirs = checkpoint.export_model(module, base / "theirs")
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    torch.save(optimizer.state_dict(), theirs / "optimizer.pt")
    torch.save(schedule.state_dict(), theirs / "scheduler.pt")
    (theirs / "trainer_state.json").write_text('{"global_step":1,"epoch":0.25,"log_history":[{"loss":0.5,"step":1}]}')
    return [
        _subject(newer, lambda: _read_checkpoint(newer, older, like)),
        _subject(whole, lambda: checkpoint.read_model(whole), lambda found: _check_model(whole, found)),
        _subject(shards, lambda: checkpoint.read_model(shards)),
        _subject(theirs, lambda: _import(theirs, module), lambda found: _check_import(theirs, found)),
    ]


def _subject(
    folder: Path,
    read: Callable[[], Any],
    check: Callable[[Any], None] = lambda found: None,
) -> Subject:
    names = sorted(path.name for path in folder.iterdir())
    return Subject(folder, {name: (folder / name).read_bytes() for name in names}, read, check)


def _import(folder: Path, module: nn.Module) -> Any:
    before = [tensor.clone() for tensor in module.state_dict().values()]
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            return checkpoint.import_hf_trainer(folder, module, adamw(0.1))
    except ValueError as error:
        # Only the arguments that could explain what is in the files may be asked for.
        if not str(error).startswith(("batches_per_epoch: ", "groups: ", "optimizer: ")):
            raise
        raise checkpoint.CheckpointError(f"{folder}: {error}") from error
    finally:
        foreign = [w.message for w in caught if not issubclass(w.category, checkpoint.CheckpointWarning)]
        assert not foreign, f"warned: {foreign[0]!r}"
        assert all(map(torch.equal, before, module.state_dict().values())), "the module has changed"


def _check_import(folder: Path, found: Any) -> None:
    """The numbers must be those that torch reads."""
    saved = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    for slot in ("exp_avg", "exp_avg_sq"):
        for index, (name, own) in zip(indices, found.state.opt_state[slot].items(), strict=True):
            assert not own.requires_grad and own.dtype == torch.float32, name
            torch.testing.assert_close(
                own, saved["state"][index][slot].detach().float(), rtol=0, atol=0, equal_nan=True
            )
    assert int(found.state.step) == json.loads((folder / "trainer_state.json").read_bytes())["global_step"]


def _read_checkpoint(path: Path, older: Path, like: Any) -> None:
    """All that reads a checkpoint, which has to agree."""
    refused, damaged = _refusal(lambda: checkpoint.verify(path)), _refusal(lambda: checkpoint.load(path, like))
    assert damaged is not None or refused is None, f"it was loaded, though verify says {refused}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checkpoint.checkpoints(path.parent)
        newest = _refusal(lambda: _check_newest(checkpoint.load_latest(path.parent, like), older, path, damaged))
    assert all(issubclass(warning.category, checkpoint.CheckpointWarning) for warning in caught)
    assert newest is None or type(newest) is type(damaged), f"load_latest says {newest}, load {damaged}"
    if damaged is not None:
        raise damaged


def _check_newest(restored: Any, older: Path, newer: Path, damaged: Exception | None) -> None:
    expected = newer if damaged is None else older
    assert restored is not None and restored.path == expected, f"load_latest took {restored}, expected {expected}"


def _refusal(call: Callable[[], Any]) -> Exception | None:
    try:
        call()
    except checkpoint.CheckpointError as error:
        return error
    return None


def _check_model(folder: Path, found: dict[str, torch.Tensor]) -> None:
    """The library of the format must find the same."""
    try:
        theirs = loaded_by_safetensors((folder / "model.safetensors").read_bytes())
    except SafetensorError as error:
        raise AssertionError(f"read, though safetensors says {error}") from error
    assert found.keys() == theirs.keys()
    for name, tensor in theirs.items():
        own = found[name]
        assert own.dtype == tensor.dtype and own.shape == tensor.shape, f"{name!a} is {own.dtype} {own.shape}"
        assert own.numpy(force=True).tobytes() == tensor.numpy(force=True).tobytes()


def attempt(
    subject: Subject, files: Mapping[str, bytes], over: Callable[[int], Any] = lambda size: nullcontext()
) -> tuple[str, str]:
    """Put files in place, read, put the right ones back. Returns the verdict and what is wrong, "" for nothing.

    Args:
        subject: what is read.
        files: the mutated ones.
        over: gives the scope in which files of so many bytes are read.
    """
    for name, content in files.items():
        (subject.folder / name).write_bytes(content)
    size = sum(map(len, {**subject.files, **files}.values()))
    try:
        with over(size):
            found = subject.read()
        subject.check(found)
    except checkpoint.CheckpointError as error:
        # An error that does not say where is as good as none.
        return "refused", "" if str(subject.folder) in str(error) else f"unclear: {error}"
    except Exception as error:
        return "read", f"{type(error).__name__}: {error!a:.500}; of {dict(files)!r:.1000}"
    finally:
        for name in files:
            (subject.folder / name).write_bytes(subject.files[name])
    return "read", ""


def watched(read: Callable[[], Any], folder: Path, size: int = 0, seconds: float = 0.2) -> tuple[int, str]:
    """The wait status of a process that reads files of a size under watch, and what it finds wrong."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            watch = Watch(folder, seconds)
            _, problem = attempt(Subject(folder, {}, read), {}, lambda _: watch.over(size))
            os.write(writer, problem.encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as told:
        problem = told.read()
    return os.waitpid(pid, 0)[1], problem


class Watch:
    """Limits on this process, and an eye on what it reaches, which stays for its life."""

    def __init__(self, base: Path, seconds: float = SECONDS) -> None:
        self._base, self._seconds = str(base), seconds
        self._is_on = False
        self._reached: list[str] = []
        self._trim = ctypes.CDLL(None).malloc_trim
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._is_on:
            return
        if event == "open":
            path, _, flags = arguments
            if not self._is_inside(path) or flags & _WRITES:
                self._reached.append(f"open {path!r} with {flags:#o}")
        elif event not in _HARMLESS:
            self._reached.append(event)

    def _is_inside(self, path: Any) -> bool:
        """An absolute path below the base, or a name below a descriptor."""
        if not isinstance(path, str):
            return isinstance(path, int)
        parts = path.split("/")
        return ".." not in parts and (len(parts) == 1 or path.startswith(self._base + "/"))

    @contextmanager
    def over(self, size: int) -> Iterator[None]:
        # What was freed is given back, so that taking it again is seen.
        self._trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmHWM")
        limit = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + 2**30, limit[1]))
        # A process that computes longer is ended by the signal.
        signal.setitimer(signal.ITIMER_PROF, self._seconds)
        self._reached = []
        self._is_on = True
        try:
            yield
        finally:
            self._is_on = False
            signal.setitimer(signal.ITIMER_PROF, 0)
            resource.setrlimit(resource.RLIMIT_AS, limit)
            taken = _status("VmHWM") - before
            if self._reached:
                raise AssertionError(f"reached: {', '.join(sorted(set(self._reached)))}")
            if taken > MEMORY + 3 * size:
                raise AssertionError(f"took {taken} bytes for files of {size}")


def _status(name: str) -> int:
    """A number of bytes that the kernel keeps of this process."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition(f"\n{name}:")[2].split(maxsplit=1)[0]) * 1024


def mutated(subject: Subject, random: Random) -> dict[str, bytes]:
    """One file that is another than it should be, most often with digests that fit."""
    name = random.choice(sorted(subject.files))
    content = subject.files[name]
    if name == _MANIFEST:
        return {name: _mutated_manifest(content, random)}
    if name.endswith(".pt"):
        return {name: mutated_torch_file(content, random, _edited_bytes)}
    edited = _mutated_tensors(content, random) if name.endswith(".safetensors") else _edited(content, random)
    if _MANIFEST not in subject.files or random.random() < 0.2:
        return {name: edited}
    fields = json.loads(subject.files[_MANIFEST])
    del fields["digest"]
    fields["files"][name] = {"size": len(edited), "xxh3_128": xxhash.xxh3_128_hexdigest(edited)}
    return {name: edited, _MANIFEST: _signed(json.dumps(fields).encode())}


def _mutated_manifest(content: bytes, random: Random) -> bytes:
    if random.random() < 0.1:
        return _edited_bytes(content, random)
    return _signed(_edited(b"{" + content.partition(b"\n")[2], random))


def _signed(body: bytes) -> bytes:
    return b'{"digest":"%s",\n%s' % (xxhash.xxh3_128_hexdigest(body[1:]).encode(), body[1:])


def _mutated_tensors(content: bytes, random: Random) -> bytes:
    """A safetensors file with another header, whose length most often fits; or with an edit anywhere."""
    if random.random() < 0.2:
        return _edited_bytes(content, random)
    length = int.from_bytes(content[:_HEADER], "little")
    header, data = content[_HEADER : _HEADER + length], content[_HEADER + length :]
    header = _edited(header, random)
    length = random.choice(_NUMBERS) % 2**64 if random.random() < 0.1 else len(header)
    return length.to_bytes(_HEADER, "little") + header + data


def _edited(content: bytes, random: Random) -> bytes:
    """JSON in which a value is another, or some bytes are."""
    return _edited_json(content, random) if random.random() < 0.5 else _edited_bytes(content, random)


_NUMBERS = (
    -(2**63),
    -1,
    0,
    1,
    3,
    4,
    8,
    2**16,
    2**31,
    2**32 - 1,
    2**53 + 1,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
    10**400,
)
_TEXTS = (
    "", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "\0", "\ud800", "\u202e", "x" * 600, "F32", "F64", "BF16",
    "F4", "F8_E4M3", "C64", "BOOL", "PICKLE", "__metadata__", "model.safetensors", "training.json", "0" * 32, "NaN",
)  # fmt: skip
_LEAVES = (*_NUMBERS, *_TEXTS, None, True, False, 0.5, -0.0, 1e308)
_TOKENS = (
    b"{", b"}", b"[", b"]", b'"', b",", b":", b"null", b"NaN", b"-Infinity", b"1e999", b"-0", b"0.0", b"\\u0000", b"\\",
    b"\xff", b"\x00", b"\xef\xbb\xbf", b"9" * 30, b"9" * 5000, b"[" * 500, b'{"a":' * 500, b"[]," * 1000, b" " * 5000,
    b'"__metadata__":{},', b'"a":1,"a":1,', bytes(1 << 20),
)  # fmt: skip


def _edited_json(content: bytes, random: Random) -> bytes:
    root = [json.loads(content)]
    for _ in range(random.choice((1, 1, 2, 4))):
        node: Any = root
        while True:
            key = random.choice(sorted(node) if isinstance(node, dict) else range(len(node)))
            if not isinstance(node[key], (dict, list)) or not node[key] or random.random() < 0.2:
                break
            node = node[key]
        _change(node, key, random)
        if not root:
            return b""
    return json.dumps(root[0]).encode()


def _change(node: Any, key: Any, random: Random) -> None:
    """Replace, remove, rename or add one value."""
    kind = random.choice(("replace", "replace", "remove", "rename", "add", "deepen", "take another"))
    if kind == "remove":
        del node[key]
    elif kind == "rename" and isinstance(node, dict):
        node[random.choice(_TEXTS)] = node.pop(key)
    elif kind == "add" and isinstance(node, dict):
        node[random.choice(_TEXTS)] = random.choice(_LEAVES)
    elif kind == "add":
        node.insert(key, random.choice(_LEAVES))
    elif kind == "deepen":
        for _ in range(random.choice((1, 63, 200))):
            node[key] = random.choice(([node[key]], {"a": node[key]}))
    elif kind == "take another":
        node[key] = node[random.choice(sorted(node) if isinstance(node, dict) else range(len(node)))]
    else:
        node[key] = random.choice((*_LEAVES, [], {}, [0] * 100, [random.choice(_NUMBERS) for _ in range(3)]))


def _edited_bytes(content: bytes, random: Random) -> bytes:
    for _ in range(random.choice((1, 1, 1, 2, 8))):
        begin = random.randrange(len(content) + 1)
        end = min(len(content), begin + random.choice((0, 1, 1, 2, 8, 100)))
        kind = random.choice(("flip", "flip", "insert", "replace", "cut", "repeat", "truncate", "copy"))
        part = content[begin:end]
        if kind == "flip":
            part = bytes([part[0] ^ 1 << random.randrange(8)]) + part[1:] if part else b"\x01"
        elif kind in ("insert", "replace"):
            token = random.choice(_TOKENS) if random.random() < 0.7 else bytes([random.randrange(256)])
            part = token if kind == "replace" else token + part
        elif kind == "cut":
            part = b""
        elif kind == "repeat":
            part *= random.choice((2, 2, 50))
        elif kind == "copy" and content:
            there = random.randrange(len(content))
            part = content[there : there + random.choice((1, 8, 100))]
        content = content[:begin] + part + (b"" if kind == "truncate" else content[end:])
    return content
