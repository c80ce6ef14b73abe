"""Rows to batches: padding, and what language models want of a batch.

Each collator is a function of the rows; ``functools.partial`` makes one with its options set, which also travels to
worker processes. Rows are columns (a mapping of tensors, Arrow lists, :class:`~trainkit.io.data.ragged.Ragged`) or a
list of mappings; sequences are moved as flat arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa
import torch
from torch import Tensor

from trainkit import rng
from trainkit.io.data.errors import BatchError
from trainkit.io.data.ragged import Columns, Ragged, as_columns, as_ragged, from_arrow
from trainkit.io.data.stacking import stack

Side = Literal["left", "right"]
Batch = dict[str, Tensor]
IGNORED = -100
"""The label of tokens that count for nothing, as in torch.nn.functional.cross_entropy."""


def pad_batch(
    rows: Any,
    *,
    fill: Mapping[str, float],
    length: int | None = None,
    multiple: int | None = None,
    side: Side = "right",
    mask_of: str | None = None,
) -> Batch:
    """Fields of one batch as tensors; sequences of different lengths are filled up to the longest.

    The width of a padded field is its longest row, rounded up to a ``multiple``, or ``length``. Fields without a fill
    are stacked as they are.

    Args:
        rows: columns by name, or a list of mappings.
        fill: for each field of sequences the value that fills it up. Its dtype stays.
        length: a fixed width, in elements; no row may be longer.
        multiple: round the width up to a multiple of this.
        side: where to fill up.
        mask_of: a padded field. Then ``attention_mask`` is added: int64, 1 at its elements, 0 where it was filled up.

    Returns: a tensor of shape [rows, ...] for each field.

    Raises:
        BatchError: a ValueError that names the field: one of ``fill`` is missing; one without a fill has rows of
            different lengths; a row is longer than ``length``; values that are no numbers.
        ValueError: a fill that the dtype cannot hold; options that exclude each other.

    Example:
        >>> pad_batch([{"x": [1, 2]}, {"x": [3]}], fill={"x": 0}, multiple=4, mask_of="x")
        {'x': tensor([[1, 2, 0, 0],
                [3, 0, 0, 0]]), 'attention_mask': tensor([[1, 1, 0, 0],
                [1, 0, 0, 0]])}

    Source: the padding of transformers.DataCollatorWithPadding.
    """
    columns = as_columns(rows)
    _check_options(length, multiple, side)
    missing = [name for name in (*fill, *([] if mask_of is None else [mask_of])) if name not in columns]
    if missing:
        raise BatchError(f"fill: the rows have no field {missing[0]!r}; they have {', '.join(columns)}")
    if mask_of is not None and (mask_of not in fill or "attention_mask" in columns):
        raise ValueError(f"mask_of: got {mask_of!r}, expected a field of fill, in rows without an attention_mask")
    batch: Batch = {}
    for name, column in columns.items():
        if name in fill:
            sequences = as_ragged(column, name)
            width = _width(sequences, length, multiple, name)
            batch[name] = padded(sequences, width, fill[name], side=side)
            if name == mask_of:
                batch["attention_mask"] = is_filled(sequences.lengths, width, side=side).long()
        else:
            batch[name] = _stacked(column, name)
    return _of_equal_rows(batch)


def causal_lm_batch(
    rows: Any,
    *,
    pad_id: int,
    ignore_index: int = IGNORED,
    length: int | None = None,
    multiple: int | None = None,
    side: Side = "right",
    fill: Mapping[str, float] | None = None,
) -> Batch:
    """A batch for a model that predicts the next token: ``input_ids``, ``attention_mask``, ``labels``.

    The labels are the tokens themselves, not shifted, and ``ignore_index`` where nothing is to be predicted: at the
    padding and where a given ``attention_mask`` is 0. Rows that bring ``labels`` (a prompt that is not trained on) keep
    them. A token that happens to be ``pad_id`` inside a row counts like any other: with one id for the end of a text
    and for padding, the end is still learned.

    Args:
        rows: with sequences ``input_ids``; optionally ``attention_mask`` and ``labels`` of the same lengths.
        pad_id: the token that fills up.
        ignore_index: the label that counts for nothing.
        length: a fixed width, in tokens.
        multiple: round the width up to a multiple of this.
        side: where to fill up.
        fill: further fields of sequences, each with the value that fills it up.

    Returns: int64 tensors [rows, width]; other fields as :func:`pad_batch` gives them.

    Raises: as :func:`pad_batch`; BatchError for fields whose lengths differ from those of the tokens.

    Example:
        >>> causal_lm_batch([{"input_ids": [5, 6]}, {"input_ids": [7]}], pad_id=0)["labels"]
        tensor([[   5,    6],
                [   7, -100]])

    Source: transformers.DataCollatorForLanguageModeling(mlm=False), which ignores every token that equals the padding.
    """
    columns = _with_labels(_token_columns(rows), ignore_index)
    fills = {**(fill or {}), "input_ids": pad_id, "labels": ignore_index, "attention_mask": 0}
    return pad_batch(columns, fill=fills, length=length, multiple=multiple, side=side)


def masked_lm_batch(
    rows: Any,
    *,
    seed: int,
    position: Sequence[int],
    mask_id: int,
    vocab_size: int,
    pad_id: int,
    special_ids: Sequence[int] = (),
    rate: float = 0.15,
    replaced: float = 0.8,
    randomised: float = 0.1,
    ignore_index: int = IGNORED,
    length: int | None = None,
    multiple: int | None = None,
    side: Side = "right",
    fill: Mapping[str, float] | None = None,
) -> Batch:
    """A batch for a model that finds hidden tokens: ``input_ids``, ``attention_mask``, ``labels``.

    Each token is chosen with probability ``rate``. A chosen one becomes ``mask_id`` with probability ``replaced``, a
    random token with probability ``randomised``, and else stays; its label is what it was. All other labels are
    ``ignore_index``. Special tokens and those with an ``attention_mask`` of 0 are never chosen.

    All of it is a function of the rows, ``seed`` and ``position``, whatever was drawn before and in whichever process.
    The width makes no difference.

    Args:
        rows: with sequences ``input_ids``; optionally ``attention_mask`` and ``special_tokens_mask`` (1 for tokens that
            are never chosen; not passed on).
        seed: of the run.
        position: where in the run the batch is: (epoch, batch), and the rank where there are several.
        mask_id: the token that hides others.
        vocab_size: random tokens are drawn from 0 to ``vocab_size`` - 1.
        pad_id: the token that fills up; never chosen.
        special_ids: tokens that are never chosen.
        rate: of chosen tokens, in [0, 1].
        replaced: of the chosen ones, in [0, 1].
        randomised: of the chosen ones; ``replaced + randomised`` is at most 1.
        ignore_index: the label that counts for nothing.
        length: a fixed width, in tokens.
        multiple: round the width up to a multiple of this.
        side: where to fill up.
        fill: further fields of sequences, each with the value that fills it up.

    Returns: int64 tensors [rows, width]; other fields as :func:`pad_batch` gives them.

    Raises: as :func:`causal_lm_batch`; BatchError for labels in the rows; ValueError for rates out of range.

    Example:
        >>> options = dict(seed=0, mask_id=9, vocab_size=10, pad_id=0, rate=1.0, replaced=1.0, randomised=0.0)
        >>> batch = masked_lm_batch([{"input_ids": [1, 5, 6]}], position=(0, 0), special_ids=[1], **options)
        >>> batch["input_ids"], batch["labels"]
        (tensor([[1, 9, 9]]), tensor([[-100,    5,    6]]))

    Source: Devlin et al. 2019 (BERT), sec. 3.1; redrawn in every epoch as Liu et al. 2019 (RoBERTa), sec. 4.1; the
    rates of transformers.DataCollatorForLanguageModeling.
    """
    _check_rates(rate, replaced, randomised)
    columns = _token_columns(rows)
    if "labels" in columns:
        raise BatchError("rows: they have labels, which this collator makes itself; remove the field")
    tokens: Ragged = columns["input_ids"]
    special = columns.pop("special_tokens_mask", None)
    never = torch.isin(tokens.values, torch.tensor([pad_id, *special_ids])) | (columns["attention_mask"].values == 0)
    if special is not None:
        never |= _alongside(as_ragged(special, "special_tokens_mask"), tokens, "special_tokens_mask").values.bool()
    generator = torch.Generator().manual_seed(rng.fold_in_host(seed, *position))
    # One draw decides both whether a token is chosen and what becomes of it.
    draw = torch.rand(len(never), generator=generator, dtype=torch.float64)
    words = torch.randint(vocab_size, (len(never),), generator=generator)
    chosen = (draw < rate) & ~never
    hidden = torch.where(chosen & (draw < rate * (replaced + randomised)), words, tokens.values)
    hidden = torch.where(chosen & (draw < rate * replaced), mask_id, hidden)
    columns["labels"] = Ragged(torch.where(chosen, tokens.values, ignore_index), tokens.offsets)
    columns["input_ids"] = Ragged(hidden, tokens.offsets)
    fills = {**(fill or {}), "input_ids": pad_id, "labels": ignore_index, "attention_mask": 0}
    return pad_batch(columns, fill=fills, length=length, multiple=multiple, side=side)


def padded(column: Ragged, width: int, fill: float, *, side: Side = "right") -> Tensor:
    """Rows filled up to ``width``: [R, width, ...], in the dtype of the values.

    Raises: ValueError for a fill that the dtype cannot hold.

    Example:
        >>> padded(as_ragged([[1, 2], [3]]), 3, 0, side="left")
        tensor([[0, 1, 2],
                [0, 0, 3]])
    """
    values = column.values
    if not _fits(fill, values.dtype):
        raise ValueError(f"fill: got {fill} for values of {values.dtype}, expected a number that this dtype holds")
    out = values.new_full((len(column), width, *values.shape[1:]), fill)
    out[is_filled(column.lengths, width, side=side)] = values
    return out


def is_filled(lengths: Tensor, width: int, *, side: Side = "right") -> Tensor:
    """bool [R, width]: where rows of these lengths have their elements.

    Example:
        >>> is_filled(torch.tensor([2, 1]), 2)
        tensor([[ True,  True],
                [ True, False]])
    """
    place = torch.arange(width, device=lengths.device)
    return place < lengths[:, None] if side == "right" else place >= width - lengths[:, None]


def _token_columns(rows: Any) -> Columns:
    """The columns, with ``input_ids`` and ``attention_mask`` as flat int64."""
    columns = as_columns(rows)
    if "input_ids" not in columns:
        raise BatchError(f"rows: no field 'input_ids'; they have {', '.join(columns)}")
    tokens = _integers(columns["input_ids"], "input_ids")
    given = columns.get("attention_mask")
    mask = _integers(given, "attention_mask") if given is not None else _ones(tokens)
    return {**columns, "input_ids": tokens, "attention_mask": _alongside(mask, tokens, "attention_mask")}


def _with_labels(columns: Columns, ignore_index: int) -> Columns:
    tokens, given = columns["input_ids"], columns.get("labels")
    labels = tokens if given is None else _alongside(_integers(given, "labels"), tokens, "labels")
    seen = columns["attention_mask"].values != 0
    return {**columns, "labels": Ragged(torch.where(seen, labels.values, ignore_index), tokens.offsets)}


def _integers(column: Any, name: str) -> Ragged:
    found = as_ragged(column, name)
    if found.values.is_floating_point() or found.values.dim() != 1:
        kind = f"{found.values.dtype} of shape {tuple(found.values.shape[1:])} each"
        raise BatchError(f"{name}: got {kind}, expected a sequence of integers for each row")
    return Ragged(found.values.long(), found.offsets)


def _ones(tokens: Ragged) -> Ragged:
    return Ragged(torch.ones_like(tokens.values), tokens.offsets)


def _alongside(column: Ragged, tokens: Ragged, name: str) -> Ragged:
    if not torch.equal(column.offsets, tokens.offsets):
        if len(column) != len(tokens):
            raise BatchError(f"{name}: got {len(column)} rows for {len(tokens)} of input_ids")
        row = int((column.lengths != tokens.lengths).nonzero()[0])
        got, expected = int(column.lengths[row]), int(tokens.lengths[row])
        raise BatchError(f"{name}: row {row} has {got} elements for {expected} input_ids, expected as many", row)
    return column


def _width(column: Ragged, length: int | None, multiple: int | None, name: str) -> int:
    longest = int(column.lengths.max()) if len(column) else 0
    if length is None:
        return -(-longest // (multiple or 1)) * (multiple or 1)
    if longest > length:
        row = int(column.lengths.argmax())
        raise BatchError(
            f"length: got {length}, but row {row} of {name} has {longest} elements; cut the rows or give a larger one",
            row,
        )
    return length


def _stacked(column: Any, name: str) -> Tensor:
    """A column of equal rows as a tensor."""
    if isinstance(column, (pa.Array, pa.ChunkedArray)):
        column = from_arrow(column)
    elif isinstance(column, (range, tuple)):
        column = list(column)
    try:
        stacked: Tensor = stack({name: column})[name]
    except BatchError as error:
        raise BatchError(f"{error}; sequences of different lengths need a fill", error.position) from None
    return stacked


def _of_equal_rows(batch: Batch) -> Batch:
    sizes = {name: len(tensor) for name, tensor in batch.items()}
    if len(set(sizes.values())) > 1:
        raise BatchError(f"rows: the fields differ in their number of rows: {sizes}")
    return batch


def _fits(fill: float, dtype: torch.dtype) -> bool:
    if dtype.is_floating_point or dtype.is_complex:
        return True
    if dtype == torch.bool:
        return fill in (0, 1)
    return fill == int(fill) and torch.iinfo(dtype).min <= fill <= torch.iinfo(dtype).max


def _check_options(length: int | None, multiple: int | None, side: str) -> None:
    if side not in ("left", "right"):
        raise ValueError(f"side: got {side!r}, expected 'left' or 'right'")
    for name, value in (("length", length), ("multiple", multiple)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: got {value}, expected a positive number of elements")
    if length is not None and multiple is not None:
        raise ValueError(f"multiple: got {multiple} beside length {length}, expected one of the two")


def _check_rates(rate: float, replaced: float, randomised: float) -> None:
    for name, value in (("rate", rate), ("replaced", replaced), ("randomised", randomised)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: got {value}, expected a probability from 0 to 1")
    if replaced + randomised > 1 + 1e-9:
        raise ValueError(f"randomised: got {randomised} beside replaced {replaced}, expected at most 1 together")
