"""``as_torch``: any transformation as a ``torch.optim.Optimizer``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainkit import tree
from trainkit.optim.transform import Transform, reports
from trainkit.types import OptState, Params, Schedule


def as_torch(
    transform: Transform | Callable[[Schedule], Transform],
    params: nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
    *,
    lr: float | None = None,
    unused: str = "error",
) -> TransformOptimizer:
    """A transformation as a ``torch.optim.Optimizer`` that updates a module's parameters in place.

    The learning rate belongs either to the transformation or to torch:

    - a transformation has its own, a number or a schedule. ``param_groups[0]["lr"]`` then only shows it, and a
      ``torch.optim.lr_scheduler`` is refused.
    - a function that makes a transformation out of a schedule, such as ``adamw`` itself, gets one that reads
      ``param_groups[0]["lr"]`` in every step. Give the first value as ``lr``; schedulers and assignments act.

    Args:
        transform: a transformation, or a function from a schedule to one.
        params: a module, its ``named_parameters()``, or tensors (named "0", "1", ...). Those without
            ``requires_grad`` are left out. One parameter group; for several, join transformations with ``partition``.
        lr: the first learning rate, for a function only.
        unused: what a parameter without ``.grad`` in a step means: "error", or "zero" for a gradient of zeros. (torch's
            own optimizers skip it.)

    Returns: an optimizer with ``step``, ``zero_grad``, ``state_dict`` and ``load_state_dict``.

    Raises: ValueError for no parameters, an ``lr`` where it has no effect or is missing.

    Example:
        >>> from trainkit.optim import sgd
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> opt = as_torch(sgd, layer, lr=0.5)
        >>> before = layer.weight.item()
        >>> layer(torch.ones(1, 1)).sum().backward()
        >>> opt.step()
        >>> round(layer.weight.item() - before, 4)
        -0.5

    Source: the calling convention of torch.optim (torch 2.13).
    """
    return TransformOptimizer(transform, params, lr=lr, unused=unused)


class TransformOptimizer(Optimizer):
    """What :func:`as_torch` returns. ``opt_state`` is the transformation's state."""

    opt_state: OptState

    def __init__(
        self,
        transform: Transform | Callable[[Schedule], Transform],
        params: nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
        *,
        lr: float | None = None,
        unused: str = "error",
    ) -> None:
        if unused not in ("error", "zero"):
            raise ValueError(f"unused: got {unused!r}, expected 'error' or 'zero'")
        self._owns_rate = isinstance(transform, Transform)
        if self._owns_rate and lr is not None:
            raise ValueError(f"lr: got {lr}, but the transformation has its own rate; give the function that makes it")
        if not self._owns_rate and lr is None:
            raise ValueError("lr: missing; a function that makes a transformation needs the first learning rate")
        self._named = _named_parameters(params)
        self._unused = unused
        super().__init__(list(self._named.values()), {"lr": torch.zeros(()) if self._owns_rate else lr})
        self._transform = transform if isinstance(transform, Transform) else transform(self._rate)
        with torch.no_grad():
            self.opt_state = self._transform.init(self._tree())
        self._show_rate()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """The one group of the constructor. Raises: ValueError for a second."""
        if self.param_groups:
            raise ValueError("param_group: a transformation has one group; join several with trainkit.optim.partition")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters in place from their ``.grad``.

        Args:
            closure: computes the loss and the gradients; its result is handed to the transformation as ``loss``.

        Raises: ValueError for parameters without gradient, or a learning rate set where it has no effect.
        """
        self._check_rate()
        extra: dict[str, Any] = {}
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            extra["loss"] = torch.as_tensor(loss).detach()
        grads, params = self._grads(), self._tree()
        with tree.donate(params, self.opt_state):
            new, self.opt_state = self._transform.apply(grads, self.opt_state, params, **extra)
        for p, t in zip(self._named.values(), tree.leaves(new), strict=True):
            if t.data_ptr() != p.data_ptr():
                p.copy_(t)
        self._show_rate()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The state as torch gives it, with the transformation's tensors under their paths."""
        packed = super().state_dict()
        packed["state"] = dict(self.opt_state.flatten_keys("/").items())
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a state of the same transformation over the own one.

        Raises: ValueError for other paths or shapes, before anything changes.
        """
        own, given = dict(self.opt_state.flatten_keys("/").items()), state_dict["state"]
        if own.keys() != given.keys():
            different = sorted(own.keys() ^ given.keys())
            raise ValueError(f"state_dict: entries {different[:5]} on one side only; is it another transformation's?")
        wrong = [path for path, t in own.items() if t.shape != given[path].shape]
        if wrong:
            raise ValueError(f"state_dict: {wrong[:5]} have other shapes; is it another model's?")
        for path, t in own.items():
            t.copy_(given[path])
        fixed = ("params", "lr") if self._owns_rate else ("params",)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key not in fixed})

    def _rate(self, count: Tensor) -> Tensor:
        return torch.as_tensor(self.param_groups[0]["lr"], dtype=torch.float64)

    def _show_rate(self) -> None:
        if self._owns_rate:
            # The tensor itself, so that nobody waits for a device to show a number.
            self.param_groups[0]["lr"] = reports(self.opt_state).get("learning_rate", torch.zeros(()))

    def _check_rate(self) -> None:
        group = self.param_groups[0]
        if self._owns_rate and ("initial_lr" in group or not isinstance(group["lr"], Tensor)):
            raise ValueError(
                'lr: a scheduler or an assignment changed param_groups[0]["lr"], but the transformation has its own '
                "rate; give as_torch the function that makes it, as in as_torch(adamw, model, lr=1e-3)"
            )

    def _tree(self) -> Params:
        return tree.frozen({name: p.detach() for name, p in self._named.items()})

    def _grads(self) -> Params:
        missing = [name for name, p in self._named.items() if p.grad is None]
        if missing and self._unused == "error":
            raise ValueError(
                f"params: no gradient on {', '.join(missing)}. Freeze them (requires_grad=False), use them in the "
                "loss, or pass unused='zero'"
            )
        return tree.frozen({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in self._named.items()})


def _named_parameters(params: Any) -> dict[str, Tensor]:
    if isinstance(params, nn.Module):
        params = params.named_parameters()
    found = [item if isinstance(item, tuple) else (str(i), item) for i, item in enumerate(params)]
    named = {name: p for name, p in found if p.requires_grad}
    if not named:
        raise ValueError(f"params: none of {len(found)} tensors is trainable; expected at least one with requires_grad")
    return named
