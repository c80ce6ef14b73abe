"""AcceleratorConfig: from files, mappings and from transformers."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType

import pytest
import transformers

from tests.trainer.both_arguments import ours, restored
from trainkit.trainer.accelerator_config import AcceleratorConfig


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    with restored():
        yield


class TestAcceleratorConfig:
    def test_from_a_file(self, tmp_path: Path) -> None:
        file = tmp_path / "config.json"
        file.write_text('{"split_batches": true}')
        assert AcceleratorConfig.from_json_file(file) == AcceleratorConfig(split_batches=True)
        assert ours(accelerator_config=str(file)).accelerator_config == AcceleratorConfig(split_batches=True)
        file.write_text('{"split_batch": true}')
        with pytest.raises(ValueError, match=rf"file {file} got the unknown keys \['split_batch'\]"):
            AcceleratorConfig.from_json_file(file)

    def test_one_of_transformers_is_taken(self) -> None:
        peer = transformers.trainer_pt_utils.AcceleratorConfig(even_batches=False)
        assert ours(accelerator_config=peer).accelerator_config == AcceleratorConfig(even_batches=False)
        assert [f.name for f in dataclasses.fields(AcceleratorConfig)] == [f.name for f in dataclasses.fields(peer)]

    def test_from_any_mapping(self) -> None:
        parsed = AcceleratorConfig.parse(MappingProxyType({"split_batches": True}))
        assert parsed == AcceleratorConfig(split_batches=True)

    def test_pop(self) -> None:
        config = AcceleratorConfig()
        assert config.pop("even_batches") is True and "even_batches" not in config.to_dict()
