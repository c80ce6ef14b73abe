"""A folder of transformers runs no code, reads no other folder, and says why it is refused."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.utils.backbone_utils import load_backbone

from trainkit import init_state
from trainkit.io.checkpoint import CheckpointError, from_pretrained, save_pretrained
from trainkit.optim import sgd

SIZES = {"vocab_size": 7, "n_positions": 4, "n_embd": 4, "n_layer": 1, "n_head": 1}
KERNEL = "somebody/kernel"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    module = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES))
    return save_pretrained(module, init_state(module, sgd(0.1)), tmp_path / "model")


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that transformers asks the hub for, and would import."""
    found: list[str] = []
    monkeypatch.setattr("transformers.modeling_utils.load_and_register_kernel", found.append)
    return found


def change(folder: Path, **entries: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.mark.parametrize(
    "entries",
    [
        {"_attn_implementation_internal": KERNEL},
        {"_attn_implementation": KERNEL},
        {
            "attribute_map": {**transformers.GPT2Config.attribute_map, "other": "_attn_implementation_internal"},
            "other": KERNEL,
        },
    ],
    ids=["internal", "public", "mapped"],
)
def test_a_configuration_fetches_no_code(entries: dict[str, Any], folder: Path, fetched: list[str]) -> None:
    change(folder, **entries)
    # What transformers does with the folder that was just written to.
    transformers.GPT2LMHeadModel.from_pretrained(folder, trust_remote_code=False)
    assert set(fetched) == {KERNEL}
    fetched.clear()
    for model_class in (transformers.GPT2LMHeadModel, transformers.AutoModelForCausalLM):
        with pytest.raises(CheckpointError, match=f"config.json: {next(iter(entries))} is .*, which asks for code"):
            from_pretrained(model_class, folder)
    assert fetched == []


@pytest.mark.parametrize(
    ("entries", "key"),
    [
        ({"text_config": {"attn_implementation": KERNEL}}, "attn_implementation"),
        ({"parts": [{"deep": {"_attn_implementation": {"vision": KERNEL}}}]}, "_attn_implementation"),
        ({"keypoint_detector_config": {"trust_remote_code": True}}, "trust_remote_code"),
        ({"configuration_files": ["config.4.0.0.json"]}, "configuration_files"),
        ({"backbone": "somebody/model", "use_pretrained_backbone": True}, "backbone"),
        ({"encoder": {"backbone": "..", "use_timm_backbone": False}}, "backbone"),
        ({"keypoint_detector_config": {"model_type": "x", "_name_or_path": "somebody/x"}}, "keypoint_detector_config"),
        ({"semantic_model_config": {"_name_or_path": "somebody/x"}}, "semantic_model_config"),
        ({"backbone": "folder", "use_timm_backbone": False}, "backbone"),
        ({"backbone": "hf-hub:somebody/x", "use_timm_backbone": True}, "backbone"),
        ({"architecture": "local-dir:/x"}, "architecture"),
        ({"backbone_kwargs": {"checkpoint_path": "x.bin"}}, "checkpoint_path"),
        ({"transformers_weights": "../other/model.safetensors"}, "transformers_weights"),
        ({"decoder": {"auto_map": {"AutoModelForCausalLM": "somebody/x--code.Model"}}}, "auto_map"),
    ],
)
def test_no_part_of_a_configuration_asks_for_more(entries: dict[str, Any], key: str, folder: Path) -> None:
    change(folder, **entries)
    with pytest.raises(CheckpointError, match=f"config.json: {key} is"):
        from_pretrained(transformers.AutoModelForCausalLM, folder)


def test_code_in_the_folder_is_not_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where transformers puts such code, and imports it from.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("print('run')\ndef generate(*args): pass\n")
    # What transformers does with it.
    transformers.GPT2LMHeadModel.from_pretrained(folder, trust_remote_code=False)
    assert capsys.readouterr().out == "run\n"
    with pytest.raises(CheckpointError, match="has custom_generate, whose code transformers runs"):
        from_pretrained(transformers.GPT2LMHeadModel, folder)
    assert capsys.readouterr().out == ""


def test_weights_of_another_folder_are_not_read(folder: Path, tmp_path: Path) -> None:
    other = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES))
    save_pretrained(other, init_state(other, sgd(0.1)), tmp_path / "other")
    change(folder, transformers_weights="../other/model.safetensors")
    # What transformers does with it.
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder, use_safetensors=True)
    assert torch.equal(theirs.transformer.wte.weight, other.transformer.wte.weight)
    with pytest.raises(CheckpointError, match=r"config\.json: transformers_weights is '\.\./other"):
        from_pretrained(transformers.GPT2LMHeadModel, folder)


@pytest.mark.parametrize("option", [{"subfolder": "x"}, {"variant": "fp16"}, {"gguf_file": "x.gguf"}])
def test_options_that_load_other_files_are_refused(option: dict[str, Any], folder: Path) -> None:
    with pytest.raises(ValueError, match=f"options: {next(iter(option))} makes transformers load other files"):
        from_pretrained(transformers.GPT2LMHeadModel, folder, **option)


def lightglue(part: dict[str, Any]) -> Any:
    return transformers.LightGlueConfig(keypoint_detector_config={**part, "model_type": "none"})


def xcodec(part: dict[str, Any]) -> Any:
    return transformers.XcodecConfig(semantic_model_config=part)


def dpt(part: dict[str, Any]) -> Any:
    config = transformers.DPTConfig(backbone=part["_name_or_path"], use_pretrained_backbone=False)
    load_backbone(config)
    return config


@pytest.mark.parametrize("make", [lightglue, xcodec, dpt])
def test_no_configuration_of_a_part_is_read_elsewhere(
    make: Callable[[dict[str, Any]], Any], folder: Path, fetched: list[str], tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    small: dict[str, Any] = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 4}
    transformers.Dinov2Config(**small).save_pretrained(elsewhere)
    change(elsewhere, _attn_implementation_internal=KERNEL)
    # What transformers does with it: it reads the other folder, which may ask for a kernel.
    config = make({"_name_or_path": str(elsewhere)})
    parts = [getattr(config, name, None) for name in ("keypoint_detector_config", "semantic_model_config")]
    assert fetched == [KERNEL] or any(isinstance(part, transformers.Dinov2Config) for part in parts)
    written = json.loads(config.to_json_string())
    for name in ("keypoint_detector_config", "semantic_model_config"):
        if name in written:
            written[name] = {"model_type": "none", "_name_or_path": str(elsewhere)}
    (folder / "config.json").write_text(json.dumps(written))
    fetched.clear()
    with pytest.raises(CheckpointError, match="which asks for code or files from elsewhere"):
        from_pretrained(transformers.AutoModel, folder)
    assert fetched == []


def test_an_adapter_that_names_another_model_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/another/model"}')
    with pytest.raises(CheckpointError, match=r"has adapter_config\.json"):
        from_pretrained(transformers.AutoModelForCausalLM, folder)


@pytest.mark.parametrize("content", ["{", "[" * 100_000, '{"a":' * 100_000], ids=["cut", "deep list", "deep mapping"])
def test_a_configuration_that_is_no_json_is_refused(content: str, folder: Path) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json: no valid JSON"):
        from_pretrained(transformers.AutoModelForCausalLM, folder)


def test_a_configuration_that_is_a_link_or_too_large_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").rename(tmp_path / "elsewhere.json")
    (folder / "config.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        from_pretrained(transformers.AutoModelForCausalLM, folder)
    (folder / "config.json").unlink()
    (folder / "config.json").write_bytes(b" " * (16 * 2**20 + 1))
    with pytest.raises(CheckpointError, match=r"config\.json: has 16777217 bytes"):
        from_pretrained(transformers.AutoModelForCausalLM, folder)


@pytest.mark.parametrize(
    ("entries", "options", "expected"),
    [
        ({"_attn_implementation": "eager", "trust_remote_code": False}, {}, "eager"),
        ({"attn_implementation": None}, {"attn_implementation": "eager"}, "eager"),
        ({}, {}, "sdpa"),
        ({"backbone": "resnet50", "use_timm_backbone": True}, {}, "sdpa"),
        ({"auto_map": {"AutoConfig": "code.Config"}}, {}, "sdpa"),
        ({"architecture": None, "backbone": None, "vision": {"backbone": {"model_type": "resnet"}}}, {}, "sdpa"),
        ({"backbone": "timm/resnet50", "use_timm_backbone": True}, {}, "sdpa"),
        ({"keypoint_detector_config": {"model_type": "superpoint", "_name_or_path": "a/b"}}, {}, "sdpa"),
    ],
)
def test_what_stays_in_the_folder_is_loaded(
    entries: dict[str, Any], options: dict[str, Any], expected: str, folder: Path, fetched: list[str]
) -> None:
    load: Callable[..., nn.Module] = transformers.GPT2LMHeadModel.from_pretrained
    weights = load(folder).state_dict()
    change(folder, **entries)
    back: Any = from_pretrained(transformers.AutoModelForCausalLM, folder, **options)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in back.state_dict().items())
    assert back.config._attn_implementation == expected
    assert fetched == []
