"""Different transformations for different parameters, by label."""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainkit import tree
from trainkit.optim.transform import Transform, identity, with_entries
from trainkit.optim.weight_decay import Mask
from trainkit.types import OptState, Params

Labels = Callable[[str, Tensor], "str | None"]
"""``(name, parameter) -> label``; None leaves the parameter without one. It may look at name, shape and dtype, not at
values: it is asked in every update, and inside a graph only while the graph is made."""


def partition(transforms: Mapping[str, Transform], labels: Labels) -> Transform:
    """Each transformation for the parameters that carry its label.

    A transformation sees its own gradients and parameters only, so a norm it takes is the norm of its group. The state
    is a tree with one entry per label. A label that no parameter carries costs nothing.

    Args:
        transforms: by label.
        labels: gives every parameter one of these labels.

    Raises: ValueError, from ``init`` and from both faces, naming the parameter whose label is unknown.

    Example:
        >>> from trainkit.optim import adamw, sgd
        >>> params = tree.frozen({"weight": torch.ones(2, 2), "bias": torch.ones(2)})
        >>> tx = partition({"matrix": adamw(1.0, weight_decay=0.0), "rest": sgd(0.5)}, by_rank({2: "matrix"}, "rest"))
        >>> after, state = tx.apply(params, tx.init(params), params)
        >>> after["bias"], sorted(state.keys())
        (tensor([0.5000, 0.5000]), ['matrix', 'rest'])

    Source: ``optax.partition``; what parameter groups are in torch.optim.
    """
    transforms = dict(transforms)

    def init(params: Params) -> OptState:
        states = {label: tree.frozen() for label in transforms}
        for label, names in _groups(params, labels, transforms).items():
            if names:
                states[label] = transforms[label].init(_part(params, names))
        return tree.frozen(states)

    def update(grads: Params, opt_state: OptState, params: Params, /, **extra: Any) -> tuple[Params, OptState]:
        return through("update", grads, opt_state, params, extra)

    def apply(grads: Params, opt_state: OptState, params: Params, /, **extra: Any) -> tuple[Params, OptState]:
        return through("apply", grads, opt_state, params, extra)

    def through(
        face: str, grads: Params, opt_state: OptState, params: Params, extra: dict[str, Any]
    ) -> tuple[Params, OptState]:
        out: dict[str, Tensor] = {}
        states = dict(opt_state.items())
        for label, names in _groups(params, labels, transforms).items():
            if names:
                call = getattr(transforms[label], face)
                part, states[label] = call(_part(grads, names), opt_state[label], _part(params, names), **extra)
                out.update(tree.named(part))
        return tree.like(params, [out[name] for name in tree.named(params)]), with_entries(opt_state, states)

    return Transform(init, update, apply)


def masked(tx: Transform, mask: Mask) -> Transform:
    """A transformation for some parameters; the updates of the others pass as they came.

    They pass, they do not vanish: with an optimizer inside, the others' raw gradients would be added to the parameters.
    To train a part only, write ``partition({"train": optimizer, "rest": freeze()}, labels)``.

    Args:
        tx: what to do where the mask is True.
        mask: ``(name, parameter) -> bool``.

    Example:
        >>> from trainkit.optim.clip import clip_by_value
        >>> from trainkit.optim.weight_decay import no_bias_or_norm
        >>> grads = tree.frozen({"weight": torch.full((1, 1), 3.0), "bias": torch.full((1,), 3.0)})
        >>> tx = masked(clip_by_value(1.0), no_bias_or_norm)
        >>> updates, _ = tx.update(grads, tx.init(grads), grads)
        >>> updates["weight"], updates["bias"] is grads["bias"]
        (tensor([[1.]]), True)

    Source: ``optax.masked``.
    """
    return partition({"masked": tx, "rest": identity()}, lambda name, param: "masked" if mask(name, param) else "rest")


def freeze() -> Transform:
    """Parameters stay as they are.

    Example:
        >>> w = tree.frozen({"w": torch.ones(2)})
        >>> freeze().apply(w, tree.frozen(), w)[0] is w
        True

    Source: ``optax.set_to_zero``.
    """

    def update(grads: Params, opt_state: OptState, params: Params, /, **extra: Any) -> tuple[Params, OptState]:
        return tree.zeros_like(grads), opt_state

    def apply(grads: Params, opt_state: OptState, params: Params, /, **extra: Any) -> tuple[Params, OptState]:
        return params, opt_state

    return Transform(lambda params: tree.frozen(), update, apply)


def by_name(patterns: Mapping[str | re.Pattern[str], str], default: str | None = None) -> Labels:
    """The label of the first pattern that fits the parameter's name.

    Args:
        patterns: from pattern to label, in order. A string is a shell pattern for the whole name ("layers.*.bias");
            a compiled regular expression is searched for in the name.
        default: for names that no pattern fits.

    Example:
        >>> labels = by_name({"head.*": "head", re.compile(r"norm|bias"): "small"}, default="rest")
        >>> [labels(name, torch.empty(0)) for name in ("head.bias", "layers.0.norm.weight", "layers.0.weight")]
        ['head', 'small', 'rest']
    """
    tests = [(_test_of(pattern), label) for pattern, label in patterns.items()]
    remembered = functools.cache(lambda name: next((label for test, label in tests if test(name)), default))

    # While a graph is made it is called, not traced: a cache cannot be.
    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def find(name: str) -> str | None:
        return remembered(name)

    return lambda name, param: find(name)


def _test_of(pattern: str | re.Pattern[str]) -> Callable[[str], object]:
    return re.compile(fnmatch.translate(pattern)).match if isinstance(pattern, str) else pattern.search


def by_rank(ranks: Mapping[int, str], default: str | None = None) -> Labels:
    """The label of the parameter's number of axes.

    Args:
        ranks: from number of axes to label.
        default: for other numbers.

    Example:
        >>> labels = by_rank({2: "matrix"}, default="rest")
        >>> labels("weight", torch.empty(3, 3)), labels("bias", torch.empty(3))
        ('matrix', 'rest')
    """
    ranks = dict(ranks)
    return lambda name, param: ranks.get(param.dim(), default)


def by_module_kind(module: nn.Module, kinds: Mapping[type[nn.Module], str], default: str | None = None) -> Labels:
    """The label of the kind of module that owns the parameter.

    A tied parameter belongs to the first module that has it, whose name it carries. Biases count as their module's; ask
    for the rank first where only matrices are meant: ``first_label(by_rank({1: "vector"}), by_module_kind(...))``.

    Args:
        module: the model whose parameters are labelled; read once, not kept.
        kinds: from class to label, in order; subclasses count.
        default: for parameters of other modules.

    Example:
        >>> model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3))
        >>> labels = by_module_kind(model, {nn.Embedding: "embedding", nn.Linear: "matrix"})
        >>> [labels(name, p) for name, p in model.named_parameters()]
        ['embedding', 'matrix', 'matrix']
    """
    known: dict[str, str | None] = {}
    for name, _ in module.named_parameters():
        owner = module.get_submodule(name.rpartition(".")[0])
        known[name] = next((label for kind, label in kinds.items() if isinstance(owner, kind)), default)
    return lambda name, param: known.get(name, default)


def first_label(*labels: Labels) -> Labels:
    """The first label that one of several functions gives.

    Example:
        >>> labels = first_label(by_name({"head.*": "adamw"}), by_rank({2: "muon"}, default="adamw"))
        >>> labels("head.weight", torch.empty(2, 2)), labels("body.weight", torch.empty(2, 2))
        ('adamw', 'muon')
    """

    def first(name: str, param: Tensor) -> str | None:
        for label in labels:
            found = label(name, param)
            if found is not None:
                return found
        return None

    return first


def _groups(params: Params, labels: Labels, transforms: Mapping[str, Transform]) -> dict[str, list[str]]:
    """The names of the parameters by label, in the order of the transformations."""
    groups: dict[str, list[str]] = {label: [] for label in transforms}
    for name, param in tree.named(params).items():
        label = labels(name, param)
        if label is None or label not in groups:
            raise ValueError(
                f"labels: parameter {name!r} got {label!r}, expected one of {sorted(groups)}; "
                "give the label a transformation, or the labels a default"
            )
        groups[label].append(name)
    return groups


def _part(params: Params, names: list[str]) -> Params:
    found = tree.named(params)
    return tree.frozen({name: found[name] for name in names})
