"""Small models and data for tests of the Trainer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Net(nn.Module):
    """A classifier that takes keyword inputs and returns a dictionary with its loss."""

    def __init__(self, features: int = 4, classes: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Linear(features, 8)
        self.norm = nn.LayerNorm(8)
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Linear(8, classes)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.second(self.dropout(torch.tanh(self.norm(self.first(x)))))
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def make_net(seed: int = 0, **options: Any) -> Net:
    torch.manual_seed(seed)
    return Net(**options)


def make_rows(n: int = 10, features: int = 4, classes: int = 3, seed: int = 0) -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, features, generator=g)
    y = torch.randint(classes, (n,), generator=g)
    return [{"x": x[i], "labels": int(y[i])} for i in range(n)]
