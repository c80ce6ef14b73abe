"""Accumulation: lists and splits, buffers in order, metrics merged. (Its law is in test_laws.py.)"""

import pytest
import torch
from torch import nn

from trainkit import accumulate, functional, init_state, make_train_step, value_and_grad
from trainkit.accumulate import num_rows, split_batch
from trainkit.losses import classification, mean_squared_error, module_loss
from trainkit.metrics import accuracy
from trainkit.optim import sgd


def test_a_ragged_list_gives_the_gradient_of_the_mean_over_all_rows():
    torch.manual_seed(0)
    net = nn.Linear(4, 3).double()
    x, y = torch.randn(10, 4).double(), torch.randint(0, 3, (10,))
    parts = [(x[:7], y[:7]), (x[7:8], y[7:8]), (x[8:], y[8:])]
    step = make_train_step(module_loss(net, classification), sgd(0.5), accumulate=None)
    after, metrics = step(init_state(net, sgd(0.5)), parts)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    expected = nn.functional.cross_entropy(net(x), y)
    expected.backward()
    optimizer.step()
    for name, p in net.named_parameters():
        torch.testing.assert_close(after.params[name], p.detach())
    torch.testing.assert_close(metrics["loss"].compute(), expected.detach())


def test_batch_norm_statistics_pass_through_the_microbatches_in_order():
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))
    x, y = torch.randn(9, 4), torch.randn(9, 1)
    state = init_state(net, sgd(0.1))
    found = accumulate(value_and_grad(module_loss(net, mean_squared_error)), 3)(state, (x, y))
    for part in x.chunk(3):
        net(part)
    for name, expected in net.named_buffers():
        torch.testing.assert_close(found.buffers[name], expected)


def test_metrics_are_those_of_the_whole_batch():
    net = nn.Linear(4, 3)
    x, y = torch.randn(11, 4), torch.randint(0, 3, (11,))
    loss = module_loss(net, lambda logits, labels: classification(logits, labels, metrics={"accuracy": accuracy}))
    state = init_state(net, sgd(0.1))
    found = accumulate(value_and_grad(loss), 4)(state, (x, y))
    logits, _ = functional(net)(state.params, state.buffers, x)
    expected = (logits.argmax(-1) == y).float().mean()
    torch.testing.assert_close(found.metrics["accuracy"].compute().float(), expected)


def test_each_microbatch_draws_its_own_mask():
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 1, bias=False))
    state = init_state(net, sgd(0.1), seed=1)
    same = torch.ones(2, 64)
    g = value_and_grad(module_loss(net, lambda out: mean_squared_error(out, torch.zeros_like(out)), targets=()))
    first, both = accumulate(g, 1)(state, (same[:1],)), accumulate(g, 2)(state, (same,))
    assert float(both.loss_sum) != pytest.approx(2 * float(first.loss_sum))


def test_splitting():
    batch = {"x": torch.arange(7), "n": torch.tensor(3.0), "name": "kept"}
    parts = split_batch(batch, 3)
    assert [part["x"].tolist() for part in parts] == [[0, 1, 2], [3, 4], [5, 6]]
    assert all(part["n"] is batch["n"] and part["name"] == "kept" for part in parts)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(0, 2), "it has no rows"),
        ((torch.zeros(2), torch.zeros(3)), r"have \[2, 3\] rows"),
        ({"a": torch.tensor(1.0)}, "have no rows"),
    ],
)
def test_batches_without_a_number_of_rows(batch, message):
    with pytest.raises(ValueError, match=message):
        num_rows(batch)


def test_bad_arguments():
    gradient = value_and_grad(module_loss(nn.Linear(2, 1), mean_squared_error))
    state = init_state(nn.Linear(2, 1), sgd(0.1))
    with pytest.raises(ValueError, match="n: got 0, expected at least 1"):
        accumulate(gradient, 0)
    with pytest.raises(ValueError, match="batch: 2 rows cannot make 3 microbatches"):
        accumulate(gradient, 3)(state, (torch.ones(2, 2), torch.ones(2, 1)))
    for batch in ([], torch.ones(2, 2)):
        with pytest.raises(ValueError, match="expected a non-empty list of microbatches"):
            accumulate(gradient)(state, batch)
