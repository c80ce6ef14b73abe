"""Lion beside the algorithm of its paper, since torch has none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.optim.table import Options, assert_close, grads_of, random_tree, row_of, run, schedule
from trainkit import optim, tree


@pytest.mark.parametrize("options", row_of("lion").grid)
def test_lion_follows_the_paper(options: Options) -> None:
    row = row_of("lion")
    params = random_tree(row, 0)
    found, _ = run(optim.lion(schedule, **options), row, params, 20)
    beta1, beta2 = options.get("betas", (0.9, 0.99))
    decay, sign = options.get("weight_decay", 0.0), -1.0 if options.get("maximize") else 1.0
    theta = {name: p.numpy().copy() for name, p in params.items()}
    m = {name: np.zeros_like(p) for name, p in theta.items()}
    for step in range(20):
        lr = 0.1 / (1 + 0.5 * step)
        grads = grads_of(row, tree.frozen({name: torch.as_tensor(p) for name, p in theta.items()}), step)
        for name, g in ((name, sign * g.numpy()) for name, g in grads.items()):
            update = np.sign(beta1 * m[name] + (1 - beta1) * g)
            theta[name] = theta[name] - lr * (update + decay * theta[name])
            m[name] = beta2 * m[name] + (1 - beta2) * g
    assert_close(found, tree.frozen({name: torch.as_tensor(p) for name, p in theta.items()}))
