"""NEFTune: noise on the embedded tokens of a live model while it trains."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trainkit.trainer.foreign import base_of

_ALPHA = "neftune_noise_alpha"


def activate_neftune(model: nn.Module, alpha: float) -> RemovableHandle:
    """Put noise on the output of the model's input embeddings, in training mode.

    e <- e + u, u uniform in [-a, a], a = alpha / sqrt(T D), for embeddings e of shape [B, T, D], padding included. The
    draws come from torch's generator. The embedding module carries ``neftune_noise_alpha`` meanwhile.

    Args:
        model: with ``get_input_embeddings``; wrappers and PEFT are looked through.
        alpha: >= 0; the paper used 5 to 15.

    Returns: the handle for :func:`deactivate_neftune`.

    Raises: ValueError for ``alpha`` out of range, a model without ``get_input_embeddings``, or one that has noise.

    Example:
        >>> class Model(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.tokens = nn.Embedding(5, 4)
        ...     def get_input_embeddings(self):
        ...         return self.tokens
        >>> model, ids = Model(), torch.tensor([[0, 1]])
        >>> plain = model.tokens(ids)
        >>> handle = activate_neftune(model, 5.0)
        >>> noise = (model.tokens(ids) - plain).detach()
        >>> deactivate_neftune(model, handle)
        >>> 0 < float(noise.abs().max()) <= 5.0 / 8**0.5 + 1e-6, torch.equal(model.tokens(ids), plain)
        (True, True)

    Source: Trainer 4.57: ``_activate_neftune``; Jain et al. 2023, algorithm 1.
    """
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha < math.inf:
        raise ValueError(f"neftune_noise_alpha: got {alpha!r}, expected a finite number >= 0")
    embeddings = _input_embeddings(model)
    if hasattr(embeddings, _ALPHA):
        raise ValueError(
            f"model: its embeddings have noise already (alpha {getattr(embeddings, _ALPHA)}); deactivate it first"
        )
    setattr(embeddings, _ALPHA, alpha)
    return embeddings.register_forward_hook(_add_noise)


def deactivate_neftune(model: nn.Module, handle: RemovableHandle | None) -> None:
    """Take the noise away.

    Args:
        model: the model; another one than was activated is left as it is.
        handle: of :func:`activate_neftune`.

    Raises: ValueError without a handle.

    Source: Trainer 4.57: ``_deactivate_neftune``.
    """
    if handle is None:
        raise ValueError("handle: got None; NEFTune was not activated")
    handle.remove()
    embeddings = _input_embeddings(model)
    if hasattr(embeddings, _ALPHA):
        delattr(embeddings, _ALPHA)


def _add_noise(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    if not module.training:
        return output
    size = getattr(module, _ALPHA) / math.sqrt(output.shape[-2] * output.shape[-1])
    return output + torch.empty_like(output).uniform_(-size, size)


def _input_embeddings(model: nn.Module) -> nn.Module:
    base = base_of(model)
    get = getattr(base, "get_input_embeddings", None)
    if get is None:
        raise ValueError(
            f"model: {type(base).__name__} has no get_input_embeddings, which NEFTune needs; define it to return the "
            "nn.Embedding of the tokens, or set neftune_noise_alpha to None"
        )
    found: nn.Module = get()
    return found
