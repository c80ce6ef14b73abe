"""Collators: the same batches as transformers where they mean the same, and masks that depend on the position alone."""

import itertools
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainkit.io.data.collate import causal_lm_batch, masked_lm_batch, pad_batch, padded
from trainkit.io.data.loader import Loader
from trainkit.io.data.ragged import Ragged, as_columns, as_ragged

PAD, CLS, SEP, MASK, VOCABULARY = 0, 1, 2, 3, 40
sequences = st.lists(st.lists(st.integers(4, VOCABULARY - 1), min_size=1, max_size=9), min_size=1, max_size=6)


def tokenizer(side: str = "right") -> Any:
    import tokenizers

    words = {"[PAD]": PAD, "[CLS]": CLS, "[SEP]": SEP, "[MASK]": MASK}
    words |= {f"w{i}": i for i in range(len(words), VOCABULARY)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[PAD]"))
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, padding_side=side, **special)


def rows_of(ids: list[list[int]]) -> list[dict[str, Any]]:
    return [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids]


def assert_same(ours: dict[str, Tensor], theirs: Any) -> None:
    assert ours.keys() == dict(theirs).keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


def padded_row_by_row(ids: list[list[int]], width: int, fill: int, side: str) -> list[list[int]]:
    filling = [[fill] * (width - len(row)) for row in ids]
    return [f + row if side == "left" else row + f for f, row in zip(filling, ids, strict=True)]


@given(ids=sequences, side=st.sampled_from(["left", "right"]), multiple=st.sampled_from([None, 1, 4, 7]))
def test_causal_batches_equal_those_of_transformers(ids: list[list[int]], side: Any, multiple: int | None) -> None:
    # No token is the padding here, which transformers never lets a model learn.
    theirs = transformers.DataCollatorForLanguageModeling(tokenizer(side), mlm=False, pad_to_multiple_of=multiple)
    assert_same(causal_lm_batch(rows_of(ids), pad_id=PAD, side=side, multiple=multiple), theirs(rows_of(ids)))


@given(ids=sequences, side=st.sampled_from(["left", "right"]), extra=st.integers(0, 3))
def test_padding_equals_a_plain_loop(ids: list[list[int]], side: Any, extra: int) -> None:
    width = max(map(len, ids)) + extra
    batch = pad_batch({"x": ids, "row": range(len(ids))}, fill={"x": -7}, length=width, side=side, mask_of="x")
    assert batch["x"].tolist() == padded_row_by_row(ids, width, -7, side)
    ones = [[1] * len(row) for row in ids]
    assert batch["attention_mask"].tolist() == padded_row_by_row(ones, width, 0, side)
    assert batch["row"].tolist() == list(range(len(ids)))


@pytest.mark.parametrize(
    "column",
    [
        [[1, 2, 3], [], [4]],
        [torch.tensor([1, 2, 3]), torch.tensor([], dtype=torch.int64), torch.tensor([4])],
        [np.array([1, 2, 3]), np.array([], dtype=np.int64), np.array([4])],
        pa.array([[1, 2, 3], [], [4]]),
        pa.array([[1, 2, 3], [], [4]], pa.large_list(pa.int64())),
        pa.chunked_array([[[1, 2, 3]], [[], [4]]]),
        # The middle of a longer column.
        pa.array([[9], [1, 2, 3], [], [4], [8, 8]]).slice(1, 3),
        Ragged(torch.tensor([1, 2, 3, 4]), torch.tensor([0, 3, 3, 4])),
    ],
    ids=lambda column: type(column).__name__,
)
def test_columns_of_every_kind_are_read(column: Any) -> None:
    found = as_ragged(column)
    assert found.values.tolist() == [1, 2, 3, 4]
    assert found.offsets.tolist() == [0, 3, 3, 4]
    assert pad_batch({"x": column}, fill={"x": 0})["x"].tolist() == [[1, 2, 3], [0, 0, 0], [4, 0, 0]]


def test_columns_of_a_dataset_give_the_batch_of_its_rows() -> None:
    import datasets

    data = datasets.Dataset.from_dict({"x": [[5, 6, 7], [8], [9, 9]], "label": [0, 1, 0]}).select([2, 0, 1])
    by_row = pad_batch([data[i] for i in range(2)], fill={"x": 0})
    for columns in (data[:2], data.with_format("arrow")[:2], data.with_format("numpy")[:2]):
        assert_same(pad_batch(columns, fill={"x": 0}), by_row)
    assert by_row["label"].tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.bool, torch.int32])
def test_padding_keeps_dtypes_and_further_axes(dtype: torch.dtype) -> None:
    rows = [torch.ones(length, 2).to(dtype) for length in (3, 1)]
    batch = pad_batch({"x": rows}, fill={"x": 0}, side="left")["x"]
    assert batch.dtype == dtype
    assert batch.shape == (2, 3, 2)
    assert batch[1].float().tolist() == [[0, 0], [0, 0], [1, 1]]


def test_lists_of_floats_have_the_default_dtype() -> None:
    assert pad_batch({"x": [[0.5], [1.0, 2.0]]}, fill={"x": 0})["x"].dtype == torch.float32
    doubles = [np.array([0.5]), np.array([1.0, 2.0])]
    assert pad_batch({"x": doubles}, fill={"x": 0})["x"].dtype == torch.float64


def test_labels_that_the_rows_bring_are_kept_but_not_where_the_mask_hides() -> None:
    rows = {
        "input_ids": [[5, 6, 7], [8, 9]],
        "labels": [[-100, 6, 7], [8, 9]],
        "attention_mask": [[1, 1, 0], [1, 1]],
    }
    batch = causal_lm_batch(rows, pad_id=PAD)
    assert batch["labels"].tolist() == [[-100, 6, -100], [8, 9, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 0]]


def test_the_end_of_a_text_is_learned_when_it_is_also_the_padding() -> None:
    batch = causal_lm_batch([{"input_ids": [5, PAD]}, {"input_ids": [5, 6, PAD]}], pad_id=PAD)
    assert batch["labels"].tolist() == [[5, PAD, -100], [5, 6, PAD]]


def masked(rows: Any, position: tuple[int, ...] = (0, 0), **options: Any) -> dict[str, Tensor]:
    options = {"seed": 3, "special_ids": [CLS, SEP]} | options
    return masked_lm_batch(rows, position=position, mask_id=MASK, vocab_size=VOCABULARY, pad_id=PAD, **options)


def many_rows(num_rows: int = 64, length: int = 500) -> list[dict[str, Any]]:
    ids = torch.randint(4, VOCABULARY, (num_rows, length))
    ids[:, 0], ids[:, -1] = CLS, SEP
    return [{"input_ids": row[: length - i].tolist()} for i, row in enumerate(ids)]


def shares(batch: Any, tokens: Tensor) -> list[float]:
    """Of the ordinary tokens, how many are chosen; of those, how many are hidden, others, and themselves."""
    ordinary = (tokens != PAD) & (tokens != CLS) & (tokens != SEP)
    chosen = batch["labels"] != -100
    assert not (chosen & ~ordinary).any()
    assert torch.equal(batch["labels"][chosen], tokens[chosen])
    assert torch.equal(batch["input_ids"][~chosen], tokens[~chosen])
    now, was = batch["input_ids"][chosen], tokens[chosen]
    counts = [(now == MASK).sum(), ((now != MASK) & (now != was)).sum(), (now == was).sum()]
    return [float(chosen.sum() / ordinary.sum()), *(float(c / chosen.sum()) for c in counts)]


@pytest.mark.parametrize(("rate", "replaced", "randomised"), [(0.15, 0.8, 0.1), (0.4, 0.5, 0.5), (0.3, 0.0, 0.3)])
def test_masking_has_the_rates_of_transformers(rate: float, replaced: float, randomised: float) -> None:
    rows = many_rows()
    tokens = pad_batch(rows, fill={"input_ids": PAD})["input_ids"]
    ours = shares(masked(rows, rate=rate, replaced=replaced, randomised=randomised), tokens)
    collator = transformers.DataCollatorForLanguageModeling(
        tokenizer(), mlm_probability=rate, mask_replace_prob=replaced, random_replace_prob=randomised, seed=1
    )
    theirs = shares(collator(rows_of([row["input_ids"] for row in rows])), tokens)
    # A random token is the mask or the old one now and then.
    others = randomised * (1 - 2 / VOCABULARY)
    hidden, kept = replaced + randomised / VOCABULARY, 1 - replaced - randomised + randomised / VOCABULARY
    n = int((tokens != PAD).sum())
    # Five standard deviations of a share of n or rate * n draws.
    near = 2.5 / (rate * n) ** 0.5
    assert ours == pytest.approx([rate, hidden, others, kept], abs=near)
    assert theirs == pytest.approx([rate, hidden, others, kept], abs=near)


def test_random_tokens_are_spread_over_the_vocabulary() -> None:
    batch = masked(many_rows(), rate=1.0, replaced=0.0, randomised=1.0)
    words = batch["input_ids"][batch["labels"] != -100]
    counts = torch.bincount(words, minlength=VOCABULARY).double()
    expected = len(words) / VOCABULARY
    # Chi-square with 39 degrees of freedom: 99.99 % lie below 82.
    assert float(((counts - expected) ** 2 / expected).sum()) < 82


def test_masks_depend_on_seed_and_position_and_on_nothing_else() -> None:
    rows = many_rows(4, 60)
    first = masked(rows, (2, 7))
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert_same(masked(rows, (2, 7)), first)
    assert torch.equal(torch.get_rng_state(), before)
    # The position with the same sum, the next epoch, another rank, another seed.
    for other in (masked(rows, (7, 2)), masked(rows, (3, 7)), masked(rows, (2, 7, 1)), masked(rows, (2, 7), seed=4)):
        assert not torch.equal(other["labels"], first["labels"])


def test_the_width_makes_no_difference_to_the_masks() -> None:
    rows = many_rows(3, 50)
    narrow, wide = masked(rows), masked(rows, multiple=64)
    for name, tensor in narrow.items():
        assert torch.equal(wide[name][:, : tensor.shape[1]], tensor)


def test_special_tokens_may_be_a_column() -> None:
    rows = {"input_ids": [[7, 8, 9], [7, 8]], "special_tokens_mask": [[1, 0, 1], [0, 1]]}
    batch = masked(rows, rate=1.0)
    assert (batch["labels"] != -100).tolist() == [[False, True, False], [True, False, False]]
    assert "special_tokens_mask" not in batch


def test_a_collator_with_its_options_works_in_worker_processes() -> None:
    data = [{"input_ids": list(range(4, 4 + n))} for n in (3, 1, 2, 5)]
    collate = partial(causal_lm_batch, pad_id=PAD)
    loader = torch.utils.data.DataLoader(data, batch_size=2, collate_fn=collate, num_workers=1)
    for batch, start in zip(loader, (0, 2), strict=True):
        assert_same(batch, collate(data[start : start + 2]))


@pytest.mark.parametrize("workers", [0, 1])
def test_masks_of_a_resumed_loader_are_those_of_an_uninterrupted_one(workers: int) -> None:
    data = {"input_ids": [row["input_ids"] for row in many_rows(10, 30)]}
    collate = partial(
        masked_lm_batch, seed=5, mask_id=MASK, vocab_size=VOCABULARY, pad_id=PAD, special_ids=[CLS, SEP], rate=0.4
    )

    def loader(**options: Any) -> Loader:
        return Loader(data, batch_size=4, seed=5, collate=collate, **options)

    whole = list(loader().epochs(2))
    first, rest = loader(workers=workers), loader(workers=workers)
    head = list(itertools.islice(first.epochs(2), 4))
    rest.load_state_dict(first.state_dict())
    for one, other in zip(head + list(rest.epochs(2)), whole, strict=True):
        assert_same(one, other)
    # The last batch of an epoch, of the same rows every time if nothing is shuffled, is masked anew.
    still = list(loader(shuffle=False).epochs(2))
    assert not torch.equal(still[2]["labels"], still[5]["labels"])


@pytest.mark.parametrize(
    ("rows", "options", "text"),
    [
        ([{"x": [1]}, {"y": [1]}], {"fill": {"x": 0}}, r"row 1 has \['y'\], the first has \['x'\]"),
        ([{"x": [1]}], {"fill": {"z": 0}}, "no field 'z'; they have x"),
        ([{"x": [1]}, {"x": [1, 2]}], {"fill": {}}, "key 'x': .*different lengths need a fill"),
        ({"x": as_ragged([[1], [1, 2]])}, {"fill": {}}, "key 'x': expected 1 elements as in the first row, found 2"),
        ({"x": [[1], [2]], "y": [1]}, {"fill": {"x": 0}}, "differ in their number of rows: {'x': 2, 'y': 1}"),
        ([{"x": ["a"]}], {"fill": {"x": 0}}, "x: got sequences of string"),
        ([{"x": "abc"}], {"fill": {}}, "key 'x': .*leave the field out"),
        ([{"x": [1, None]}], {"fill": {"x": 0}}, "x: 1 of its numbers are null"),
        ({"x": pa.array([[1], None])}, {"fill": {"x": 0}}, "x: 1 of 2 rows are null"),
        ([{"x": [1, 2, 3]}], {"fill": {"x": 0}, "length": 2}, "length: got 2, but row 0 of x has 3"),
        ([{"x": [1]}], {"fill": {"x": 0}, "length": 2, "multiple": 2}, "expected one of the two"),
        ([{"x": [1]}], {"fill": {"x": 0}, "multiple": 0}, "multiple: got 0"),
        ([{"x": [1]}], {"fill": {"x": 0}, "side": "up"}, "side: got 'up'"),
        ([{"x": [1]}], {"fill": {"x": 0}, "mask_of": "y"}, "no field 'y'"),
        (
            {"x": [torch.tensor([1], dtype=torch.uint8)]},
            {"fill": {"x": -100}},
            "fill: got -100 for values of torch.uint8",
        ),
        ([], {"fill": {}}, "rows: got none"),
        (3, {"fill": {}}, "rows: got int"),
    ],
)
def test_what_cannot_be_padded_is_refused_with_its_name(rows: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        pad_batch(rows, **options)


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ({"text": [[1]]}, "no field 'input_ids'; they have text"),
        ({"input_ids": [[0.5]]}, "input_ids: got torch.float32"),
        ({"input_ids": [[1, 2], [3]], "labels": [[1, 2], [3, 4]]}, "labels: row 1 has 2 elements for 1 input_ids"),
        ({"input_ids": [[1]], "attention_mask": [[1], [1]]}, "attention_mask: got 2 rows for 1"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(rows: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        causal_lm_batch(rows, pad_id=0)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rate": 1.5}, "rate: got 1.5"),
        ({"replaced": 0.8, "randomised": 0.3}, "at most 1 together"),
        ({"randomised": -0.1}, "randomised: got -0.1"),
    ],
)
def test_rates_out_of_range_are_refused(options: dict[str, float], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        masked([{"input_ids": [5]}], **options)
    with pytest.raises(ValueError, match="they have labels"):
        masked([{"input_ids": [5], "labels": [5]}])


def test_an_arrow_table_is_columns() -> None:
    table = pa.table({"x": [[1, 2], [3]], "y": [0.5, 1.5]})
    assert as_columns(table)["x"].to_pylist() == [[1, 2], [3]]
    batch = pad_batch(table, fill={"x": 0})
    assert (batch["x"].tolist(), batch["y"].tolist()) == ([[1, 2], [3, 0]], [0.5, 1.5])


@pytest.mark.parametrize(
    ("values", "offsets"), [([1, 2], [0, 1]), ([1, 2], [1, 2]), ([1, 2], [0, 2, 1, 2]), ([], []), ([1], [[0, 1]])]
)
def test_offsets_that_lead_nowhere_are_refused(values: list[int], offsets: list[Any]) -> None:
    with pytest.raises(ValueError, match="offsets"):
        Ragged(torch.tensor(values), torch.tensor(offsets, dtype=torch.int64))


def test_padding_copies() -> None:
    values = torch.tensor([1, 2])
    out = padded(Ragged(values, torch.tensor([0, 2])), 2, 0)
    out.zero_()
    assert values.tolist() == [1, 2]
