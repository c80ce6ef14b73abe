"""``Seq2SeqTrainingArguments``: arguments of training with generation in evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainkit.trainer.arguments import TrainingArguments


@dataclass
class Seq2SeqTrainingArguments(TrainingArguments):
    """:class:`TrainingArguments` and how sequences are generated in evaluation and prediction.

    Args:
        sortish_sampler: for scripts: batches of samples of roughly the same length.
        predict_with_generate: generate sequences in evaluation, for metrics such as ROUGE and BLEU.
        generation_max_length: length of these in tokens; default that of the model.
        generation_num_beams: beams of the search; default that of the model.
        generation_config: a ``GenerationConfig``, its fields as a dict, the path of a folder or file with one, or the
            name of a model.

    Raises: as :class:`TrainingArguments`; ImportError if a dict is given and transformers is not installed.

    Example:
        >>> args = Seq2SeqTrainingArguments("out", predict_with_generate=True, report_to="none")
        >>> args.to_dict()["predict_with_generate"]
        True

    Source: transformers 4.57: ``Seq2SeqTrainingArguments``.
    """

    sortish_sampler: bool = field(default=False, metadata={"help": "For scripts: batches of similar lengths."})
    predict_with_generate: bool = field(default=False, metadata={"help": "Generate sequences in evaluation."})
    generation_max_length: int | None = field(default=None, metadata={"help": "Length of these, in tokens."})
    generation_num_beams: int | None = field(default=None, metadata={"help": "Beams of the search."})
    generation_config: str | Path | Any | None = field(
        default=None, metadata={"help": "Name of a model, or path, with the configuration of generation."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("generation_max_length", "generation_num_beams"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}: got {value!r}, expected an integer of at least 1, or None")
        if isinstance(self.generation_config, Mapping):
            from transformers import GenerationConfig

            self.generation_config = GenerationConfig.from_dict(dict(self.generation_config))
