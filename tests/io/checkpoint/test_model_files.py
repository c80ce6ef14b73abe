"""Model files: other tools read what is written, and nothing that they could not have written is read."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainkit import TrainState, init_state
from trainkit.io.checkpoint import CheckpointError
from trainkit.io.checkpoint.model_files import INDEX, export_model, import_model, read_model
from trainkit.optim import adamw, sgd


class Tied(nn.Module):
    """Tied weights, statistics, a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.a_head = nn.Linear(3, 5, bias=False)
        self.a_head.weight = self.embedding.weight
        self.register_buffer("table", torch.randn(7), persistent=False)


def tensors() -> dict[str, Tensor]:
    return {
        "b": torch.randn(4, 6),
        "a": torch.randn(3).bfloat16(),
        "empty": torch.zeros(0, 2),
        "c": torch.randn(6, 4).t(),
        "scalar": torch.tensor(3),
        "view": torch.randn(10)[2:5],
        "large": torch.randn(100),
        "expanded": torch.ones(1).expand(4),
    }


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("max_shard_bytes", [10**9, 200, 1])
def test_tensors_come_back_and_the_library_reads_them(tmp_path: Path, max_shard_bytes: int) -> None:
    folder = export_model(tensors() | {"same": (values := torch.randn(3)), "again": values}, tmp_path / "m")
    back = read_model(folder)
    folder = export_model(back, tmp_path / "shards", max_shard_bytes=max_shard_bytes)
    assert_equal(read_model(folder), back)
    by_library: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        by_library |= load_file(file)
    assert_equal(by_library, back)
    assert (folder / INDEX).exists() == (max_shard_bytes < 10**9)
    assert_equal(read_model(tmp_path / "m" / "model.safetensors"), back)


@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=12), limit=st.integers(1, 100))
def test_shards_are_those_of_huggingface_hub(sizes: list[int], limit: int, tmp_path_factory: Any) -> None:
    import huggingface_hub as hub

    # Of different storages: that library keeps views of one storage together.
    named = {f"t{i}": torch.zeros(n, dtype=torch.uint8) for i, n in enumerate(sizes)}
    folder = export_model(named, tmp_path_factory.mktemp("m") / "m", max_shard_bytes=limit)
    files = {file.name for file in folder.glob("*.safetensors")}
    held = [sum(t.numel() for t in load_file(folder / file).values()) for file in files]
    # A shard is larger than the limit only if it is one tensor.
    assert all(total <= limit or total in sizes for total in held)
    if len(files) > 1:
        index = json.loads((folder / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(sizes)
        plan = hub.split_torch_state_dict_into_shards(named, max_shard_size=limit)
        # The library gives what exceeds a shard a place of its own before the shard that was begun.
        assert len(files) <= len(plan.filename_to_tensors) + 1
        assert set(index["weight_map"].values()) == files


def test_a_module_and_its_state_give_the_same_file(tmp_path: Path) -> None:
    module = Tied()
    of_module = read_model(export_model(module, tmp_path / "module"))
    state = init_state(module, sgd(0.1))
    assert_equal(read_model(export_model(state, tmp_path / "state", module=module)), of_module)
    assert sorted(of_module) == sorted({*module.state_dict()} - {"a_head.weight"})
    # Without the module nobody knows what it saves: all buffers are written.
    assert "table" in read_model(export_model(state, tmp_path / "all"))


def test_import_fills_a_state_exactly(tmp_path: Path) -> None:
    module, other = Tied(), Tied()
    state = init_state(other, adamw(0.1), seed=4).replace(step=torch.tensor(9))
    source = init_state(module, adamw(0.1))
    new = import_model(export_model(source, tmp_path / "m", module=module), state, module=other)
    for name, tensor in source.params.items():
        assert torch.equal(new.params[name], tensor)
    assert torch.equal(new.buffers["table"], state.buffers["table"])
    assert (int(new.step), int(new.key)) == (9, 4)
    assert new.opt_state is state.opt_state
    assert torch.equal(state.params["embedding.weight"], other.embedding.weight)


def test_tied_weights_may_have_their_other_name(tmp_path: Path) -> None:
    module = Tied()
    state = init_state(Tied(), sgd(0.1))
    # The first name by the alphabet, as safetensors' own save_model chooses.
    named = {n: t for n, t in module.state_dict().items() if n != "embedding.weight"}
    save_file(named, tmp_path / "model.safetensors")
    new = import_model(tmp_path, state, module=module)
    assert torch.equal(new.params["embedding.weight"], module.embedding.weight)
    with pytest.raises(CheckpointError, match="Give module, if the names differ only by tied weights"):
        import_model(tmp_path, state)
    save_file(named | {"embedding.weight": torch.zeros(5, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'embedding.weight' and 'embedding.weight'|differ, and are one tensor"):
        import_model(tmp_path, state, module=module)


def test_another_model_is_refused_with_names_and_shapes(tmp_path: Path) -> None:
    folder = export_model(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), tmp_path / "m")
    state = init_state(nn.Sequential(nn.Linear(2, 4), nn.Identity(), nn.Linear(4, 1)), sgd(0.1))
    before = {name: t.clone() for name, t in state.params.items()}
    with pytest.raises(CheckpointError) as caught:
        import_model(folder, state)
    text = str(caught.value)
    for part in (
        "only in the state: 2.weight, 2.bias",
        "only in the file: 1.bias, 1.weight",
        "0.weight (3, 2) for (4, 2)",
    ):
        assert part in text
    assert all(torch.equal(t, before[name]) for name, t in state.params.items())


def test_the_folder_is_new_or_nothing_changes(tmp_path: Path) -> None:
    module = nn.Linear(2, 1)
    folder = export_model(module, tmp_path / "deep" / "m")
    content = {file.name: file.read_bytes() for file in folder.iterdir()}
    for taken in (folder, folder / "model.safetensors"):
        with pytest.raises(CheckpointError, match="is there already"):
            export_model(nn.Linear(2, 1), taken)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == content
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "link").symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match="is there already"):
        export_model(module, tmp_path / "link")
    assert not list(elsewhere.iterdir())
    export_model(module, elsewhere)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_an_error_on_the_way_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import resource, sys, torch\n"
        "from trainkit.io.checkpoint.model_files import export_model\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "export_model({f't{i}': torch.zeros(900) for i in range(3)} | {'big': torch.zeros(2000)}, sys.argv[1],\n"
        "             max_shard_bytes=4000)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m")], capture_output=True, text=True)
    assert "CheckpointError" in result.stderr and "File too large" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_rights_follow_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        folder = export_model(tensors(), tmp_path / "m", max_shard_bytes=200)
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o666 & ~umask}


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (3, "model: got int"),
        ({"a": 3}, "'a' is a int"),
        ({"": torch.ones(1)}, "has 0 characters"),
        ({"a\n": torch.ones(1)}, "has control characters"),
        ({"__metadata__": torch.ones(1)}, "is reserved"),
        ({"a": torch.ones(1, device="meta")}, "on meta"),
        ({"a": torch.ones(1, dtype=torch.complex128)}, "complex128"),
        ({"a": torch.ones(2).to_sparse()}, "cannot hold"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path: Path, model: Any, text: str) -> None:
    with pytest.raises((TypeError, ValueError), match=text):
        export_model(model, tmp_path / "m")
    with pytest.raises(ValueError, match="max_shard_bytes: got 0"):
        export_model(tensors(), tmp_path / "m", max_shard_bytes=0)
    with pytest.raises(TypeError, match="only a state needs one"):
        export_model(tensors(), tmp_path / "m", module=nn.Linear(1, 1))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return export_model(
        {n: torch.full((50,), float(i)) for i, n in enumerate("abc")}, tmp_path / "m", max_shard_bytes=300
    )


def set_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/tmp/secret.safetensors", "..", "a/b.safetensors", "a\0.safetensors", "", 7, None],
)
def test_an_index_cannot_lead_elsewhere(sharded: Path, name: Any) -> None:
    save_file({"b": torch.ones(50)}, sharded.parent / "secret.safetensors")
    set_index(sharded, lambda index: index["weight_map"].update(b=name))
    with pytest.raises(CheckpointError, match="expected the plain name of a safetensors file"):
        read_model(sharded)


def second(folder: Path) -> Path:
    return folder / "model-00002-of-00003.safetensors"


def replaced_by_link(folder: Path) -> None:
    target = second(folder).rename(folder.parent / "target.safetensors")
    second(folder).symlink_to(target)


def repeated_key(folder: Path) -> None:
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace('{"a":', '{"a":"model-00002-of-00003.safetensors","a":'))


def pickled(folder: Path) -> None:
    torch.save({"b": torch.ones(50)}, second(folder))


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (replaced_by_link, "model-00002-of-00003.safetensors: is a link"),
        (lambda f: second(f).unlink(), "model-00002-of-00003.safetensors: .*No such file"),
        (lambda f: second(f).write_bytes(b""), "model-00002-of-00003.safetensors: 0 bytes are too few"),
        (lambda f: second(f).write_bytes(second(f).read_bytes()[:-1]), "one after the other"),
        (
            lambda f: os.mkfifo(second(f).with_name("x.safetensors")) or os.replace(f / "x.safetensors", second(f)),
            "regular",
        ),
        (pickled, "model-00002-of-00003.safetensors: .*no safetensors file"),
        (lambda f: save_file({"x": torch.ones(1)}, second(f)), "holds other tensors than .* says: b, x"),
        (lambda f: save_file({"b": torch.ones(1), "a": torch.ones(1)}, second(f)), "holds other tensors .*: a"),
        (repeated_key, "the key 'a' is there twice"),
        (lambda f: set_index(f, lambda index: index.pop("weight_map")), "has no weight_map"),
        (lambda f: (f / INDEX).write_text("[" * 10**5), "nested deeper"),
        (lambda f: (f / INDEX).write_bytes(bytes(17 * 2**20)), "expected at most"),
        (lambda f: save_file({"a": torch.ones(1)}, f / "model.safetensors"), "has both"),
    ],
)
def test_damage_and_deceit_are_refused_by_name(sharded: Path, damage: Callable[[Path], Any], text: str) -> None:
    assert len(read_model(sharded)) == 3
    damage(sharded)
    with pytest.raises(CheckpointError, match=text):
        read_model(sharded)


@settings(max_examples=200)
@given(data=st.data())
def test_a_changed_file_is_refused_or_another_model_of_the_same_form(
    tmp_path_factory: Any, data: st.DataObject
) -> None:
    folder = export_model({n: torch.zeros(5) for n in "abc"}, tmp_path_factory.mktemp("m") / "m", max_shard_bytes=30)
    file = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    file.write_bytes(content)
    # There is no digest: values, names and dtypes may have changed.
    with suppress(CheckpointError):
        found = read_model(folder)
        assert sum(t.numel() * t.itemsize for t in found.values()) == 60


def test_a_state_comes_back_bit_for_bit(tmp_path: Path, make_state: Callable[..., TrainState]) -> None:
    state = make_state(3)
    same = import_model(export_model(state, tmp_path / "m"), make_state(4))
    assert all(torch.equal(same.params[name], t) for name, t in state.params.items())
    assert all(torch.equal(same.buffers[name], t) for name, t in state.buffers.items())


def test_complex_weights_for_a_real_model_are_refused(tmp_path: Path, make_state: Callable[..., TrainState]) -> None:
    state = make_state(3)
    save_file({name: t.to(torch.complex64) for name, t in state.params.items()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"(?s)model.safetensors: is another model .* complex, for real ones: "):
        import_model(tmp_path / "model.safetensors", state)
