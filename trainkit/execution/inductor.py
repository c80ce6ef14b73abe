"""Calling torch's compiler: its options, what it compiled, and why it could not."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from logging import Logger
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._dynamo.exc import RestartAnalysis, TorchDynamoException
from torch._dynamo.utils import counters
from torch._inductor.compile_fx import compile_fx
from torch._inductor.exc import InductorError

from trainkit.execution import index_guard

COMPILER_ERRORS: tuple[type[Exception], ...] = (TorchDynamoException, InductorError)


def default_options() -> dict[str, Any]:
    """Inductor options that a step is compiled with, over torch's own.

    On a machine without accelerator: a C++ wrapper drives the graph, which takes 0.1 to 0.3 ms off every step; loops of
    fewer than 4,096 numbers per thread (512 in torch) stay on one, since waking the others takes longer; and matrix
    products go to the faster of torch's two libraries (:mod:`trainkit.execution.cpu_matmul`).
    """
    if torch.accelerator.current_accelerator(check_available=True) is not None:
        return {}
    options: dict[str, Any] = {"cpp_wrapper": True, "cpp.min_chunk_size": 4096}
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        from trainkit.execution.cpu_matmul import RowwiseProducts

        options["post_grad_custom_post_pass"] = RowwiseProducts()
    return options


def cause(error: BaseException) -> str:
    """The first telling line of a compiler error, of the innermost one."""
    while isinstance(inner := getattr(error, "inner_exception", None) or error.__cause__, Exception):
        error = inner
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Dynamo puts a title first and says below what that means here.
    told = [*lines[:1], *(line for line in lines[1:] if line.startswith("Explanation:"))]
    return f"{type(error).__name__}: {' '.join(told) or 'no message'}"


@contextmanager
def tracing() -> Iterator[None]:
    """Trace ``torch.autograd.grad`` into the graph, and leave out of it what is logged once.

    A method of loggers that ends in ``_once`` (``warning_once`` of transformers) would break the graph; its message is
    for the first call of an eager model and is not logged from a graph. Other log calls are left to break it.
    """
    config = torch._dynamo.config
    before = config.trace_autograd_ops, config.ignore_logging_functions
    config.trace_autograd_ops = True
    config.ignore_logging_functions = before[1].union(_logged_once())
    try:
        yield
    finally:
        config.trace_autograd_ops, config.ignore_logging_functions = before


def _logged_once() -> list[Any]:
    return [method for name, method in vars(Logger).items() if name.endswith("_once")]


class TracingCall:
    """A compiled function of two lists that is called under :func:`tracing` where that can matter.

    Entering the scope takes 30 microseconds, so it is left out for inputs of kinds that were traced before. Should the
    compiler want to trace all the same (it also looks at global settings), its error brings the scope back.
    """

    def __init__(self, compiled: Callable[..., Any]) -> None:
        self._compiled = compiled
        self._traced: set[Any] = set()

    def __call__(self, leaves: list[Any], batch_leaves: list[Any]) -> Any:
        kind = tuple([(t.shape, t.dtype) if isinstance(t, Tensor) else type(t) for t in batch_leaves])
        if kind in self._traced:
            try:
                return self._compiled(leaves, batch_leaves)
            except COMPILER_ERRORS:
                self._traced.clear()
        with tracing():
            result = self._compiled(leaves, batch_leaves)
        self._traced.add(kind)
        return result


class Compiler:
    """``torch.compile`` with Inductor, and a record of what it compiled."""

    def __init__(self, dynamic: bool | None, options: dict[str, Any]) -> None:
        self._dynamic = dynamic
        self._options = options
        self._breaks_before: Counter[str] = Counter(counters["graph_break"])
        self.compilations = 0
        self.without_wrapper: list[str] = []

    def compile(self, fn: Callable[..., Any], *, fullgraph: bool) -> Callable[..., Any]:
        return torch.compile(
            _own_code(fn),
            fullgraph=fullgraph,
            dynamic=self._dynamic,
            backend=self._backend,
            options={"guard_filter_fn": _needed_guards},
        )

    def kind(self, leaves: list[Any]) -> Any:
        """What a graph is made for: with ``dynamic=False`` these very shapes, else any (torch makes them symbolic).

        Dynamo keeps at most eight graphs of one function, so that those of other shapes are other functions.
        """
        return tuple(getattr(t, "shape", None) for t in leaves) if self._dynamic is False else None

    def breaks(self) -> tuple[str, ...]:
        """Why graphs ended early since this compiler was made, each reason in one line."""
        return tuple(
            reason.strip().splitlines()[0] for reason in Counter(counters["graph_break"]) - self._breaks_before
        )

    def _backend(self, graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        compiled = index_guard.guarded(graph, self._inductor(graph, inputs))
        self.compilations += 1
        return compiled

    def _inductor(self, graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        if _has_regions(graph):
            return _compile_fx(graph, inputs, {**self._options, **FOR_REGIONS})
        if not self._options.get("cpp_wrapper"):
            return _compile_fx(graph, inputs, self._options)
        try:
            return _compile_fx(graph, inputs, self._options)
        except RestartAnalysis:
            # No failure: the compiler asks Dynamo for another graph, with some numbers as constants.
            raise
        except Exception as error:
            # The C++ wrapper knows fewer operators than the Python one, which drives the same kernels.
            compiled = _compile_fx(graph, inputs, {**self._options, "cpp_wrapper": False})
            self.without_wrapper.append(cause(error))
            return compiled


def _compile_fx(graph: fx.GraphModule, inputs: list[Any], options: dict[str, Any]) -> Callable[..., Any]:
    # It gives other things than a function only when it compiles ahead of time.
    return cast("Callable[..., Any]", compile_fx(graph, inputs, config_patches=options))


def _own_code(fn: Any) -> Any:
    """The function with a code object of its own, under a name of its own.

    Dynamo keeps what it compiled with the code object and gives up at the ninth graph of one; and it remembers by name
    which sizes differed between calls, and makes them symbolic. All steps have the same code, but they are other
    programs with other sizes.
    """
    code = fn.__code__.replace(co_name=f"{fn.__name__}_{next(_count)}")
    return FunctionType(code, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)


_count = itertools.count()


def _needed_guards(guards: Sequence[Any]) -> list[bool]:
    """Which of Dynamo's guards to check on every call.

    Not those on what cannot change between the calls of one graph: the tree structures, by which graphs are looked up,
    and the code of the libraries that walk them. They are two thirds, and took 0.1 ms per call for 34 parameters.
    """
    return [not _CONSTANT.match(guard.orig_guard.name) for guard in guards]


_CONSTANT = re.compile(
    r"[^']*(L\['(structure|batch_spec|spec)'\]"
    r"|G\['__import_(torch_dot_utils_dot__pytree|trainkit_dot_(state|tree)|dataclasses|tensordict(_dot_\w+)?)'\])"
)


FOR_REGIONS = {"allow_buffer_reuse": False, "cpp_wrapper": False}
"""Options for graphs with nested regions. Reusing buffers across them gives wrong gradients on a CPU in torch 2.13, by
factors of thousands; the C++ wrapper does not know them."""


def _has_regions(graph: fx.GraphModule) -> bool:
    regions = torch.ops.higher_order.invoke_subgraph
    return any(node.target is regions for node in graph.graph.nodes if node.op == "call_function")
