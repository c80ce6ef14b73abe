"""Layer-wise optimizers: each parameter is updated as soon as its gradient is there, which is then freed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class LayerwiseOptimizer(Optimizer):
    """Many optimizers of one parameter each, stepped by hooks during the backward pass.

    No two gradients need to exist at once. Its groups are the very groups of the optimizers inside and its state is
    theirs together, so that schedulers, ``state_dict`` and whoever reads learning rates need to know nothing of this.
    ``step`` and ``zero_grad`` have nothing left to do. Gradients cannot be accumulated or clipped as a whole.

    Args:
        optimizer_dict: the optimizer of each parameter.
        lr: the learning rate at the start, for schedules that ask for it.

    Raises: ValueError for no parameters.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = LayerwiseOptimizer({w: torch.optim.SGD([w], lr=0.5)}, lr=0.5)
        >>> w.sum().backward()
        >>> w.detach(), w.grad
        (tensor([0.5000]), None)

    Source: Trainer 4.57: ``get_optimizer_cls_and_kwargs``, the names that end with "_layerwise".
    """

    def __init__(self, optimizer_dict: Mapping[Tensor, Optimizer], lr: float = 1e-3) -> None:
        if not optimizer_dict:
            raise ValueError("optimizer_dict: it is empty; expected an optimizer for each trainable parameter")
        self.optimizer_dict = dict(optimizer_dict)
        super().__init__([group for inner in self.optimizer_dict.values() for group in inner.param_groups], {"lr": lr})
        for inner in self.optimizer_dict.values():
            self.state.update(inner.state)
        self._share()
        self._handles = [_after_gradient(p, self._step_of) for p in self.optimizer_dict]

    def step(self, closure: Any = None) -> Any:
        """Nothing: the hooks have updated the parameters already. Returns what ``closure`` returns."""
        return None if closure is None else closure()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of all parameters; see ``torch.optim.Optimizer.load_state_dict``."""
        super().load_state_dict(state_dict)
        self._share()

    def remove_hooks(self) -> None:
        """Let the parameters go: a backward pass then leaves gradients again, and updates nothing."""
        for handle in self._handles:
            handle.remove()

    def _share(self) -> None:
        """Make the optimizers inside work on the groups and the state of this one."""
        groups = iter(self.param_groups)
        for inner in self.optimizer_dict.values():
            inner.state = self.state
            inner.param_groups = [next(groups) for _ in inner.param_groups]

    def _step_of(self, p: Tensor) -> None:
        if p.grad is not None:
            self.optimizer_dict[p].step()
            p.grad = None


def _after_gradient(p: Tensor, do: Callable[[Tensor], None]) -> RemovableHandle:
    handle: RemovableHandle = p.register_post_accumulate_grad_hook(do)  # type: ignore[no-untyped-call]
    return handle
