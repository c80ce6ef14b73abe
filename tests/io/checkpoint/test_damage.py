"""Checkpoints that are not what was written: named and passed over, never loaded."""

import hashlib
import json
import os
import random
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trainkit import TrainState, init_state, tree
from trainkit.io.checkpoint import (
    CheckpointError,
    CheckpointWarning,
    DamageError,
    checkpoints,
    latest,
    load,
    load_latest,
    save,
    verify,
)
from trainkit.io.checkpoint.manifest import decode_manifest, digest_of, encode_manifest
from trainkit.io.checkpoint.strict_json import decode
from trainkit.io.checkpoint.tensors import CODES, read_header
from trainkit.optim import adamw, sgd

FILES = ("model.safetensors", "training.safetensors", "training.json", "manifest.json")
Make = Callable[..., TrainState]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, make_state: Make) -> Path:
    """A checkpoint to be copied."""
    return save(tmp_path_factory.mktemp("whole"), make_state(5), cursor={"batch": 5}, metadata=["text"])


@pytest.fixture(scope="module")
def copy(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second checkpoint that is made anew by ``fresh``."""
    return tmp_path_factory.mktemp("copies") / whole.name


def fresh(whole: Path, copy: Path) -> Path:
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(whole, copy)
    return copy


@given(data=st.data())
def test_any_edit_of_any_byte_is_found(data: st.DataObject, whole: Path, copy: Path, make_state: Make) -> None:
    path = fresh(whole, copy)
    file = path / data.draw(st.sampled_from(FILES))
    content = file.read_bytes()
    kind = data.draw(st.sampled_from(["flip", "truncate", "zero", "append", "cut"]))
    at = data.draw(st.integers(0, len(content) - 1))
    if kind == "flip":
        edited = content[:at] + bytes([content[at] ^ (1 << data.draw(st.integers(0, 7)))]) + content[at + 1 :]
    elif kind == "zero":
        edited = content[:at] + bytes(len(content) - at)
    elif kind == "append":
        edited = content + content[at:]
    elif kind == "cut":
        edited = content[:at] + content[at + 1 :]
    else:
        edited = content[:at]
    file.write_bytes(edited)
    for read in (verify, lambda path: load(path, make_state())):
        if edited == content:
            read(path)
        else:
            with pytest.raises(DamageError, match=file.name):
                read(path)


def test_every_bit_of_the_small_files_counts(whole: Path, copy: Path) -> None:
    path = fresh(whole, copy)
    for name in ("manifest.json", "training.json"):
        content = (path / name).read_bytes()
        for position in random.Random(0).sample(range(8 * len(content)), 300):
            edited = bytearray(content)
            edited[position // 8] ^= 1 << position % 8
            (path / name).write_bytes(edited)
            with pytest.raises(DamageError, match=name):
                verify(path)
        (path / name).write_bytes(content)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["missing", "empty", "folder", "link", "dangling", "pipe"])
def test_what_is_no_regular_file_is_refused(name: str, kind: str, whole: Path, copy: Path, make_state: Make) -> None:
    path = fresh(whole, copy)
    (path / name).unlink()
    if kind == "empty":
        (path / name).touch()
    elif kind == "folder":
        (path / name).mkdir()
    elif kind == "link":
        (path / name).symlink_to(whole / name)
    elif kind == "dangling":
        (path / name).symlink_to("nowhere")
    elif kind == "pipe":
        os.mkfifo(path / name)
    for read in (verify, lambda path: load(path, make_state())):
        with pytest.raises(DamageError, match=name):
            read(path)


def test_more_files_are_not_looked_at(whole: Path, copy: Path, make_state: Make) -> None:
    path = fresh(whole, copy)
    os.mkfifo(path / "config.json")
    (path / "link").symlink_to("/")
    assert load(path, make_state()).cursor == {"batch": 5}
    verify(path)


def test_exchanged_files_are_found(whole: Path, copy: Path) -> None:
    path = fresh(whole, copy)
    (path / "model.safetensors").rename(path / "x")
    (path / "training.safetensors").rename(path / "model.safetensors")
    (path / "x").rename(path / "training.safetensors")
    with pytest.raises(DamageError, match=r"model\.safetensors"):
        verify(path)


def test_a_checkpoint_that_is_a_link_is_refused(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-9").symlink_to(whole)
    with pytest.raises(DamageError, match="checkpoint-9"):
        verify(tmp_path / "checkpoint-9")


def _with_manifest(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest as somebody would who knows how its digest is made."""
    fields = json.loads((path / "manifest.json").read_text())
    del fields["digest"]
    change(fields)
    body = b"\n" + json.dumps(fields).encode()[1:]
    # The digest is that of everything after the first line.
    rest = body[1:]
    (path / "manifest.json").write_bytes(b'{"digest":"%s",\n%s' % (digest_of(rest).encode(), rest))


def _set(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(fields: dict[str, Any]) -> None:
        for key in keys[:-1]:
            fields = fields[key]
        fields[keys[-1]] = value

    return change


def _drop(*keys: str) -> Callable[[dict[str, Any]], None]:
    def change(fields: dict[str, Any]) -> None:
        for key in keys[:-1]:
            fields = fields[key]
        del fields[keys[-1]]

    return change


RECORD = {"size": 1, "xxh3_128": "0" * 32}


@pytest.mark.parametrize(
    "change",
    [
        *(
            _drop(name)
            for name in ("format", "version", "run_id", "step", "save_counter", "files", "tensors", "metrics")
        ),
        *(_set("run_id", value=value) for value in ("", "..", "a/b", "a\0", "\uff41", "x" * 129, 3, None, ["a"])),
        *(_set("step", value=value) for value in (-1, 2**63, 1.0, True, "1", None, [])),
        *(_set("save_counter", value=value) for value in (-1, 2**63, 0.5)),
        *(_set("version", value=value) for value in (-1, "1", None, 1.0)),
        *(_set("format", value=value) for value in ("other", None, {})),
        *(_set("files", value=value) for value in ({}, [], None, "x")),
        *(_set("files", name, value=RECORD) for name in ("../x", "/etc/passwd", "a\\b", "CON", "a\u0000", "..", ".")),
        _drop("files", "training.json"),
        _set("files", "training.json", value={"size": 1}),
        _set("files", "training.json", value={"size": -1, "xxh3_128": "0" * 32}),
        _set("files", "training.json", value={"size": 10**18, "xxh3_128": "0" * 32}),
        _set("files", "training.json", value={"size": 1, "xxh3_128": "g" * 32}),
        _set("files", "training.json", value={"size": 1, "xxh3_128": 5}),
        _set("tensors", value={}),
        _drop("tensors", "model.safetensors"),
        _set("tensors", "other.safetensors", value={}),
        _drop("tensors", "model.safetensors", "0.weight"),
        _set("tensors", "model.safetensors", "extra", value=["F32", [1]]),
        _set("tensors", "model.safetensors", "a\nb", value=["F32", [1]]),
        _set("tensors", "model.safetensors", "x" * 513, value=["F32", [1]]),
        _set("tensors", "model.safetensors", "0.weight", value=["F32", [2, 3]]),
        _set("tensors", "model.safetensors", "0.weight", value=["F64", [3, 2]]),
        _set("tensors", "model.safetensors", "0.weight", value=["PICKLE", [3, 2]]),
        _set("tensors", "model.safetensors", "0.weight", value=["F32", [-3, 2]]),
        _set("tensors", "model.safetensors", "0.weight", value=["F32", [2**62, 2**62]]),
        _set("tensors", "model.safetensors", "0.weight", value="F32"),
        _set("tensors", "model.safetensors", "0.weight", value=[["F32"], [3, 2]]),
        _set("metrics", "loss", value="1"),
        _set("metrics", value=[]),
        _set("versions", "torch", value=1),
    ],
)
def test_a_manifest_that_was_made_up_is_refused(
    change: Callable[[dict[str, Any]], None], whole: Path, copy: Path, make_state: Make
) -> None:
    path = fresh(whole, copy)
    _with_manifest(path, change)
    for read in (verify, lambda path: load(path, make_state())):
        with pytest.raises(CheckpointError, match=r"checkpoint-5"):
            read(path)


def test_a_newer_version_is_refused_and_not_passed_over(tmp_path: Path, make_state: Make) -> None:
    save(tmp_path, make_state(1))
    path = save(tmp_path, make_state(2))
    _with_manifest(path, _set("version", value=2))
    for read in (verify, lambda path: load(path, make_state()), lambda path: latest(path.parent)):
        with pytest.raises(CheckpointError, match=r"manifest.json: written in version 2 .* reads up to version 1"):
            read(path)


def _header(text: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + data


def _entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> bytes:
    return json.dumps({"t": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04\x95",
        b"\x80\x04\x95" + bytes(100),
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 100 * 2**20) + bytes(1000),
        _header(b""),
        _header(b"[]"),
        _header(b" {}"),
        _header(b"{}", b"more"),
        _header(b'{"t":1}'),
        _header(_entry(), b"123"),
        _header(_entry(), b"12345"),
        _header(_entry(dtype="F31"), b"1234"),
        _header(_entry(dtype=["F32"]), b"1234"),
        _header(_entry(shape=[2]), b"1234"),
        _header(_entry(shape=[-1]), b"1234"),
        _header(_entry(shape=[2**62, 2**62]), b"1234"),
        _header(_entry(shape=[True]), b"1234"),
        _header(_entry(shape=[0] * 65, offsets=[0, 0])),
        _header(_entry(offsets=[4, 8]), b"12345678"),
        _header(_entry(offsets=[0, 4, 8]), b"1234"),
        _header(_entry(offsets=[4, 0]), b"1234"),
        _header(_entry(offsets=["0", "4"]), b"1234"),
        _header(_entry() + b" ,", b"1234"),
        _header(_entry()[:-1] + b"," + _entry()[1:], b"1234"),
        _header(b"{" + b'"a":{' * 10**5, b""),
        _header(b'{"t":' + b"[" * 10**5 + b"]" * 10**5 + b"}"),
        _header(b'{"t":' + b"9" * 10**5 + b"}"),
        _header(b'{"a":[' + b"1," * (10**6 + 1) + b"1]}"),
    ],
    ids=lambda content: f"{len(content)} bytes",
)
def test_files_of_tensors_that_were_made_up_are_refused(content: bytes, whole: Path, copy: Path) -> None:
    path = fresh(whole, copy)
    (path / "model.safetensors").write_bytes(content)
    record = {"size": len(content), "xxh3_128": digest_of(content)}
    _with_manifest(path, _set("files", "model.safetensors", value=record))
    with pytest.raises(DamageError, match=r"model\.safetensors"):
        verify(path)


@pytest.mark.parametrize(
    "content",
    [
        b'{"counters":{},"cursor":NaN,"metadata":null}',
        b'{"counters":{},"cursor":1e999,"metadata":null}',
        b'{"counters":{},"cursor":1,"cursor":2,"metadata":null}',
        b'{"counters":{},"cursor":1}',
        b'{"counters":{},"cursor":1,"metadata":2,"more":3}',
        b"[]",
        b"\xff\xfe{}",
        b'{"counters":{},"cursor":"\xff","metadata":null}',
        b'{"cursor":' + b"[" * 10**5,
        b'{"cursor":"' + b'\\"' * 10**6,
    ],
    ids=lambda content: repr(content[:60]),
)
def test_json_that_was_made_up_is_refused(content: bytes, whole: Path, copy: Path) -> None:
    path = fresh(whole, copy)
    (path / "training.json").write_bytes(content)
    record = {"size": len(content), "xxh3_128": digest_of(content)}
    _with_manifest(path, _set("files", "training.json", value=record))
    with pytest.raises(DamageError, match=r"training\.json"):
        verify(path)


@pytest.mark.parametrize("name", ["manifest.json", "training.json"])
def test_a_file_of_100_megabytes_is_not_read(name: str, whole: Path, copy: Path) -> None:
    path = fresh(whole, copy)
    os.truncate(path / name, 100 * 2**20)
    with pytest.raises(DamageError, match=rf"{name}: has 104857600 bytes, expected at most 16777216"):
        verify(path)


def test_the_newest_whole_one_is_taken_with_a_warning_for_each_other(
    tmp_path: Path, make_state: Make, bits: Callable[[TrainState], Any]
) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, make_state(step))
    os.truncate(tmp_path / "checkpoint-4" / "model.safetensors", 10)
    (tmp_path / "checkpoint-3" / "manifest.json").unlink()
    with pytest.warns(CheckpointWarning) as caught:
        assert latest(tmp_path) == tmp_path / "checkpoint-2"
    assert [str(warning.message).partition(" ")[0] for warning in caught] == ["checkpoint-4", "checkpoint-3"]
    assert "model.safetensors: has 10 bytes" in str(caught[0].message)
    assert "manifest.json: cannot be read: No such file" in str(caught[1].message)
    assert {warning.filename for warning in caught} == {__file__}
    with pytest.warns(CheckpointWarning) as caught:
        restored = load_latest(tmp_path, make_state())
    assert restored is not None and bits(restored.state) == bits(make_state(2))
    assert len(caught) == 2 and {warning.filename for warning in caught} == {__file__}
    with pytest.warns(CheckpointWarning, match="checkpoint-3 is passed over") as caught:
        assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2", "checkpoint-4"]
    assert {warning.filename for warning in caught} == {__file__}


def test_nothing_starts_anew_where_all_are_damaged(tmp_path: Path, make_state: Make) -> None:
    for step in (1, 2):
        os.truncate(save(tmp_path, make_state(step)) / "training.safetensors", 0)
    with pytest.warns(CheckpointWarning), pytest.raises(CheckpointError, match="none of its 2 checkpoints is whole"):
        latest(tmp_path)
    with pytest.warns(CheckpointWarning), pytest.raises(CheckpointError, match=r"training\.safetensors: has 0 bytes"):
        load_latest(tmp_path, make_state())


def test_a_folder_without_checkpoints_has_none(tmp_path: Path, make_state: Make) -> None:
    assert latest(tmp_path) is None and checkpoints(tmp_path) == []
    assert load_latest(tmp_path / "missing", make_state()) is None
    (tmp_path / "checkpoint-last").mkdir()
    (tmp_path / ".staging-0123456789abcdef").mkdir()
    assert latest(tmp_path) is None
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="Not a directory"):
        latest(tmp_path / "file")


def test_order_is_that_of_the_manifests_whatever_the_times_say(tmp_path: Path, make_state: Make) -> None:
    steps = [1, 2, 10, 30]
    for step in (10, 1, 30, 2):
        save(tmp_path / "run", make_state(step))
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    chance = random.Random(0)
    for _ in range(10):
        for path in (tmp_path / "copy").rglob("*"):
            os.utime(path, (chance.randrange(2**31), chance.randrange(2**31)))
        assert [path.name for path in checkpoints(tmp_path / "copy")] == [f"checkpoint-{step}" for step in steps]
        assert latest(tmp_path / "copy") == tmp_path / "copy" / "checkpoint-30"


def test_the_checkpoint_of_another_model_is_refused_with_what_differs(tmp_path: Path, make_state: Make) -> None:
    path = save(tmp_path, make_state(1))
    with pytest.raises(CheckpointError) as error:
        load(path, make_state(width=4))
    assert "'0.weight' is F32 [3, 2] in the checkpoint, F32 [4, 2] in `like`" in str(error.value)
    assert "'opt_state/exp_avg/0.weight' is F32 [3, 2]" in str(error.value)
    assert not isinstance(error.value, DamageError)
    other = init_state(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3, dtype=torch.bfloat16)), sgd(0.1))
    with pytest.raises(CheckpointError) as error:
        load_latest(tmp_path, other)
    assert "only in `like`: '1.weight' BF16 [3, 3]" not in str(error.value)
    assert "'1.bias' is F32 [3] in the checkpoint, BF16 [3] in `like`" in str(error.value)
    assert "only in the checkpoint: '1.running_mean' F32 [3]" in str(error.value)
    wide = init_state(nn.Sequential(*(nn.Linear(1, 1) for _ in range(30))), adamw(0.1))
    with pytest.raises(CheckpointError, match=r"\.\.\. and \d+ more like this"):
        load(path, wide)


def test_a_file_that_may_not_be_read_is_no_damage(tmp_path: Path, make_state: Make) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    save(tmp_path, make_state(1))
    (save(tmp_path, make_state(2)) / "model.safetensors").chmod(0)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read: Permission denied"):
        latest(tmp_path)


FUZZ = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["F32", "0" * 32, "a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(data=st.data())
def test_whatever_stands_in_a_manifest_only_its_own_error_comes(data: st.DataObject, whole: Path) -> None:
    fields = json.loads((whole / "manifest.json").read_text())
    del fields["digest"]
    node = fields
    # Replace a value somewhere in it.
    while True:
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else list(range(len(node)))))
        if not isinstance(node[key], (dict, list)) or not node[key] or data.draw(st.booleans()):
            break
        node = node[key]
    node[key] = data.draw(FUZZ)
    rest = json.dumps(fields).encode()[1:]
    content = b'{"digest":"%s",\n%s' % (digest_of(rest).encode(), rest)
    message = "manifest.json: "
    try:
        manifest = decode_manifest(content, "manifest.json")
    except CheckpointError as error:
        message = str(error)
    else:
        assert decode_manifest(encode_manifest(manifest), "again") == manifest
    assert message.startswith("manifest.json: ")


@given(content=st.binary(max_size=40) | st.binary(max_size=40).map(lambda text: _header(b"{" + text, b"")))
def test_whatever_stands_in_a_file_of_tensors_only_its_own_error_comes(content: bytes, copy: Path) -> None:
    file = copy.parent / "fuzz"
    file.write_bytes(content)
    fd = os.open(file, os.O_RDONLY)
    message = "fuzz: "
    try:
        read_header(fd, len(content), hashlib.sha256(), "fuzz")
    except DamageError as error:
        message = str(error)
    finally:
        os.close(fd)
    assert message.startswith("fuzz: ")


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 2**24,
        b"[]," * 5_000_000,
        b'"\\"' * 2**22,
        b'{"a":' * 3_000_000,
        b"9" * 2**24,
        b'"' * 2**24,
        b"\\" * 2**24,
    ],
    ids=lambda text: repr(text[:6]),
)
def test_sixteen_megabytes_of_anything_are_refused_quickly(text: bytes) -> None:
    start = time.monotonic()
    with pytest.raises(DamageError, match="hostile"):
        decode(text[: 2**24], "hostile")
    assert time.monotonic() - start < 5


def test_the_first_version_of_the_format_is_read(bits: Callable[[TrainState], Any]) -> None:
    """Written by the first release; stays as it is for good."""
    path = Path(__file__).parent / "golden" / "version-1" / "checkpoint-7"
    expected = golden_state()
    restored = load(path, expected)
    assert bits(restored.state) == bits(expected)
    assert (restored.step, restored.run_id, restored.cursor) == (7, "golden", {"epoch": 1, "batch": [2, None]})
    assert restored.metadata == {"text": "\u00e9\n", "number": 0.1}
    assert verify(path).metrics == {"loss": 0.5, "diverged": None}


def golden_state() -> TrainState:
    """A state with every dtype, empty and scalar tensors, and names that need care."""
    raw = torch.arange(48, dtype=torch.uint8)
    params = {str(dtype): raw.view(dtype).clone() for dtype in CODES if dtype != torch.bool}
    params |= {"bool": raw % 3 == 0, "empty": torch.zeros(0, 3), "scalar": torch.tensor(1.5), "a/b~c": torch.ones(2, 3)}
    return TrainState(
        step=torch.tensor(7),
        params=tree.frozen(params),
        buffers=tree.frozen({"running": torch.arange(3)}),
        opt_state=tree.frozen({"0": tree.frozen(), "1": tree.frozen({"x/y~z": torch.tensor(2)})}),
        key=torch.tensor(-3),
        extra=tree.frozen({"ema": tree.frozen({"\u03b2": torch.ones(1)})}),
    )
