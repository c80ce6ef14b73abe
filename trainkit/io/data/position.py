"""Where a run is in its data: a few integers, and for a stream the stream's own state."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FORMAT = 1
"""Of the saved form; a loader refuses others."""


@dataclass(frozen=True)
class Position:
    """What was taken so far. Windows are those of :class:`~trainkit.io.data.batching.Batching`.

    Args:
        epoch: which pass over the data, from 0.
        batch: batches taken in this epoch.
        total: batches taken since the run began.
        window: which window of the epoch comes next.
        within: batches taken of that window.
        num_read: rows of a stream before that window.
        state: of the stream before that window; None for its beginning and for map-style data.
    """

    epoch: int = 0
    batch: int = 0
    total: int = 0
    window: int = 0
    within: int = 0
    num_read: int = 0
    state: Any = None

    def taken(self) -> Position:
        """After one more batch of the same window."""
        # Called for every batch: `dataclasses.replace` takes several times as long.
        numbers = self.epoch, self.batch + 1, self.total + 1, self.window, self.within + 1
        return Position(*numbers, self.num_read, self.state)

    def next_window(self, num_rows: int = 0, state: Any = None) -> Position:
        """At the beginning of the following window; ``num_rows`` were read in this one."""
        num_read = self.num_read + num_rows
        return dataclasses.replace(self, window=self.window + 1, within=0, num_read=num_read, state=state)

    def at_epoch(self, epoch: int) -> Position:
        """At the beginning of an epoch."""
        return Position(epoch=epoch, total=self.total)


def to_json(position: Position, made_for: Mapping[str, Any]) -> dict[str, Any]:
    """A position as JSON, with what it depends on.

    Raises: TypeError if a stream's own state is no JSON.

    Example:
        >>> to_json(Position(epoch=2), {"seed": 0})["epoch"]
        2
    """
    saved = {"format": FORMAT, **dataclasses.asdict(position), "made_for": dict(made_for)}
    try:
        json.dumps(saved, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"data: the stream's state is no JSON: {error}; expected numbers, text, lists, mappings"
        ) from None
    return saved


def from_json(saved: Any, made_for: Mapping[str, Any]) -> Position:
    """The position that :func:`to_json` saved.

    Raises: ValueError for something else, another format, or a position in other data, batches or another order; it
        names what differs.
    """
    names = [field.name for field in dataclasses.fields(Position)]
    if not isinstance(saved, Mapping) or set(saved) != {"format", "made_for", *names}:
        found = sorted(map(str, saved)) if isinstance(saved, Mapping) else type(saved).__name__
        raise ValueError(f"cursor: got {found}, expected what state_dict gave: format, made_for, {', '.join(names)}")
    if saved["format"] != FORMAT:
        raise ValueError(f"cursor: got format {saved['format']!r}, this version reads {FORMAT}")
    for name in names[:-1]:
        if type(saved[name]) is not int or saved[name] < 0:
            raise ValueError(f"cursor: got {name}={saved[name]!r}, expected an integer of at least 0")
    # As they look after a way through a file.
    here, there = json.loads(json.dumps(dict(made_for))), saved["made_for"]
    if here != there:
        both = there if isinstance(there, Mapping) else {}
        changed = [name for name in {**here, **both} if both.get(name, ...) != here.get(name, ...)]
        said = ", ".join(f"{name}={both.get(name)!r} (here {here.get(name)!r})" for name in changed)
        raise ValueError(f"cursor: it was made for {said}; a position holds only for the same data, batches and order")
    return Position(**{name: saved[name] for name in names})


@dataclass(frozen=True)
class Limit:
    """Where an iteration ends: before this epoch, or after this many batches in all; None for nowhere."""

    epochs: int | None = None
    batches: int | None = None

    def before(self, position: Position) -> bool:
        """Whether nothing is to be taken at a position any more."""
        over = self.epochs is not None and position.epoch >= self.epochs
        return over or (self.batches is not None and position.total >= self.batches)
