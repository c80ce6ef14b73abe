"""Bad input gets an error that says what to do, before anything changes; or the meaning that is written down for it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from trainkit import (
    LossOutput,
    SpentStateError,
    accumulate,
    functional,
    init_state,
    make_eval_step,
    make_train_step,
    raise_nonfinite,
    run,
    skip_nonfinite,
    value_and_grad,
)
from trainkit.execution import compile_step
from trainkit.losses import causal_lm, module_loss
from trainkit.optim import adamw, sgd
from trainkit.state import write_to

TOKENS = 7


def make_module() -> nn.Module:
    """Three positions; with statistics, which the forward pass writes before the loss looks at the labels."""
    return nn.Sequential(nn.Embedding(TOKENS, 4), nn.BatchNorm1d(3), nn.Linear(4, TOKENS))


def make_batch(rows: int = 4, **changes: Any) -> dict[str, Any]:
    ids = torch.arange(rows * 3).reshape(rows, 3) % TOKENS
    return {"x": ids, "y": ids.clone(), **changes}


MODULE, OPTIMIZER = make_module(), adamw(1e-2)
STEP = make_train_step(module_loss(MODULE, causal_lm, inputs="x", targets="y"), OPTIMIZER, accumulate=2)


@pytest.fixture(scope="module")
def steps() -> dict[str, Any]:
    """The same step, pure and donating, eager and compiled by a good batch."""
    made = {"pure": STEP, "eager": compile_step(STEP, strategy="eager"), "whole": compile_step(STEP, strategy="whole")}
    for step in made.values():
        step(init_state(MODULE, OPTIMIZER), make_batch())
    return made


def contents(state: Any) -> list[bytes]:
    return [leaf.numpy().tobytes() for leaf in pytree.tree_leaves(state)]


with_value = lambda value: torch.tensor([[0, 1, value]] * 4)  # noqa: E731
BAD_BATCHES: dict[str, tuple[dict[str, Any], type[Exception] | tuple[type[Exception], ...], str]] = {
    "no rows": (make_batch(0), ValueError, "batch: it has no rows; drop empty batches in the loader"),
    "unequal rows": (
        make_batch(y=torch.zeros(3, 3)),
        ValueError,
        r"batch: its tensors have \[3, 4\] rows .* expected one",
    ),
    "fewer rows than microbatches": (make_batch(1), ValueError, "batch: 1 rows cannot make 2 microbatches; use n <= 1"),
    "label too large": (make_batch(y=with_value(TOKENS)), (ValueError, IndexError), "label.* 7.* expected 0 to 6"),
    "negative label": (make_batch(y=with_value(-1)), (ValueError, IndexError), "label.* -1.* expected 0 to 6"),
    "token too large": (
        make_batch(x=with_value(TOKENS)),
        IndexError,
        "index out of range in self|token is 7, .* 0 to 6",
    ),
    "negative token": (make_batch(x=with_value(-1)), IndexError, "index out of range in self|token is -1, .* 0 to 6"),
    "labels of another shape": (
        make_batch(y=torch.zeros(4, 2).long()),
        ValueError,
        r"labels: shape \(2, 2\) for logits",
    ),
    "labels that are numbers": (
        make_batch(y=torch.rand(4, 3)),
        TypeError,
        "labels: dtype torch.float32, expected integers",
    ),
    "tokens that are numbers": (
        make_batch(x=torch.rand(4, 3)),
        RuntimeError,
        "Expected .*indices.* scalar types: Long, Int",
    ),
    "no labels": ({"x": make_batch()["x"]}, KeyError, "batch: no field 'y' among 'x'"),
    "a tensor": (make_batch()["x"], TypeError, "batch: got Tensor, expected a mapping or a record with a field"),
}


@pytest.mark.parametrize("execution", ["pure", "eager", "whole"])
@pytest.mark.parametrize("name", BAD_BATCHES)
def test_a_bad_batch_is_refused_and_the_state_stays(steps: dict[str, Any], name: str, execution: str) -> None:
    batch, kind, message = BAD_BATCHES[name]
    state = init_state(MODULE, OPTIMIZER)
    before = contents(state)
    with pytest.raises(kind, match=message):
        steps[execution](state, batch)
    assert contents(state) == before
    after, _ = steps[execution](state, make_batch())
    assert int(after.step) == 1


# -- what a loss may return ----------------------------------------------------------------------------------------

LINEAR = nn.Linear(2, 1)
predict = functional(LINEAR)


def total(params: Any, buffers: Any, x: Tensor) -> Tensor:
    return predict(params, buffers, x)[0].sum()


BAD_LOSSES: dict[str, tuple[Callable[..., Any], type[Exception], str]] = {
    "no weight": (lambda *args: total(*args), TypeError, "loss: returned Tensor, expected LossOutput.*for a mean"),
    "a tuple": (lambda *args: (total(*args), 3), TypeError, "loss: returned tuple, expected LossOutput"),
    "nothing": (lambda *args: None, TypeError, "loss: returned NoneType, expected LossOutput"),
    "a sum per row": (
        lambda p, b, x: LossOutput(predict(p, b, x)[0], 3),
        TypeError,
        r"loss_sum is torch.float32 of shape \(3, 1\)",
    ),
    "a number": (lambda *args: LossOutput(1.0, 3), TypeError, "loss_sum is float, expected a floating tensor"),
    "an integer": (lambda *args: LossOutput(total(*args).long(), 3), TypeError, "loss_sum is torch.int64 of shape"),
    "a weight per row": (
        lambda *args: LossOutput(total(*args), torch.ones(3)),
        TypeError,
        r"weight has shape \(3,\), expected \(\)",
    ),
    "detached": (
        lambda *args: LossOutput(total(*args).detach(), 3),
        ValueError,
        "loss_sum does not depend on the parameters. Use the params",
    ),
    "own module": (lambda p, b, x: LossOutput(x.sum(), 3), ValueError, "loss_sum does not depend on the parameters"),
    "a parameter left out": (
        lambda p, b, x: LossOutput((p["weight"] * x).sum(), 3),
        ValueError,
        "no gradient reached bias. Freeze them",
    ),
}


@pytest.mark.parametrize("execution", ["pure", "eager"])
@pytest.mark.parametrize("name", BAD_LOSSES)
def test_a_bad_loss_is_named_and_the_state_stays(name: str, execution: str) -> None:
    loss, kind, message = BAD_LOSSES[name]
    step = make_train_step(loss, sgd(0.1))
    if execution == "eager":
        step = compile_step(step, strategy="eager")
    state = init_state(LINEAR, sgd(0.1))
    before = contents(state)
    with pytest.raises(kind, match=message):
        step(state, torch.ones(3, 2))
    assert contents(state) == before


def test_the_weight_is_not_optional() -> None:
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'weight'"):
        LossOutput(torch.ones(()))  # type: ignore[call-arg]


def test_an_evaluation_refuses_the_same_losses() -> None:
    state = init_state(LINEAR, sgd(0.1))
    with pytest.raises(TypeError, match="loss: returned Tensor, expected LossOutput"):
        make_eval_step(total)(state, torch.ones(3, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch: it has no rows"):
        make_eval_step(lambda *args: LossOutput(total(*args), 3))(state, torch.ones(0, 2))


def test_parameters_that_are_used_by_turns_may_have_no_gradient() -> None:
    loss = BAD_LOSSES["a parameter left out"][0]
    state = init_state(LINEAR, sgd(0.1))
    after, _ = make_train_step(loss, sgd(0.1), unused="zero")(state, torch.ones(3, 2))
    assert torch.equal(after.params["bias"], state.params["bias"])
    assert not torch.equal(after.params["weight"], state.params["weight"])
    with pytest.raises(ValueError, match="unused: got 'ignore', expected 'error', 'zero' or 'omit'"):
        value_and_grad(loss, unused="ignore")


# -- numbers that are none -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("execution", ["pure", "eager", "whole"])
def test_a_batch_that_weighs_nothing_moves_nothing(steps: dict[str, Any], execution: str) -> None:
    step = steps[execution]
    state = init_state(MODULE, OPTIMIZER)
    before = {name: p.clone() for name, p in state.params.items()}
    after, metrics = step(state, make_batch(y=torch.full((4, 3), -100)))
    # AdamW decays the weights all the same; its moments stay zero.
    for name, p in after.params.items():
        torch.testing.assert_close(p, before[name] * (1 - 1e-2 * 1e-2))
    assert not any(m.any() for m in after.opt_state["exp_avg"].values())
    assert float(metrics["loss"].weight) == 0
    assert bool(metrics["loss"].compute().isnan())
    _, following = step(after, make_batch())
    assert bool(following["loss"].compute().isfinite())


NAN = torch.tensor([[1.0, float("nan")]])


def test_a_loss_that_is_nan_can_stop_the_run_with_the_state_before_it() -> None:
    state = init_state(LINEAR, sgd(0.1))
    step = raise_nonfinite(make_train_step(lambda *args: LossOutput(total(*args), 1), sgd(0.1)))
    with pytest.raises(FloatingPointError, match="step 1: loss is nan") as caught:
        step(state, NAN)
    assert caught.value.state is state  # type: ignore[attr-defined]


def test_a_loss_that_is_nan_can_be_skipped() -> None:
    state = init_state(LINEAR, sgd(0.1))
    step = skip_nonfinite(make_train_step(lambda *args: LossOutput(total(*args), 1), sgd(0.1)))
    after, _ = step(state, NAN)
    assert contents(after.params) == contents(state.params)


# -- models and states ---------------------------------------------------------------------------------------------


def test_a_model_has_something_to_train() -> None:
    with pytest.raises(ValueError, match="module: ReLU has 0 parameters and none of them is trainable"):
        init_state(nn.ReLU(), sgd(0.1))
    with pytest.raises(
        ValueError, match=r"module: Linear has 2 parameters and none .* at least one with requires_grad"
    ):
        init_state(nn.Linear(2, 1).requires_grad_(False), sgd(0.1))
    with pytest.raises(ValueError, match="parameter 'weight' is on the meta device; materialise it first"):
        init_state(nn.Linear(2, 1, device="meta"), sgd(0.1))


def test_a_state_of_another_model_is_refused() -> None:
    other = init_state(nn.Linear(2, 1, bias=False), sgd(0.1))
    with pytest.raises(KeyError, match=r"lack 'bias' .* that the module has"):
        predict(other.params, other.buffers, torch.ones(3, 2))
    own, without_bias = init_state(LINEAR, sgd(0.1)), functional(nn.Linear(2, 1, bias=False))
    with pytest.raises(KeyError, match=r"hold 'bias' .* that the module does not have"):
        without_bias(own.params, own.buffers, torch.ones(3, 2))
    with pytest.raises(KeyError, match="module has no parameter or buffer 'weight'; is the state another model's"):
        write_to(nn.ReLU(), other)


def test_a_spent_state_is_refused_by_the_next_step() -> None:
    step = compile_step(STEP, strategy="eager")
    state = init_state(MODULE, OPTIMIZER)
    after, _ = step(state, make_batch())
    for use in (lambda: step(state, make_batch()), lambda: STEP(state, make_batch()), lambda: state.replace(key=0)):
        with pytest.raises(SpentStateError, match=r"given to a compiled step, which reused its memory\."):
            use()
    assert int(step(after, make_batch())[0].step) == 2


def test_a_state_refuses_writes() -> None:
    state = init_state(LINEAR, sgd(0.1))
    for part in (state.params, state.buffers, state.opt_state, state.extra):
        with pytest.raises(RuntimeError, match="lock"):
            part["weight"] = torch.zeros(1, 2)
    with pytest.raises(AttributeError, match="cannot assign to field 'step'"):
        state.step = torch.ones(())  # type: ignore[misc]
    with pytest.raises(AttributeError, match="TrainState has no attribute 'momentum'"):
        _ = state.momentum


# -- arguments -----------------------------------------------------------------------------------------------------


def test_microbatches_are_counted() -> None:
    gradient = value_and_grad(lambda *args: LossOutput(total(*args), 3))
    state = init_state(LINEAR, sgd(0.1))
    with pytest.raises(ValueError, match="n: got 0, expected at least 1 microbatch"):
        accumulate(gradient, 0)
    with pytest.raises(ValueError, match="batch: 2 rows cannot make 3 microbatches; use n <= 2 or a larger batch"):
        accumulate(gradient, 3)(state, torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"batch: got Tensor, expected a non-empty list of microbatches; pass n"):
        accumulate(gradient)(state, torch.ones(2, 2))
    with pytest.raises(ValueError, match="batch: got list of length 0, expected a non-empty list"):
        accumulate(gradient)(state, [])
    with pytest.raises(ValueError, match="batch: its tensors have no rows"):
        accumulate(gradient, 2)(state, torch.ones(()))


def test_a_step_advances() -> None:
    state = init_state(LINEAR, sgd(0.1))
    with pytest.raises(ValueError, match="step: returned a state at step 0 after 0; a StepFn must advance"):
        next(run(lambda state, batch: (state, {}), state, [torch.ones(1)]))
