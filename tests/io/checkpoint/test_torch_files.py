"""Files of ``torch.save``: those of optimizers and schedulers are read as torch reads them, those of an enemy are
refused soon and without effect."""

import io
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.faults.fuzz import SECONDS, THEIRS, Subject, attempt, fuzz, make_subjects, mutated, watched
from tests.faults.judge import reference
from tests.faults.pickles import ATTACKS, packed
from tests.faults.server import Server
from trainkit.io.checkpoint import CheckpointError
from trainkit.io.checkpoint.interop import read_torch_file
from trainkit.io.checkpoint.pickles import UnreasonableError, check_pickle

ZEROS = {"data/0": bytes(4)}
TORCH_REFUSES = {
    "deep lists",
    "list in itself",
    "negative stride",
    "stride beyond the end",
    "negative size",
    "storage larger than its file",
}
"""Attacks that the pickle alone does not give away."""
HARMLESS = {("list in itself", "scheduler.pt")}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A checkpoint of the Trainer of transformers."""
    (found,) = (one for one in make_subjects(tmp_path_factory.mktemp("fuzz")) if one.folder.name == "theirs")
    assert found.files.keys() == {"model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"}
    return found


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(["tests.faults.fuzz"]) as server:
        yield server


class TestMutated:
    @given(random=st.randoms(use_true_random=False))
    def test_a_file_is_refused_or_read(self, random: Random, theirs: Subject) -> None:
        _, problem = attempt(theirs, mutated(theirs, random))
        assert problem == ""

    @pytest.mark.parametrize("number", [300, pytest.param(10_000, marks=pytest.mark.slow)])
    def test_many_files(self, server: Server, number: int) -> None:
        tally = fuzz(server, THEIRS, reference(server, THEIRS), number=number, seed=1)
        assert tally.failures == []
        assert tally.counts["read"] + tally.counts["refused"] == number
        assert tally.counts["read"] > number // 10


class TestAttacks:
    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
    @pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt"])
    @pytest.mark.parametrize("name", ATTACKS)
    def test_is_refused_soon_and_without_effect(self, name: str, file: str, theirs: Subject) -> None:
        content = packed(ATTACKS[name], ZEROS)
        # Loads what the error needs.
        assert attempt(theirs, {file: packed(b"\x80\x02cos\nsystem\n.")}) == ("refused", "")

        def read() -> None:
            theirs.read()
            assert (name, file) in HARMLESS

        (theirs.folder / file).write_bytes(content)
        try:
            assert watched(read, theirs.folder.parent, len(content), seconds=SECONDS) == (0, "")
        finally:
            (theirs.folder / file).write_bytes(theirs.files[file])

    @pytest.mark.parametrize("name", [name for name in ATTACKS if name not in TORCH_REFUSES])
    def test_is_refused_before_torch_sees_it(self, name: str) -> None:
        with pytest.raises(UnreasonableError, match=r"^it "):
            check_pickle(ATTACKS[name])

    def test_entries_that_share_bytes(self, theirs: Subject) -> None:
        """Torch makes room for each of them."""
        content = packed(b"\x80\x02}.", {f"data/{i}": bytes(1000) for i in range(3)})
        with pytest.raises(CheckpointError, match=r"optimizer.pt: the files in it have \d+ bytes together, it has"):
            read_with(theirs, "optimizer.pt", overlapping(content, "data/0", 100))

    def test_a_script(self, theirs: Subject) -> None:
        with pytest.raises(CheckpointError, match=r"scheduler.pt: is a TorchScript archive"):
            read_with(theirs, "scheduler.pt", packed(b"\x80\x02}.", {"constants.pkl": b"\x80\x02)."}))


def read_with(subject: Subject, name: str, content: bytes) -> Any:
    (subject.folder / name).write_bytes(content)
    try:
        return subject.read()
    finally:
        (subject.folder / name).write_bytes(subject.files[name])


def overlapping(content: bytes, name: str, copies: int) -> bytes:
    """An archive in which further names mean the bytes of one."""
    out = io.BytesIO(content)
    with zipfile.ZipFile(out, "a") as archive:
        (one,) = (part for part in archive.filelist if part.filename.endswith(name))
        for i in range(copies):
            other = copy(one)
            other.filename = f"archive/data/more{i}"
            archive.filelist.append(other)
        archive.writestr("archive/last", b"")
    return out.getvalue()


def optimizers() -> dict[str, dict[str, Any]]:
    """The states of torch's optimizers after two steps."""
    found = {}
    options: dict[Any, dict[str, Any]] = {
        torch.optim.SGD: {"momentum": 0.9},
        torch.optim.AdamW: {"amsgrad": True, "foreach": False},
        torch.optim.NAdam: {},
        torch.optim.RMSprop: {"centered": True, "momentum": 0.1},
        torch.optim.Adagrad: {},
        torch.optim.Adafactor: {},
        torch.optim.LBFGS: {},
        torch.optim.Rprop: {},
    }
    for kind, own in options.items():
        module = nn.Linear(3, 2)
        optimizer = kind(module.parameters(), lr=0.1, **own)

        def closure(module: nn.Module = module, optimizer: Any = optimizer) -> Any:
            optimizer.zero_grad()
            loss = module(torch.ones(4, 3)).square().sum()
            loss.backward()
            return loss

        for _ in range(2):
            optimizer.step(closure)
        found[kind.__name__] = optimizer.state_dict()
    return found


def schedulers() -> dict[str, dict[str, Any]]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    kinds = torch.optim.lr_scheduler
    made = [
        kinds.LambdaLR(optimizer, lambda step: 1.0),
        kinds.MultiStepLR(optimizer, [2, 5]),
        kinds.CosineAnnealingWarmRestarts(optimizer, 3),
        kinds.OneCycleLR(optimizer, 0.1, total_steps=5),
        kinds.ReduceLROnPlateau(optimizer),
    ]
    return {type(one).__name__: one.state_dict() for one in made}


def marked() -> torch.Tensor:
    tensor = torch.ones(2)
    tensor.mark = "static"  # type: ignore[attr-defined]
    return tensor


class Bag:
    """Not known to torch."""

    def __init__(self, content: int) -> None:
        self.content = content


OTHERS: dict[str, Any] = {
    "dtypes": {str(d): torch.ones(3).to(d) for d in (torch.bfloat16, torch.int8, torch.float8_e5m2, torch.bool)},
    "views": {"a": torch.arange(12.0).reshape(3, 4).t(), "b": torch.ones(()).expand(4), "c": torch.ones(0, 3)},
    "containers": {"a": [1, (2.0, None), {3}], "b": Counter("aab"), "c": OrderedDict(x=1), "d": torch.Size([2, 3])},
    "plain": {"a": 1j, "b": True, "c": 10**100, "d": "\udc80", "e": torch.float16, "f": torch.device("cpu"), 7: b"abc"},
    "module": nn.BatchNorm1d(2).state_dict(),
    "parameters": {"a": nn.Parameter(torch.ones(2)), "b": marked(), "c": torch.ones(2, dtype=torch.complex64).conj()},
    "sparse": {"a": torch.eye(3).to_sparse()},
    "shared": {"a": [(betas := (0.9, (0.99, 0.5))), betas, [betas] * 5]},
}  # fmt: skip


class TestRead:
    @pytest.mark.parametrize(
        "state", [*optimizers().items(), *schedulers().items(), *OTHERS.items()], ids=lambda s: s[0]
    )
    def test_what_is_saved_is_read_as_torch_reads_it(self, state: tuple[str, Any], tmp_path: Path) -> None:
        torch.save(state[1], tmp_path / "file.pt")
        expected = torch.load(tmp_path / "file.pt", weights_only=True)
        found = read_torch_file(tmp_path / "file.pt")
        assert type(found) is type(expected)
        assert described(found) == described(expected)

    def test_random_states_of_numpy(self, tmp_path: Path) -> None:
        state: Any = np.random.RandomState(3).get_state()
        torch.save({"numpy": state}, tmp_path / "file.pt")
        found = read_torch_file(tmp_path / "file.pt", numpy_state=True)["numpy"]
        assert np.array_equal(found[1], state[1]) and found[2:] == state[2:]
        with pytest.raises(CheckpointError, match=r"file.pt: cannot be read"):
            read_torch_file(tmp_path / "file.pt")

    def test_what_was_registered_with_torch_may_be_asked_for(self, tmp_path: Path) -> None:
        torch.save({"bag": Bag(3)}, tmp_path / "file.pt")
        with pytest.raises(CheckpointError, match="Bag', which is no part of a tensor, a number or a container"):
            read_torch_file(tmp_path / "file.pt")
        with torch.serialization.safe_globals([Bag]):
            assert read_torch_file(tmp_path / "file.pt")["bag"].content == 3

    def test_without_checksums(self, tmp_path: Path) -> None:
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            torch.save({"a": torch.ones(2)}, tmp_path / "file.pt")
        finally:
            torch.serialization.set_crc32_options(before)
        assert read_torch_file(tmp_path / "file.pt")["a"].tolist() == [1, 1]


def described(value: Any) -> Any:
    """Texts for all that is in a value, which are equal where the values are."""
    if isinstance(value, torch.Tensor):
        dense = value.to_dense() if value.is_sparse else value
        return type(value), value.dtype, value.stride() if not value.is_sparse else None, repr(dense), vars(value)
    if isinstance(value, dict):
        return type(value), [(described(key), described(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [described(item) for item in value]
    return type(value), repr(value)


class TestTuples:
    def test_the_bound_is_the_size(self) -> None:
        doubled = b"K\x01\x85q\x00" + b"".join(
            b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(3)
        )
        check_pickle(b"\x80\x02" + doubled + b".")
        with pytest.raises(UnreasonableError, match=r"a tuple of 70 entries and 5 levels in 36 bytes"):
            check_pickle(b"\x80\x02" + doubled + b"h\x03h\x03h\x03\x87" + b".")

    def test_levels(self) -> None:
        check_pickle(b"\x80\x02)" + b"\x85" * 90 + b".")
        with pytest.raises(UnreasonableError, match="101 levels"):
            check_pickle(b"\x80\x02)" + b"\x85" * 300 + b".")

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"\x80\x02",
            b"h\x00.",
            b"a.",
            b"t.",
            b"\x80\x02}q",
            b"\xff",
            b"R.",
            b"\x80\x04N.",
            b"X\xff\xff\xff\xff.",
        ],
    )
    def test_what_is_no_pickle(self, data: bytes) -> None:
        with pytest.raises(UnreasonableError, match=r"^it "):
            check_pickle(data)
