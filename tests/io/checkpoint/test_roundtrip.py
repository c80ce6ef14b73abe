"""Save, then load: the identity, bit for bit."""

import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tensordict import TensorDict
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from trainkit import LossOutput, TrainState, init_ema, init_state, make_train_step, tree, with_ema
from trainkit.io.checkpoint import CheckpointError, Saver, load, load_latest, save, verify
from trainkit.io.checkpoint.format import flatten_state, join_path, split_path
from trainkit.io.checkpoint.tensors import CODES, PIECE, empty_like, read_header
from trainkit.optim import adamw, chain, clip_by_global_norm, sgd

INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
KEYS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=20,
)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Random bits of any dtype, in any shape, with any order of the dimensions or with gaps between the elements."""
    dtype = draw(st.sampled_from(list(CODES)))
    shape = draw(st.lists(st.integers(0, 3), min_size=dtype == torch.float4_e2m1fn_x2, max_size=3))
    seed = draw(st.integers(0, 2**31))
    raw = torch.randint(
        0, 256, (*shape, dtype.itemsize), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    if dtype == torch.bool:
        return (raw[..., 0] > 127).reshape(shape)
    whole = raw.reshape(-1).view(dtype).reshape(shape)
    kind = draw(st.sampled_from(["contiguous", "permuted", "gaps"]))
    if kind == "permuted":
        return whole.permute(tuple(draw(st.permutations(range(len(shape))))))
    if kind == "gaps" and shape:
        room = torch.zeros((*shape[:-1], 2 * shape[-1]), dtype=INTEGER[dtype.itemsize]).view(dtype)
        # Not all dtypes have a kernel for copies.
        room[..., ::2].view(INTEGER[dtype.itemsize]).copy_(whole.view(INTEGER[dtype.itemsize]))
        return room[..., ::2]
    return whole


@st.composite
def states(draw: st.DrawFn) -> TrainState:
    names = draw(st.lists(KEYS.filter(lambda name: name != "__metadata__"), unique=True, min_size=2, max_size=4))
    nested = st.recursive(
        st.dictionaries(KEYS, tensors(), max_size=2), lambda inner: st.dictionaries(KEYS, inner | tensors(), max_size=2)
    )
    return TrainState(
        step=torch.tensor(draw(st.integers(0, 2**62))),
        params=tree.frozen({name: draw(tensors()) for name in names[1:]}),
        buffers=tree.frozen({names[0]: draw(tensors())}),
        opt_state=_frozen(draw(nested)),
        key=torch.tensor(draw(st.integers(-(2**63), 2**63 - 1))),
        extra=_frozen(draw(nested)),
    )


def _frozen(nested: dict[str, Any]) -> TensorDict:
    return tree.frozen({k: _frozen(v) if isinstance(v, dict) else v for k, v in nested.items()})


def _structure(node: Any) -> Any:
    """Everything about a tree but its values."""
    if isinstance(node, TensorDict):
        return node.is_locked, node.batch_size, {name: _structure(child) for name, child in node.items()}
    return node.dtype, node.shape, node.stride(), node.device


@given(state=states())
def test_what_was_saved_comes_back(state: TrainState, bits: Callable[[TrainState], Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        restored = load(save(folder, state, allow_nonfinite=True), state)
        assert bits(restored.state) == bits(state)
        for name in ("step", "params", "buffers", "opt_state", "key", "extra"):
            assert _structure(getattr(restored.state, name)) == _structure(getattr(state, name))
        # What was copied first is written as what was not.
        other = Path(folder, "other")
        with Saver(other, allow_nonfinite=True, run_id="r") as saver:
            saver.save(state)
        for file in ("model.safetensors", "training.safetensors", "training.json"):
            assert (other / restored.path.name / file).read_bytes() == (restored.path / file).read_bytes()


@given(cursor=JSON, metadata=JSON)
def test_cursor_and_metadata_come_back(cursor: Any, metadata: Any) -> None:
    state = init_state(nn.Linear(1, 1), sgd(0.1))
    with tempfile.TemporaryDirectory() as folder:
        restored = load(save(folder, state, cursor=cursor, metadata=metadata), state)
    # As JSON, since 1 == True and 1 == 1.0; the order of keys is kept as well.
    assert json.dumps([restored.cursor, restored.metadata]) == json.dumps([cursor, metadata])


@given(keys=st.lists(st.text(), min_size=1))
def test_paths_are_joined_without_loss(keys: list[str]) -> None:
    assert list(split_path(join_path(keys))) == keys


def test_the_dtypes_are_those_of_the_library(tmp_path: Path) -> None:
    shared = {}
    for dtype in {value for value in vars(torch).values() if isinstance(value, torch.dtype)}:
        try:
            raw = torch.zeros(16, dtype=torch.uint8).view(dtype)
            save_file({"t": raw}, tmp_path / "t.safetensors")
            if load_file(tmp_path / "t.safetensors")["t"].dtype == dtype:
                shared[dtype] = safetensors.safe_open(tmp_path / "t.safetensors", "pt").get_slice("t").get_dtype()
        except Exception:
            # Each kind of refusal means the same.
            continue
    assert shared == CODES


def test_the_library_reads_the_files(tmp_path: Path, make_state: Callable[..., TrainState]) -> None:
    state = make_state(4)
    path = save(tmp_path, state)
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    module.load_state_dict(load_file(path / "model.safetensors"))
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, (tree.named(state.params) | tree.named(state.buffers))[name])
    training = load_file(path / "training.safetensors")
    assert training.keys() == flatten_state(state).training.keys()
    assert torch.equal(training["opt_state/exp_avg/0.weight"], state.opt_state["exp_avg"]["0.weight"])
    with safetensors.safe_open(path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_headers_of_the_library_are_read(tmp_path: Path) -> None:
    made = {f"{dtype}": torch.zeros(3, 2, dtype=torch.uint8).view(dtype) for dtype in CODES if dtype.itemsize == 1}
    made |= {"long": torch.arange(5), "half": torch.ones((), dtype=torch.float16), "none": torch.empty(0, 7)}
    save_file(made, tmp_path / "f", metadata={"a": "b"})
    fd = os.open(tmp_path / "f", os.O_RDONLY)
    slots = read_header(fd, (tmp_path / "f").stat().st_size, hashlib.sha256(), "f")
    os.close(fd)
    assert {slot.name: (slot.dtype, slot.shape) for slot in slots} == {
        n: (t.dtype, tuple(t.shape)) for n, t in made.items()
    }


@pytest.mark.parametrize("blocking", [True, False])
def test_a_resumed_run_equals_one_that_was_not_interrupted(
    blocking: bool, tmp_path: Path, bits: Callable[[TrainState], Any]
) -> None:
    module = nn.Linear(3, 2)

    def loss(params: Any, buffers: Any, x: Tensor) -> LossOutput:
        return LossOutput(nn.functional.linear(x, params["weight"], params["bias"]).square().sum(), len(x))

    tx = chain(clip_by_global_norm(0.5), adamw(0.1))
    step = with_ema(make_train_step(loss, tx), 0.9)
    batches = torch.randn(6, 4, 3).unbind()
    state = init_ema(init_state(module, tx))
    whole = state
    for batch in batches:
        whole, _ = step(whole, batch)
    for batch in batches[:3]:
        state, _ = step(state, batch)
    if blocking:
        save(tmp_path, state)
    else:
        with Saver(tmp_path) as saver:
            saver.save(state)
    restored = load_latest(tmp_path, init_ema(init_state(nn.Linear(3, 2), tx, seed=5)))
    assert restored is not None and restored.step == 3
    state = restored.state
    for batch in batches[3:]:
        state, _ = step(state, batch)
    assert bits(state) == bits(whole)


def test_like_gives_the_layout_and_is_not_changed(tmp_path: Path, bits: Callable[[TrainState], Any]) -> None:
    def state_of(weight: Tensor) -> TrainState:
        base = init_state(nn.Linear(1, 1), sgd(0.1))
        return base.replace(params=tree.frozen({"weight": weight}))

    saved = state_of(torch.randn(2, 3, 4, 5))
    like = state_of(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last))
    before = bits(like)
    restored = load(save(tmp_path, saved), like).state
    assert bits(like) == before
    assert bits(restored) == bits(saved)
    assert restored.params["weight"].stride() == like.params["weight"].stride() != saved.params["weight"].stride()


@pytest.mark.parametrize("tensor", [torch.zeros(1).expand(3), torch.zeros(5).as_strided((3, 3), (1, 1))])
def test_elements_that_share_memory_get_their_own(tensor: Tensor) -> None:
    new = empty_like(tensor)
    assert new.is_contiguous() and new.shape == tensor.shape


def test_conjugated_views_are_saved_by_value(tmp_path: Path) -> None:
    weight = torch.randn(3, dtype=torch.complex64).conj()
    state = init_state(nn.Linear(1, 1), sgd(0.1)).replace(params=tree.frozen({"weight": weight}))
    assert torch.equal(load(save(tmp_path, state), state).state.params["weight"], weight)


def test_a_state_of_a_population_comes_back(tmp_path: Path) -> None:
    states = [init_state(nn.Linear(2, 1), adamw(0.1), seed=i) for i in range(3)]
    stacked: TrainState = pytree.tree_map(lambda *leaves: torch.stack(leaves), *states)
    restored = load(save(tmp_path, stacked), stacked)
    assert torch.equal(restored.state.key, torch.arange(3)) and restored.step == 0
    assert restored.state.params.batch_size == stacked.params.batch_size


def test_the_manifest_says_what_is_there(tmp_path: Path, make_state: Callable[..., TrainState]) -> None:
    first = verify(save(tmp_path, make_state(1), run_id="run-1"))
    second = verify(save(tmp_path, make_state(2)))
    assert (first.order, second.order, second.run_id) == ((1, 1), (2, 2), "run-1")
    assert str(first.tensors["model.safetensors"]["0.weight"]) == "F32 [3, 2]"
    text = (tmp_path / "checkpoint-1" / "manifest.json").read_text()
    assert json.loads(text)["format"] == "trainkit.checkpoint" and len(text.splitlines()) == 10


def test_a_bit_is_found_wherever_it_is_in_a_large_file(tmp_path: Path, make_state: Callable[..., TrainState]) -> None:
    """Large enough for several pieces, each read while the one before is digested, and small leaves between them."""
    sizes = [PIECE // 4 + 3, 5, 1, 3 * PIECE // 4 + 7, 2, PIECE // 16, 9]
    tensors = {f"{i}": torch.randn(size) for i, size in enumerate(sizes)}
    state = make_state(1).replace(params=tree.frozen(tensors))
    path = save(tmp_path, state)
    before = threading.active_count()
    for name, tensor in load(path, state).state.params.items():
        assert torch.equal(tensor, tensors[name])
    verify(path)
    file = path / "model.safetensors"
    with file.open("r+b") as raw:
        for place in (*range(PIECE // 2, file.stat().st_size, PIECE // 2), file.stat().st_size - 1):
            was = os.pread(raw.fileno(), 1, place)
            os.pwrite(raw.fileno(), bytes([was[0] ^ 4]), place)
            for check in (verify, lambda path: load(path, state)):
                with pytest.raises(CheckpointError, match=r"model\.safetensors: its digest is"):
                    check(path)
            os.pwrite(raw.fileno(), was, place)
    verify(path)
    assert threading.active_count() == before


def test_saving_the_same_step_again_replaces_it(
    tmp_path: Path, make_state: Callable[..., TrainState], bits: Callable[[TrainState], Any]
) -> None:
    save(tmp_path, make_state(3))
    other = make_state(3, key=99)
    path = save(tmp_path, other, metadata="second")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".lock", "checkpoint-3"]
    restored = load(path, make_state())
    assert bits(restored.state) == bits(other) and restored.metadata == "second"
