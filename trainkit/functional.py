"""A module as a function of its parameters and buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from trainkit import tree
from trainkit.types import Buffers, Params

_Slot = tuple[dict[str, Any], str]

ModelFn = Callable[..., tuple[Any, Buffers]]
"""``(params, buffers, *args, **kwargs) -> (outputs, buffers)``."""


def functional(module: nn.Module, *, training: bool | None = None, call: Callable[..., Any] | None = None) -> ModelFn:
    """The module's forward as a pure function of its tensors.

    ``outputs, buffers = functional(module)(params, buffers, *args, **kwargs)`` runs ``module(*args, **kwargs)`` with
    the given tensors in the place of its own. Buffers that the forward pass writes into (batch-norm statistics) are
    copies, returned under their names; the given ones stay as they were. Tied weights get one tensor.

    Args:
        module: any module, also one with hooks: its ``__call__`` is used.
        training: True and False run it in that mode and put the modes back; None leaves each submodule's mode as it is.
        call: what is called with the arguments, any function that uses the module; None calls the module itself.

    Raises: KeyError naming the parameter or buffer that the given trees lack.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 1)
        >>> zero = tree.frozen({"weight": torch.zeros(1, 2), "bias": torch.ones(1)})
        >>> functional(layer)(zero, tree.frozen(), torch.randn(3, 2))[0].flatten()
        tensor([1., 1., 1.])

    Source: ``torch.func.functional_call``, whose meaning it has; it swaps at a third of the cost per call, and
    returns the buffers.
    """
    run = module if call is None else call
    slots = slots_of(module)
    own_buffers = {name for name, _ in module.named_buffers()}
    places = [(holder, leaf, name) for name, slot in slots.items() for holder, leaf in slot]

    def model(params: Params, buffers: Buffers, *args: Any, **kwargs: Any) -> tuple[Any, Buffers]:
        # Frozen parameters travel with the buffers; nothing writes into them, so they need no copy.
        rest = tree.named(buffers)
        mutable = [name for name in rest if name in own_buffers]
        given = tree.named(params) | rest
        given.update(zip(mutable, tree.writable([rest[name] for name in mutable]), strict=True))
        if len(given) != len(slots) or given.keys() != slots.keys():
            raise _other_names(slots, given)
        before = [holder[leaf] for holder, leaf, _ in places]
        for holder, leaf, name in places:
            holder[leaf] = given[name]
        modes = _set_modes(module, training)
        try:
            outputs = run(*args, **kwargs)
            after = {name: slots[name][0][0][slots[name][0][1]] for name in mutable}
        finally:
            # Backwards: a submodule that hangs at two places was filled twice, and only its first entry is its own.
            for (holder, leaf, _), tensor in zip(reversed(places), reversed(before), strict=True):
                holder[leaf] = tensor
            for submodule, mode in modes:
                submodule.training = mode
        return outputs, tree.like(buffers, [after.get(name, old) for name, old in rest.items()])

    return model


def slots_of(module: nn.Module) -> dict[str, list[_Slot]]:
    """Where a module keeps its parameters and buffers: by first name, every dictionary entry that holds the tensor."""
    parameters = _slots(module, module.named_parameters(remove_duplicate=False), "_parameters")
    return parameters | _slots(module, module.named_buffers(remove_duplicate=False), "_buffers")


def _slots(module: nn.Module, named: Any, attribute: str) -> dict[str, list[_Slot]]:
    """Where each tensor of the module is kept: by its first name, all the dictionaries that hold it."""
    first: dict[int, str] = {}
    slots: dict[str, list[_Slot]] = {}
    for name, tensor in named:
        owner_path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner_path)
        slots.setdefault(first.setdefault(id(tensor), name), []).append((getattr(owner, attribute), leaf))
    return slots


def _set_modes(module: nn.Module, training: bool | None) -> list[tuple[nn.Module, bool]]:
    if training is None:
        return []
    changed = [(m, m.training) for m in module.modules() if m.training != training]
    for submodule, _ in changed:
        submodule.training = training
    return changed


def _other_names(slots: dict[str, list[_Slot]], given: dict[str, Tensor]) -> KeyError:
    missing = [name for name in slots if name not in given]
    if missing:
        return KeyError(f"params/buffers lack {missing[0]!r} (and {len(missing) - 1} more) that the module has")
    foreign = [name for name in given if name not in slots]
    return KeyError(f"params/buffers hold {foreign[0]!r} (and {len(foreign) - 1} more) that the module does not have")
