"""Checkpoints made by an enemy who can write into the folder and knows the format, digests included."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from tests.faults.damages import saves_in, stopped_run
from tests.faults.disk import plant, snapshot
from tests.faults.judge import Case, Reference, Tally, check_end, workspace
from tests.faults.server import Server
from tests.faults.trap import Outcome, Plan, read_record

_MODEL, _TRAINING, _JSON, _MANIFEST = "model.safetensors", "training.safetensors", "training.json", "manifest.json"
_SECONDS = 5.0

Attack = Callable[[Path, Path], None]
"""Changes a checkpoint folder; the second folder lies outside of the run."""


class _Payload:
    """Unpickled, it writes a file."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._canary),)


def _replace(name: str, content: Callable[[Path], bytes]) -> Attack:
    """Put other bytes into a file, and their size and digest into the manifest."""

    def attack(folder: Path, outside: Path) -> None:
        data = content(outside)
        (folder / name).write_bytes(data)
        if name != _MANIFEST:
            record = {"size": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
            _edit(lambda body: body["files"].update({name: record}))(folder, outside)

    return attack


def _edit(change: Callable[[dict[str, Any]], Any]) -> Attack:
    """Change what the manifest says; its digest is made to fit."""

    def attack(folder: Path, outside: Path) -> None:
        body = json.loads((folder / _MANIFEST).read_bytes())
        del body["digest"]
        change(body)
        _sign(folder, json.dumps(body).encode()[1:])

    return attack


def _sign(folder: Path, rest: bytes) -> None:
    digest = xxhash.xxh3_128_hexdigest(rest).encode()
    (folder / _MANIFEST).write_bytes(b'{"digest":"' + digest + b'",\n' + rest)


def _signed(rest: bytes) -> Attack:
    return lambda folder, outside: _sign(folder, rest)


def _rename_file(name: str) -> Attack:
    """Let the manifest speak of the weights under another name, which exists outside where a path can lead there."""

    def attack(folder: Path, outside: Path) -> None:
        (outside / _MODEL).write_bytes((folder / _MODEL).read_bytes())
        new = name.format(outside=outside)

        def change(body: dict[str, Any]) -> None:
            for table in (body["files"], body["tensors"]):
                table[new] = table.pop(_MODEL)

        _edit(change)(folder, outside)

    return attack


def _link(name: str) -> Attack:
    def attack(folder: Path, outside: Path) -> None:
        (folder / name).rename(outside / name)
        (folder / name).symlink_to(outside / name)

    return attack


def _link_folder(folder: Path, outside: Path) -> None:
    folder.rename(outside / "checkpoint")
    folder.symlink_to(outside / "checkpoint")


def _link_beside(name: str, target: str) -> Attack:
    """A link with a name that the saver opens or deletes, to something outside."""

    def attack(folder: Path, outside: Path) -> None:
        (outside / "folder").mkdir()
        (outside / "folder/file").write_bytes(b"precious")
        place = folder.parent / name
        place.unlink(missing_ok=True)
        place.parent.mkdir(exist_ok=True)
        place.symlink_to(outside / target)

    return attack


def _pipe(folder: Path, outside: Path) -> None:
    (folder / _MODEL).unlink()
    os.mkfifo(folder / _MODEL)


def _header(entries: Any, *, length: int | None = None, data: bytes = b"") -> Callable[[Path], bytes]:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return lambda outside: (len(text) if length is None else length).to_bytes(8, "little") + text + data


def _pickled(outside: Path) -> bytes:
    return pickle.dumps(_Payload(outside / "canary"))


_F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}

# The last has a Cyrillic letter.
_NAMES = ("../model.safetensors", "{outside}/model.safetensors", "..", "a\0b", "a/b", "", "m\u043edel.safetensors")

# Those that must make the run go back to an older checkpoint.
REFUSED: dict[str, Attack] = {
    **{f"pickle as {name}": _replace(name, _pickled) for name in (_MODEL, _TRAINING, _JSON, _MANIFEST)},
    **{f"file name {name!r}": _rename_file(name) for name in _NAMES},
    **{f"link {name}": _link(name) for name in (_MODEL, _TRAINING, _JSON, _MANIFEST)},
    "checkpoint is a link": _link_folder,
    "pipe": _pipe,
    "deep manifest": _signed(b'"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "deep training.json": _replace(_JSON, lambda _: b"[" * 100_000 + b"]" * 100_000),
    "huge manifest": _signed(b'"a":"' + b"a" * 100_000_000 + b'"}'),
    "huge training.json": _replace(_JSON, lambda _: b'{"a":"' + b"a" * 100_000_000 + b'"}'),
    "many values": _replace(_JSON, lambda _: b"[" + b"0," * 5_000_000 + b"0]"),
    "long number": _replace(_JSON, lambda _: b'{"cursor":' + b"9" * 1_000_000 + b',"metadata":null,"counters":null}'),
    "NaN": _replace(_JSON, lambda _: b'{"cursor":NaN,"metadata":null,"counters":null}'),
    "key twice": _replace(_JSON, lambda _: b'{"cursor":1,"cursor":2,"metadata":null,"counters":null}'),
    "no UTF-8": _replace(_JSON, lambda _: b'{"cursor":"\xff","metadata":null,"counters":null}'),
    "header length 2^63": _replace(_MODEL, _header({}, length=2**63)),
    "header length over the end": _replace(_MODEL, _header({}, length=1000)),
    "header no JSON": _replace(_MODEL, _header(b"\x80\x04" + b"a" * 100)),
    "header of 100 MB": _replace(_MODEL, _header(b"{" + b" " * 100_000_000 + b"}")),
    "tensors overlap": _replace(_MODEL, _header({"a": _F32, "b": _F32}, data=bytes(4))),
    "tensors with a hole": _replace(_MODEL, _header({"a": {**_F32, "data_offsets": [4, 8]}}, data=bytes(8))),
    "shape overflows": _replace(_MODEL, _header({"a": {**_F32, "shape": [2**62, 4]}}, data=bytes(4))),
    "negative shape": _replace(_MODEL, _header({"a": {**_F32, "shape": [-1, -1]}}, data=bytes(4))),
    "many axes": _replace(_MODEL, _header({"a": {**_F32, "shape": [1] * 100_000}}, data=bytes(4))),
    "other tensors": _replace(_MODEL, _header({"a": _F32}, data=bytes(4))),
    "step is text": _edit(lambda body: body.update(step="8")),
    "step is negative": _edit(lambda body: body.update(step=-1)),
    "step is huge": _edit(lambda body: body.update(step=2**70)),
    "run id is a path": _edit(lambda body: body.update(run_id="../../x")),
    "files is a list": _edit(lambda body: body.update(files=[])),
    "size is huge": _edit(lambda body: body["files"][_MODEL].update(size=2**62)),
    "manifest is a list": _signed(b"]"),
}
# Those that concern nothing which is read.
HARMLESS: dict[str, Attack] = {
    "lock is a link": _link_beside(".lock", "folder/file"),
    "staging is a link": _link_beside(".staging-0123456789abcdef", "folder"),
    "trash is a link": _link_beside(".trash-0123456789abcdef", "folder"),
    "link in staging": _link_beside(".staging-0123456789abcdef/x", "folder"),
    "link in trash to a file": _link_beside(".trash-0123456789abcdef/x", "folder/file"),
}


def hostile(server: Server, case: Case, reference: Reference, *, only: str | None = None) -> Tally:
    """Make every attack on the newest checkpoint and start the run again. Nothing is executed, nothing outside is read
    or written, no attack takes long."""
    tally = Tally()
    whole, saved = stopped_run(server, case, reference)
    newest = saves_in(whole)[-1]
    for name, attack in {**REFUSED, **HARMLESS}.items():
        if only not in (None, name):
            continue
        with workspace() as top:
            root, outside, record = top / "root", top / "outside", top / "record"
            plant(whole, root)
            outside.mkdir()
            attack(root / newest, outside)
            before = snapshot(outside)
            plan = Plan(root=str(top), record=str(record), reads=True, limit=20.0)
            outcome = server.run(case.program, {**case.arguments, "folder": str(root / "run"), "audit": True}, plan)
            problems = _check_outside(outcome, before == snapshot(outside), str(outside), record)
            if name in HARMLESS and outcome.code:
                # To refuse a folder with such a link in it is as good.
                problems = problems or (["unclear: " + outcome.stderr] if ".lock" not in outcome.stderr else [])
            else:
                problems = problems or check_end(reference, outcome)
            if name in REFUSED and not problems and not 0 < outcome.told("resumed")[0] < saved:
                problems = [f"accepted: resumed at {outcome.told('resumed')[0]}"]
            tally.note(f"hostile/{case.name}/{name}", problems, "refused" if name in REFUSED else "harmless")
    return tally


def _check_outside(outcome: Outcome, is_unchanged: bool, outside: str, record: Path) -> list[str]:
    if outcome.told("unpickled"):
        return [f"code executed: {outcome.told('unpickled')} was unpickled"]
    if not is_unchanged:
        return ["wrote outside: files beside the run have changed"]
    reached = [call.path for call in read_record(record) if call.is_below(outside)]
    if reached:
        return [f"reached outside: {reached[0]}"]
    return [f"slow: took {outcome.seconds:.1f} s"] if outcome.seconds > _SECONDS else []
