"""Small models, data and settings for tests of the Trainer, and what is compared of its runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 3,
    "learning_rate": 0.05,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 7,
}
"""Arguments of a run on the CPU that tells and keeps nothing."""


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


def without_times(log: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics without seconds, and what depends on them."""
    return {k: v for k, v in log.items() if not k.endswith(("runtime", "per_second", "preparation_time"))}


def distance(one: Mapping[str, list[float]], other: Mapping[str, list[float]]) -> float:
    """The largest difference between parameters of two models, as lists by name."""
    assert one.keys() == other.keys() and one
    return max(abs(a - b) for name in one for a, b in zip(one[name], other[name], strict=True))
