"""Step transforms: from a StepFn to a StepFn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from trainkit import tree
from trainkit.accumulate import merge_metrics
from trainkit.metrics import BitsPerByte, Counts, Mean, Perplexity, Sum
from trainkit.optim.averaging import average
from trainkit.optim.finite import select
from trainkit.optim.groups import Labels
from trainkit.optim.transform import with_entries
from trainkit.state import TrainState, host_step, remember_step
from trainkit.types import Batch, Metrics, Params, Schedule, StepFn

_ADDITIVE = (Mean, Sum, Perplexity, BitsPerByte, Counts)
"""Metrics that add up number by number, so that zeros change nothing."""

# -- averages ------------------------------------------------------------------------------------------------------


def with_ema(step: StepFn, decay: float, *, name: str = "ema") -> StepFn:
    """Keep an exponential moving average of the parameters beside them.

    mean <- decay mean + (1 - decay) params, after each update.

    The average is in ``state.extra``: start with :func:`init_ema`, read with :func:`ema_params`. Evaluate it with
    ``state.replace(params=ema_params(state))``; buffers are those of the run.

    Args:
        step: any StepFn.
        decay: in [0, 1); the memory is about 1 / (1 - decay) updates long.
        name: the entry of ``state.extra``, for more than one average.

    Raises:
        ValueError: a decay out of its range.
        KeyError: when called, the state has no average of this name.

    Example:
        >>> from trainkit import LossOutput, init_state, make_train_step
        >>> from trainkit.optim import sgd
        >>> tx = sgd(1.0)
        >>> loss = lambda params, buffers, x: LossOutput((params["weight"] * x).sum(), x.shape[0])
        >>> step = with_ema(make_train_step(loss, tx), 0.75)
        >>> state = init_ema(init_state(torch.nn.Linear(1, 1, bias=False), tx))
        >>> after, _ = step(state, torch.ones(2, 1))
        >>> after.params["weight"] - state.params["weight"], ema_params(after)["weight"] - state.params["weight"]
        (tensor([[-1.]]), tensor([[-0.2500]]))

    Source: Polyak and Juditsky 1992; matches torch.optim.swa_utils.AveragedModel with get_ema_multi_avg_fn, started
    from the first parameters.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay: got {decay}, expected a number in [0, 1)")
    return with_average(step, 1 - decay, name=name)


def with_average(step: StepFn, share: float | Schedule, *, name: str = "ema") -> StepFn:
    """Keep a running average of the parameters of any kind: :func:`with_ema` with another rule.

    mean <- mean + share (params - mean), after each update.

    Args:
        step: any StepFn.
        share: of the newest parameters: a number, or a function of how many updates were averaged before, such as
            ``trainkit.optim.polyak(start=1000)`` or ``ema(0.999, warmup=True)``.
        name: the entry of ``state.extra``.

    Raises: KeyError, when called, if the state has no average of this name.

    Example:
        >>> from trainkit import LossOutput, init_state, make_train_step
        >>> from trainkit.optim import sgd
        >>> from trainkit.optim.averaging import polyak
        >>> tx = sgd(1.0)
        >>> loss = lambda params, buffers, x: LossOutput((params["weight"] * x).sum(), x.shape[0])
        >>> step = with_average(make_train_step(loss, tx), polyak())
        >>> state = first = init_ema(init_state(torch.nn.Linear(1, 1, bias=False), tx))
        >>> for _ in range(3):
        ...     state, _ = step(state, torch.ones(2, 1))
        >>> ema_params(state)["weight"] - first.params["weight"]
        tensor([[-2.]])

    Source: Izmailov et al. 2018 for equal weights; the rules name theirs.
    """

    def averaged(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        _check_average(state, name)
        after, metrics = step(state, batch)
        kept: Any = after.extra[name]
        with torch.no_grad():
            mean = average(kept["params"], after.params, share(kept["count"]) if callable(share) else share)
            (count,) = tree.writable([kept["count"]])
            entry = with_entries(kept, {"count": count.add_(1), "params": mean})
        return _with_extra(after, name, entry), metrics

    return averaged


def init_ema(state: TrainState, *, name: str = "ema", dtype: torch.dtype | None = None) -> TrainState:
    """The state with an average that starts from its parameters.

    Args:
        state: any state.
        name: the entry of ``state.extra``.
        dtype: of the average; None for that of each parameter. Averages of bfloat16 parameters stand still unless they
            are float32: a share of 1 / 1000 is below what its 8 bits of precision can add.

    Example:
        >>> from trainkit import init_state
        >>> from trainkit.optim import sgd
        >>> state = init_ema(init_state(torch.nn.Linear(1, 1), sgd(0.1)), dtype=torch.float64)
        >>> sorted(state.extra.keys()), ema_params(state)["weight"].dtype
        (['ema'], torch.float64)
    """
    means = tree.frozen({k: p.to(dtype or p.dtype, copy=True) for k, p in tree.named(state.params).items()})
    return _with_extra(state, name, tree.frozen({"count": torch.zeros_like(state.step), "params": means}))


def ema_params(state: TrainState, *, name: str = "ema") -> Params:
    """The averaged parameters.

    Args:
        state: from a step of :func:`with_ema` or :func:`with_average`, or from :func:`init_ema`.
        name: the entry of ``state.extra``.

    Raises: KeyError if the state has no average of this name.

    Example:
        >>> from trainkit import init_state
        >>> from trainkit.optim import sgd
        >>> state = init_ema(init_state(torch.nn.Linear(1, 1), sgd(0.1)))
        >>> torch.equal(ema_params(state)["weight"], state.params["weight"])
        True
    """
    _check_average(state, name)
    entries: Any = state.extra
    params: Params = entries[name]["params"]
    return params


def _check_average(state: TrainState, name: str) -> None:
    if name not in dict(state.extra.items()):
        raise KeyError(f"state.extra: no average {name!r}; start with init_ema(state, name={name!r})")


def _with_extra(state: TrainState, name: str, entry: Any) -> TrainState:
    return _same_step(state, extra=with_entries(state.extra, {**dict(state.extra.items()), name: entry}))


# -- not finite ----------------------------------------------------------------------------------------------------


def skip_nonfinite(step: StepFn) -> StepFn:
    """Take back a step whose loss or new parameters hold an infinity or a NaN, without asking the device.

    Parameters, buffers, optimizer state and extra are then those from before. ``state.step`` advances all the same: it
    says how far the data and the random draws have come, and the host need not ask the device. Metrics that add up
    (means, sums, perplexity, counts) are zero with weight zero then, so that merged they tell of the steps that
    counted; ``skipped_steps`` is the share of steps that were taken back.

    Compile the result, not the argument: ``compile_step(skip_nonfinite(step))``. Outside of a graph it takes a second
    state while the step runs.

    Args:
        step: any StepFn that does not donate by itself.

    Example:
        >>> from trainkit import LossOutput, init_state, make_train_step
        >>> from trainkit.optim import sgd
        >>> tx = sgd(1.0)
        >>> loss = lambda params, buffers, x: LossOutput((params["weight"] * x).sum(), x.shape[0])
        >>> state = init_state(torch.nn.Linear(1, 1, bias=False), tx)
        >>> after, metrics = skip_nonfinite(make_train_step(loss, tx))(state, torch.full((2, 1), float("inf")))
        >>> torch.equal(after.params["weight"], state.params["weight"]), int(after.step)
        (True, 1)
        >>> metrics["skipped_steps"].compute()
        tensor(1.)
    """

    def guarded(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with tree.keep():
            new, metrics = step(state, batch)
        with torch.no_grad():
            finite = tree.all_finite([*_losses(metrics).values(), *tree.leaves(new.params)])
            fields = ("params", "buffers", "opt_state", "extra")
            after = _same_step(new, **{f: select(finite, getattr(new, f), getattr(state, f)) for f in fields})
            skipped = (~finite).float()
            counted = {name: _if_finite(finite, metric) for name, metric in metrics.items()}
        return after, {**counted, "skipped_steps": Mean(skipped, torch.ones_like(skipped))}

    return guarded


class NonfiniteError(FloatingPointError):
    """A step gave a loss or a parameter that is not finite. ``state`` is the state before that step."""

    def __init__(self, message: str, state: TrainState) -> None:
        super().__init__(message)
        self.state = state


def raise_nonfinite(step: StepFn) -> StepFn:
    """Stop at the first step whose loss or new parameters hold an infinity or a NaN.

    The host waits for the device in every step to look: for finding a fault, not for speed. To look
    at a compiled step, let it keep its state (``compile_step(step, donate=False)``), or take the step back inside
    (``raise_nonfinite(compile_step(skip_nonfinite(step)))``); then the error says only that it was taken back.

    Args:
        step: any StepFn that leaves its state alone, or takes bad steps back.

    Raises: :class:`NonfiniteError`, when called, naming the step and the loss or parameter; its ``state`` is the state
        from before, to look at or go on from.

    Example:
        >>> from trainkit import LossOutput, init_state, make_train_step
        >>> from trainkit.optim import sgd
        >>> tx = sgd(1.0)
        >>> loss = lambda params, buffers, x: LossOutput((params["weight"] * x).sum(), x.shape[0])
        >>> state = init_state(torch.nn.Linear(1, 1, bias=False), tx)
        >>> raise_nonfinite(make_train_step(loss, tx))(state, torch.full((2, 1), float("nan")))
        Traceback (most recent call last):
            ...
        trainkit.transforms.NonfiniteError: step 1: loss is nan; the state before it is in the error's .state
    """

    def checked(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        number = host_step(state) + 1
        with tree.keep():
            after, metrics = step(state, batch)
        losses, params = _losses(metrics), tree.named(after.params)
        if bool(tree.all_finite([*losses.values(), *params.values()])):
            if "skipped_steps" in metrics and bool(metrics["skipped_steps"].compute() > 0):
                raise NonfiniteError(f"step {number}: not finite, and taken back; .state has what was before it", after)
            return after, metrics
        fault = next(_faults(losses, params))
        raise NonfiniteError(f"step {number}: {fault}; the state before it is in the error's .state", state)

    return checked


def _faults(losses: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> Iterator[str]:
    for name, value in losses.items():
        if not bool(torch.isfinite(value)):
            yield f"{name} is {float(value)}"
    for name, t in params.items():
        num_nan, num_inf = int(torch.isnan(t).sum()), int(torch.isinf(t).sum())
        if num_nan or num_inf:
            yield f"parameter {name!r} holds {num_nan} NaN and {num_inf} infinite numbers of {t.numel()}"


def _losses(metrics: Metrics) -> dict[str, Tensor]:
    """The summed losses that a step reports: ``loss``, and those of its parts ("generator/loss")."""
    return {k: m.total for k, m in metrics.items() if isinstance(m, Mean) and k.rpartition("/")[2] == "loss"}


def _if_finite(finite: Tensor, metric: Any) -> Any:
    if not isinstance(metric, _ADDITIVE):
        return metric
    return pytree.tree_map_only(Tensor, lambda t: torch.where(finite, t, 0), metric)


# -- several steps in one ------------------------------------------------------------------------------------------


def scan(step: StepFn, k: int) -> StepFn:
    """``k`` steps in one call, on ``k`` batches.

    state <- step(state, batches[i]) for i = 0 ... k - 1; metrics are merged.

    Compiled as a whole it is one graph, so the host is asked once for k steps; the graph is k times as long, and so is
    its compilation.

    Args:
        step: any StepFn.
        k: at least 1.

    Returns: a StepFn of batches: a list of ``k`` batches, or one tree whose tensors have a leading axis of size ``k``.

    Raises: ValueError for ``k`` below 1; when called, for another number of batches.

    Example:
        >>> from trainkit import LossOutput, init_state, make_train_step
        >>> from trainkit.optim import sgd
        >>> tx = sgd(1.0)
        >>> loss = lambda params, buffers, x: LossOutput((params["weight"] * x).sum(), x.shape[0])
        >>> state = init_state(torch.nn.Linear(1, 1, bias=False), tx)
        >>> after, metrics = scan(make_train_step(loss, tx), 3)(state, torch.ones(3, 4, 1))
        >>> int(after.step), metrics["loss"].weight
        (3, tensor(12.))

    Source: ``jax.lax.scan``, unrolled.
    """
    if k < 1:
        raise ValueError(f"k: got {k}, expected at least 1")

    def scanned(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        total: Metrics = {}
        for part in _batches(batch, k):
            state, metrics = step(state, part)
            total = merge_metrics(total, metrics)
        return state, total

    return scanned


def _batches(batch: Batch, k: int) -> list[Batch]:
    if isinstance(batch, list):
        if len(batch) != k:
            raise ValueError(f"batch: got a list of {len(batch)}, expected {k} batches")
        return batch
    leaves, spec = pytree.tree_flatten(batch)
    sizes = {leaf.shape[0] if leaf.dim() else None for leaf in leaves if isinstance(leaf, Tensor)}
    if sizes != {k}:
        raise ValueError(
            f"batch: its tensors have leading axes of {sorted(map(str, sizes))}, expected {k} for all; "
            f"stack {k} batches, or give a list of them"
        )
    parts = zip(*(leaf.unbind() if isinstance(leaf, Tensor) else [leaf] * k for leaf in leaves), strict=True)
    return [pytree.tree_unflatten(list(part), spec) for part in parts]


def alternate(**steps: StepFn) -> StepFn:
    """Several steps in turn, on one state and one batch: two losses, or the two players of a game.

    state <- step(state, batch) for each step in the order they are given. A step sees what those before it did. Each
    counts as an update in ``state.step``, so each draws its own randomness.

    Args:
        steps: StepFns by name. Metrics carry it in front: ``generator/loss``.

    Raises: ValueError without a step.

    Example:
        A generative adversarial network is one module with two parts, and a loss and an optimizer for each part:

        >>> from torch import nn
        >>> from torch.nn.functional import softplus
        >>> from trainkit import LossOutput, functional, init_state, make_train_step
        >>> from trainkit.optim import adam
        >>> from trainkit.optim.groups import by_name, partition
        >>> class GAN(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.generator, self.critic = nn.Linear(2, 1), nn.Linear(1, 1)
        ...     def forward(self, real, noise):
        ...         return self.critic(real), self.critic(self.generator(noise))
        >>> gan = GAN()
        >>> model = functional(gan)
        >>> def critic_loss(params, buffers, batch):
        ...     (real, fake), buffers = model(params, buffers, *batch)
        ...     return LossOutput((softplus(-real) + softplus(fake)).sum(), len(real), buffers=buffers)
        >>> def generator_loss(params, buffers, batch):
        ...     (_, fake), buffers = model(params, buffers, *batch)
        ...     return LossOutput(softplus(-fake).sum(), len(fake), buffers=buffers)
        >>> labels = by_name({"generator.*": "generator"}, default="critic")
        >>> players = {"critic": adam(2e-4), "generator": adam(1e-4)}
        >>> step = alternate(
        ...     critic=train_only(make_train_step(critic_loss, players["critic"]), "critic", labels),
        ...     generator=train_only(make_train_step(generator_loss, players["generator"]), "generator", labels),
        ... )
        >>> state = init_state(gan, partition(players, labels))
        >>> state, metrics = step(state, (torch.randn(8, 1), torch.randn(8, 2)))
        >>> int(state.step), sorted(name for name in metrics if name.endswith("loss"))
        (2, ['critic/loss', 'generator/loss'])

    Source: Goodfellow et al. 2014, algorithm 1.
    """
    if not steps:
        raise ValueError("steps: got none, expected at least one, by name: alternate(critic=..., generator=...)")

    def alternated(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        total: Metrics = {}
        for name, step in steps.items():
            state, metrics = step(state, batch)
            total.update((f"{name}/{key}", metric) for key, metric in metrics.items())
        return state, total

    return alternated


def train_only(step: StepFn, label: str, labels: Labels) -> StepFn:
    """A step on the part of the parameters that carries a label; the rest of the model stands still.

    The step sees a state whose ``params`` are that part, whose ``opt_state`` is the entry ``label``, and whose
    ``buffers`` hold the other parameters beside the buffers, as frozen parameters always travel. So
    ``functional(module)`` takes the two trees as they come, and no gradient is computed for the rest.

    Args:
        step: its optimizer is made for the part alone.
        label: which part.
        labels: ``(name, parameter) -> label``, the function that ``partition`` got.

    Returns: a StepFn on whole states, whose ``opt_state`` has one entry per label: that of
        ``init_state(module, partition({label: optimizer, ...}, labels))``.

    Raises: ValueError, when called, if no parameter carries the label, or ``opt_state`` has no entry for it.

    Example:
        >>> from trainkit import LossOutput, init_state, make_train_step
        >>> from trainkit.optim import sgd
        >>> from trainkit.optim.groups import by_rank, partition
        >>> tx, labels = sgd(1.0), by_rank({2: "weights"}, default="biases")
        >>> layer = torch.nn.Linear(1, 1)
        >>> def loss(params, buffers, x):
        ...     return LossOutput((x * params["weight"] + buffers["bias"]).sum(), len(x))
        >>> state = init_state(layer, partition({"weights": tx, "biases": tx}, labels))
        >>> after, _ = train_only(make_train_step(loss, tx), "weights", labels)(state, torch.ones(2, 1))
        >>> after.params["weight"] - state.params["weight"], after.params["bias"] is state.params["bias"]
        (tensor([[-1.]]), True)
    """

    def partial(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        params, buffers = tree.named(state.params), tree.named(state.buffers)
        part = {name: p for name, p in params.items() if labels(name, p) == label}
        states = dict(state.opt_state.items())
        if not part or label not in states:
            raise ValueError(
                f"label: got {label!r}, which {len(part)} of {len(params)} parameters carry; opt_state has entries for "
                f"{sorted(states)}; expected a label of both, from init_state(module, partition(...))"
            )
        rest = {name: p for name, p in params.items() if name not in part}
        seen = _same_step(state, params=tree.frozen(part), buffers=tree.frozen(buffers | rest), opt_state=states[label])
        new, metrics = step(seen, batch)
        new_params, new_buffers = params | tree.named(new.params), tree.named(new.buffers)
        after = _same_step(
            new,
            params=tree.like(state.params, list(new_params.values())),
            buffers=tree.like(state.buffers, [new_buffers[name] for name in buffers]),
            opt_state=with_entries(state.opt_state, {**states, label: new.opt_state}),
        )
        return after, metrics

    return partial


def _same_step(state: TrainState, **changes: Any) -> TrainState:
    """The state with changed fields and what the host knows of its step."""
    new = state.replace(**changes)
    remember_step(state, new, updates=0)
    return new
