"""Text as rows of bytes: which documents, how they are split, how they are packed.

Documents are a ``datasets.Dataset`` with the columns ``name`` and ``text``. Tokens are bytes, so there is no vocabulary
to build or to lose, and any file is text.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import torch
from datasets import Dataset, Features, Value, load_dataset
from torch import Tensor

SEPARATOR = b"\0"
"""The byte before every document, from which a model learns to begin one."""
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


def stdlib_documents() -> Dataset:
    """The source files of the running Python's standard library, without its tests: a corpus that is always there.

    About 700 files and 12 MB in CPython 3.11.

    Raises: FileNotFoundError for a Python without source files.

    Example:
        >>> documents = stdlib_documents()
        >>> "dataclasses.py" in documents["name"]
        True
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in root.rglob("*.py") if _NOT_LIBRARY.isdisjoint(file.relative_to(root).parts)]
    if not files:
        raise FileNotFoundError(f"no Python sources under {root}; give a text of your own")
    return _documents(root, files)


def path_documents(path: Path) -> Dataset:
    """A text file, or all files of a folder and its subfolders; names are relative to it. Hidden files are left out.

    Raises:
        FileNotFoundError: nothing is at ``path``.
        ValueError: the folder has no file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "a.txt").write_text("hello")
        ...     path_documents(Path(folder))[0]
        {'name': 'a.txt', 'text': b'hello'}
    """
    if path.is_file():
        return _documents(path.parent, [path])
    if not path.is_dir():
        raise FileNotFoundError(f"data: nothing is at {str(path)!r}; expected a text file or a folder of text files")
    files = [file for file in path.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(path))]
    if not files:
        raise ValueError(f"data: the folder {str(path)!r} has no files; expected text files in it")
    return _documents(path, files)


def dataset_documents(name: str) -> Dataset:
    """The training rows of a dataset of the Hugging Face hub, or of a local folder that ``load_dataset`` can read.

    Args:
        name: what ``datasets.load_dataset`` takes; ``name:config`` picks a configuration. The text is in ``text``.

    Returns: documents named by their row number.

    Raises:
        ValueError: the dataset has no column ``text``, or one that holds something else.
        FileNotFoundError, ConnectionError, ...: as ``load_dataset`` raises them.
    """
    path, _, config = (name, "", "") if Path(name).exists() else name.partition(":")
    rows = load_dataset(path, config or None, split="train")
    if "text" not in rows.column_names:
        raise ValueError(f"dataset: {name!r} has no column 'text', it has {', '.join(rows.column_names)}")
    if getattr(rows.features["text"], "dtype", None) not in ("string", "large_string", "binary", "large_binary"):
        raise ValueError(f"dataset: column 'text' of {name!r} is {rows.features['text']}, expected text")
    return rows.select_columns("text").add_column("name", [str(i) for i in range(len(rows))])


def text_documents(path: Path | None = None, dataset: str | None = None) -> Dataset:
    """Documents from a path, from a dataset, or, where neither is given, the standard library's.

    Raises: ValueError if both are given, and what :func:`path_documents` and :func:`dataset_documents` raise.

    Example:
        >>> len(text_documents()) > 100
        True
    """
    if path is not None and dataset is not None:
        raise ValueError("data and dataset: both are given, expected at most one of them")
    if dataset is not None:
        return dataset_documents(dataset)
    return stdlib_documents() if path is None else path_documents(path)


def split_by_name(documents: Dataset, share: float) -> tuple[Dataset, Dataset]:
    """Training and validation documents, split whole, by a hash of the name.

    A document is held out if the first 8 bytes of SHA-256 of its name, as a fraction of 2^64, are below ``share``; so
    it stays on its side when others come and go. At least the document with the lowest fraction is held out, and at
    least the one with the highest is not. A single document is cut instead, and its end held out.

    Args:
        documents: with the columns ``name`` and ``text``.
        share: expected share of documents held out, between 0 and 1.

    Returns: (training, validation), in the order of ``documents``.

    Raises: ValueError if ``share`` is not between 0 and 1, or there is no document.

    Example:
        >>> documents = Dataset.from_dict({"name": ["a", "b", "c", "d"], "text": ["", "", "", ""]})
        >>> [side["name"][:] for side in split_by_name(documents, 0.2)]
        [['a', 'b'], ['c', 'd']]
    """
    if not 0 < share < 1:
        raise ValueError(f"share: got {share}, expected a number between 0 and 1")
    if not len(documents):
        raise ValueError("documents: there are none; expected at least one")
    if len(documents) == 1:
        return _cut(documents, share)
    fractions = [_fraction(name) for name in documents["name"]]
    by_fraction = sorted(range(len(documents)), key=fractions.__getitem__)
    below = sum(fraction < share for fraction in fractions)
    border = min(max(below, 1), len(documents) - 1)
    return documents.select(sorted(by_fraction[border:])), documents.select(sorted(by_fraction[:border]))


def pack(documents: Dataset, seq_len: int) -> Tensor:
    """All documents one after the other, cut into rows of inputs and targets.

    Row i is ``bytes[i * seq_len : (i + 1) * seq_len + 1]``: its first ``seq_len`` bytes are inputs, its last
    ``seq_len`` are targets. Rows share one byte, so that every byte but the first is a target exactly once. What does
    not fill a row at the end is left out.

    Args:
        documents: with a column ``text`` of strings (taken as UTF-8) or bytes.
        seq_len: bytes per row of inputs.

    Returns: uint8 tensor of shape (rows, seq_len + 1), a view of the text without a copy.

    Raises: ValueError if ``seq_len`` is not positive or the text is too short for one row.

    Example:
        >>> pack(Dataset.from_dict({"name": ["a", "b"], "text": ["12", "34"]}), 2)
        tensor([[ 0, 49, 50],
                [50,  0, 51]], dtype=torch.uint8)
    """
    if seq_len < 1:
        raise ValueError(f"seq_len: got {seq_len}, expected at least 1 byte")
    text = bytearray()
    for batch in documents.iter(batch_size=1000):
        for document in batch["text"]:
            text += SEPARATOR
            text += document if isinstance(document, bytes) else document.encode()
    if len(text) < seq_len + 1:
        raise ValueError(
            f"text: {len(text)} bytes in {len(documents)} documents do not fill a row of seq_len + 1 = {seq_len + 1}; "
            "give more text or a smaller seq_len"
        )
    return torch.frombuffer(text, dtype=torch.uint8).unfold(0, seq_len + 1, seq_len)


def _documents(root: Path, files: Iterable[Path]) -> Dataset:
    ordered = sorted(files, key=lambda file: file.relative_to(root).as_posix())
    columns = {
        "name": [file.relative_to(root).as_posix() for file in ordered],
        "text": [file.read_bytes() for file in ordered],
    }
    # In memory: a dataset made from a generator is cached under the hash of its code, which does not see changed files.
    return Dataset.from_dict(columns, features=Features({"name": Value("string"), "text": Value("large_binary")}))


def _cut(documents: Dataset, share: float) -> tuple[Dataset, Dataset]:
    name, text = documents[0]["name"], documents[0]["text"]
    border = round(len(text) * (1 - share))
    first, rest = (
        Dataset.from_dict({"name": [name], "text": [t]}, documents.features) for t in (text[:border], text[border:])
    )
    return first, rest


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _fraction(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
