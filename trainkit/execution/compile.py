"""``compile_step``: the same step, compiled, in the memory of the state that it is given.

Three strategies with one meaning:

- ``whole``: forward, backward, clipping, optimizer and schedule in one graph, one call per step.
- ``split``: the loss (forward and backward) and the update compiled apart, the rest eager; takes graph breaks.
- ``eager``: nothing compiled.

Donation: the new values are written over the old ones, so the peak memory is that of a loop that updates in place, and
the state that was given is spent. In a graph this is a ``copy_`` per leaf at its end, which Inductor turns into
updates in place; in the eager strategy it is the donation scope of :mod:`trainkit.tree`.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.utils import _pytree as pytree

from trainkit import rng, tree
from trainkit.execution import inductor
from trainkit.parts import PartName, run_parts_with
from trainkit.state import TrainState, host_step, remember_step, seed_of, spend
from trainkit.types import Batch, Metrics, StepFn

Strategy = Literal["auto", "whole", "split", "eager"]
_ORDER: tuple[Literal["whole", "split", "eager"], ...] = ("whole", "split", "eager")


class FallbackWarning(UserWarning):
    """A step could not be compiled in the wanted way; the message names the cause and what is used instead."""


@dataclass(frozen=True)
class Fallback:
    """One strategy that could not be used, and why."""

    strategy: str
    cause: str


@dataclass(frozen=True)
class Explanation:
    """What a compiled step does.

    Args:
        requested: the strategy that was asked for.
        strategy: the one that runs ("auto" until the first call).
        graphs: graphs that one step consists of (0 for eager).
        breaks: why a graph ended early, one reason for each graph break.
        fallbacks: strategies tried and given up, with causes; "cpp_wrapper" where Python drives a graph's kernels.
        compilations: graphs compiled so far, recompilations included.
        donates: whether the given state's memory is reused.
        donated_bytes: the size of that memory.
    """

    requested: str
    strategy: str
    graphs: int
    breaks: tuple[str, ...]
    fallbacks: tuple[Fallback, ...]
    compilations: int
    donates: bool
    donated_bytes: int

    def __str__(self) -> str:
        lines = [
            f"strategy: {self.strategy} (requested: {self.requested})",
            f"graphs per step: {self.graphs}, breaks: {len(self.breaks)}, compilations so far: {self.compilations}",
            f"memory donated: {self.donated_bytes / 2**20:.1f} MiB" if self.donates else "memory donated: none",
        ]
        lines += [f"graph break: {reason}" for reason in self.breaks]
        lines += [f"gave up {f.strategy}: {f.cause}" for f in self.fallbacks]
        return "\n".join(lines)


def compile_step(
    step: StepFn,
    *,
    strategy: Strategy = "auto",
    donate: bool = True,
    rank: int = 0,
    dynamic: bool | None = None,
    same_random: bool = False,
    options: dict[str, Any] | None = None,
) -> CompiledStep:
    """The same StepFn, faster.

    Compilation happens at the first call, and again for batches of other shapes or dtypes; never because a learning
    rate, a step or a weight has another value.

    Args:
        step: any pure StepFn.
        strategy: "whole", "split", "eager"; "auto" takes the first of these that works. Where the wanted one cannot be
            used, the next is, after one :class:`FallbackWarning` that names the cause.
        donate: reuse the memory of the given state, which is then spent: touching it raises
            :class:`trainkit.SpentStateError`. False keeps it, at the price of a second set of buffers. A step that
            fails while it writes spends the state too; one that fails before leaves it as it was.
        rank: this process' place among the data-parallel ones; seeds the random draws of a whole graph, as
            ``value_and_grad(rank=...)`` does elsewhere.
        dynamic: passed to ``torch.compile``: None makes a dimension symbolic once it has changed, False compiles per
            shape.
        same_random: draw dropout masks with the eager generators, so that a compiled step has the masks of the eager
            one; costs the fusion of the draws. By default a graph draws with its own, as deterministic, generator.
        options: Inductor options over the defaults of :func:`trainkit.execution.inductor.default_options`.

    Returns: a StepFn with ``explain()``.

    Raises: ValueError for an unknown strategy; when called with ``donate``, for a state that holds a tensor twice.

    Example:
        >>> import torch
        >>> from trainkit import LossOutput, init_state, make_train_step
        >>> from trainkit.optim import sgd
        >>> tx = sgd(0.5)
        >>> loss = lambda params, buffers, x: LossOutput((params["weight"] * x).sum(), x.shape[0])
        >>> step = compile_step(make_train_step(loss, tx), strategy="eager")
        >>> first = init_state(torch.nn.Linear(2, 1, bias=False), tx)
        >>> second, metrics = step(first, torch.ones(4, 2))
        >>> first.params
        Traceback (most recent call last):
            ...
        trainkit.state.SpentStateError: state.params: this TrainState was given to a compiled step, ...

    Source: donation as ``jax.jit(donate_argnums=0)``; one graph through ``torch.compile(fullgraph=True)``.
    """
    if strategy not in ("auto", *_ORDER):
        raise ValueError(f"strategy: got {strategy!r}, expected 'auto', 'whole', 'split' or 'eager'")
    return CompiledStep(
        step,
        strategy,
        donate,
        rank,
        dynamic,
        {**inductor.default_options(), "fallback_random": same_random, **(options or {})},
    )


class CompiledStep:
    """A StepFn made by :func:`compile_step`."""

    def __init__(
        self, step: StepFn, strategy: Strategy, donate: bool, rank: int, dynamic: bool | None, options: dict[str, Any]
    ) -> None:
        self._step = step
        self._requested = strategy
        self._candidates = list(_ORDER) if strategy == "auto" else list(_ORDER[_ORDER.index(strategy) :])
        self._donate = donate
        self._rank = rank
        self._compiler = inductor.Compiler(dynamic, options)
        self._whole: dict[Any, inductor.TracingCall] = {}
        self._parts: dict[Any, Callable[..., Any]] = {}
        self._settled = False
        self._fallbacks: list[Fallback] = []
        self._graphs = self._compilations_of_failures = self._donated_bytes = 0
        self._updates: int | None = None
        functools.update_wrapper(self, step, updated=())

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One step, by the first strategy that works; nothing is written before a graph exists."""
        if self._donate:
            _check_apart(state)
        while True:
            try:
                after, metrics = self._run(self._candidates[0], state, batch)
            except inductor.COMPILER_ERRORS as error:
                # An error of the step itself also ends the tracing; running it eagerly and purely tells the two apart,
                # unless it works in place only.
                with contextlib.suppress(tree.NotDonatedError):
                    self._step(state, batch)
                if len(self._candidates) == 1:
                    raise
                self._give_up(error)
            else:
                break
        if not self._settled:
            self._settled = True
            self._graphs = self._compiler.compilations - self._compilations_of_failures
            self._donated_bytes = sum(t.numel() * t.element_size() for t in _leaves(after)) if self._donate else 0
        if self._donate:
            spend(state)
        return after, metrics

    def explain(self) -> Explanation:
        """Which strategy runs, its graphs and breaks, what was given up and why, what was compiled and donated."""
        return Explanation(
            requested=self._requested,
            strategy=self._candidates[0] if self._settled else self._requested,
            graphs=self._graphs,
            breaks=self._compiler.breaks() if self._candidates[0] == "split" else (),
            fallbacks=(*self._fallbacks, *(Fallback("cpp_wrapper", cause) for cause in self._compiler.without_wrapper)),
            compilations=self._compiler.compilations,
            donates=self._donate,
            donated_bytes=self._donated_bytes,
        )

    def _give_up(self, error: Exception) -> None:
        given_up, cause = self._candidates.pop(0), inductor.cause(error)
        self._fallbacks.append(Fallback(given_up, cause))
        self._compilations_of_failures = self._compiler.compilations
        self._settled = False
        warnings.warn(
            f"strategy {given_up!r} cannot be used for this step, using {self._candidates[0]!r}: {cause}",
            FallbackWarning,
            stacklevel=3,
        )

    def _run(self, strategy: str, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if strategy == "whole":
            return self._run_whole(state, batch)
        if strategy == "split":
            with run_parts_with(self._part):
                return self._run_eager(state, batch)
        return self._run_eager(state, batch)

    def _run_eager(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if not self._donate:
            return self._step(state, batch)
        scope = tree.donate(owned=_ownership(state))
        try:
            with scope:
                after, metrics = self._step(state, batch)
            after = _in_buffers_of(state, after)
        except inductor.COMPILER_ERRORS:
            # The graph that would have written does not exist.
            raise
        except BaseException:
            if scope.has_handed_out:
                spend(state)
            raise
        if _same_trees(state, after):
            _inherit(state, after, "_leaves", "_apart", "_ownership", "_attached")
        return after, metrics

    # -- whole ---------------------------------------------------------------------------------------------------

    def _run_whole(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        leaves = _leaves(state)
        batch_leaves, batch_spec = pytree.tree_flatten(batch)
        structure = _structure(state)
        kind = (structure, batch_spec, self._compiler.kind(batch_leaves))
        compiled = self._whole.get(kind)
        if compiled is None:
            text = _whole_text(self._step, structure.spec, batch_spec, self._donate)
            compiled = inductor.TracingCall(self._compiler.compile(text, fullgraph=True))
            self._whole[kind] = compiled
        before = host_step(state)
        with rng.seeded(seed_of(state, self._rank), state.step.device):
            new_leaves, metrics = compiled(leaves, batch_leaves)
        if self._donate:
            after = state.replace()
            _inherit(state, after, "_leaves", "_apart", "_structure")
        else:
            after = _locked(pytree.tree_unflatten(new_leaves, structure.spec))
        remember_step(state, after, self._updates_per_call(before, after))
        return after, metrics

    def _updates_per_call(self, before: int, after: TrainState) -> int:
        """How far one call advances ``step`` (several updates for ``scan``): asked of the device once."""
        if self._updates is None:
            self._updates = int(after.step.max()) - before
        return self._updates

    # -- split ---------------------------------------------------------------------------------------------------

    def _part(self, name: PartName, fn: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(self._run_part, name, fn)

    def _run_part(self, name: PartName, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        # A step that needs the old values after the new ones exist has closed the scope (``tree.keep``).
        donated = name == "update" and tree.is_donated(tree.leaves(args[2]))
        kind = (name, fn, spec, donated, self._compiler.kind(leaves))
        compiled = self._parts.get(kind)
        if compiled is None:
            text = _update_text(fn, spec) if donated else _part_text(fn, spec)
            compiled = self._parts[kind] = self._compiler.compile(text, fullgraph=False)
        with inductor.tracing():
            result = compiled(leaves)
        if donated:
            _, opt_state, params = args
            return params, opt_state
        return _locked(result)


def _whole_text(step: StepFn, structure: Any, batch_spec: Any, donate: bool) -> Callable[..., Any]:
    """The whole step on lists of leaves: what is compiled."""

    def whole(leaves: list[Tensor], batch_leaves: list[Any]) -> tuple[list[Tensor], Metrics]:
        state = pytree.tree_unflatten(leaves, structure)
        after, metrics = step(state, pytree.tree_unflatten(batch_leaves, batch_spec))
        new = pytree.tree_leaves(after)
        if len(new) != len(leaves):
            raise ValueError(
                "step: returned a state of another structure than it was given; add fields before the loop"
            )
        if not donate:
            return new, metrics
        _write(leaves, new)
        return [], metrics

    return whole


def _part_text(fn: Callable[..., Any], spec: Any) -> Callable[..., Any]:
    def run(leaves: list[Any]) -> Any:
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        return fn(*args, **kwargs)

    return run


def _update_text(fn: Callable[..., Any], spec: Any) -> Callable[..., Any]:
    """An update that writes the new parameters and optimizer state over the old ones."""

    def run(leaves: list[Any]) -> None:
        (grads, opt_state, params), kwargs = pytree.tree_unflatten(leaves, spec)
        new_params, new_opt_state = fn(grads, opt_state, params, **kwargs)
        _write((params, opt_state), (new_params, new_opt_state))

    return run


def _write(old: Any, new: Any) -> None:
    for target, value in zip(pytree.tree_leaves(old), pytree.tree_leaves(new), strict=True):
        if value is not target:
            target.copy_(value)


class _Structure:
    """The tree structure of a state, with its hash remembered: computing it visits every name."""

    def __init__(self, spec: pytree.TreeSpec) -> None:
        self.spec = spec
        self._hash = hash(spec)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Structure) and self.spec == other.spec)


def _cached(state: TrainState, name: str, make: Callable[[TrainState], Any]) -> Any:
    """What ``make`` says of a state, kept with it: flattening a state costs 70 microseconds, a small step 150."""
    if name not in state.__dict__:
        state.__dict__[name] = make(state)
    return state.__dict__[name]


def _leaves(state: TrainState) -> list[Tensor]:
    leaves: list[Tensor] = _cached(state, "_leaves", pytree.tree_leaves)
    return leaves


def _check_apart(state: TrainState) -> None:
    """Refuse a state that holds a tensor twice: what is written over one entry would change the other."""
    if not _cached(state, "_apart", lambda s: tree.are_apart(_leaves(s))):
        seen: dict[int, str] = {}
        for path, leaf in pytree.tree_flatten_with_path(state)[0]:
            name, place = f"state{pytree.keystr(path)}", tree.address(leaf)
            if place and seen.setdefault(place, name) != name:
                raise ValueError(
                    f"state: {seen[place]} and {name} are one memory, and a step that donates would write over both; "
                    "clone one of them (trainkit.tree.clone), or compile with donate=False"
                )


def _structure(state: TrainState) -> _Structure:
    structure: _Structure = _cached(state, "_structure", lambda s: _Structure(pytree.tree_structure(s)))
    return structure


def _ownership(state: TrainState) -> tree.Ownership:
    """All but the buffers: the forward pass writes these before it is known whether the loss will be refused."""
    owned: tree.Ownership = _cached(state, "_ownership", lambda s: tree.ownership(s.replace(buffers=tree.frozen())))
    return owned


def _in_buffers_of(state: TrainState, after: TrainState) -> TrainState:
    """``after``, with its buffers in the memory of those of ``state``."""
    if after.buffers is state.buffers:
        return after
    _write(state.buffers, after.buffers)
    new = after.replace(buffers=state.buffers)
    remember_step(after, new, updates=0)
    return new


def _inherit(state: TrainState, after: TrainState, *names: str) -> None:
    """Hand on what was found out about a state to one made of the same tensors."""
    after.__dict__.update((name, state.__dict__[name]) for name in names if name in state.__dict__)


def _same_trees(a: TrainState, b: TrainState) -> bool:
    return all(getattr(a, name) is getattr(b, name) for name in TrainState.__dataclass_fields__)


def _locked(result: Any) -> Any:
    """Trees that come out of a graph, or are put together from leaves, are not locked yet."""
    return pytree.tree_map(lambda x: tree.frozen(x) if tree.is_tree(x) else x, result, is_leaf=tree.is_tree)
