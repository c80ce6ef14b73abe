"""Precision policies against autocast, GradScaler and float32."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trainkit import LossOutput, functional, make_train_step, run
from trainkit.execution import bf16_mixed, bf16_pure, compile_step, fp16_mixed, full
from trainkit.execution.precision import autocast, round_stochastically, stochastically_rounded
from trainkit.optim import adamw, sgd
from trainkit.rng import make_key
from trainkit.tree import donate, frozen


def make_module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))


def make_batch():
    g = torch.Generator().manual_seed(1)
    return torch.randn(16, 8, generator=g), torch.randint(0, 4, (16,), generator=g)


def make_loss(module):
    model = functional(module)

    def loss(params, buffers, batch):
        logits, buffers = model(params, buffers, batch[0].to(params["0.weight"].dtype))
        return LossOutput(F.cross_entropy(logits.float(), batch[1], reduction="sum"), 16, buffers=buffers)

    return loss


def trained(policy, steps=5, optimizer=None, **kwargs):
    module, optimizer = make_module(), optimizer or sgd(0.1)
    step = make_train_step(make_loss(module), optimizer, precision=policy)
    (*_, record) = run(compile_step(step, **kwargs), policy.init_state(module, optimizer), [make_batch()] * steps)
    return record


def by_hand(dtype, steps=5):
    module, (x, y) = make_module(), make_batch()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = module(x)
        F.cross_entropy(logits.float(), y).backward()
        optimizer.step()
    return dict(module.named_parameters())


@pytest.mark.parametrize(
    ("policy", "dtype"), [(full(), torch.float32), (bf16_mixed(), torch.bfloat16), (fp16_mixed(), torch.float16)]
)
def test_equals_the_loop_under_autocast(policy, dtype):
    params = trained(policy, strategy="eager").state.params
    for name, expected in by_hand(dtype).items():
        assert params[name].dtype == torch.float32
        # One rounding of the loss scale more than by hand in float16; otherwise the same operations.
        torch.testing.assert_close(params[name], expected.detach(), rtol=1e-3, atol=2e-4)


def test_autocast_computes_in_the_dtype_and_refuses_others():
    seen = []

    def loss(params, buffers, batch):
        seen.append((batch @ params["w"]).dtype)
        return LossOutput(batch.sum(), 1)

    autocast(loss, torch.bfloat16)(frozen({"w": torch.ones(2, 2)}), frozen(), torch.ones(2, 2))
    assert seen == [torch.bfloat16]
    with pytest.raises(ValueError, match=r"dtype: got torch.float32, expected torch.bfloat16 or torch.float16"):
        autocast(loss, torch.float32)


def test_fp16_overflow_is_skipped_and_shrinks_the_scale():
    policy = fp16_mixed(initial_scale=2.0**40)
    module, tx = make_module(), adamw(1e-2)
    step = make_train_step(make_loss(module), tx, precision=policy)
    state = policy.init_state(module, tx)
    after, metrics = step(state, make_batch())
    assert float(metrics["skipped"].compute()) == 1 and float(metrics["loss_scale"].compute()) == 2.0**39
    assert all(torch.equal(after.params[name], state.params[name]) for name in state.params.keys())
    (*_, record) = run(step, state, [make_batch()] * 40)
    assert float(record.metrics["skipped"].compute()) == 0
    assert float(record.metrics["loss"].compute()) < 1.3


def test_pure_bf16_learns_where_rounding_to_nearest_stalls():
    # Updates of 1/1024 of a weight: a bfloat16 next to 1 is 1/128 away, so rounding to nearest never moves.
    ones = frozen({"w": torch.ones(4096, dtype=torch.bfloat16)})
    grads = frozen({"w": torch.full((4096,), 2.0**-10)})
    rounded, nearest = ones, ones
    tx = stochastically_rounded(sgd(1.0))
    opt_state = tx.init(ones)
    for _ in range(64):
        rounded, opt_state = tx.apply(grads, opt_state, rounded)
        nearest = frozen({"w": nearest["w"] - grads["w"].bfloat16()})
    assert float(nearest["w"].float().mean()) == 1.0
    # 64 draws of variance (2^-7)^2 / 4 per element at most, averaged over 4096: a standard error of 0.0005.
    assert float(rounded["w"].float().mean()) == pytest.approx(1 - 64 * 2.0**-10, abs=0.003)


def test_pure_bf16_keeps_the_memory_of_the_optimizer_in_float32_and_donates():
    module = make_module()
    state = bf16_pure().init_state(module, adamw(1e-3))
    inner = state.opt_state["inner"]
    assert state.params["0.weight"].dtype == torch.bfloat16 and inner["exp_avg"]["0.weight"].dtype == torch.float32
    step = make_train_step(make_loss(module), adamw(1e-3), precision=bf16_pure())
    pure, _ = step(state, make_batch())
    pointer = state.params["0.weight"].data_ptr()
    with donate(state):
        donated, _ = step(state, make_batch())
    assert donated.params["0.weight"].data_ptr() == pointer
    assert all(torch.equal(pure.params[name], donated.params[name]) for name in pure.params.keys())


def test_pure_bf16_compiled_rounds_like_eager():
    eager = trained(bf16_pure(), steps=2, strategy="eager").state
    whole = trained(bf16_pure(), steps=2, strategy="whole").state
    for name, expected in eager.params.items():
        torch.testing.assert_close(whole.params[name].float(), expected.float(), rtol=2.0**-7, atol=2.0**-12)


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20), st.integers(0, 2**32)
)
def test_rounding_gives_a_neighbour(values, seed):
    value = torch.tensor(values, dtype=torch.float32)
    rounded = round_stochastically(value, torch.bfloat16, make_key(seed)).float()
    down = (value.view(torch.int32) & ~0xFFFF).view(torch.float32)
    up = ((value.view(torch.int32) & ~0xFFFF) + 0x10000).view(torch.float32)
    exact = down == value
    assert bool(torch.where(exact, rounded == value, (rounded == down) | (rounded == up)).all())


def test_rounding_keeps_infinities_and_nan():
    value = torch.tensor([float("inf"), -float("inf"), float("nan")])
    rounded = round_stochastically(value, torch.bfloat16, make_key(0))
    assert rounded[0] == float("inf") and rounded[1] == -float("inf") and rounded[2].isnan()


def test_float64_parameters_are_refused():
    with pytest.raises(ValueError, match=r"params: 'w' is torch\.float64, expected bfloat16 or float32"):
        stochastically_rounded(sgd(0.1)).init(frozen({"w": torch.ones(1, dtype=torch.float64)}))
