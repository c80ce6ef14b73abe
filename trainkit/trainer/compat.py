"""trainkit's Trainer in the place of transformers', for code that was written against the latter."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

from trainkit.trainer.rooms import ROOM_OF

MODULES = (
    "transformers",
    "transformers.trainer",
    "transformers.trainer_callback",
    "transformers.trainer_pt_utils",
    "transformers.trainer_seq2seq",
    "transformers.trainer_utils",
    "transformers.training_args",
    "transformers.training_args_seq2seq",
    "transformers.debug_utils",
)
"""Where third-party code imports from."""

_ROOMS = (
    "accelerator_config",
    "arguments",
    "callbacks",
    "enums",
    "label_smoothing",
    "outputs",
    "progress",
    "seq2seq",
    "seq2seq_arguments",
    "state",
    "trainer",
)
"""Those of ``trainkit.trainer`` whose names take the place of the same ones. Data and functions stay as they are."""


@contextmanager
def patch_transformers() -> Iterator[None]:
    """A scope in which ``transformers`` gives trainkit's Trainer, arguments, callbacks, outputs and enumerations.

    Code that is imported inside of the scope, and imports made by functions that run inside of it, get trainkit's
    classes from ``transformers``, ``transformers.trainer`` and the modules beside it. Their subclasses, also those of
    other libraries, are subclasses of trainkit's and stay so. Code that was imported before keeps what it has; its
    callbacks work with trainkit's Trainer all the same. At the end of the scope, also after an error, everything in
    ``transformers`` is as it was. The scope is one for the process, not for a thread.

    Raises: ImportError without transformers.

    Example:
        >>> import transformers
        >>> with patch_transformers():
        ...     from transformers import TrainingArguments
        >>> TrainingArguments.__module__, transformers.TrainingArguments.__module__
        ('trainkit.trainer.arguments', 'transformers.training_args')
    """
    # A module of transformers that is loaded inside of the scope would build on our classes, so this one comes first.
    import_module("transformers.integrations.integration_utils")
    own = replacements()
    changed: list[tuple[ModuleType, str, Any]] = []
    try:
        for module in [import_module(name) for name in MODULES]:
            for name, value in own.items():
                theirs = getattr(module, name, value)
                if theirs is not value:
                    changed.append((module, name, theirs))
                    setattr(module, name, value)
        yield
    finally:
        for module, name, theirs in reversed(changed):
            setattr(module, name, theirs)
        _restore_elsewhere(own, {name: theirs for _, name, theirs in changed})


def replacements() -> dict[str, Any]:
    """trainkit's objects by the names that transformers has for them."""
    found = {
        name: getattr(import_module(f"trainkit.trainer.{room}"), name)
        for name, room in ROOM_OF.items()
        if room in _ROOMS
    }
    # transformers has it in a notebook only, and then as the default that stands below.
    del found["NotebookProgressCallback"]
    found["DEFAULT_CALLBACKS"] = [found["DefaultFlowCallback"]]
    found["DEFAULT_PROGRESS_CALLBACK"] = found["ProgressCallback"]
    return found


def _restore_elsewhere(own: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Other modules of transformers that were loaded inside of the scope have imported our classes."""
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("transformers.") and isinstance(module, ModuleType):
            for name, value in theirs.items():
                if vars(module).get(name) is own[name]:
                    setattr(module, name, value)
