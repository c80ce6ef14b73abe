"""Old names of arguments and settings without effect: one warning, and the values that transformers gives."""

import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from tests.trainer.both_arguments import HOME, ours, restored, theirs
from trainkit.trainer.arguments import TrainingArguments


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    with restored():
        yield


class TestWarnings:
    @pytest.mark.parametrize(
        ("settings", "present"),
        [
            ({"no_cuda": True}, {"use_cpu": True, "dataloader_pin_memory": False}),
            ({"adafactor": True}, {"optim": "adafactor"}),
            ({"torchdynamo": "eager"}, {"torch_compile_backend": "eager", "torch_compile": True}),
            ({"fp16_backend": "cpu_amp"}, {"half_precision_backend": "cpu_amp"}),
            ({"push_to_hub_token": "t"}, {"hub_token": "t"}),
            ({"push_to_hub_organization": "o"}, {"hub_model_id": "o/out"}),
            ({"push_to_hub_organization": "o", "push_to_hub_model_id": "m"}, {"hub_model_id": "o/m"}),
            ({"include_inputs_for_metrics": True}, {"include_for_metrics": ["inputs"]}),
            ({"per_gpu_train_batch_size": 3}, {"train_batch_size": 3}),
            ({"per_gpu_eval_batch_size": 3}, {"eval_batch_size": 3}),
            ({"fsdp": True, "fsdp_min_num_params": 2}, {}),
            ({"fsdp": True, "fsdp_transformer_layer_cls_to_wrap": "B"}, {}),
        ],
        ids=str,
    )
    def test_old_names_work_and_warn_once(self, settings: dict[str, Any], present: dict[str, Any]) -> None:
        with pytest.warns(FutureWarning, match="old names of arguments: ") as caught:
            mine = TrainingArguments(**{**HOME, **settings})
        assert len(caught) == 1 and caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peer = theirs(**settings)
        assert {name: getattr(mine, name) for name in present} == present
        assert {name: getattr(peer, name) for name in present} == present
        assert mine.fsdp_config == peer.fsdp_config
        # Copies say nothing more.
        assert dataclasses.replace(mine) == mine

    def test_several_old_names_are_one_warning(self) -> None:
        with pytest.warns(FutureWarning, match=r"no_cuda \(use use_cpu\), adafactor.*fsdp_min_num_params") as caught:
            ours(no_cuda=True, adafactor=True, fsdp=True, fsdp_min_num_params=2)
        assert len(caught) == 1

    def test_the_list_of_the_user_is_left_alone(self) -> None:
        wanted = ["loss"]
        with pytest.warns(FutureWarning):
            args = ours(include_inputs_for_metrics=True, include_for_metrics=wanted)
        assert (wanted, args.include_for_metrics) == (["loss"], ["loss", "inputs"])

    @pytest.mark.parametrize(
        ("settings", "cause"),
        [
            ({"fsdp_config": {"min_num_params": 5}}, "nothing without fsdp"),
            ({"fsdp": True, "fsdp_config": {"min_nun_params": 5}}, r"\['min_nun_params'\] are not known"),
            ({"fsdp": True, "gradient_checkpointing": True}, "activation_checkpointing"),
        ],
        ids=str,
    )
    def test_settings_without_effect(self, settings: dict[str, Any], cause: str) -> None:
        with pytest.warns(UserWarning, match=cause) as caught:
            ours(**settings)
        assert len(caught) == 1
