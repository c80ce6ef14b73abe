"""Documents packed into rows of one length, with borders that attention, positions and labels respect.

A row holds several documents. Its ``segment_ids`` number them from 1, and are 0 where the row is filled up; its
``position_ids`` start from 0 in each. :func:`block_causal_mask` and :func:`cu_seqlens` tell attention of the borders,
so a model computes for every document what it computes for that document alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trainkit import rng
from trainkit.io.data.collate import IGNORED
from trainkit.io.data.errors import BatchError, RowError, cause_of, explained
from trainkit.io.data.ragged import Ragged, as_columns, as_ragged
from trainkit.io.data.sources import Source, as_source
from trainkit.io.data.streams import as_stream
from trainkit.io.seeding import READING, seeded

Method = Literal["best_fit", "concatenate"]
Rows = dict[str, Tensor]
_FETCHED = 256
"""Documents that are read at a time from what can be read in any order."""


def pack_documents(
    documents: Any,
    row_length: int,
    *,
    method: Method = "best_fit",
    pad_id: int = 0,
    ignore_index: int = IGNORED,
    labels: Any = None,
) -> Rows:
    """Documents as rows of ``row_length`` tokens.

    - "best_fit": each document, the longest first, goes into the fullest row that still has room for it. Only documents
      longer than a row are cut. Costs about a microsecond per document.
    - "concatenate": all documents one after the other, cut where rows end. Only the last row is filled up.

    A part of a document that was cut counts as a document: no attention reaches back over the cut. The first token of
    each document has the label ``ignore_index``, since nothing before it predicts it. Empty documents vanish.

    Args:
        documents: a column of token sequences, as :func:`~trainkit.io.data.ragged.as_ragged` takes it.
        row_length: L, tokens per row.
        method: how documents are put into rows.
        pad_id: the token that fills up.
        ignore_index: the label that counts for nothing.
        labels: a column of the same lengths, where they are not the tokens themselves.

    Returns: int64 tensors [rows, L]: ``input_ids``, ``labels`` (not shifted), ``position_ids``, ``segment_ids``.

    Raises: BatchError, a ValueError, for no tokens, tokens that are no integers, lengths that disagree; ValueError for
        a ``row_length`` below 1 or an unknown method.

    Example:
        >>> rows = pack_documents([[1, 2, 3], [4, 5], [6]], 4)
        >>> rows["input_ids"], rows["segment_ids"], rows["position_ids"]
        (tensor([[1, 2, 3, 6],
                [4, 5, 0, 0]]), tensor([[1, 1, 1, 2],
                [1, 1, 0, 0]]), tensor([[0, 1, 2, 0],
                [0, 1, 0, 0]]))

    Source: Ding et al. 2024, "Fewer truncations improve language modeling", sec. 3.1 (best-fit packing); labels and
    positions as transformers.DataCollatorWithFlattening gives them.
    """
    tokens = as_ragged(documents, "documents")
    targets = tokens if labels is None else as_ragged(labels, "labels")
    _check_documents(tokens, targets, row_length, method)
    pieces = _cut_at_rows(tokens, row_length) if method == "concatenate" else _fitted(tokens, row_length)
    return _laid_out(tokens.values, targets.values, pieces, row_length, pad_id, ignore_index)


def best_fit(lengths: Tensor, row_length: int) -> Tensor:
    """In which row each document goes: best-fit decreasing.

    The longest documents come first, equal ones in their order; each goes into the row with the least room that is
    enough, of several the one filled last, or opens a new row. Rows are at most 11/9 of the fewest possible, plus one.

    Args:
        lengths: int64 [N], each from 1 to ``row_length``.
        row_length: tokens per row.

    Returns: int64 [N], rows numbered from 0 in the order in which they were opened.

    Raises: ValueError for a length that does not fit a row.

    Example:
        >>> best_fit(torch.tensor([3, 2, 2, 1]), 4)
        tensor([0, 1, 1, 0])

    Source: Johnson et al. 1974, sec. 4.
    """
    if len(lengths) and not 1 <= int(lengths.min()) <= int(lengths.max()) <= row_length:
        raise ValueError(
            f"lengths: got {int(lengths.min())} to {int(lengths.max())}, expected 1 to row_length = {row_length}"
        )
    order = torch.argsort(lengths, descending=True, stable=True)
    rows_with: dict[int, list[int]] = {}
    # Bit n of this number tells whether some row has room for exactly n tokens.
    rooms, num_rows, placed = 0, 0, []
    for length in lengths[order].tolist():
        larger = rooms >> length
        if larger:
            room = length + (larger & -larger).bit_length() - 1
            row = rows_with[room].pop()
            if not rows_with[room]:
                rooms ^= 1 << room
        else:
            room, row = row_length, num_rows
            num_rows += 1
        placed.append(row)
        left = room - length
        if left:
            rows_with.setdefault(left, []).append(row)
            rooms |= 1 << left
    rows = torch.empty(len(lengths), dtype=torch.int64)
    rows[order] = torch.tensor(placed, dtype=torch.int64)
    return rows


def block_causal_mask(segment_ids: Tensor) -> Tensor:
    """Which token may look at which: those before it in its own document, and itself.

    mask[r, 0, q, k] = (segment[r, q] == segment[r, k]) and k <= q. Where a row is filled up, the filling looks at
    itself, so that no row of the softmax is empty.

    Args:
        segment_ids: [R, L].

    Returns: bool [R, 1, L, L], True where attention is allowed, for ``F.scaled_dot_product_attention(attn_mask=...)``
        and as the four-dimensional ``attention_mask`` of transformers' models. It takes R L^2 bytes.

    Example:
        >>> block_causal_mask(torch.tensor([[1, 1, 2]]))[0, 0].long()
        tensor([[1, 0, 0],
                [1, 1, 0],
                [0, 0, 1]])
    """
    length = segment_ids.shape[-1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment_ids.device).tril()
    return ((segment_ids[:, :, None] == segment_ids[:, None, :]) & causal)[:, None]


def cu_seqlens(segment_ids: Tensor) -> tuple[Tensor, int]:
    """Where each document begins in all rows taken as one sequence, and the longest length.

    For attention kernels over sequences of different lengths, on tokens of shape [R L, ...]. What fills up a row counts
    as a document of its own, so the lengths add up to R L.

    Args:
        segment_ids: [R, L].

    Returns: int32 [documents + 1], from 0 to R L; the number of tokens of the longest document.

    Example:
        >>> cu_seqlens(torch.tensor([[1, 1, 2], [1, 0, 0]]))
        (tensor([0, 2, 3, 4, 6], dtype=torch.int32), 2)

    Source: the arguments ``cu_seq_q`` and ``max_q`` of torch.nn.attention.varlen, ``cu_seqlens_q`` of flash-attn.
    """
    begins = torch.ones_like(segment_ids, dtype=torch.bool)
    begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    borders = F.pad(begins.flatten().nonzero()[:, 0], (0, 1), value=segment_ids.numel())
    return borders.to(torch.int32), int(borders.diff().max())


class PackedStream:
    """Rows packed from documents that are read one after the other, resumable at every row.

    Iterating gives rows one by one, each as :func:`pack_documents` makes them, without the axis of the rows.

    - "concatenate" gives exactly the rows of :func:`pack_documents` over all documents.
    - "best_fit" packs ``window`` documents at a time. A larger window fills rows better; at most one is read again when
      resuming.

    Documents that can be read in any order, and streams without a state, may draw from the global generators of Python,
    NumPy and torch while they are read: they draw the same again when resuming. A stream with a state must not, since
    documents that are read again after resuming would differ.

    The state is where the documents began that are not used up, and how much of them was: a few numbers beside the
    state of the documents themselves, however much was read.

    Args:
        documents: a source or a stream as the loader takes them (``datasets.Dataset``, ``datasets.IterableDataset``,
            columns, a list, an iterable that can be read again). Each row is a sequence of tokens, or has one in
            ``column``.
        row_length: tokens per row.
        method: as in :func:`pack_documents`.
        window: documents that "best_fit" packs together.
        column: where rows with names have their tokens.
        pad_id: the token that fills up.
        ignore_index: the label that counts for nothing.
        seed: of what reading the documents draws, which the loader's seed does not reach; fits 64 bits.

    Raises: ValueError for numbers below 1 or an unknown method; TypeError for documents that can be read only once.

    Example:
        >>> stream = PackedStream([[1, 2, 3], [4, 5]], 2, method="concatenate")
        >>> rows = iter(stream)
        >>> next(rows)["input_ids"], stream.state_dict()["used"]
        (tensor([1, 2]), 2)
        >>> resumed = PackedStream([[1, 2, 3], [4, 5]], 2, method="concatenate")
        >>> resumed.load_state_dict(stream.state_dict())
        >>> [row["input_ids"].tolist() for row in resumed]
        [[3, 4], [5, 0]]
    """

    def __init__(
        self,
        documents: Any,
        row_length: int,
        *,
        method: Method = "best_fit",
        window: int = 1000,
        column: str = "input_ids",
        pad_id: int = 0,
        ignore_index: int = IGNORED,
        seed: int = 0,
    ) -> None:
        _check_method(row_length, method)
        if window < 1:
            raise ValueError(f"window: got {window}, expected a positive number of documents")
        self._documents = _Documents(documents, column, seed)
        self._row_length, self._window = row_length, window
        self._method: Method = method
        self._seed = seed
        self._pad_id, self._ignore_index = pad_id, ignore_index
        self._state = _BEGINNING

    def set_epoch(self, epoch: int) -> None:
        """Which pass over the documents is next, for streams that order them by it."""
        self._documents.epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, as JSON: how many documents were ``read`` before the first one that is not used up, the
        state of the ``source`` there, and how much of what follows is ``used``: tokens, or rows of the window for
        "best_fit"."""
        place = self._state.place
        return {"read": place.num_read, "source": place.source, "used": self._state.used, **self.made_for()}

    def made_for(self) -> dict[str, Any]:
        """What a state depends on, beside the documents."""
        window = self._window if self._method == "best_fit" else None
        about = {"row_length": self._row_length, "method": self._method, "window": window, "seed": self._seed}
        return {"packed": about}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the row at which the state was taken, in the next iteration.

        Raises: ValueError for something that is no state of this class, or one of rows that were packed otherwise; it
            names what differs. Nothing is changed then.
        """
        numbers = [state.get("read"), state.get("used")]
        if set(state) != {"read", "source", "used", "packed"} or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError(
                f"state: got {dict(state)}, expected the numbers 'read' and 'used', and 'source' and 'packed'"
            )
        here, there = self.made_for()["packed"], state["packed"]
        if there != here:
            both = there if isinstance(there, Mapping) else {}
            differing = [
                f"{name}={both.get(name)!r} (here {here[name]!r})" for name in here if both.get(name) != here[name]
            ]
            raise ValueError(f"state: it was made for {', '.join(differing)}; it holds only for the same packing")
        self._state = _State(_Place(state["read"], state["source"]), state["used"])

    def __iter__(self) -> Iterator[Rows]:
        """The rows from the current position on; after the last one the position is the beginning again."""
        rows = self._concatenated() if self._method == "concatenate" else self._best_fit()
        for row, state in rows:
            self._state = state
            yield row
        self._state = _BEGINNING

    def _best_fit(self) -> Iterator[tuple[Rows, _State]]:
        used = self._state.used
        for begin, end, window in _windows(self._documents.read(self._state.place), self._window):
            rows = self._packed(window)
            num_rows = len(rows["input_ids"])
            for i in range(used, num_rows):
                yield _row(rows, i), _State(end, 0) if i == num_rows - 1 else _State(begin, i + 1)
            used = 0

    def _concatenated(self) -> Iterator[tuple[Rows, _State]]:
        # Of each document that is not used up: the place before it, and its tokens.
        waiting: list[tuple[_Place, Tensor]] = []
        used, num_tokens = self._state.used, -self._state.used
        for place, _, document in self._documents.read(self._state.place):
            waiting.append((place, document))
            num_tokens += len(document)
            while num_tokens >= self._row_length:
                row = self._joined(waiting, used, self._row_length)
                used += self._row_length
                num_tokens -= self._row_length
                while len(waiting) > 1 and used >= len(waiting[0][1]):
                    used -= len(waiting.pop(0)[1])
                yield row, _State(waiting[0][0], used)
        if num_tokens > 0:
            yield self._joined(waiting, used, num_tokens), _State(waiting[0][0], used + num_tokens)

    def _joined(self, waiting: list[tuple[_Place, Tensor]], used: int, num_tokens: int) -> Rows:
        """One row of ``num_tokens`` tokens from the documents that wait, without what was used of the first."""
        parts: list[Tensor] = []
        for _, document in waiting:
            parts.append(document[used : used + num_tokens])
            used, num_tokens = max(used - len(document), 0), num_tokens - len(parts[-1])
            if not num_tokens:
                break
        return _row(self._packed(parts), 0)

    def _packed(self, documents: list[Tensor]) -> Rows:
        return pack_documents(
            documents,
            self._row_length,
            method=self._method,
            pad_id=self._pad_id,
            ignore_index=self._ignore_index,
        )


@dataclass(frozen=True)
class _Place:
    """Between two documents: how many come before, and the state of a stream there."""

    num_read: int
    source: Any


@dataclass(frozen=True)
class _State:
    """A place, and how much of what follows it is used."""

    place: _Place
    used: int


_BEGINNING = _State(_Place(0, None), 0)


class _Documents:
    """Documents as tensors, read from any place on."""

    def __init__(self, documents: Any, column: str, seed: int) -> None:
        self._rows = as_source(documents)
        self._stream = as_stream(documents, seed=seed, shuffle=False) if self._rows is None else None
        self._column, self._seed = column, seed
        self.epoch = 0

    def read(self, place: _Place) -> Iterator[tuple[_Place, _Place, Tensor]]:
        """Each document from there on that has tokens, with the places before and after it."""
        before = place
        for after, tokens in self._raw(place):
            if len(tokens):
                yield before, after, tokens
            before = after

    def _raw(self, place: _Place) -> Iterator[tuple[_Place, Tensor]]:
        if self._stream is not None:
            rows = self._stream.read(self.epoch, place.source, place.num_read)
            for number, row in enumerate(rows, place.num_read + 1):
                yield _Place(number, self._stream.state()), self._tokens([row])[0]
        elif self._rows is not None:
            # From the same borders wherever reading begins, so that what the source draws is the same.
            for start in range(place.num_read // _FETCHED * _FETCHED, self._rows.num_rows, _FETCHED):
                numbers = list(range(start, min(start + _FETCHED, self._rows.num_rows)))
                with seeded(rng.fold_in_host(self._seed, READING, self.epoch, start)):
                    tokens = self._tokens(self._fetched(self._rows, numbers))
                for i in range(max(place.num_read - start, 0), len(numbers)):
                    yield _Place(numbers[i] + 1, None), tokens[i]

    def _fetched(self, rows: Source, numbers: list[int]) -> Any:
        try:
            return rows.fetch(numbers)
        except RowError as error:
            cause = cause_of(error)
            raise explained(cause, f"document {error.row}") from cause

    def _tokens(self, rows: Any) -> Ragged:
        """The tokens of some rows, which are columns or a list."""
        if isinstance(rows, Mapping) or (isinstance(rows, list) and isinstance(rows[0], Mapping)):
            columns = as_columns(rows)
            if self._column not in columns:
                raise BatchError(f"column: documents have no {self._column!r}, only {', '.join(columns)}")
            rows = columns[self._column]
        return as_ragged(rows, "documents")


def _windows(
    documents: Iterator[tuple[_Place, _Place, Tensor]], size: int
) -> Iterator[tuple[_Place, _Place, list[Tensor]]]:
    """So many documents at a time, with the places before the first and after the last of them."""
    while window := list(itertools.islice(documents, size)):
        yield window[0][0], window[-1][1], [document for _, _, document in window]


def _row(rows: Rows, i: int) -> Rows:
    return {name: tensor[i] for name, tensor in rows.items()}


@dataclass(frozen=True)
class _Pieces:
    """What goes where: int64 tensors with one number per piece.

    Args:
        starts: in the flat tokens.
        lengths: in tokens, at least 1.
        rows: not decreasing; pieces of one row stand in it in this order.
    """

    starts: Tensor
    lengths: Tensor
    rows: Tensor


def _fitted(tokens: Ragged, row_length: int) -> _Pieces:
    """Documents, cut only where they are longer than a row, in the rows that fit best."""
    cuts = -(-tokens.lengths // row_length)
    first = tokens.offsets[:-1].repeat_interleave(cuts)
    starts = first + _count_within(cuts) * row_length
    ends = tokens.offsets[1:].repeat_interleave(cuts)
    lengths = torch.minimum(ends - starts, torch.tensor(row_length))
    rows = best_fit(lengths, row_length)
    order = torch.argsort(rows, stable=True)
    return _Pieces(starts[order], lengths[order], rows[order])


def _cut_at_rows(tokens: Ragged, row_length: int) -> _Pieces:
    """Documents one after the other, cut wherever a row ends."""
    row_starts = torch.arange(0, len(tokens.values), row_length)
    # Documents without tokens begin where the next one does.
    borders = torch.cat([tokens.offsets, row_starts]).sort().values
    borders = borders[F.pad(borders.diff() > 0, (1, 0), value=True)]
    starts = borders[:-1]
    return _Pieces(starts, borders.diff(), starts // row_length)


def _laid_out(tokens: Tensor, labels: Tensor, pieces: _Pieces, row_length: int, pad_id: int, ignore_index: int) -> Rows:
    starts, lengths, rows = pieces.starts, pieces.lengths, pieces.rows
    per_row = torch.bincount(rows)
    segment = _count_within(per_row) + 1
    ends = lengths.cumsum(0)
    # Where a piece begins in its row: the tokens of the pieces before it, without those of earlier rows.
    before = F.pad(ends, (1, 0))
    row_begins = before[F.pad(per_row.cumsum(0), (1, 0))[:-1]].repeat_interleave(per_row)
    places = rows * row_length + before[:-1] - row_begins
    position = _count_within(lengths)
    source = starts.repeat_interleave(lengths) + position
    target = places.repeat_interleave(lengths) + position
    shape = (int(rows[-1]) + 1, row_length)

    def column(values: Tensor, fill: int) -> Tensor:
        out = torch.full((shape[0] * row_length,), fill)
        out[target] = values
        return out.view(shape)

    return {
        "input_ids": column(tokens[source].long(), pad_id),
        "labels": column(torch.where(position == 0, ignore_index, labels[source].long()), ignore_index),
        "position_ids": column(position, 0),
        "segment_ids": column(segment.repeat_interleave(lengths), 0),
    }


def _count_within(sizes: Tensor) -> Tensor:
    """0, 1, ... within groups of these sizes: [2, 3] gives [0, 1, 0, 1, 2]."""
    ends = sizes.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    return torch.arange(total) - (ends - sizes).repeat_interleave(sizes)


def _check_documents(tokens: Ragged, targets: Ragged, row_length: int, method: str) -> None:
    _check_method(row_length, method)
    for name, column in (("documents", tokens), ("labels", targets)):
        if column.values.is_floating_point() or column.values.dim() != 1:
            raise BatchError(f"{name}: got {column.values.dtype}, expected sequences of integers")
    if not torch.equal(tokens.offsets, targets.offsets):
        raise BatchError("labels: their lengths differ from those of the documents; expected a label for each token")
    if not len(tokens.values):
        raise BatchError(f"documents: no tokens in {len(tokens)} documents, expected at least one")


def _check_method(row_length: int, method: str) -> None:
    if row_length < 1:
        raise ValueError(f"row_length: got {row_length}, expected a positive number of tokens")
    if method not in ("best_fit", "concatenate"):
        raise ValueError(f"method: got {method!r}, expected 'best_fit' or 'concatenate'")
