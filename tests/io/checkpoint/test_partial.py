"""A partial restore takes what fits by name and shape, leaves the rest, and says what it did."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainkit import TrainState, init_state
from trainkit.io.checkpoint import restore_partial
from trainkit.optim import adamw


def network(classes: int, *, norm: bool = True) -> nn.Module:
    backbone = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5) if norm else nn.Identity())
    return nn.ModuleDict({"backbone": backbone, "head": nn.Linear(5, classes)})


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: torch.randn(t.shape).to(t.dtype) for name, t in module.state_dict().items()}


@pytest.fixture
def state() -> TrainState:
    return init_state(network(4), adamw(1e-3), seed=3).replace(step=torch.tensor(8))


def test_a_backbone_goes_into_a_new_head(state: TrainState) -> None:
    pretrained = weights(network(1000))
    before = {name: t.clone() for name, t in (*state.params.items(), *state.buffers.items())}
    new, report = restore_partial(state, pretrained, ["backbone.*"])
    for name in ("backbone.0.weight", "backbone.0.bias", "backbone.1.weight", "backbone.1.bias"):
        assert torch.equal(new.params[name], pretrained[name])
    assert torch.equal(new.buffers["backbone.1.running_mean"], pretrained["backbone.1.running_mean"])
    assert new.params["head.weight"] is state.params["head.weight"]
    assert set(report.restored) == {name for name in pretrained if name.startswith("backbone.")}
    assert report.untouched == report.unused == ("head.weight", "head.bias")
    assert (report.missing, report.shape_mismatches, report.cast) == ((), {}, {})
    # The rest of the state stays, and the given one as it was.
    assert (int(new.step), int(new.key)) == (8, 3)
    assert new.opt_state is state.opt_state
    for name, tensor in (*state.params.items(), *state.buffers.items()):
        assert torch.equal(tensor, before[name])


def test_what_does_not_fit_is_kept_and_reported(state: TrainState) -> None:
    pretrained = weights(network(1000, norm=False)) | {"other": torch.ones(1)}
    new, report = restore_partial(state, pretrained, ["*"])
    assert report.restored == ("backbone.0.weight", "backbone.0.bias")
    assert report.shape_mismatches == {"head.weight": ((1000, 5), (4, 5)), "head.bias": ((1000,), (4,))}
    assert new.params["head.weight"] is state.params["head.weight"]
    assert set(report.missing) == {n for n in network(4).state_dict() if n.startswith("backbone.1.")}
    assert (report.unused, report.untouched) == (("other",), ())
    assert str(report).splitlines() == [
        "2 restored: backbone.0.weight, backbone.0.bias",
        "5 missing among the tensors: backbone.1.weight, backbone.1.bias, backbone.1.running_mean, ...",
        "2 of another shape, kept: head.weight (1000, 5) for (4, 5), head.bias (1000,) for (4,)",
        "1 tensors without use: other",
    ]


def test_values_are_copied_in_the_dtype_and_layout_of_the_state() -> None:
    module = nn.Conv2d(2, 2, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    pretrained = {"weight": torch.randn(2, 2, 3, 3, dtype=torch.float64), "bias": torch.zeros(2)}
    new, report = restore_partial(init_state(module, adamw(1e-3)), pretrained, ["*"])
    assert new.params["weight"].dtype == torch.float32
    assert new.params["weight"].stride() == module.weight.stride()
    assert torch.equal(new.params["weight"], pretrained["weight"].float())
    assert report.cast == {"weight": (torch.float64, torch.float32)}
    new.params["bias"].fill_(1)
    assert not pretrained["bias"].any()


def test_patterns_are_of_two_kinds(state: TrainState) -> None:
    pretrained = weights(network(4))
    by_shell = restore_partial(state, pretrained, ["*.bias", "head.*"])[1].restored
    by_expression = restore_partial(state, pretrained, [re.compile(r"bias$"), re.compile("head")])[1].restored
    assert by_shell == by_expression == ("backbone.0.bias", "backbone.1.bias", "head.weight", "head.bias")


@pytest.mark.parametrize(
    ("patterns", "kind", "text"),
    [
        ([], ValueError, "patterns: got none"),
        ("backbone.*", TypeError, r"expected a list of patterns: \['backbone"),
        (["backbone.*", "hed.*"], ValueError, "'hed.*' fits no name of the state, which has backbone.0.weight, "),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(state: TrainState, patterns: Any, kind: Any, text: str) -> None:
    with pytest.raises(kind, match=text):
        restore_partial(state, weights(network(4)), patterns)


def test_complex_numbers_do_not_lose_their_imaginary_part(state: TrainState) -> None:
    pretrained = weights(network(4))
    pretrained["head.bias"] = pretrained["head.bias"].to(torch.complex64)
    new, report = restore_partial(state, pretrained, ["head.*"])
    assert (report.restored, report.complex_for_real) == (("head.weight",), ("head.bias",))
    assert not report.shape_mismatches and "1 complex for real ones, kept: head.bias" in str(report)
    assert torch.equal(new.params["head.bias"], state.params["head.bias"])
