"""``from_torch``: any ``torch.optim.Optimizer`` class as a transformation."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from trainkit import rng, tree
from trainkit.optim.torch_kernels import device_of, in_order, population_safe
from trainkit.optim.transform import REPORT, Transform, optimizer, with_entries
from trainkit.types import OptState, Params


def from_torch(cls: type[Optimizer], **kwargs: Any) -> Transform:
    """Any ``torch.optim.Optimizer`` class, torch's or other people's, as a transformation.

    ``from_torch(cls, **kwargs)`` updates as ``cls(params, **kwargs)`` does. The object's memory becomes the optimizer
    state: tensors as they are, Python numbers (counters of steps) as 0-d tensors, also those that the object keeps in
    its parameter group. What is in it is found out by two trial steps on copies; in the first real step the object
    makes its memory itself, out of whatever it makes it from.

    Handing the memory over costs some 20 microseconds per parameter and step; the object's own step is the rest. It
    runs outside of graphs: in a compiled step use ``strategy="split"``, where the loss is compiled and this is not.
    Random numbers that the object draws come from the global generator.

    Args:
        cls: a class whose objects update their parameters in ``step()``, without closure, in one parameter group.
        kwargs: for its constructor. ``lr`` may also be a schedule of the count; it is then set before every step.

    Returns: a transformation with the state ``count``, ``memory`` (one tree per entry of the object's state), ``group``
    (what changes in its parameter group) and the learning rate as a report.

    Raises:
        TypeError: ``cls`` is no optimizer class.
        ValueError: it needs a closure; or, from ``init``, it keeps memory where it cannot be carried: in attributes,
            under keys that are no parameters, as values that are neither numbers nor tensors, or of changing shape.

    Example:
        >>> w = tree.frozen({"w": torch.tensor([1.0])})
        >>> tx = from_torch(torch.optim.Rprop, lr=0.25)
        >>> tx.apply(w, tx.init(w), w)[0]["w"]
        tensor([0.7500])

    Source: the calling convention of torch.optim (torch 2.13).
    """
    _check_class(cls)
    factory = _Factory(cls, kwargs)
    lifted: dict[Any, _Lifted] = {}

    def lift(params: Params) -> _Lifted:
        key = tuple((name, p.shape, p.dtype, p.device) for name, p in tree.named(params).items())
        if key not in lifted:
            lifted[key] = _Lifted.of(factory, params)
        return lifted[key]

    def init(params: Params) -> OptState:
        return lift(params).first_state() if tree.leaves(params) else tree.frozen()

    def run(grads: Params, opt_state: OptState, params: Params) -> tuple[Params, OptState]:
        return lift(params).step(factory, grads, opt_state, params)

    reason = f"from_torch({cls.__name__}) runs a Python object; compile with strategy='split', or use 'eager'"
    # Inside of `apply`, since compiling a disabled function itself would enable it again.
    beside_graphs = torch.compiler.disable(population_safe(run), reason=reason)  # type: ignore[no-untyped-call]

    def apply(grads: Params, opt_state: OptState, params: Params, /, **extra: Any) -> tuple[Params, OptState]:
        if not tree.leaves(params):
            return params, opt_state
        new, after = beside_graphs(grads, opt_state, params)
        return new, after

    return optimizer(init, apply)


@dataclass(frozen=True)
class _Factory:
    """Makes objects of the class and knows their learning rate."""

    cls: type[Optimizer]
    kwargs: dict[str, Any]

    def rate(self, count: int) -> float | None:
        """The learning rate to set before a step; None where the object has its own."""
        given = self.kwargs.get("lr")
        return float(given(torch.tensor(count))) if callable(given) else None

    def __call__(self, tensors: Sequence[Tensor], count: int) -> Optimizer:
        rate = self.rate(count)
        kwargs = self.kwargs if rate is None else {**self.kwargs, "lr": rate}
        made = self.cls([nn.Parameter(t) for t in tensors], **kwargs)
        if len(made.param_groups) != 1:
            raise ValueError(
                f"cls: {self.cls.__name__} splits its parameters into {len(made.param_groups)} groups, expected one; "
                "lift an optimizer for each part and join them with trainkit.optim.partition"
            )
        return made


@dataclass(frozen=True)
class _Value:
    """What one value in an object's memory is: its type and, of tensors, the form."""

    kind: type
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    device: torch.device | None = None

    @staticmethod
    def of(value: Any, place: str) -> _Value:
        if isinstance(value, Tensor):
            return _Value(Tensor, tuple(value.shape), value.dtype, value.device)
        if value is None or type(value) in _NUMBERS:
            return _Value(type(value), dtype=_NUMBERS.get(type(value)))
        raise ValueError(f"cls: {place} holds {type(value).__name__}, expected tensors, numbers or None as memory")

    def first(self) -> Tensor:
        # Numbers stay on the CPU: the object wants them as numbers again, and asking an accelerator would wait for it.
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device or "cpu")

    def given_back(self, stored: Tensor | None) -> Any:
        return stored if self.kind is Tensor or stored is None else self.kind(stored.item())

    def stored(self, value: Any, old: Tensor, foreign: set[int]) -> Tensor:
        """The value as a tensor of the state: ``old`` overwritten, or what the object made in its place."""
        if self.kind is not Tensor:
            return old.fill_(value)
        made: Tensor = value
        if made is old:
            return old
        if _Value.of(made, "memory") != self:
            raise ValueError(f"cls: a value of {self} in its memory became {tuple(made.shape)} of {made.dtype}")
        # The parameter or the gradient itself, remembered without a copy, would be overwritten by others.
        return made.detach().clone() if _storage(made) in foreign else made.detach()


_NUMBERS: dict[type, torch.dtype] = {bool: torch.bool, int: torch.int64, float: torch.float64}

_Memory = dict[str, dict[str, Any]]
"""Values by their path in the state of a parameter, then by the name of the parameter."""


@dataclass(frozen=True)
class _Form:
    """How the state of one parameter is made up.

    Args:
        paths: of its values, in their order.
        keys: of the dictionary, if the values are its own; None if some are nested.
        spec: the whole structure.
    """

    paths: list[str]
    keys: list[Any] | None
    spec: pytree.TreeSpec

    @staticmethod
    def of(state: dict[Any, Any]) -> _Form:
        found, spec = pytree.tree_flatten_with_path(state)
        nested = any(len(path) > 1 for path, _ in found)
        return _Form(["/".join(map(_label, path)) for path, _ in found], None if nested else list(state), spec)

    def values(self, state: dict[Any, Any]) -> list[Any]:
        """The values in a state. Raises: ValueError for a state of another form."""
        if self.keys is not None and list(state) == self.keys:
            return list(state.values())
        found, spec = pytree.tree_flatten(state)
        if spec != self.spec:
            raise ValueError(f"cls: state with entries {self.paths} expected, but in this step it became {spec}")
        return found

    def state(self, values: list[Any]) -> dict[Any, Any]:
        """The state of these values."""
        if self.keys is not None:
            return dict(zip(self.keys, values, strict=True))
        made: dict[Any, Any] = pytree.tree_unflatten(values, self.spec)
        return made


@dataclass(frozen=True)
class _Lifted:
    """An object of the class, empty, with the layout of its memory for one set of parameters.

    Args:
        scratch: takes the steps; holds no memory in between.
        forms: for each parameter how its state is made up.
        memory: what is found there.
        group: entries of the parameter group that change.
    """

    scratch: Optimizer
    forms: dict[str, _Form]
    memory: dict[str, dict[str, _Value]]
    group: dict[str, _Value]

    @staticmethod
    def of(factory: _Factory, params: Params) -> _Lifted:
        """Find the layout by two steps on copies, of which the second must not change it."""
        scratch = factory([t.detach().clone() for t in tree.leaves(params)], 0)
        attributes, group = _numbers_in(vars(scratch)), _numbers_in(scratch.param_groups[0])
        names = list(tree.named(params))
        with rng.seeded(0, device_of(params)):
            first, second = (_after_trial_step(scratch, names) for _ in range(2))
        forms, memory = first
        if first != second:
            raise ValueError(
                f"cls: the memory of {factory.cls.__name__} (entries {sorted(memory)}) changes its structure between "
                "the first and the second step; expected one that keeps its entries, their types and their shapes"
            )
        moved = _changed(attributes, _numbers_in(vars(scratch)))
        if moved:
            raise ValueError(
                f"cls: {factory.cls.__name__} changes its attributes {sorted(moved)} in a step, where they cannot be "
                "carried; expected memory in self.state[parameter] or in the parameter group"
            )
        turned = _changed(group, _numbers_in(scratch.param_groups[0]))
        if factory.rate(0) is not None:
            turned.pop("lr", None)
        lifted = _Lifted(scratch, forms, memory, {key: _Value.of(v, key) for key, v in turned.items()})
        lifted.empty()
        return lifted

    def first_state(self) -> OptState:
        """A state of the right form for before the first step; the object fills it in the first."""
        return tree.frozen(
            {
                "count": torch.zeros((), dtype=torch.int64),
                "memory": {path: {name: v.first() for name, v in of.items()} for path, of in self._tensors()},
                "group": {key: value.first() for key, value in self.group.items()},
                REPORT: {"learning_rate": torch.zeros((), dtype=torch.float32)},
            }
        )

    def step(self, factory: _Factory, grads: Params, opt_state: OptState, params: Params) -> tuple[Params, OptState]:
        """One step of the object with the given parameters and memory."""
        count, reported = tree.writable([opt_state["count"], opt_state[REPORT]["learning_rate"]])
        before = int(count)
        new = tree.writable(tree.leaves(params))
        # Copies as well: many optimizers add weight decay to the gradient in place.
        given = [g.to(p.dtype) for g, p in zip(tree.writable(in_order(grads, params)), new, strict=True)]
        old = {path: _writable(tensors) for path, tensors in opt_state["memory"].items()}
        old_group = _writable(opt_state["group"])
        if before:
            stepper = self.scratch
            self.fill(new, old, old_group)
        else:
            stepper = factory(new, 0)
        group = stepper.param_groups[0]
        rate = factory.rate(before)
        if rate is not None:
            group["lr"] = rate
        _take_step(stepper, given)
        _write_back(new, stepper)
        memory = _read(stepper, self.forms)
        foreign = {_storage(t) for t in (*new, *given)}
        entries = {
            path: tree.like(
                opt_state["memory"][path],
                [value.stored(memory[path][name], old[path][name], foreign) for name, value in of.items()],
            )
            for path, of in self._tensors()
        }
        after_group = [value.stored(group[key], old_group[key], foreign) for key, value in self.group.items()]
        reported.fill_(float(group.get("lr", torch.nan)))
        self.empty()
        after = {
            "count": count.add_(1),
            "memory": with_entries(opt_state["memory"], entries),
            "group": tree.like(opt_state["group"], after_group),
            REPORT: tree.like(opt_state[REPORT], [reported]),
        }
        return tree.like(params, new), with_entries(opt_state, after)

    def fill(self, params: list[Tensor], memory: _Memory, group: dict[str, Tensor]) -> None:
        """Give the object its parameters and its memory."""
        for p, t, (name, form) in zip(_parameters(self.scratch), params, self.forms.items(), strict=True):
            p.data = t
            found = ((self.memory[path][name], memory.get(path, {}).get(name)) for path in form.paths)
            self.scratch.state[p] = form.state([value.given_back(stored) for value, stored in found])
        self.scratch.param_groups[0].update({key: v.given_back(group[key]) for key, v in self.group.items()})

    def empty(self) -> None:
        """Let go of all tensors."""
        self.scratch.state.clear()
        for p in _parameters(self.scratch):
            p.grad = None
            p.data = p.data.new_empty(0)

    def _tensors(self) -> Iterator[tuple[str, dict[str, _Value]]]:
        """The layout of what is kept as tensors: all but None."""
        for path, of in self.memory.items():
            yield path, {name: value for name, value in of.items() if value.kind is not type(None)}


def _after_trial_step(scratch: Optimizer, names: list[str]) -> tuple[dict[str, _Form], dict[str, dict[str, _Value]]]:
    """How the memory is made up after one more step, and what it consists of."""
    own = _parameters(scratch)
    _take_step(scratch, [torch.ones_like(p) for p in own])
    strangers = [key for key in scratch.state if not any(key is p for p in own)]
    if strangers:
        raise ValueError(
            f"cls: {type(scratch).__name__} keeps memory under {strangers}, expected only under its parameters"
        )
    forms = {name: _Form.of(dict(scratch.state.get(p, {}))) for name, p in zip(names, own, strict=True)}
    found = _read(scratch, forms).items()
    return forms, {
        path: {name: _Value.of(value, f"state[{path!r}]") for name, value in of.items()} for path, of in found
    }


def _read(stepper: Optimizer, forms: dict[str, _Form]) -> _Memory:
    memory: _Memory = {}
    for (name, form), p in zip(forms.items(), _parameters(stepper), strict=True):
        for path, value in zip(form.paths, form.values(stepper.state.get(p, {})), strict=True):
            memory.setdefault(path, {})[name] = value
    return memory


def _take_step(stepper: Optimizer, grads: list[Tensor]) -> None:
    for p, g in zip(_parameters(stepper), grads, strict=True):
        p.grad = g
    with torch.enable_grad():
        stepper.step()


def _label(part: Any) -> str:
    """A key of a dictionary, a position in a list, or a field of a named tuple."""
    return str(next(getattr(part, kind) for kind in ("key", "idx", "name") if hasattr(part, kind)))


def _write_back(tensors: list[Tensor], stepper: Optimizer) -> None:
    """Into ``tensors``, where the object gave its parameters other memory than that."""
    for t, p in zip(tensors, _parameters(stepper), strict=True):
        if p.data_ptr() != t.data_ptr():
            t.copy_(p.detach())


def _parameters(stepper: Optimizer) -> list[Tensor]:
    return list(stepper.param_groups[0]["params"])


def _writable(tensors: Any) -> dict[str, Tensor]:
    return dict(zip(tree.named(tensors), tree.writable(tree.leaves(tensors)), strict=True))


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _numbers_in(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that may be memory, copied: numbers and tensors, but no flags."""
    found = {k: v for k, v in mapping.items() if isinstance(v, (int, float, Tensor)) and not isinstance(v, bool)}
    return {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in found.items()}


def _changed(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in after.items() if k not in before or bool(torch.as_tensor(before[k] != v).any())}


def _check_class(cls: Any) -> None:
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        raise TypeError(
            f"cls: got {cls!r}, expected a subclass of torch.optim.Optimizer; give the class, not an object"
        )
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"cls: {cls.__name__}.step needs a closure that computes the loss again, and a transformation is given the "
            "gradient only; use the class itself in a loop of your own, or an optimizer of one gradient per step"
        )
