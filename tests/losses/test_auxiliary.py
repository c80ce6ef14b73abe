"""Losses out of losses, beside the sums written out."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainkit import LossOutput, accumulate, init_state, value_and_grad
from trainkit.losses import (
    add_loss,
    add_penalty,
    classification,
    huggingface_loss,
    l2_penalty,
    label_smoothing,
    module_loss,
    neftune,
)
from trainkit.metrics import Sum
from trainkit.optim import sgd


def _batch() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(6, 3, generator=g), torch.tensor([0, 1, -100, 3, -100, -100])


def _entropy(net: nn.Module) -> Any:
    """A second loss over all rows, ignored or not."""

    def criterion(logits: Tensor, labels: Tensor) -> LossOutput:
        rows = (logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
        return LossOutput(rows.sum(), len(rows), {"rows": Sum(torch.tensor(len(rows)))})

    return module_loss(net, criterion)


@pytest.mark.parametrize("weight", [0.3, torch.tensor(0.3)])
def test_the_means_add_up(weight: Any) -> None:
    net = nn.Linear(3, 4)
    x, y = _batch()
    state = init_state(net, sgd(0.1))
    loss = add_loss(module_loss(net, classification), _entropy(net), weight, "entropy")
    found = value_and_grad(loss)(state, (x, y))
    logits = net(x)
    negative_entropy = (logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    mean = F.cross_entropy(logits, y) + 0.3 * negative_entropy
    mean.backward()
    assert found.weight == 3
    torch.testing.assert_close(found.loss_sum / found.weight, mean.detach())
    torch.testing.assert_close(found.grads["weight"] / found.weight, net.weight.grad)
    torch.testing.assert_close(found.metrics["entropy"].compute(), negative_entropy.detach())
    assert found.metrics["entropy/rows"].compute() == 6


def test_losses_that_weigh_alike_add_up_over_any_split() -> None:
    net = nn.Linear(3, 4)
    state = init_state(net, sgd(0.1))
    gradient = value_and_grad(
        add_loss(module_loss(net, classification), module_loss(net, classification), 0.3, "again")
    )
    whole, parts = gradient(state, _batch()), accumulate(gradient, 4)(state, _batch())
    torch.testing.assert_close(parts.grads["weight"], whole.grads["weight"])
    torch.testing.assert_close(parts.metrics["again"].compute(), whole.metrics["again"].compute())


def test_an_auxiliary_loss_without_weight_adds_nothing() -> None:
    net = nn.Linear(3, 4)
    state = init_state(net, sgd(0.1))
    x, y = _batch()
    nothing = module_loss(net, classification, targets=lambda batch: torch.full_like(batch[1], -100))
    plain = module_loss(net, classification)
    found, expected = (value_and_grad(f)(state, (x, y)) for f in (add_loss(plain, nothing, 0.3, "none"), plain))
    assert torch.equal(found.loss_sum, expected.loss_sum)
    assert torch.equal(found.grads["weight"], expected.grads["weight"])


def test_buffers_pass_through_both_losses() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    state = init_state(net, sgd(0.1))
    loss = module_loss(net, classification)
    out = add_loss(loss, loss, 0.3, "again")(state.params, state.buffers, _batch())
    assert out.buffers["1.num_batches_tracked"] == 2


@pytest.mark.parametrize("weight", [0.3, torch.tensor(0.3)])
@pytest.mark.parametrize("n", [1, 4])
def test_a_penalty_adds_its_gradient_whatever_the_split(weight: Any, n: int) -> None:
    net = nn.Linear(3, 4)
    state = init_state(net, sgd(0.1))
    loss = add_penalty(module_loss(net, classification), l2_penalty, weight, "l2")
    found = accumulate(value_and_grad(loss), n)(state, _batch())
    x, y = _batch()
    F.cross_entropy(net(x), y).backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(found.grads[name] / found.weight, p.grad + 0.3 * p.detach())
    penalty = sum(p.square().sum() for p in net.parameters()) / 2
    torch.testing.assert_close(found.metrics["l2"].compute(), penalty.detach())


def test_names_that_are_taken_are_refused() -> None:
    net = nn.Linear(3, 4)
    state = init_state(net, sgd(0.1))
    once = add_penalty(module_loss(net, classification), l2_penalty, 0.1, "l2")
    for twice in (
        add_penalty(once, l2_penalty, 0.1, "l2"),
        add_loss(once, module_loss(net, classification), 0.1, "l2"),
    ):
        with pytest.raises(ValueError, match="name: the loss reports 'l2' already"):
            twice(state.params, state.buffers, _batch())


@pytest.mark.parametrize(("penalty", "got"), [(lambda p: 1.0, "float"), (lambda p: p["bias"], r"shape \(4,\)")])
def test_a_penalty_must_be_a_scalar_tensor(penalty: Any, got: str) -> None:
    net = nn.Linear(3, 4)
    state = init_state(net, sgd(0.1))
    with pytest.raises(TypeError, match=f"penalty: returned {got}"):
        add_penalty(module_loss(net, classification), penalty, 0.1, "p")(state.params, state.buffers, _batch())


class Scored(nn.Module):
    """A model that computes its own loss, as those of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.CrossEntropyLoss()(self.layer(x), labels)}


def _scored_loss(model: nn.Module) -> Any:
    return huggingface_loss(model, weight=lambda batch: (batch["labels"] != -100).sum())


def test_smoothing_reaches_the_cross_entropy_inside_a_model() -> None:
    model = Scored()
    x, y = _batch()
    state = init_state(model, sgd(0.1))
    out = label_smoothing(_scored_loss(model), 0.2)(state.params, state.buffers, {"x": x, "labels": y})
    torch.testing.assert_close(out.loss_sum / out.weight, F.cross_entropy(model.layer(x), y, label_smoothing=0.2))
    assert torch.equal(model(x, y)["loss"], F.cross_entropy(model.layer(x), y))


def test_smoothing_that_smooths_nothing_or_twice_is_refused() -> None:
    net = nn.Linear(3, 4)
    state = init_state(net, sgd(0.1))
    none = label_smoothing(lambda params, buffers, batch: LossOutput(params["weight"].sum(), 1), 0.1)
    twice = label_smoothing(module_loss(net, partial(classification, label_smoothing=0.1)), 0.1)
    with pytest.raises(ValueError, match=r"never called torch.nn.functional.cross_entropy"):
        none(state.params, state.buffers, _batch())
    with pytest.raises(ValueError, match=r"smooths by 0.1 already"):
        twice(state.params, state.buffers, _batch())
    with pytest.raises(ValueError, match=r"label_smoothing: got 1.0"):
        label_smoothing(none, 1.0)


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(9, 4), nn.Embedding(5, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.words(ids) + self.places(torch.arange(ids.shape[1]))


def _embedded(model: nn.Module, training: bool | None = None) -> Any:
    """A loss that is linear in the embeddings, so that its change is the noise."""
    return module_loss(
        model,
        lambda out: LossOutput(out.sum(), 1, {"out": Sum(out.detach())}),
        inputs="ids",
        targets=[],
        training=training,
    )


def test_noise_has_the_size_of_the_paper_and_falls_on_words_only() -> None:
    model = Tagger()
    state = init_state(model, sgd(0.1))
    batch = {"ids": torch.zeros(200, 5, dtype=torch.int64)}
    torch.manual_seed(0)
    noisy = neftune(_embedded(model), model.words, 3.0)(state.params, state.buffers, batch).metrics["out"].compute()
    noise = noisy - _embedded(model)(state.params, state.buffers, batch).metrics["out"].compute()
    size = 3.0 / math.sqrt(5 * 4)
    assert noise.abs().max() <= size * 1.0001
    # Uniform noise has the standard deviation size / sqrt(3); 4000 draws estimate it to about one percent.
    torch.testing.assert_close(noise.std(), torch.tensor(size / math.sqrt(3)), rtol=0.05, atol=0)
    assert noise.mean().abs() < 0.05


def test_noise_is_for_training_and_leaves_no_trace() -> None:
    model = Tagger()
    state = init_state(model, sgd(0.1))
    batch = {"ids": torch.zeros(2, 5, dtype=torch.int64)}
    plain = _embedded(model, training=False)(state.params, state.buffers, batch).loss_sum
    quiet = neftune(_embedded(model, training=False), model.words, 3.0)(state.params, state.buffers, batch).loss_sum
    silent = neftune(_embedded(model, training=True), model.words, 0.0)(state.params, state.buffers, batch).loss_sum
    loud = neftune(_embedded(model, training=True), model.words, 3.0)(state.params, state.buffers, batch).loss_sum
    after = _embedded(model, training=True)(state.params, state.buffers, batch).loss_sum
    assert plain == quiet == silent == after
    assert loud != plain


def test_noise_is_drawn_from_the_key_of_the_run() -> None:
    model = Tagger()
    gradient = value_and_grad(neftune(_embedded(model), model.words, 3.0))
    batch = {"ids": torch.zeros(2, 5, dtype=torch.int64)}
    sums = [gradient(init_state(model, sgd(0.1), seed=seed), batch).loss_sum for seed in (0, 0, 1)]
    assert sums[0] == sums[1] != sums[2]


def test_wrong_noise_is_refused() -> None:
    with pytest.raises(ValueError, match=r"alpha: got -1.0"):
        neftune(_embedded(Tagger()), Tagger().words, -1.0)
    with pytest.raises(TypeError, match="embedding: got Linear"):
        neftune(_embedded(Tagger()), nn.Linear(2, 2), 1.0)  # type: ignore[arg-type]


def test_smoothing_noise_and_penalty_compile_in_one_graph() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.layer = nn.Embedding(9, 4), nn.Linear(4, 9)

        def forward(self, ids: Tensor) -> Tensor:
            return self.layer(self.words(ids))

    model = Model()
    state = init_state(model, sgd(0.1))
    batch = {"ids": torch.arange(8).reshape(2, 4)}
    plain = module_loss(model, classification, inputs="ids", targets="ids")
    smooth = add_penalty(label_smoothing(plain, 0.1), l2_penalty, torch.tensor(0.1), "l2")

    def grads(loss: Any) -> Any:
        gradient = value_and_grad(loss)
        return lambda s, b: gradient(s, b).grads.to_dict()

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        still = torch.compile(grads(neftune(smooth, model.words, 0.0)), fullgraph=True, backend="aot_eager")(
            state, batch
        )
        noisy = torch.compile(grads(neftune(smooth, model.words, 5.0)), fullgraph=True, backend="aot_eager")(
            state, batch
        )
    for name, grad in grads(smooth)(state, batch).items():
        torch.testing.assert_close(still[name], grad)
    assert not torch.equal(noisy["layer.weight"], still["layer.weight"])
