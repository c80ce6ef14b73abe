"""Bad input is refused before anything is written, with the argument, what came and what was expected."""

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainkit import LossOutput, TrainState, init_state, make_train_step, raise_nonfinite, tree
from trainkit.io.checkpoint import (
    CheckpointError,
    CheckpointWarning,
    Retention,
    Saver,
    checkpoints,
    latest,
    load,
    save,
    verify,
)
from trainkit.io.checkpoint.strict_json import encode
from trainkit.optim import sgd
from trainkit.transforms import NonfiniteError
from trainkit.types import Buffers, Params

Make = Callable[..., TrainState]


def _with(**tensors: Tensor) -> TrainState:
    return init_state(nn.Linear(1, 1), sgd(0.1)).replace(params=tree.frozen(tensors))


def _extra(value: Any) -> TrainState:
    return init_state(nn.Linear(1, 1), sgd(0.1)).replace(extra=value)


class Odd(Tensor):
    pass


@pytest.mark.parametrize(
    ("state", "kind", "text"),
    [
        (lambda: _with(w=torch.zeros(1, dtype=torch.complex128)), ValueError, "'w' is of torch.complex128"),
        (lambda: _with(w=torch.zeros(2, 2).to_sparse()), ValueError, "'w' is of layout torch.sparse_coo"),
        (lambda: _with(w=torch.zeros(1, device="meta")), ValueError, "'w' is of layout .* on meta"),
        (lambda: _with(w=torch.zeros(1).as_subclass(Odd)), TypeError, "'w' is a Odd, expected a torch.Tensor"),
        (lambda: _with(**{"a\0b": torch.zeros(1)}), ValueError, "control characters"),
        (lambda: _with(__metadata__=torch.zeros(1)), ValueError, "reserved by safetensors"),
        (lambda: _with(**{"x" * 600: torch.zeros(1)}), ValueError, "has 600 characters"),
        (lambda: _with(w=tree.frozen({"v": torch.zeros(1)})), TypeError, "is a tree"),
        (lambda: _with(w=torch.zeros((), dtype=torch.uint8).view(torch.float4_e2m1fn_x2)), ValueError, "float4"),
        (lambda: _extra(tree.frozen({"e": tree.frozen({"x\n": torch.zeros(1)})})), ValueError, "control characters"),
        (lambda: _extra(torch.zeros(1)).replace(step=torch.tensor(-1), extra=tree.frozen()), ValueError, "got -1"),
    ],
)
def test_states_that_cannot_be_stored(
    state: Callable[[], TrainState], kind: type[Exception], text: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=text):
        save(tmp_path / "run", state())
    assert not (tmp_path / "run").exists()
    with Saver(tmp_path / "run") as saver:
        with pytest.raises(kind, match=text):
            saver.save(state())
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_name_that_is_a_parameter_and_a_buffer(tmp_path: Path) -> None:
    state = _with(w=torch.zeros(1))
    with pytest.raises(ValueError, match="'w' is the name of a parameter and of a buffer"):
        save(tmp_path, state.replace(buffers=state.params))


def _deep(depth: int) -> Any:
    return [] if depth == 0 else [_deep(depth - 1)]


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        ((1, 2), TypeError, r"cursor: is a tuple"),
        ({"a": [{1: 2}]}, TypeError, r"cursor.a\[0\]: has the key 1"),
        ({"a": float("nan")}, ValueError, r"cursor.a: is nan"),
        ([float("-inf")], ValueError, r"cursor\[0\]: is -inf"),
        (torch.tensor(1), TypeError, r"cursor: is a Tensor"),
        ({"a": b"x"}, TypeError, r"cursor.a: is a bytes"),
        ([{1, 2}], TypeError, r"cursor\[0\]: is a set"),
        (2**5000, ValueError, r"cursor: is an integer of 5001 bits"),
        (_deep(70), ValueError, r"nested deeper than 64"),
        ([0] * 1_000_001, ValueError, r"more than 1000000 values"),
        ("x" * (17 * 2**20), ValueError, r"bytes of JSON, expected at most 16777216"),
    ],
    ids=["tuple", "key", "nan", "inf", "tensor", "bytes", "set", "large integer", "deep", "many", "long"],
)
def test_cursors_that_are_no_json(
    value: Any, kind: type[Exception], text: str, tmp_path: Path, make_state: Make
) -> None:
    with pytest.raises(kind, match=text):
        encode(value, "cursor")
    with pytest.raises(kind, match=text):
        save(tmp_path, make_state(), cursor=value)
    with pytest.raises(kind, match=text.replace("cursor", "metadata")):
        save(tmp_path, make_state(), metadata=value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("run_id", ["", "..", "a b", "a/b", "x" * 129, "\u00e9"])
def test_unsafe_names_of_runs(run_id: str, tmp_path: Path, make_state: Make) -> None:
    with pytest.raises(ValueError, match="run_id: got"):
        save(tmp_path, make_state(), run_id=run_id)
    with pytest.raises(ValueError, match="run_id: got"):
        Saver(tmp_path, run_id=run_id)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2, torch.complex64])
def test_weights_that_are_not_finite_are_saved_only_when_told(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    state = _with(good=torch.zeros(2), bad=torch.tensor([0.0, value]).to(dtype))
    with pytest.raises(CheckpointError, match=r"step 0: parameter 'bad' is not finite"):
        save(tmp_path, state)
    with pytest.raises(CheckpointError, match=r"step 0: parameter 'bad' is not finite"):
        with Saver(tmp_path) as saver:
            saver.save(state)
    assert checkpoints(tmp_path) == []
    save(tmp_path / "told", state, allow_nonfinite=True)
    with Saver(tmp_path, allow_nonfinite=True) as saver:
        saver.save(state)
        assert saver.wait() == tmp_path / "checkpoint-0"


def _loss(params: Params, buffers: Buffers, batch: dict[str, Tensor]) -> LossOutput:
    """Finite, with a gradient that is not where ``gate`` is 0; neither is where ``x`` is not."""
    weights = params["w"]
    return LossOutput((weights * batch["x"]).sum() + (weights.abs() * batch["gate"]).sqrt().sum(), 1)


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("where", ["loss", "gradient", "parameter"])
def test_nothing_is_announced_once_a_run_is_not_finite(where: str, watched: bool, tmp_path: Path) -> None:
    tx = sgd(0.1)
    plain = make_train_step(_loss, tx)
    step = raise_nonfinite(plain) if watched else plain
    state = init_state(nn.Linear(1, 1), tx).replace(params=tree.frozen({"w": torch.ones(2)}))
    state = state.replace(opt_state=tx.init(state.params))

    def train(state: TrainState, saver: Saver) -> None:
        for i in range(1, 7):
            bad = i == 4
            if bad and where == "parameter":
                state = state.replace(params=tree.frozen({"w": torch.tensor([1.0, torch.nan])}))
            batch = {"x": torch.ones(2), "gate": torch.ones(2)}
            if bad and where != "parameter":
                batch["x" if where == "loss" else "gate"] = torch.tensor([1.0, torch.nan if where == "loss" else 0.0])
            state, _ = step(state, batch)
            saver.save(state)

    said = "loss is nan|parameter 'w' holds" if watched else "parameter 'w' is not finite"
    with pytest.raises(NonfiniteError if watched else CheckpointError, match=rf"^step 4: {said}"):
        with Saver(tmp_path, keep=Retention(last=None)) as saver:
            train(state, saver)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    restored = load(tmp_path / "checkpoint-3", state)
    assert restored.state.params["w"].isfinite().all()


def test_buffers_may_be_infinite(tmp_path: Path) -> None:
    state = _with(w=torch.zeros(1)).replace(buffers=tree.frozen({"mask": torch.tensor([0.0, -torch.inf])}))
    assert torch.equal(load(save(tmp_path, state), state).state.buffers["mask"], state.buffers["mask"])


def test_the_folder_of_another_run_is_refused(tmp_path: Path, make_state: Make) -> None:
    save(tmp_path, make_state(1), run_id="first")
    with pytest.raises(CheckpointError, match="has checkpoints of the run 'first', this is 'second'"):
        save(tmp_path, make_state(2), run_id="second")
    for arguments in ({}, {"run_id": "second"}):
        with pytest.raises(
            CheckpointError, match=r"has checkpoints of the run 'first', .*resumed_from.*overwrite=True"
        ):
            Saver(tmp_path, **arguments)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1"]
    with Saver(tmp_path, resumed_from=tmp_path / "checkpoint-1") as saver:
        assert saver.run_id == "first"
        saver.save(make_state(2))
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]


def test_a_run_that_goes_on_in_another_folder_keeps_its_name(tmp_path: Path, make_state: Make) -> None:
    path = save(tmp_path / "old", make_state(1), run_id="first")
    with Saver(tmp_path / "new", resumed_from=path) as saver:
        assert saver.run_id == "first"
    with pytest.raises(CheckpointError, match="checkpoint-9: cannot be read"):
        Saver(tmp_path / "new", resumed_from=tmp_path / "checkpoint-9")


@pytest.mark.parametrize("step", [1, 5])
def test_what_is_overwritten_stays_until_there_is_something_new(tmp_path: Path, make_state: Make, step: int) -> None:
    save(tmp_path, make_state(5), run_id="first")
    with Saver(tmp_path, overwrite=True) as saver:
        assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-5"]
        saver.save(make_state(step))
        assert saver.wait() == tmp_path / f"checkpoint-{step}"
        assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{step}"]
        assert verify(tmp_path / f"checkpoint-{step}").run_id == saver.run_id


def test_what_is_no_checkpoint_of_this_run_is_set_aside(tmp_path: Path, make_state: Make) -> None:
    foreign = tmp_path / "checkpoint-1"
    foreign.mkdir()
    (foreign / "pytorch_model.bin").write_bytes(b"somebody's")
    with pytest.warns(CheckpointWarning, match=r"checkpoint-1: what was there .* now checkpoint-1\.replaced-"):
        save(tmp_path, make_state(1))
    (aside,) = tmp_path.glob("checkpoint-1.replaced-*")
    assert (aside / "pytorch_model.bin").read_bytes() == b"somebody's"
    verify(foreign)


def test_the_manifest_of_another_step_is_found(tmp_path: Path, make_state: Make) -> None:
    old, new = save(tmp_path, make_state(2)), save(tmp_path, make_state(8))
    shutil.copyfile(old / "manifest.json", new / "manifest.json")
    with pytest.warns(CheckpointWarning, match=r"manifest.json: is of step 2, in the folder of step 8"):
        assert latest(tmp_path) == old
    # Under a name of one's own a copy is as good.
    shutil.copytree(old, tmp_path / "best")
    assert load(tmp_path / "best", make_state(0)).step == 2


def test_nothing_is_written_or_deleted_through_a_link(tmp_path: Path, make_state: Make) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"precious")
    run = tmp_path / "run"
    run.mkdir()
    for name in ("checkpoint-1", ".staging-0123456789abcdef", ".trash-0123456789abcdef"):
        (run / name).symlink_to(outside)
    left = run / ".staging-fedcba9876543210"
    left.mkdir()
    (left / "link").symlink_to(outside)
    with Saver(run, keep=Retention(last=1)) as saver:
        saver.save(make_state(1))
        with pytest.warns(CheckpointWarning, match="checkpoint-1"):
            saver.wait()
        saver.save(make_state(2))
    assert (outside / "file").read_bytes() == b"precious" and len(list(outside.iterdir())) == 1
    (aside,) = run.glob("*.replaced-*")
    assert aside.is_symlink()
    assert {path.name for path in run.iterdir()} == {".lock", "checkpoint-2", aside.name}


def test_a_lock_that_is_a_link_is_refused(tmp_path: Path, make_state: Make) -> None:
    (tmp_path / "target").write_bytes(b"precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "target")
    with pytest.raises(CheckpointError, match=r"\.lock: cannot be opened"):
        save(tmp_path / "run", make_state())
    assert (tmp_path / "target").read_bytes() == b"precious"


def test_the_folder_itself_may_be_a_link(tmp_path: Path, make_state: Make) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    verify(save(tmp_path / "run", make_state(1)))
    assert (tmp_path / "disk" / "checkpoint-1").is_dir()


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_modes_follow_the_umask(mask: int, tmp_path: Path, make_state: Make) -> None:
    before = os.umask(mask)
    try:
        path = save(tmp_path / "run", make_state())
    finally:
        os.umask(before)
    found = {entry: stat.S_IMODE(entry.stat().st_mode) for entry in [path, *path.iterdir()]}
    assert found == {entry: (0o777 if entry.is_dir() else 0o666) & ~mask for entry in found}


def test_nothing_of_the_environment_is_written(
    tmp_path: Path, make_state: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    path = save(tmp_path / "secret_folder", make_state(1))
    written = b"".join(file.read_bytes() for file in path.iterdir())
    for text in ("hf_canary", "secret_folder", str(Path.home()), os.uname().nodename):
        assert text.encode() not in written or text == "/"


def test_a_folder_that_cannot_be_made_or_written(tmp_path: Path, make_state: Make) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match=r"cannot save: .*errno"):
            save(folder, make_state())
        with pytest.raises(CheckpointError, match=r"cannot save: .*errno"):
            Saver(folder)


def test_retention_rules_are_checked() -> None:
    bad: list[dict[str, Any]] = [
        {"last": 0}, {"best": -1}, {"best": 1}, {"mode": "least"}, {"every": 0},
    ]  # fmt: skip
    for arguments in bad:
        with pytest.raises(ValueError, match=next(iter(arguments))):
            Retention(**arguments)
