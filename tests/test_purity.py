"""Steps, gradients and evaluations change nothing that they are given, whatever is composed and wherever they fail.

The composition, its data and the operation that fails are drawn. The slow test draws a thousand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tests.compositions import Composition, compose, compositions
from trainkit import SpentStateError, TrainState, init_state, tree
from trainkit.execution import compile_step
from trainkit.optim import sgd

POISONS = (None, None, None, float("nan"), float("inf"), 1e30)


class Failure(Exception):
    """What a failing operation raises."""


class Operations(TorchDispatchMode):
    """Counts the operations of tensors, and fails at one of them."""

    def __init__(self, failing: int = -1) -> None:
        super().__init__()
        self.count, self.failing = 0, failing

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self.failing:
            raise Failure(f"operation {self.count}, {func}")
        return func(*args, **(kwargs or {}))


def bits(found: Any) -> list[tuple[torch.dtype, tuple[int, ...], bytes]]:
    """What the tensors of a tree hold."""
    leaves = [leaf.detach() for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor)]
    return [(t.dtype, tuple(t.shape), t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()) for t in leaves]


def outcome(fn: Callable[..., Any], state: TrainState, batch: Any) -> tuple[Any, int]:
    """The bits of what a function returns, or the kind of its error; and the number of operations."""
    with Operations() as operations:
        try:
            found = fn(state, batch)
        except FloatingPointError as error:
            return type(error), operations.count
    return bits(found), operations.count


def surroundings() -> list[Any]:
    """What a function could leave behind in the process."""
    return [
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
    ]


@contextmanager
def unchanged(*given: Any) -> Iterator[None]:
    """A scope after which everything is as before."""
    before, around = bits(given), surroundings()
    yield
    assert bits(given) == before
    assert surroundings() == around


def check(made: Composition, values: int, poison: float | None, places: list[float]) -> None:
    """All of purity for one composition."""
    fn, state, batch = compose(made, values, poison)
    with unchanged(state, batch):
        first = outcome(fn, state, batch)
    torch.rand(values % 5)
    with unchanged(state, batch):
        again, count = outcome(fn, state, batch)
    assert again == first[0]
    assert count > 5
    for place in places:
        with unchanged(state, batch), pytest.raises(Failure), Operations(1 + int(place * count)):
            fn(state, batch)
        # It is as usable as before, and has not learned anything false.
        assert outcome(fn, state, batch) == (again, count)


seeds = st.integers(0, 2**32 - 1)
poisons = st.sampled_from(POISONS)
places = st.floats(0, 1, exclude_max=True)


@given(made=compositions(), values=seeds, poison=poisons, where=st.lists(places, max_size=2))
def test_whatever_is_composed_is_pure(made: Composition, values: int, poison: float | None, where: list[float]) -> None:
    check(made, values, poison, where)


@pytest.mark.slow
@settings(max_examples=1000)
@given(made=compositions(), values=seeds, poison=poisons, where=st.lists(places, min_size=1, max_size=3))
def test_a_thousand_compositions_are_pure(
    made: Composition, values: int, poison: float | None, where: list[float]
) -> None:
    check(made, values, poison, where)


@pytest.mark.parametrize("kind", ["step", "gradient", "evaluation"])
def test_every_operation_may_fail(kind: str) -> None:
    made = Composition(
        kind, "statistics", optimizer=1, options=2, clip="norm", plateau=True, precision="fp16",
        gradients="functional", parts=2, transform="ema", rows=(3, 4),
    )  # fmt: skip
    fn, state, batch = compose(made, 5, None)
    outcome(fn, state, batch)
    first, count = outcome(fn, state, batch)
    with unchanged(state, batch):
        for k in range(1, count + 1):
            with pytest.raises(Failure), Operations(k):
                fn(state, batch)
    assert outcome(fn, state, batch) == (first, count)


def check_donating(made: Composition, values: int, place: float) -> None:
    """Where the memory of a state is donated, a failure leaves it whole or says that it is spent."""
    fn, state, batch = compose(made, values, None)
    expected, _ = outcome(fn, state, batch)
    run = compile_step(fn, strategy="eager")
    _, count = outcome(run, tree.clone(state), batch)
    before, donated = bits(state), tree.clone(state)
    with pytest.raises(Failure), Operations(1 + int(place * count)):
        run(donated, batch)
    if not is_spent(donated):
        assert bits(donated) == before
        assert outcome(run, donated, batch)[0] == expected


def is_spent(state: TrainState) -> bool:
    try:
        _ = state.params
    except SpentStateError:
        return True
    return False


donating = compositions().map(lambda made: Composition(**{**vars(made), "kind": "step"}))


@given(made=donating, values=seeds, place=places)
def test_a_donated_state_is_whole_or_spent_after_a_failure(made: Composition, values: int, place: float) -> None:
    check_donating(made, values, place)


@pytest.mark.slow
@settings(max_examples=500)
@given(made=donating, values=seeds, place=places)
def test_five_hundred_donated_states_are_whole_or_spent(made: Composition, values: int, place: float) -> None:
    check_donating(made, values, place)


def test_a_donated_state_is_kept_until_the_update_begins() -> None:
    made = Composition(
        "step", "statistics", optimizer=1, options=2, clip="norm", plateau=True, precision="full",
        gradients="functional", parts=2, transform="ema", rows=(3, 4),
    )  # fmt: skip
    fn, state, batch = compose(made, 5, None)
    run, before = compile_step(fn, strategy="eager"), bits(state)
    _, count = outcome(run, tree.clone(state), batch)
    spent = []
    for k in range(1, count + 1):
        donated = tree.clone(state)
        with pytest.raises(Failure), Operations(k):
            run(donated, batch)
        spent.append(is_spent(donated))
        assert spent[-1] or bits(donated) == before
    # Once a part of it may have been written, it is not given back.
    begun = spent.index(True)
    assert begun > count // 2 and all(spent[begun:])


class TestNoticed:
    """Functions that break a rule, each of which the checks have to notice."""

    STATE = init_state(torch.nn.Linear(2, 1), sgd(0.1))

    @pytest.mark.parametrize(
        "breaks",
        [
            lambda state, batch: state.params["weight"].add_(1),
            lambda state, batch: state.step.add_(1),
            lambda state, batch: batch.mul_(2),
            lambda state, batch: torch.rand(1),
            lambda state, batch: torch.set_grad_enabled(False),
        ],
    )
    def test_what_is_changed(self, breaks: Callable[..., Any]) -> None:
        with torch.random.fork_rng(), torch.enable_grad(), pytest.raises(AssertionError):
            with unchanged(self.STATE, batch := torch.ones(2)):
                breaks(self.STATE, batch)

    def test_another_sign_of_zero_is_another_number(self) -> None:
        assert bits(torch.tensor(0.0)) != bits(torch.tensor(-0.0))
        assert bits(torch.tensor(float("nan"))) == bits(torch.tensor(float("nan")))
        assert bits(torch.ones(2, dtype=torch.bfloat16)) != bits(torch.ones(2, dtype=torch.float16))
