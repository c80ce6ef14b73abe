"""Losses out of losses: one more term, smoothed labels, noise on the embeddings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from trainkit import tree
from trainkit.losses.checks import check_not_negative, check_share
from trainkit.metrics import Mean, Metric
from trainkit.types import Batch, Buffers, LossFn, LossOutput, Params


def add_loss(loss: LossFn, auxiliary: LossFn, weight: float | Tensor, name: str) -> LossFn:
    """A second loss beside the first, on the same batch.

    The mean adds up: mean = mean_loss + weight * mean_auxiliary. As a sum over W = the first loss' weight,

        loss_sum = loss_sum + weight * W * auxiliary_sum / auxiliary_weight   (the last term 0 for auxiliary weight 0).

    Over a batch split into microbatches, each auxiliary mean counts by its microbatch's W. That is the whole batch's
    mean exactly where both losses weigh alike (both by rows, both by tokens); where they do not, the auxiliary mean is
    one weighted by W.

    Reports the auxiliary mean under ``name`` (before ``weight``), merged by its own weight, and the auxiliary metrics
    under ``name/...``. Buffers pass through the first loss, then the second.

    Args:
        loss: the main loss; its weight is the result's.
        auxiliary: ``(params, buffers, batch) -> LossOutput``.
        weight: number or 0-d tensor.
        name: under which it is reported; must be none of the main loss' metrics.

    Raises: ValueError (when called) for a name that is taken.

    Example:
        >>> main = lambda params, buffers, x: LossOutput(params["w"].sum() * 4, 4)
        >>> auxiliary = lambda params, buffers, x: LossOutput(params["w"].sum() * 2, 2)
        >>> out = add_loss(main, auxiliary, 0.5, "extra")({"w": torch.ones(1)}, {}, None)
        >>> out.loss_sum / out.weight, out.metrics["extra"].compute()
        (tensor(1.5000), tensor(1.))
    """

    def total(params: Params, buffers: Buffers, batch: Batch) -> LossOutput:
        first = loss(params, buffers, batch)
        second = auxiliary(params, buffers if first.buffers is None else first.buffers, batch)
        items = torch.as_tensor(second.weight, dtype=second.loss_sum.dtype, device=second.loss_sum.device).detach()
        mean = second.loss_sum / torch.where(items > 0, items, 1)
        inner = {f"{name}/{key}": metric for key, metric in second.metrics.items()}
        reported = _joined(first.metrics, {name: Mean(second.loss_sum.detach(), items), **inner})
        new_buffers = first.buffers if second.buffers is None else second.buffers
        return dataclasses.replace(_plus(first, weight * mean), metrics=reported, buffers=new_buffers)

    return total


def add_penalty(loss: LossFn, penalty: Callable[[Params], Tensor], weight: float | Tensor, name: str) -> LossFn:
    """A penalty on the parameters beside a loss.

    mean = mean_loss + weight * penalty(params); as a sum, loss_sum + weight * W * penalty with W the weight of the
    loss. Exact for any split into microbatches.

    Reports the penalty under ``name`` (before ``weight``).

    Args:
        loss: the main loss.
        penalty: gives a 0-d tensor from the parameters, such as :func:`l2_penalty`.
        weight: number or 0-d tensor.
        name: under which it is reported; must be none of the main loss' metrics.

    Raises: ValueError (when called) for a name that is taken; TypeError for a penalty that is no 0-d tensor.

    Example:
        >>> main = lambda params, buffers, x: LossOutput(params["w"].sum() * 4, 4)
        >>> out = add_penalty(main, l2_penalty, 0.1, "l2")({"w": torch.tensor([2.0])}, {}, None)
        >>> out.loss_sum / out.weight
        tensor(2.2000)
    """

    def total(params: Params, buffers: Buffers, batch: Batch) -> LossOutput:
        first = loss(params, buffers, batch)
        value = penalty(params)
        if not isinstance(value, Tensor) or value.dim():
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"penalty: returned {got}, expected a tensor of shape ()")
        items = torch.as_tensor(first.weight, dtype=value.dtype, device=value.device).detach()
        reported = _joined(first.metrics, {name: Mean(value.detach() * items, items)})
        return dataclasses.replace(_plus(first, weight * value), metrics=reported)

    return total


def l2_penalty(params: Params) -> Tensor:
    """Half the squared norm of all parameters: 1/2 sum ||p||^2, whose gradient is p.

    Unlike decoupled weight decay it passes through the optimizer's preconditioner.

    Example:
        >>> l2_penalty({"w": torch.tensor([3.0, 4.0])})
        tensor(12.5000)
    """
    return torch.stack([p.square().sum() for p in tree.leaves(params)]).sum() / 2


def label_smoothing(loss: LossFn, smoothing: float) -> LossFn:
    """Smooth the labels of every ``torch.nn.functional.cross_entropy`` that a loss calls.

    For losses that have no such argument, those of transformers' models above all. Criteria of this package have
    one. Evaluation wants the plain loss, so wrap the training loss only. Costs about a microsecond per torch call in
    eager mode, where each passes through Python, and nothing in a compiled graph.

    Args:
        loss: calls cross_entropy (or ``nn.CrossEntropyLoss``) inside.
        smoothing: the share of the target spread over all classes, in [0, 1).

    Raises: ValueError for a share out of range; when called: a loss that never calls cross_entropy, or smooths already.

    Example:
        >>> plain = lambda params, buffers, x: LossOutput(F.cross_entropy(x, torch.tensor([0])), 1)
        >>> label_smoothing(plain, 0.1)({}, {}, torch.tensor([[2.0, 0.0]])).loss_sum
        tensor(0.2269)

    Source: Szegedy et al. 2016, sec. 7; the meaning of torch.nn.functional.cross_entropy (torch 2.13), which that of
    ``label_smoothing_factor`` in transformers 4.57 equals.
    """
    check_share("label_smoothing", smoothing)

    def smoothed(params: Params, buffers: Buffers, batch: Batch) -> LossOutput:
        mode = _Smoothing(smoothing)
        with mode:
            out = loss(params, buffers, batch)
        if not mode.calls:
            raise ValueError(
                "loss: it never called torch.nn.functional.cross_entropy, so no label was smoothed. Use the "
                "label_smoothing argument of the criterion"
            )
        return out

    return smoothed


class _Smoothing(TorchFunctionMode):
    def __init__(self, smoothing: float) -> None:
        super().__init__()
        self.smoothing = smoothing
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.cross_entropy:
            return func(*args, **kwargs)
        if kwargs.get("label_smoothing"):
            raise ValueError(f"loss: it smooths by {kwargs['label_smoothing']} already; expected a plain cross entropy")
        self.calls += 1
        return func(*args, **{**kwargs, "label_smoothing": self.smoothing})


def neftune(loss: LossFn, embedding: nn.Embedding, alpha: float) -> LossFn:
    """Uniform noise on the embedded tokens while training.

    e <- e + alpha / sqrt(T D) * u, u uniform in [-1, 1], for embeddings e of shape [B, T, D]: the lookups of
    ``embedding`` that ``loss`` makes while it is in training mode. The draws come from torch's generator, which a
    GradientFn seeds. Costs in eager mode what :func:`label_smoothing` costs.

    Args:
        loss: runs a module that holds ``embedding``.
        embedding: the module of the input tokens (``model.get_input_embeddings()``).
        alpha: >= 0; the paper used 5 to 15.

    Raises: ValueError for ``alpha`` out of range; TypeError if ``embedding`` is no ``nn.Embedding``.

    Example:
        >>> embedding = nn.Embedding(5, 4)
        >>> embedded = lambda params, buffers, ids: LossOutput(embedding(ids).square().sum(), ids.numel())
        >>> ids = torch.tensor([[0, 1]])
        >>> bool(neftune(embedded, embedding, 5.0)({}, {}, ids).loss_sum == embedded({}, {}, ids).loss_sum)
        False

    Source: Jain et al. 2023, algorithm 1; ``neftune_noise_alpha`` of transformers 4.57.
    """
    check_not_negative("alpha", alpha)
    if not isinstance(embedding, nn.Embedding):
        raise TypeError(f"embedding: got {type(embedding).__name__}, expected the model's nn.Embedding of tokens")

    def noisy(params: Params, buffers: Buffers, batch: Batch) -> LossOutput:
        with _EmbeddingNoise(embedding, alpha):
            return loss(params, buffers, batch)

    return noisy


class _EmbeddingNoise(TorchFunctionMode):
    def __init__(self, embedding: nn.Embedding, alpha: float) -> None:
        super().__init__()
        self.embedding = embedding
        self.alpha = alpha

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not F.embedding or not self.embedding.training or args[1] is not self.embedding.weight:
            return out
        size = self.alpha / math.sqrt(out.shape[-2] * out.shape[-1])
        return out + torch.empty_like(out).uniform_(-size, size)


def _plus(out: LossOutput, mean: Tensor) -> LossOutput:
    """The output with ``mean`` added to its mean."""
    return dataclasses.replace(out, loss_sum=out.loss_sum + mean * out.weight)


def _joined(metrics: Mapping[str, Metric], more: Mapping[str, Metric]) -> dict[str, Metric]:
    taken = [name for name in more if name in metrics]
    if taken:
        raise ValueError(f"name: the loss reports {taken[0]!r} already; expected another name")
    return {**metrics, **more}
