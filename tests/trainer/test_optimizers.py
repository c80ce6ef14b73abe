"""Optimizers by name beside those of transformers 4.57 and torch, groups, and how they are looked at."""

from __future__ import annotations

import copy
import importlib.util
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.optimization import Adafactor as ReferenceAdafactor
from transformers.trainer_pt_utils import get_parameter_names
from transformers.training_args import OptimizerNames

from trainkit.trainer.adafactor import Adafactor
from trainkit.trainer.layerwise import LayerwiseOptimizer
from trainkit.trainer.optimizer_table import OPTIMIZERS, OptimArgs, Row
from trainkit.trainer.optimizers import (
    _split_by_target,
    backward_kwargs,
    build_optimizer,
    decay_parameter_names,
    learning_rates,
    needs_live_gradients,
    num_trainable_parameters,
    optimizer_class_and_kwargs,
    optimizer_group,
    parameter_groups,
)


def make_args(optim: str, **changes: Any) -> Any:
    fields = {
        "optim": optim,
        "optim_args": None,
        "learning_rate": 0.1,
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-6,
        "weight_decay": 0.0,
        "warmup_steps": 7,
        "optim_target_modules": None,
        "gradient_accumulation_steps": 1,
        "parallel_mode": SimpleNamespace(value="not_distributed"),
    }
    return SimpleNamespace(**{**fields, **changes})


class Norms(nn.Module):
    """The model of the specification, and some names that only look alike."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.n = nn.Linear(2, 2), nn.Linear(2, 2), nn.GroupNorm(1, 2)
        self.rms, self.emb, self.ln = nn.RMSNorm(2), nn.Embedding(3, 2), nn.LayerNorm(2)


class Names(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.final_norm, self.normal, self.norms = (nn.GroupNorm(1, 2) for _ in range(4))
        self.RMSNorm, self.unbiased = nn.Linear(2, 2), nn.Linear(2, 2)
        self.block = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2)))
        self.q_norm = nn.Parameter(torch.ones(2))
        self.scale = nn.Parameter(torch.ones(2), requires_grad=False)


# -- groups ----------------------------------------------------------------------------------------------------------


def test_norms_and_biases_do_not_decay() -> None:
    assert decay_parameter_names(Norms()) == ["a.weight", "b.weight", "n.weight", "rms.weight", "emb.weight"]


@pytest.mark.parametrize("model", [Norms(), Names(), nn.Sequential(Names(), Norms())], ids=["norms", "names", "both"])
def test_decaying_names_are_those_of_transformers(model: nn.Module) -> None:
    patterns = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    assert sorted(decay_parameter_names(model)) == sorted(get_parameter_names(model, [nn.LayerNorm], patterns))


def test_groups_hold_each_trainable_parameter_once() -> None:
    model = Names()
    model.block[0].weight = model.unbiased.weight
    decaying, others = parameter_groups(model, decay_parameter_names(model), 0.1)
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    found = [*decaying["params"], *others["params"]]
    assert len(set(map(id, found))) == len(found) == sum(p.requires_grad for p in model.parameters())
    assert any(p is model.q_norm for p in others["params"])
    assert any(p is model.normal.weight for p in decaying["params"])


def test_a_group_may_be_empty() -> None:
    model = nn.LayerNorm(2)
    first, second = parameter_groups(model, [], 0.1)
    assert (first["params"], len(second["params"])) == ([], 2)
    optimizer = build_optimizer(model, [first, second], torch.optim.AdamW, {"lr": 0.1, "fused": True})
    model(torch.randn(3, 2)).square().sum().backward()
    optimizer.step()


# -- class and arguments -----------------------------------------------------------------------------------------------


def test_the_table_has_the_names_of_transformers() -> None:
    assert sorted(OPTIMIZERS) == sorted(member.value for member in OptimizerNames)


HERE = ["adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop"]


@pytest.mark.parametrize("name", HERE)
def test_class_and_arguments_are_those_of_transformers(name: str, tmp_path: Any) -> None:
    args = TrainingArguments(str(tmp_path), optim=name, learning_rate=0.3, adam_beta2=0.9, use_cpu=True, report_to=[])
    assert optimizer_class_and_kwargs(args) == Trainer.get_optimizer_cls_and_kwargs(args)


def test_adafactor_has_the_arguments_of_transformers(tmp_path: Any) -> None:
    args = TrainingArguments(str(tmp_path), optim="adafactor", use_cpu=True, report_to=[])
    cls, kwargs = optimizer_class_and_kwargs(args)
    assert cls is Adafactor
    assert kwargs == Trainer.get_optimizer_cls_and_kwargs(args)[1]


@pytest.mark.parametrize("name", [name for name, row in OPTIMIZERS.items() if row.refused])
def test_what_other_hardware_needs_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"optim: '{name}' is not served: .*; use '(stable_adamw|adamw_torch)"):
        optimizer_class_and_kwargs(make_args(name))


LINEARS = (nn.Linear(4, 4), nn.Linear(4, 4))


def lacks(row: Row) -> bool:
    packages = {place.partition(":")[0].partition(".")[0] for place in row.where}
    return bool(packages) and not any(importlib.util.find_spec(package) for package in packages)


@pytest.mark.parametrize("name", [name for name, row in OPTIMIZERS.items() if lacks(row)])
def test_a_missing_package_is_named(name: str) -> None:
    install = OPTIMIZERS[name].install
    with pytest.raises(ImportError, match=f"optim: '{name}' needs another package: pip install -U {install} "):
        optimizer_class_and_kwargs(make_args(name, optim_target_modules="all-linear"), nn.Linear(2, 2))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", [name for name, row in OPTIMIZERS.items() if row.install and not row.layerwise])
def test_the_arguments_fit_the_class_of_the_package(name: str) -> None:
    try:
        cls, kwargs = optimizer_class_and_kwargs(make_args(name, optim_target_modules=["1"]), nn.Sequential(*LINEARS))
    except ImportError as error:
        pytest.skip(str(error))
    given = {key: value for key, value in kwargs.items() if key not in ("params", "model")}
    inspect.signature(cls).bind([], **given)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"optim: got 'adamw_touch', .* such as .*'adamw_torch'"):
        optimizer_class_and_kwargs(make_args("adamw_touch"))


EXPECTED: list[tuple[str, str | None, dict[str, Any]]] = [
    ("adamw_8bit", None, {"betas": (0.8, 0.95), "eps": 1e-6, "optim_bits": 8, "is_paged": False}),
    ("paged_adamw_32bit", None, {"betas": (0.8, 0.95), "eps": 1e-6, "optim_bits": 32, "is_paged": True}),
    ("paged_lion_8bit", None, {"betas": (0.8, 0.95), "optim_bits": 8, "is_paged": True}),
    (
        "ademamix_8bit",
        "beta1=0.5, beta3=0.99, t_alpha=10",
        {
            "betas": (0.5, 0.95, 0.99), "alpha": 5.0, "eps": 1e-6, "t_alpha": 10, "optim_bits": 8, "is_paged": False,
        },
    ),
    ("rmsprop_bnb_8bit", "alpha=0.9,centered=True", {"alpha": 0.9, "centered": True, "optim_bits": 8}),
    (
        "grokadamw",
        "lamb=3",
        {"alpha_init": 0.98, "lamb": 3.0, "gamma": 0.1, "grokking_signal_decay_rate": 0.1, "gradient_clipping": 1.0},
    ),
    ("schedule_free_sgd", "r=0.5", {"weight_decay": 0.0, "warmup_steps": 7, "weight_lr_power": 2.0, "r": 0.5}),
    (
        "schedule_free_radam",
        None,
        {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.0, "weight_lr_power": 2.0, "r": 0.0},
    ),
    (
        "stable_adamw",
        "kahan_sum=False,decouple_lr=true,max_lr=0.5",
        {
            "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.0, "kahan_sum": False, "decouple_lr": True,
            "max_lr": 0.5,
        },
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "expected"), EXPECTED, ids=[name for name, _, _ in EXPECTED])
def test_arguments_of_packages_are_made_of_the_table(name: str, text: str | None, expected: dict[str, Any]) -> None:
    row, found = OPTIMIZERS[name], OptimArgs(text)
    assert {**row.kwargs(make_args(name), found), **row.fixed} == expected
    assert found.unused() == []


def test_options_of_low_rank_groups() -> None:
    galore, apollo = OPTIMIZERS["galore_adamw"].targets, OPTIMIZERS["apollo_adamw"].targets
    assert galore is not None and apollo is not None
    args = make_args("galore_adamw")
    assert galore(args, OptimArgs("rank=64")) == {
        "rank": 64, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std",
    }  # fmt: skip
    assert apollo(args, OptimArgs("proj=svd")) == {
        "rank": 128, "proj": "svd", "scale_type": "channel", "update_proj_gap": 200, "scale": 1.0, "proj_type": "std",
        "betas": (0.8, 0.95), "eps": 1e-6,
    }  # fmt: skip


@pytest.mark.parametrize("text", ["rank", "rank=1=2", "=1", "rank=1,,gap=2", "rank=1,rank=2"])
def test_optim_args_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"optim_args: cannot read .* expected key=value,key=value"):
        optimizer_class_and_kwargs(make_args("sgd", optim_args=text))


def test_values_of_the_wrong_kind_are_refused() -> None:
    given = OptimArgs("rank=many, kahan_sum=perhaps, max_lr=x")
    with pytest.raises(ValueError, match="optim_args: rank='many', expected an integer"):
        given.integer("rank", 1)
    with pytest.raises(ValueError, match="kahan_sum='perhaps', expected True or False"):
        given.flag("kahan_sum", None)
    with pytest.raises(ValueError, match="max_lr='x', expected a number"):
        given.number("max_lr", None)


def test_optim_args_without_use_are_told() -> None:
    with pytest.warns(UserWarning, match=r"optim_args: sgd has no use for \['momentum'\]"):
        assert optimizer_class_and_kwargs(make_args("sgd", optim_args="momentum=0.9"))[1] == {"lr": 0.1}


# -- low-rank and layer-wise -------------------------------------------------------------------------------------------


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer_0, self.layer_1, self.other = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
        self.layer_norm = nn.LayerNorm(2)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["layer_0"], {"layer_0"}),
        (["layer_0", "oth"], {"layer_0", "other"}),
        ([r".*_1"], {"layer_1"}),
        (r"layer_\d", {"layer_0", "layer_1"}),
        ("layer", None),
        ("all-linear", {"layer_0", "layer_1", "other"}),
        ("all_linear", {"layer_0", "layer_1", "other"}),
        (["nothing"], None),
    ],
)
def test_targets_are_found_by_name_part_or_regex(targets: Any, expected: set[str] | None) -> None:
    model = Blocks()
    if expected is None:
        with pytest.raises(ValueError, match="matches no linear layer"):
            _split_by_target("galore_adamw", targets, model)
        return
    others, chosen = _split_by_target("galore_adamw", targets, model)
    assert {id(p) for p in chosen} == {id(model.get_parameter(f"{name}.weight")) for name in expected}
    assert {id(p) for p in others} == {id(p) for p in model.parameters()} - {id(p) for p in chosen}


def test_targets_that_are_no_linear_layers_are_told() -> None:
    with pytest.warns(UserWarning, match=r"\['layer_norm'\] match but are no linear layers"):
        _split_by_target("galore_adamw", ["layer"], Blocks())


def run_layerwise(p: nn.Module, optimizer: Any, steps: int, seed: int) -> None:
    for i in range(steps):
        p(torch.randn(4, 3, generator=torch.Generator().manual_seed(seed + i))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def two_nets() -> list[nn.Module]:
    nets: list[nn.Module] = []
    for _ in range(2):
        torch.manual_seed(0)
        nets.append(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))
    return nets


def layerwise(net: nn.Module, cls: Any = torch.optim.AdamW) -> LayerwiseOptimizer:
    return LayerwiseOptimizer({p: cls([p], lr=0.1) for p in net.parameters()}, lr=0.1)


# Adagrad makes its memory in the constructor.
@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.Adagrad])
def test_layer_wise_equals_one_optimizer(cls: Any) -> None:
    one, other = two_nets()
    optimizer = layerwise(one, cls)
    assert needs_live_gradients(optimizer) and needs_live_gradients(SimpleNamespace(optimizer=optimizer))
    run_layerwise(one, optimizer, 3, 0)
    run_layerwise(other, cls(other.parameters(), lr=0.1), 3, 0)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) and a.grad is None
    assert learning_rates(optimizer) == [0.1] * 4
    assert optimizer_group(optimizer, one.named_parameters(), "2.bias") is optimizer.param_groups[3]


def test_layer_wise_state_can_be_saved_and_loaded() -> None:
    one, other = two_nets()
    optimizer = layerwise(one)
    run_layerwise(one, optimizer, 2, 0)
    state = optimizer.state_dict()
    assert len(state["state"]) == 4 and state["state"][0]["step"] == 2
    optimizer.param_groups[0]["lr"] = 0.3
    other.load_state_dict(one.state_dict())
    resumed = layerwise(other)
    # torch loads the very tensors that it is given.
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net, its in ((one, optimizer), (other, resumed)):
        run_layerwise(net, its, 2, 10)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    resumed.remove_hooks()
    other(torch.ones(1, 3)).sum().backward()
    assert all(p.grad is not None for p in other.parameters())


def test_layer_wise_needs_parameters() -> None:
    with pytest.raises(ValueError, match="optimizer_dict: it is empty"):
        LayerwiseOptimizer({})


# -- making the object -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["params", "model", "optimizer_dict"])
def test_what_replaces_the_groups_is_taken_from_the_arguments_of_which_a_copy_is_made(key: str) -> None:
    model = nn.Linear(2, 1)
    kwargs = {"lr": 0.1, key: [model.weight]}
    made: list[Any] = []

    def make(first: Any, lr: float) -> torch.optim.Optimizer:
        made.append(first)
        return torch.optim.SGD(first, lr=lr)

    build_optimizer(model, parameter_groups(model, [], 0.0), make, kwargs)  # type: ignore[arg-type]
    assert made == [[model.weight]]
    assert sorted(kwargs) == sorted(["lr", key])


def test_only_lomo_is_told_its_rate_in_the_backward_pass() -> None:
    found = {name: backward_kwargs(make_args(name), lambda: 0.2) for name in OPTIMIZERS}
    assert {name for name, kwargs in found.items() if kwargs == {"learning_rate": 0.2}} == {"lomo", "adalomo"}
    assert all(kwargs == {} for name, kwargs in found.items() if "lomo" not in name)


# -- looking at it -----------------------------------------------------------------------------------------------------


def test_the_group_of_a_parameter_is_found_by_identity_and_by_name() -> None:
    model = Norms()
    optimizer = torch.optim.SGD(parameter_groups(model, decay_parameter_names(model), 0.1), lr=0.2)
    for name, p in model.named_parameters():
        expected = optimizer.param_groups[0 if name in decay_parameter_names(model) else 1]
        assert optimizer_group(optimizer, model.named_parameters(), p) is expected
        assert optimizer_group(optimizer, dict(model.named_parameters()), name) is expected
    lists = optimizer_group(optimizer, model.named_parameters())
    assert [len(params) for params in lists] == [5, 5]
    assert lists[0][0] is model.a.weight  # type: ignore[index]


def test_parameters_without_a_group_are_told() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD([model.weight], lr=0.2)
    with pytest.raises(ValueError, match="param: 'bias' is in none of the 1 groups"):
        optimizer_group(optimizer, model.named_parameters(), "bias")
    with pytest.raises(ValueError, match=r"the parameter of shape \(1,\) is in none"):
        optimizer_group(optimizer, model.named_parameters(), model.bias)
    with pytest.raises(ValueError, match=r"no parameter 'wieght'; did you mean \['weight'\]"):
        optimizer_group(optimizer, model.named_parameters(), "wieght")


def test_there_must_be_an_optimizer() -> None:
    with pytest.raises(ValueError, match="optimizer: there is none yet"):
        learning_rates(None)
    with pytest.raises(ValueError, match="optimizer: there is none yet"):
        optimizer_group(None, [])


def test_learning_rates_are_floats() -> None:
    w, v = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([{"params": [w], "lr": torch.tensor(0.5)}, {"params": [v], "lr": 0.25}])
    assert learning_rates(optimizer) == [0.5, 0.25]


def test_shared_and_frozen_parameters_are_counted_right() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False), nn.Linear(2, 3))
    model[1].weight = model[0].weight
    model[2].bias.requires_grad_(False)
    assert num_trainable_parameters(model) == 4 + 6


# -- Adafactor -------------------------------------------------------------------------------------------------------

GRID: list[dict[str, Any]] = [
    {"lr": 0.05, "scale_parameter": False, "relative_step": False},
    {"lr": 0.05, "scale_parameter": False, "relative_step": False, "weight_decay": 0.1, "beta1": 0.9},
    {"lr": 0.05, "scale_parameter": True, "relative_step": False, "weight_decay": 0.1},
    {"scale_parameter": True, "relative_step": True},
    {"scale_parameter": False, "relative_step": True, "warmup_init": True},
    {"lr": 0.05, "scale_parameter": False, "relative_step": False, "clip_threshold": 0.1, "decay_rate": -0.5,
     "eps": (1e-3, 1e-2)},
]  # fmt: skip


def run_adafactor(cls: Any, options: dict[str, Any], dtype: torch.dtype, steps: int) -> tuple[list[Tensor], Any]:
    draw = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for shape in [(4, 3), (2, 3, 5), (6,), ()]]
    optimizer = cls([{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0}], **options)
    for _ in range(steps):
        for p in params:
            p.grad = (0.3 * p.detach().float() + torch.randn(p.shape, generator=draw)).to(dtype)
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("options", GRID, ids=range(len(GRID)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_adafactor_equals_that_of_transformers(options: dict[str, Any], dtype: torch.dtype) -> None:
    params, optimizer = run_adafactor(Adafactor, options, dtype, 12)
    expected, reference = run_adafactor(ReferenceAdafactor, options, dtype, 12)
    exact = not options["scale_parameter"] and not options["relative_step"] and dtype == torch.float32
    for own, other in zip(params, expected, strict=True):
        torch.testing.assert_close(own, other, **({"rtol": 0, "atol": 0} if exact else {}))
        state, wanted = optimizer.state[own], reference.state[other]
        assert state.keys() == wanted.keys()
        for name in state.keys() - {"RMS"}:
            torch.testing.assert_close(state[name], wanted[name])


def test_adafactor_continues_what_transformers_saved_and_keeps_its_memory_wide() -> None:
    params, reference = run_adafactor(ReferenceAdafactor, GRID[0], torch.bfloat16, 4)
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer = Adafactor([{"params": copies[:2]}, {"params": copies[2:], "weight_decay": 0.0}], **GRID[0])
    optimizer.load_state_dict(reference.state_dict())
    assert optimizer.state[copies[0]]["exp_avg_sq_row"].dtype == torch.float32
    for own, other in zip(copies, params, strict=True):
        own.grad = other.grad = torch.ones_like(own)
    optimizer.step()
    reference.step()
    for own, other in zip(copies, params, strict=True):
        assert torch.equal(own, other)


def test_adafactor_refuses_what_cannot_go_together() -> None:
    w = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"lr: got 0.1 with relative_step=True"):
        Adafactor([w], lr=0.1)
    with pytest.raises(ValueError, match="warmup_init: True needs relative_step=True"):
        Adafactor([w], lr=0.1, relative_step=False, warmup_init=True)
    embedding = nn.Embedding(3, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"sparse.*use sparse=False"):
        Adafactor(embedding.parameters()).step()
