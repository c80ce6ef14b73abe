"""A GPT: the model that the language recipes train, and its loss.

Shapes: B batch, T position, V vocabulary, D width, H heads, E width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from trainkit import LossOutput
from trainkit.losses import causal_lm
from trainkit.metrics import BitsPerByte


class GPT(nn.Module):
    """Pre-norm decoder: RMSNorm, rotary positions, causal attention, no biases.

    Args:
        vocab_size: V, how many tokens there are.
        width: D, a multiple of 2 * num_heads.
        num_layers: blocks.
        num_heads: H, attention heads per block.
        tie_weights: use the token embedding as the output layer.

    Raises: ValueError if the width does not divide into heads of even width.

    Example:
        >>> GPT(256, 16, 1, 2)(torch.zeros(1, 5, dtype=torch.int64)).shape
        torch.Size([1, 5, 256])
    """

    def __init__(
        self, vocab_size: int, width: int, num_layers: int, num_heads: int, *, tie_weights: bool = False
    ) -> None:
        super().__init__()
        if width % (2 * num_heads):
            raise ValueError(f"width: got {width} for {num_heads} heads, expected a multiple of {2 * num_heads}")
        self.embedding = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(num_layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        # Small logits at the start, for a first loss of log V; a tied embedding has to be as small.
        nn.init.normal_(self.head.weight, std=0.02)
        if tie_weights:
            self.embedding.weight = self.head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, V] of the next token after each position, from tokens [B, T]."""
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


class Block(nn.Module):
    """Attention and a two-layer perceptron, each beside a residual path that starts as the identity."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.RMSNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)
        nn.init.zeros_(self.attention_out.weight)
        nn.init.zeros_(self.mlp_out.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden))
        mixed: Tensor = self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(hidden))))
        return hidden + mixed

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.query_key_value(x), "b t (three h e) -> three b h t e", three=3, h=self.num_heads)
        mixed = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        out: Tensor = self.attention_out(rearrange(mixed, "b h t e -> b t (h e)"))
        return out


def rotate(x: Tensor) -> Tensor:
    """Rotary positions: turn pair i of a head at position t by the angle t * 10000^(-2i / E).

    Args:
        x: queries or keys, [B, H, T, E]; pair i holds the elements i and i + E / 2.

    Example:
        >>> rotate(torch.ones(1, 1, 2, 2))[0, 0]
        tensor([[ 1.0000,  1.0000],
                [-0.3012,  1.3818]])

    Source: Su et al. 2021, sec. 3.2, in the halved layout of transformers' Llama.
    """
    half = x.shape[-1] // 2
    speed = 10000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.outer(torch.arange(x.shape[-2], device=x.device, dtype=torch.float32), speed)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


@torch.no_grad()
def sample(module: nn.Module, prompt: Tensor, *, context: int, temperature: float, seed: int) -> Iterator[int]:
    """Tokens after ``prompt`` without end, each drawn from softmax(logits / temperature).

    Costs a forward pass over up to ``context`` tokens for each.

    Args:
        module: gives logits [1, T, V] for tokens [1, T].
        prompt: tokens [T], at least one.
        context: how many of the last tokens the module sees.
        temperature: positive; below 1 prefers what is likely.
        seed: of the draws.
    """
    generator = torch.Generator(prompt.device).manual_seed(seed)
    tokens = prompt
    while True:
        tokens = tokens[-context:]
        logits = module(tokens.unsqueeze(0))[0, -1]
        drawn = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1, generator=generator)
        tokens = torch.cat([tokens, drawn])
        yield int(drawn)


def next_byte(logits: Tensor, targets: Tensor) -> LossOutput:
    """Cross entropy of the next byte, reported in bits as well."""
    out = causal_lm(logits, targets, shift=False)
    bits = BitsPerByte(out.loss_sum, torch.as_tensor(out.weight))
    return replace(out, metrics={**out.metrics, "bits_per_byte": bits})
