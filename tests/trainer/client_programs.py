"""Programs with libraries that subclass the Trainer of transformers, on tiny models and local data.

``python -m tests.trainer.client_programs CLIENT ours|theirs FOLDER`` trains, saves, resumes and evaluates with one of
them, with trainkit's classes in the place of transformers' or without, and writes what came of it to
``FOLDER/result.json``. The libraries are imported inside of functions: after the classes are in place.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.tiny import transformers_config
from tests.trainer.tiny import SETTINGS

TEXT = "the a red green blue cat dog bird sees likes takes old new house tree big small in on at"
WORDS = TEXT.split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ARGUMENTS: dict[str, Any] = {
    **SETTINGS,
    "learning_rate": 0.01,
    "save_strategy": "steps",
    "save_steps": 3,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "max_steps": 6,
    "seed": 3,
}


def sentences(n: int, seed: int = 0) -> list[str]:
    """``n`` sentences of five words."""
    g = torch.Generator().manual_seed(seed)
    return [" ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (5,), generator=g)) for _ in range(n)]


def bert_folder(folder: Path) -> str:
    """A folder with a small encoder without dropout, and its tokenizer."""
    from transformers import BertModel, BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS]))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=32).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(transformers_config("BertConfig", vocab_size=len(SPECIAL) + len(WORDS))).save_pretrained(folder)
    return str(folder)


def causal_model() -> Any:
    """A small language model without dropout, and a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *WORDS])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="[SEP]", unk_token="[UNK]")
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    config = transformers_config("LlamaConfig", vocab_size=len(SPECIAL) + len(WORDS), **ids)
    return LlamaForCausalLM(config), tokenizer


def table(**columns: Any) -> Any:
    from datasets import Dataset

    return Dataset.from_dict(columns)


def sentence_transformers_with_loss(folder: Path, loss: str, columns: dict[str, Any]) -> Any:
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
        losses,
        models,
    )

    encoder = models.Transformer(bert_folder(folder.parent / "bert"))
    model = SentenceTransformer(modules=[encoder, models.Pooling(16)], device="cpu")
    torch.manual_seed(1)
    made = {
        "softmax": lambda: losses.SoftmaxLoss(model, sentence_embedding_dimension=16, num_labels=2),
        "ranking": lambda: losses.MultipleNegativesRankingLoss(model),
    }[loss]()
    return SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(str(folder), **ARGUMENTS),
        train_dataset=table(**columns),
        eval_dataset=table(**{name: values[:6] for name, values in columns.items()}),
        loss=made,
    )


def sentence_transformers(folder: Path) -> Any:
    """A loss that only holds the model."""
    columns = {"anchor": sentences(12), "positive": sentences(12, 1)}
    return sentence_transformers_with_loss(folder, "ranking", columns)


def sentence_transformers_softmax(folder: Path) -> Any:
    """A loss with parameters of its own, which the optimizer holds beside those of the model."""
    columns = {"one": sentences(12), "other": sentences(12, 1), "label": [0, 1] * 6}
    return sentence_transformers_with_loss(folder, "softmax", columns)


def setfit(folder: Path) -> Any:
    """Its own Trainer drives one of sentence_transformers; that one is returned, ready to train."""
    from sentence_transformers import SentenceTransformer, models
    from setfit import SetFitModel, Trainer, TrainingArguments
    from sklearn.linear_model import LogisticRegression

    encoder = models.Transformer(bert_folder(folder.parent / "bert"))
    body = SentenceTransformer(modules=[encoder, models.Pooling(16)], device="cpu")
    rows = table(text=sentences(8), label=[0, 1] * 4)
    names = ("report_to", "logging_steps", "save_strategy", "save_steps", "eval_strategy", "eval_steps", "max_steps")
    trainer = Trainer(
        model=SetFitModel(body, LogisticRegression(), labels=["no", "yes"]),
        args=TrainingArguments(
            str(folder),
            batch_size=2,
            seed=3,
            body_learning_rate=0.01,
            save_total_limit=2,
            show_progress_bar=False,
            **{name: ARGUMENTS[name] for name in names},
        ),
        train_dataset=rows,
        eval_dataset=rows,
        metric=lambda y_pred, y_test: {"agreement": sum(map(str.__eq__, map(str, y_pred), map(str, y_test)))},
    )
    pairs, loss = trainer.get_dataset(rows["text"], rows["label"], args=trainer.args, max_pairs=12)
    inner = trainer.st_trainer
    inner.train_dataset, inner.eval_dataset, inner.loss = pairs, pairs.select(range(4)), loss
    inner.whole = trainer
    return inner


def setfit_whole(trainer: Any) -> dict[str, Any]:
    """Both phases, embeddings and classifier, through the library's own Trainer."""
    trainer.whole.train()
    return {"predicted": [str(label) for label in trainer.whole.model.predict(["the red cat", "a new house"])]}


def span_marker(folder: Path) -> Any:
    from span_marker import SpanMarkerModel, Trainer
    from transformers import TrainingArguments

    torch.manual_seed(0)
    model = SpanMarkerModel.from_pretrained(
        bert_folder(folder.parent / "bert"), labels=["O", "ANIMAL"], model_max_length=16, marker_max_length=8
    )
    words = [sentence.split() for sentence in sentences(12)]
    tags = [[int(word in ("cat", "dog", "bird")) for word in row] for row in words]
    rows = table(tokens=words, ner_tags=tags)
    arguments = TrainingArguments(str(folder), **ARGUMENTS)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows.select(range(4)))
    # Its own metrics come from the hub; its model card wants these names.
    names = ("overall_precision", "overall_recall", "overall_f1", "overall_accuracy")
    trainer.compute_metrics = lambda found: {name: float(sum(map(len, found.inputs))) for name in names}
    return trainer


def trl_sft(folder: Path) -> Any:
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = causal_model()
    return SFTTrainer(
        model=model,
        args=SFTConfig(str(folder), **ARGUMENTS, gradient_accumulation_steps=2, max_length=16, bf16=False),
        train_dataset=table(text=sentences(20)),
        eval_dataset=table(text=sentences(5, 1)),
        processing_class=tokenizer,
    )


def trl_sft_peft(folder: Path) -> Any:
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = causal_model()
    return SFTTrainer(
        model=model,
        args=SFTConfig(str(folder), **ARGUMENTS, max_length=16, bf16=False, gradient_checkpointing=False),
        train_dataset=table(prompt=sentences(20), completion=sentences(20, 2)),
        eval_dataset=table(prompt=sentences(5, 1), completion=sentences(5, 3)),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]),
    )


def trl_dpo(folder: Path) -> Any:
    from trl import DPOConfig, DPOTrainer

    model, tokenizer = causal_model()
    rows = table(prompt=sentences(12), chosen=sentences(12, 1), rejected=sentences(12, 2))
    return DPOTrainer(
        model=model,
        args=DPOConfig(str(folder), **ARGUMENTS, max_length=32, max_prompt_length=16, bf16=False),
        train_dataset=rows,
        eval_dataset=rows.select(range(5)),
        processing_class=tokenizer,
    )


def peft(folder: Path) -> Any:
    """Adapters in a classifier, with the Trainer itself."""
    from peft import LoraConfig, get_peft_model
    from transformers import BertForSequenceClassification, BertTokenizerFast, Trainer, TrainingArguments

    saved = bert_folder(folder.parent / "bert")
    tokenizer = BertTokenizerFast.from_pretrained(saved)
    torch.manual_seed(0)
    base = BertForSequenceClassification.from_pretrained(saved, num_labels=2)
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))
    rows = table(**tokenizer(sentences(12)), labels=[0, 1] * 6)
    return Trainer(
        model=model,
        args=TrainingArguments(str(folder), **ARGUMENTS, load_best_model_at_end=True),
        train_dataset=rows,
        eval_dataset=rows.select(range(5)),
        processing_class=tokenizer,
    )


CLIENTS: dict[str, Callable[[Path], Any]] = {
    "sentence_transformers": sentence_transformers,
    "sentence_transformers_softmax": sentence_transformers_softmax,
    "setfit": setfit,
    "span_marker": span_marker,
    "trl_sft": trl_sft,
    "trl_sft_peft": trl_sft_peft,
    "trl_dpo": trl_dpo,
    "peft": peft,
}
NEEDS = {
    "sentence_transformers": ("sentence_transformers",),
    "sentence_transformers_softmax": ("sentence_transformers",),
    "setfit": ("setfit",),
    "span_marker": ("span_marker",),
    "trl_sft": ("trl",),
    "trl_sft_peft": ("trl", "peft"),
    "trl_dpo": ("trl",),
    "peft": ("peft",),
}
"""The packages of each."""


def trained(model: Any) -> dict[str, list[float]]:
    """The parameters that are trained, in order, as lists."""
    return {n: p.detach().double().flatten().tolist() for n, p in model.named_parameters() if p.requires_grad}


def whole_run(client: str, folder: Path) -> dict[str, Any]:
    """Train; train again in a new trainer from the checkpoint in the middle; evaluate."""
    make = CLIENTS[client]
    trainer = make(folder / "run")
    output = trainer.train()
    found = {
        "class": [f"{c.__module__}.{c.__name__}" for c in type(trainer).__mro__],
        "log": trainer.state.log_history,
        "train": dict(output.metrics),
        "step": output.global_step,
        "weights": trained(trainer.model),
        "files": sorted(os.listdir(folder / "run" / "checkpoint-3")),
        "evaluated": trainer.evaluate(),
    }
    again = make(folder / "run")
    again.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-3"))
    found["resumed"] = {
        "log": again.state.log_history,
        "step": again.state.global_step,
        "weights": trained(again.model),
    }
    again.save_model(str(folder / "saved"))
    found["saved"] = sorted(os.listdir(folder / "saved"))
    if client == "setfit":
        found.update(setfit_whole(make(folder / "whole")))
    return found


def main(client: str, whose: str, folder: str) -> None:
    from trainkit.trainer.compat import patch_transformers

    torch.set_num_threads(1)
    with patch_transformers() if whose == "ours" else nullcontext():
        for package in NEEDS[client]:
            importlib.import_module(package)
        found = whole_run(client, Path(folder))
    text = json.dumps(found, default=lambda x: x.tolist() if isinstance(x, Tensor) else float(x))
    (Path(folder) / "result.json").write_text(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
