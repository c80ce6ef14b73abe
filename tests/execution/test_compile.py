"""compile_step: strategies, donation, what it reports, and what it does when it cannot."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trainkit import LossOutput, SpentStateError, TrainState, functional, init_state, make_train_step, run, tree
from trainkit.execution import FallbackWarning, compile_step
from trainkit.optim import adamw, chain, clip_by_global_norm, from_torch, sgd
from trainkit.rng import fold_in

STRATEGIES = ("eager", "split", "whole")


def make_module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))


def make_loss(module, **kwargs):
    model = functional(module)

    def loss(params, buffers, batch):
        logits, buffers = model(params, buffers, batch["x"])
        return LossOutput(
            F.cross_entropy(logits, batch["y"], reduction="sum", **kwargs), batch["y"].numel(), buffers=buffers
        )

    return loss


def make_batch(rows: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(rows, 6, generator=g), "y": torch.randint(0, 4, (rows,), generator=g)}


def plain_loop(batches) -> list[float]:
    """The oracle: the usual loop with torch.optim and a rate that rises by 1e-3 per step."""
    module = make_module()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1.0, weight_decay=0.1)
    losses = []
    for i, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 1e-3 * (i + 1)
        loss = F.cross_entropy(module(batch["x"]), batch["y"])
        losses.append(loss.item())
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def make_optimizer():
    return chain(clip_by_global_norm(0.5), adamw(lambda count: 1e-3 * (count + 1), weight_decay=0.1))


@pytest.fixture(scope="module")
def compiled():
    """One compiled step per strategy, shared: compiling is what costs."""
    module, tx = make_module(), make_optimizer()
    step = make_train_step(make_loss(module), tx)
    return {strategy: compile_step(step, strategy=strategy) for strategy in STRATEGIES}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_equals_the_plain_loop_and_compiles_once(compiled, strategy):
    batches = [make_batch(seed=i) for i in range(6)]
    records = run(compiled[strategy], init_state(make_module(), make_optimizer()), batches)
    losses = [float(record.metrics["loss"].compute()) for record in records]
    torch.testing.assert_close(losses, plain_loop(batches), rtol=1e-5, atol=1e-6)
    explanation = compiled[strategy].explain()
    assert explanation.strategy == strategy
    assert explanation.compilations == explanation.graphs == {"eager": 0, "split": 2, "whole": 1}[strategy]
    assert explanation.breaks == explanation.fallbacks == ()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_donation_reuses_the_memory_and_spends_the_state(compiled, strategy):
    state = init_state(make_module(), make_optimizer())
    held = dict(state.params.items())
    pointers = {name: tensor.data_ptr() for name, tensor in held.items()}
    before = {name: tensor.clone() for name, tensor in held.items()}
    after, _ = compiled[strategy](state, make_batch())
    assert {name: tensor.data_ptr() for name, tensor in after.params.items()} == pointers
    assert not any(torch.equal(after.params[name], before[name]) for name in before)
    for name in TrainState.__dataclass_fields__:
        with pytest.raises(SpentStateError, match=f"state.{name}: this TrainState was given to a compiled step"):
            getattr(state, name)
    with pytest.raises(SpentStateError):
        compiled[strategy](state, make_batch())
    bytes_of_state = 3 * sum(t.numel() * 4 for t in held.values())
    assert compiled[strategy].explain().donated_bytes == pytest.approx(bytes_of_state, rel=0.1)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_state_that_holds_a_tensor_twice_is_not_donated(compiled, strategy):
    state = init_state(make_module(), make_optimizer())
    twice = state.replace(extra=tree.frozen({"target": state.params}))
    before = {name: tensor.clone() for name, tensor in state.params.items()}
    message = r"state\.params\['0\.weight'\] and state\.extra\['target'\]\['0\.weight'\] are one memory.* clone one"
    with pytest.raises(ValueError, match=message):
        compiled[strategy](twice, make_batch())
    assert all(torch.equal(state.params[name], before[name]) for name in before)
    kept = compile_step(make_train_step(make_loss(make_module()), make_optimizer()), strategy="eager", donate=False)
    after, _ = kept(twice, make_batch())
    assert all(torch.equal(after.extra["target"][name], before[name]) for name in before)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_without_donation_the_state_stays(strategy):
    module, tx = make_module(), sgd(0.1)
    step = compile_step(make_train_step(make_loss(module), tx), strategy=strategy, donate=False)
    state = init_state(module, tx)
    before = {name: tensor.clone() for name, tensor in state.params.items()}
    one, _ = step(state, make_batch())
    two, _ = step(state, make_batch())
    assert all(torch.equal(state.params[name], before[name]) for name in before)
    assert all(torch.equal(one.params[name], two.params[name]) for name in before)
    assert not any(torch.equal(one.params[name], before[name]) for name in before)
    assert step.explain().donated_bytes == 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_labels_out_of_range_leave_the_state_alone(compiled, strategy):
    state = init_state(make_module(), make_optimizer())
    state, _ = compiled[strategy](state, make_batch())
    before = {name: tensor.clone() for name, tensor in state.params.items()}
    bad = make_batch()
    bad["y"][3] = 4
    with pytest.raises(IndexError, match="4"):
        compiled[strategy](state, bad)
    assert all(torch.equal(state.params[name], before[name]) for name in before)
    compiled[strategy](state, make_batch())


def test_a_step_that_cannot_be_one_graph_is_split_with_a_warning_that_names_the_cause():
    module = make_module()
    model = functional(module)

    def loss(params, buffers, batch):
        logits, _ = model(params, buffers, batch["x"])
        torch._dynamo.graph_break(msg="the loss asks for it")
        return LossOutput(F.cross_entropy(logits, batch["y"], reduction="sum"), batch["y"].numel())

    tx = sgd(0.1)
    step = compile_step(make_train_step(loss, tx), strategy="whole")
    with pytest.warns(FallbackWarning, match=r"'whole' cannot be used.*using 'split'.*"):
        after, metrics = step(init_state(module, tx), make_batch())
    reference = F.cross_entropy(make_module()(make_batch()["x"]), make_batch()["y"])
    torch.testing.assert_close(metrics["loss"].compute(), reference.detach())
    explanation = step.explain()
    assert explanation.strategy == "split" and explanation.requested == "whole"
    assert [f.strategy for f in explanation.fallbacks] == ["whole"]
    assert len(explanation.breaks) >= 1 and "gave up whole" in str(explanation)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(after, make_batch())


def test_a_lifted_optimizer_runs_under_split():
    module, batch = make_module(), make_batch()
    tx = from_torch(torch.optim.RMSprop, lr=0.01)
    step = compile_step(make_train_step(make_loss(module), tx), strategy="split")
    state = init_state(module, tx)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        for _ in range(3):
            state, _ = step(state, batch)
    reference = make_module()
    optimizer = torch.optim.RMSprop(reference.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(reference(batch["x"]), batch["y"]).backward()
        optimizer.step()
    for name, expected in reference.named_parameters():
        torch.testing.assert_close(state.params[name], expected.detach(), rtol=1e-5, atol=1e-6)


def test_the_steps_own_error_is_raised_as_it_is():
    module, tx = make_module(), sgd(0.1)

    def forgetful(params, buffers, batch):
        return functional(module)(params, buffers, batch["x"])[0].sum()

    step = compile_step(make_train_step(forgetful, tx), strategy="whole")
    state = init_state(module, tx)
    with pytest.raises(TypeError, match="loss: returned Tensor, expected LossOutput"):
        step(state, make_batch())
    assert int(state.step) == 0


def test_a_compiler_that_fails_inside_of_an_eager_step_is_heard():
    module, tx = make_module(), sgd(0.1)
    plain, failures = make_train_step(make_loss(module), tx), [torch._dynamo.exc.TorchRuntimeError("only once")]

    def flaky(state, batch):
        if failures:
            raise failures.pop()
        return plain(state, batch)

    step = compile_step(flaky, strategy="eager")
    state = init_state(module, tx)
    with pytest.raises(torch._dynamo.exc.TorchRuntimeError, match="only once"):
        step(state, make_batch())
    assert int(step(state, make_batch())[0].step) == 1


def test_other_batch_sizes_are_right():
    module, tx = make_module(), sgd(0.1)
    step = compile_step(make_train_step(make_loss(module), tx), strategy="whole")
    state = init_state(module, tx, copy=False)
    for rows in (8, 5, 3, 8):
        batch = make_batch(rows)
        expected = F.cross_entropy(module(batch["x"]), batch["y"]).detach()
        state, metrics = step(state, batch)
        torch.testing.assert_close(metrics["loss"].compute(), expected)
    assert step.explain().compilations <= 3


def test_dropout_depends_on_the_state_alone_and_can_equal_the_eager_masks():
    module = nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.5), nn.Linear(64, 4))
    tx = sgd(0.1)
    text = make_train_step(make_loss(module), tx)
    state = init_state(module, tx, seed=3)

    def losses(step):
        torch.rand(7)
        return [float(r.metrics["loss"].compute()) for r in run(step, state, [make_batch()] * 3)]

    own = compile_step(text, strategy="whole", donate=False)
    assert losses(own) == losses(own)
    same = compile_step(text, strategy="whole", donate=False, same_random=True)
    assert losses(same) == pytest.approx(losses(text), rel=1e-5)


def test_a_changed_module_is_noticed():
    module, tx = nn.Sequential(nn.Dropout(1.0), nn.Linear(6, 4)), sgd(0.1)
    step = compile_step(make_train_step(make_loss(module), tx), strategy="whole", donate=False)
    state, batch = init_state(module, tx), make_batch()
    _, in_training = step(state, batch)
    module.eval()
    _, in_evaluation = step(state, batch)
    bias = state.params["1.bias"].expand(8, 4)
    torch.testing.assert_close(in_training["loss"].compute(), F.cross_entropy(bias, batch["y"]))
    torch.testing.assert_close(
        in_evaluation["loss"].compute(), F.cross_entropy(module(batch["x"]), batch["y"]).detach()
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_key_that_a_step_exchanges_seeds_the_next(strategy):
    module, tx = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5)), sgd(0.1)
    plain = make_train_step(make_loss(module), tx)

    def rekeyed(state, batch):
        after, metrics = plain(state, batch)
        return after.replace(key=fold_in(after.key, 1)), metrics

    def losses(step):
        return [float(r.metrics["loss"].compute()) for r in run(step, init_state(module, tx), [make_batch()] * 3)]

    assert losses(compile_step(rekeyed, strategy=strategy, same_random=True)) == pytest.approx(
        losses(rekeyed), rel=1e-5
    )


def test_unknown_strategy():
    with pytest.raises(ValueError, match="strategy: got 'fast', expected 'auto', 'whole', 'split' or 'eager'"):
        compile_step(lambda state, batch: (state, {}), strategy="fast")
