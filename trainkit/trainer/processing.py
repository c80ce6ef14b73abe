"""The files of a tokenizer or processor, written beside its model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from trainkit.trainer.foreign import is_processor, is_tokenizer


def check_processing(processing: Any) -> None:
    """Refuse a tokenizer or processor that would write elsewhere, or copy a file from elsewhere.

    What was loaded from a repository names files: a chat template, and the presets of a speaker, are written to where
    their names lead (transformers before 5.10 follows ``../``); ``vocab_file`` is copied from wherever it is.

    Raises: ValueError: a name leads out of the folder, or ``vocab_file`` is not a file of the tokenizer's.

    Source: CVE-2026-9856; ``PreTrainedTokenizerBase._from_pretrained`` of transformers 4.57.1.
    """
    for part in (processing, *_parts(processing)):
        for name in (*_names(part, "chat_template"), *_names(part, "speaker_embeddings")):
            if _leads_out(name):
                raise ValueError(
                    f"processing_class: {type(part).__name__} has a file named {name!r:.200} (chat_template, "
                    "speaker_embeddings), which would be written outside of the checkpoint; rename it, and mistrust "
                    "where it comes from"
                )
        if _is_foreign_vocabulary(part):
            raise ValueError(
                f"processing_class: {type(part).__name__}, from {part.name_or_path!r:.200}, has vocab_file "
                f"{part.vocab_file!r:.200}, which is none of its files and would be copied into the checkpoint; "
                "mistrust where it comes from"
            )


def write_processing(processing: Any, folder: str | Path) -> None:
    """Let a tokenizer or processor write its files; nothing happens with what has no ``save_pretrained``.

    Raises: ValueError: see :func:`check_processing`; nothing is written.
    """
    if hasattr(processing, "save_pretrained"):
        check_processing(processing)
        processing.save_pretrained(str(folder))


def _parts(processing: Any) -> Iterator[Any]:
    own = getattr(processing, "__dict__", {}).values()
    return (part for part in own if is_tokenizer(part) or is_processor(part))


def _names(part: Any, attribute: str) -> list[str]:
    found = getattr(part, attribute, None)
    return [str(name) for name in found] if isinstance(found, Mapping) else []


def _leads_out(name: str) -> bool:
    # Windows' rules know both kinds of separators.
    path = PureWindowsPath(name)
    return bool(path.anchor) or ".." in path.parts or "\0" in name


def _is_foreign_vocabulary(part: Any) -> bool:
    path, origin = getattr(part, "vocab_file", None), getattr(part, "name_or_path", None)
    # Without an origin it was made here, from files that its user chose.
    if not is_tokenizer(part) or not isinstance(path, str) or not isinstance(origin, str) or not origin:
        return False
    is_inside = Path(origin).resolve() in Path(path).resolve().parents
    return not is_inside and Path(path).name not in part.vocab_files_names.values()
