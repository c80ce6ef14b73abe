"""Splitting batches and adding up what their parts give."""

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from trainkit import LossOutput, accumulate, functional, init_state, make_train_step, value_and_grad
from trainkit.accumulate import merge_metrics, num_rows, split_batch
from trainkit.metrics import Latest, Mean
from trainkit.optim import sgd
from trainkit.rng import fold_in_host


def make_loss(module: nn.Module) -> Any:
    model = functional(module)

    def loss(params: Any, buffers: Any, x: Tensor) -> LossOutput:
        out, buffers = model(params, buffers, x)
        return LossOutput(out.square().sum(), len(x), {"rows": Mean(out.sum(), torch.tensor(len(x)))}, buffers)

    return loss


@pytest.mark.parametrize(("rows", "n"), [(1, 1), (5, 1), (5, 2), (5, 5), (7, 3), (8, 4)])
def test_parts_differ_by_at_most_one_row_and_join_to_the_batch(rows: int, n: int) -> None:
    batch = {"x": torch.arange(rows), "pair": (torch.randn(rows, 2), "name"), "rate": torch.tensor(0.1)}
    parts = split_batch(batch, n)
    sizes = [len(part["x"]) for part in parts]
    assert (len(parts), sum(sizes)) == (n, rows)
    assert max(sizes) - min(sizes) <= 1
    assert torch.equal(torch.cat([part["x"] for part in parts]), batch["x"])
    assert torch.equal(torch.cat([part["pair"][0] for part in parts]), batch["pair"][0])
    # What has no rows goes to every part whole.
    assert all(part["rate"] is batch["rate"] and part["pair"][1] == "name" for part in parts)


def test_a_tensordict_is_a_batch_too() -> None:
    batch = TensorDict({"x": torch.arange(5)}, batch_size=[5])
    parts = split_batch(batch, 2)
    assert [part["x"].tolist() for part in parts] == [[0, 1, 2], [3, 4]]
    assert num_rows(batch) == 5


def test_statistics_pass_from_part_to_part_as_in_a_plain_loop() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    state = init_state(module, sgd(0.1))
    parts = [torch.randn(rows, 2) for rows in (4, 2, 3)]
    found = accumulate(value_and_grad(make_loss(module)))(state, parts)
    module.zero_grad()
    for part in parts:
        module(part).square().sum().backward()
    for name, p in module.named_parameters():
        torch.testing.assert_close(found.grads[name], p.grad)
    for name, b in module.named_buffers():
        torch.testing.assert_close(found.buffers[name], b)


def test_every_part_draws_its_own_dropout_from_the_key() -> None:
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 1, bias=False))
    state = init_state(module, sgd(0.1), seed=3)
    x = torch.ones(6, 4)
    found = accumulate(value_and_grad(make_loss(module)), 3)(state, x)
    total = torch.zeros(())
    for i, part in enumerate(x.chunk(3)):
        torch.manual_seed(fold_in_host(fold_in_host(3, i), 0, 0) % 2**64)
        total += module(part).square().sum()
    torch.testing.assert_close(found.loss_sum, total.detach())


def test_the_first_gradient_is_not_written_over() -> None:
    kept = []

    def gradient(state: Any, batch: Any) -> Any:
        kept.append(value_and_grad(make_loss(module))(state, batch))
        return kept[-1]

    module = nn.Linear(2, 1)
    state, x = init_state(module, sgd(0.1)), torch.randn(4, 2)
    accumulate(gradient, 2)(state, x)
    torch.testing.assert_close(kept[0].loss_sum, value_and_grad(make_loss(module))(state, x[:2]).loss_sum)


@pytest.mark.parametrize("n", [2, 5])
def test_an_accumulated_update_is_the_update_of_the_whole_batch(n: int) -> None:
    module = nn.Linear(2, 3)
    state, x = init_state(module, sgd(0.1)), torch.randn(5, 2)
    whole, expected = make_train_step(make_loss(module), sgd(0.1))(state, x)
    parts, found = make_train_step(make_loss(module), sgd(0.1), accumulate=n)(state, x)
    torch.testing.assert_close(parts.params["weight"], whole.params["weight"])
    torch.testing.assert_close(found["loss"].compute(), expected["loss"].compute())
    torch.testing.assert_close(found["rows"].compute(), expected["rows"].compute())
    assert int(parts.step) == 1


def test_metrics_merge_by_name_and_pass_where_one_part_has_none() -> None:
    one = {"loss": Mean(torch.tensor(2.0), torch.tensor(1.0)), "rate": Latest(torch.tensor(0.1))}
    two = {"loss": Mean(torch.tensor(4.0), torch.tensor(3.0)), "rate": Latest(torch.tensor(0.2)), "extra": one["loss"]}
    merged = merge_metrics(one, two)
    assert list(merged) == ["loss", "rate", "extra"]
    assert float(merged["loss"].compute()) == 1.5
    assert float(merged["rate"].compute()) == pytest.approx(0.2)
    assert list(one) == ["loss", "rate"]
