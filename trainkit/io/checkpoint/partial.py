"""A state filled in part: some weights from elsewhere, the rest as it was, and a report of both."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainkit import tree
from trainkit.state import TrainState
from trainkit.types import Params

Pattern = str | re.Pattern[str]


@dataclass(frozen=True)
class Report:
    """What :func:`restore_partial` did, by names.

    Args:
        restored: taken from the tensors.
        missing: names of the state that a pattern fits, but no tensor has.
        unused: tensors that went nowhere: no pattern fits, or the state has no such name.
        untouched: names of the state that no pattern fits.
        shape_mismatches: by name the shapes (of the tensor, of the state); these kept the state's values.
        complex_for_real: names of complex tensors where the state's are real; these kept the state's values.
        cast: by name the dtypes (of the tensor, of the state) of what was restored in another dtype.
    """

    restored: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    untouched: tuple[str, ...]
    shape_mismatches: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    complex_for_real: tuple[str, ...]
    cast: Mapping[str, tuple[torch.dtype, torch.dtype]]

    def __str__(self) -> str:
        """A line for each kind that has names; the first three of them."""
        shapes = [f"{name} {theirs} for {own}" for name, (theirs, own) in self.shape_mismatches.items()]
        dtypes = [f"{name} {theirs} to {own}" for name, (theirs, own) in self.cast.items()]
        kinds = {
            "restored": self.restored,
            "missing among the tensors": self.missing,
            "of another shape, kept": shapes,
            "complex for real ones, kept": self.complex_for_real,
            "tensors without use": self.unused,
            "fitted by no pattern, kept": self.untouched,
            "cast": dtypes,
        }
        return "\n".join(f"{len(found)} {kind}: {_some(found)}" for kind, found in kinds.items() if found)


def restore_partial(
    state: TrainState, tensors: Mapping[str, Tensor], patterns: Sequence[Pattern]
) -> tuple[TrainState, Report]:
    """The state with those parameters and buffers taken from ``tensors`` that have a fitting name and the same shape.

    Values are copied into new tensors with the state's dtype, device and layout. Step, key and the optimizer's memory
    stay as they are. Weights under other names are renamed first: ``{f"backbone.{n}": t for n, t in tensors.items()}``.

    Args:
        state: what is filled; it is not changed.
        tensors: by name, such as :func:`~trainkit.io.checkpoint.model_files.read_model` gives them.
        patterns: which names are to be filled. A string is a shell pattern for the whole name ("encoder.*"); a
            compiled regular expression is searched for in the name.

    Returns: the new state, and a report. Nothing that differs is an error: look at the report.

    Raises:
        ValueError: no patterns, or a pattern that fits no name of the state (the text shows some names).
        TypeError: a string in the place of a list of patterns.

    Example:
        >>> from torch import nn
        >>> from trainkit import init_state
        >>> from trainkit.optim import sgd
        >>> pretrained = {"0.weight": torch.ones(3, 2), "0.bias": torch.ones(3), "1.weight": torch.ones(9, 3)}
        >>> state = init_state(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4)), sgd(0.1))
        >>> state, report = restore_partial(state, pretrained, ["0.*"])
        >>> print(report)
        2 restored: 0.weight, 0.bias
        1 tensors without use: 1.weight
        2 fitted by no pattern, kept: 1.weight, 1.bias
    """
    own = tree.named(state.params) | tree.named(state.buffers)
    wanted = _fitting(list(own), patterns)
    found = [name for name in own if name in wanted and name in tensors]
    fits = [name for name in found if tensors[name].shape == own[name].shape]
    lossy = tuple(name for name in fits if is_complex_for_real(tensors[name], own[name]))
    fits = [name for name in fits if name not in lossy]
    taken = set(fits)
    report = Report(
        restored=tuple(fits),
        missing=tuple(name for name in own if name in wanted and name not in tensors),
        unused=tuple(name for name in tensors if name not in own or name not in wanted),
        untouched=tuple(name for name in own if name not in wanted),
        shape_mismatches={
            n: (tuple(tensors[n].shape), tuple(own[n].shape)) for n in found if n not in taken and n not in lossy
        },
        complex_for_real=lossy,
        cast={n: (tensors[n].dtype, own[n].dtype) for n in fits if tensors[n].dtype != own[n].dtype},
    )
    new = state.replace(params=_filled(state.params, tensors, taken), buffers=_filled(state.buffers, tensors, taken))
    return new, report


def is_complex_for_real(tensor: Tensor, own: Tensor) -> bool:
    """Whether a tensor cannot be copied into another without the loss of an imaginary part."""
    return tensor.is_complex() and not own.is_complex()


def _fitting(names: list[str], patterns: Sequence[Pattern]) -> set[str]:
    """The names that some pattern fits."""
    if isinstance(patterns, (str, re.Pattern)):
        raise TypeError(f"patterns: got {patterns!r}, expected a list of patterns: [{patterns!r}]")
    if not patterns:
        raise ValueError("patterns: got none; expected at least one, such as 'encoder.*', or '*' for all names")
    wanted: set[str] = set()
    for pattern in patterns:
        test = re.compile(fnmatch.translate(pattern)).match if isinstance(pattern, str) else pattern.search
        fitting = [name for name in names if test(name)]
        if not fitting:
            raise ValueError(f"patterns: {pattern!r} fits no name of the state, which has {_some(names)}")
        wanted.update(fitting)
    return wanted


def _filled(flat: Params, tensors: Mapping[str, Tensor], taken: set[str]) -> Params:
    own = tree.named(flat)
    return tree.like(flat, [torch.empty_like(t).copy_(tensors[n]) if n in taken else t for n, t in own.items()])


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
