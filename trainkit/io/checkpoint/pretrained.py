"""Model folders of transformers: written with the weights of a state, and read without running what they name."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from trainkit.io.checkpoint import files
from trainkit.io.checkpoint.errors import CheckpointError
from trainkit.io.checkpoint.format import flatten_state
from trainkit.io.checkpoint.model_files import first_names, flush_all, new_folder, read_model
from trainkit.state import TrainState

CONFIG, ADAPTER = "config.json", "adapter_config.json"
_MAX_CONFIG_BYTES = 16 * 2**20


def save_pretrained(module: nn.Module, state: TrainState, folder: str | Path, **options: Any) -> Path:
    """A folder that ``from_pretrained`` of the module's class reads, with the weights of the state.

    The module writes it, and is not changed. The folder appears whole, or not at all.

    Args:
        module: a model of transformers, the one that the state is of.
        state: whose parameters and buffers are written.
        folder: must not exist yet, or be empty.
        options: passed on to ``module.save_pretrained`` (``max_shard_size``).

    Returns: the folder.

    Raises:
        TypeError: the module has no ``save_pretrained`` that takes weights.
        CheckpointError: the state is another model's; there is something at ``folder``; or the system refused.

    Example:
        >>> import tempfile
        >>> from transformers import BertConfig, BertModel
        >>> from trainkit import init_state
        >>> from trainkit.optim import sgd
        >>> sizes = dict(vocab_size=9, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1)
        >>> model = BertModel(BertConfig(**sizes))
        >>> with tempfile.TemporaryDirectory() as runs:
        ...     folder = save_pretrained(model, init_state(model, sgd(0.1)), Path(runs, "final"))
        ...     sorted(file.name for file in folder.iterdir())
        ['config.json', 'model.safetensors']
    """
    save = getattr(module, "save_pretrained", None)
    if save is None or "state_dict" not in inspect.signature(save).parameters:
        raise TypeError(
            f"module: {type(module).__name__} has no save_pretrained(folder, state_dict=...); "
            "expected a model of transformers. Use export_model for others"
        )
    named = flatten_state(state).model
    first = first_names(module)
    lacking = [name for name in module.state_dict() if first.get(name, name) not in named]
    if lacking:
        raise CheckpointError(f"state: has no {lacking[0]!r}, which the module has; is it another model's?")
    weights = {name: named[first[name]] for name in module.state_dict()}
    with new_folder(Path(folder)) as (fd, staging):
        save(str(staging), state_dict=weights, safe_serialization=True, **options)
        flush_all(fd)
    return Path(folder)


def from_pretrained(model_class: Any, folder: str | Path, **options: Any) -> nn.Module:
    """A model of transformers from a local folder: safetensors only, no code from the folder, no weight left to chance.

    Args:
        model_class: a model class of transformers, or one of its Auto classes.
        folder: with ``config.json`` and the weights.
        options: passed on to ``model_class.from_pretrained`` (``torch_dtype``, ``attn_implementation``).

    Returns: the model, in evaluation mode as transformers gives it.

    Raises: CheckpointError if the folder lacks a weight of the model or has others (see
        :func:`~trainkit.io.checkpoint.partial.restore_partial` for a part of them); if a file in it is a link,
        damaged, or names files elsewhere; or if its configuration asks for code from elsewhere, which transformers
        before 5.5 runs whatever ``trust_remote_code`` says; and what the class raises.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from transformers import AutoModel, BertConfig, BertModel
        >>> from trainkit import init_state
        >>> from trainkit.optim import sgd
        >>> sizes = dict(vocab_size=9, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1)
        >>> model = BertModel(BertConfig(**sizes))
        >>> with tempfile.TemporaryDirectory() as runs:
        ...     folder = save_pretrained(model, init_state(model, sgd(0.1)), Path(runs, "final"))
        ...     again = from_pretrained(AutoModel, folder)
        >>> torch.equal(again.pooler.dense.weight, model.pooler.dense.weight)
        True
    """
    # Reads all of it once more, and is the only check of what the index names and of where the files are.
    read_model(folder)
    _check_config(Path(folder))
    fixed = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
    module, info = model_class.from_pretrained(str(folder), **options, **fixed)
    different = {kind: names for kind, names in info.items() if names}
    if different:
        raise CheckpointError(f"{folder}: its weights are not those of {type(module).__name__}: {different}")
    loaded: nn.Module = module
    return loaded


def _check_config(folder: Path) -> None:
    """Refuse what makes transformers 4.57 run code or read files that are not the folder's.

    Source: CVE-2026-4372 (attn_implementation), CVE-2026-5241 (trust_remote_code).
    """
    with files.reading(str(folder)), files.opened(folder) as fd:
        if files.exists(fd, ADAPTER):
            raise CheckpointError(
                f"{folder}: has {ADAPTER}, with which transformers loads the model that it names instead of this one; "
                "load that model and its adapter with peft"
            )
        if not files.exists(fd, CONFIG):
            return
        data = files.read_small(fd, CONFIG, _MAX_CONFIG_BYTES, f"{folder / CONFIG}")
    try:
        entries = list(_entries(json.loads(data.decode())))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / CONFIG}: no valid JSON: {error}") from error
    for key, value in entries:
        if _asks_for_more(key, value):
            raise CheckpointError(
                f"{folder / CONFIG}: {key} is {value!r:.200}, which asks for code or files from elsewhere. If you want "
                "that, take it out and load with the model class itself, or give it as an option (attn_implementation)"
            )


def _asks_for_more(key: str, value: Any) -> bool:
    if "attn_implementation" in key:
        # "owner/repository", a kernel that is fetched and imported; by part of the model where it is a mapping.
        return any(isinstance(one, str) and "/" in one for one in (value, *(v for _, v in _entries(value))))
    return (key == "trust_remote_code" and bool(value)) or key == "configuration_files"


def _entries(found: Any) -> Iterator[tuple[str, Any]]:
    """The keys and values of all mappings in it."""
    rest = [found]
    while rest:
        part = rest.pop()
        if isinstance(part, dict):
            yield from part.items()
            rest.extend(part.values())
        elif isinstance(part, list):
            rest.extend(part)
