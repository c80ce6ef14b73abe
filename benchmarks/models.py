"""The models that the benchmarks train, and their batches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    """Launch-bound: 16 hidden layers of 32, so that a step is many small kernels."""

    def __init__(self) -> None:
        super().__init__()
        hidden = [layer for _ in range(16) for layer in (nn.Linear(32, 32), nn.ReLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """The architecture of GPT-2 as nanoGPT writes it: learned positions, LayerNorm, GELU, tied head, no biases."""

    def __init__(self, *, vocabulary: int, context: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width, bias=False), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


ROWS, CONTEXT, VOCABULARY = 12, 64, 256
"""The batch that nanoGPT's README gives for a CPU (12 rows of 64 tokens), over bytes."""
WIDTHS = {"gpt-1m": {"width": 128, "depth": 4, "heads": 4}, "gpt-10m": {"width": 320, "depth": 8, "heads": 5}}
SIZES = ("mlp", *WIDTHS)


def make_model(size: str, depth: int | None = None) -> nn.Module:
    """The model of a size with weights that depend on nothing else."""
    torch.manual_seed(0)
    if size == "mlp":
        return MLP()
    shape = WIDTHS[size] | ({} if depth is None else {"depth": depth})
    return GPT(vocabulary=VOCABULARY, context=CONTEXT, **shape)


def make_batch(size: str) -> tuple[Tensor, Tensor]:
    """Inputs and labels."""
    generator = torch.Generator().manual_seed(1)
    if size == "mlp":
        return torch.randn(32, 32, generator=generator), torch.randint(0, 10, (32,), generator=generator)
    rows = torch.randint(0, VOCABULARY, (ROWS, CONTEXT + 1), generator=generator)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
