import hashlib
import json
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit.io.data.text import (
    dataset_documents,
    pack,
    path_documents,
    split_by_name,
    stdlib_documents,
)


def documents(texts: dict[str, str | bytes]) -> Dataset:
    return Dataset.from_dict({"name": list(texts), "text": list(texts.values())})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_bytes(b"second")
    (tmp_path / "sub" / "a.txt").write_bytes(b"third \xff")
    (tmp_path / "a.txt").write_bytes(b"first")
    (tmp_path / ".hidden").write_bytes(b"not text")
    return tmp_path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", path)
    return path


class TestPathDocuments:
    def test_a_folder_is_read_in_the_order_of_names(self, folder: Path) -> None:
        found = path_documents(folder)
        assert found["name"][:] == ["a.txt", "b.txt", "sub/a.txt"]
        assert found["text"][:] == [b"first", b"second", b"third \xff"]

    def test_a_file_is_one_document(self, folder: Path) -> None:
        assert path_documents(folder / "b.txt")[:] == {"name": ["b.txt"], "text": [b"second"]}

    def test_files_changed_between_two_calls_are_read_again(self, folder: Path) -> None:
        path_documents(folder)
        (folder / "a.txt").write_bytes(b"changed")
        assert path_documents(folder)["text"][0] == b"changed"

    def test_a_missing_path_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(
            FileNotFoundError, match=r"data: nothing is at '.*nowhere'; expected a text file or a folder"
        ):
            path_documents(tmp_path / "nowhere")

    def test_a_folder_without_files_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / ".git").write_text("")
        with pytest.raises(ValueError, match="has no files"):
            path_documents(tmp_path)


class TestStdlibDocuments:
    def test_holds_the_library_without_its_tests_and_installed_packages(self) -> None:
        names = stdlib_documents()["name"][:]
        assert {"ast.py", "json/decoder.py"} <= set(names)
        assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]
        assert len(names) > 300


@pytest.mark.usefixtures("cache")
class TestDatasetDocuments:
    def test_a_local_folder_gives_its_text_column(self, tmp_path: Path) -> None:
        data = tmp_path / "data"
        data.mkdir()
        rows = [{"id": 7, "text": "one"}, {"id": 8, "text": "zwei \u00fc"}]
        (data / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        found = dataset_documents(str(data))
        assert found[:] == {"text": ["one", "zwei \u00fc"], "name": ["0", "1"]}

    @pytest.mark.parametrize(
        ("row", "message"),
        [({"body": "x"}, "no column 'text', it has body"), ({"text": 3}, "is Value.*int64.*, expected text")],
    )
    def test_a_dataset_without_text_is_refused(self, tmp_path: Path, row: dict[str, object], message: str) -> None:
        data = tmp_path / "data"
        data.mkdir()
        (data / "train.jsonl").write_text(json.dumps(row))
        with pytest.raises(ValueError, match=message):
            dataset_documents(str(data))


class TestSplitByName:
    @given(st.sets(st.text(min_size=1, max_size=5), min_size=2, max_size=30), st.floats(0.01, 0.99))
    @settings(max_examples=30, deadline=None)
    def test_a_document_is_on_one_side_and_both_sides_have_some(self, names: set[str], share: float) -> None:
        training, validation = split_by_name(documents(dict.fromkeys(names, "x")), share)
        assert set(training["name"]) | set(validation["name"]) == names
        assert len(training) + len(validation) == len(names)
        assert len(training)
        assert len(validation)

    def test_the_hash_of_the_name_decides(self) -> None:
        names = [f"{i}.py" for i in range(200)]
        _, validation = split_by_name(documents(dict.fromkeys(names, "x")), 0.25)
        # The first byte alone decides against 0.25 = 64 / 256.
        assert validation["name"][:] == [n for n in names if hashlib.sha256(n.encode()).digest()[0] < 64]

    def test_a_single_document_is_cut(self) -> None:
        training, validation = split_by_name(documents({"a": "0123456789"}), 0.3)
        assert (training["text"][:], validation["text"][:]) == (["0123456"], ["789"])

    @pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
    def test_a_share_that_leaves_a_side_empty_is_refused(self, share: float) -> None:
        with pytest.raises(ValueError, match="share: got"):
            split_by_name(documents({"a": "x", "b": "y"}), share)

    def test_no_documents_are_refused(self) -> None:
        with pytest.raises(ValueError, match="there are none"):
            split_by_name(documents({}), 0.5)


class TestPack:
    @given(st.lists(st.binary(max_size=9), min_size=1, max_size=9), st.integers(1, 7))
    @settings(max_examples=60, deadline=None)
    def test_every_byte_but_the_first_is_a_target_once(self, texts: list[bytes], seq_len: int) -> None:
        stream = b"".join(b"\0" + text for text in texts)
        source = documents({str(i): text for i, text in enumerate(texts)})
        if len(stream) <= seq_len:
            with pytest.raises(ValueError, match="do not fill a row"):
                pack(source, seq_len)
            return
        rows = pack(source, seq_len)
        kept = len(rows) * seq_len
        assert len(stream) - 1 - kept < seq_len
        assert bytes(rows[:, :-1].flatten().tolist()) == stream[:kept]
        assert bytes(rows[:, 1:].flatten().tolist()) == stream[1 : kept + 1]

    def test_strings_are_utf8(self) -> None:
        assert torch.equal(pack(documents({"a": "\u00fc"}), 2), torch.tensor([[0, 0xC3, 0xBC]], dtype=torch.uint8))

    def test_rows_are_a_view(self) -> None:
        rows = pack(documents({"a": "x" * 1000}), 10)
        assert rows.untyped_storage().nbytes() == 1001

    def test_too_little_text_says_how_much_is_needed(self) -> None:
        with pytest.raises(ValueError, match="text: 4 bytes in 1 documents do not fill a row of seq_len \\+ 1 = 9"):
            pack(documents({"a": "abc"}), 8)

    def test_a_row_has_a_length(self) -> None:
        with pytest.raises(ValueError, match="seq_len: got 0"):
            pack(documents({"a": "abc"}), 0)
