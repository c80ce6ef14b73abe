"""``live``: an optimizer object of torch, with the memory that it has, as a transformation of the very parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from trainkit import tree
from trainkit.optim.fused_object import FusedSteps
from trainkit.optim.transform import REPORT, Transform, optimizer
from trainkit.types import OptState, Params


def live(optimizer_object: Optimizer, named: Mapping[str, nn.Parameter]) -> Transform:
    """A ``torch.optim.Optimizer`` object as a transformation that updates its own parameters, in place.

    For runs whose optimizer must stay the object that somebody holds: its memory is where it was, its groups, hooks and
    schedulers count, and nothing is copied. The price is purity: it works in steps that donate only, on the state whose
    tensors *are* the parameters. A transformation of a class instead, without that price, is
    :func:`trainkit.optim.from_torch`.

    One call hands the gradients to the parameters, calls ``step()`` once, and takes them away again; for a fused Adam
    or AdamW without hooks it calls their kernel, as ``step()`` does. Parameters that got no gradient are left out. It
    runs outside of graphs: compile with ``strategy="split"``, or use "eager".

    Args:
        optimizer_object: of which each call is one ``step()``, without closure.
        named: the module's parameters by name; those that the object does not hold stay as they are.

    Returns: a transformation whose state is nothing but the learning rate of the first group, as a report. As a member
    of a chain it must be the last.

    Raises:
        TypeError: no optimizer object.
        ValueError: from ``init``, a state with other tensors than the parameters; from a call, one outside of a step
            that donates, before anything changes.

    Example:
        >>> from trainkit import LossOutput, init_state, make_train_step
        >>> from trainkit.execution import compile_step
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> sgd = torch.optim.SGD(layer.parameters(), lr=0.5)
        >>> tx = live(sgd, dict(layer.named_parameters()))
        >>> loss = lambda params, buffers, x: LossOutput((params["weight"] * x).sum(), x.shape[0])
        >>> step = compile_step(make_train_step(loss, tx), strategy="eager")
        >>> before = layer.weight.detach().clone()
        >>> state, metrics = step(init_state(layer, tx, copy=False), torch.ones(4, 2))
        >>> layer.weight.detach() - before
        tensor([[-0.5000, -0.5000]])

    Source: the calling convention of torch.optim (torch 2.13).
    """
    if not isinstance(optimizer_object, Optimizer):
        raise TypeError(
            f"optimizer_object: got {optimizer_object!r}, expected an object of a torch.optim.Optimizer; for a class "
            "use trainkit.optim.from_torch"
        )
    own = _Own(optimizer_object, dict(named))
    kind = type(optimizer_object).__name__

    def init(params: Params) -> OptState:
        own.check(params)
        return tree.frozen({REPORT: {"learning_rate": torch.zeros((), dtype=torch.float32)}})

    reason = f"live({kind}) runs a Python object; compile with strategy='split', or use 'eager'"
    # Inside of `apply`, since compiling a disabled function itself would enable it again.
    beside_graphs = torch.compiler.disable(own.step, reason=reason)  # type: ignore[no-untyped-call]

    def apply(grads: Params, opt_state: OptState, params: Params, /, **extra: Any) -> tuple[Params, OptState]:
        step = beside_graphs if torch.compiler.is_compiling() else own.step
        step(grads, opt_state[REPORT]["learning_rate"], params)
        return params, opt_state

    return optimizer(init, apply)


class _Own:
    """The object with its parameters, and the tree of them that was looked at last."""

    def __init__(self, optimizer_object: Optimizer, parameters: dict[str, nn.Parameter]) -> None:
        self.object = optimizer_object
        self.parameters = parameters
        self.checked: list[torch.Tensor] = []
        self.fused = FusedSteps(optimizer_object, parameters)

    def step(self, grads: Params, reported: torch.Tensor, params: Params) -> None:
        tensors = tree.leaves(params)
        if tensors is not self.checked:
            self.check(params)
        if not (tree.is_donated(tensors) and tree.is_donated([reported])):
            raise tree.NotDonatedError(
                f"state: live({type(self.object).__name__}) writes over the parameters, and this call is outside a "
                "donation scope. Use a step that donates, compile_step(step, donate=True); in a chain, the last place"
            )
        if not self.fused.step(grads):
            self._step_of_object(tree.named(grads))
        reported.fill_(self.object.param_groups[0]["lr"])

    def _step_of_object(self, grads: dict[str, torch.Tensor]) -> None:
        parameters = [self.parameters[name] for name in grads]
        # Copies of those that share memory or belong to others: an optimizer may write into its gradients.
        own = tree.writable(list(grads.values()))
        try:
            for p, g in zip(parameters, own, strict=True):
                p.grad = g
            with torch.enable_grad():
                self.object.step()
        finally:
            for p in parameters:
                p.grad = None

    def check(self, params: Params) -> None:
        """Refuse a state whose tensors are not the parameters themselves."""
        for name, tensor in tree.named(params).items():
            own = self.parameters.get(name)
            if own is None:
                raise ValueError(f"named: {name!r} of the state is missing; expected the module's own names")
            if tree.address(own) != tree.address(tensor) or own.shape != tensor.shape:
                raise ValueError(
                    f"state: params[{name!r}] is not the memory of the parameter; make it with "
                    "init_state(module, tx, copy=False), and again after the module was moved"
                )
        self.checked = tree.leaves(params)
