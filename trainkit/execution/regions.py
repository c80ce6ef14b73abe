"""Compile a repeated block once, so that the compile time does not grow with depth."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from trainkit.execution.submodules import forwards, matching
from trainkit.functional import slots_of
from trainkit.types import Batch, Buffers, LossFn, LossOutput, Params


def repeated(loss: LossFn, module: nn.Module, pattern: str) -> LossFn:
    """Let the compiler treat equal submodules as one region that is called several times.

    Without a compiler nothing changes. With one, the region is traced, differentiated and compiled once, at the
    price of the fusions across its border, of buffers that are not shared between regions, and of a Python wrapper.

    Args:
        loss: a loss that calls ``module``.
        module: the module whose submodules repeat.
        pattern: matched against the names of ``module.named_modules()``, as a shell would: ``"blocks.*"``. The
            submodules must be alike in all but the values of their tensors: the first one's code runs for all.

    Returns: a LossFn of the same meaning.

    Raises: ValueError if no submodule matches, or if two of them differ in class or in the names or shapes of tensors.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        >>> loss = lambda params, buffers, x: LossOutput(net(x).sum(), x.shape[0])
        >>> float(repeated(loss, net, "[01]")(None, None, torch.ones(2, 4)).weight)
        2.0

    Source: ``torch.compiler.nested_compile_region``.
    """
    blocks = matching(module, pattern)
    _check_alike(blocks)
    region = {mode: _region(next(iter(blocks.values())), mode) for mode in (True, False)}
    replacements = [(block, _through(region, block)) for block in blocks.values()]

    def with_regions(params: Params, buffers: Buffers, batch: Batch) -> LossOutput:
        if not torch.compiler.is_compiling():
            return loss(params, buffers, batch)
        with forwards(replacements):
            return loss(params, buffers, batch)

    return with_regions


def _region(block: nn.Module, training: bool) -> Callable[..., Any]:
    """One region of code for all blocks; their tensors are its arguments, as the compiler would else take the
    first's."""
    # A copy without memory: the original's own forward leads to the region.
    template = copy.deepcopy(block).to("meta").train(training)
    names = list(slots_of(block))

    def code(tensors: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return torch.func.functional_call(template, dict(zip(names, tensors, strict=True)), args, kwargs)

    region: Callable[..., Any] = torch.compiler.nested_compile_region(code)
    return region


def _through(region: dict[bool, Callable[..., Any]], block: nn.Module) -> Callable[..., Any]:
    places = [group[0] for group in slots_of(block).values()]

    def forward(*args: Any, **kwargs: Any) -> Any:
        return region[block.training]([holder[leaf] for holder, leaf in places], args, kwargs)

    return forward


def _check_alike(blocks: dict[str, nn.Module]) -> None:
    (first, template), *others = blocks.items()
    for name, block in others:
        if _shape(block) != _shape(template):
            raise ValueError(
                f"pattern: {name!r} is not like {first!r} (class, or names, shapes and dtypes of tensors); "
                "repeated submodules must be alike"
            )


def _shape(block: nn.Module) -> Any:
    return type(block), {
        name: (t.shape, t.dtype, t.requires_grad) for name, t in block.state_dict(keep_vars=True).items()
    }
