"""Device and process facts: asked for late, right with one process and with two."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState

from tests.trainer.both_arguments import ours, restored, theirs
from trainkit.trainer import arguments_checks
from trainkit.trainer.enums import ParallelMode


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    with restored():
        yield


class TestProcesses:
    def test_one_process_on_the_cpu(self) -> None:
        args = ours(use_cpu=True)
        assert (
            args.device == torch.device("cpu") and args.n_gpu == 0 and args.parallel_mode is ParallelMode.NOT_PARALLEL
        )
        assert (args.world_size, args.process_index, args.local_process_index, args.local_rank) == (1, 0, 0, 0)

    def test_batch_sizes_need_no_process_state(self) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        args = ours(per_device_train_batch_size=3)
        assert args.to_sanitized_dict()["train_batch_size"] == 3
        assert not arguments_checks._configured()

    def test_a_configured_state_is_kept(self) -> None:
        from accelerate import PartialState

        state = PartialState(cpu=True)
        args = ours(accelerator_config={"use_configured_state": True})
        assert args.distributed_state.__dict__ is state.__dict__ and args.device.type == "cpu"

    @pytest.mark.parametrize("level", ["passive", "detail", "debug", "info", "warning", "error", "critical"])
    def test_log_level(self, level: str) -> None:
        assert ours(log_level=level).get_process_log_level() == theirs(log_level=level).get_process_log_level()

    def test_progress_bar_by_the_level_of_transformers(self) -> None:
        before = transformers.logging.get_verbosity()
        try:
            transformers.logging.set_verbosity_error()
            assert ours().disable_tqdm is theirs().disable_tqdm is True
        finally:
            transformers.logging.set_verbosity(before)
        assert ours().disable_tqdm is False

    def test_one_process_runs_the_block_once(self) -> None:
        done = []
        with ours().main_process_first(desc="counting"):
            done.append(1)
        assert done == [1]


PROCESS = """
import os, sys, time
from trainkit.trainer.arguments import TrainingArguments
args = TrainingArguments("out", report_to="none", use_cpu=True, ddp_backend="gloo", ddp_timeout=60)
import torch.distributed as dist
assert not dist.is_initialized() and args.local_rank == int(os.environ["LOCAL_RANK"])
facts = (args.world_size, args.process_index, args.should_log, args.parallel_mode.value, dist.get_backend())
with args.main_process_first():
    if args.process_index == 0:
        time.sleep(0.5)
        open("done", "w").close()
    assert os.path.exists("done")
print(facts)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += ["--tee", "3", "program.py"]
    Path(tmp_path, "program.py").write_text(PROCESS)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "(2, 0, True, 'distributed', 'gloo')" in done.stdout
    assert "(2, 1, False, 'distributed', 'gloo')" in done.stdout
