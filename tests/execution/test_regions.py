"""repeated: blocks compiled once, the same numbers."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.models import GPT
from trainkit import LossOutput, functional, init_state, make_train_step
from trainkit.execution import compile_step, repeated
from trainkit.optim import sgd


def make_module(depth: int = 3) -> GPT:
    torch.manual_seed(0)
    return GPT(vocabulary=17, context=8, width=16, depth=depth, heads=2)


def make_loss(module):
    model = functional(module)

    def loss(params, buffers, batch):
        logits, _ = model(params, buffers, batch[:, :-1])
        return LossOutput(
            F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"), batch[:, 1:].numel()
        )

    return loss


@pytest.mark.parametrize("strategy", ["split", pytest.param("whole", marks=pytest.mark.slow)])
def test_compiled_with_regions_equals_eager_without(strategy):
    module, tx = make_module(), sgd(0.1)
    batch = torch.randint(0, 17, (4, 9), generator=torch.Generator().manual_seed(0))
    expected, _ = make_train_step(make_loss(module), tx)(init_state(module, tx), batch)
    step = compile_step(make_train_step(repeated(make_loss(module), module, "blocks.*"), tx), strategy=strategy)
    found, _ = step(init_state(module, tx), batch)
    assert step.explain().strategy == strategy
    for name in expected.params.keys():
        torch.testing.assert_close(found.params[name], expected.params[name], rtol=1e-4, atol=1e-5)


def test_blocks_that_differ_are_refused():
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 5))
    with pytest.raises(ValueError, match="pattern: '1' is not like '0'"):
        repeated(make_loss(module), module, "[01]")
