"""TrainingArguments beside those of transformers 4.57: the same fields, values and derived values."""

import copy
import dataclasses
import inspect
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers import trainer_utils, training_args

from tests.trainer.both_arguments import HOME, described, ours, restored, theirs
from trainkit.trainer.accelerator_options import accelerator_options
from trainkit.trainer.arguments import TrainingArguments
from trainkit.trainer.seq2seq_arguments import Seq2SeqTrainingArguments


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    with restored():
        yield


class TestFields:
    @pytest.mark.parametrize(
        ("mine", "peer"),
        [
            (TrainingArguments, transformers.TrainingArguments),
            (Seq2SeqTrainingArguments, transformers.Seq2SeqTrainingArguments),
        ],
    )
    def test_names_order_and_defaults_are_those_of_transformers(self, mine: Any, peer: Any) -> None:
        def table(kind: Any) -> list[tuple[Any, ...]]:
            return [(f.name, f.default, f.default_factory, f.init) for f in dataclasses.fields(kind)]

        assert table(mine) == table(peer)

    def test_every_field_has_a_sentence(self) -> None:
        fields = [f for f in dataclasses.fields(TrainingArguments) if f.init]
        assert [f.name for f in fields if not f.metadata["help"].endswith(".")] == []

    def test_choices_are_those_of_transformers(self) -> None:
        peers = {f.name: list(f.metadata["choices"]) for f in dataclasses.fields(theirs()) if "choices" in f.metadata}
        assert {
            f.name: list(f.metadata["choices"]) for f in dataclasses.fields(ours()) if "choices" in f.metadata
        } == peers

    @pytest.mark.parametrize("name", [n for n in dir(transformers.TrainingArguments) if not n.startswith("_")])
    def test_public_names_are_there(self, name: str) -> None:
        if name not in ("default_optim", "is_torch_greater_or_equal_than_2_8"):
            assert isinstance(inspect.getattr_static(TrainingArguments, name), property) == isinstance(
                inspect.getattr_static(transformers.TrainingArguments, name), property
            )


SETTINGS: list[dict[str, Any]] = [
    {},
    {"eval_strategy": "steps"},
    {"eval_strategy": "steps", "eval_steps": 20.0, "logging_steps": 5.0, "save_steps": 40.0},
    {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True},
    {"eval_strategy": "steps", "eval_steps": 50, "load_best_model_at_end": True, "metric_for_best_model": "f1"},
    {"eval_strategy": "steps", "eval_steps": 0.1, "save_steps": 0.3, "load_best_model_at_end": True},
    {"save_strategy": "best", "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"},
    {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch", "greater_is_better": True},
    {"lr_scheduler_kwargs": '{"num_cycles": "2", "min_lr": "0.5", "deep": {"on": "True", "name": "1e-3"}}'},
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": '{"use_reentrant": "false"}'},
    {"bf16": True, "use_cpu": True},
    {"bf16_full_eval": True, "use_cpu": True},
    {"fp16": True, "half_precision_backend": "cpu_amp"},
    {"torch_compile_mode": "default"},
    {"torch_compile_backend": "eager"},
    {"torch_compile": True},
    {"include_num_input_tokens_seen": True},
    {"include_num_input_tokens_seen": "non_padding"},
    {"report_to": ["wandb", "tensorboard"]},
    {"report_to": "wandb"},
    {"debug": "underflow_overflow"},
    {"fsdp": "full_shard auto_wrap", "fsdp_config": {"fsdp_min_num_params": 10, "fsdp_use_orig_params": "true"}},
    {"fsdp": True, "fsdp_config": '{"transformer_layer_cls_to_wrap": "Block"}'},
    {"accelerator_config": {"split_batches": True, "gradient_accumulation_kwargs": {"num_steps": 2}}},
    {"accelerator_config": '{"dispatch_batches": "true"}'},
    {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 4},
    {"optim": "adafactor", "optim_args": "a=1", "max_grad_norm": 0.0, "max_steps": 0},
    {"output_dir": "~/runs", "logging_dir": "~/logs"},
    {"hub_token": "secret", "push_to_hub": True, "hub_strategy": "checkpoint"},
    {"eval_strategy": trainer_utils.IntervalStrategy.STEPS, "optim": training_args.OptimizerNames.SGD},
    {"num_train_epochs": -1, "max_steps": 10, "warmup_ratio": 1.0, "warmup_steps": 3},
    {"label_names": ["a"], "per_device_train_batch_size": 3, "per_device_eval_batch_size": 5},
]


class TestValues:
    @pytest.mark.parametrize("settings", SETTINGS, ids=str)
    def test_completed_as_by_transformers(self, settings: dict[str, Any]) -> None:
        mine, peer = ours(**settings), theirs(**settings)
        assert described(mine) == described(peer)
        for name in (
            "train_batch_size", "eval_batch_size", "device", "world_size", "process_index", "local_process_index",
            "should_log", "should_save", "n_gpu", "place_model_on_device", "ddp_timeout_delta",
            "_no_sync_in_gradient_accumulation",
        ):  # fmt: skip
            assert getattr(mine, name) == getattr(peer, name), name
        assert mine.parallel_mode.value == peer.parallel_mode.value
        assert [mine.get_warmup_steps(n) for n in (1, 10, 25)] == [peer.get_warmup_steps(n) for n in (1, 10, 25)]
        sanitized, peers = mine.to_sanitized_dict(), peer.to_sanitized_dict()
        del sanitized["accelerator_config"], peers["accelerator_config"]
        assert sanitized == peers

    @pytest.mark.parametrize("settings", SETTINGS, ids=str)
    def test_a_second_pass_changes_nothing(self, settings: dict[str, Any]) -> None:
        args = ours(**settings)
        before = copy.deepcopy(args)
        args.__post_init__()
        assert args == before

    @pytest.mark.parametrize("settings", SETTINGS, ids=str)
    def test_read_back_from_json(self, settings: dict[str, Any]) -> None:
        args = ours(**settings)
        back = TrainingArguments(**json.loads(args.to_json_string()))
        assert back.hub_token is None and back.push_to_hub_token is None
        assert dataclasses.replace(back, hub_token=args.hub_token) == args

    def test_infinite_numbers_survive_json(self) -> None:
        text = ours(max_grad_norm=math.inf).to_json_string()
        assert json.loads(text, parse_constant=pytest.fail)["max_grad_norm"] == "Infinity"
        assert TrainingArguments(**json.loads(text)).max_grad_norm == math.inf

    def test_str_is_that_of_transformers(self) -> None:
        mine, peer = str(ours(hub_token="secret")).splitlines(), str(theirs(hub_token="secret")).splitlines()
        assert [m for m in mine if not m.startswith("_n_gpu")] == [p for p in peer if not p.startswith("_n_gpu")]

    def test_default_folder_of_logs(self) -> None:
        args = TrainingArguments(report_to="none")
        assert args.output_dir == "trainer_output"
        assert str(args.logging_dir).startswith(os.path.join("trainer_output", "runs", ""))

    @given(
        steps=st.sampled_from([0, 0.1, 0.3, 0.7, 1, 2, 4.0, 6, 2.5]),
        evals=st.sampled_from([None, 0, 0.1, 0.07, 1, 2, 3, 2.0, 1.5]),
        logs=st.sampled_from([0, 0.2, 1, 2, 3.5, 10.0]),
        best=st.booleans(),
    )
    def test_intervals_are_refused_as_by_transformers(self, steps: Any, evals: Any, logs: Any, best: bool) -> None:
        settings = {"eval_strategy": "steps", "save_steps": steps, "eval_steps": evals, "logging_steps": logs}
        settings["load_best_model_at_end"] = best
        mine, peer = outcome(ours, settings), outcome(theirs, settings)
        effective = evals or logs
        if best and effective and steps and (steps < 1) != (effective < 1):
            # transformers lets a share pass if the number of updates happens to be its multiple.
            peer = ValueError
        if best and {steps, effective} == {0.7, 0.07}:
            # transformers rounds, and takes 0.7 for no multiple of 0.07.
            peer = mine
            assert mine is not ValueError
        assert mine == peer


def outcome(make: Any, settings: dict[str, Any]) -> Any:
    try:
        args = make(**settings)
    except ValueError:
        return ValueError
    return {name: getattr(args, name) for name in settings} | {"greater_is_better": args.greater_is_better}


@dataclass
class Extended(TrainingArguments):
    """As libraries write theirs."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    logging_steps: float = field(default=10, metadata={"help": "Other default."})
    beta: float = 0.1
    model_init_kwargs: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.beta *= 2

    def get_warmup_steps(self, num_training_steps: int) -> int:
        return 7

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "more": True}


class TestSubclass:
    def test_fields_and_overrides(self) -> None:
        args = Extended(**HOME, model_init_kwargs='{"dtype": "auto"}')
        assert (args.beta, args.logging_steps, args.get_warmup_steps(100)) == (0.2, 10, 7)
        assert args.to_dict()["more"] and args.model_init_kwargs == {"dtype": "auto"}

    def test_repr_hides_tokens(self) -> None:
        args = Extended(**HOME, hub_token="secret")
        assert "secret" not in repr(args) + str(args) and str(args).startswith("Extended(\n")

    def test_to_dict_is_that_of_transformers_and_leaves_the_arguments_alone(self) -> None:
        @dataclass
        class Peer(transformers.TrainingArguments):
            model_init_kwargs: Any = None

        @dataclass
        class Mine(TrainingArguments):
            model_init_kwargs: Any = None

        kwargs = {"dtype": torch.bfloat16, "deep": {"dtype": torch.float32}}
        quantization = transformers.BitsAndBytesConfig(load_in_8bit=True)
        mine = Mine(**HOME, model_init_kwargs={**copy.deepcopy(kwargs), "quantization_config": quantization})
        peer = Peer(**HOME, model_init_kwargs={**copy.deepcopy(kwargs), "quantization_config": quantization})
        assert mine.to_dict()["model_init_kwargs"] == peer.to_dict()["model_init_kwargs"]
        assert mine.model_init_kwargs == {**kwargs, "quantization_config": quantization}

    def test_json_refuses_by_name_what_it_cannot_hold(self) -> None:
        args = Extended(**HOME, model_init_kwargs={"f": Path("here"), "g": {"dtype": torch.float32}})
        assert json.loads(args.to_json_string())["model_init_kwargs"] == {"f": "here", "g": {"dtype": "float32"}}
        args.model_init_kwargs = {"f": len}
        with pytest.raises(TypeError, match="model_init_kwargs: JSON cannot hold"):
            args.to_json_string()

    def test_replace_copy_and_equality(self) -> None:
        args = ours(learning_rate=1e-3)
        _ = args.device, args.n_gpu
        assert dataclasses.replace(args, learning_rate=2e-3).learning_rate == 2e-3
        assert copy.deepcopy(args) == args == ours(learning_rate=1e-3) != ours()
        assert dataclasses.asdict(args)["learning_rate"] == 1e-3


class Halves(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.linear(x).square().mean()}


@pytest.mark.parametrize("kind", [TrainingArguments, transformers.TrainingArguments])
def test_the_trainer_of_transformers_takes_them(kind: Any, tmp_path: Path) -> None:
    # What code written for transformers reads of them is there.
    args = kind(str(tmp_path), max_steps=3, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True)
    rows = [{"x": torch.tensor([float(i), 1.0])} for i in range(8)]
    trainer = transformers.Trainer(Halves(), args, train_dataset=rows)
    assert trainer.train().global_step == 3
    assert trainer.evaluate(rows)["eval_samples_per_second"] > 0


class TestNoLeakage:
    def test_no_environment_flags_or_modules(self, tmp_path: Path) -> None:
        program = """
import os, sys, torch
before = dict(os.environ), torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
from trainkit.trainer.arguments import TrainingArguments
from trainkit.trainer.argument_parser import HfArgumentParser
from trainkit.trainer.seq2seq_arguments import Seq2SeqTrainingArguments
from trainkit.trainer import accelerator_options
args = TrainingArguments("out", bf16=True, use_cpu=True, torch_compile=True, fsdp="full_shard", seed=3)
assert before == (dict(os.environ), torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
assert torch.initial_seed() != 3 and not torch.distributed.is_initialized()
print([name for name in ("transformers", "accelerate", "datasets", "yaml") if name in sys.modules], os.listdir())
"""
        root = Path(__file__).resolve().parents[2]
        env = {**os.environ, "PYTHONPATH": str(root)}
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", program], cwd=tmp_path, env=env, capture_output=True
        )
        assert (done.returncode, done.stdout.decode().strip()) == (0, "[] []"), done.stderr.decode()

    def test_bf16_of_one_is_not_that_of_the_next(self) -> None:
        assert accelerator_options(ours(bf16=True, use_cpu=True))["mixed_precision"] == "bf16"
        assert accelerator_options(ours())["mixed_precision"] == "no"
