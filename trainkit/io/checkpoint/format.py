"""What a checkpoint folder holds: its files, and the names of the tensors in them.

``model.safetensors`` has parameters and buffers under the module's own names. ``training.safetensors`` has all other
leaves of the state under their paths, keys joined with "/"; inside a key "~" is written "~0" and "/" is written "~1"
(RFC 6901). ``training.json`` has the data cursor, counters and metadata. ``manifest.json`` says what the others are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainkit.io.checkpoint.tensors import CODES
from trainkit.state import TrainState
from trainkit.tree import is_tree

if TYPE_CHECKING:
    from tensordict import TensorDict

MODEL = "model.safetensors"
TRAINING = "training.safetensors"
TRAINING_JSON = "training.json"
MANIFEST = "manifest.json"
FILES = (MODEL, TRAINING, TRAINING_JSON)
"""What a manifest of this version speaks of."""
MAX_NAME = 512
"""Characters in the name of a tensor."""

_SAFE_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def safe_name(name: Any) -> bool:
    """Whether a string may be the name of a file or of a run: 1 to 128 of ``A-Z a-z 0-9 . _ -``, not "." or "..".

    Example:
        >>> safe_name("model.safetensors"), safe_name("../model"), safe_name("")
        (True, False, False)
    """
    return isinstance(name, str) and _SAFE_NAME.fullmatch(name) is not None and name not in (".", "..")


def tensor_name_problem(name: str) -> str | None:
    """Why a string cannot be the name of a tensor in a file; None if it can."""
    if not 1 <= len(name) <= MAX_NAME:
        return f"has {len(name)} characters, expected 1 to {MAX_NAME}"
    if name == "__metadata__":
        return "is reserved by safetensors"
    return "has control characters" if _CONTROL.search(name) else None


def join_path(keys: Iterable[str]) -> str:
    """The keys of a path in a tree as one string.

    Example:
        >>> join_path(["opt_state", "exp_avg", "layer.weight"]), join_path(["a/b", "~"])
        ('opt_state/exp_avg/layer.weight', 'a~1b/~0')

    Source: RFC 6901, section 3.
    """
    return "/".join(key.replace("~", "~0").replace("/", "~1") for key in keys)


def split_path(name: str) -> tuple[str, ...]:
    """The keys that :func:`join_path` joined.

    Example:
        >>> split_path("a~1b/~01")
        ('a/b', '~1')
    """
    return tuple(key.replace("~1", "/").replace("~0", "~") for key in name.split("/"))


def flatten_tree(tree: TensorDict, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a nested tree by their joined paths, each path behind ``prefix``.

    Example:
        >>> from trainkit import tree
        >>> flatten_tree(tree.frozen({"0": tree.frozen({"w": torch.ones(1)})}), "opt_state/")
        {'opt_state/0/w': tensor([1.])}
    """
    found: dict[str, Tensor] = {}
    _fill(found, tree, prefix)
    return found


def _fill(found: dict[str, Tensor], node: Any, prefix: str) -> None:
    for key, child in node.items():
        # Most keys are as they should be, and there may be many thousands.
        name = prefix + (join_path([key]) if "/" in key or "~" in key else key)
        if is_tree(child):
            _fill(found, child, f"{name}/")
        else:
            found[name] = child


def unflatten_tree(like: TensorDict, tensors: Mapping[str, Tensor], prefix: str = "") -> TensorDict:
    """A tree with the structure of ``like`` and the tensors that :func:`flatten_tree` named.

    Raises: KeyError for a leaf of ``like`` without a tensor.

    Example:
        >>> from trainkit import tree
        >>> unflatten_tree(tree.frozen({"w": torch.ones(1)}), {"w": torch.zeros(1)})["w"]
        tensor([0.])
    """
    entries: dict[str, Any] = {}
    children: dict[str, Any] = dict(like.items())
    for key, child in children.items():
        path = prefix + join_path([str(key)])
        if is_tree(child):
            entries[key] = unflatten_tree(child, tensors, f"{path}/")
        else:
            entries[key] = tensors[path]
    return type(like)(entries, batch_size=like.batch_size, device=like.device, lock=like.is_locked)


@dataclass(frozen=True)
class Leaves:
    """The tensors of a state, by the file they belong to and the name they have there.

    Args:
        model: parameters and buffers under the module's names.
        training: everything else under its path.
        params: which of ``model`` are parameters.
    """

    model: dict[str, Tensor]
    training: dict[str, Tensor]
    params: tuple[str, ...]

    def by_file(self) -> dict[str, dict[str, Tensor]]:
        return {MODEL: self.model, TRAINING: self.training}


def flatten_state(state: TrainState) -> Leaves:
    """The leaves of a state by file and name.

    Raises:
        TypeError: a leaf is not an ordinary tensor.
        ValueError: a name is there twice or cannot be stored, or a tensor cannot.

    Example:
        >>> from trainkit import init_state
        >>> from trainkit.optim import sgd
        >>> leaves = flatten_state(init_state(nn.Linear(2, 1), sgd(0.1, momentum=0.9)))
        >>> sorted(leaves.model), [name for name in leaves.training if "weight" in name]
        (['bias', 'weight'], ['opt_state/momentum_buffer/weight'])
    """
    params, buffers = dict(_flat(state.params, "params")), dict(_flat(state.buffers, "buffers"))
    both = sorted(params.keys() & buffers.keys())
    if both:
        raise ValueError(f"state: {both[0]!r} is the name of a parameter and of a buffer")
    training = {"step": state.step, "key": state.key}
    training |= flatten_tree(state.opt_state, "opt_state/") | flatten_tree(state.extra, "extra/")
    model = params | buffers
    for name, tensor in (*model.items(), *training.items()):
        _check_leaf(name, tensor)
    return Leaves(model, training, tuple(params))


def _flat(part: Any, field: str) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in part.items():
        if is_tree(tensor):
            raise TypeError(f"state.{field}[{name!r}]: is a tree, expected tensors under the module's names")
        yield name, tensor


def _check_leaf(name: str, tensor: Any) -> None:
    if type(tensor) not in (Tensor, nn.Parameter):
        hint = "; gather a sharded tensor first (full_tensor)" if hasattr(tensor, "full_tensor") else ""
        raise TypeError(f"state: {name!r} is a {type(tensor).__name__}, expected a torch.Tensor{hint}")
    if tensor.layout != torch.strided or tensor.is_meta:
        raise ValueError(
            f"state: {name!r} is of layout {tensor.layout} on {tensor.device}, expected a dense tensor with values"
        )
    if tensor.dtype not in CODES:
        raise ValueError(f"state: {name!r} is of {tensor.dtype}, which safetensors files cannot hold")
    if CODES[tensor.dtype] == "F4" and not tensor.dim():
        raise ValueError(f"state: {name!r} is a pair of float4 numbers without a dimension, expected at least one")
    problem = tensor_name_problem(name)
    if problem:
        raise ValueError(f"state: the name {name[:80]!r} {problem}")


def unflatten_state(like: TrainState, model: Mapping[str, Tensor], training: Mapping[str, Tensor]) -> TrainState:
    """A state with the structure of ``like`` and the tensors that :func:`flatten_state` named.

    Example:
        >>> from trainkit import init_state
        >>> from trainkit.optim import sgd
        >>> state = init_state(nn.Linear(2, 1), sgd(0.1))
        >>> leaves = flatten_state(state)
        >>> unflatten_state(state, leaves.model, leaves.training).params["weight"] is state.params["weight"]
        True
    """
    # The module's names are taken as they are: in its file a "/" means nothing.
    params, buffers = (_renamed(part, model) for part in (like.params, like.buffers))
    return TrainState(
        step=training["step"],
        params=params,
        buffers=buffers,
        opt_state=unflatten_tree(like.opt_state, training, "opt_state/"),
        key=training["key"],
        extra=unflatten_tree(like.extra, training, "extra/"),
    )


def _renamed(part: TensorDict, tensors: Mapping[str, Tensor]) -> TensorDict:
    entries = {name: tensors[str(name)] for name in dict(part.items())}
    return type(part)(entries, batch_size=part.batch_size, device=part.device, lock=part.is_locked)
