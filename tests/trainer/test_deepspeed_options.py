"""The entries of a DeepSpeed configuration that the arguments fill, beside transformers."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers

from tests.trainer.both_arguments import ours, restored, theirs
from trainkit.trainer.deepspeed_options import deepspeed_config, fill_deepspeed, finish_deepspeed


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    with restored():
        yield


AUTO: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "gradient_clipping": "auto",
    "optimizer": {"params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {
        "params": {
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
            "total_num_steps": "auto",
            "warmup_num_steps": "auto",
        }
    },
    "fp16": {"enabled": "auto"},
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    },
}


class TestDeepSpeed:
    def test_filled_and_finished_as_by_transformers(self) -> None:
        from accelerate.utils.deepspeed import HfDeepSpeedConfig
        from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

        settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "save_on_each_node": True}
        settings |= {"warmup_ratio": 0.1, "bf16": True, "use_cpu": True, "learning_rate": 1e-3}
        mine, args = copy.deepcopy(AUTO), ours(**settings)
        assert fill_deepspeed(mine, args) == []

        # Without DeepSpeed its class has no base, and its constructor asks for the package; the methods do not.
        class Peer(HfTrainerDeepSpeedConfig, HfDeepSpeedConfig):
            def __init__(self, config: dict[str, Any]) -> None:
                HfDeepSpeedConfig.__init__(self, config)
                self.mismatches: list[str] = []

        peer = Peer(copy.deepcopy(AUTO))
        peer.trainer_config_process(theirs(**settings))
        assert mine == peer.config
        model = torch.nn.Linear(1, 1)
        model.config = transformers.PretrainedConfig(hidden_size=8)
        finish_deepspeed(mine, args, model, 30)
        peer.trainer_config_finalize(theirs(**settings), model, 30)
        assert mine == peer.config and "auto" not in json.dumps(mine)

    def test_contradictions_are_all_named(self) -> None:
        config = {"train_batch_size": 3, "gradient_clipping": 2.0, "optimizer": {"params": {"lr": 1.0}}}
        lines = fill_deepspeed(config, ours())
        assert len(lines) == 3 and "optimizer.params.lr=1.0, but learning_rate is 5e-05" in lines
        args = ours()
        args.deepspeed = config
        with pytest.raises(ValueError, match=r"train_batch_size=3.*gradient_clipping"):
            deepspeed_config(args)
        assert config["train_batch_size"] == 3

    def test_batch_sizes_that_are_searched_may_differ(self) -> None:
        config = {"train_batch_size": 3, "train_micro_batch_size_per_gpu": "auto"}
        assert fill_deepspeed(config, ours(), auto_find_batch_size=True) == []
        assert config["train_micro_batch_size_per_gpu"] == 8

    def test_width_that_is_not_known(self) -> None:
        with pytest.raises(ValueError, match=r"reduce_bucket_size.*hidden_size"):
            finish_deepspeed(copy.deepcopy(AUTO), ours(), torch.nn.Linear(1, 1), 10)
