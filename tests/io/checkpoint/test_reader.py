"""The reader of files of tensors: every byte at its place, and the digest of all of them, however the system reads."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from trainkit.io.checkpoint import tensors
from trainkit.io.checkpoint.errors import DamageError
from trainkit.io.checkpoint.tensors import Reader

SIZES = st.lists(st.integers(0, 40), max_size=30)


def written(path: Path, size: int) -> bytes:
    """Random bytes in a file."""
    content = random.Random(size).randbytes(size)
    path.write_bytes(content)
    return content


def read(path: Path, sizes: Sequence[int], skipped: int) -> tuple[list[bytes], str]:
    """Pieces of a file after the first bytes, and their digest."""
    hasher, pieces = xxhash.xxh3_128(), [bytearray(size) for size in sizes]
    fd = os.open(path, os.O_RDONLY)
    try:
        os.lseek(fd, skipped, os.SEEK_SET)
        with Reader(fd, hasher, str(path)) as reader:
            for piece in pieces:
                reader.fill(memoryview(piece))
    finally:
        os.close(fd)
    return list(map(bytes, pieces)), hasher.hexdigest()


@given(SIZES, st.integers(0, 5), st.integers(1, 50), st.integers(1, 4), st.integers(1, 9))
def test_all_is_read_also_where_the_system_gives_less(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], skipped: int, piece: int, parts: int, at_once: int
) -> None:
    path = tmp_path_factory.mktemp("reader") / "file"
    content = written(path, skipped + sum(sizes))
    real = os.preadv

    def less(fd: int, buffers: Sequence[Any], offset: int) -> int:
        return real(fd, [buffers[0][:at_once]], offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "PIECE", piece)
        patch.setattr(tensors, "_PARTS", parts)
        patch.setattr(os, "preadv", less)
        found, digest = read(path, sizes, skipped)
    assert b"".join(found) == content[skipped:]
    assert list(map(len, found)) == sizes
    assert digest == xxhash.xxh3_128_hexdigest(content[skipped:])


@pytest.mark.parametrize("size", [0, 1, 3 * tensors.PIECE, 9 * tensors.PIECE + 1])
def test_what_is_skimmed_is_digested(tmp_path: Path, size: int) -> None:
    content, hasher = written(tmp_path / "file", size), xxhash.xxh3_128()
    with (tmp_path / "file").open("rb") as file, Reader(file.fileno(), hasher, "file") as reader:
        reader.skim(size)
    assert hasher.hexdigest() == xxhash.xxh3_128_hexdigest(content)


@pytest.mark.parametrize("lacking", [1, 2 * tensors.PIECE])
def test_a_file_that_ends_too_early_is_refused(tmp_path: Path, lacking: int) -> None:
    size = 4 * tensors.PIECE
    written(tmp_path / "file", size - lacking)
    with pytest.raises(DamageError, match="file: ends too early"):
        read(tmp_path / "file", [size], 0)


def test_more_tensors_than_the_system_takes_at_once_are_read(tmp_path: Path) -> None:
    content = written(tmp_path / "file", 3000)
    found, digest = read(tmp_path / "file", [1] * 3000, 0)
    assert b"".join(found) == content and digest == xxhash.xxh3_128_hexdigest(content)
