"""The files of a tokenizer or processor, written beside its model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainkit.trainer.foreign import is_processor


def check_processing(processing: Any) -> None:
    """Refuse a tokenizer or processor whose files would go elsewhere.

    The name of a chat template is that of its file, and comes from the repository that the tokenizer was loaded from.
    transformers before 5.10 writes to wherever ``../`` in it leads.

    Raises: ValueError: a chat template's name has a separator of paths.

    Source: CVE-2026-9856.
    """
    parts = processing.attributes if is_processor(processing) else ()
    for part in (processing, *(getattr(processing, name, None) for name in parts)):
        templates = getattr(part, "chat_template", None)
        for name in templates if isinstance(templates, Mapping) else ():
            if set(str(name)) & set("/\\\0"):
                raise ValueError(
                    f"processing_class: {type(part).__name__} has a chat template named {name!r:.200}, which would be "
                    "written outside of the checkpoint; rename it in chat_template, and mistrust where it comes from"
                )


def write_processing(processing: Any, folder: str | Path) -> None:
    """Let a tokenizer or processor write its files; nothing happens with what has no ``save_pretrained``.

    Raises: ValueError: see :func:`check_processing`; nothing is written.
    """
    if hasattr(processing, "save_pretrained"):
        check_processing(processing)
        processing.save_pretrained(str(folder))
