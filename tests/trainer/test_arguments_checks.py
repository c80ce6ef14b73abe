"""What TrainingArguments refuse: what transformers refuses, what is not served, what could not work."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.trainer.both_arguments import ours, restored, theirs
from trainkit.trainer.accelerator_config import AcceleratorConfig
from trainkit.trainer.enums import OptimizerNames


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    with restored():
        yield


class TestRefusals:
    @pytest.mark.parametrize(
        "settings",
        [
            {"eval_strategy": "bad"},
            {"eval_strategy": "steps", "logging_steps": 0},
            {"logging_steps": 0},
            {"logging_steps": 2.5},
            {"save_steps": 2.5},
            {"eval_strategy": "steps", "eval_steps": 2.5},
            {"load_best_model_at_end": True},
            {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 300},
            {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 0.3, "save_steps": 0.4},
            {"torch_empty_cache_steps": 0},
            {"fp16": True, "bf16": True, "use_cpu": True},
            {"fp16_full_eval": True, "bf16_full_eval": True, "use_cpu": True},
            {"lr_scheduler_type": "reduce_lr_on_plateau"},
            {"warmup_ratio": 1.5},
            {"warmup_steps": -1},
            {"warmup_steps": 1.5},
            {"fsdp": "offload"},
            {"fsdp": "full_shard shard_grad_op"},
            {"fsdp": True, "fsdp_config": {"min_num_params": 1, "transformer_layer_cls_to_wrap": "A"}},
            {"fsdp": True, "fsdp_config": {"cpu_ram_efficient_loading": True, "sync_module_states": False}},
            {"dataloader_prefetch_factor": 2},
            {"lr_scheduler_kwargs": "{not json"},
        ],
        ids=str,
    )
    def test_what_transformers_refuses(self, settings: dict[str, Any]) -> None:
        with pytest.raises(ValueError):  # noqa: PT011
            theirs(**settings)
        names = [*settings, "IntervalStrategy", "load_best_model_at_end"]
        with pytest.raises(ValueError, match="|".join(names)) as caught:
            ours(**settings)
        assert "got" in str(caught.value)

    @pytest.mark.skipif(torch.accelerator.is_available(), reason="asserts what a machine without accelerator says")
    @pytest.mark.parametrize("name", ["bf16", "bf16_full_eval", "tf32"])
    def test_precision_that_the_hardware_lacks(self, name: str) -> None:
        for make in (theirs, ours):
            with pytest.raises(ValueError, match=r"bf16|tf32"):
                make(**{name: True})

    @pytest.mark.parametrize(
        ("settings", "owner"),
        [
            ({"tpu_num_cores": 8}, "TPUs"),
            ({"tpu_metrics_debug": True}, "TPUs"),
            ({"debug": "tpu_metrics_debug"}, "TPUs"),
            ({"debug": ["tpu_metrics_debug"]}, "TPUs"),
            ({"mp_parameters": "a"}, "SageMaker"),
            ({"fp16_opt_level": "O2"}, "apex"),
            ({"half_precision_backend": "apex"}, "apex"),
            ({"optim": "adamw_apex_fused"}, "apex"),
            ({"optim": OptimizerNames.ADAMW_TORCH_XLA}, "XLA"),
            ({"optim": "adamw_torch_npu_fused"}, "NPUs"),
            ({"ddp_backend": "hccl"}, "Habana"),
            ({"fsdp": True, "fsdp_config": {"xla": True}}, "XLA"),
        ],
        ids=str,
    )
    def test_hardware_that_is_not_served(self, settings: dict[str, Any], owner: str) -> None:
        name = next(reversed(settings))
        with pytest.raises(ValueError, match=rf"{name}: got .* for {owner}"):
            ours(**settings)

    @pytest.mark.parametrize(
        ("settings", "error"),
        [
            ({"per_device_train_batch_size": 0}, ValueError),
            ({"per_device_eval_batch_size": 2.0}, TypeError),
            ({"gradient_accumulation_steps": 0}, ValueError),
            ({"learning_rate": "1e-4"}, TypeError),
            ({"learning_rate": math.nan}, ValueError),
            ({"weight_decay": -1.0}, ValueError),
            ({"adam_beta2": 1.0}, ValueError),
            ({"label_smoothing_factor": 1.1}, ValueError),
            ({"num_train_epochs": -1}, ValueError),
            ({"max_steps": None}, TypeError),
            ({"max_grad_norm": math.nan}, ValueError),
            ({"save_steps": -1}, ValueError),
            ({"bf16": "false"}, TypeError),
            ({"log_level": "loud"}, ValueError),
            ({"ddp_backend": "smoke"}, ValueError),
            ({"report_to": "paper"}, ValueError),
            ({"include_for_metrics": ["losses"]}, ValueError),
            ({"include_num_input_tokens_seen": "some"}, ValueError),
            ({"label_names": "labels"}, TypeError),
            ({"lr_scheduler_kwargs": "a=1"}, TypeError),
            ({"accelerator_config": {"split": 1}}, ValueError),
            ({"accelerator_config": AcceleratorConfig}, NotImplementedError),
            ({"accelerator_config": 3}, TypeError),
            ({"accelerator_config": {"use_configured_state": True}}, ValueError),
            ({"parallelism_config": 3}, TypeError),
            ({"fsdp_config": 3}, TypeError),
            ({"deepspeed": {"zero_optimization": {"stage": 3}}}, ImportError),
        ],
        ids=str,
    )
    def test_what_could_not_work_names_the_field(self, settings: dict[str, Any], error: type[Exception]) -> None:
        (name,) = settings
        with pytest.raises(error, match=f"{name}: got"):
            ours(**settings)

    def test_max_grad_norm_may_be_none(self) -> None:
        assert ours(max_grad_norm=None).max_grad_norm is None

    def test_one_way_of_sharding(self) -> None:
        with pytest.raises(ValueError, match=r"fsdp: got \['full_shard'\] together with deepspeed"):
            ours(fsdp="full_shard", deepspeed={"zero_optimization": {"stage": 3}})

    @pytest.mark.parametrize("other", [{"gradient_checkpointing": True}, {"save_only_model": True}])
    def test_settings_that_sharding_excludes(self, other: dict[str, Any]) -> None:
        best = {"load_best_model_at_end": True, "eval_strategy": "steps"}
        with pytest.raises(ValueError, match=next(iter(other))):
            ours(fsdp="full_shard", fsdp_config={"activation_checkpointing": True}, **best, **other)
