"""Check the indices that a compiled graph looks up, before it runs.

Compiled CPU code that meets a label or a token out of range ends the process: its check throws inside a parallel
region. So the indices that a graph takes from its inputs (tokens of an embedding, labels of a cross-entropy) are
compared with their bounds on the host first, and the error that eager torch raises is raised, before anything is
written. On an accelerator nothing is checked: looking would wait for the device, whose kernels assert on their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx


@dataclass(frozen=True)
class _Lookup:
    """One place where integers select rows or classes."""

    indices: fx.Node
    bound: int
    ignore: int | None
    name: str


def guarded(graph: fx.GraphModule, run: Callable[..., Any]) -> Callable[..., Any]:
    """``run``, preceded by the check of every lookup in ``graph`` whose indices come from the graph's inputs."""
    lookups = [found for node in graph.graph.nodes if (found := _lookup(node)) and _is_computable(found.indices)]
    if not lookups:
        return run
    indices_of = _reader(graph, [lookup.indices for lookup in lookups])

    def checked(*inputs: Any) -> Any:
        for lookup, indices in zip(lookups, indices_of(*inputs), strict=True):
            _check(lookup, indices)
        return run(*inputs)

    return checked


def _lookup(node: fx.Node) -> _Lookup | None:
    if node.op != "call_function":
        return None
    if node.target is F.embedding:
        indices, weight = _arguments(node, "input", "weight")
        return _bounded(indices, weight, 0, None, "token")
    if node.target in (F.cross_entropy, F.nll_loss):
        logits, labels, _, _, ignore = _arguments(node, "input", "target", "weight", "size_average", "ignore_index")
        return _bounded(labels, logits, -1 if _rank(logits) == 1 else 1, -100 if ignore is None else ignore, "label")
    return None


def _arguments(node: fx.Node, *names: str) -> list[Any]:
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    return [given.get(name) for name in names]


def _bounded(indices: Any, table: Any, dim: int, ignore: int | None, name: str) -> _Lookup | None:
    if not isinstance(indices, fx.Node) or not isinstance(table, fx.Node):
        return None
    value, rows = indices.meta.get("example_value"), table.meta["example_value"].shape[dim]
    if (
        not isinstance(value, Tensor)
        or value.is_floating_point()
        or value.device.type != "cpu"
        or not isinstance(rows, int)
    ):
        return None
    return _Lookup(indices, rows, ignore, name)


def _rank(node: Any) -> int:
    return node.meta["example_value"].dim() if isinstance(node, fx.Node) else 0


def _is_computable(node: fx.Node) -> bool:
    """Whether the indices depend on integer inputs alone, through integer arithmetic: cheap to compute twice."""
    value = node.meta.get("example_value")
    if isinstance(value, Tensor) and (value.is_floating_point() or value.requires_grad):
        return False
    if node.op == "placeholder":
        return True
    return node.op in ("call_function", "call_method") and all(_is_computable(n) for n in node.all_input_nodes)


def _reader(graph: fx.GraphModule, outputs: list[fx.Node]) -> Callable[..., Any]:
    """A function of the graph's inputs that gives these nodes."""
    inputs = graph.graph.find_nodes(op="placeholder")
    if all(node in inputs for node in outputs):
        places = [inputs.index(node) for node in outputs]
        return lambda *given: [given[place] for place in places]
    return _subgraph(graph, outputs)


def _subgraph(graph: fx.GraphModule, outputs: list[fx.Node]) -> fx.GraphModule:
    """The part of the graph that computes ``outputs``, with the same inputs."""
    needed: set[fx.Node] = set()
    pending = list(outputs)
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending.extend(node.all_input_nodes)
    small, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.graph.nodes:
        if node.op == "placeholder" or node in needed:
            copies[node] = small.node_copy(node, copies.__getitem__)
    small.output(tuple(copies[node] for node in outputs))
    return fx.GraphModule(torch.nn.Module(), small)


def _check(lookup: _Lookup, indices: Tensor) -> None:
    if not indices.numel():
        return
    low, high = (int(extreme) for extreme in torch.aminmax(indices))
    if lookup.ignore is not None and (low == lookup.ignore or high == lookup.ignore):
        kept = indices[indices != lookup.ignore]
        if not kept.numel():
            return
        low, high = (int(extreme) for extreme in torch.aminmax(kept))
    if low < 0 or high >= lookup.bound:
        ignored = "" if lookup.ignore is None else f" (or {lookup.ignore}, which is ignored)"
        raise IndexError(
            f"batch: a {lookup.name} is {low if low < 0 else high}, expected 0 to {lookup.bound - 1}{ignored}; "
            "the state is as it was"
        )
