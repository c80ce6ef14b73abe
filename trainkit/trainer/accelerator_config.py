"""``AcceleratorConfig``: what the Trainer tells accelerate about data and accumulation."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class AcceleratorConfig:
    """Options for ``accelerate.Accelerator``.

    Args:
        split_batches: the batch size is that of all processes together, and is split among them.
        dispatch_batches: the main process reads and sends to the others; None: for iterable data only.
        even_batches: complete the last batches with samples from the start, so that all processes have as many.
        use_seedable_sampler: the order of an epoch is a function of the seed and the epoch.
        non_blocking: copy to the device without waiting; useful with pinned memory.
        gradient_accumulation_kwargs: ``num_steps`` sets ``gradient_accumulation_steps``.
        use_configured_state: go on with the process state of an accelerator that exists already.

    Example:
        >>> AcceleratorConfig(split_batches=True).to_dict()["split_batches"]
        True

    Source: transformers 4.57: ``AcceleratorConfig``.
    """

    split_batches: bool = False
    dispatch_batches: bool | None = None
    even_batches: bool = True
    use_seedable_sampler: bool = True
    non_blocking: bool = False
    gradient_accumulation_kwargs: dict[str, Any] | None = None
    use_configured_state: bool = False

    @classmethod
    def from_json_file(cls, json_file: str | Path) -> AcceleratorConfig:
        """The configuration in a JSON file.

        Raises: ValueError for an unknown key; OSError if the file cannot be read.
        """
        return cls._of(
            json.loads(Path(json_file).read_text(encoding="utf-8")), f"accelerator_config: the file {json_file}"
        )

    @classmethod
    def parse(cls, value: Any) -> AcceleratorConfig:
        """The configuration that the argument ``accelerator_config`` means.

        Args:
            value: a configuration, a mapping, the path of a JSON file, or None for the defaults. A configuration of
                transformers is converted.

        Raises: ValueError for an unknown key, NotImplementedError for a class, TypeError for anything else.

        Example:
            >>> AcceleratorConfig.parse({"split_batch": True})
            Traceback (most recent call last):
            ...
            ValueError: accelerator_config: got the unknown keys ['split_batch'], expected some of: split_batches, ...
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, type):
            raise NotImplementedError(
                f"accelerator_config: got the class {value.__name__}, expected an object; write {value.__name__}(...)"
            )
        if value is None:
            return cls()
        if isinstance(value, (str, Path)):
            return cls.from_json_file(value)
        content = value.to_dict() if hasattr(value, "to_dict") else value
        return cls._of(content, "accelerator_config:")

    @classmethod
    def _of(cls, content: Any, where: str) -> AcceleratorConfig:
        if not isinstance(content, Mapping):
            raise TypeError(
                f"{where} got {type(content).__name__}, expected a dict, a JSON file or an AcceleratorConfig"
            )
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(key for key in content if key not in known)
        if unknown:
            raise ValueError(f"{where} got the unknown keys {unknown}, expected some of: {', '.join(known)}")
        return cls(**content)

    def to_dict(self) -> dict[str, Any]:
        """The options by name, copied."""
        return copy.deepcopy(self.__dict__)

    def pop(self, key: str, default: Any = None) -> Any:
        """Remove an option and return it."""
        return self.__dict__.pop(key, default)


def accumulation_steps(config: AcceleratorConfig, gradient_accumulation_steps: int) -> int:
    """The number of microbatches per update: ``gradient_accumulation_kwargs["num_steps"]`` where it is given.

    Raises: ValueError if ``gradient_accumulation_steps`` is given too and says something else.

    Example:
        >>> accumulation_steps(AcceleratorConfig(gradient_accumulation_kwargs={"num_steps": 4}), 1)
        4

    Source: Trainer 4.57: ``create_accelerator_and_postprocess``.
    """
    given = (config.gradient_accumulation_kwargs or {}).get("num_steps")
    if given is None:
        return gradient_accumulation_steps
    if gradient_accumulation_steps not in (1, given):
        raise ValueError(
            f"gradient_accumulation_steps: got {gradient_accumulation_steps}, but accelerator_config says "
            f"num_steps={given}; give one of the two"
        )
    return int(given)
