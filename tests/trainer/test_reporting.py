"""Rates, tables and files beside those of transformers; memory beside what was allocated."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers import trainer_pt_utils, trainer_utils

from trainkit.trainer.reporting import (
    MemoryTracker,
    log_metrics,
    metrics_format,
    save_metrics,
    save_state,
    speed_metrics,
)
from trainkit.trainer.state import TrainerState

amounts = st.one_of(st.none(), st.integers(0, 10**9), st.floats(0, 1e9))
MB = 2**20


@given(runtime=st.floats(0, 1e6), samples=amounts, steps=amounts, tokens=amounts)
def test_rates_are_those_of_transformers(runtime: float, samples: Any, steps: Any, tokens: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # Both read the clock; it stands still between them.
        patch.setattr(time, "time", lambda: 1e9 + runtime)
        ours = speed_metrics("eval", 1e9, samples, steps, tokens)
        assert ours == trainer_utils.speed_metrics("eval", 1e9, samples, steps, tokens)
        assert list(ours) == list(trainer_utils.speed_metrics("eval", 1e9, samples, steps, tokens))


metrics = st.dictionaries(
    st.sampled_from(["loss", "eval_runtime", "train_runtime", "epoch", "acc", "n"]), st.floats(0, 1e7), max_size=5
)
sizes = st.dictionaries(
    st.sampled_from(["train_mem_cpu_alloc_delta", "before_init_mem_gpu"]), st.integers(-(2**50), 2**50)
)
flops = st.one_of(st.just({}), st.fixed_dictionaries({"total_flos": st.floats(0, 1e20)}))


@given(floats=metrics, bytes_=sizes, flos=flops)
def test_formats_are_those_of_transformers(floats: Any, bytes_: Any, flos: Any) -> None:
    given_ = {**floats, **bytes_, **flos, "name": "text", "count": 3}
    before = dict(given_)
    assert metrics_format(given_) == trainer_pt_utils.metrics_format(given_)
    assert given_ == before


@given(floats=metrics, bytes_=sizes)
def test_the_table_is_that_of_transformers(floats: Any, bytes_: Any) -> None:
    trainer = SimpleNamespace(is_world_process_zero=lambda: True)
    given_ = {**floats, **bytes_, "a": 1}
    ours, theirs = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(ours):
        log_metrics("train", given_)
    with contextlib.redirect_stdout(theirs):
        trainer_pt_utils.log_metrics(trainer, "train", given_)
    assert ours.getvalue() == theirs.getvalue()


def test_no_metrics_and_metrics_of_the_user_make_a_table(capsys: Any) -> None:
    log_metrics("eval", {})
    log_metrics("eval", {"eval_mem_score": 0.123456})
    assert capsys.readouterr().out == "***** eval metrics *****\n" * 2 + "  eval_mem_score = 0.1235\n"


@given(calls=st.lists(st.tuples(st.sampled_from(["train", "eval"]), metrics, st.booleans()), max_size=4))
def test_files_are_those_of_transformers(tmp_path_factory: Any, calls: list[Any]) -> None:
    ours, theirs = tmp_path_factory.mktemp("ours"), tmp_path_factory.mktemp("theirs")
    trainer = SimpleNamespace(is_world_process_zero=lambda: True, args=SimpleNamespace(output_dir=str(theirs)))
    for split, values, combined in calls:
        save_metrics(ours, split, values, combined=combined)
        trainer_pt_utils.save_metrics(trainer, split, values, combined=combined)
    names = sorted(os.listdir(theirs))
    assert sorted(os.listdir(ours)) == names
    for name in names:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()


def test_metrics_of_numpy_and_torch_are_numbers_in_the_file(tmp_path: Path) -> None:
    save_metrics(tmp_path, "eval", {"a": np.float32(0.5), "b": torch.tensor(3), "c": math.nan})
    text = (tmp_path / "all_results.json").read_text()
    assert text == '{\n    "a": 0.5,\n    "b": 3,\n    "c": NaN\n}'


@pytest.mark.parametrize(("before", "value"), [("[1]", 1.0), ("{", 1.0), ("{}", object())])
def test_nothing_is_written_when_one_of_the_files_cannot_be(tmp_path: Path, before: str, value: Any) -> None:
    (tmp_path / "all_results.json").write_text(before)
    with pytest.raises((ValueError, TypeError)):
        save_metrics(tmp_path, "eval", {"a": value})
    assert os.listdir(tmp_path) == ["all_results.json"]
    assert (tmp_path / "all_results.json").read_text() == before


def test_the_state_file_is_that_of_transformers(tmp_path: Path) -> None:
    save_state(tmp_path, TrainerState(global_step=3, epoch=0.5))
    transformers.TrainerState(global_step=3, epoch=0.5).save_to_json(str(tmp_path / "theirs.json"))
    assert (tmp_path / "trainer_state.json").read_text() == (tmp_path / "theirs.json").read_text()


def touched(size: int) -> bytearray:
    return bytearray(os.urandom(4096)) * (size // 4096)


STAGES = """
import json, os
from trainkit.trainer.reporting import MemoryTracker

def touched(size):
    return bytearray(os.urandom(4096)) * (size // 4096)

tracker, metrics = MemoryTracker(), {}
tracker.start("train")
kept = touched(40 << 20)
passing = touched(100 << 20)
del passing
tracker.stop_and_update_metrics("train", metrics)
# The mark of one stage does not count for the next.
tracker.start("eval")
tracker.stop_and_update_metrics("eval", metrics)
print(json.dumps(metrics))
"""


def test_memory_that_stays_and_memory_that_came_and_went() -> None:
    # In a process of its own: this one gives back what other tests have left, at any time.
    done = subprocess.run([sys.executable, "-c", STAGES], check=True, capture_output=True, text=True)
    metrics = json.loads(done.stdout)
    assert 35 * MB < metrics["train_mem_cpu_alloc_delta"] < 60 * MB
    assert 80 * MB < metrics["train_mem_cpu_peaked_delta"] < 120 * MB
    assert abs(metrics["eval_mem_cpu_peaked_delta"]) < 20 * MB


def test_where_the_mark_cannot_be_set_back_an_older_peak_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    passing = touched(150 * MB)
    del passing
    monkeypatch.setattr("trainkit.trainer.reporting._reset_peaks", lambda: None)
    tracker, metrics = MemoryTracker(), dict[str, Any]()
    tracker.start("eval")
    tracker.stop_and_update_metrics("eval", metrics)
    assert metrics["eval_mem_cpu_peaked_delta"] < 20 * MB


def test_names_stages_and_their_order_are_those_of_transformers() -> None:
    class Theirs:
        """Its tracker asks for the name of the method that calls it."""

        def __init__(self) -> None:
            self.tracker = trainer_utils.TrainerMemoryTracker()
            self.tracker.start()
            self.tracker.stop_and_update_metrics()

        def evaluate(self, metrics: dict[str, Any]) -> None:
            self.tracker.start()
            self.tracker.stop_and_update_metrics(metrics)

        def train(self, metrics: dict[str, Any], inner: dict[str, Any]) -> None:
            self.tracker.start()
            self.evaluate(inner)
            self.tracker.stop_and_update_metrics(metrics)

    theirs, tracker = Theirs(), MemoryTracker()
    tracker.start("init")
    tracker.stop("init")
    expected: list[dict[str, Any]] = [{}, {}, {}]
    theirs.train(expected[0], expected[1])
    theirs.evaluate(expected[2])
    found: list[dict[str, Any]] = [{}, {}, {}]
    tracker.start("train")
    tracker.start("eval")
    tracker.stop_and_update_metrics("eval", found[1])
    tracker.stop_and_update_metrics("train", found[0])
    tracker.start("eval")
    tracker.stop_and_update_metrics("eval", found[2])
    assert [sorted(one) for one in found] == [sorted(one) for one in expected]
    assert all(isinstance(value, int) for one in found for value in one.values())


def test_a_tracker_that_is_off_or_was_not_started_reports_nothing() -> None:
    metrics: dict[str, Any] = {}
    off = MemoryTracker(skip=True)
    off.start("train")
    off.stop_and_update_metrics("train", metrics)
    MemoryTracker().stop_and_update_metrics("eval", metrics)
    assert metrics == {}


def test_tracking_starts_no_thread_and_leaves_the_cpu_alone() -> None:
    tracker = MemoryTracker()
    tracker.start("train")
    threads, used = threading.active_count(), time.process_time()
    time.sleep(0.2)
    assert threading.active_count() == threads
    # The thread of transformers would have used most of the 0.2 s.
    assert time.process_time() - used < 0.1
    tracker.stop("train")


@pytest.mark.gpu
def test_memory_of_the_device() -> None:
    tracker, metrics = MemoryTracker(), dict[str, Any]()
    tracker.start("train")
    kept = torch.zeros(40 * MB, dtype=torch.uint8, device="cuda")
    passing = torch.zeros(100 * MB, dtype=torch.uint8, device="cuda")
    del passing
    tracker.stop_and_update_metrics("train", metrics)
    assert metrics["train_mem_gpu_alloc_delta"] == kept.numel()
    assert metrics["train_mem_gpu_peaked_delta"] == 100 * MB


def test_the_modules_bring_no_other_library_with_them() -> None:
    code = (
        "import sys\n"
        "from trainkit.trainer import callbacks, outputs, progress, reporting, state, trackers\n"
        "print(sorted({'transformers', 'accelerate', 'datasets', 'psutil'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.replace("'", '"')) == []
