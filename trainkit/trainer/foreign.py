"""What is known about other libraries' objects, without importing those libraries.

Nobody can hold an object of a class whose module was never imported, so a look into ``sys.modules`` decides.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

from torch import nn


def is_instance(obj: Any, module: str, *names: str) -> bool:
    """Whether an object is of one of the classes ``names`` of a module, which may not be imported (then it is not).

    Example:
        >>> is_instance(1, "builtins", "int"), is_instance(1, "a_module_that_is_not_there", "int")
        (True, False)
    """
    found = sys.modules.get(module)
    classes = tuple(c for c in (getattr(found, name, None) for name in names) if isinstance(c, type))
    return bool(classes) and isinstance(obj, classes)


def is_pretrained_model(model: Any) -> bool:
    """A ``transformers.PreTrainedModel``."""
    return is_instance(model, "transformers.modeling_utils", "PreTrainedModel")


def is_peft_model(model: Any) -> bool:
    """A model wrapped by PEFT."""
    return is_instance(model, "peft", "PeftModel", "PeftMixedModel")


def is_tokenizer(processor: Any) -> bool:
    """A tokenizer of transformers."""
    return is_instance(processor, "transformers.tokenization_utils_base", "PreTrainedTokenizerBase")


def is_processor(processor: Any) -> bool:
    """A processor of transformers that joins several modalities."""
    return is_instance(processor, "transformers.processing_utils", "ProcessorMixin")


def is_sequence_feature_extractor(processor: Any) -> bool:
    """A feature extractor of transformers that pads sequences."""
    name = "transformers.feature_extraction_sequence_utils"
    return is_instance(processor, name, "SequenceFeatureExtractor")


def is_hf_dataset(data: Any) -> bool:
    """A map-style ``datasets.Dataset``."""
    return is_instance(data, "datasets.arrow_dataset", "Dataset")


def is_hf_stream(data: Any) -> bool:
    """A ``datasets.IterableDataset``."""
    return is_instance(data, "datasets.iterable_dataset", "IterableDataset")


def unwrapped(model: Any) -> nn.Module:
    """The module that the user wrote: without DDP, DataParallel, ``torch.compile``."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = model.module
        if inner is None:
            found: nn.Module = model
            return found
        model = inner


def base_of(model: Any) -> nn.Module:
    """The module below wrappers and PEFT."""
    module: Any = unwrapped(model)
    if is_peft_model(module):
        get_base = getattr(module, "get_base_model", None)
        module = get_base() if get_base is not None else module.base_model.model
    found: nn.Module = module
    return found


def forward_parameters(model: Any) -> dict[str, inspect.Parameter]:
    """The parameters of ``forward`` of the module below wrappers and PEFT, by name."""
    return dict(inspect.signature(base_of(model).forward).parameters)


def takes_any_keyword(model: Any) -> bool:
    """Whether ``forward`` has a ``**kwargs``."""
    return any(p.kind is p.VAR_KEYWORD for p in forward_parameters(model).values())
