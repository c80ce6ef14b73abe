"""A module as a function, beside torch.func.functional_call."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from trainkit import functional, init_state, tree
from trainkit.optim import sgd


class Shared(nn.Module):
    """Tied weights, one submodule at two places, a frozen layer, statistics, a buffer that is replaced."""

    counter: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.block = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
        self.again = self.block[0]
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("counter", torch.zeros(()))

    def forward(self, ids: Tensor, *, scale: float = 1.0) -> Tensor:
        self.counter = self.counter + 1
        hidden = self.again(self.block(self.embedding(ids)))
        return self.head(self.frozen(hidden)) * scale


def given_tensors(module: nn.Module) -> tuple[Any, Any]:
    """Other values than the module's own."""
    state = init_state(module, sgd(0.1))
    other = tree.map_tensors(lambda p: p + 0.1 * torch.randn_like(p), state.params)
    return other, state.buffers


def snapshot(module: nn.Module) -> list[tuple[Any, ...]]:
    own = [(name, id(t), t.clone()) for name, t in (*module.named_parameters(), *module.named_buffers())]
    return [*own, *((name, m.training) for name, m in module.named_modules())]


def same(a: list[tuple[Any, ...]], b: list[tuple[Any, ...]]) -> bool:
    return all(x[:2] == y[:2] and (len(x) == 2 or torch.equal(x[2], y[2])) for x, y in zip(a, b, strict=True))


IDS = torch.tensor([0, 3, 4, 3])


@pytest.mark.parametrize("training", [True, False])
def test_equals_functional_call(training: bool) -> None:
    module = Shared().train(training)
    params, buffers = given_tensors(module)
    expected_buffers = {name: t.clone() for name, t in buffers.items()}
    torch.manual_seed(1)
    expected = functional_call(module, dict(params.items()) | expected_buffers, (IDS,), {"scale": 2.0})
    torch.manual_seed(1)
    found, after = functional(module)(params, buffers, IDS, scale=2.0)
    assert torch.equal(found, expected)
    # functional_call writes into the buffers that it is given; here the new ones are returned.
    assert torch.equal(after["block.1.running_mean"], expected_buffers["block.1.running_mean"])
    assert list(after.keys()) == list(buffers.keys())


def test_gradients_reach_tied_weights_from_both_places() -> None:
    module = Shared().eval()
    params, buffers = given_tensors(module)
    leaf = params["embedding.weight"].clone().requires_grad_()
    attached = tree.frozen({**tree.named(params), "embedding.weight": leaf})
    (found,) = torch.autograd.grad(functional(module)(attached, buffers, IDS)[0].sum(), leaf)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(params[name] if name in params.keys() else buffers[name])
    (expected,) = torch.autograd.grad(module(IDS).sum(), module.embedding.weight)
    torch.testing.assert_close(found, expected)


def test_nothing_is_left_behind_in_the_module_or_the_trees() -> None:
    module = Shared().train()
    params, buffers = given_tensors(module)
    before = snapshot(module)
    given = {name: t.clone() for name, t in (*params.items(), *buffers.items())}
    functional(module, training=True)(params, buffers, IDS)
    functional(module, training=False)(params, buffers, IDS)
    with pytest.raises(TypeError, match="unexpected keyword argument 'wrong'"):
        functional(module, training=False)(params, buffers, IDS, wrong=1)
    assert same(before, snapshot(module))
    assert all(torch.equal(given[name], t) for name, t in (*params.items(), *buffers.items()))


def test_buffers_that_are_written_or_replaced_come_back() -> None:
    module = Shared().train()
    params, buffers = given_tensors(module)
    call = functional(module)
    for expected in (1, 2, 3):
        _, buffers = call(params, buffers, IDS)
        assert int(buffers["counter"]) == int(buffers["block.1.num_batches_tracked"]) == expected
    assert int(module.counter) == 0


def test_buffers_of_evaluation_come_back_as_they_went_in() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    params, buffers = given_tensors(module)
    with tree.donate(buffers):
        _, after = functional(module, training=False)(params, buffers, torch.randn(4, 3))
    assert after is buffers


@pytest.mark.parametrize("training", [True, False, None])
def test_modes_are_set_for_the_call_only(training: bool | None) -> None:
    module = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5)))
    module[1].eval()
    seen: list[list[bool]] = []
    module.register_forward_hook(lambda m, args, out: seen.append([x.training for x in m.modules()]))
    functional(module, training=training)(tree.frozen(), tree.frozen(), torch.ones(3))
    own = [True, True, False, False]
    assert seen == [own if training is None else [training] * 4]
    assert [m.training for m in module.modules()] == own


def test_hooks_run() -> None:
    module = nn.Linear(2, 2)
    module.register_forward_pre_hook(lambda m, args: (args[0] * 0,))
    params, buffers = given_tensors(module)
    assert torch.equal(functional(module)(params, buffers, torch.ones(1, 2))[0][0], params["bias"])


def test_a_function_that_uses_the_module_runs_with_the_given_tensors() -> None:
    layer = nn.Linear(2, 1)
    zero = tree.frozen({"weight": torch.zeros(1, 2), "bias": torch.full((1,), 3.0)})
    model = functional(layer, call=lambda x, factor: layer(x).sum() * factor)
    out, _ = model(zero, tree.frozen(), torch.ones(4, 2), 0.5)
    assert float(out) == 6.0
    assert not torch.equal(layer.bias, zero["bias"])
