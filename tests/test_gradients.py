"""Four ways to a gradient, beside ``backward()`` on a plain module."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainkit import (
    LossOutput,
    TrainState,
    accumulate,
    apply_updates,
    functional,
    init_state,
    live_value_and_grad,
    per_example_grads,
    value_and_grad,
)
from trainkit.execution.population import member_value_and_grad
from trainkit.metrics import Mean
from trainkit.optim import sgd
from trainkit.rng import fold_in_host

Batch = tuple[Tensor, Tensor]


def make_module(dropout: float = 0.0, statistics: bool = True) -> nn.Module:
    norm = nn.BatchNorm1d(4) if statistics else nn.LayerNorm(4)
    return nn.Sequential(nn.Linear(3, 4), norm, nn.Dropout(dropout), nn.Tanh(), nn.Linear(4, 2))


def make_loss(module: nn.Module) -> Callable[..., LossOutput]:
    model = functional(module)

    def loss(params: Any, buffers: Any, batch: Batch) -> LossOutput:
        logits, buffers = model(params, buffers, batch[0])
        right = (logits.argmax(-1) == batch[1]).sum()
        total = F.cross_entropy(logits, batch[1], reduction="sum")
        return LossOutput(total, len(batch[1]), {"accuracy": Mean(right, torch.tensor(len(batch[1])))}, buffers)

    return loss


def make_live_loss(module: nn.Module) -> Callable[..., LossOutput]:
    """A loss that calls the module itself, as code that cannot be called functionally would."""

    def loss(params: Any, buffers: Any, batch: Batch) -> LossOutput:
        return LossOutput(F.cross_entropy(module(batch[0]), batch[1], reduction="sum"), len(batch[1]))

    return loss


def make_batch(rows: int = 6) -> Batch:
    return torch.randn(rows, 3), torch.randint(0, 2, (rows,))


def backward(module: nn.Module, batch: Batch, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The oracle: the sum and its gradient by ``backward()``, with the global generator at ``seed``."""
    torch.manual_seed(seed)
    module.zero_grad()
    total = F.cross_entropy(module(batch[0]), batch[1], reduction="sum")
    total.backward()
    return total.detach(), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


WAYS = {
    "functional": lambda module, **kwargs: value_and_grad(make_loss(module), **kwargs),
    "live": lambda module, **kwargs: live_value_and_grad(module, make_live_loss(module), **kwargs),
    "of a member": lambda module, **kwargs: member_value_and_grad(make_loss(module), **kwargs),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rank", [0, 3])
def test_equals_backward_with_the_dropout_of_the_key(way: str, rank: int) -> None:
    module = make_module(dropout=0.5)
    state = init_state(module, sgd(0.1), seed=7).replace(step=torch.tensor(5))
    batch = make_batch()
    found = WAYS[way](module, rank=rank)(state, batch)
    module.load_state_dict({**state.params, **state.buffers})
    total, grads = backward(module, batch, fold_in_host(7, 5, rank) % 2**64)
    torch.testing.assert_close(found.loss_sum, total)
    assert float(found.weight) == len(batch[1])
    assert list(found.grads.keys()) == list(grads)
    for name, expected in grads.items():
        torch.testing.assert_close(found.grads[name], expected)
        assert found.grads[name].is_contiguous()
    if way != "live":
        torch.testing.assert_close(found.buffers["1.running_mean"], module[1].running_mean)
        assert int(found.metrics["accuracy"].weight) == len(batch[1])


@pytest.mark.parametrize("way", WAYS)
def test_what_comes_out_is_detached(way: str) -> None:
    module = make_module()
    found = WAYS[way](module)(init_state(module, sgd(0.1)), make_batch())
    metrics = [tensor for metric in found.metrics.values() for tensor in (metric.total, metric.weight)]
    tensors = [found.loss_sum, found.weight, *metrics, *found.grads.values(), *found.buffers.values()]
    assert not any(t.requires_grad for t in tensors)


@pytest.mark.parametrize("way", WAYS)
def test_random_draws_leave_the_global_state_alone(way: str) -> None:
    module = make_module(dropout=0.5)
    state, batch = init_state(module, sgd(0.1)), make_batch()
    before = torch.get_rng_state()
    WAYS[way](module)(state, batch)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("way", WAYS)
def test_parameters_without_gradient(way: str) -> None:
    module = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2)})
    module.forward = lambda x: module["used"](x)  # type: ignore[method-assign]
    state, batch = init_state(module, sgd(0.1)), make_batch()
    with pytest.raises(ValueError, match=r"params: no gradient reached unused.weight, unused.bias\. Freeze them"):
        WAYS[way](module)(state, batch)
    grads = WAYS[way](module, unused="zero")(state, batch).grads
    assert not grads["unused.weight"].any()
    assert grads["used.weight"].any()
    with pytest.raises(ValueError, match="unused: got 'skip', expected 'error'"):
        WAYS[way](module, unused="skip")


@pytest.mark.parametrize("way", ["functional", "live"])
def test_parameters_without_gradient_can_be_left_out(way: str) -> None:
    module = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2)})
    module.forward = lambda x: module["used"](x)  # type: ignore[method-assign]
    found = WAYS[way](module, unused="omit")(init_state(module, sgd(0.1)), make_batch())
    assert sorted(found.grads.keys()) == ["used.bias", "used.weight"]


def test_parameters_that_only_some_microbatches_reach_keep_their_gradient() -> None:
    def loss(params: Any, buffers: Any, batch: tuple[str, Tensor]) -> LossOutput:
        name, x = batch
        return LossOutput((params["always"] * params[name] * x).sum(), 1)

    module = nn.ParameterDict({name: nn.Parameter(torch.tensor(2.0)) for name in ("always", "a", "b")})
    parts = [("a", torch.tensor(3.0)), ("b", torch.tensor(5.0)), ("a", torch.tensor(7.0))]
    grads = accumulate(value_and_grad(loss, unused="omit"))(init_state(module, sgd(0.1)), parts).grads
    assert {name: float(g) for name, g in grads.items()} == {"always": 30.0, "a": 20.0, "b": 10.0}


@pytest.mark.parametrize("way", ["functional", "live"])
def test_no_gradient_is_one_number_seen_many_times(way: str) -> None:
    """The gradient of a sum has strides of zero, and whoever scales it in place would be refused."""
    module = nn.Linear(3, 2)

    def loss(params: Any, buffers: Any, x: Tensor) -> LossOutput:
        return LossOutput(params["weight"].sum() + params["bias"].sum(), 1)

    gradient = value_and_grad(loss) if way == "functional" else live_value_and_grad(module, loss)
    found = gradient(init_state(module, sgd(0.1)), torch.ones(1, 3))
    assert found.grads["weight"].mul_(2).tolist() == [[2.0] * 3] * 2


def test_the_functional_gradient_does_not_read_the_module() -> None:
    module = make_module()
    state, batch = init_state(module, sgd(0.1)), make_batch()
    gradient = value_and_grad(make_loss(module))
    before = gradient(state, batch).grads["0.weight"]
    nn.init.zeros_(module[4].weight)
    assert torch.equal(before, gradient(state, batch).grads["0.weight"])
    assert all(p.grad is None for p in module.parameters())


def test_the_live_gradient_leaves_the_module_as_it_was() -> None:
    module = make_module()
    state = init_state(make_module(), sgd(0.1))
    module[0].weight.grad = torch.ones(4, 3)
    own = {name: (p.data_ptr(), p.clone(), p.grad) for name, p in module.named_parameters()}
    gradient = live_value_and_grad(module, make_live_loss(module))
    gradient(state, make_batch())
    with pytest.raises(IndexError):
        gradient(state, (torch.randn(2, 3), torch.tensor([0, 9])))
    for name, p in module.named_parameters():
        assert p.data_ptr() == own[name][0]
        assert p.grad is own[name][2]
        assert torch.equal(p, own[name][1])


def test_hooks_on_the_live_parameters_run() -> None:
    module = nn.Linear(3, 2)
    module.weight.register_hook(lambda grad: grad * 0)
    found = live_value_and_grad(module, make_live_loss(module))(init_state(module, sgd(0.1)), make_batch())
    assert not found.grads["weight"].any()
    assert found.grads["bias"].any()


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
@pytest.mark.parametrize("way", ["functional", "of a member"])
def test_a_loss_scale_is_taken_out_again(way: str, scale: float) -> None:
    module = make_module()
    state, batch = init_state(module, sgd(0.1)), make_batch()
    plain = WAYS[way](module)(state, batch)
    scaled = WAYS[way](module, scale=lambda state: torch.tensor(scale))(state, batch)
    torch.testing.assert_close(scaled.loss_sum, plain.loss_sum)
    for name, expected in plain.grads.items():
        torch.testing.assert_close(scaled.grads[name], expected)


def test_a_loss_scale_keeps_gradients_that_are_too_small_on_their_way() -> None:
    layer = nn.Linear(1, 1, bias=False).half()

    def loss(params: Any, buffers: Any, x: Tensor) -> LossOutput:
        return LossOutput((F.linear(x, params["weight"]) * 2.0**-14).sum().float() * 2.0**-12, len(x))

    # 2^-26 reaches the product, less than float16 has; times x it is 2^-16, which it has.
    state, x = init_state(layer, sgd(0.1)), torch.full((1, 1), 2.0**10).half()
    assert float(value_and_grad(loss)(state, x).grads["weight"]) == 0
    scaled = value_and_grad(loss, scale=lambda state: torch.tensor(2.0**20))(state, x)
    assert float(scaled.grads["weight"]) == 2.0**-16


# -- of the mean ---------------------------------------------------------------------------------------------------


def test_the_gradient_of_the_mean_is_that_of_the_plain_loop() -> None:
    module = make_module()
    state, (x, y) = init_state(module, sgd(0.1)), make_batch()
    found = value_and_grad(make_loss(module), mean=True)(state, (x, y))
    F.cross_entropy(module(x), y).backward()
    for name, p in module.named_parameters():
        torch.testing.assert_close(found.grads[name], p.grad, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.factor, torch.tensor(1 / len(y)))


def test_the_gradient_of_the_mean_of_nothing_is_zero() -> None:
    module = nn.Linear(3, 2)
    nothing = lambda params, buffers, x: LossOutput(F.linear(x, params["weight"], params["bias"]).sum(), 0.0)  # noqa: E731
    found = value_and_grad(nothing, mean=True)(init_state(module, sgd(0.1)), torch.ones(4, 3))
    assert not found.grads["weight"].any()
    assert not found.grads["bias"].any()


@pytest.mark.parametrize(("weight", "factor"), [(4.0, 0.25), (0.0, 0.0), (-0.0, 0.0), (float("nan"), float("nan"))])
@pytest.mark.parametrize("mean", [False, True])
def test_no_weight_but_zero_takes_the_gradient_away(mean: bool, weight: float, factor: float) -> None:
    loss = lambda params, buffers, x: LossOutput((params["weight"] * x).sum(), torch.tensor(weight))  # noqa: E731
    state = init_state(nn.Linear(2, 1, bias=False), sgd(1.0))
    step = apply_updates(value_and_grad(loss, mean=mean), sgd(1.0))
    after, _ = step(state, torch.ones(1, 2))
    torch.testing.assert_close(after.params["weight"], state.params["weight"] - factor, equal_nan=True)


def test_the_mean_in_float64_is_divided_in_float64() -> None:
    loss = lambda params, buffers, x: LossOutput((params["weight"] * x).sum(), 3.0)  # noqa: E731
    state = init_state(nn.Linear(2, 1, bias=False).double(), sgd(0.1))
    found = value_and_grad(loss, mean=True)(state, torch.ones(1, 2, dtype=torch.float64))
    assert found.grads["weight"].tolist() == [[1 / 3, 1 / 3]]


def test_a_loss_in_low_precision_gives_the_gradient_of_its_sum() -> None:
    loss = lambda params, buffers, x: LossOutput((params["weight"] * x).sum(), 3.0)  # noqa: E731
    state = init_state(nn.Linear(2, 1, bias=False).bfloat16(), sgd(0.1))
    found = value_and_grad(loss, mean=True)(state, torch.ones(3, 2, dtype=torch.bfloat16))
    assert found.factor is None
    torch.testing.assert_close(found.grads["weight"], torch.full((1, 2), 3.0, dtype=torch.bfloat16))


def test_gradients_of_means_are_not_added_up() -> None:
    module = make_module()
    gradient = value_and_grad(make_loss(module), mean=True)
    state = init_state(module, sgd(0.1))
    with pytest.raises(ValueError, match=r"gradient: it gives gradients of the mean .* cannot be added up"):
        accumulate(gradient, 2)(state, make_batch())
    with pytest.raises(ValueError, match=r"gradient: it gives gradients of the mean .* cannot be added up"):
        apply_updates(gradient, sgd(0.1), reduce=lambda found: found)(state, make_batch())


# -- per example ---------------------------------------------------------------------------------------------------


def rows_of(batch: Batch) -> list[Batch]:
    return [tuple(t[i : i + 1] for t in batch) for i in range(len(batch[1]))]  # type: ignore[misc]


def test_per_example_gradients_equal_a_loop_over_rows() -> None:
    module = make_module(statistics=False)
    state, batch = init_state(module, sgd(0.1)), make_batch(5)
    found = per_example_grads(make_loss(module))(state, batch)
    alone = [value_and_grad(make_loss(module))(state, row) for row in rows_of(batch)]
    for name in found.grads.keys():
        torch.testing.assert_close(found.grads[name], torch.stack([one.grads[name] for one in alone]))
    torch.testing.assert_close(found.loss_sum, torch.stack([one.loss_sum for one in alone]))
    assert found.weight.tolist() == [1.0] * 5
    torch.testing.assert_close(
        found.metrics["accuracy"].total, torch.stack([one.metrics["accuracy"].total for one in alone])
    )
    # Their sum is the gradient of the batch.
    whole = value_and_grad(make_loss(module))(state, batch)
    torch.testing.assert_close(found.grads["0.weight"].sum(0), whole.grads["0.weight"])


def test_per_example_draws_differ_between_rows_and_repeat() -> None:
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 2))
    state = init_state(module, sgd(0.1))
    batch = (torch.ones(3, 64), torch.zeros(3, dtype=torch.int64))
    gradient = per_example_grads(make_loss(module))
    before = torch.get_rng_state()
    first = gradient(state, batch).grads["1.weight"]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, gradient(state, batch).grads["1.weight"])
    assert not torch.equal(first[0], first[1])


# -- inside a graph ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["functional", "of a member", "per example"])
def test_traces_in_one_piece(way: str) -> None:
    module = make_module(statistics=way != "per example")
    ways = {**WAYS, "per example": lambda module: per_example_grads(make_loss(module))}
    gradient = ways[way](module)
    state, batch = init_state(module, sgd(0.1)), make_batch()

    def grads(state: TrainState, batch: Batch) -> dict[str, Tensor]:
        return dict(gradient(state, batch).grads.items())

    expected = grads(state, batch)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        found = torch.compile(grads, fullgraph=True, backend="eager")(state, batch)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad)


def test_a_hook_that_a_loss_sets_is_for_one_call() -> None:
    def loss(params: Any, buffers: Any, x: Tensor) -> LossOutput:
        params["weight"].register_hook(lambda grad: grad * 2)
        return LossOutput((params["weight"] * x).sum(), len(x))

    state = init_state(nn.Linear(2, 1, bias=False), sgd(0.1))
    for _ in range(3):
        assert value_and_grad(loss)(state, torch.ones(3, 2)).grads["weight"].tolist() == [[6.0, 6.0]]
