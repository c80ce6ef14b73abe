"""Whatever stands in a file, a reader gives what is in it or a CheckpointError, soon, in little memory, and reaches
nothing else."""

import os
import pickle
import signal
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import pytest
import safetensors.torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from tests.faults.fuzz import FILES, Subject, attempt, fuzz, make_subjects, mutated, watched
from tests.faults.judge import reference
from tests.faults.server import Server
from trainkit.io.checkpoint import CheckpointError, DamageError, read_model
from trainkit.io.checkpoint.strict_json import decode


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> list[Subject]:
    return make_subjects(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(["tests.faults.fuzz"]) as server:
        yield server


def test_files_as_they_should_be_are_read(subjects: list[Subject]) -> None:
    assert [attempt(subject, {}) for subject in subjects] == [("read", "")] * len(subjects)


@given(random=st.randoms(use_true_random=False), data=st.data())
def test_a_mutated_file_is_refused_or_read(random: Random, data: st.DataObject, subjects: list[Subject]) -> None:
    subject = data.draw(st.sampled_from(subjects))
    _, problem = attempt(subject, mutated(subject, random))
    assert problem == ""


@pytest.mark.parametrize("number", [1000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_many_mutated_files(server: Server, number: int) -> None:
    tally = fuzz(server, FILES, reference(server, FILES), number=number)
    assert tally.failures == []
    assert tally.counts["read"] + tally.counts["refused"] == number
    # Mutations that are all refused at once would show nothing.
    assert tally.counts["read"] > number // 50


@pytest.mark.parametrize("metadata", ["[]", '{"a":false}', '{"a":"\\ud800"}', '{"\\ud800":""}'])
def test_a_header_whose_metadata_safetensors_refuses_is_refused(metadata: str, tmp_path: Path) -> None:
    text = b'{"__metadata__":%s}' % metadata.encode()
    content = len(text).to_bytes(8, "little") + text
    with pytest.raises(SafetensorError):
        safetensors.torch.load(content)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(DamageError, match=r"model\.safetensors: the __metadata__ in its header is no"):
        read_model(tmp_path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"global_step":1%s,"epoch":1.0}' % (b"0" * 400), "has no global_step"),
        (b'{"global_step":1,"epoch":1%s}' % (b"0" * 400), "has epoch 1000"),
        (b'{"global_step":5,"epoch":5e-324}', "has epoch 5e-324 after 5 steps"),
        ('{"global_step":1,"epoch":1.0}'.encode("utf-32"), "no valid JSON"),
    ],
)
def test_progress_that_no_run_makes_is_refused(content: bytes, told: str, subjects: list[Subject]) -> None:
    (subject,) = (each for each in subjects if "trainer_state.json" in each.files)
    (subject.folder / "trainer_state.json").write_bytes(content)
    try:
        with pytest.raises(CheckpointError, match=rf"trainer_state\.json: {told}"):
            subject.read()
    finally:
        (subject.folder / "trainer_state.json").write_bytes(subject.files["trainer_state.json"])


def _refuse(folder: Path) -> None:
    raise CheckpointError(f"{folder}: is no good")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    ("read", "told"),
    [
        (_refuse, ""),
        (lambda folder: (folder / "file").read_bytes(), ""),
        (lambda folder: _refuse(Path("elsewhere")), "unclear: elsewhere"),
        (lambda folder: {}["key"], "KeyError"),
        (lambda folder: Path("/etc/passwd").read_bytes(), "reached: open '/etc/passwd'"),
        (lambda folder: (folder / "../x").exists() or os.open(folder / "../x", os.O_RDONLY), "reached: open"),
        (lambda folder: (folder / "file").write_bytes(b""), "reached: open"),
        (lambda folder: (folder / "file").rename(folder / "other"), "reached: os.rename"),
        (lambda folder: pickle.loads(pickle.dumps(Fraction(1))), "reached: pickle.find_class"),
        (lambda folder: eval("1"), "reached: compile, exec"),
        (lambda folder: b"x" * (100 * 2**20), "took 1"),
        (lambda folder: bytearray(2**31), "MemoryError"),
    ],
)
def test_the_watch_notices(read: Callable[[Path], Any], told: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    status, problem = watched(lambda: read(tmp_path), tmp_path)
    assert (status, told in problem, bool(problem)) == (0, True, bool(told)), problem


def _items(item: str, count: int, ends: str = "[]") -> bytes:
    return (ends[0] + ",".join(item % i for i in range(count)) + ends[1]).encode()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    "content",
    [
        b'"' * 2**24,
        b'["' + b"a" * (2**24 - 10) + "\U0001f600".encode() + b'"]',
        b'["' + b'\\"' * (2**23 - 10) + b'"]',
        _items("%d.5", 1_000_000),
        _items("%d", 1_100_000),
        _items('"%x"', 500_000),
        _items("[%d.5]", 350_000),
        _items('"%x":0.5', 250_000, "{}"),
        _items('"%x":0.5', 800_000, "{}"),
        _items('{"%x":[1]}', 110_000),
        _items('{"":%d}', 500_000),
    ],
    ids=lambda content: f"{content[:12]} {len(content)}",
)
def test_json_of_any_shape_takes_little_memory(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)

    def read() -> None:
        decode((tmp_path / "file").read_bytes(), str(tmp_path))

    assert watched(read, tmp_path, len(content), seconds=5.0) == (0, "")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_watch_ends_what_takes_too_long(tmp_path: Path) -> None:
    def endless() -> None:
        while True:
            pass

    assert watched(endless, tmp_path) == (signal.SIGPROF, "")
