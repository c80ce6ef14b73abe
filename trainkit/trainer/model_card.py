"""The model card of a run: ``README.md`` with what was trained on what, with which settings and results.

It is made of what the run knows: the log, the arguments, the names in the model's configuration. Nothing is looked up
online.
"""

from __future__ import annotations

import importlib.metadata
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trainkit.trainer.enums import ParallelMode
from trainkit.trainer.foreign import base_of, is_hf_dataset, is_peft_model, is_pretrained_model, unwrapped
from trainkit.trainer.state import as_python, write_whole
from trainkit.trainer.user_metrics import losses, user_metrics

FILE = "README.md"
TAG = "generated_from_trainer"
_GENERIC_BUILDERS = ("csv", "json", "pandas", "parquet", "text")
_METRIC_TAGS = frozenset(
    ("accuracy", "bleu", "f1", "matthews_correlation", "pearsonr", "precision")
    + ("recall", "rouge", "sacrebleu", "spearmanr", "wer")
)
_TASKS = {
    "text-generation": ("CAUSAL_LM",),
    "image-classification": ("IMAGE_CLASSIFICATION",),
    "image-segmentation": ("IMAGE_SEGMENTATION",),
    "fill-mask": ("MASKED_LM",),
    "object-detection": ("OBJECT_DETECTION",),
    "question-answering": ("QUESTION_ANSWERING",),
    "text2text-generation": ("SEQ_TO_SEQ_CAUSAL_LM",),
    "text-classification": ("SEQUENCE_CLASSIFICATION",),
    "table-question-answering": ("TABLE_QUESTION_ANSWERING",),
    "token-classification": ("TOKEN_CLASSIFICATION",),
    "audio-classification": ("AUDIO_CLASSIFICATION",),
    "automatic-speech-recognition": ("CTC", "SPEECH_SEQ_2_SEQ"),
    "zero-shot-image-classification": ("ZERO_SHOT_IMAGE_CLASSIFICATION",),
    "image-text-to-text": ("IMAGE_TEXT_TO_TEXT",),
}
"""Tasks on the hub, and the tables of transformers (``MODEL_FOR_..._MAPPING_NAMES``) that list their classes."""
_TASK_NAMES = {
    "text-generation": "Causal Language Modeling",
    "fill-mask": "Masked Language Modeling",
    "text2text-generation": "Sequence-to-sequence Language Modeling",
}
_COMMENT = (
    "<!-- Written by the Trainer from what it knows of the run. Read it, complete it, and remove this comment. -->"
)
_OPEN = "More information needed"


@dataclass(frozen=True)
class Card:
    """What a card says; each entry that is None or empty is left out.

    Args:
        name: of the model.
        library_name: that loads it.
        language: code, or codes.
        license: name of the license.
        finetuned_from: the model that training began with.
        tags: of the card.
        tasks: tags of tasks.
        dataset: names of the data sets, as people read them.
        dataset_tags: their names on the hub.
        dataset_args: their configurations.
        dataset_metadata: further entries on each.
        results: of the last evaluation, by name.
        rows: one for each evaluation during training, by column.
        hyperparameters: by name.
    """

    name: str
    library_name: str | None = None
    language: str | Sequence[str] | None = None
    license: str | None = None
    finetuned_from: str | None = None
    tags: Sequence[str] = (TAG,)
    tasks: Sequence[str] = ()
    dataset: Sequence[str] = ()
    dataset_tags: Sequence[str] = ()
    dataset_args: Sequence[str | None] = ()
    dataset_metadata: Sequence[Mapping[str, Any]] = ()
    results: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[Mapping[str, Any]] = ()
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)


def write_model_card(
    folder: str | Path,
    *,
    args: Any,
    state: Any,
    model: Any,
    datasets: tuple[Any, Any] = (None, None),
    language: str | None = None,
    license: str | None = None,
    tags: str | Sequence[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    tasks: str | Sequence[str] | None = None,
    dataset_tags: str | Sequence[str] | None = None,
    dataset: str | Sequence[str] | None = None,
    dataset_args: str | Sequence[str] | None = None,
) -> None:
    """Write ``README.md``, in the place of one that is there.

    Tags of the old card are kept if ``tags`` are given; a card of PEFT is completed by PEFT.

    Args:
        folder: is made.
        args: the arguments of the run.
        state: with ``log_history``.
        model: any module; its ``config``, if it has one, names the model that training began with.
        datasets: evaluation and training data; the first that is not None gives names, if it is of ``datasets``.
        language: code of the language.
        license: name of the license.
        tags: further tags.
        model_name: default the name of the folder in ``args.output_dir``.
        finetuned_from: default by the configuration; "" leaves it out.
        tasks: default by the name of the model's class.
        dataset_tags: names on the hub; default those of the data.
        dataset: names to read; default ``dataset_tags``.
        dataset_args: configurations; default those of the data.

    Raises: OSError if the file cannot be written.

    Source: Trainer 4.57: ``create_model_card``.
    """
    path = Path(folder) / FILE
    old = _metadata_of(path)
    if tags is not None:
        tags = [*_listed(tags), *_listed(old.get("tags"))]
    origin = origin_of(model) if finetuned_from is None else finetuned_from
    named = names_of_data(next((data for data in datasets if data is not None), None))
    dataset_tags = named.get("dataset_tags") if dataset_tags is None else _listed(dataset_tags)
    rows, results = training_results(state.log_history)
    card = Card(
        name=model_name or Path(args.output_dir).name or origin or "model",
        library_name="transformers" if is_pretrained_model(model) or is_peft_model(model) else None,
        language=language,
        license=license,
        finetuned_from=origin or None,
        tags=list(dict.fromkeys([*_listed(tags), TAG])),
        tasks=task_of(model) if tasks is None else _listed(tasks),
        dataset=_listed(dataset_tags if dataset is None else dataset),
        dataset_tags=_listed(dataset_tags),
        dataset_args=_listed(named.get("dataset_args") if dataset_args is None else dataset_args),
        dataset_metadata=named.get("dataset_metadata", []),
        results=results,
        rows=rows,
        hyperparameters=hyperparameters(args),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text_of(card))
    module = unwrapped(model)
    if old.get("library_name") == "peft" and hasattr(module, "create_or_update_model_card"):
        module.create_or_update_model_card(str(folder))  # type: ignore[operator]


# -- what is known -----------------------------------------------------------------------------------------------------


def origin_of(model: Any) -> str | None:
    """The name of the model that training began with: ``config._name_or_path``, unless it is empty or a local folder.

    None without a configuration.
    """
    name = getattr(getattr(unwrapped(model), "config", None), "_name_or_path", None)
    return None if not name or os.path.isdir(name) else str(name)


def task_of(model: Any) -> list[str]:
    """The task on the hub that the class of a model of transformers is for, as a list of none or one.

    A subclass has the task of its parent. A class that is listed for several has the last of them.
    """
    module = base_of(model)
    if not is_pretrained_model(module):
        return []
    from transformers.models.auto import modeling_auto

    names = {cls.__name__ for cls in type(module).__mro__}
    found = [
        task
        for task, tables in _TASKS.items()
        for table_name in tables
        if not names.isdisjoint(_class_names(getattr(modeling_auto, f"MODEL_FOR_{table_name}_MAPPING_NAMES", {})))
    ]
    return found[-1:]


def _class_names(listed: Mapping[str, Any]) -> Iterable[str]:
    for name in listed.values():
        yield from (name,) if isinstance(name, str) else name


def names_of_data(data: Any) -> dict[str, list[Any]]:
    """Name, configuration and split of a ``datasets.Dataset`` of the hub, as lists of one; nothing for other data."""
    name = getattr(data, "builder_name", None) if is_hf_dataset(data) else None
    if name is None or name in _GENERIC_BUILDERS:
        return {}
    found = {"config": data.config_name, "split": str(data.split)}
    return {"dataset_tags": [name], "dataset_args": [data.config_name], "dataset_metadata": [found]}


def training_results(log: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Results in the log of a run: a row for each evaluation during training, and those of the last evaluation.

    Training ends with the last entry that has ``train_loss``. Evaluations of several data sets at one step are one row.

    Args:
        log: ``TrainerState.log_history``.

    Returns: rows by column (``Training Loss``, ``Epoch``, ``Step``, ``Validation Loss``, metrics), results by name.

    Example:
        >>> rows, results = training_results(
        ...     [
        ...         {"loss": 2.0, "step": 1},
        ...         {"eval_loss": 1.0, "eval_f1": 0.5, "epoch": 1.0, "step": 1},
        ...         {"train_loss": 2.0},
        ...     ]
        ... )
        >>> rows
        [{'Training Loss': 2.0, 'Epoch': 1.0, 'Step': 1, 'Validation Loss': 1.0, 'F1': 0.5}]
        >>> results
        {'Loss': 1.0, 'F1': 0.5}

    Source: Trainer 4.57: ``parse_log_history``.
    """
    end = max((i for i, entry in enumerate(log) if "train_loss" in entry), default=-1)
    rows: list[dict[str, Any]] = []
    results: dict[str, Any] = {}
    loss: Any = "No log"
    last_step: Any = object()
    for i, entry in enumerate(log):
        loss = entry.get("loss", loss)
        found = _results_of(entry)
        if not found:
            continue
        same = entry.get("step") == last_step and results.keys().isdisjoint(found)
        last_step = entry.get("step")
        results = {**results, **found} if same else found
        if i >= end:
            continue
        columns = {"Validation Loss" if name == "Loss" else name: value for name, value in found.items()}
        if same:
            rows[-1].update(columns)
        else:
            rows.append({"Training Loss": loss, "Epoch": entry.get("epoch"), "Step": last_step, **columns})
    return rows, results


def _results_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    found = {name.removeprefix("eval_"): value for name, value in losses(entry).items()}
    found.update(user_metrics(entry))
    return {" ".join(word.capitalize() for word in name.split("_")): value for name, value in found.items()}


def hyperparameters(args: Any) -> dict[str, Any]:
    """The settings that a card lists, those that change nothing left out.

    Source: Trainer 4.57: ``extract_hyperparameters_from_trainer``.
    """
    found: dict[str, Any] = {
        name: getattr(args, name) for name in ("learning_rate", "train_batch_size", "eval_batch_size", "seed")
    }
    world, groups = args.world_size, args.gradient_accumulation_steps
    if args.parallel_mode == ParallelMode.DISTRIBUTED:
        found["distributed_type"] = "multi-GPU" if args.n_gpu else "multi-CPU"
    if world > 1:
        found["num_devices"] = world
    if groups > 1:
        found["gradient_accumulation_steps"] = groups
    if world * groups > 1:
        found["total_train_batch_size"] = args.train_batch_size * world * groups
    if world > 1:
        found["total_eval_batch_size"] = args.eval_batch_size * world
    found["optimizer"] = _optimizer(args)
    found["lr_scheduler_type"] = args.lr_scheduler_type.value
    for name in ("warmup_ratio", "warmup_steps"):
        if getattr(args, name):
            found[f"lr_scheduler_{name}"] = getattr(args, name)
    if args.max_steps >= 0:
        found["training_steps"] = args.max_steps
    else:
        found["num_epochs"] = args.num_train_epochs
    if args.fp16 or args.bf16:
        found["mixed_precision_training"] = "Native AMP" if args.fp16 else "Native AMP, bfloat16"
    if args.label_smoothing_factor:
        found["label_smoothing_factor"] = args.label_smoothing_factor
    return found


def _optimizer(args: Any) -> str:
    name = args.optim.value
    parts = [name]
    if "adam" in name:
        parts.append(f"betas=({args.adam_beta1}, {args.adam_beta2}), epsilon={args.adam_epsilon}")
    if args.optim_args:
        parts.append(str(args.optim_args))
    return ", ".join(parts)


# -- how it is said ----------------------------------------------------------------------------------------------------


def metadata_of(card: Card) -> dict[str, Any]:
    """The front matter of a card, in its order.

    Source: the hub's specification of model cards; Trainer 4.57: ``TrainingSummary.create_metadata``.
    """
    metrics = _metrics_on_the_hub(card.results)
    entries: dict[str, Any] = {
        "library_name": card.library_name,
        "language": _listed(card.language),
        "license": card.license,
        "base_model": card.finetuned_from,
        "tags": list(card.tags),
        "datasets": list(card.dataset_tags),
        "metrics": list(metrics),
    }
    found = {name: value for name, value in entries.items() if value}
    found["model-index"] = [{"name": card.name, "results": _index_results(card, metrics)}]
    return found


def _metrics_on_the_hub(results: Mapping[str, Any]) -> dict[str, str]:
    """The hub's name of each result that it knows, with the name here."""
    named = {name.lower().replace(" ", "_"): name for name in results}
    return {
        "rouge" if tag == "rouge1" else tag: name
        for tag, name in named.items()
        if tag in _METRIC_TAGS or tag == "rouge1"
    }


def _index_results(card: Card, metrics: Mapping[str, str]) -> list[dict[str, Any]]:
    """An entry for each task on each data set; the hub takes only complete ones."""
    if not metrics:
        return []
    measured = [{"name": name, "type": tag, "value": as_python(card.results[name])} for tag, name in metrics.items()]
    found = []
    for task in card.tasks:
        for i, (tag, name) in enumerate(zip(card.dataset_tags, card.dataset, strict=False)):
            data = {"name": name, "type": tag, **_at(card.dataset_metadata, i, {})}
            if (configuration := _at(card.dataset_args, i, None)) is not None:
                data["args"] = configuration
            named = {"name": _task_name(task), "type": task}
            found.append({"task": named, "dataset": data, "metrics": list(measured)})
    return found


def _task_name(tag: str) -> str:
    return _TASK_NAMES.get(tag) or " ".join(word.capitalize() for word in tag.split("-"))


def _at(values: Sequence[Any], i: int, default: Any) -> Any:
    return values[i] if i < len(values) else default


def text_of(card: Card) -> str:
    """The whole card: front matter and Markdown.

    Example:
        >>> text_of(Card("tiny", finetuned_from="someone/base", dataset=["glue"])).split("tiny")[-1].splitlines()[2]
        'This model is a fine-tuned version of [someone/base](https://huggingface.co/someone/base) on the glue dataset.'
    """
    from huggingface_hub import CardData

    parts = [f"---\n{CardData(**metadata_of(card)).to_yaml()}\n---", _COMMENT, f"# {card.name}", _summary(card)]
    for title in ("Model description", "Intended uses & limitations", "Training and evaluation data"):
        parts += [f"## {title}", _OPEN]
    parts += ["## Training procedure", "### Training hyperparameters"]
    settings = _bullets(card.hyperparameters)
    parts += [f"The following hyperparameters were used during training:\n{settings}" if settings else _OPEN]
    if card.rows:
        parts += ["### Training results", table(card.rows)]
    parts += ["### Framework versions", _bullets(_versions())]
    return "\n\n".join(parts) + "\n"


def _summary(card: Card) -> str:
    origin = card.finetuned_from
    start = "This model was trained from scratch"
    if origin:
        start = f"This model is a fine-tuned version of [{origin}](https://huggingface.co/{origin})"
    lines = [f"{start} on {_datasets(card.dataset)}."]
    if card.results:
        lines.append("It achieves the following results on the evaluation set:")
        lines.append(_bullets({name: shown(value) for name, value in card.results.items()}))
    return "\n".join(lines)


def _datasets(names: Sequence[str]) -> str:
    if not names:
        return "an unknown dataset"
    listed = [f"the {name}" for name in names]
    return f"{listed[0]} dataset" if len(listed) == 1 else f"{', '.join(listed[:-1])} and {listed[-1]} datasets"


def _bullets(entries: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in entries.items())


def shown(value: Any) -> str:
    """A value as a card shows it: of a float with more than 4 decimals 4, or 4 digits where those would all be 0.

    Example:
        >>> shown(0.123456), shown(0.5), shown(1.2345e-06), shown("No log")
        ('0.1235', '0.5', '1.234e-06', 'No log')
    """
    value = as_python(value)
    if not isinstance(value, float) or len(str(value).partition(".")[2]) <= 4:
        return str(value)
    rounded = f"{value:.4f}"
    return rounded if float(rounded) else f"{value:.4g}"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table with every column that some row has; empty where a row has none.

    Example:
        >>> print(table([{"Step": 1, "Loss": 0.5}, {"Step": 2}]))
        | Step | Loss |
        |:----:|:----:|
        | 1    | 0.5  |
        | 2    |      |
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[shown(row[name]) if name in row else "" for name in names] for row in rows]
    widths = [max(len(text) for text in column) for column in zip(names, *cells, strict=True)]

    def line(texts: Iterable[str]) -> str:
        return "".join(f"| {text:<{width}} " for text, width in zip(texts, widths, strict=True)) + "|"

    rule = "".join(f"|:{'-' * width}:" for width in widths) + "|"
    return "\n".join([line(names), rule, *(line(texts) for texts in cells)])


def _versions() -> dict[str, str]:
    found = {}
    for name in ("trainkit", "transformers", "datasets", "tokenizers"):
        try:
            found[name.capitalize()] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["Pytorch"] = str(torch.__version__)
    return found


def _metadata_of(path: Path) -> dict[str, Any]:
    """The front matter of a card that is there."""
    if not path.exists():
        return {}
    from huggingface_hub import metadata_load

    try:
        return metadata_load(path) or {}
    # YAML has many errors, and none of them is worth the card of a trained model.
    except Exception as error:
        warnings.warn(f"{path}: its front matter cannot be read and is replaced: {error}", UserWarning, stacklevel=3)
        return {}


def _listed(value: Any) -> list[Any]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)
