"""Which checkpoints of a run stay."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from trainkit.io.checkpoint.manifest import Manifest


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay when a new one is durable: those that any of the rules keeps, and always the new one.

    Args:
        last: the newest ones, at least 1; None keeps all.
        best: how many with the best value of ``metric``, as it was given to :meth:`Saver.save`. One saved without it,
            or with a value that is not finite, is not among them. Of equal ones the newer is better.
        metric: a name among the metrics; needed where ``best`` is not 0.
        mode: "min" or "max": which values are better.
        every: those whose step is a multiple of it; None for no such rule.

    Raises: ValueError for numbers out of range, an unknown mode, ``best`` without ``metric``.

    Example:
        >>> Retention(last=2, best=1, metric="validation_loss").mode
        'min'
    """

    last: int | None = 3
    best: int = 0
    metric: str | None = None
    mode: str = "min"
    every: int | None = None

    def __post_init__(self) -> None:
        if self.last is not None and self.last < 1:
            raise ValueError(f"last: got {self.last}, expected at least 1, or None to keep all")
        if self.best < 0:
            raise ValueError(f"best: got {self.best}, expected at least 0")
        if self.best and self.metric is None:
            raise ValueError(f"best={self.best} needs a metric to compare; give its name")
        if self.mode not in ("min", "max"):
            raise ValueError(f"mode: got {self.mode!r}, expected 'min' or 'max'")
        if self.every is not None and self.every < 1:
            raise ValueError(f"every: got {self.every}, expected at least 1 step, or None")


def kept(rules: Retention, manifests: Sequence[Manifest]) -> set[int]:
    """The positions of those that stay, in a sequence ordered from old to new.

    Example:
        >>> made = [Manifest(step, 0, "run", {}, {}) for step in (10, 20, 30, 40)]
        >>> kept(Retention(last=1, every=20), made)
        {1, 3}
    """
    positions = range(len(manifests))
    if rules.last is None:
        return set(positions)
    stay = set(positions[-rules.last :])
    if rules.every is not None:
        stay |= {i for i in positions if manifests[i].step % rules.every == 0}
    values = {i: _value(rules, manifests[i]) for i in positions}
    ranked = [(value, i) for i, value in values.items() if value is not None]
    return stay | {i for _, i in heapq.nlargest(rules.best, ranked)}


def _value(rules: Retention, manifest: Manifest) -> float | None:
    """The larger the better."""
    value = manifest.metrics.get(rules.metric) if rules.metric is not None else None
    return value if value is None or rules.mode == "max" else -value
