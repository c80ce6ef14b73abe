"""What accelerate is made with: explicit values that equal what transformers writes into the environment."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.trainer.both_arguments import ours, restored, theirs
from trainkit.trainer.accelerator_config import AcceleratorConfig, accumulation_steps
from trainkit.trainer.accelerator_options import accelerator_options, apply_tf32, wanted_tf32
from trainkit.trainer.arguments import TrainingArguments


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    with restored():
        yield


class TestAcceleratorOptions:
    def test_an_accelerator_is_made_of_them(self) -> None:
        from accelerate import Accelerator
        from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs

        args = ours(
            bf16=True,
            use_cpu=True,
            data_seed=3,
            ddp_find_unused_parameters=True,
            accelerator_config={"split_batches": True, "even_batches": False},
        )
        options = accelerator_options(args)
        accelerator = Accelerator(
            cpu=options["cpu"],
            mixed_precision=options["mixed_precision"],
            dataloader_config=DataLoaderConfiguration(**options["dataloader_config"]),
            kwargs_handlers=[DistributedDataParallelKwargs(**options["ddp_kwargs"])],
            parallelism_config=options["parallelism_config"],
        )
        assert accelerator.mixed_precision == "bf16" and accelerator.device == args.device
        assert accelerator.split_batches and not accelerator.even_batches
        assert accelerator.dataloader_config.data_seed == 3 and accelerator.ddp_handler.find_unused_parameters

    def test_precision_of_the_launcher(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        assert accelerator_options(ours())["mixed_precision"] == "bf16"
        assert accelerator_options(ours(fp16=True))["mixed_precision"] == "fp16"

    @pytest.mark.parametrize(
        "settings",
        [
            {"fsdp": "full_shard"},
            {"fsdp": "shard_grad_op offload"},
            {"fsdp": ["hybrid_shard", "auto_wrap"], "fsdp_config": {"min_num_params": 9}},
            {"fsdp": "no_shard auto_wrap", "fsdp_config": {"transformer_layer_cls_to_wrap": ["A", "B"]}},
            {
                "fsdp": "full_shard",
                "fsdp_config": {
                    "backward_prefetch": "backward_pre", "forward_prefetch": "true", "use_orig_params": False,
                },
            },
        ],
        ids=str,
    )  # fmt: skip
    def test_fsdp_plugin_is_that_of_the_environment_of_transformers(self, settings: dict[str, Any]) -> None:
        from accelerate import FullyShardedDataParallelPlugin

        assert accelerator_options(ours(**settings))["fsdp_plugin"]["sync_module_states"] is True
        if not torch.accelerator.is_available():
            # The plugin broadcasts through an accelerator.
            settings = {**settings, "fsdp_config": {**settings.get("fsdp_config", {}), "sync_module_states": False}}
        mine = FullyShardedDataParallelPlugin(**accelerator_options(ours(**settings))["fsdp_plugin"])
        theirs(**settings)
        peer = FullyShardedDataParallelPlugin()
        ignored = {"param_init_fn", "mixed_precision_policy", "transformer_cls_names_to_wrap"}
        assert {k: v for k, v in vars(mine).items() if k not in ignored} == {
            k: v for k, v in vars(peer).items() if k not in ignored
        }
        assert mine.transformer_cls_names_to_wrap == peer.transformer_cls_names_to_wrap

    @pytest.mark.parametrize("name", ["limit_all_gathers", "activation_checkpointing", "cpu_ram_efficient_loading"])
    def test_fsdp_options_as_given(self, name: str) -> None:
        default = accelerator_options(ours(fsdp="full_shard"))["fsdp_plugin"]
        for text, value in (("true", True), ("False", False), (True, True)):
            options = accelerator_options(ours(fsdp="full_shard", fsdp_config={f"fsdp_{name}": text}))["fsdp_plugin"]
            assert options == {**default, name: value}

    def test_fsdp_of_version_two(self) -> None:
        from accelerate import FullyShardedDataParallelPlugin

        args = ours(fsdp="shard_grad_op", fsdp_config={"version": 2, "state_dict_type": "SHARDED_STATE_DICT"})
        plugin = FullyShardedDataParallelPlugin(**accelerator_options(args)["fsdp_plugin"])
        assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is False

    def test_parallelism_config_from_json(self) -> None:
        args = ours(parallelism_config={"dp_shard_size": 2})
        assert accelerator_options(args)["parallelism_config"].dp_shard_size == 2
        back = TrainingArguments(**json.loads(args.to_json_string()))
        assert back.parallelism_config.dp_shard_size == 2

    def test_non_blocking_needs_pinned_memory(self) -> None:
        args = ours(accelerator_config={"non_blocking": True}, dataloader_pin_memory=False)
        with pytest.warns(UserWarning, match="dataloader_pin_memory=True"):
            accelerator_options(args)

    @pytest.mark.parametrize(
        ("settings", "wanted"),
        [
            ({}, None),
            ({"torch_compile": True}, True),
            ({"torch_compile": True, "fp16": True}, None),
            ({"torch_compile": True, "tf32": False}, False),
            ({"tf32": False}, False),
        ],
        ids=str,
    )
    def test_tf32(self, settings: dict[str, Any], wanted: bool | None) -> None:
        args = ours(**settings)
        assert wanted_tf32(args) is wanted
        if not torch.cuda.is_available():
            assert apply_tf32(args) is None

    def test_accumulation_steps(self) -> None:
        config = AcceleratorConfig(gradient_accumulation_kwargs={"num_steps": 4})
        assert [accumulation_steps(config, 1), accumulation_steps(config, 4)] == [4, 4]
        assert accumulation_steps(AcceleratorConfig(), 3) == 3
        with pytest.raises(ValueError, match="gradient_accumulation_steps: got 2"):
            accumulation_steps(config, 2)
