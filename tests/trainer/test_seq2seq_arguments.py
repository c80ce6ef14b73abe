"""Seq2SeqTrainingArguments: generation configurations, written and read back."""

import json
from collections.abc import Iterator

import pytest
import transformers

from tests.trainer.both_arguments import HOME, restored
from trainkit.trainer.seq2seq_arguments import Seq2SeqTrainingArguments


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    with restored():
        yield


class TestSeq2Seq:
    def test_generation_config_survives_json(self) -> None:
        config = transformers.GenerationConfig(max_new_tokens=3)
        args = Seq2SeqTrainingArguments(**HOME, generation_config=config)
        peer = transformers.Seq2SeqTrainingArguments(**HOME, generation_config=config)
        assert args.to_dict()["generation_config"] == peer.to_dict()["generation_config"]
        assert Seq2SeqTrainingArguments(**json.loads(args.to_json_string())) == args

    def test_words_for_its_booleans_are_refused(self) -> None:
        with pytest.raises(TypeError, match="predict_with_generate: got the text 'false', expected True or False"):
            Seq2SeqTrainingArguments(**HOME, predict_with_generate="false")

    def test_lengths(self) -> None:
        with pytest.raises(ValueError, match="generation_num_beams: got 0"):
            Seq2SeqTrainingArguments(**HOME, generation_num_beams=0)
