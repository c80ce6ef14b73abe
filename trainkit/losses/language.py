"""Losses over tokens, and a language-model head that never holds all its logits.

Shapes: B batch, T position, N = B T rows, D width, V vocabulary, R rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainkit.losses.checks import (
    at_least_float32,
    check_floating,
    check_labels,
    check_not_negative,
    check_share,
    extra_metrics,
)
from trainkit.metrics import Mean, Metric, MetricFn, Sum
from trainkit.types import LossOutput


def causal_lm(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    shift: bool = True,
    metrics: Mapping[str, MetricFn] | None = None,
) -> LossOutput:
    """Cross entropy of the next token.

    sum over predicted tokens of -(1 - s) log p[y] - s/V sum_v log p[v] + z (log sum_v exp x[v])^2, p = softmax(x).
    The weight is the number of predicted tokens: those whose label is not ``ignore_index``.

    Reports ``tokens`` (a sum) and, where it is used, ``z_loss`` (its part of the mean loss).

    Args:
        logits: x, [B, T, V], floating. Narrow dtypes are taken to float32, which needs the memory of a copy in eager
            mode; :func:`causal_lm_head` needs none of it.
        labels: [B, T], integers. With ``shift``, the input tokens themselves: position t predicts label t + 1.
        ignore_index: tokens with this label count for nothing.
        label_smoothing: s, in [0, 1).
        z_loss: z, >= 0; keeps the normaliser near one (PaLM used 1e-4).
        shift: False if label t belongs to position t already.
        metrics: more to report by name, functions of (logits, labels) such as ``trainkit.metrics.accuracy``.

    Raises: TypeError for labels that are no integers; ValueError for shapes that disagree, an empty batch, labels
        that are no token (looked at eagerly on the CPU only), or arguments out of range.

    Example:
        >>> out = causal_lm(torch.zeros(1, 4, 7), torch.tensor([[1, 2, 3, -100]]))
        >>> out.loss_sum / out.weight, out.metrics["tokens"].compute()
        (tensor(1.9459), tensor(2))

    Source: torch.nn.functional.cross_entropy (torch 2.13) for the first terms; Chowdhery et al. 2022 (PaLM), sec. 5,
    for the last. Shifts as transformers' ``ForCausalLMLoss``.
    """
    labels = check_labels(labels, logits, ignore_index=ignore_index)
    if shift:
        labels = next_tokens(labels, ignore_index)
    return _token_loss(logits, labels, ignore_index, label_smoothing, z_loss, metrics)


def masked_lm(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    metrics: Mapping[str, MetricFn] | None = None,
) -> LossOutput:
    """Cross entropy of tokens at their own position: masked language models, sequence to sequence, tagging.

    The formula, the weight and the metrics of :func:`causal_lm`, without its shift.

    Args:
        logits: [B, T, V], floating.
        labels: [B, T], integers; label t belongs to position t.
        ignore_index: tokens with this label (those that were not masked) count for nothing.
        label_smoothing: in [0, 1).
        z_loss: >= 0.
        metrics: more to report by name, functions of (logits, labels).

    Raises: as :func:`causal_lm`.

    Example:
        >>> masked_lm(torch.zeros(1, 3, 7), torch.tensor([[-100, 2, -100]])).weight
        tensor(1)

    Source: Devlin et al. 2019 (BERT), sec. 3.1; torch.nn.functional.cross_entropy (torch 2.13).
    """
    labels = check_labels(labels, logits, ignore_index=ignore_index)
    return _token_loss(logits, labels, ignore_index, label_smoothing, z_loss, metrics)


def next_tokens(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """The label of each position for a model that predicts the next one; the last has none.

    Labels move and logits stay, because logits without their last position would be a copy of almost all of them.

    Example:
        >>> next_tokens(torch.tensor([[1, 2, 3]]))
        tensor([[   2,    3, -100]])
    """
    return F.pad(labels[..., 1:], (0, 1), value=ignore_index)


def _token_loss(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    metrics: Mapping[str, MetricFn] | None,
) -> LossOutput:
    check_share("label_smoothing", label_smoothing)
    check_not_negative("z_loss", z_loss)
    scores, flat = at_least_float32(logits).reshape(-1, logits.shape[-1]), labels.flatten()
    loss_sum = F.cross_entropy(
        scores, flat, reduction="sum", ignore_index=ignore_index, label_smoothing=label_smoothing
    )
    kept = flat != ignore_index
    tokens = kept.sum()
    reported: dict[str, Metric] = {"tokens": Sum(tokens)}
    if z_loss:
        penalty = z_loss * torch.where(kept, scores.logsumexp(-1).square(), 0).sum()
        loss_sum = loss_sum + penalty
        reported["z_loss"] = Mean(penalty.detach(), tokens)
    reported.update(extra_metrics(metrics, logits, labels, ignore_index))
    return LossOutput(loss_sum, tokens, reported)


def sequence_log_probs(logits: Tensor, labels: Tensor, *, ignore_index: int = -100, shift: bool = True) -> Tensor:
    """The log-probability of each sequence: sum over its predicted tokens of log p[y].

    Args:
        logits: [B, T, V], floating.
        labels: [B, T], integers; ``ignore_index`` on the prompt and the padding.
        ignore_index: tokens with this label count for nothing.
        shift: as for :func:`causal_lm`.

    Returns: [B], float32 or wider.

    Raises: as :func:`causal_lm`.

    Example:
        >>> sequence_log_probs(torch.zeros(2, 3, 4), torch.tensor([[0, 1, 2], [0, 1, -100]]))
        tensor([-2.7726, -1.3863])
    """
    labels = check_labels(labels, logits, ignore_index=ignore_index)
    if shift:
        labels = next_tokens(labels, ignore_index)
    scores = at_least_float32(logits).flatten(0, -2)
    losses = F.cross_entropy(scores, labels.flatten(), reduction="none", ignore_index=ignore_index)
    return -losses.reshape(labels.shape).sum(-1)


def causal_lm_head(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk_size: int | None = None,
    shift: bool = True,
) -> LossOutput:
    """:func:`causal_lm` for a model that returns its last hidden states, without ever holding all logits.

    causal_lm(hidden @ head_weight.T + bias, labels), computed by :func:`linear_cross_entropy`.

    Args:
        hidden: [B, T, D], floating.
        head_weight: [V, D]; with tied embeddings, the embedding.
        labels: [B, T], integers.
        bias: [V].
        ignore_index: as for :func:`causal_lm`, as are ``label_smoothing``, ``z_loss`` and ``shift``.
        label_smoothing: in [0, 1).
        z_loss: >= 0.
        chunk_size: rows whose logits exist at a time; None chooses.
        shift: False if label t belongs to position t already.

    Raises: as :func:`linear_cross_entropy`.

    Example:
        >>> hidden, head = torch.zeros(1, 3, 2), torch.ones(5, 2)
        >>> causal_lm_head(hidden, head, torch.tensor([[0, 1, 2]])).loss_sum
        tensor(3.2189)
    """
    check_labels(labels, hidden, ignore_index=ignore_index, classes=head_weight.shape[0])
    return linear_cross_entropy(
        hidden,
        head_weight,
        next_tokens(labels, ignore_index) if shift else labels,
        bias=bias,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        chunk_size=chunk_size,
    )


def linear_cross_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk_size: int | None = None,
) -> LossOutput:
    """Cross entropy of a linear layer's outputs, holding the logits of a few rows at a time.

    masked_lm(hidden @ head_weight.T + bias, labels): its formula, weight and metrics.

    Torch's own function of this name does the work where it has one (torch 2.13), for inputs of float32 or wider and
    neither smoothing nor z-loss; else the chunked form here. Each chunk's logits are made once, in the forward pass,
    which leaves the gradients of ``hidden`` and ``head_weight``; the backward pass only scales them. Memory beyond the
    gradients is a few times ``chunk_size`` V numbers. Sums over chunks are kept in float32 or wider. It can be
    differentiated once.

    Under ``torch.func`` (per-example gradients) it is the plain formula: each row has a gradient of the head of its own
    there, which is larger than the row's logits.

    Args:
        hidden: [..., D], floating. Under autocast it is taken to autocast's dtype, as a linear layer would.
        head_weight: [V, D].
        labels: [...], integers; label i belongs to row i.
        bias: [V].
        ignore_index: rows with this label count for nothing.
        label_smoothing: in [0, 1).
        z_loss: >= 0.
        chunk_size: R, rows whose logits exist at a time. None takes max(D, 1024): then the logits of a
            chunk are about as large as the gradient of the head.

    Raises: TypeError for labels that are no integers; ValueError for shapes that disagree, an empty batch, labels that
        are no class (looked at eagerly on the CPU only), or arguments out of range.

    Example:
        >>> linear_cross_entropy(torch.zeros(3, 2), torch.ones(5, 2), torch.tensor([0, 4, -100]), chunk_size=2).loss_sum
        tensor(3.2189)

    Source: torch.nn.functional.linear_cross_entropy (torch 2.13); gradients in the forward pass as in Hsu et al. 2024
    (Liger Kernel), sec. 3.2. Torch's sums the losses of bfloat16 inputs in bfloat16, which is percents off over a few
    hundred rows, and has no z-loss.
    """
    _check_head(hidden, head_weight, bias)
    labels = check_labels(labels, hidden, ignore_index=ignore_index, classes=head_weight.shape[0])
    check_share("label_smoothing", label_smoothing)
    check_not_negative("z_loss", z_loss)
    rows = max(hidden.shape[-1], 1024) if chunk_size is None else chunk_size
    if rows < 1:
        raise ValueError(f"chunk_size: got {chunk_size}, expected at least 1 row")
    x, weight, bias = _autocast(hidden.reshape(-1, hidden.shape[-1]), head_weight, bias)
    flat = labels.flatten()
    tokens = (flat != ignore_index).sum()
    reported: dict[str, Metric] = {"tokens": Sum(tokens)}
    if _inside_functorch(x, weight):
        return _token_loss(F.linear(x, weight, bias), flat, ignore_index, label_smoothing, z_loss, None)
    if _suits_torch(x, label_smoothing, z_loss):
        # The buffers of the backward pass are kept, since torch warns where a compiled graph asks for less.
        options = torch.nn.LinearCrossEntropyOptions(
            batch_chunk_size=rows, chunking_method=None, allow_retain_graph=True
        )
        loss_sum = F.linear_cross_entropy(
            x, weight, flat, linear_bias=bias, reduction="sum", ignore_index=ignore_index, options=options
        )
        return LossOutput(loss_sum, tokens, reported)
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x, weight, bias)]
    loss_sum, penalty, *_ = _chunked_cross_entropy(
        x, weight, bias, flat, ignore_index, label_smoothing, z_loss, rows, wanted
    )
    if z_loss:
        reported["z_loss"] = Mean(penalty.detach(), tokens)
    return LossOutput(loss_sum, tokens, reported)


# One node in a compiled graph: an unrolled loop would cost compile time for each chunk, and leave it to the compiler
# whether one chunk's logits are gone before the next are made.
@torch.library.custom_op("trainkit::chunked_cross_entropy", mutates_args=())
def _chunked_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    rows: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss sum, its z-loss part, and the gradients of x, weight and bias, each empty where it is not wanted."""
    wide = torch.promote_types(x.dtype, torch.float32)
    loss_sum, penalty = x.new_zeros((), dtype=wide), x.new_zeros((), dtype=wide)
    grad_x = torch.empty_like(x) if wanted[0] else x.new_empty(0)
    grad_weight = torch.zeros_like(weight, dtype=wide) if wanted[1] else weight.new_empty(0)
    grad_bias = weight.new_zeros(weight.shape[0] if wanted[2] else 0, dtype=wide)
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        kept = labels[part] != ignore_index
        target = torch.where(kept, labels[part], 0)
        logits = F.linear(x[part], weight, bias).to(wide)
        losses, exponentials, total, normaliser = _chunk_losses(logits, target, label_smoothing)
        penalty_part = z_loss * torch.where(kept, normaliser.square(), 0).sum()
        penalty += penalty_part
        loss_sum += torch.where(kept, losses, 0).sum() + penalty_part
        if not any(wanted):
            continue
        scale = torch.where(kept, 1 + 2 * z_loss * normaliser, 0) / total
        grad = _chunk_grad(exponentials, scale, target, kept, label_smoothing)
        if wanted[2]:
            grad_bias += grad.sum(0)
        grad = grad.to(x.dtype)
        if wanted[0]:
            torch.mm(grad, weight, out=grad_x[part])
        if wanted[1]:
            _add_product(grad_weight, grad.t(), x[part])
    return loss_sum, penalty, grad_x, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _suits_torch(x: Tensor, label_smoothing: float, z_loss: float) -> bool:
    has_one = hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions")
    return has_one and not label_smoothing and not z_loss and x.dtype in (torch.float32, torch.float64)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total <- total + a b, in the dtype of ``total``, which may be wider."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


@_chunked_cross_entropy.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    rows: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty((), dtype=wide),
        x.new_empty((), dtype=wide),
        torch.empty_like(x) if wanted[0] else x.new_empty(0),
        torch.empty_like(weight) if wanted[1] else weight.new_empty(0),
        weight.new_empty(weight.shape[0] if wanted[2] else 0),
    )


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.wanted = inputs[-1]
    ctx.save_for_backward(*output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _scale_gradients(ctx: Any, grad_loss: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_cross_entropy: asked for a graph of its gradient (create_graph=True), which would lack the second "
            "derivative. Use masked_lm or causal_lm on full logits for derivatives of derivatives"
        )
    kept = zip(ctx.saved_tensors, ctx.wanted, strict=True)
    grads = [(grad * grad_loss).to(grad.dtype) if wanted and grad_loss is not None else None for grad, wanted in kept]
    return *grads, *[None] * 6


_chunked_cross_entropy.register_autograd(_scale_gradients, setup_context=_keep_gradients)


def _chunk_losses(logits: Tensor, target: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The cross entropy of each row; exp(x - max x), written over the logits; its sum over each row; log sum exp x."""
    right = logits.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    smooth = label_smoothing * logits.mean(-1) if label_smoothing else 0.0
    largest = logits.amax(-1)
    exponentials = logits.sub_(largest.unsqueeze(-1)).exp_()
    total = exponentials.sum(-1)
    normaliser = largest + total.log()
    return normaliser - (1 - label_smoothing) * right - smooth, exponentials, total, normaliser


def _chunk_grad(exponentials: Tensor, scale: Tensor, target: Tensor, kept: Tensor, label_smoothing: float) -> Tensor:
    """d loss / d logits, written over the exponentials.

    p (1 + 2 z log sum exp) - (1 - s) [v = y] - s / V in the kept rows, with p = softmax; ``scale`` turns the
    exponentials into the first term.
    """
    grad = exponentials.mul_(scale.unsqueeze(-1))
    if label_smoothing:
        grad.sub_(kept.unsqueeze(-1) * (label_smoothing / grad.shape[-1]))
    share = torch.where(kept, label_smoothing - 1, 0).to(grad.dtype)
    return grad.scatter_add_(-1, target.unsqueeze(-1), share.unsqueeze(-1))


def _check_head(hidden: Tensor, head_weight: Tensor, bias: Tensor | None) -> None:
    check_floating("hidden", hidden)
    check_floating("head_weight", head_weight)
    if head_weight.dim() != 2 or head_weight.shape[-1] != hidden.shape[-1]:
        raise ValueError(
            f"head_weight: shape {tuple(head_weight.shape)} for hidden states of shape {tuple(hidden.shape)}; expected "
            f"[classes, {hidden.shape[-1]}], as torch.nn.Linear keeps it"
        )
    if bias is not None and bias.shape != head_weight.shape[:1]:
        raise ValueError(f"bias: shape {tuple(bias.shape)}, expected {tuple(head_weight.shape[:1])}")


def _autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What autocast would do to the arguments of a linear layer: custom functions are not on its list."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _inside_functorch(*tensors: Tensor) -> bool:
    # A graph being compiled has no such tensors.
    if torch.compiler.is_compiling():
        return False
    return any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors)
