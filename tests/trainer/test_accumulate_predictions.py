"""Predictions of many batches joined once, beside the containers of transformers 4.57."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from transformers import BatchEncoding
from transformers.modeling_outputs import BaseModelOutput
from transformers.trainer_pt_utils import (
    EvalLoopContainer,
    find_batch_size,
)
from transformers.trainer_pt_utils import (
    nested_detach as hf_nested_detach,
)
from transformers.trainer_pt_utils import (
    nested_truncate as hf_nested_truncate,
)

from trainkit.trainer.accumulate_predictions import (
    Predictions,
    batch_rows,
    nested_detach,
    nested_numpify,
    nested_truncate,
)

Pair = namedtuple("Pair", ["a", "b"])
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool]


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, np.ndarray):
        return found.dtype == expected.dtype and found.shape == expected.shape and np.array_equal(found, expected)
    if isinstance(expected, dict):
        return (
            type(found) is type(expected)
            and list(found) == list(expected)
            and all(same(found[k], v) for k, v in expected.items())
        )
    if isinstance(expected, (list, tuple)):
        return type(found) is type(expected) and len(found) == len(expected) and all(map(same, found, expected))
    return found is expected


def random_tensor(draw: st.DrawFn, rows: int, rank: int, dtype: torch.dtype) -> torch.Tensor:
    shape = [rows, draw(st.integers(0, 4)), 3][:rank]
    numbers = torch.randint(-50, 50, shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    return numbers.to(dtype)


@st.composite
def runs(draw: st.DrawFn) -> list[Any]:
    """Batches of one random structure, whose rows and lengths in dimension 1 vary."""
    kinds = draw(st.lists(st.tuples(st.integers(1, 3), st.sampled_from(DTYPES)), min_size=1, max_size=3))
    shape = draw(st.sampled_from(["tensor", "tuple", "list", "dict", "nested"]))

    def batch() -> Any:
        rows = draw(st.integers(1, 3))
        parts = [random_tensor(draw, rows, rank, dtype) for rank, dtype in kinds]
        return {
            "tensor": parts[0],
            "tuple": tuple(parts),
            "list": parts,
            "dict": {f"k{i}": part for i, part in enumerate(parts)},
            "nested": (parts[0], {"deep": [*parts]}),
        }[shape]

    return [batch() for _ in range(draw(st.integers(1, 4)))]


def gathered(batches: list[Any], **options: Any) -> Any:
    predictions = Predictions(**options)
    for batch in batches:
        predictions.add(batch)
    return predictions.result()


@given(runs(), st.sampled_from([0, 40, 2**30]))
def test_the_result_is_that_of_the_container_of_transformers(batches: list[Any], spill_bytes: int) -> None:
    container = EvalLoopContainer(do_nested_concat=True, padding_index=-100)
    for batch in batches:
        container.add(batch)
    found = gathered(batches, spill_bytes=spill_bytes)
    assert same(found, container.get_arrays())


@given(runs(), st.sampled_from([0, 40, 2**30]))
def test_without_joining_there_is_a_tree_per_batch(batches: list[Any], spill_bytes: int) -> None:
    batches = [*batches, (torch.arange(2), None)]
    found = gathered(batches, spill_bytes=spill_bytes, concat=False)
    assert same(found, [nested_numpify(batch) for batch in batches])


@pytest.mark.parametrize("spill_bytes", [0, 2**30])
def test_scalars_become_a_vector_and_a_single_one_stays(spill_bytes: int) -> None:
    values = [torch.tensor(1.5), torch.tensor(2.5), torch.tensor([3.5])]
    assert same(gathered(values, spill_bytes=spill_bytes), np.array([1.5, 2.5, 3.5], dtype=np.float32))
    assert same(gathered(values[:1], spill_bytes=spill_bytes), np.array(1.5, dtype=np.float32))


@pytest.mark.parametrize("spill_bytes", [0, 2**30])
def test_dtypes_that_differ_meet_in_a_common_one(spill_bytes: int) -> None:
    parts = [torch.tensor([1, 2], dtype=torch.int32), torch.tensor([0.5], dtype=torch.float64)]
    assert same(gathered(parts, spill_bytes=spill_bytes), np.array([1.0, 2.0, 0.5]))


def test_containers_keep_their_types() -> None:
    leaf = torch.ones(1, 2)
    found = gathered([(Pair(leaf, leaf), BaseModelOutput(last_hidden_state=leaf), BatchEncoding({"x": leaf}))] * 2)
    assert [type(part) for part in found] == [Pair, BaseModelOutput, BatchEncoding]
    assert found[0].b.shape == found[1].last_hidden_state.shape == found[2]["x"].shape == (2, 2)
    # A TensorDict holds tensors only.
    assert same(gathered([TensorDict({"x": leaf}, batch_size=[1])]), {"x": leaf.numpy()})


def test_nothing_is_none_and_none_stays_none() -> None:
    assert gathered([]) is None
    assert gathered([], concat=False) is None
    assert gathered([None, None]) is None
    assert same(gathered([(torch.ones(1), None)] * 2), (np.ones(2, dtype=np.float32), None))


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ((1, 2), (1,), r"batch 1 has a tuple of 1; expected a tuple of 2, as in the first batch"),
        ((1, (2,)), (1, 2), r"batch 1 at \[1\] has a tensor; expected a tuple of 1"),
        ((1, 2), (1, (2,)), r"batch 1 at \[1\] has a tuple; expected a tensor"),
        ([1], (1,), r"batch 1 has a tuple of 1; expected a list of 1"),
        (
            {"a": 1, "b": {"c": 1}},
            {"a": 1, "b": {"d": 1}},
            r"at \['b'\] has a dict of \['d'\]; expected a dict of \['c'\]",
        ),
        ((1, None), (1, 2), r"batch 1 at \[1\] has a tensor; expected None"),
        ((1, 2), (1, None), r"batch 1 at \[1\] has None; expected a tensor"),
    ],
)
def test_a_changed_structure_is_refused_and_leaves_no_trace(first: Any, second: Any, message: str) -> None:
    def tensors(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {key: tensors(value) for key, value in tree.items()}
        if isinstance(tree, (list, tuple)):
            return type(tree)(tensors(value) for value in tree)
        return tree if tree is None else torch.full((2,), tree)

    predictions = Predictions()
    predictions.add(tensors(first))
    with pytest.raises(ValueError, match=message):
        predictions.add(tensors(second))
    assert same(predictions.result(), nested_numpify(tensors(first)))


@pytest.mark.parametrize(
    ("shape", "message"), [((2, 3, 5), r"\(2, 3, 5\); expected \(\*, \*, 4\)"), ((2, 3), r"\(2, 3\); expected")]
)
def test_other_shapes_are_refused(shape: tuple[int, ...], message: str) -> None:
    predictions = Predictions()
    predictions.add({"logits": torch.ones(1, 2, 4)})
    with pytest.raises(ValueError, match=r"batch 1 at \['logits'\] has shape " + message):
        predictions.add({"logits": torch.ones(shape)})


def test_other_leaves_are_refused() -> None:
    with pytest.raises(TypeError, match="batch 0 holds a str"):
        Predictions().add((torch.ones(1), "text"))
    with pytest.raises(ValueError, match="spill_bytes: got -1"):
        Predictions(spill_bytes=-1)


def test_unsigned_numbers_cannot_be_padded() -> None:
    ragged = [torch.ones(1, 2, dtype=torch.uint8), torch.ones(1, 3, dtype=torch.uint8)]
    with pytest.raises(ValueError, match=r"from 2 to 3 in dimension 1 need padding by -100, which uint8 cannot hold"):
        gathered(ragged)
    assert gathered(ragged[:1] * 2).shape == (2, 2)


@pytest.mark.parametrize("spill_bytes", [0, 2**30])
def test_a_tensor_may_be_written_again(spill_bytes: int) -> None:
    buffer, predictions = torch.zeros(2), Predictions(spill_bytes=spill_bytes)
    for i in range(3):
        predictions.add(buffer.fill_(i))
    assert predictions.result().tolist() == [0, 0, 1, 1, 2, 2]


def test_a_view_does_not_keep_what_it_is_a_view_of() -> None:
    predictions = Predictions()
    wide = torch.zeros(4, 1000)
    predictions.add(wide[:, :1])
    found = predictions.result()
    assert found.base is None and found.nbytes == 16


def open_files() -> set[str]:
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("width", [3, 4])
def test_the_file_lives_as_long_as_the_result(tmp_path: Path, width: int) -> None:
    batches = [torch.full((2, 3), 1.0), torch.full((2, width), 2.0)]
    found = gathered(batches, spill_bytes=20, folder=tmp_path)
    assert isinstance(found, np.memmap)
    assert not list(tmp_path.iterdir())
    assert any(str(tmp_path) in path for path in open_files())
    found[found == -100] = 0  # metrics overwrite paddings
    assert found[2].tolist() == [2.0] * width
    del found
    assert not any(str(tmp_path) in path for path in open_files())


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        gathered([torch.ones(1)], spill_bytes=0, folder=tmp_path / "missing")


def test_a_full_disk_says_where() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no device that is always full")
    from trainkit.trainer.accumulate_predictions import _Spool

    spool = _Spool(None)
    spool._file = open("/dev/full", "r+b", buffering=0)  # noqa: SIM115
    with spool._file, pytest.raises(OSError, match=r"No space left on device after 0 bytes in .*give a folder"):
        spool.append(np.zeros(10**5))


CHILD = """
import resource, sys
import torch
from trainkit.trainer.accumulate_predictions import Predictions

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def run(batches, rows, width, **options):
    found = Predictions(**options)
    for i in range(batches):
        found.add((torch.full((rows, width - i % 2 * int(sys.argv[2])), float(i)), torch.full((rows,), i)))
    return found.result()

run(20, 100, 1000, spill_bytes=0, folder=sys.argv[1])
before = peak()
logits, labels = run(400, 100, 1000, spill_bytes=2**20, folder=sys.argv[1])
print(peak() - before, logits.nbytes)
assert float(logits[-1, 0]) == 399 and int(labels[-1]) == 399 and logits.shape == (40000, 1000)
"""


def child(code: str, *args: str) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), *args], stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("ragged", ["0", "1"])
def test_past_the_limit_memory_does_not_grow(tmp_path: Path, ragged: str) -> None:
    run = child(CHILD, str(tmp_path), ragged)
    out, _ = run.communicate(timeout=120)
    assert run.returncode == 0
    grown, total = map(int, out.split())
    assert grown < total / 20, f"{grown} bytes for a result of {total}"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_killed_process_leaves_no_file(tmp_path: Path) -> None:
    run = child(
        """
        import sys, time
        import torch
        from trainkit.trainer.accumulate_predictions import Predictions
        found = Predictions(spill_bytes=0, folder=sys.argv[1])
        found.add(torch.ones(1000, 1000))
        print("written", flush=True)
        time.sleep(600)
        """,
        str(tmp_path),
    )
    assert run.stdout is not None and run.stdout.readline() == "written\n"
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert not list(tmp_path.iterdir())


def test_time_grows_with_the_batches_and_not_with_their_square() -> None:
    def seconds(batches: int) -> float:
        start = time.perf_counter()
        gathered([torch.zeros(10, 100)] * batches)
        return time.perf_counter() - start

    seconds(100)
    assert min(seconds(2000) for _ in range(3)) < 40 * min(seconds(200) for _ in range(3))


@given(runs())
def test_helpers_agree_with_transformers(batches: list[Any]) -> None:
    for batch in batches:
        assert batch_rows(batch) == find_batch_size(batch)
        arrays = nested_numpify(batch)
        assert same(nested_truncate(arrays, 1), hf_nested_truncate(arrays, 1))
        grad = _with_grad(batch)
        for one, two in zip(_leaves(nested_detach(grad)), _leaves(hf_nested_detach(grad)), strict=True):
            assert torch.equal(one, two) and not one.requires_grad


def _with_grad(tree: Any) -> Any:
    if isinstance(tree, torch.Tensor):
        return tree.requires_grad_() if tree.is_floating_point() else tree
    if isinstance(tree, dict):
        return {key: _with_grad(value) for key, value in tree.items()}
    return type(tree)(_with_grad(value) for value in tree)


def _leaves(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    else:
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _leaves(part)


@pytest.mark.parametrize(
    "inputs",
    [{"n": 3, "x": torch.zeros(2, 5)}, [torch.tensor(1.0), np.zeros((4, 1))], {"n": "text"}, (), torch.tensor(1.0)],
)
def test_rows_are_those_of_the_first_tensor_that_has_some(inputs: Any) -> None:
    assert batch_rows(inputs) == find_batch_size(inputs)


@pytest.mark.gpu
def test_predictions_leave_a_gpu_while_it_computes() -> None:
    buffer = torch.zeros(64, 1000, device="cuda")
    host = torch.zeros(2)
    predictions = Predictions()
    for i in range(50):
        predictions.add((buffer.fill_(i), buffer[:, 0].bfloat16(), host.fill_(i)))
    logits, first, numbers = predictions.result()
    expected = np.repeat(np.arange(50, dtype=np.float32), 64)
    assert np.array_equal(logits[:, 7], expected) and np.array_equal(first, expected)
    assert numbers.tolist() == [i for i in range(50) for _ in range(2)]
