"""Calling the compiler: many steps in one process, and what is left out of a graph."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainkit import LossOutput, init_state, make_train_step
from trainkit.execution import compile_step, inductor
from trainkit.optim import sgd


def make_step(width: int, log: Any = lambda: None) -> Any:
    def loss(params: Any, buffers: Any, x: Tensor) -> LossOutput:
        log()
        return LossOutput((params["weight"] * x).sum(), x.shape[0])

    return make_train_step(loss, sgd(0.5))


def test_steps_share_no_limits_and_no_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """All whole steps are one text, of which Dynamo compiles a few only, and takes for symbolic what differs."""
    sizes: list[Any] = []
    compile_fx = inductor.compile_fx

    def recording(graph: Any, inputs: list[Any], **options: Any) -> Any:
        sizes.extend(size for t in inputs if isinstance(t, Tensor) for size in t.shape)
        sizes.extend(size for size in inputs if not isinstance(size, Tensor))
        return compile_fx(graph, inputs, **options)

    monkeypatch.setattr(inductor, "compile_fx", recording)
    with torch._dynamo.config.patch(recompile_limit=2):
        for width in (2, 3, 4):
            step = compile_step(make_step(width), strategy="whole")
            layer = nn.Linear(width, 1, bias=False)
            after, _ = step(init_state(layer, sgd(0.5)), torch.ones(4, width))
            torch.testing.assert_close(after.params["weight"], layer.weight.detach() - 0.5)
    assert {2, 3, 4} <= set(sizes)
    assert all(type(size) is int for size in sizes)


def test_graphs_for_one_shape_each_may_be_more_than_the_compiler_keeps_of_one_function() -> None:
    layer = nn.Linear(2, 1, bias=False)
    step = compile_step(make_step(2), strategy="whole", dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2):
        state = init_state(layer, sgd(0.5))
        for rows in (1, 2, 3, 4):
            state, _ = step(state, torch.ones(rows, 2))
    torch.testing.assert_close(state.params["weight"], layer.weight.detach() - 4 * 0.5)
    assert step.explain().compilations == 4


@pytest.mark.parametrize("strategy", ["whole", "split"])
def test_what_is_logged_once_does_not_break_the_graph(monkeypatch: pytest.MonkeyPatch, strategy: Any) -> None:
    monkeypatch.setattr(logging.Logger, "warning_once", lambda self, message: self.warning(message), raising=False)
    logger: Any = logging.getLogger("a model")
    before = set(torch._dynamo.config.ignore_logging_functions)
    layer = nn.Linear(2, 1, bias=False)
    step = compile_step(make_step(2, lambda: logger.warning_once("said once")), strategy=strategy)
    after, _ = step(init_state(layer, sgd(0.5)), torch.ones(4, 2))
    assert step.explain().strategy == strategy
    assert step.explain().breaks == ()
    torch.testing.assert_close(after.params["weight"], layer.weight.detach() - 0.5)
    assert torch._dynamo.config.ignore_logging_functions == before


@pytest.mark.parametrize("raised", [False, True])
def test_tracing_puts_the_settings_back(raised: bool) -> None:
    config = torch._dynamo.config
    before = config.trace_autograd_ops, config.ignore_logging_functions
    try:
        with inductor.tracing():
            assert config.trace_autograd_ops
            if raised:
                raise KeyError
    except KeyError:
        pass
    assert (config.trace_autograd_ops, config.ignore_logging_functions) == before


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("L['structure']._children[0]", False),
        ("list(dict.keys(G['__import_torch_dot_utils_dot__pytree'].SUPPORTED_NODES))[0]", False),
        ("G['__import_trainkit_dot_tree'].frozen", False),
        ("G['__import_tensordict_dot__td'].TensorDict", False),
        ("L['step'].__closure__[0].cell_contents", True),
        ("G['__import_trainkit_dot_optim_dot_adam'].torch_adam", True),
        ("G['__import_trainkit_extra'].SCALE", True),
        ("G['__import_dataclasses_json'].FLAG", True),
        ("L['leaves'][0]", True),
    ],
)
def test_guards_are_kept_on_all_that_may_change(name: str, kept: bool) -> None:
    guard = SimpleNamespace(orig_guard=SimpleNamespace(name=name))
    assert inductor._needed_guards([guard]) == [kept]


def test_a_number_in_the_batch_is_no_reason_to_leave_the_wrapper() -> None:
    # The compiler asks for another trace of such a graph, which is no failure of its own.
    def loss(params: Any, buffers: Any, batch: tuple[Tensor, float]) -> LossOutput:
        return LossOutput((params["weight"] * batch[0]).sum() * batch[1], batch[0].shape[0])

    tx = sgd(0.1)
    state = init_state(nn.Linear(2, 1, bias=False), tx)
    step = compile_step(make_train_step(loss, tx), strategy="whole", donate=False)
    for number in (0.5, 0.25, 0.125):
        after, _ = step(state, (torch.ones(4, 2), number))
        torch.testing.assert_close(after.params["weight"], state.params["weight"] - 0.1 * number)
    assert step.explain().fallbacks == ()
