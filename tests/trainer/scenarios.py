"""Runs that reach every method of the Trainer, for trainkit's and for that of transformers 4.57 alike."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor, nn

from tests.tiny import transformers_config
from tests.trainer.tiny import SETTINGS, make_net, make_rows

COMMON: dict[str, Any] = {
    **SETTINGS,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "logging_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
}


class Words(nn.Module):
    """A model over tokens with input embeddings, which NEFTune and token counts ask for."""

    main_input_name = "input_ids"

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 3)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.embedding(input_ids).mean(1))
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


def make_words() -> Words:
    torch.manual_seed(0)
    return Words()


def word_rows(n: int = 7) -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(7, (5,), generator=g), "labels": i % 3} for i in range(n)]


def table(n: int) -> datasets.Dataset:
    rows = [{"x": row["x"].tolist(), "labels": row["labels"], "unused": "text"} for row in make_rows(n)]
    return datasets.Dataset.from_list(rows)


def make_tokenizer() -> Any:
    """A tokenizer over ``w0`` to ``w6``, made here."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(7)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", eos_token="w1", bos_token="w2")


def make_gpt2(seed: int = 0, **options: Any) -> Any:
    from transformers import GPT2LMHeadModel

    torch.manual_seed(seed)
    sizes = {"vocab_size": 7, "hidden_size": 8, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    return GPT2LMHeadModel(transformers_config("GPT2Config", **{**sizes, **options}))


def token_rows(n: int = 7, seed: int = 1, length: int = 6) -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(seed)
    rows = [torch.randint(7, (length,), generator=g) for _ in range(n)]
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row.clone()} for row in rows]


def accuracy(found: Any) -> dict[str, float]:
    return {"accuracy": float(np.mean(found.predictions.argmax(-1) == found.label_ids))}


def _train(trainer: Any) -> None:
    trainer.train()


def _resume(trainer: Any) -> None:
    trainer.train()
    trainer.train(resume_from_checkpoint=str(Path(trainer.args.output_dir, "checkpoint-2")))


def _users(trainer: Any) -> None:
    trainer.train()
    trainer.predict(make_rows(4, seed=3))
    trainer.get_num_trainable_parameters()
    trainer.get_learning_rates()
    trainer.get_optimizer_group()
    trainer._gather_and_numpify(torch.zeros(2), "name")
    callback = _callback_class(trainer)
    trainer.add_callback(callback)
    trainer.remove_callback(callback)
    trainer.add_callback(callback())
    trainer.pop_callback(callback)
    trainer.save_state()
    trainer.log_metrics("train", {"loss": 1.0})
    trainer.save_metrics("train", {"loss": 1.0})


def _callback_class(trainer: Any) -> type:
    base = next(c for c in type(trainer.callback_handler.callbacks[0]).__mro__ if c.__name__ == "TrainerCallback")
    return type("Extra", (base,), {})


def _tokenizer(trainer: Any) -> None:
    trainer.tokenizer = trainer.tokenizer


def _search(trainer: Any) -> None:
    trainer.hyperparameter_search(
        backend="optuna", n_trials=1, hp_space=lambda trial: {"learning_rate": trial.suggest_float("lr", 0.1, 0.2)}
    )


def _push(trainer: Any) -> None:
    trainer.train()
    trainer.save_model()


@dataclass(frozen=True)
class Scenario:
    """A run.

    Args:
        arguments: of ``TrainingArguments``, over ``COMMON``.
        given: makes what the constructor gets.
        entry: what is called on the trainer.
        hub: whether it needs one.
    """

    arguments: Mapping[str, Any]
    given: Callable[[], dict[str, Any]]
    entry: Callable[[Any], None] = _train
    hub: bool = False


def _plain() -> dict[str, Any]:
    rows = {"train_dataset": make_rows(7), "eval_dataset": make_rows(4, seed=1)}
    return {"model": make_net(), "compute_metrics": accuracy, **rows}


def _words() -> dict[str, Any]:
    return {"model": make_words(), "train_dataset": word_rows(), "eval_dataset": word_rows(4)}


def _gpt2() -> dict[str, Any]:
    rows = {"train_dataset": token_rows(), "eval_dataset": token_rows(4)}
    return {"model": make_gpt2(), "processing_class": make_tokenizer(), **rows}


def _init() -> dict[str, Any]:
    return {**_plain(), "model": None, "model_init": lambda: make_net()}


BEST = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
SCENARIOS: dict[str, Scenario] = {
    "train": Scenario(BEST, _plain),
    "one microbatch per update": Scenario({"gradient_accumulation_steps": 1}, _plain),
    "resume": Scenario({"restore_callback_states_from_checkpoint": True}, _plain, _resume),
    "users": Scenario({}, _plain, _users),
    "legacy": Scenario({"use_legacy_prediction_loop": True}, _plain),
    "jit": Scenario({"jit_mode_eval": True}, _plain),
    "tokens": Scenario({"include_tokens_per_second": True}, _words),
    "neftune": Scenario({"neftune_noise_alpha": 5.0}, _words),
    "table": Scenario({}, lambda: {**_plain(), "train_dataset": table(7), "eval_dataset": table(4)}),
    "tokenizer": Scenario({}, _gpt2),
    "old name": Scenario({}, lambda: {**_plain(), "processing_class": make_tokenizer()}, _tokenizer),
    "model_init": Scenario({}, _init),
    "search": Scenario({"save_strategy": "no", "num_train_epochs": 1}, _init, _search),
    "hub": Scenario({"push_to_hub": True, "hub_token": "hf_own"}, _gpt2, _push, hub=True),
}


def classes(library: str) -> tuple[Any, Any]:
    """The trainer and its arguments, of ``ours`` or ``theirs``."""
    if library == "ours":
        from trainkit import Trainer, TrainingArguments

        return Trainer, TrainingArguments
    import transformers

    return transformers.Trainer, transformers.TrainingArguments


def kind(value: Any) -> Any:
    """What an argument is, in the words of neither library."""
    if value is None or isinstance(value, bool | str):
        return value if not isinstance(value, str) or "/" not in value else "path"
    if isinstance(value, int | float):
        return "number"
    for of, name in ((Tensor, "tensor"), (nn.Module, "module"), (torch.device, "device")):
        if isinstance(value, of):
            return name
    if isinstance(value, torch.optim.Optimizer) or hasattr(value, "param_groups"):
        return "optimizer"
    if type(value).__name__ in ("TrainingArguments", "TrainerState"):
        return type(value).__name__
    if isinstance(value, Mapping):
        return "mapping"
    if hasattr(value, "dataset") and hasattr(value, "__iter__"):
        return "loader"
    if isinstance(value, list | datasets.Dataset):
        return "rows"
    if inspect.isclass(value):
        return "class"
    return "function" if callable(value) else "iterator" if hasattr(value, "__next__") else "object"


def _shape(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return tuple(map(kind, args)), tuple(sorted((name, kind(value)) for name, value in kwargs.items()))


def overriding(base: Any, names: Any, calls: dict[str, list[Any]]) -> Any:
    """A subclass that overrides methods, notes each call and goes on with ``super()``."""
    made = type("Overriding", (base,), {})
    for name in names:
        setattr(made, name, _noting(made, base, name, calls.setdefault(name, [])))
    return made


def _noting(cls: Any, base: Any, name: str, noted: list[Any]) -> Any:
    member = inspect.getattr_static(base, name)
    if isinstance(member, property):

        def read(self: Any) -> Any:
            noted.append(_shape((), {}))
            return getattr(super(cls, self), name)

        def write(self: Any, value: Any) -> None:
            noted.append(_shape((value,), {}))
            member.fset(self, value)

        return property(read, write)
    if isinstance(member, staticmethod):

        @functools.wraps(member.__func__)
        def free(*args: Any, **kwargs: Any) -> Any:
            noted.append(_shape(args, kwargs))
            return member.__func__(*args, **kwargs)

        return staticmethod(free)

    # Of the signature, transformers and accelerate ask for some.
    @functools.wraps(member)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        noted.append(_shape(args, kwargs))
        return getattr(super(cls, self), name)(*args, **kwargs)

    return method


def run(library: str, name: str, methods: Any, folder: Path) -> dict[str, list[Any]]:
    """Calls of overridden methods in a scenario."""
    scenario = SCENARIOS[name]
    cls, args_cls = classes(library)
    calls: dict[str, list[Any]] = {}
    args = args_cls(str(folder / "run"), **{**COMMON, **scenario.arguments})
    trainer = overriding(cls, methods, calls)(args=args, **scenario.given())
    scenario.entry(trainer)
    return calls
