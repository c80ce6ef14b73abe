"""Model folders of transformers: written with the weights of a state; read only if they ask for nothing else."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from trainkit.io.checkpoint import files
from trainkit.io.checkpoint.errors import CheckpointError
from trainkit.io.checkpoint.format import flatten_state
from trainkit.io.checkpoint.model_files import first_names, flush_all, new_folder, read_model
from trainkit.state import TrainState

CONFIG, ADAPTER, GENERATE = "config.json", "adapter_config.json", "custom_generate"
_MAX_CONFIG_BYTES = 16 * 2**20
_UNCHECKED = ("subfolder", "variant", "gguf_file", "state_dict", "from_tf", "from_flax", "adapter_kwargs")
"""Options with which transformers loads something else than what was checked."""


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
    """A model of transformers from a local folder: safetensors only, no weight left to chance.

    What is known to make transformers 4.57 run code of the folder, or read another one, is refused: docs/advisories.md.

    Args:
        model_class: a model class of transformers, or one of its Auto classes.
        folder: with ``config.json`` and the weights.
        options: passed on to ``model_class.from_pretrained`` (``torch_dtype``, ``attn_implementation``).

    Returns: the model, in evaluation mode as transformers gives it.

    Raises:
        ValueError: an option makes transformers load something else than the folder's own files.
        CheckpointError: the folder lacks a weight of the model or has others (see
            :func:`~trainkit.io.checkpoint.partial.restore_partial` for a part of them); a weight file or
            ``config.json`` is a link, damaged, or names files elsewhere; the folder has code that transformers would
            run, or its configuration asks for some, which transformers before 5.5 runs whatever ``trust_remote_code``
            says.
        Exception: what the class raises.

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
    unchecked = [name for name in _UNCHECKED if options.get(name)]
    if unchecked:
        raise ValueError(
            f"options: {unchecked[0]} makes transformers load other files than those that are checked; expected the "
            "folder that holds config.json and model.safetensors, or load with the model class itself"
        )
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
    """Refuse what makes transformers 4.57 run code or read configurations that are not the folder's.

    Source: CVE-2026-4372 (attn_implementation), CVE-2026-5241 (trust_remote_code); ``load_backbone``,
    ``LightGlueConfig`` and ``XcodecConfig`` of transformers 4.57.1.
    """
    with files.reading(str(folder)), files.opened(folder) as fd:
        if files.exists(fd, ADAPTER):
            raise CheckpointError(
                f"{folder}: has {ADAPTER}, with which transformers loads the model that it names instead of this one; "
                "load that model and its adapter with peft"
            )
        if files.exists(fd, GENERATE):
            raise CheckpointError(
                f"{folder}: has {GENERATE}, whose code transformers runs when it loads the model; take it out, or load "
                "with the model class itself if you trust it"
            )
        if not files.exists(fd, CONFIG):
            return
        data = files.read_small(fd, CONFIG, _MAX_CONFIG_BYTES, f"{folder / CONFIG}")
    try:
        asked = next(_requests(json.loads(data.decode())), None)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / CONFIG}: no valid JSON: {error}") from error
    if asked is not None:
        key, value = asked
        raise CheckpointError(
            f"{folder / CONFIG}: {key} is {value!r:.200}, which asks for code or files from elsewhere; take it "
            "out, or load with the model class itself if you trust it"
        )


def _requests(config: Any) -> Iterator[tuple[str, Any]]:
    """What some part of a configuration wants from elsewhere."""
    for part in _mappings(config):
        if part is not config and "auto_map" in part:
            # Of the whole, trust_remote_code=False decides; for a part, transformers asks at the terminal.
            yield "auto_map", part["auto_map"]
        for key, value in part.items():
            asks = _REQUESTS.get(key, _names_kernel if "attn_implementation" in key else None)
            if asks is not None and asks(value, part):
                yield key, value


def _mappings(found: Any) -> Iterator[dict[str, Any]]:
    """All mappings in it, itself among them."""
    rest = [found]
    while rest:
        part = rest.pop()
        if isinstance(part, dict):
            yield part
            rest.extend(part.values())
        elif isinstance(part, list):
            rest.extend(part)


def _names_kernel(value: Any, part: dict[str, Any]) -> bool:
    # "owner/repository", which is fetched and imported; by part of the model where the value is a mapping.
    values = (value, *(one for mapping in _mappings(value) for one in mapping.values()))
    return any(isinstance(one, str) and "/" in one for one in values)


def _names_backbone(value: Any, part: dict[str, Any]) -> bool:
    # A model whose own configuration is loaded, and asks in turn; a bare name may be a folder. Of timm, its own names.
    return isinstance(value, str) and value != "" and (not part.get("use_timm_backbone") or _names_source(value, part))


def _names_source(value: Any, part: dict[str, Any]) -> bool:
    # timm: "hf-hub:owner/model", "local-dir:/folder".
    return isinstance(value, str) and ":" in value


def _is_given(value: Any, part: dict[str, Any]) -> bool:
    return bool(value)


def _names_detector(value: Any, part: dict[str, Any]) -> bool:
    # LightGlue loads the configuration of one that transformers does not know from where its _name_or_path says.
    return isinstance(value, dict) and value.get("model_type", "superpoint") != "superpoint"


def _names_encoder(value: Any, part: dict[str, Any]) -> bool:
    # So does Xcodec.
    return isinstance(value, dict) and "_name_or_path" in value


_REQUESTS: dict[str, Callable[[Any, dict[str, Any]], bool]] = {
    "architecture": _names_source,
    "backbone": _names_backbone,
    "keypoint_detector_config": _names_detector,
    "semantic_model_config": _names_encoder,
    **dict.fromkeys(
        (
            "attribute_map",  # What is set under one name takes effect under another.
            "checkpoint_path",  # timm before 1.0.20 unpickles it.
            "configuration_files",
            "pretrained_cfg_overlay",
            "transformers_weights",  # Another file, also a pickle.
            "trust_remote_code",
        ),
        _is_given,
    ),
}
"""By key: whether a value in a mapping asks for code or files from elsewhere."""
