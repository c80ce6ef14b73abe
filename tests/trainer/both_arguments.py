"""The same arguments made by trainkit and by transformers 4.57, and a process that forgets what the latter wrote."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import transformers
from accelerate.state import AcceleratorState

from trainkit.trainer.arguments import TrainingArguments

HOME = {"output_dir": "out", "logging_dir": "logs", "report_to": "none"}


def ours(**kwargs: Any) -> TrainingArguments:
    return TrainingArguments(**{**HOME, **kwargs})


def theirs(**kwargs: Any) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(**{**HOME, **kwargs})


def described(args: Any) -> dict[str, Any]:
    """``to_dict`` without what differs on purpose."""
    content: dict[str, Any] = args.to_dict()
    # transformers removes this option as soon as it has read it.
    content["accelerator_config"].pop("use_configured_state", None)
    return content


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Put back the environment, to which transformers writes, and forget the process state."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        AcceleratorState._reset_state(reset_partial_state=True)
