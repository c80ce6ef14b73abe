"""The generator ``run``, beside the loop that it stands for."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from trainkit import LossOutput, init_state, make_train_step, run
from trainkit.execution import compile_step
from trainkit.optim import sgd

LAYER = nn.Linear(2, 1, bias=False)
BATCHES = [torch.tensor([[1.0, 2.0]]) * i for i in range(1, 5)]


def loss(params: Any, buffers: Any, x: Tensor) -> LossOutput:
    return LossOutput((x @ params["weight"].T).square().sum(), len(x))


STEP = make_train_step(loss, sgd(0.01))


def test_is_the_plain_loop() -> None:
    state = init_state(LAYER, sgd(0.01))
    records = list(run(STEP, state, BATCHES))
    for i, batch in enumerate(BATCHES):
        state, metrics = STEP(state, batch)
        assert records[i].step == int(records[i].state.step) == i + 1
        assert records[i].batch is batch
        assert torch.equal(records[i].state.params["weight"], state.params["weight"])
        assert torch.equal(records[i].metrics["loss"].total, metrics["loss"].total)


def test_counts_on_from_the_state() -> None:
    state = init_state(LAYER, sgd(0.01)).replace(step=torch.tensor(41))
    assert [record.step for record in run(STEP, state, BATCHES)] == [42, 43, 44, 45]


def test_takes_a_batch_only_when_it_is_asked_for_one() -> None:
    taken: list[int] = []

    def batches() -> Iterator[Tensor]:
        for i, batch in enumerate(BATCHES):
            taken.append(i)
            yield batch

    loop = run(STEP, init_state(LAYER, sgd(0.01)), batches())
    assert taken == []
    next(loop)
    next(loop)
    assert taken == [0, 1]


def test_an_interrupted_loop_goes_on_from_its_last_record() -> None:
    state = init_state(LAYER, sgd(0.01))
    (*_, whole) = run(STEP, state, BATCHES)
    (_, half) = run(STEP, state, BATCHES[:2])
    (*_, resumed) = run(STEP, half.state, BATCHES[2:])
    assert torch.equal(whole.state.params["weight"], resumed.state.params["weight"])


def test_a_donating_step_may_be_looked_at_in_the_body() -> None:
    step = compile_step(STEP, strategy="eager")
    weights = [record.state.params["weight"].clone() for record in run(step, init_state(LAYER, sgd(0.01)), BATCHES)]
    expected = [record.state.params["weight"] for record in run(STEP, init_state(LAYER, sgd(0.01)), BATCHES)]
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


def test_without_batches_there_is_no_record() -> None:
    assert list(run(STEP, init_state(LAYER, sgd(0.01)), [])) == []
