"""Real models of transformers, tiny: the sum and its count beside the mean that the model gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from tensordict import TensorDict
from torch import Tensor, nn

from trainkit import accumulate, init_state, value_and_grad
from trainkit.losses import causal_lm, causal_lm_head, huggingface_loss, label_smoothing, module_loss
from trainkit.optim import sgd

V = 19
BERT = {"vocab_size": V, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
T5 = {"vocab_size": V, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}


def _bert(name: str, **options: Any) -> nn.Module:
    return _seeded(name, transformers.BertConfig(**BERT, **options))


def _seeded(name: str, config: Any) -> nn.Module:
    torch.manual_seed(0)
    return getattr(transformers, name)(config).eval()


def _llama() -> nn.Module:
    return _seeded("LlamaForCausalLM", transformers.LlamaConfig(**BERT))


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=V, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    return _seeded("GPT2LMHeadModel", config)


def _t5() -> nn.Module:
    return _seeded("T5ForConditionalGeneration", transformers.T5Config(**T5))


def _ids(rows: int) -> Tensor:
    return torch.randint(1, V, (rows, 6), generator=torch.Generator().manual_seed(0))


def _ragged(rows: int) -> dict[str, Tensor]:
    """Rows with unequal numbers of labels, one row with none."""
    ids = _ids(rows)
    labels = ids.clone()
    for row in range(rows):
        labels[row, : row + 1] = -100
    labels[1] = -100
    return {"input_ids": ids, "labels": labels}


def _rowwise(labels: Callable[[int], Tensor]) -> Callable[[int], dict[str, Tensor]]:
    return lambda rows: {"input_ids": _ids(rows), "labels": labels(rows)}


def _some_ignored(rows: int) -> Tensor:
    labels = torch.arange(rows) % 3
    labels[0] = -100
    return labels


MODELS = {
    "llama": (_llama, _ragged, lambda y: (y[:, 1:] != -100).sum()),
    "gpt2": (_gpt2, _ragged, lambda y: (y[:, 1:] != -100).sum()),
    "t5": (_t5, _ragged, lambda y: (y != -100).sum()),
    "bert_lm_head": (
        lambda: _bert("BertLMHeadModel", is_decoder=True),
        _ragged,
        lambda y: (y[:, 1:] != -100).sum(),
    ),
    "masked": (lambda: _bert("BertForMaskedLM"), _ragged, lambda y: (y != -100).sum()),
    "tagging": (
        lambda: _bert("BertForTokenClassification", num_labels=3),
        lambda rows: {**_ragged(rows), "labels": _ragged(rows)["labels"].clamp(max=2)},
        lambda y: (y != -100).sum(),
    ),
    "single_label": (
        lambda: _bert("BertForSequenceClassification", num_labels=3),
        _rowwise(_some_ignored),
        lambda y: (y != -100).sum(),
    ),
    "regression": (
        lambda: _bert("BertForSequenceClassification", num_labels=1),
        _rowwise(lambda rows: torch.linspace(0, 1, rows)),
        lambda y: y.numel(),
    ),
    "regression_many": (
        lambda: _bert("BertForSequenceClassification", num_labels=2, problem_type="regression"),
        _rowwise(lambda rows: torch.linspace(0, 1, 2 * rows).reshape(rows, 2)),
        lambda y: y.numel(),
    ),
    "multi_label": (
        lambda: _bert("BertForSequenceClassification", num_labels=2),
        _rowwise(lambda rows: (torch.arange(2 * rows) % 3 == 0).float().reshape(rows, 2)),
        lambda y: y.numel(),
    ),
}
every_model = pytest.mark.parametrize("name", MODELS)


def _setup(name: str, rows: int = 4) -> tuple[nn.Module, dict[str, Tensor], int]:
    build, make, count = MODELS[name]
    batch = make(rows)
    return build(), batch, int(count(batch["labels"]))


@every_model
def test_the_sum_over_its_weight_is_the_models_mean(name: str) -> None:
    model, batch, count = _setup(name)
    state = init_state(model, sgd(0.1))
    expected = model(**batch).loss
    out = huggingface_loss(model)(state.params, state.buffers, batch)
    assert out.weight == count
    torch.testing.assert_close(out.loss_sum / out.weight, expected)


@every_model
def test_accumulation_over_unequal_rows_is_the_whole_batch(name: str) -> None:
    model, batch, _ = _setup(name)
    state = init_state(model, sgd(0.1))
    gradient = value_and_grad(huggingface_loss(model), unused="zero")
    whole, parts = gradient(state, batch), accumulate(gradient, 4)(state, batch)
    model.zero_grad()
    model(**batch).loss.backward()
    torch.testing.assert_close(parts.loss_sum, whole.loss_sum)
    assert parts.weight == whole.weight
    for key, p in model.named_parameters():
        expected = torch.zeros_like(p) if p.grad is None else p.grad
        for found in (whole, parts):
            torch.testing.assert_close(found.grads[key] / found.weight, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in MODELS if "regression" not in name and name != "multi_label"])
def test_without_any_label_sum_and_gradient_are_zero(name: str) -> None:
    model, batch, _ = _setup(name)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    assert model(**batch).loss.isnan()
    found = value_and_grad(huggingface_loss(model), unused="zero")(init_state(model, sgd(0.1)), batch)
    assert (found.loss_sum, found.weight) == (0, 0)
    assert not any(g.any() for g in found.grads.values())


class Divides(nn.Module):
    """A loss whose backward pass gives NaN where nothing counts, even when the result is masked."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        losses = F.cross_entropy(self.layer(x), labels, reduction="none")
        return {"loss": losses.sum() / (labels != -100).sum()}


def test_a_loss_that_divides_by_its_count_gives_no_nan() -> None:
    model = Divides()
    loss = huggingface_loss(model, weight=lambda batch: (batch["labels"] != -100).sum())
    batch = {"x": torch.ones(2, 2), "labels": torch.full((2,), -100)}
    found = value_and_grad(loss)(init_state(model, sgd(0.1)), batch)
    assert (found.loss_sum, found.weight) == (0, 0)
    assert not any(g.any() for g in found.grads.values())


def test_a_weight_function_overrides_the_rule() -> None:
    model, batch, _ = _setup("llama")
    state = init_state(model, sgd(0.1))
    out = huggingface_loss(model, weight=lambda batch: torch.tensor(3.0))(state.params, state.buffers, batch)
    torch.testing.assert_close(out.loss_sum, 3 * model(**batch).loss)


@pytest.mark.parametrize("kind", [dict, transformers.BatchEncoding, lambda b: TensorDict(b, batch_size=[4])])
def test_every_kind_of_mapping_will_do(kind: Callable[[Any], Any]) -> None:
    model, batch, count = _setup("llama")
    state = init_state(model, sgd(0.1))
    assert huggingface_loss(model)(state.params, state.buffers, kind(batch)).weight == count


def test_a_subclass_inherits_its_rule() -> None:
    class Renamed(transformers.LlamaForCausalLM):
        pass

    batch = _ragged(4)
    model = Renamed(transformers.LlamaConfig(**BERT))
    state = init_state(model, sgd(0.1))
    assert huggingface_loss(model)(state.params, state.buffers, batch).weight == (batch["labels"][:, 1:] != -100).sum()


def test_training_mode_reaches_the_model() -> None:
    model, batch, _ = _setup("masked")
    state = init_state(model, sgd(0.1))
    torch.manual_seed(0)
    noisy = huggingface_loss(model, training=True)(state.params, state.buffers, batch).loss_sum
    assert noisy != huggingface_loss(model, training=False)(state.params, state.buffers, batch).loss_sum
    assert not model.training


def test_an_unknown_class_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"no rule for .* BertForQuestionAnswering is a mean of.*Pass weight"):
        huggingface_loss(_bert("BertForQuestionAnswering"))


def test_a_batch_without_labels_is_refused() -> None:
    model, batch, _ = _setup("llama")
    state = init_state(model, sgd(0.1))
    with pytest.raises(ValueError, match=r"batch: no labels among its fields \(input_ids\)"):
        huggingface_loss(model)(state.params, state.buffers, {"input_ids": batch["input_ids"]})


def test_a_batch_that_is_no_mapping_is_refused() -> None:
    model, batch, _ = _setup("llama")
    state = init_state(model, sgd(0.1))
    with pytest.raises(TypeError, match="batch: got tuple, expected a mapping"):
        huggingface_loss(model)(state.params, state.buffers, tuple(batch.values()))


def test_an_output_without_loss_is_refused() -> None:
    model, batch, _ = _setup("llama")
    state = init_state(model, sgd(0.1))
    loss = huggingface_loss(model, weight=lambda batch: torch.tensor(1))
    with pytest.raises(ValueError, match=r"output of LlamaForCausalLM \(CausalLMOutputWithPast\) has no loss"):
        loss(state.params, state.buffers, {"input_ids": batch["input_ids"]})


@pytest.mark.parametrize("name", ["llama", "masked", "single_label"])
def test_smoothed_labels_reach_the_models_own_cross_entropy(name: str) -> None:
    model, batch, _ = _setup(name)
    state = init_state(model, sgd(0.1))
    out = label_smoothing(huggingface_loss(model), 0.2)(state.params, state.buffers, batch)
    logits, labels = model(**batch).logits, batch["labels"]
    if name == "llama":
        logits, labels = logits[:, :-1], labels[:, 1:]
    expected = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.flatten(), label_smoothing=0.2)
    torch.testing.assert_close(out.loss_sum / out.weight, expected)


def test_a_model_of_transformers_trains_without_its_logits() -> None:
    model, batch, _ = _setup("llama")
    state = init_state(model, sgd(0.1))
    lean = module_loss(
        model,
        causal_lm_head,
        inputs={
            "input_ids": "input_ids",
            "output_hidden_states": lambda batch: True,
            "logits_to_keep": lambda batch: 1,
        },
        outputs=lambda out: out.hidden_states[-1],
        targets={"labels": "labels"},
        weights={"head_weight": "lm_head.weight"},
    )
    full = module_loss(model, causal_lm, inputs={"input_ids": "input_ids"}, targets="labels", outputs="logits")
    found, expected, own = (value_and_grad(loss)(state, batch) for loss in (lean, full, huggingface_loss(model)))
    for other in (expected, own):
        torch.testing.assert_close(found.loss_sum, other.loss_sum)
        for key, grad in other.grads.items():
            torch.testing.assert_close(found.grads[key], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "masked"])
def test_compiles_with_its_gradient_in_one_graph(name: str) -> None:
    model, batch, _ = _setup(name)
    state = init_state(model, sgd(0.1))
    gradient = value_and_grad(huggingface_loss(model))
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(lambda s, b: gradient(s, b).grads.to_dict(), fullgraph=True, backend="aot_eager")
        found = compiled(state, batch)
    for key, grad in gradient(state, batch).grads.items():
        torch.testing.assert_close(found[key], grad)
