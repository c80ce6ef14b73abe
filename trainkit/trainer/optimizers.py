"""From TrainingArguments to a torch optimizer: which parameters decay, which class, with which arguments."""

from __future__ import annotations

import difflib
import importlib
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from trainkit.trainer.layerwise import LayerwiseOptimizer
from trainkit.trainer.optimizer_table import OPTIMIZERS, OptimArgs, Row

Group = dict[str, Any]
"""A parameter group of torch: ``params`` and the options of these parameters."""

_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


# -- parameter groups ------------------------------------------------------------------------------------------------


def decay_parameter_names(model: nn.Module) -> list[str]:
    """The names of the parameters that weight decay applies to.

    All but those in an ``nn.LayerNorm`` and those whose lower-cased name holds "bias", "layernorm", "rmsnorm", a part
    "norm" or a part that ends with "_norm". Frozen parameters are among them; a tied one is under all of its names.

    Args:
        model: any module.

    Example:
        >>> decay_parameter_names(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Embedding(3, 2)))
        ['0.weight', '2.weight']

    Source: Trainer 4.57: ``get_decay_parameter_names``.
    """
    norms = tuple(
        f"{name}." if name else ""
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.LayerNorm)
    )
    names = (name for name, _ in model.named_parameters(remove_duplicate=False))
    return [name for name in names if not name.startswith(norms) and not _NO_DECAY.search(name.lower())]


def parameter_groups(model: nn.Module, decay_names: Iterable[str], weight_decay: float) -> list[Group]:
    """Two groups of trainable parameters: those that decay, and the others with a weight decay of zero.

    Args:
        model: whose parameters are grouped; one that is tied goes by its first name.
        decay_names: those that decay.
        weight_decay: of the first group.

    Returns: two groups, of which one may be empty.

    Example:
        >>> groups = parameter_groups(nn.Linear(2, 1), ["weight"], 0.1)
        >>> [(len(group["params"]), group["weight_decay"]) for group in groups]
        [(1, 0.1), (1, 0.0)]

    Source: Trainer 4.57: ``create_optimizer``.
    """
    decaying = set(decay_names)
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in trainable if name in decaying], "weight_decay": weight_decay},
        {"params": [p for name, p in trainable if name not in decaying], "weight_decay": 0.0},
    ]


# -- class and arguments ---------------------------------------------------------------------------------------------


def optimizer_class_and_kwargs(args: Any, model: nn.Module | None = None) -> tuple[type[Optimizer], dict[str, Any]]:
    """The class that ``args.optim`` names, and the keyword arguments of its constructor.

    Among them may be, for :func:`build_optimizer`, what goes in the place of the groups: ``params`` (low-rank
    optimizers), ``model`` (LOMO) or ``optimizer_dict`` (layer-wise ones). Nothing is registered on the model yet.

    Args:
        args: anything with the fields of TrainingArguments: optim, optim_args, learning_rate, adam_beta1, adam_beta2,
            adam_epsilon, weight_decay, warmup_steps, optim_target_modules, gradient_accumulation_steps, parallel_mode.
        model: needed by low-rank optimizers and LOMO.

    Raises:
        ValueError: an unknown name, one for hardware that is not served, ``optim_args`` that cannot be read, or an
            optimizer that needs the model or ``optim_target_modules`` and does not get it.
        ImportError: its package is not installed, or too old; the message says what to install.
        NotImplementedError: a layer-wise optimizer with several processes.

    Example:
        >>> from types import SimpleNamespace
        >>> args = SimpleNamespace(optim="sgd", optim_args=None, learning_rate=0.1)
        >>> optimizer_class_and_kwargs(args)
        (<class 'torch.optim.sgd.SGD'>, {'lr': 0.1})

    Source: Trainer 4.57: ``get_optimizer_cls_and_kwargs``.
    """
    name = str(getattr(args.optim, "value", args.optim))
    row = OPTIMIZERS.get(name)
    if row is None:
        near = difflib.get_close_matches(name, OPTIMIZERS, n=3) or sorted(OPTIMIZERS)
        raise ValueError(f"optim: got {name!r}, which is no optimizer of the Trainer; expected one such as {near}")
    if row.refused:
        raise ValueError(f"optim: {name!r} is not served: {row.refused}")
    cls, given = _found(name, row), OptimArgs(args.optim_args)
    kwargs = {"lr": args.learning_rate, **row.kwargs(args, given), **row.fixed}
    options = row.targets(args, given) if row.targets is not None else None
    if row.takes_model or options is not None:
        _check_model(name, row, args, model)
    if given.unused():
        warnings.warn(f"optim_args: {name} has no use for {given.unused()}", UserWarning, stacklevel=2)
    if row.takes_model:
        return cls, {**kwargs, "model": model}
    if options is None:
        return cls, kwargs
    assert model is not None
    others, targets = _split_by_target(name, args.optim_target_modules, model)
    if not row.layerwise:
        return cls, {**kwargs, "params": [{"params": others}, {"params": targets, **options}]}
    inside = {p: cls([{"params": [p]}], **kwargs) for p in others}
    inside.update({p: cls([{"params": [p], **options}], **kwargs) for p in targets})
    return LayerwiseOptimizer, {"lr": args.learning_rate, "optimizer_dict": inside}


def build_optimizer(
    model: nn.Module, groups: list[Group], cls: type[Optimizer], kwargs: Mapping[str, Any]
) -> Optimizer:
    """An optimizer object.

    The embeddings of the model keep a 32-bit state under the 8-bit optimizers of bitsandbytes, as their authors advise.

    Args:
        model: whose parameters are trained.
        groups: what the optimizer gets, unless ``kwargs`` holds ``params``, ``model`` or ``optimizer_dict``, of which
            the last then takes their place.
        cls: the class, or a function that makes such an object.
        kwargs: for the class; left as they are.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 1)
        >>> optimizer = build_optimizer(model, parameter_groups(model, ["weight"], 0.1), torch.optim.SGD, {"lr": 0.5})
        >>> [group["weight_decay"] for group in optimizer.param_groups]
        [0.1, 0.0]

    Source: Trainer 4.57: ``create_optimizer``.
    """
    rest, first = dict(kwargs), groups
    for name in ("params", "model", "optimizer_dict"):
        first = rest.pop(name, first)
    optimizer: Optimizer = cls(first, **rest)
    if "bitsandbytes" in str(cls) and rest.get("optim_bits") == 8:
        _keep_embeddings_in_32_bits(model)
    return optimizer


def _keep_embeddings_in_32_bits(model: nn.Module) -> None:
    manager = importlib.import_module("bitsandbytes").optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})


def _found(name: str, row: Row) -> type[Optimizer]:
    """The class of a row. Raises: ImportError naming the package."""
    causes = []
    for place in row.where:
        module, _, attribute = place.partition(":")
        try:
            cls: type[Optimizer] = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            causes.append(error)
        else:
            return cls
    (cause, *_) = causes
    raise ImportError(f"optim: {name!r} needs another package: pip install -U {row.install} ({cause})") from cause


# -- low-rank optimizers ---------------------------------------------------------------------------------------------


def _check_model(name: str, row: Row, args: Any, model: nn.Module | None) -> None:
    if model is None:
        raise ValueError(f"model: missing; optim={name!r} selects its parameters by the names of modules")
    if row.takes_model:
        return
    targets = args.optim_target_modules
    if targets is None:
        raise ValueError(f"optim_target_modules: missing; {name!r} needs names or regexes of modules, or 'all-linear'")
    if not isinstance(targets, (str, list, tuple)):
        raise TypeError(
            f"optim_target_modules: got {type(targets).__name__}, expected a list of names or regexes, one regex, or "
            "'all-linear'"
        )
    if row.layerwise and args.gradient_accumulation_steps != 1:
        raise ValueError(
            f"gradient_accumulation_steps: got {args.gradient_accumulation_steps}; {name!r} updates during the "
            "backward pass and cannot add up gradients, so it must be 1"
        )
    mode = getattr(args, "parallel_mode", None)
    if row.layerwise and getattr(mode, "value", mode) == "distributed":
        raise NotImplementedError(f"optim: {name!r} works in one process only; use {name.removesuffix('_layerwise')!r}")
    if args.weight_decay:
        warnings.warn(f"weight_decay: {name} has no use for {args.weight_decay}", UserWarning, stacklevel=3)


def _split_by_target(name: str, targets: str | list[str], model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The trainable parameters that are no targets, and those that are: weights of the linear layers that match."""
    every_linear = isinstance(targets, str) and targets.replace("_", "-") == "all-linear"
    chosen: set[str] = set()
    ignored: list[str] = []
    for module_name, module in model.named_modules():
        named, matches = _match(targets, module_name)
        if isinstance(module, nn.Linear):
            chosen.update([f"{module_name}.weight"] if matches or every_linear else [])
        elif named:
            ignored.append(module_name)
    if not chosen:
        raise ValueError(f"optim_target_modules: {targets!r} matches no linear layer of the model")
    if ignored:
        warnings.warn(
            f"optim_target_modules: {ignored} match but are no linear layers, which {name} needs; they are trained "
            "like the others",
            UserWarning,
            stacklevel=3,
        )
    trainable = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
    return [p for key, p in trainable if key not in chosen], [p for key, p in trainable if key in chosen]


def _match(targets: str | list[str], module_name: str) -> tuple[bool, bool]:
    """Whether the user meant this module by its name, and whether it matches at all."""
    if isinstance(targets, str):
        return targets == module_name, re.fullmatch(targets, module_name) is not None
    named = any(target in module_name for target in targets)
    return named, named or any(re.fullmatch(target, module_name) for target in targets)


# -- looking at an optimizer -----------------------------------------------------------------------------------------


def learning_rates(optimizer: Optimizer | None) -> list[float]:
    """The learning rate of every parameter group.

    Raises: ValueError if there is no optimizer yet.

    Example:
        >>> import torch
        >>> learning_rates(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5))
        [0.5]

    Source: Trainer 4.57: ``get_learning_rates``.
    """
    return [float(group["lr"]) for group in _existing(optimizer).param_groups]


def optimizer_group(
    optimizer: Optimizer | None,
    named_parameters: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    param: str | Tensor | None = None,
) -> Group | list[list[Tensor]]:
    """The group of a parameter; the parameter lists of all groups without one.

    Args:
        optimizer: whose groups are looked at.
        named_parameters: of the model, to find one by its name.
        param: a parameter, found by identity, or its name.

    Raises: ValueError if there is no optimizer yet, no parameter of that name, or no group that holds it.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 1)
        >>> groups = [{"params": [layer.bias]}, {"params": [layer.weight], "lr": 0.5}]
        >>> optimizer_group(torch.optim.SGD(groups, lr=0.1), layer.named_parameters(), "weight")["lr"]
        0.5

    Source: Trainer 4.57: ``get_optimizer_group``.
    """
    groups = _existing(optimizer).param_groups
    if param is None:
        return [group["params"] for group in groups]
    wanted: Any = param
    if isinstance(param, str):
        named = dict(named_parameters)
        if param not in named:
            near = difflib.get_close_matches(param, named)
            hint = f"; did you mean {near}?" if near else ""
            raise ValueError(f"param: the model has no parameter {param!r}{hint}")
        wanted = named[param]
    for group in groups:
        if any(p is wanted for p in group["params"]):
            return group
    what = repr(param) if isinstance(param, str) else f"the parameter of shape {tuple(wanted.shape)}"
    raise ValueError(f"param: {what} is in none of the {len(groups)} groups of the optimizer; is it frozen?")


def needs_live_gradients(optimizer: Any) -> bool:
    """Whether an optimizer works during the backward pass itself: layer-wise ones, and LOMO.

    Such a one needs a backward pass through the parameters, once per update, and leaves no gradients behind.

    Args:
        optimizer: maybe in the wrapper of accelerate, or None.

    Example:
        >>> import torch
        >>> w = nn.Parameter(torch.ones(1))
        >>> inner = torch.optim.SGD([w], lr=0.5)
        >>> needs_live_gradients(inner), needs_live_gradients(LayerwiseOptimizer({w: inner}))
        (False, True)
    """
    inner = raw(optimizer)
    names = {f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in type(inner).__mro__}
    return isinstance(inner, LayerwiseOptimizer) or not names.isdisjoint(_DURING_BACKWARD)


def parameters_beside(optimizer: Any, model: nn.Module) -> list[nn.Parameter]:
    """What an optimizer holds that is not the model's, such as the parameters of a loss that a subclass calls.

    Args:
        optimizer: maybe in the wrapper of accelerate, or None.
        model: whose parameters are left out.

    Example:
        >>> import torch
        >>> model, loss = nn.Linear(1, 1), nn.Bilinear(1, 1, 1, bias=False)
        >>> adam = torch.optim.Adam([*model.parameters(), *loss.parameters()])
        >>> parameters_beside(adam, model)[0] is loss.weight
        True
    """
    groups = getattr(optimizer, "param_groups", None) or []
    own = {id(p) for p in model.parameters()}
    return [p for group in groups for p in group["params"] if id(p) not in own]


_DURING_BACKWARD = frozenset({"lomo_optim.Lomo", "lomo_optim.AdaLomo", "transformers.LayerWiseDummyOptimizer"})


def backward_kwargs(args: Any, learning_rate: Callable[[], float]) -> dict[str, Any]:
    """What ``accelerator.backward`` is given beside the loss: LOMO is told its learning rate there.

    Args:
        args: TrainingArguments.
        learning_rate: gives the current rate; called for LOMO only.

    Example:
        >>> from types import SimpleNamespace
        >>> backward_kwargs(SimpleNamespace(optim="lomo"), lambda: 0.1)
        {'learning_rate': 0.1}

    Source: Trainer 4.57: ``training_step``.
    """
    row = OPTIMIZERS.get(str(getattr(args.optim, "value", args.optim)))
    return {"learning_rate": learning_rate()} if row is not None and row.takes_model else {}


def raw(optimizer: Any) -> Any:
    """The optimizer itself, without the wrapper that accelerate's ``prepare`` puts around it."""
    return getattr(optimizer, "optimizer", optimizer)


def num_trainable_parameters(model: nn.Module) -> int:
    """The number of elements of all parameters that require gradients; a shared one counts once.

    Example:
        >>> num_trainable_parameters(nn.Linear(2, 1))
        3

    Source: Trainer 4.57: ``get_num_trainable_parameters``.
    """
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _existing(optimizer: Optimizer | None) -> Optimizer:
    if optimizer is None:
        raise ValueError("optimizer: there is none yet; call create_optimizer (or train) first")
    return optimizer
