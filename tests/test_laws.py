"""The laws that hold for every composition, one class each, stated as properties and tried on drawn examples.

1. Purity: a step leaves what it is given as it was, and its result depends on nothing else.
2. Donation is explicit: only a compiled step takes the memory of its state, and that state is spent.
3. Accumulation: a batch in parts has the gradient of the whole batch.
4. Execution does not change meaning.
5. Population: stacked states equal separate runs.

Each class ends with what it caught when the code was broken on purpose to try it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from trainkit import (
    LossOutput,
    SpentStateError,
    TrainState,
    accumulate,
    apply_updates,
    functional,
    init_state,
    make_train_step,
    value_and_grad,
)
from trainkit.execution import compile_step
from trainkit.execution.activation import remat
from trainkit.execution.population import member_value_and_grad, over_population, stack_states, unstack_states
from trainkit.metrics import Mean
from trainkit.optim import adamw, chain, clip_by_global_norm, sgd
from trainkit.transforms import init_ema, with_ema

seeds = st.integers(0, 2**32 - 1)
Batch = dict[str, Tensor]


class Net(nn.Module):
    """Buffers that the forward pass writes, and dropout if asked for."""

    def __init__(self, dropout: float = 0.0, statistics: bool = True) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 8, bias=False), nn.BatchNorm1d(8) if statistics else nn.LayerNorm(8))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(torch.tanh(self.body(x))))


def loss_of(module: nn.Module) -> Callable[..., LossOutput]:
    """Cross entropy over weighted rows."""
    model = functional(module)

    def loss(params: Any, buffers: Any, batch: Batch) -> LossOutput:
        logits, buffers = model(params, buffers, batch["x"])
        losses = F.cross_entropy(logits, batch["y"], reduction="none") * batch["w"]
        right = (logits.argmax(-1) == batch["y"]) * batch["w"]
        total = batch["w"].sum()
        return LossOutput(losses.sum(), total, {"accuracy": Mean(right.sum(), total)}, buffers)

    return loss


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_batch(seed: int, rows: int = 6, dtype: torch.dtype = torch.float32) -> Batch:
    g = drawn(seed)
    return {
        "x": torch.randn(rows, 3, generator=g).to(dtype),
        "y": torch.randint(0, 4, (rows,), generator=g),
        "w": torch.randint(1, 9, (rows,), generator=g).to(dtype) / 4,
    }


def with_values(state: TrainState, seed: int) -> TrainState:
    """The state with other parameters and another key."""
    g = drawn(seed)
    params = {name: torch.randn(p.shape, generator=g).to(p.dtype) / 2 for name, p in state.params.items()}
    return state.replace(params=like(state.params, params), key=torch.tensor(seed))


def like(tree: Any, entries: dict[str, Tensor]) -> Any:
    return pytree.tree_unflatten(list(entries.values()), pytree.tree_structure(tree))


def tensors(*trees: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(trees) if isinstance(leaf, Tensor)]


def copies(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, torch.clone, tree)


def same_bits(a: Any, b: Any) -> bool:
    pairs = zip(tensors(a), tensors(b), strict=True)
    return all(x.dtype == y.dtype and x.numpy().tobytes() == y.numpy().tobytes() for x, y in pairs)


def assert_close(a: Any, b: Any, **tolerance: float) -> None:
    for x, y in zip(tensors(a), tensors(b), strict=True):
        torch.testing.assert_close(x, y, **tolerance)


# -- 1 -------------------------------------------------------------------------------------------------------------


@functools.cache
def noisy() -> tuple[Callable[..., Any], TrainState]:
    """A step with everything that could remember or draw: statistics, dropout, moments, an average, microbatches."""
    net = Net(dropout=0.5)
    tx = chain(clip_by_global_norm(1.0), adamw(1e-2))
    step = with_ema(make_train_step(loss_of(net), tx, accumulate=2), 0.9)
    return step, init_ema(init_state(net, tx))


class TestPurity:
    """Caught: statistics written into the given buffers; tensors handed out without a copy; generators that are not
    set, or not put back; a seed that counts calls, or does not count steps or microbatches."""

    @given(seeds, seeds, seeds)
    def test_what_is_given_stays_as_it_was(self, values: int, data: int, disturbance: int) -> None:
        step, first = noisy()
        state, batch = with_values(first, values), make_batch(data)
        before = copies((state, batch))
        torch.manual_seed(disturbance)
        random_state = torch.get_rng_state()
        after, _ = step(state, batch)
        assert same_bits(before, (state, batch))
        assert torch.equal(random_state, torch.get_rng_state())
        # And the result shares no tensor that changed: writing into it would otherwise change the past.
        changed = [new for old, new in zip(tensors(state), tensors(after), strict=True) if not same_bits(old, new)]
        assert len(changed) > 10
        assert not {t.data_ptr() for t in changed} & {t.data_ptr() for t in tensors(state, batch)}

    @given(seeds, seeds, st.lists(seeds, max_size=3), seeds)
    def test_the_result_depends_on_state_and_batch_alone(
        self, values: int, data: int, history: list[int], disturbance: int
    ) -> None:
        step, first = noisy()
        state, batch = with_values(first, values), make_batch(data)
        once = step(state, batch)
        for seed in history:
            step(with_values(first, seed), make_batch(seed, rows=4))
        torch.manual_seed(disturbance)
        torch.rand(disturbance % 7)
        assert same_bits(once, step(state, batch))

    @given(seeds, seeds)
    def test_key_and_step_decide_the_draws(self, values: int, data: int) -> None:
        step, first = noisy()
        state, batch = with_values(first, values), make_batch(data)
        losses = {
            float(step(other, batch)[1]["loss"].total)
            for other in (state, state.replace(key=state.key + 1), state.replace(step=state.step + 1))
        }
        assert len(losses) == 3

    @given(seeds, seeds)
    def test_microbatches_draw_apart(self, values: int, data: int) -> None:
        gradient, batch = value_and_grad(loss_of(Net(dropout=0.5))), make_batch(data)
        state = with_values(noisy()[1], values)
        once = accumulate(gradient)(state, [batch]).loss_sum
        assert float(accumulate(gradient)(state, [batch, batch]).loss_sum) != float(once + once)


# -- 2 -------------------------------------------------------------------------------------------------------------


class TestDonation:
    """Caught: a state that is not marked as spent, or in part; a step that copies instead of writing over; a transform
    that runs its step as if nothing were donated; donation that was not asked for; metrics in the state's memory."""

    @given(seeds, seeds)
    def test_a_donating_step_writes_over_the_state_and_gives_the_bits_of_the_pure_one(
        self, values: int, data: int
    ) -> None:
        step, first = noisy()
        state, batch = with_values(first, values), make_batch(data)
        expected = step(state, batch)
        given_state = copies(state)
        memory = [t.data_ptr() for t in tensors(given_state)]
        run = compile_step(step, strategy="eager")
        found = run(given_state, batch)
        assert same_bits(expected, found)
        assert [t.data_ptr() for t in tensors(found[0])] == memory
        # What was reported lies elsewhere: the next step writes over the state only.
        run(found[0], batch)
        assert same_bits(expected[1], found[1])

    @pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(TrainState)])
    def test_a_spent_state_says_so(self, field: str) -> None:
        step, first = noisy()
        state = copies(first)
        compile_step(step, strategy="eager")(state, make_batch(0))
        with pytest.raises(SpentStateError, match=f"state.{field}: .* Use the state that the step returned"):
            getattr(state, field)

    @given(seeds, seeds)
    def test_without_donation_the_state_is_kept(self, values: int, data: int) -> None:
        step, first = noisy()
        state, batch = with_values(first, values), make_batch(data)
        before = copies(state)
        found = compile_step(step, strategy="eager", donate=False)(state, batch)
        assert same_bits(before, state)
        assert same_bits(step(state, batch), found)


# -- 3 -------------------------------------------------------------------------------------------------------------


@functools.cache
def summed() -> tuple[Callable[..., Any], TrainState]:
    """A gradient in float64, of a model whose rows do not see each other."""
    net = Net(statistics=False).double()
    return value_and_grad(loss_of(net)), init_state(net, sgd(0.1))


@st.composite
def weighted_parts(draw: st.DrawFn) -> tuple[list[int], list[float]]:
    """Sizes of microbatches, and a weight per row; whole parts may weigh nothing."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    weights = [
        draw(st.sampled_from([0.0, 1.0, 0.25, 3.0]) if draw(st.booleans()) else st.just(0.0)) for _ in range(sum(sizes))
    ]
    return sizes, weights


class TestAccumulation:
    """Caught: weights that are not added up; the first part counted twice; a last part or a remainder left out;
    metrics of the last part only; a mean over parts; a division by anything but the weight, or by zero."""

    @given(seeds, seeds, weighted_parts())
    def test_a_list_of_parts_has_the_gradient_of_the_whole(
        self, values: int, data: int, parts: tuple[list[int], list[float]]
    ) -> None:
        sizes, weights = parts
        gradient, state, batch = self.case(values, data, weights)
        columns = {name: torch.split(t, sizes) for name, t in batch.items()}
        microbatches = [{name: column[i] for name, column in columns.items()} for i in range(len(sizes))]
        whole, found = gradient(state, batch), accumulate(gradient)(state, microbatches)
        assert_close(self.contents(found), self.contents(whole), rtol=1e-12, atol=1e-12)

    @given(seeds, seeds, weighted_parts(), st.integers(1, 20))
    def test_any_number_of_parts_has_the_gradient_of_the_whole(
        self, values: int, data: int, parts: tuple[list[int], list[float]], n: int
    ) -> None:
        gradient, state, batch = self.case(values, data, parts[1])
        assume(n <= len(batch["w"]))
        whole, found = gradient(state, batch), accumulate(gradient, n)(state, batch)
        assert_close(self.contents(found), self.contents(whole), rtol=1e-12, atol=1e-12)

    @given(seeds, seeds, weighted_parts(), st.integers(1, 20))
    def test_any_number_of_parts_makes_the_update_of_the_mean_over_the_whole(
        self, values: int, data: int, parts: tuple[list[int], list[float]], n: int
    ) -> None:
        gradient, state, batch = self.case(values, data, parts[1])
        assume(n <= len(batch["w"]))
        found, metrics = apply_updates(accumulate(gradient, n), sgd(0.5))(state, batch)
        whole = gradient(state, batch)
        # A weight of zero is a mean over nothing, which moves nothing.
        mean = {name: g / (sum(parts[1]) or 1.0) for name, g in whole.grads.items()}
        expected = {name: p - 0.5 * mean[name] for name, p in state.params.items()}
        assert_close(found.params, like(found.params, expected), rtol=1e-12, atol=1e-14)
        assert_close((metrics["loss"], metrics["accuracy"]), (Mean(whole.loss_sum, whole.weight), whole.metrics))

    @staticmethod
    def case(values: int, data: int, weights: list[float]) -> tuple[Callable[..., Any], TrainState, dict[str, Tensor]]:
        gradient, first = summed()
        batch = make_batch(data, len(weights), torch.float64)
        return gradient, with_values(first, values), {**batch, "w": torch.tensor(weights, dtype=torch.float64)}

    @staticmethod
    def contents(gradients: Any) -> Any:
        return gradients.grads, gradients.loss_sum, gradients.weight, gradients.metrics


# -- 4 -------------------------------------------------------------------------------------------------------------

RATE = torch.tensor(0.1, dtype=torch.float64)
"""The learning rate of this law's steps, which differs between examples."""
GRAPHS = {"eager": 0, "split": 2, "whole": 1, "eager, recomputing": 0, "whole, recomputing": 1}
"""How many graphs each execution has, and compiles in the course of all examples."""


@pytest.fixture(scope="module")
def executions() -> dict[str, Any]:
    """The first state and, by name, a step beside what runs it; each is compiled in its first example."""
    net = Net().double()
    tx = chain(clip_by_global_norm(1.0), adamw(lambda count: RATE / (1 + count)))
    parts = with_ema(make_train_step(loss_of(net), tx, accumulate=2), 0.9)
    # A graph takes only one backward pass that recomputes, so this step has no microbatches.
    whole = with_ema(make_train_step(loss_of(net), tx), 0.9)
    recomputing = with_ema(make_train_step(remat(loss_of(net), net, "body"), tx), 0.9)
    return {
        "first": init_ema(init_state(net, tx)),
        "eager": (parts, compile_step(parts, strategy="eager")),
        "split": (parts, compile_step(parts, strategy="split")),
        "whole": (parts, compile_step(parts, strategy="whole")),
        "eager, recomputing": (whole, compile_step(recomputing, strategy="eager")),
        "whole, recomputing": (whole, compile_step(recomputing, strategy="whole")),
    }


class TestExecution:
    """In float64, where rounding in another order cannot be taken for another meaning.

    Caught: another epsilon in one execution; a warm-up from a rate of zero, whose update was NaN where a gradient is
    zero; a microbatch, the clipping or the average missing in a graph; memory that is not written back; statistics
    written again by a recomputation; a graph that is compiled again for another step."""

    @pytest.mark.parametrize("name", GRAPHS)
    @given(values=seeds, data=seeds, rate=st.just(0.0) | st.floats(1e-4, 0.5), step=st.integers(0, 2**40))
    @example(values=0, data=0, rate=0.0, step=0)
    def test_the_numbers_are_those_of_the_pure_step_and_no_value_recompiles(
        self, executions: dict[str, Any], name: str, values: int, data: int, rate: float, step: int
    ) -> None:
        RATE.fill_(rate)
        pure, run = executions[name]
        state = with_values(executions["first"], values).replace(step=torch.tensor(step))
        other = copies(state)
        memory = [t.data_ptr() for t in tensors(other)]
        for i in range(3):
            batch = make_batch(data + i, dtype=torch.float64)
            # An input that is always zero: its weights have a gradient of zero.
            batch["x"][:, 0] = 0.0
            state, expected = pure(state, batch)
            other, found = run(other, batch)
            assert_close(found, expected, rtol=1e-6, atol=1e-8)
        assert_close(other, state, rtol=1e-6, atol=1e-8)
        assert [t.data_ptr() for t in tensors(other)] == memory
        explanation = run.explain()
        assert (explanation.strategy, explanation.compilations) == (name.partition(",")[0], GRAPHS[name])


# -- 5 -------------------------------------------------------------------------------------------------------------


@functools.cache
def members() -> tuple[Callable[..., Any], Callable[..., Any], TrainState]:
    """The step for members of a population, the step for separate runs, and a state."""
    net = Net()
    tx = chain(clip_by_global_norm(1.0), adamw(1e-2, eps=1e-3))
    stacked = make_train_step(loss_of(net), tx, accumulate=2, gradients=member_value_and_grad)
    return stacked, make_train_step(loss_of(net), tx, accumulate=2), init_state(net, tx)


class TestPopulation:
    """Caught: statistics that are not kept; the first member in the place of all; one batch in the place of each
    member's own."""

    @given(st.lists(seeds, min_size=1, max_size=4), seeds, st.booleans())
    def test_stacked_states_equal_separate_runs(self, values: list[int], data: int, own_batches: bool) -> None:
        step, alone, first = members()
        states = [with_values(first, seed) for seed in values]
        population = stack_states(states)
        run = over_population(step, batch_dim=0 if own_batches else None)
        for i in range(2):
            batches = [make_batch(data + i + own_batches * 7 * member) for member in range(len(states))]
            batch = pytree.tree_map(lambda *t: torch.stack(t), *batches) if own_batches else batches[0]
            population, metrics = run(population, batch)
            pairs = [alone(state, own) for state, own in zip(states, batches, strict=True)]
            states = [state for state, _ in pairs]
            expected = pytree.tree_map(lambda *t: torch.stack(t), *(metrics for _, metrics in pairs))
            assert_close(metrics, expected, rtol=1e-4, atol=1e-5)
        for member, state in zip(unstack_states(population), states, strict=True):
            assert_close(member, state, rtol=1e-3, atol=1e-5)
