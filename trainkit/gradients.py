"""From a loss to its gradient: functions with one signature, ``(state, batch) -> Gradients``."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from trainkit import rng, tree
from trainkit.parts import part
from trainkit.state import TrainState, attached_params, seed_of
from trainkit.types import Batch, GradientFn, Gradients, LossFn, LossOutput, Params

LossScale = Callable[[TrainState], Tensor]
"""Reads the current loss scale (0-d tensor) out of the state."""


def value_and_grad(
    loss: LossFn,
    *,
    rank: int = 0,
    unused: str = "error",
    scale: LossScale | None = None,
    mean: bool = False,
    attach: Callable[[TrainState], Params] = attached_params,
) -> GradientFn:
    """The gradient of ``loss_sum`` with respect to ``state.params``, by ``torch.autograd.grad``.

    Random draws inside the loss are seeded by ``fold_in(state.key, state.step, rank)``; the global generators are
    left as they were found.

    Args:
        loss: ``(params, buffers, batch) -> LossOutput``.
        rank: this process' place among the data-parallel ones, so that each draws its own dropout.
        unused: what a parameter without gradient means: "error"; "zero" for models that use parts by turns; "omit"
            leaves it out of the result, for optimizers that then leave it as it is.
        scale: multiplies the mean loss (``loss_sum / weight``) before the backward pass, so that a scale fits batches
            of any weight; the gradients are divided by the same number afterwards.
        mean: start the backward pass from ``1 / weight``, so that the gradient is that of the mean and needs no pass
            of its own for the division. For batches that are not added to others. A loss in less than float32 is
            not divided so, since that would round the weight.
        attach: gives the leaves of the autograd graph, under the names of ``state.params``; what the loss is handed.
            By default the state's tensors; for a loss that calls a live module, the module's own parameters, by whose
            ``grad`` the gradient may come; it is put back.

    Returns: a function ``(state, batch) -> Gradients``; pure.

    Raises (when called):
        TypeError: the loss did not return a LossOutput, or not a 0-d floating sum.
        ValueError: a parameter got no gradient and ``unused`` is "error"; all of them are named.

    Example:
        >>> from trainkit import init_state
        >>> from trainkit.optim import sgd
        >>> loss = lambda params, buffers, x: LossOutput((params["weight"] * x).sum(), x.shape[0])
        >>> state = init_state(nn.Linear(2, 1, bias=False), sgd(0.1))
        >>> value_and_grad(loss)(state, torch.ones(3, 2)).grads["weight"]
        tensor([[3., 3.]])

    Source: ``jax.value_and_grad(has_aux=True)`` for the shape of the result.
    """
    check_unused(unused)
    differentiate = _derivatives if attach is attached_params else _derivatives_of_live

    def gradients(state: TrainState, batch: Batch) -> Gradients:
        attached = attach(state)
        inputs = tree.leaves(attached)
        with draws_of(state, rank), torch.enable_grad():
            out = checked(part("loss", loss)(attached, state.buffers, batch))
            _check_attached(out.loss_sum)
            weight = weight_of(out)
            upscale, factor = multipliers(state, out.loss_sum, weight, scale, mean, given=out.weight)
            top = out.loss_sum if upscale is None else out.loss_sum * upscale
            found = differentiate(top, inputs, factor)
        grads = _filled(list(tree.named(attached)), inputs, found, unused)
        if upscale is not None:
            grads = tree.map_tensors(lambda g: (g / upscale).to(g.dtype), grads)
        return finished(state, out, weight, grads, factor)

    return gradients


def live_value_and_grad(module: nn.Module, loss: LossFn, *, rank: int = 0, unused: str = "error") -> GradientFn:
    """The same gradient, obtained by ``backward()`` through the module's own parameters.

    For modules that must be called as they are: hooks on parameters, ``.grad`` accumulation by foreign autograd
    functions, wrappers that gather their own weights. The module's parameters are set to the state's tensors
    (no copy) for the call, and ``loss`` is handed the module's parameters.

    Args:
        module: the live module that ``loss`` calls.
        loss: as for :func:`value_and_grad`; it may ignore ``params`` and call ``module`` directly.
        rank: as for :func:`value_and_grad`.
        unused: as for :func:`value_and_grad`.

    Returns: a function ``(state, batch) -> Gradients``.

    Example:
        >>> from trainkit import init_state
        >>> from trainkit.optim import sgd
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> loss = lambda params, buffers, x: LossOutput(layer(x).sum(), x.shape[0])
        >>> live_value_and_grad(layer, loss)(init_state(layer, sgd(0.1)), torch.ones(3, 2)).grads["weight"]
        tensor([[3., 3.]])
    """
    check_unused(unused)
    own = {name: p for name, p in module.named_parameters() if p.requires_grad}

    def gradients(state: TrainState, batch: Batch) -> Gradients:
        names = list(tree.named(state.params))
        inputs: list[Tensor] = [own[name] for name in names]
        before = [(p.data, p.grad) for p in inputs]
        for p, t in zip(inputs, tree.leaves(state.params), strict=True):
            p.data, p.grad = t, None
        try:
            with draws_of(state, rank), torch.enable_grad():
                out = checked(loss(tree.like(state.params, inputs), state.buffers, batch))
                _check_attached(out.loss_sum)
                torch.autograd.backward(out.loss_sum)
            found = [p.grad for p in inputs]
        finally:
            for p, (data, grad) in zip(inputs, before, strict=True):
                p.data, p.grad = data, grad
        return finished(state, out, weight_of(out), _filled(names, inputs, found, unused))

    return gradients


def per_example_grads(loss: LossFn, *, rank: int = 0) -> GradientFn:
    """The gradient of each row's ``loss_sum``, stacked: every leaf of ``grads`` gains a leading axis of rows.

    g_i = d loss(params, batch[i:i+1]) / d params, by ``torch.func.vmap`` over ``torch.func.grad``.

    ``loss_sum``, ``weight`` and the metrics' tensors have the leading axis as well, so one gradient is
    ``grads[name].sum(0) / weight.sum()``.  Buffers are read, not updated: a row has no batch statistics.

    Args:
        loss: a loss over rows; each call sees one row with its batch axis (size 1). Operations without a batching
            rule (``F.scaled_dot_product_attention`` with dropout, data-dependent shapes) are refused by torch.
        rank: as for :func:`value_and_grad`.

    Example:
        >>> from trainkit import init_state
        >>> from trainkit.optim import sgd
        >>> loss = lambda params, buffers, x: LossOutput((params["weight"] * x).sum(), x.shape[0])
        >>> state = init_state(nn.Linear(2, 1, bias=False), sgd(0.1))
        >>> per_example_grads(loss)(state, torch.tensor([[1.0, 2.0], [3.0, 4.0]])).grads["weight"]
        tensor([[[1., 2.]],
        <BLANKLINE>
                [[3., 4.]]])

    Source: torch.func tutorial "Per-sample gradients"; used for differentially private training
    (Abadi et al. 2016, algorithm 1).
    """

    def one(params: dict[str, Tensor], buffers: Any, row: Batch) -> tuple[Tensor, tuple[Any, ...]]:
        batch = pytree.tree_map_only(Tensor, lambda t: t.unsqueeze(0), row)
        out = checked(loss(tree.frozen(params), buffers, batch))
        weight = torch.as_tensor(out.weight, dtype=out.loss_sum.dtype)
        return out.loss_sum, (out.loss_sum.detach(), weight.detach(), _detached(dict(out.metrics)))

    def gradients(state: TrainState, batch: Batch) -> Gradients:
        rows = torch.func.vmap(torch.func.grad(one, has_aux=True), in_dims=(None, None, 0), randomness="different")
        with draws_of(state, rank):
            grads, (loss_sum, weight, metrics) = rows(tree.named(state.params), state.buffers, batch)
        return Gradients(tree.frozen(grads), loss_sum, weight, metrics, state.buffers)

    return gradients


def draws_of(state: TrainState, rank: int) -> AbstractContextManager[None]:
    """A scope in which the global generators start from ``seed_of(state, rank)``.

    It does nothing inside a graph, which cannot set a generator, and under ``vmap``, where a key has no value: there
    whoever calls has seeded them with the same fold.
    """
    if torch.compiler.is_compiling() or tree.under_vmap():
        return nullcontext()
    return rng.seeded(seed_of(state, rank), state.step.device)


def check_unused(unused: str, known: tuple[str, ...] = ("error", "zero", "omit")) -> None:
    """Raise ValueError for a word that does not say what becomes of parameters without gradient."""
    if unused not in known:
        raise ValueError(f"unused: got {unused!r}, expected {', '.join(map(repr, known[:-1]))} or {known[-1]!r}")


def unreached(names: list[str]) -> ValueError:
    """The error of parameters that got no gradient."""
    return ValueError(
        f"params: no gradient reached {', '.join(names)}. Freeze them (requires_grad=False before init_state), "
        "use them in the loss, or pass unused='zero'"
    )


def checked(out: Any) -> LossOutput:
    """The output of a loss, if it is one.

    Raises: TypeError saying what to return instead.
    """
    if not isinstance(out, LossOutput):
        raise TypeError(
            f"loss: returned {type(out).__name__}, expected LossOutput(loss_sum, weight, metrics). "
            "Return the sum of the loss over the rows or tokens and, as weight, how many were summed; "
            "for a mean over n rows that is LossOutput(mean * n, n)."
        )
    if not isinstance(out.loss_sum, Tensor) or out.loss_sum.dim() != 0 or not out.loss_sum.is_floating_point():
        got = (
            f"{out.loss_sum.dtype} of shape {tuple(out.loss_sum.shape)}"
            if isinstance(out.loss_sum, Tensor)
            else type(out.loss_sum).__name__
        )
        raise TypeError(f"loss: loss_sum is {got}, expected a floating tensor of shape (): sum over rows and tokens")
    if isinstance(out.weight, Tensor) and out.weight.dim() != 0:
        raise TypeError(f"loss: weight has shape {tuple(out.weight.shape)}, expected (): the sum of the weights")
    return out


def finished(
    state: TrainState, out: LossOutput, weight: Tensor, grads: Params, factor: Tensor | None = None
) -> Gradients:
    """Put a loss output and its gradients together, detached; the gradients are released to whoever gets them."""
    buffers = state.buffers if out.buffers is None else out.buffers
    tree.release(grads)
    return Gradients(
        grads,
        out.loss_sum.detach(),
        weight,
        _detached(dict(out.metrics)),
        buffers,
        factor,
    )


def sums(gradients: Gradients) -> Gradients:
    """The gradients, if they are those of sums, which can be added to others.

    Raises: ValueError if they were divided already.
    """
    if gradients.factor is not None:
        raise ValueError(
            "gradient: it gives gradients of the mean (mean=True), which cannot be added up; expected those of the sum"
        )
    return gradients


def weight_of(out: LossOutput) -> Tensor:
    """The weight of a loss output as a detached 0-d tensor beside the loss, in its own dtype and at least float32."""
    if isinstance(out.weight, Tensor):
        dtype = torch.promote_types(out.weight.dtype, torch.float32)
        return out.weight.detach().to(out.loss_sum.device, dtype)
    return torch.full((), float(out.weight), device=out.loss_sum.device)


def inverse(weight: Tensor) -> Tensor:
    """1 / weight, and 0 for a weight of zero, where nothing was summed. A weight that is NaN stays one.

    Example:
        >>> inverse(torch.tensor([4.0, 0.0, float("nan")]))
        tensor([0.2500, 0.0000,    nan])
    """
    return weight.reciprocal().nan_to_num(nan=math.nan, posinf=0.0, neginf=0.0)


def multipliers(
    state: TrainState,
    loss_sum: Tensor,
    weight: Tensor,
    scale: LossScale | None,
    mean: bool,
    *,
    given: Tensor | float | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """What the backward pass starts from in the place of 1, as ``value_and_grad`` says for ``scale`` and ``mean``.

    ``given`` is the weight as the loss gave it: a small whole number has the same inverse on the host, three
    kernels less.

    Returns: (what the gradients are divided by afterwards, what they stay multiplied with); at most one is not None.
    """
    if scale is not None:
        return mean_scale(scale(state), weight), None
    if not mean or loss_sum.dtype not in (torch.float32, torch.float64):
        return None, None
    if isinstance(given, (int, float)) and 0 < given < 2**24 and given == int(given):
        return None, torch.full_like(loss_sum, 1 / given)
    return None, inverse(weight.to(loss_sum.dtype))


def mean_scale(scale: Tensor, weight: Tensor) -> Tensor:
    """What ``loss_sum`` is multiplied with so that the mean loss is multiplied with ``scale``."""
    return scale / torch.where(weight > 0, weight, 1.0)


def _detached(metrics: Any) -> Any:
    return pytree.tree_map_only(Tensor, Tensor.detach, metrics) if metrics else metrics


def _check_attached(loss_sum: Tensor) -> None:
    if not loss_sum.requires_grad:
        raise ValueError(
            "loss: loss_sum does not depend on the parameters. Use the params that the loss is given "
            "(functional(module)(params, buffers, ...)), and no .detach(), .item() or no_grad on the way"
        )


def _derivatives(top: Tensor, inputs: list[Tensor], factor: Tensor | None) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(top, inputs, factor, allow_unused=True)


def _derivatives_of_live(top: Tensor, inputs: list[Tensor], factor: Tensor | None) -> list[Tensor | None]:
    """The same for parameters of a module, some of which may be frozen.

    By way of their ``grad``, which is as it was afterwards: the engine then need not look for what leads to them. A
    gradient that is divided later is not, since what else leads to ``top`` gets its own at its true size or not at all.
    """
    if factor is None:
        wanted = [p for p in inputs if p.requires_grad]
        found = iter(_derivatives(top, wanted, None))
        return [next(found) if p.requires_grad else None for p in inputs]
    before = [p.grad for p in inputs]
    if any(grad is not None for grad in before):
        _write_grads(inputs, [None] * len(inputs))
    try:
        torch.autograd.backward(top, factor)
        return [p.grad for p in inputs]
    finally:
        _write_grads(inputs, before)


def _write_grads(parameters: list[Tensor], grads: list[Tensor | None]) -> None:
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad


def _filled(names: list[str], inputs: list[Tensor], found: Any, unused: str) -> Params:
    """The tree of what autograd found for some inputs, under their names."""
    if (
        not torch.compiler.is_compiling()
        and set(map(type, found)) == {Tensor}
        and all(map(Tensor.is_contiguous, found))
    ):
        # Autograd gives every tensor a gradient in its own dtype, on its own device.
        kinds = {(Tensor, dtype, device) for _, dtype, device in tree.kinds(inputs)}
        return tree.noted(dict(zip(names, found, strict=True)), kinds)
    missing = [name for name, g in zip(names, found, strict=True) if g is None]
    if missing and unused == "error":
        raise unreached(missing)
    rows = zip(names, inputs, found, strict=True)
    if unused == "omit":
        return tree.frozen({name: _dense(g) for name, _, g in rows if g is not None})
    return tree.frozen({name: torch.zeros_like(p) if g is None else _dense(g) for name, p, g in rows})


def _dense(grad: Tensor) -> Tensor:
    """The gradient of a sum is one number with strides of zero, which nobody could scale in place."""
    if grad.is_contiguous() or 0 not in grad.stride():
        return grad
    return grad.clone(memory_format=torch.contiguous_format)
