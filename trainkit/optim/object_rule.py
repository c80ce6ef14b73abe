"""``object_rule``: the rule of a torch optimizer object as a transformation over the object's own memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainkit import tree
from trainkit.optim.adamw import adamw
from trainkit.optim.transform import REPORT, Transform, optimizer
from trainkit.types import OptState, Params

_MOMENTS = ("exp_avg", "exp_avg_sq")


def has_object_rule(optimizer_object: Any) -> bool:
    """Whether :func:`object_rule` knows the class and the settings of an optimizer object, and what it remembers: one
    number of steps for all parameters of a group that have any.

    Example:
        >>> w = [nn.Parameter(torch.zeros(1))]
        >>> has_object_rule(torch.optim.AdamW(w)), has_object_rule(torch.optim.Rprop(w))
        (True, False)
    """
    if type(optimizer_object) is not torch.optim.AdamW:
        return False
    hooks = optimizer_object._optimizer_step_pre_hooks or optimizer_object._optimizer_step_post_hooks
    groups = optimizer_object.param_groups
    return not hooks and not any(group["amsgrad"] or len(_steps(optimizer_object, group)) > 1 for group in groups)


def object_rule(optimizer_object: Optimizer, named: Mapping[str, nn.Parameter]) -> Transform:
    """The rule of a ``torch.optim.AdamW`` object as a pure transformation whose state is the object's memory.

    For runs that compile the whole step while somebody holds the object: a step that donates writes into the tensors of
    ``optimizer_object.state``, and reads the rates that schedulers write into its groups (:func:`write_rates`). Other
    settings are read when the transformation is made. Where only the loss is to be compiled, :func:`live` takes any
    optimizer.

    Until :func:`part_counters`, the parameters of a group share one counter of steps.

    Args:
        optimizer_object: see :func:`has_object_rule`.
        named: the module's parameters by name; those that the object does not hold stay as they are.

    Returns: a transformation with one entry per group: the state of :func:`adamw`, ``rate`` and ``step``. Parameters
    without gradient stay as they are.

    Raises: TypeError for an object that :func:`has_object_rule` does not know.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> adam = torch.optim.AdamW(layer.parameters(), lr=0.1)
        >>> tx = object_rule(adam, dict(layer.named_parameters()))
        >>> state = tx.init(tree.frozen({name: p.detach() for name, p in layer.named_parameters()}))
        >>> adam.state[layer.bias]["exp_avg"] is state["0"]["exp_avg"]["bias"]
        True

    Source: torch.optim.AdamW (torch 2.13).
    """
    if not has_object_rule(optimizer_object):
        raise TypeError(
            f"optimizer_object: got {type(optimizer_object).__name__}, expected a torch.optim.AdamW without hooks and "
            "amsgrad, whose parameters have made equally many steps; use trainkit.optim.live for others"
        )
    groups = _groups(optimizer_object, named)

    def init(params: Params) -> OptState:
        made = {key: _first(optimizer_object, group, named, params) for key, group in groups.items()}
        return tree.frozen(made)

    def apply(grads: Params, opt_state: OptState, params: Params, /, **extra: Any) -> tuple[Params, OptState]:
        new, found, after = tree.named(params), tree.named(grads), {}
        for key, (rule, names) in rules.items():
            present = [name for name in names if name in found]
            changed, after[key] = _apply(rule, present, found, opt_state[key], new)
            new = {**new, **changed}
        return tree.like(params, list(new.values())), tree.frozen(after)

    rules = {key: (_rule(group), [n for n in named if n in group["names"]]) for key, group in groups.items()}
    return optimizer(init, apply)


def write_rates(optimizer_object: Optimizer, opt_state: OptState) -> None:
    """Write the learning rates of an object's groups into the state of its :func:`object_rule`, before a step."""
    # What its schedulers look for: whether a step was made in between.
    optimizer_object._opt_called = True  # type: ignore[attr-defined]
    entries: Any = opt_state
    for key, entry in entries.items():
        if key.isdecimal():
            entry["rate"].fill_(optimizer_object.param_groups[int(key)]["lr"])


def part_counters(optimizer_object: Optimizer) -> None:
    """Give every parameter a counter of its own again, as the object's own ``step()`` needs."""
    for memory in optimizer_object.state.values():
        memory["step"] = memory["step"].clone()


def _groups(optimizer_object: Optimizer, named: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Any]]:
    name_of = {id(p): name for name, p in named.items()}
    found = {}
    for i, group in enumerate(optimizer_object.param_groups):
        names = {name_of[id(p)] for p in group["params"] if id(p) in name_of}
        if names:
            found[str(i)] = {**group, "names": names}
    return found


def _steps(optimizer_object: Optimizer, group: dict[str, Any]) -> set[float]:
    """How many steps the parameters of a group have made, of those that have a memory."""
    memories = [optimizer_object.state[p] for p in group["params"] if p in optimizer_object.state]
    return {float(memory["step"]) for memory in memories if "step" in memory}


def _rule(group: dict[str, Any]) -> Callable[[Tensor], Transform]:
    def with_rate(rate: Tensor) -> Transform:
        return adamw(
            lambda count: rate,
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
        )

    return with_rate


def _first(
    optimizer_object: Optimizer, group: dict[str, Any], named: Mapping[str, nn.Parameter], params: Params
) -> dict[str, Any]:
    """The state of a group: the object's memory, which is made where there is none yet."""
    own = {name: t for name, t in tree.named(params).items() if name in group["names"]}
    memories = {name: optimizer_object.state[named[name]] for name in own}
    device = next(iter(own.values())).device
    step = torch.full((), max(_steps(optimizer_object, group), default=0.0), dtype=torch.float32, device=device)
    for name, memory in memories.items():
        memory["step"] = step
        for moment in _MOMENTS:
            if moment not in memory:
                memory[moment] = torch.zeros_like(own[name], memory_format=torch.preserve_format)
    return {
        "count": step.to(torch.int64),
        **{moment: {name: memory[moment] for name, memory in memories.items()} for moment in _MOMENTS},
        REPORT: {"learning_rate": torch.zeros((), device=device)},
        "rate": torch.full((), float(group["lr"]), dtype=torch.float64 if device.type == "cpu" else torch.float32),
        "step": step,
    }


def _apply(
    rule: Callable[[Tensor], Transform],
    names: list[str],
    grads: dict[str, Tensor],
    state: Any,
    params: dict[str, Tensor],
) -> tuple[dict[str, Tensor], Any]:
    inner = {moment: {name: state[moment][name] for name in names} for moment in _MOMENTS}
    given = tree.frozen({"count": state["count"], **inner, REPORT: state[REPORT]})
    pairs = (tree.frozen({name: source[name] for name in names}) for source in (grads, params))
    new, after = rule(state["rate"]).apply(next(pairs), given, next(pairs))
    moments = {moment: {**dict(state[moment].items()), **dict(after[moment].items())} for moment in _MOMENTS}
    (step,) = tree.writable([state["step"]])
    entry = {
        "count": after["count"],
        **moments,
        REPORT: after[REPORT],
        "rate": state["rate"],
        "step": step + 1 if torch.compiler.is_compiling() else step.add_(1),
    }
    return tree.named(new), entry
