"""Label smoothing beside that of transformers 4.57, over groups of microbatches, and for whom labels are shifted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.auto import modeling_auto
from transformers.trainer_pt_utils import LabelSmoother as Reference

from trainkit.trainer.label_smoothing import LabelSmoother, is_causal_lm


def batch(rows: int, length: int, classes: int, seed: int = 0, ignored: float = 0.3) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, length, classes, generator=draw, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(classes, (rows, length), generator=draw)
    hidden = torch.rand(rows, length, generator=draw) < ignored
    return logits, labels.masked_fill(hidden, -100).index_fill_(1, torch.tensor([length - 1]), 1)


@given(
    epsilon=st.floats(0.0, 0.9),
    shift=st.booleans(),
    seed=st.integers(0, 100),
    sizes=st.tuples(st.integers(1, 3), st.integers(2, 5), st.integers(2, 6)),
)
def test_equals_transformers(epsilon: float, shift: bool, seed: int, sizes: tuple[int, int, int]) -> None:
    logits, labels = batch(*sizes, seed)
    own = LabelSmoother(epsilon)({"logits": logits}, labels, shift_labels=shift)
    (grad,) = torch.autograd.grad(own, logits)
    reference = Reference(epsilon)({"logits": logits}, labels, shift_labels=shift)
    (expected,) = torch.autograd.grad(reference, logits)
    # The reference sums over classes in float32.
    torch.testing.assert_close(own, reference, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6)


def test_losses_of_a_group_add_up_to_its_mean() -> None:
    logits, labels = batch(5, 4, 6)
    smoother = LabelSmoother(0.2)
    for shift in (False, True):
        whole = smoother({"logits": logits}, labels, shift_labels=shift)
        count = (labels[:, 1:] if shift else labels).ne(-100).sum()
        parts = [
            smoother({"logits": logits[rows]}, labels[rows], shift_labels=shift, num_items_in_batch=count)
            for rows in (slice(0, 1), slice(1, 5))
        ]
        torch.testing.assert_close(parts[0] + parts[1], whole)
        (a,), (b,) = torch.autograd.grad(parts[0] + parts[1], logits), torch.autograd.grad(whole, logits)
        torch.testing.assert_close(a, b)
    assert smoother({"logits": logits}, labels, num_items_in_batch=4).item() == pytest.approx(
        smoother({"logits": logits}, labels).item() * labels.ne(-100).sum().item() / 4
    )


def test_outputs_may_be_of_any_kind() -> None:
    logits, labels = batch(2, 3, 4)
    expected = LabelSmoother(0.1)({"logits": logits}, labels)
    for outputs in ((logits, None), [logits], logits, SequenceClassifierOutput(logits=logits)):
        assert torch.equal(LabelSmoother(0.1)(outputs, labels), expected)
    assert torch.equal(LabelSmoother(0.1)(logits, labels.unsqueeze(-1)), expected)
    with pytest.raises(ValueError, match=r"outputs: entries \['scores'\], expected 'logits'"):
        LabelSmoother(0.1)({"scores": logits}, labels)
    with pytest.raises(ValueError, match=r"labels: shape \(2,\) for logits"):
        LabelSmoother(0.1)(logits, labels[:, 0])


def test_narrow_logits_are_summed_in_float32() -> None:
    logits, labels = batch(64, 16, 50)
    expected = LabelSmoother(0.1)(logits.bfloat16().double(), labels)
    found = LabelSmoother(0.1)(logits.bfloat16(), labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=0)


def test_a_label_that_is_no_class_is_refused() -> None:
    logits, labels = batch(2, 3, 4)
    labels[0, 0] = -1
    with pytest.raises(ValueError, match="labels: values from -1"):
        LabelSmoother(0.1)(logits, labels)


def test_a_batch_without_labels_gives_nan_and_in_a_group_nothing() -> None:
    logits, labels = batch(2, 3, 4)
    labels.fill_(-100)
    assert LabelSmoother(0.1)(logits, labels).isnan()
    assert LabelSmoother(0.1)(logits, labels, num_items_in_batch=torch.tensor(7)) == 0


class Allocations(TorchDispatchMode):
    """Bytes of results that are no views of an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in known:
                self.bytes += t.nbytes
        return out


@pytest.mark.parametrize("shift", [False, True])
def test_one_copy_of_the_logits_is_made_where_transformers_makes_several(shift: bool) -> None:
    logits, labels = batch(4, 8, 512)
    logits = logits.detach().float()
    own, reference = Allocations(), Allocations()
    with own:
        LabelSmoother(0.1)(logits, labels, shift_labels=shift)
    with reference:
        Reference(0.1)({"logits": logits}, labels, shift_labels=shift)
    assert own.bytes < 1.1 * logits.nbytes
    assert reference.bytes > (2.5 if shift else 1.9) * logits.nbytes


def named_model(name: str) -> nn.Module:
    model: nn.Module = type(name, (nn.Module,), {"forward": lambda self: None})()
    return model


CAUSAL = set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


def all_names() -> set[str]:
    found: set[str] = set()
    for name, mapping in vars(modeling_auto).items():
        if name.endswith("MAPPING_NAMES"):
            for value in mapping.values():
                found |= {value} if isinstance(value, str) else set(value)
    return found


def test_causal_models_are_told_by_the_names_that_transformers_has() -> None:
    names = all_names()
    assert len(names) > 500 and CAUSAL.issubset(names)
    assert {name for name in names if is_causal_lm(named_model(name))} == CAUSAL


def test_wrappers_are_looked_through_and_children_are_what_their_parents_are() -> None:
    parent = type("GPT2LMHeadModel", (nn.Module,), {"forward": lambda self: None})
    child: nn.Module = type("Tuned", (parent,), {})()
    assert is_causal_lm(child)
    assert is_causal_lm(nn.DataParallel(child))
    assert not is_causal_lm(nn.Linear(2, 2))
