"""Schedule-free AdamW beside the algorithm of its paper, since torch has none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.optim.table import Options, assert_close, assert_same_bits, grads_of, random_tree, row_of, run
from trainkit import optim, tree
from trainkit.optim.transform import chain


@pytest.mark.parametrize("options", row_of("schedule_free_adamw").grid)
@pytest.mark.parametrize("warmup", [False, True])
def test_schedule_free_follows_the_paper(options: Options, warmup: bool) -> None:
    row = row_of("schedule_free_adamw")
    params = random_tree(row, 0)

    def rate(step: int) -> float:
        return 0.1 * min(1.0, step / 5) if warmup else 0.1

    tx = optim.schedule_free_adamw(lambda count: torch.tensor(rate(int(count)), dtype=torch.float64), **options)
    beta1, beta2 = options.get("betas", (0.9, 0.999))
    eps, decay = options.get("eps", 1e-8), options.get("weight_decay", 0.0)
    r, power = options.get("r", 0.0), options.get("weight_lr_power", 2.0)
    # The paper keeps x and z; y, where the gradient is taken, is made from them.
    x = {name: p.numpy().copy() for name, p in params.items()}
    z = {name: p.copy() for name, p in x.items()}
    v = {name: np.zeros_like(p) for name, p in x.items()}
    y, opt_state, total = params, tx.init(params), 0.0
    for step in range(20):
        lr, t = rate(step), step + 1
        expected_y = {name: (1 - beta1) * z[name] + beta1 * x[name] for name in x}
        assert_close(y, tree.frozen({name: torch.as_tensor(p) for name, p in expected_y.items()}), 1e-11, 1e-12)
        grads = grads_of(row, tree.frozen({name: torch.as_tensor(p) for name, p in expected_y.items()}), step)
        weight = t**r * lr**power
        total += weight
        share = weight / total if total else 0.0
        for name, g in ((name, g.numpy()) for name, g in grads.items()):
            v[name] = beta2 * v[name] + (1 - beta2) * g**2
            direction = g / (np.sqrt(v[name] / (1 - beta2**t)) + eps) + decay * expected_y[name]
            z[name] = z[name] - lr * direction
            x[name] = (1 - share) * x[name] + share * z[name]
        y, opt_state = tx.apply(grads, opt_state, y)
        averaged = optim.schedule_free_eval(opt_state, y)
        assert_close(averaged, tree.frozen({name: torch.as_tensor(p) for name, p in x.items()}), 1e-11, 1e-12)


def test_schedule_free_eval_finds_its_memory_inside_chain_and_partition() -> None:
    row = row_of("schedule_free_adamw")
    params = random_tree(row, 0)
    y, state = run(optim.schedule_free_adamw(0.1), row, params, 3)
    expected = optim.schedule_free_eval(state, y)
    _, chained = run(chain(optim.identity(), optim.schedule_free_adamw(0.1)), row, params, 3)
    assert_same_bits(optim.schedule_free_eval(chained, y), expected)
    parts = {"free": optim.schedule_free_adamw(0.1), "rest": optim.sgd(0.1)}
    mixed, parted = run(optim.partition(parts, optim.by_rank({2: "free"}, "rest")), row, params, 3)
    found = optim.schedule_free_eval(parted, mixed)
    assert torch.equal(found["matrix"], expected["matrix"])
    assert found["vector"] is mixed["vector"]
    with pytest.raises(ValueError, match="no schedule-free memory"):
        optim.schedule_free_eval(optim.adamw(0.1).init(params), params)
