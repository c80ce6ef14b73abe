"""Step transforms against plain PyTorch loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.optim import swa_utils
from torch.utils import _pytree as pytree

from tests.tiny import assert_close, assert_equal, batch_of, make_module, make_state, make_step, torch_step
from trainkit import tree
from trainkit.execution.compile import compile_step
from trainkit.functional import functional
from trainkit.optim.adam import adam
from trainkit.optim.averaging import polyak
from trainkit.optim.groups import by_name, partition
from trainkit.optim.sgd import sgd
from trainkit.state import TrainState, host_step, init_state
from trainkit.step import make_train_step
from trainkit.transforms import (
    NonfiniteError,
    alternate,
    ema_params,
    init_ema,
    raise_nonfinite,
    scan,
    skip_nonfinite,
    train_only,
    with_average,
    with_ema,
)
from trainkit.types import Batch, Buffers, LossOutput, Params, StepFn

# -- averages ------------------------------------------------------------------------------------------------------


def test_ema_equals_a_loop_with_an_averaged_model() -> None:
    module = make_module()
    step, state = with_ema(make_step(module), 0.9), init_ema(make_state(module))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05)
    averaged = swa_utils.AveragedModel(module, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
    averaged.update_parameters(module)
    for i in range(10):
        state, _ = step(state, batch_of(i))
        torch_step(module, optimizer, batch_of(i))
        averaged.update_parameters(module)
        assert_close(ema_params(state), averaged.module)
    assert_close(state.params, module)
    assert int(state.extra["ema"]["count"]) == 10


def test_an_average_of_equal_weights_equals_swa() -> None:
    module = make_module()
    step, state = with_average(make_step(module), polyak(start=2)), init_ema(make_state(module))
    seen = []
    for i in range(6):
        state, _ = step(state, batch_of(i))
        seen.append(state.params)
    for name, mean in ema_params(state).items():
        torch.testing.assert_close(mean, torch.stack([params[name] for params in seen[2:]]).mean(0))


def test_averages_of_two_names_live_side_by_side() -> None:
    module = make_module()
    step = with_ema(with_ema(make_step(module), 0.5, name="fast"), 0.99, name="slow")
    state = init_ema(init_ema(make_state(module), name="fast"), name="slow")
    for i in range(3):
        state, _ = step(state, batch_of(i))
    alone, expected = with_ema(make_step(module), 0.5), init_ema(make_state(module))
    for i in range(3):
        expected, _ = alone(expected, batch_of(i))
    assert_equal(ema_params(state, name="fast"), ema_params(expected))
    assert not torch.equal(ema_params(state, name="slow")["0.weight"], ema_params(state, name="fast")["0.weight"])


def test_the_average_of_half_precision_may_be_kept_in_float32() -> None:
    module = nn.Linear(2, 1, bias=False).bfloat16()
    tx = sgd(2.0**-7)
    loss = lambda params, buffers, x: LossOutput((params["weight"] * x).sum().float(), len(x))  # noqa: E731
    step, state = with_ema(make_train_step(loss, tx), 0.999), init_ema(init_state(module, tx), dtype=torch.float32)
    first = ema_params(state)["weight"]
    for _ in range(5):
        state, _ = step(state, torch.ones(4, 2, dtype=torch.bfloat16))
    assert ema_params(state)["weight"].dtype == torch.float32
    assert bool((ema_params(state)["weight"] < first).all())


def test_an_average_that_was_not_started_is_refused_before_anything_runs() -> None:
    module = make_module()

    def never(state: TrainState, batch: Batch) -> Any:
        raise AssertionError("the step ran")

    with pytest.raises(KeyError, match=r"no average 'ema'; start with init_ema\(state, name='ema'\)"):
        with_ema(never, 0.9)(make_state(module), batch_of(0))
    with pytest.raises(KeyError, match="no average 'slow'"):
        ema_params(init_ema(make_state(module)), name="slow")
    with pytest.raises(ValueError, match=r"decay: got 1.0, expected a number in \[0, 1\)"):
        with_ema(never, 1.0)


# -- several steps in one ------------------------------------------------------------------------------------------


def structured(i: int) -> dict[str, Any]:
    return {"x": batch_of(i), "nested": (torch.arange(8) + i,), "name": "same for all"}


def structured_step(module: nn.Module) -> StepFn:
    plain = make_step(module)
    return lambda state, batch: plain(state, batch["x"] + batch["nested"][0].unsqueeze(-1))


@pytest.mark.parametrize("form", ["list", "stacked", "tensordict"])
@pytest.mark.parametrize("donated", [False, True])
def test_scan_is_the_steps_one_after_the_other(form: str, donated: bool) -> None:
    module = make_module()
    step, state, total = structured_step(module), make_state(module), None
    for i in range(3):
        state, metrics = step(state, structured(i))
        total = metrics if total is None else {k: total[k].merge(m) for k, m in metrics.items()}
    batches: Any = [structured(i) for i in range(3)]
    if form == "stacked":
        batches = {
            "x": torch.stack([b["x"] for b in batches]),
            "nested": (torch.stack([b["nested"][0] for b in batches]),),
            "name": "same for all",
        }
    elif form == "tensordict":
        batches = TensorDict({"x": torch.stack([b["x"] + b["nested"][0].unsqueeze(-1) for b in batches])}, [3, 8])
        step = lambda state, batch: make_step(module)(state, batch["x"])  # noqa: E731
    start = make_state(module)
    before = tree.clone(start)
    with tree.donate(start) if donated else tree.keep():
        found, merged = scan(step, 3)(start, batches)
    assert_equal(found, state)
    assert host_step(found) == 3
    assert_equal(merged, total)
    if not donated:
        assert_equal(start, before)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([torch.ones(2, 4)] * 2, "batch: got a list of 2, expected 3 batches"),
        (torch.ones(2, 8, 4), r"batch: its tensors have leading axes of \['2'\], expected 3 for all"),
        ({"a": torch.ones(3, 4), "b": torch.tensor(1.0)}, r"leading axes of \['3', 'None'\], expected 3"),
    ],
)
def test_scan_refuses_another_number_of_batches(batch: Any, message: str) -> None:
    module = make_module()
    with pytest.raises(ValueError, match=message):
        scan(make_step(module), 3)(make_state(module), batch)


def test_numbers_of_steps_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="k: got 0, expected at least 1"):
        scan(make_step(make_module()), 0)
    with pytest.raises(ValueError, match="steps: got none, expected at least one, by name"):
        alternate()


# -- players -------------------------------------------------------------------------------------------------------


class GAN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.generator = nn.Sequential(nn.Linear(2, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
        self.critic = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, real: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        return self.critic(real), self.critic(self.generator(noise))


def gan_losses(gan: GAN) -> dict[str, Any]:
    model = functional(gan)

    def critic(params: Params, buffers: Buffers, batch: Batch) -> LossOutput:
        (real, fake), buffers = model(params, buffers, *batch)
        return LossOutput((softplus(-real) + softplus(fake)).sum(), len(real), buffers=buffers)

    def generator(params: Params, buffers: Buffers, batch: Batch) -> LossOutput:
        (_, fake), buffers = model(params, buffers, *batch)
        return LossOutput(softplus(-fake).sum(), len(fake), buffers=buffers)

    return {"critic": critic, "generator": generator}


PLAYERS = {"critic": adam(0.02), "generator": adam(0.01)}
LABELS = by_name({"generator.*": "generator"}, default="critic")


def gan_step(gan: GAN) -> StepFn:
    return alternate(
        **{
            name: train_only(make_train_step(loss, PLAYERS[name]), name, LABELS)
            for name, loss in gan_losses(gan).items()
        }
    )


def gan_batch(i: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(i)
    return 2 + torch.randn(16, 1, generator=generator), torch.randn(16, 2, generator=generator)


def torch_gan_step(gan: GAN, critic: torch.optim.Optimizer, generator: torch.optim.Optimizer, batch: Any) -> None:
    real, fake = gan(*batch)
    critic.zero_grad()
    (softplus(-real) + softplus(fake)).mean().backward()
    critic.step()
    _, fake = gan(*batch)
    generator.zero_grad()
    softplus(-fake).mean().backward()
    generator.step()


@pytest.mark.parametrize("donated", [False, True])
def test_a_gan_equals_the_plain_loop_with_two_optimizers(donated: bool) -> None:
    gan = GAN()
    step, state = gan_step(gan), init_state(gan, partition(PLAYERS, LABELS))
    critic = torch.optim.Adam(gan.critic.parameters(), lr=0.02)
    generator = torch.optim.Adam(gan.generator.parameters(), lr=0.01)
    for i in range(8):
        with tree.donate(state) if donated else tree.keep():
            state, metrics = step(state, gan_batch(i))
        torch_gan_step(gan, critic, generator, gan_batch(i))
        assert_close(state.params, gan, 2e-4)
        torch.testing.assert_close(state.buffers["generator.1.running_mean"], gan.generator[1].running_mean)
    assert set(metrics) == {f"{name}/{key}" for name in PLAYERS for key in ("loss", "learning_rate")}
    assert int(state.step) == host_step(state) == 16
    assert [int(state.opt_state[name]["count"]) for name in PLAYERS] == [8, 8]


def test_a_player_leaves_the_other_as_it_is_and_computes_no_gradient_for_it() -> None:
    gan = GAN()
    state = init_state(gan, partition(PLAYERS, LABELS))
    seen: list[bool] = []

    def watched(params: Params, buffers: Buffers, batch: Batch) -> LossOutput:
        seen.extend(t.requires_grad for name, t in buffers.items() if name.startswith("generator."))
        return gan_losses(gan)["critic"](params, buffers, batch)

    step = train_only(make_train_step(watched, PLAYERS["critic"]), "critic", LABELS)
    before = tree.clone(state)
    after, _ = step(state, gan_batch(0))
    assert seen
    assert not any(seen)
    assert_equal(state, before)
    for name, old in state.params.items():
        assert (after.params[name] is old) == name.startswith("generator.")
    assert_equal(after.opt_state["generator"], before.opt_state["generator"])
    assert list(after.params.keys()) == list(before.params.keys())
    assert list(after.buffers.keys()) == list(before.buffers.keys())


def test_two_losses_in_turn_on_one_state_are_two_updates() -> None:
    module, tx = make_module(), sgd(0.05, momentum=0.9)
    up, down = make_step(module, tx), make_step(module, tx)
    found, metrics = alternate(first=up, second=down)(init_state(module, tx), batch_of(0))
    middle, first = up(init_state(module, tx), batch_of(0))
    expected, second = down(middle, batch_of(0))
    assert_equal(found, expected)
    assert_equal(metrics["first/loss"], first["loss"])
    assert_equal(metrics["second/loss"], second["loss"])


def test_the_losses_of_all_players_are_looked_at() -> None:
    gan = GAN()
    step, state = skip_nonfinite(gan_step(gan)), init_state(gan, partition(PLAYERS, LABELS))
    real, noise = gan_batch(0)
    real[0] = math.nan
    after, metrics = step(state, (real, noise))
    assert float(metrics["skipped_steps"].compute()) == 1.0
    assert_equal(after.params, state.params)
    with pytest.raises(NonfiniteError, match="step 1: critic/loss is nan"):
        raise_nonfinite(gan_step(gan))(state, (real, noise))


@pytest.mark.parametrize("label", ["nobody", "generator"])
def test_a_part_without_parameters_or_state_is_refused(label: str) -> None:
    gan = GAN()
    state = init_state(gan, partition({"critic": sgd(0.1)}, lambda name, p: "critic"))
    step = train_only(make_train_step(gan_losses(gan)["critic"], sgd(0.1)), label, LABELS)
    with pytest.raises(ValueError, match=rf"label: got '{label}', which \d+ of 9 parameters carry; .*\['critic'\]"):
        step(state, gan_batch(0))


# -- compiled ------------------------------------------------------------------------------------------------------


def case(name: str) -> tuple[StepFn, TrainState, list[Any]]:
    module = make_module()
    plain, state = make_step(module), make_state(module)
    batches: list[Any] = [batch_of(i, bad=i == 1) for i in range(3)]
    if name == "ema":
        return with_ema(plain, 0.9), init_ema(state), [batch_of(i) for i in range(3)]
    if name == "average":
        return with_average(plain, polyak(start=1)), init_ema(state), [batch_of(i) for i in range(3)]
    if name == "skip":
        return skip_nonfinite(plain), state, batches
    if name == "skip_ema":
        return skip_nonfinite(with_ema(plain, 0.9)), init_ema(state), batches
    if name == "scan":
        return scan(plain, 2), state, [torch.stack([batch_of(i), batch_of(i + 9)]) for i in range(3)]
    gan = GAN()
    return gan_step(gan), init_state(gan, partition(PLAYERS, LABELS)), [gan_batch(i) for i in range(3)]


CASES = ["ema", "average", "skip", "skip_ema", "scan", "gan"]


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_one_graph_that_serves_every_call(name: str) -> None:
    torch._dynamo.reset()
    step, state, batches = case(name)
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(step, fullgraph=True, backend=count)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        for batch in batches:
            found, _ = compiled(state, batch)
            state, _ = step(state, batch)
            for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(state), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["whole", "split", "eager"])
@pytest.mark.parametrize("name", CASES)
def test_a_compiled_step_that_donates_equals_the_eager_one(name: str, strategy: Any) -> None:
    step, state, batches = case(name)
    compiled, own = compile_step(step, strategy=strategy), tree.clone(state)
    for batch in batches:
        own, _ = compiled(own, batch)
        state, _ = step(state, batch)
        assert host_step(own) == int(own.step) == int(state.step)
        for a, b in zip(pytree.tree_leaves(own), pytree.tree_leaves(state), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert compiled.explain().strategy == strategy
