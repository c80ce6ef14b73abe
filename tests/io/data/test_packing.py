"""Packing: no token lost, borders that a model respects, and streams that go on where they stopped."""

import itertools
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.tiny import transformers_config
from trainkit.io.data.loader import Loader
from trainkit.io.data.packing import PackedStream, best_fit, block_causal_mask, cu_seqlens, pack_documents
from trainkit.io.data.ragged import as_ragged

Documents = list[list[int]]
METHODS = ["best_fit", "concatenate"]
documents = st.lists(st.lists(st.integers(1, 50), max_size=14), min_size=1, max_size=12).filter(any)


def segments(rows: dict[str, Tensor]) -> list[list[int]]:
    """The pieces in all rows, each as a list of tokens."""
    found = []
    for tokens, numbers in zip(rows["input_ids"].tolist(), rows["segment_ids"].tolist(), strict=True):
        pairs = itertools.groupby(zip(numbers, tokens, strict=True), key=lambda pair: pair[0])
        found += [[token for _, token in group] for number, group in pairs if number]
    return found


@given(docs=documents, row_length=st.integers(1, 12), method=st.sampled_from(METHODS))
def test_rows_hold_every_token_once_with_its_place(docs: Documents, row_length: int, method: Any) -> None:
    rows = pack_documents(docs, row_length, method=method, pad_id=0)
    shape = rows["input_ids"].shape
    assert shape[1] == row_length
    assert all(column.shape == shape and column.dtype == torch.int64 for column in rows.values())
    pieces = segments(rows)
    if method == "concatenate":
        assert list(itertools.chain(*pieces)) == list(itertools.chain(*docs))
    else:
        cut = [doc[i : i + row_length] for doc in docs for i in range(0, len(doc), row_length)]
        assert sorted(pieces) == sorted(cut)
    for tokens, labels, positions, numbers in zip(*(rows[name].tolist() for name in rows), strict=True):
        for i in range(row_length):
            first = i == 0 or numbers[i] != numbers[i - 1]
            filled = numbers[i] == 0
            assert positions[i] == (0 if first or filled else positions[i - 1] + 1)
            assert labels[i] == (-100 if first or filled else tokens[i])
            # Segments count up from 1; what is filled up stands at the end.
            assert filled or i == 0 or numbers[i] - numbers[i - 1] in (0, 1)
            assert not filled or (tokens[i] == 0 and not any(numbers[i:]))
        assert numbers[0] == 1


def best_fit_by_looking_at_every_row(lengths: list[int], row_length: int) -> list[int]:
    rooms: list[int] = []
    placed: dict[int, int] = {}
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [room for room in rooms if room >= lengths[i]]
        if not fitting:
            rooms.append(row_length)
        # Rows with equal room are alike, so only the room is compared.
        row = rooms.index(min(fitting)) if fitting else len(rooms) - 1
        rooms[row] -= lengths[i]
        placed[i] = row
    return rooms


@given(lengths=st.lists(st.integers(1, 20), max_size=40))
def test_best_fit_leaves_the_same_rooms_as_a_plain_search(lengths: list[int]) -> None:
    rows = best_fit(torch.tensor(lengths, dtype=torch.int64), 20).tolist()
    rooms = best_fit_by_looking_at_every_row(lengths, 20)
    loads = [sum(length for length, row in zip(lengths, rows, strict=True) if row == r) for r in range(len(rooms))]
    assert sorted(20 - load for load in loads) == sorted(rooms)


def test_best_fit_wastes_little() -> None:
    lengths = torch.randint(1, 2049, (5000,))
    num_rows = int(best_fit(lengths, 2048).max()) + 1
    assert num_rows <= 1.02 * float(lengths.sum()) / 2048


def test_labels_are_laid_out_like_the_tokens_and_equal_those_of_transformers() -> None:
    import transformers

    docs = [[5, 6, 7], [8, 9], [4]]
    labels = [[-100, 6, 7], [-100, 9], [-100]]
    rows = pack_documents(docs, 6, labels=labels, method="concatenate")
    features = [{"input_ids": d, "labels": label} for d, label in zip(docs, labels, strict=True)]
    flat = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(features)
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(rows[name], flat[name])
    assert torch.equal(rows["segment_ids"] - 1, flat["seq_idx"].long())
    borders, longest = cu_seqlens(rows["segment_ids"])
    assert torch.equal(borders, flat["cu_seq_lens_q"])
    assert longest == flat["max_length_q"]


@given(docs=documents, row_length=st.integers(1, 12))
def test_borders_are_where_positions_start_again(docs: Documents, row_length: int) -> None:
    rows = pack_documents(docs, row_length)
    borders, longest = cu_seqlens(rows["segment_ids"])
    assert borders[0] == 0 and borders[-1] == rows["input_ids"].numel() and borders.dtype == torch.int32
    lengths = borders.diff().tolist()
    assert min(lengths) > 0 and max(lengths) == longest
    starts = ((rows["position_ids"] == 0) & (rows["segment_ids"] > 0)).flatten().nonzero()[:, 0]
    assert set(starts.tolist()) <= set(borders.tolist())
    filled = (rows["segment_ids"] == 0).any(1).sum()
    assert len(lengths) == len(starts) + filled


@given(docs=documents, row_length=st.integers(1, 8))
def test_the_mask_is_causal_within_documents(docs: Documents, row_length: int) -> None:
    segment_ids = pack_documents(docs, row_length)["segment_ids"]
    mask = block_causal_mask(segment_ids)
    assert mask.shape == (len(segment_ids), 1, row_length, row_length)
    for r, q, k in itertools.product(range(len(segment_ids)), range(row_length), range(row_length)):
        assert bool(mask[r, 0, q, k]) == (k <= q and bool(segment_ids[r, q] == segment_ids[r, k]))


def test_attention_by_borders_equals_attention_by_mask() -> None:
    segment_ids = pack_documents([[1] * n for n in (5, 17, 1, 9, 3)], 16)["segment_ids"]
    query, key, value = torch.randn(3, *segment_ids.shape, 2, 4, dtype=torch.float64).unbind()
    heads_first = [t.transpose(1, 2) for t in (query, key, value)]
    whole = F.scaled_dot_product_attention(*heads_first, attn_mask=block_causal_mask(segment_ids)).transpose(1, 2)
    borders, _ = cu_seqlens(segment_ids)
    flat = [t.flatten(0, 1).transpose(0, 1) for t in (query, key, value)]
    parts = [
        F.scaled_dot_product_attention(*(t[:, begin:end] for t in flat), is_causal=True)
        for begin, end in itertools.pairwise(borders.tolist())
    ]
    torch.testing.assert_close(torch.cat(parts, 1).transpose(0, 1), whole.flatten(0, 1), rtol=0, atol=1e-12)


def llama() -> nn.Module:
    import transformers

    sizes = {"vocab_size": 51, "num_hidden_layers": 2, "num_key_value_heads": 1}
    config = transformers_config("LlamaConfig", **sizes, attn_implementation="sdpa")
    return transformers.LlamaForCausalLM(config).double().eval()


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("borders", ["mask", "positions"])
def test_logits_of_packed_rows_equal_those_of_the_documents(method: Any, borders: str) -> None:
    module = llama()
    docs = [torch.randint(1, 51, (n,)).tolist() for n in (5, 17, 1, 9, 3, 12, 8, 2)]
    rows = pack_documents(docs, 16, method=method)
    tokens, numbers = rows["input_ids"], rows["segment_ids"]
    assert int(numbers.max()) >= 3
    # transformers finds the borders in the positions as well, if it has neither a mask nor a cache.
    given = {"attention_mask": block_causal_mask(numbers)} if borders == "mask" else {"use_cache": False}
    packed = module(input_ids=tokens, position_ids=rows["position_ids"], **given).logits
    for row, number in itertools.product(range(len(tokens)), range(1, int(numbers.max()) + 1)):
        place = numbers[row] == number
        if place.any():
            alone = module(input_ids=tokens[row, place][None]).logits[0]
            # float64: other kernels, other orders of summation.
            torch.testing.assert_close(packed[row, place], alone, rtol=0, atol=1e-12)
    # Without borders documents do see each other.
    blind = module(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    second = numbers == 2
    assert (blind[second] - packed[second]).abs().max() > 1e-4


@torch.no_grad()
def test_documents_do_not_change_with_their_neighbours() -> None:
    module = llama()
    rows = pack_documents([[3, 4, 5], [6, 7, 8, 9]], 10)
    other = rows["input_ids"].clone()
    other[rows["segment_ids"] == 1] = 40
    other[rows["segment_ids"] == 0] = 41
    mask, second = block_causal_mask(rows["segment_ids"]), rows["segment_ids"] == 2
    one, two = (
        module(input_ids=t, position_ids=rows["position_ids"], attention_mask=mask).logits
        for t in (rows["input_ids"], other)
    )
    assert torch.equal(one[second], two[second])
    assert one.isfinite().all()


class Readable:
    """A stream that can be read from its beginning, and says nothing of where it is."""

    def __init__(self, docs: Documents) -> None:
        self.docs = docs

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.docs)


class Stateful(Readable):
    """A stream that knows where it is."""

    at = 0
    reads = 0

    def __iter__(self) -> Iterator[list[int]]:
        while self.at < len(self.docs):
            self.at += 1
            self.reads += 1
            yield self.docs[self.at - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def hub_stream(docs: Documents) -> Any:
    import datasets

    return datasets.Dataset.from_dict({"input_ids": docs}).to_iterable_dataset(num_shards=2)


def hub_rows(docs: Documents) -> Any:
    import datasets

    return datasets.Dataset.from_dict({"name": [str(i) for i in range(len(docs))], "input_ids": docs})


def shuffled_stream(docs: Documents) -> Any:
    return hub_stream(docs).shuffle(seed=0, buffer_size=5)


SOURCES: dict[str, Any] = {
    "list": list,
    "columns": lambda docs: {"input_ids": as_ragged(docs)},
    "dataset": hub_rows,
    "readable": Readable,
    "stateful": Stateful,
    "stream": hub_stream,
    "shuffled": shuffled_stream,
}


def as_lists(rows: Any) -> list[dict[str, list[int]]]:
    return [{name: tensor.tolist() for name, tensor in row.items()} for row in rows]


@given(docs=documents, row_length=st.integers(1, 12))
def test_a_stream_gives_the_rows_of_all_documents(docs: Documents, row_length: int) -> None:
    whole = pack_documents(docs, row_length, method="concatenate")
    rows = as_lists({name: t[i] for name, t in whole.items()} for i in range(len(whole["input_ids"])))
    assert as_lists(PackedStream(docs, row_length, method="concatenate")) == rows
    # A window that takes in everything is the whole as well.
    whole = pack_documents(docs, row_length)
    rows = as_lists({name: t[i] for name, t in whole.items()} for i in range(len(whole["input_ids"])))
    assert as_lists(PackedStream(docs, row_length, window=100)) == rows


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", SOURCES)
def test_a_stream_resumes_after_every_row(kind: str, method: Any) -> None:
    docs = [list(range(1, n + 1)) for n in (3, 0, 14, 1, 1, 6, 2, 9, 0, 4, 5, 13, 0)]

    def stream() -> PackedStream:
        return PackedStream(SOURCES[kind](docs), 5, method=method, window=4)

    whole = as_lists(stream())
    assert len(whole) > 8
    for stop in range(len(whole) + 1):
        first = stream()
        head = as_lists(itertools.islice(first, stop))
        # The state is a few numbers and survives JSON.
        state = json.loads(json.dumps(first.state_dict()))
        rest = stream()
        rest.load_state_dict(state)
        assert head + as_lists(rest) == whole
        # The next pass begins at the beginning.
        assert as_lists(rest) == whole


@given(docs=documents, row_length=st.integers(1, 9), window=st.integers(1, 5), data=st.data())
def test_interrupted_any_number_of_times_gives_the_rows_of_one_pass(
    docs: Documents, row_length: int, window: int, data: st.DataObject
) -> None:
    method: Any = data.draw(st.sampled_from(METHODS))
    whole = as_lists(PackedStream(docs, row_length, method=method, window=window))
    rows: list[Any] = []
    state = None
    while len(rows) < len(whole):
        stream = PackedStream(docs, row_length, method=method, window=window)
        if state is not None:
            stream.load_state_dict(state)
        rows += as_lists(itertools.islice(stream, data.draw(st.integers(1, 4))))
        state = stream.state_dict()
    assert rows == whole


@pytest.mark.parametrize("method", METHODS)
def test_resuming_a_stateful_stream_reads_no_more_than_a_window_again(method: Any) -> None:
    docs = [[1, 2, 3]] * 100
    stream = PackedStream(Stateful(docs), 7, method=method, window=10)
    num_rows = len(list(itertools.islice(stream, 30)))
    assert num_rows == 30
    source = Stateful(docs)
    resumed = PackedStream(source, 7, method=method, window=10)
    resumed.load_state_dict(stream.state_dict())
    next(iter(resumed))
    assert source.reads <= 10


def test_documents_may_be_rows_of_any_column() -> None:
    rows = [{"text": torch.tensor([1, 2], dtype=torch.uint8)}, {"text": torch.tensor([3], dtype=torch.uint8)}]
    (row,) = PackedStream(rows, 4, column="text")
    assert row["input_ids"].tolist() == [1, 2, 3, 0]


def test_an_error_of_a_document_says_which_one() -> None:
    class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 9

        def __getitem__(self, index: int) -> list[int]:
            if index == 7:
                raise OSError("no such page")
            return [1]

    with pytest.raises(OSError, match=r"no such page \(document 7\)"):
        list(PackedStream(Rows(), 4))


def test_a_loader_trains_on_packed_rows_and_resumes() -> None:
    docs = [list(range(1, n + 1)) for n in (3, 14, 1, 1, 6, 2, 9, 4, 5, 13, 8, 8, 2)]

    def loader() -> Loader:
        return Loader(PackedStream(Stateful(docs), 8, window=5), batch_size=2, seed=0, shuffle=False)

    whole = [batch["input_ids"] for batch in loader().epochs(2)]
    assert len(whole) > 8
    for stop in range(1, len(whole)):
        first, rest = loader(), loader()
        head = [batch["input_ids"] for batch in itertools.islice(first.epochs(2), stop)]
        rest.load_state_dict(json.loads(json.dumps(first.state_dict())))
        joined = head + [batch["input_ids"] for batch in rest.epochs(2)]
        assert len(joined) == len(whole)
        assert all(map(torch.equal, joined, whole))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"row_length": 7}, r"row_length=6 \(here 7\)"),
        ({"method": "concatenate"}, r"method='best_fit' \(here 'concatenate'\)"),
        ({"window": 4}, r"window=3 \(here 4\)"),
        ({"seed": 1}, r"seed=0 \(here 1\)"),
    ],
)
def test_a_state_of_another_packing_is_refused(options: dict[str, Any], told: str) -> None:
    def stream(**changed: Any) -> PackedStream:
        return PackedStream([[1, 2]] * 20, **{"row_length": 6, "window": 3, **changed})

    first = stream()
    next(iter(first))
    other = stream(**options)
    before = other.state_dict()
    with pytest.raises(ValueError, match=told):
        other.load_state_dict(first.state_dict())
    assert other.state_dict() == before
    # A loader refuses it before anything is read.
    loader = Loader(stream(**options), batch_size=2)
    with pytest.raises(ValueError, match="packed="):
        loader.load_state_dict(Loader(stream(), batch_size=2).state_dict())


class Cropped(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Documents that are cut somewhere else each time they are read."""

    def __len__(self) -> int:
        return 600

    def __getitem__(self, index: int) -> list[int]:
        return [index] * random.randint(1, 9)


class Drawn:
    """The same as a stream without a state."""

    def __iter__(self) -> Iterator[list[int]]:
        return (Cropped()[random.randrange(600)] for _ in range(600))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("documents", [Cropped, Drawn])
def test_documents_that_draw_draw_the_same_when_resumed(documents: Any, method: Any) -> None:
    def stream(**options: Any) -> PackedStream:
        return PackedStream(documents(), 50, method=method, window=30, **options)

    whole = as_lists(stream())
    assert as_lists(stream(seed=1)) != whole
    for stop in (1, 11, 31, 52):
        first, rest = stream(), stream()
        head = as_lists(itertools.islice(first, stop))
        rest.load_state_dict(first.state_dict())
        assert head + as_lists(rest) == whole


def test_memory_mapped_tokens_are_documents(tmp_path: Any) -> None:
    import numpy as np

    np.array([7, 8, 9, 1000], dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    tokens = np.memmap(tmp_path / "tokens.bin", dtype=np.uint16, mode="r")
    assert pack_documents([tokens[:3], tokens[3:]], 4)["input_ids"].tolist() == [[7, 8, 9, 1000]]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: pack_documents([[1]], 0), "row_length: got 0"),
        (lambda: pack_documents([[1]], 4, method="next_fit"), "method: got 'next_fit'"),
        (lambda: pack_documents([[], []], 4), "no tokens in 2 documents"),
        (lambda: pack_documents([[0.5]], 4), "documents: got torch.float32"),
        (lambda: pack_documents([[1, 2]], 4, labels=[[1]]), "labels: their lengths differ"),
        (lambda: best_fit(torch.tensor([5]), 4), "lengths: got 5 to 5, expected 1 to row_length = 4"),
        (lambda: best_fit(torch.tensor([0]), 4), "lengths: got 0"),
        (lambda: PackedStream([], 4, window=0), "window: got 0"),
        (lambda: PackedStream([], 4).load_state_dict({"used": 0}), "state: got {'used': 0}"),
        (lambda: PackedStream([], 4).load_state_dict({"used": -1, "read": 0, "source": None}), "expected the numbers"),
        (lambda: next(iter(PackedStream([{"text": [1]}], 4))), "column: documents have no 'input_ids', only text"),
    ],
)
def test_what_cannot_be_packed_is_refused(call: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()


def test_a_stream_without_documents_has_no_rows() -> None:
    assert list(PackedStream([], 4)) == list(PackedStream([[], []], 4, method="concatenate")) == []


def test_packing_takes_flat_columns_without_a_copy_of_python_objects() -> None:
    column = as_ragged(torch.arange(1, 13).view(3, 4))
    rows = pack_documents(column, 8)
    assert rows["input_ids"].tolist() == [[*range(1, 9)], [*range(9, 13), 0, 0, 0, 0]]
