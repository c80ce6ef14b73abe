"""The manifest of a checkpoint: what its files were when they were written.

Its first line holds a digest of all that follows. That line and the fields ``format`` and ``version`` stay as they are
in all later versions, so that an old program can tell a newer checkpoint from a damaged one.
"""

from __future__ import annotations

import functools
import math
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import safetensors
import torch
import xxhash

from trainkit.io.checkpoint import strict_json
from trainkit.io.checkpoint.errors import CheckpointError, DamageError
from trainkit.io.checkpoint.format import FILES, MANIFEST, MODEL, TRAINING, safe_name, tensor_name_problem
from trainkit.io.checkpoint.tensors import DTYPES, TensorRecord

FORMAT = "trainkit.checkpoint"
VERSION = 1

_DIGEST = re.compile(r"[0-9a-f]{32}")
_DIGEST_LINE = re.compile(rb'\{"digest":"([0-9a-f]{32})",\n')


@dataclass(frozen=True)
class FileRecord:
    """A file as it was written: its size in bytes and the xxh3_128 digest of its content, in hexadecimal."""

    size: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says about itself.

    Args:
        step: completed updates.
        save_counter: how many checkpoints its folder had seen when it was written; orders those of one step.
        run_id: of the run that wrote it.
        files: by name.
        tensors: by file and name.
        metrics: what was known of this state, for :class:`Retention`; None stands for a value that is not finite.
        versions: of the programs that wrote it; for readers, decides nothing.
    """

    step: int
    save_counter: int
    run_id: str
    files: Mapping[str, FileRecord]
    tensors: Mapping[str, Mapping[str, TensorRecord]]
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def order(self) -> tuple[int, int]:
        """What orders checkpoints: (step, save counter)."""
        return self.step, self.save_counter


def digest_of(data: bytes) -> str:
    """The xxh3_128 digest of bytes in hexadecimal. It finds damage; it does not prove who wrote them.

    Example:
        >>> digest_of(b"")
        '99aa06d3014798d86001c324468d497f'

    Source: xxHash 0.8, XXH3 with 128 bits.
    """
    return xxhash.xxh3_128_hexdigest(data)


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of a manifest: a line with the digest of all that follows, then one line per field.

    Raises: DamageError if it would pass the limit of 16 MiB or a million values.
    """
    body = {
        "format": FORMAT,
        "version": VERSION,
        "run_id": manifest.run_id,
        "step": manifest.step,
        "save_counter": manifest.save_counter,
        "versions": dict(manifest.versions),
        "metrics": dict(manifest.metrics),
        "files": {name: {"size": file.size, "xxh3_128": file.digest} for name, file in manifest.files.items()},
        "tensors": {
            file: {name: [tensor.dtype, list(tensor.shape)] for name, tensor in tensors.items()}
            for file, tensors in manifest.tensors.items()
        },
    }
    fields = (b'"%s":%s' % (name.encode(), strict_json.encode(value, MANIFEST)) for name, value in body.items())
    rest = b",\n".join(fields) + b"}\n"
    data = b'{"digest":"%s",\n%s' % (digest_of(rest).encode(), rest)
    # As a whole it must pass what a reader will ask of it.
    strict_json.check_extent(data, MANIFEST)
    return data


def decode_manifest(data: bytes, what: str) -> Manifest:
    """The manifest in bytes that nobody has vouched for.

    Args:
        data: the content of the file, at most 16 MiB.
        what: the file, for error messages.

    Raises:
        DamageError: it is not as it was written.
        CheckpointError: it is whole, but of a newer version of the format.
    """
    first = _DIGEST_LINE.match(data)
    if first is None:
        raise DamageError(f"{what}: does not begin with its digest; it is no manifest, or damaged")
    body = data[first.end() :]
    if digest_of(body) != first[1].decode():
        raise DamageError(f"{what}: its digest does not fit its content, which was changed after it was written")
    fields = strict_json.decode(b"{" + body, what)
    if fields.get("format") != FORMAT:
        raise DamageError(f"{what}: format is {fields.get('format')!a:.100}, expected {FORMAT!r}")
    version = _whole(fields.get("version"), "version", what)
    if version > VERSION:
        raise CheckpointError(
            f"{what}: written in version {version} of the format, this trainkit reads up to version {VERSION}; "
            "read it with a newer trainkit, or move this checkpoint away"
        )
    return _manifest_of(fields, what)


def _manifest_of(fields: dict[str, Any], what: str) -> Manifest:
    if not safe_name(fields.get("run_id")):
        raise DamageError(f"{what}: run_id is no safe name")
    files = {name: _file_record(name, value, what) for name, value in _mapping(fields, "files", what).items()}
    if set(files) != set(FILES):
        raise DamageError(f"{what}: speaks of the files {sorted(files)!a:.300}, expected {sorted(FILES)}")
    tensors = _mapping(fields, "tensors", what)
    if set(tensors) != {MODEL, TRAINING}:
        raise DamageError(f"{what}: has tensors of {sorted(tensors)!a:.300}, expected {[MODEL, TRAINING]}")
    metrics = _mapping(fields, "metrics", what)
    if not all(value is None or type(value) in (int, float) for value in metrics.values()):
        raise DamageError(f"{what}: a metric is no number")
    versions = _mapping(fields, "versions", what)
    if not all(isinstance(value, str) for value in versions.values()):
        raise DamageError(f"{what}: a version is no string")
    return Manifest(
        step=_whole(fields.get("step"), "step", what),
        save_counter=_whole(fields.get("save_counter"), "save_counter", what),
        run_id=fields["run_id"],
        files=files,
        tensors={file: _tensor_records(_mapping(tensors, file, what), what) for file in tensors},
        metrics=metrics,
        versions=versions,
    )


def _mapping(fields: Mapping[str, Any], name: str, what: str) -> dict[str, Any]:
    value = fields.get(name)
    if not isinstance(value, dict):
        raise DamageError(f"{what}: {name} is missing or no object")
    return value


def _whole(value: Any, name: str, what: str) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise DamageError(f"{what}: {name} is {value!a:.100}, expected a whole number of 63 bits")
    return value


def _file_record(name: str, value: Any, what: str) -> FileRecord:
    if not safe_name(name):
        raise DamageError(f"{what}: unsafe file name {name!a:.200}")
    if not isinstance(value, dict) or set(value) != {"size", "xxh3_128"}:
        raise DamageError(f"{what}: the record of {name} needs size and xxh3_128")
    if not isinstance(value["xxh3_128"], str) or not _DIGEST.fullmatch(value["xxh3_128"]):
        raise DamageError(f"{what}: the digest of {name} is no 32 hexadecimal digits")
    return FileRecord(_whole(value["size"], f"the size of {name}", what), value["xxh3_128"])


def _tensor_records(values: dict[str, Any], what: str) -> dict[str, TensorRecord]:
    return {name: _tensor_record(name, value, what) for name, value in values.items()}


def _tensor_record(name: str, value: Any, what: str) -> TensorRecord:
    problem = tensor_name_problem(name)
    if problem:
        raise DamageError(f"{what}: the tensor name {name!a:.200} {problem}")
    fits = isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], list)
    if not fits or value[0] not in DTYPES or not all(type(n) is int and 0 <= n < 2**63 for n in value[1]):
        raise DamageError(f"{what}: the tensor {name!a:.200} is {value!a:.200}, expected [dtype, shape]")
    return TensorRecord(value[0], tuple(value[1]))


def plain_metrics(metrics: Mapping[str, float] | None) -> dict[str, float | None]:
    """Metrics as a manifest keeps them: numbers, None for what is not finite.

    Raises: TypeError for a name that is no string.

    Example:
        >>> plain_metrics({"loss": torch.tensor(0.5), "bad": float("nan")})
        {'loss': 0.5, 'bad': None}
    """
    found: dict[str, float | None] = {}
    for name, value in (metrics or {}).items():
        if not isinstance(name, str):
            raise TypeError(f"metrics: has the key {name!r}, expected strings as keys")
        number = float(value)
        found[name] = number if math.isfinite(number) else None
    return found


@functools.cache
def versions() -> dict[str, str]:
    """The versions of what writes a checkpoint. No paths, no host, nothing of the environment."""
    found = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "safetensors": safetensors.__version__,
    }
    try:
        found["trainkit"] = metadata.version("trainkit")
    except metadata.PackageNotFoundError:
        found["trainkit"] = "source"
    return found
