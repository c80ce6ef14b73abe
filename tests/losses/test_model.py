"""A criterion on a module: selection of fields, buffers, modes, purity; beside the plain PyTorch call."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn

from trainkit import init_state, value_and_grad
from trainkit.losses import (
    causal_lm,
    causal_lm_head,
    classification,
    distillation,
    frozen_outputs,
    mean_squared_error,
    module_loss,
)
from trainkit.losses.model import arguments, pick
from trainkit.optim import sgd
from trainkit.types import LossOutput

Record = namedtuple("Record", ["x", "y"])


def _batch(rows: int = 6) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(rows, 3, generator=g), torch.randint(4, (rows,), generator=g)


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 4))


@pytest.mark.parametrize(
    ("as_batch", "inputs", "targets"),
    [
        (lambda x, y: (x, y), 0, 1),
        (lambda x, y: [y, x], -1, 0),
        (lambda x, y: {"x": x, "y": y}, "x", "y"),
        (lambda x, y: {"x": x, "y": y}, {"input": "x"}, {"labels": "y"}),
        (lambda x, y: {"x": x, "y": y}, ["x"], ("y",)),
        (lambda x, y: TensorDict({"x": x, "y": y}, batch_size=[len(x)]), "x", "y"),
        (lambda x, y: TensorDict({"x": x, "y": y}, batch_size=[]), "x", "y"),
        (lambda x, y: Record(x, y), "x", "y"),
        (lambda x, y: torch.cat([x, y.unsqueeze(1)], 1), lambda b: b[:, :3], lambda b: b[:, 3].long()),
    ],
)
def test_every_kind_of_batch_gives_the_same_loss(as_batch: Any, inputs: Any, targets: Any) -> None:
    net = nn.Linear(3, 4)
    x, y = _batch()
    state = init_state(net, sgd(0.1))
    out = module_loss(net, classification, inputs=inputs, targets=targets)(state.params, state.buffers, as_batch(x, y))
    torch.testing.assert_close(out.loss_sum, F.cross_entropy(net(x), y, reduction="sum"))
    assert out.weight == 6


def test_the_gradient_is_that_of_the_plain_call_and_buffers_come_back() -> None:
    net, twin = _net(), _net()
    net[2].p = twin[2].p = 0.0
    x, y = _batch()
    state = init_state(net, sgd(0.1))
    found = value_and_grad(module_loss(net, classification))(state, (x, y))
    F.cross_entropy(twin(x), y, reduction="sum").backward()
    for name, p in twin.named_parameters():
        torch.testing.assert_close(found.grads[name], p.grad)
    for name, buffer in twin.named_buffers():
        torch.testing.assert_close(found.buffers[name], buffer)
    assert torch.equal(state.buffers["1.running_mean"], torch.zeros(5))
    assert torch.equal(net[1].running_mean, torch.zeros(5))


@pytest.mark.parametrize("training", [True, False, None])
def test_the_mode_holds_for_the_call_only(training: bool | None) -> None:
    net = _net()
    net[2].eval()
    x, y = _batch()
    state = init_state(net, sgd(0.1))
    seen: list[bool] = []
    net[2].register_forward_hook(lambda module, args, out: seen.append(module.training))
    out = module_loss(net, classification, training=training)(state.params, state.buffers, (x, y))
    assert seen == [bool(training)]
    assert net.training
    assert not net[2].training
    updated = not torch.equal(out.buffers["1.running_mean"], state.buffers["1.running_mean"])
    assert updated == (training is not False)


def test_outputs_and_weights_reach_the_criterion() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(7, 3)
            self.head = nn.Linear(3, 7, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids: Tensor) -> dict[str, Tensor]:
            return {"hidden": self.embedding(ids), "logits": self.head(self.embedding(ids))}

    model = Model()
    ids = torch.randint(7, (2, 5), generator=torch.Generator().manual_seed(0))
    state = init_state(model, sgd(0.1))
    full = module_loss(model, causal_lm, inputs="ids", targets="ids", outputs="logits")
    lean = module_loss(
        model,
        causal_lm_head,
        inputs="ids",
        outputs="hidden",
        targets={"labels": "ids"},
        weights={"head_weight": "embedding.weight"},
    )
    found, expected = (value_and_grad(loss)(state, {"ids": ids}) for loss in (lean, full))
    torch.testing.assert_close(found.loss_sum, expected.loss_sum)
    torch.testing.assert_close(found.grads["embedding.weight"], expected.grads["embedding.weight"])


def test_a_frozen_weight_is_found_beside_the_buffers() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 4, bias=False))
    net[1].weight.requires_grad_(False)
    state = init_state(net, sgd(0.1))
    ids, y = _batch()
    seen: list[Tensor] = []

    def criterion(outputs: Tensor, labels: Tensor, head: Tensor) -> LossOutput:
        seen.append(head)
        return classification(outputs, labels)

    module_loss(net, criterion, weights={"head": "1.weight"})(state.params, state.buffers, (ids, y))
    assert seen[0] is state.buffers["1.weight"]


def test_a_teacher_is_an_input_without_gradient() -> None:
    student, teacher = nn.Linear(3, 4), _net()
    x, y = _batch()
    before = {name: t.clone() for name, t in (*teacher.named_parameters(), *teacher.named_buffers())}
    targets = {"teacher_logits": frozen_outputs(teacher), "labels": 1}
    state = init_state(student, sgd(0.1))
    found = module_loss(student, distillation, targets=targets)(state.params, state.buffers, (x, y))
    teacher.eval()
    torch.testing.assert_close(found.loss_sum, distillation(student(x), teacher(x), y).loss_sum)
    assert all(torch.equal(t, before[name]) for name, t in (*teacher.named_parameters(), *teacher.named_buffers()))
    assert not frozen_outputs(teacher)((x, y)).requires_grad


@pytest.mark.parametrize(
    ("batch", "select", "error", "message"),
    [
        ({"x": 1, "y": 2}, "z", KeyError, "no field 'z' among 'x', 'y'"),
        ((1, 2), 2, IndexError, "it has 2 items, none at position 2"),
        ({"x": 1}, 0, TypeError, "got dict, expected a tuple or list to take item 0 of"),
        (torch.zeros(3), 0, TypeError, "got Tensor, expected a tuple or list"),
        (torch.zeros(3), "T", TypeError, "got Tensor, expected a mapping or a record with a field 'T'"),
        (Record(1, 2), "z", TypeError, "got Record, expected a mapping or a record with a field 'z'"),
    ],
)
def test_what_a_batch_lacks_is_named(batch: Any, select: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pick(batch, select)


@pytest.mark.parametrize("selection", [None, True, 1.5, ("x", None), {"input": 2.0}])
@pytest.mark.parametrize("argument", ["inputs", "targets"])
def test_selections_of_another_kind_are_refused_at_once(selection: Any, argument: str) -> None:
    with pytest.raises(TypeError, match=f"{argument}: got .* expected a field's name"):
        module_loss(nn.Linear(3, 4), classification, **{argument: selection})


def test_arguments_mix_names_and_functions() -> None:
    assert arguments({"x": 1, "y": 2}, {"a": "x", "b": lambda b: b["y"] + 1}) == ([], {"a": 1, "b": 3})


def test_missing_targets_are_refused() -> None:
    net = nn.Linear(3, 4)
    state = init_state(net, sgd(0.1))
    loss = module_loss(net, classification, inputs="x", targets="y")
    with pytest.raises(TypeError, match="targets: 'y' gave None"):
        loss(state.params, state.buffers, {"x": _batch()[0], "y": None})


def test_a_criterion_must_return_a_loss_output() -> None:
    net = nn.Linear(3, 4)
    state = init_state(net, sgd(0.1))
    with pytest.raises(TypeError, match=r"criterion: returned Tensor, expected LossOutput"):
        module_loss(net, F.cross_entropy)(state.params, state.buffers, _batch())  # type: ignore[arg-type]


def test_an_unknown_weight_is_named() -> None:
    net = nn.Linear(3, 4)
    state = init_state(net, sgd(0.1))
    loss = module_loss(net, mean_squared_error, weights={"head_weight": "head.weight"})
    with pytest.raises(KeyError, match=r"no parameter or buffer 'head\.weight'"):
        loss(state.params, state.buffers, _batch())


def test_a_module_loss_compiles_with_its_teacher() -> None:
    student, teacher = nn.Linear(3, 4), _net()
    targets = {"teacher_logits": frozen_outputs(teacher), "labels": 1}
    state = init_state(student, sgd(0.1))
    gradient = value_and_grad(module_loss(student, distillation, targets=targets))
    batch = _batch()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(lambda s, b: gradient(s, b).grads["weight"], fullgraph=True, backend="aot_eager")
        found = compiled(state, batch)
    torch.testing.assert_close(found, gradient(state, batch).grads["weight"])
