"""The files of a tokenizer stay in the folder of their checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, models

from tests.trainer.tiny import make_net
from trainkit.trainer import Trainer, TrainingArguments
from trainkit.trainer.processing import check_processing, write_processing


def tokenizer(templates: Any) -> transformers.PreTrainedTokenizerFast:
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    found.chat_template = templates
    return found


def test_a_template_named_after_another_folder_is_refused(tmp_path: Path) -> None:
    hostile = tokenizer({"default": "x", "../../stolen": "y"})
    # What transformers does with it.
    hostile.save_pretrained(tmp_path / "theirs" / "model")
    assert (tmp_path / "theirs" / "stolen.jinja").read_text() == "y"
    folder = tmp_path / "ours" / "model"
    with pytest.raises(ValueError, match=r"has a file named '\.\./\.\./stolen'"):
        write_processing(hostile, folder)
    assert not folder.parent.exists()


@pytest.mark.parametrize("name", ["/tmp/x", "a/../../b", "..\\b", "c:x", "a\0"])
def test_names_that_lead_out_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="processing_class: PreTrainedTokenizerFast has a file named"):
        check_processing(tokenizer({name: "x"}))


def test_the_tokenizer_inside_of_a_processor_is_asked_too() -> None:
    inner = tokenizer({"../x": "y"})
    outer = transformers.CLIPProcessor(transformers.CLIPImageProcessor(), inner)
    with pytest.raises(ValueError, match=r"named '\.\./x'"):
        check_processing(outer)


def test_the_trainer_refuses_before_it_trains(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path / "run"), report_to="none")
    with pytest.raises(ValueError, match=r"processing_class: .*'\.\./x'"):
        Trainer(make_net(), args, processing_class=tokenizer({"../x": "y"}))
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_from_elsewhere_is_refused(tmp_path: Path) -> None:
    found: Any = tokenizer(None)
    found.vocab_file, found.name_or_path = str(tmp_path / "secret.txt"), "somebody/model"
    with pytest.raises(ValueError, match=r"has vocab_file '.*secret\.txt', which is none of its files"):
        check_processing(found)
    found.name_or_path = str(tmp_path)
    check_processing(found)
    found.name_or_path = ""
    check_processing(found)


def test_the_presets_of_a_speaker_stay_in_the_folder() -> None:
    found: Any = tokenizer(None)
    found.speaker_embeddings = {"v2/en_speaker_1": {}}
    check_processing(found)
    found.speaker_embeddings = {"../../x": {}}
    with pytest.raises(ValueError, match=r"named '\.\./\.\./x'"):
        check_processing(found)


@pytest.mark.parametrize("templates", [None, "x", {"default": "x", "tool use": "y"}])
def test_other_templates_are_written(templates: Any, tmp_path: Path) -> None:
    write_processing(tokenizer(templates), tmp_path)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).chat_template == templates


def test_what_cannot_save_itself_is_left_alone(tmp_path: Path) -> None:
    write_processing(None, tmp_path)
    write_processing(object(), tmp_path)
    assert not list(tmp_path.iterdir())
