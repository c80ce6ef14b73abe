"""Token losses beside torch.nn.functional, and the head that holds no full logits beside the one that does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainkit import init_state, per_example_grads
from trainkit.losses import (
    causal_lm,
    causal_lm_head,
    linear_cross_entropy,
    masked_lm,
    next_tokens,
    sequence_log_probs,
)
from trainkit.losses.language import _chunked_cross_entropy
from trainkit.metrics import accuracy
from trainkit.optim import sgd

V, D = 11, 6


@pytest.fixture
def tokens() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(V, (3, 7), generator=g)
    labels[0, 4:] = -100
    labels[2, :2] = -100
    return torch.randn(3, 7, V, dtype=torch.float64, generator=g), labels


def _head_arguments(rows: int = 10, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*s, dtype=torch.float64, generator=g) for s in ((rows, D), (V, D), (V,)))
    labels = torch.randint(V, (rows,), generator=g)
    labels[::4] = -100
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), labels


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_causal_lm_is_the_shifted_cross_entropy(tokens: tuple[Tensor, Tensor], smoothing: float) -> None:
    logits, labels = tokens
    out = causal_lm(logits, labels, label_smoothing=smoothing)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=smoothing)
    torch.testing.assert_close(out.loss_sum / out.weight, expected)
    assert out.weight == (labels[:, 1:] != -100).sum() == out.metrics["tokens"].compute()


def test_masked_lm_is_the_cross_entropy_in_place(tokens: tuple[Tensor, Tensor]) -> None:
    logits, labels = tokens
    out = masked_lm(logits, labels)
    torch.testing.assert_close(out.loss_sum / out.weight, F.cross_entropy(logits.flatten(0, 1), labels.flatten()))


def test_z_loss_adds_the_squared_normaliser(tokens: tuple[Tensor, Tensor]) -> None:
    logits, labels = tokens
    plain, out = masked_lm(logits, labels), masked_lm(logits, labels, z_loss=0.01)
    penalty = 0.01 * (torch.log(torch.exp(logits[labels != -100]).sum(-1)) ** 2).sum()
    torch.testing.assert_close(out.loss_sum, plain.loss_sum + penalty)
    torch.testing.assert_close(out.metrics["z_loss"].compute(), penalty / out.weight)


def test_metrics_are_opt_in_and_see_ignored_labels_as_minus_100(tokens: tuple[Tensor, Tensor]) -> None:
    logits, labels = tokens
    other = labels.masked_fill(labels == -100, -1)
    plain = causal_lm(logits, labels, metrics={"accuracy": accuracy})
    found = causal_lm(logits, other, ignore_index=-1, metrics={"accuracy": accuracy})
    kept = labels[:, 1:] != -100
    hits = (logits[:, :-1].argmax(-1) == labels[:, 1:])[kept]
    assert "accuracy" not in causal_lm(logits, labels).metrics
    for out in (plain, found):
        torch.testing.assert_close(out.metrics["accuracy"].compute(), hits.double().mean().float())


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_any_integers_will_do(tokens: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    logits, labels = tokens
    assert torch.equal(causal_lm(logits, labels.to(dtype)).loss_sum, causal_lm(logits, labels).loss_sum)


def test_one_token_per_sequence_predicts_nothing() -> None:
    out = causal_lm(torch.zeros(2, 1, V), torch.zeros(2, 1, dtype=torch.int64))
    assert (out.loss_sum, out.weight) == (0, 0)


def test_next_tokens_has_none_after_the_last() -> None:
    assert next_tokens(torch.tensor([[1, 2], [3, 4]]), -1).tolist() == [[2, -1], [4, -1]]


@pytest.mark.parametrize("loss", [causal_lm, masked_lm, sequence_log_probs])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda y: y.double(), TypeError, "labels: dtype torch.float64, expected integers"),
        (lambda y: y > 2, TypeError, "labels: dtype torch.bool, expected integers"),
        (lambda y: y[0], ValueError, r"labels: shape \(7,\) for logits .* expected \(3, 7\)"),
        (
            lambda y: y.clamp(min=0) + V,
            ValueError,
            rf"labels: values from {V} to .* expected 0 to {V - 1} \({V} classes",
        ),
        (lambda y: y.masked_fill(y == -100, -7), ValueError, r"labels: values from -7 to .*ignore_index=-100"),
        (lambda y: None, TypeError, "labels: got NoneType"),
    ],
)
def test_wrong_labels_are_refused(
    tokens: tuple[Tensor, Tensor],
    loss: Callable[..., Any],
    change: Callable[[Tensor], Tensor],
    error: type[Exception],
    message: str,
) -> None:
    logits, labels = tokens
    with pytest.raises(error, match=message):
        loss(logits, change(labels))


@pytest.mark.parametrize(("option", "value"), [("label_smoothing", 1.0), ("label_smoothing", -0.1), ("z_loss", -1.0)])
def test_options_out_of_range_are_refused(tokens: tuple[Tensor, Tensor], option: str, value: float) -> None:
    logits, labels = tokens
    hidden, weight, _, rows = _head_arguments()
    for call in (partial(causal_lm, logits, labels), partial(linear_cross_entropy, hidden, weight, rows)):
        with pytest.raises(ValueError, match=f"{option}: got {value}"):
            call(**{option: value})


def test_sequence_log_probs_sum_the_tokens(tokens: tuple[Tensor, Tensor]) -> None:
    logits, labels = tokens
    targets = labels[:, 1:]
    each = logits[:, :-1].log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(sequence_log_probs(logits, labels), (each * (targets != -100)).sum(-1))


def test_gradients_of_sequence_log_probs_pass_finite_differences(tokens: tuple[Tensor, Tensor]) -> None:
    logits, labels = tokens
    assert torch.autograd.gradcheck(lambda x: sequence_log_probs(x, labels), (logits.requires_grad_(),))


@pytest.mark.parametrize("chunk_size", [1, 3, 10, None])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "z_loss": 0.1}], ids=["plain", "all_terms"])
@pytest.mark.parametrize("trained", ["all", "hidden", "weight"])
def test_the_head_equals_full_logits(
    chunk_size: int | None, with_bias: bool, options: dict[str, float], trained: str
) -> None:
    hidden, weight, bias, labels = _head_arguments()
    given = {"hidden": hidden, "weight": weight} | ({"bias": bias} if with_bias else {})
    wanted = [t.requires_grad_() for name, t in given.items() if trained in (name, "all")]
    found = linear_cross_entropy(hidden, weight, labels, bias=given.get("bias"), chunk_size=chunk_size, **options)
    full = masked_lm(F.linear(hidden, weight, given.get("bias")), labels, **options)
    torch.testing.assert_close(found.loss_sum, full.loss_sum)
    assert found.weight == full.weight
    assert found.metrics.keys() == full.metrics.keys()
    for name, metric in full.metrics.items():
        torch.testing.assert_close(found.metrics[name].compute(), metric.compute())
    grads, expected = (torch.autograd.grad(3 * out.loss_sum, wanted) for out in (found, full))
    torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize("position", [0, 1, 2], ids=["hidden", "weight", "bias"])
def test_the_heads_gradients_pass_finite_differences(position: int) -> None:
    *tensors, labels = _head_arguments(6)
    tensors[position].requires_grad_()

    def loss(x: Tensor) -> Tensor:
        hidden, weight, bias = (*tensors[:position], x, *tensors[position + 1 :])
        options: Any = {"label_smoothing": 0.2, "z_loss": 0.3, "chunk_size": 4}
        return linear_cross_entropy(hidden, weight, labels, bias=bias, **options).loss_sum

    assert torch.autograd.gradcheck(loss, (tensors[position],))


def test_the_operator_keeps_the_rules_of_operators() -> None:
    hidden, weight, bias, labels = _head_arguments()
    arguments = (hidden.requires_grad_(), weight.requires_grad_(), bias, labels, -100, 0.1, 0.1, 4, [True, True, False])
    torch.library.opcheck(_chunked_cross_entropy, arguments)


def test_the_causal_head_shifts(tokens: tuple[Tensor, Tensor]) -> None:
    labels = tokens[1]
    weight = _head_arguments()[1]
    hidden = torch.randn(3, 7, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found, full = causal_lm_head(hidden, weight, labels), causal_lm(hidden @ weight.T, labels)
    torch.testing.assert_close(found.loss_sum, full.loss_sum)
    assert found.weight == full.weight


def _largest_allocation(run: Callable[[], Any]) -> int:
    """The size in bytes of the largest tensor that is allocated, inside of operators too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    return max(event.self_cpu_memory_usage for event in profile.events())


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.1}], ids=["plain", "all_terms"])
@pytest.mark.parametrize("train", [True, False])
def test_no_tensor_holds_all_logits(options: dict[str, float], train: bool) -> None:
    rows, width, vocabulary, chunk = 512, 8, 1024, 32
    hidden = torch.randn(rows, width, requires_grad=train)
    weight = torch.randn(vocabulary, width, requires_grad=train)
    labels = torch.randint(vocabulary, (rows,))

    def run(loss: Callable[[], Any]) -> None:
        with torch.set_grad_enabled(train):
            loss_sum = loss().loss_sum
        if train:
            torch.autograd.grad(loss_sum, [hidden, weight])

    full = _largest_allocation(lambda: run(lambda: masked_lm(hidden @ weight.T, labels, **options)))
    lean = _largest_allocation(
        lambda: run(lambda: linear_cross_entropy(hidden, weight, labels, chunk_size=chunk, **options))
    )
    assert full >= 4 * rows * vocabulary
    assert lean <= 4 * max(chunk * vocabulary, width * vocabulary)


@pytest.mark.parametrize("options", [{}, {"z_loss": 1e-3}], ids=["plain", "z_loss"])
def test_bfloat16_is_summed_wide(options: dict[str, float]) -> None:
    hidden, weight, _, labels = _head_arguments(400, torch.bfloat16)
    exact = masked_lm(hidden.double() @ weight.double().T, labels, **options)
    hidden.requires_grad_()
    weight.requires_grad_()
    found = linear_cross_entropy(hidden, weight, labels, chunk_size=7, **options)
    assert found.loss_sum.dtype == torch.float32
    # 300 rounded logits of relative error 2^-9, whose errors average out; summing in bfloat16 would be off by 1e-1.
    torch.testing.assert_close(found.loss_sum.double(), exact.loss_sum, rtol=2e-3, atol=0)
    grads = torch.autograd.grad(found.loss_sum, [hidden, weight])
    assert [g.dtype for g in grads] == [torch.bfloat16] * 2
    wide = [hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    expected = torch.autograd.grad(masked_lm(wide[0] @ wide[1].T, labels, **options).loss_sum, wide)
    for one, other in zip(grads, expected, strict=True):
        assert (one.double() - other).norm() < 0.02 * other.norm()


@pytest.mark.parametrize("options", [{}, {"z_loss": 1e-3}], ids=["plain", "z_loss"])
def test_under_autocast_the_head_is_a_linear_layer(options: dict[str, float]) -> None:
    hidden, weight, bias, labels = _head_arguments(dtype=torch.float32)
    wanted = [hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_cross_entropy(hidden, weight, labels, bias=bias, chunk_size=4, **options)
        full = masked_lm(F.linear(hidden, weight, bias), labels, **options)
    torch.testing.assert_close(found.loss_sum, full.loss_sum, rtol=1e-2, atol=0)
    grads, expected = (torch.autograd.grad(out.loss_sum, wanted) for out in (found, full))
    assert [g.dtype for g in grads] == [torch.float32] * 3
    torch.testing.assert_close(grads, expected, rtol=5e-2, atol=5e-2)


def test_the_head_refuses_second_derivatives() -> None:
    hidden, weight, _, labels = _head_arguments()
    loss_sum = linear_cross_entropy(hidden.requires_grad_(), weight, labels, z_loss=0.1).loss_sum
    with pytest.raises(RuntimeError, match=r"create_graph=True.*Use masked_lm"):
        torch.autograd.grad(loss_sum, hidden, create_graph=True)


def test_the_heads_backward_pass_can_run_again() -> None:
    hidden, weight, _, labels = _head_arguments()
    loss_sum = linear_cross_entropy(hidden.requires_grad_(), weight, labels).loss_sum
    first, second = (torch.autograd.grad(loss_sum, hidden, retain_graph=True) for _ in range(2))
    assert torch.equal(first[0], second[0])


@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1}], ids=["plain", "z_loss"])
def test_per_example_gradients_of_the_head(options: dict[str, float]) -> None:
    layer = nn.Linear(D, V, bias=False).double()
    hidden, _, _, labels = _head_arguments()

    state = init_state(layer, sgd(0.1))

    def of_params(params: Any, buffers: Any, batch: Any) -> Any:
        return linear_cross_entropy(batch[0], params["weight"], batch[1], chunk_size=2, **options)

    found = per_example_grads(of_params)(state, (hidden, labels)).grads["weight"]
    for i in range(len(labels)):
        weight = state.params["weight"].detach().requires_grad_()
        expected = torch.autograd.grad(masked_lm(hidden[i] @ weight.T, labels[i], **options).loss_sum, weight)[0]
        torch.testing.assert_close(found[i], expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"head_weight": torch.zeros(V, D + 1)}, ValueError, rf"head_weight: .* expected \[classes, {D}\]"),
        ({"head_weight": torch.zeros(D)}, ValueError, "head_weight: shape"),
        ({"bias": torch.zeros(V + 1)}, ValueError, rf"bias: shape \({V + 1},\), expected \({V},\)"),
        ({"chunk_size": 0}, ValueError, "chunk_size: got 0, expected at least 1 row"),
        ({"hidden": torch.zeros(10, D, dtype=torch.int64)}, TypeError, "hidden: dtype torch.int64"),
        ({"labels": torch.full((10,), V)}, ValueError, rf"labels: values from {V} to {V}"),
        ({"labels": torch.zeros(9, dtype=torch.int64)}, ValueError, r"labels: shape \(9,\)"),
    ],
)
def test_wrong_heads_are_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    hidden, weight, bias, labels = _head_arguments()
    arguments: dict[str, Any] = {"hidden": hidden, "head_weight": weight, "labels": labels, "bias": bias}
    with pytest.raises(error, match=message):
        linear_cross_entropy(**(arguments | change))
