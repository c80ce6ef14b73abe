"""What all optimizers on torch's functional kernels share: the calling convention of ``torch.optim``.

The kernels overwrite their arguments. They are given writable tensors (:func:`trainkit.tree.writable`), so the
transformation stays pure and costs nothing where its inputs are donated.

Which form of a kernel runs depends on where it runs, and never changes what it means:

- inside a graph the plain one, tensor by tensor, with the count and the rate as tensors: the compiler fuses it, and
  a changing value never recompiles;
- outside, the fused kernel where there is one; else the foreach form on accelerators, with tensors as in a graph, so
  that the host never waits; and on a CPU whichever of the plain and the foreach form is faster for the sizes at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _get_capturable_supported_devices
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from trainkit import tree
from trainkit.optim.transform import REPORT, Transform, as_schedule, optimizer
from trainkit.types import OptState, Params, Schedule

if TYPE_CHECKING:
    from tensordict import TensorDict

Memory = dict[str, list[Tensor]]
"""The per-parameter memory that a kernel overwrites, by the name of the slot."""
Rate: TypeAlias = Any
"""A learning rate: a number wherever the host knows it for free, else a 0-d tensor. torch annotates numbers only."""
Kernel = Callable[[list[Tensor], list[Tensor], Memory, Tensor, Rate], None]
"""``(params, grads, memory, step, learning_rate)``; overwrites ``params`` and the tensors of ``memory``.

``step`` counts from 1 and includes this update.
"""
_Outcome = tuple[list[Tensor], Memory]
Slots = dict[str, "Callable[[Params], TensorDict]"]
"""Per-parameter memory by name, each with its first value: a flat tree. It may leave parameters out."""


def kernel_optimizer(kernel: Kernel, slots: Slots, learning_rate: float | Tensor | Schedule) -> Transform:
    """A transformation around a kernel that works in place on lists of tensors.

    State: ``count`` (int64, completed updates), one tree per slot, and the last learning rate as a report.

    Args:
        kernel: overwrites the parameters and the memory that it is handed.
        slots: the first value of each memory.
        learning_rate: number or schedule, read at ``count``.

    Raises: ValueError for a negative learning rate.
    """
    rate_at = _rate_at(learning_rate)

    def init(params: Params) -> OptState:
        count = torch.zeros((), dtype=torch.int64, device=device_of(params))
        rate = torch.zeros((), dtype=torch.float32, device=count.device)
        made = {name: make(params) for name, make in slots.items()}
        return tree.frozen({"count": count, **made, REPORT: {"learning_rate": rate}})

    def run(params: list[Tensor], grads: list[Tensor], memory: Memory, step: Tensor, rate: Rate) -> _Outcome:
        new = tree.writable(params)
        after = {name: tree.writable(tensors) for name, tensors in memory.items()}
        if new:
            with _batching_rules():
                kernel(new, fitted(grads, new), after, step, host_value(rate, new[0].device))
        return new, after

    run_safely = population_safe(run)

    def apply(grads: Params, opt_state: OptState, params: Params, /, **extra: Any) -> tuple[Params, OptState]:
        count = opt_state["count"]
        rate = rate_at(count)
        own, memory = tree.leaves(params), {name: tree.leaves(opt_state[name]) for name in slots}
        step, reported = _advanced(count, opt_state[REPORT]["learning_rate"], rate)
        new, after = run_safely(own, in_order(grads, params), memory, step, rate)
        entries: dict[str, Any] = {name: _with(opt_state[name], memory[name], after[name]) for name in slots}
        return _with(params, own, new), _after(opt_state, {"count": step, **entries}, reported)

    return optimizer(init, apply)


def _with(flat: TensorDict, before: list[Tensor], after: list[Tensor]) -> TensorDict:
    """The tree of the tensors ``before`` with those of ``after``."""
    return flat if after is before else tree.like(flat, after)


def device_of(params: Params) -> torch.device:
    """Where the first parameter is; the CPU for no parameters (an empty part of a partition)."""
    return next((p.device for p in tree.leaves(params)), torch.device("cpu"))


def in_order(grads: Params, params: Params) -> list[Tensor]:
    """The gradients in the order of the parameters' names.

    Raises: KeyError for a name without gradient.
    """
    found, names = tree.named(grads), list(tree.named(params))
    return tree.leaves(grads) if list(found) == names else [found[name] for name in names]


def fitted(grads: list[Tensor], params: list[Tensor]) -> list[Tensor]:
    """The gradients in the dtypes and, outside of a graph, the memory layouts of the parameters.

    The fused kernels on a CPU walk the memory of all their arguments from end to end and do not look at strides, and
    ``torch.autograd.grad`` promises none: the gradient of a sum is one number with strides of zero.
    """
    pairs = zip(grads, params, strict=True)
    if torch.compiler.is_compiling():
        return [g.to(p.dtype) for g, p in pairs]
    if _have_one_dtype(grads, params) and tree.are_contiguous(grads) and tree.are_contiguous(params):
        return grads
    return [g if g.dtype == p.dtype and g.stride() == p.stride() else torch.empty_like(p).copy_(g) for g, p in pairs]


def step_tensors(step: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """The count before this update as ``torch.optim`` wants it: a float tensor per parameter, advanced by the kernel.

    Inside a graph the equal chains of arithmetic on them are merged into one.
    """
    before = step - 1
    if torch.compiler.is_compiling():
        dtype = torch.float64 if params[0].dtype == torch.float64 else torch.float32
        return [before.to(dtype) for _ in params]
    return copies_for(params, before.to(torch.float32))


def copies_for(params: Sequence[Tensor], number: Tensor) -> list[Tensor]:
    """A copy of a 0-d tensor for each parameter, on its device; kernels overwrite each of them."""
    if torch.compiler.is_compiling():
        return [number.clone() for _ in params]
    copies = number.expand(len(params)).clone().unbind()
    return [t if t.device == p.device else t.to(p.device) for t, p in zip(copies, params, strict=True)]


def loop_form(params: Sequence[Tensor], *, capturable: bool = True) -> dict[str, Any]:
    """Arguments that choose between torch's plain and foreach loops: the faster one that keeps the host from waiting.

    Args:
        params: what is updated; not empty.
        capturable: whether the kernel knows the argument ``capturable`` (count and rate stay on the device).
    """
    device = params[0].device.type
    if torch.compiler.is_compiling():
        foreach, on_device = False, True
    elif device == "cpu":
        # Foreach saves calls but makes temporaries as large as all parameters together: on one core, for 14 tensors,
        # it takes 0.7 of the time of the plain loop at 64 elements each, and twice its time at 65,536.
        foreach, on_device = sum(p.numel() for p in params) <= 2**14 * len(params), False
    else:
        foreach, on_device = True, _is_capturable(device)
    return {"foreach": foreach, "capturable": on_device} if capturable else {"foreach": foreach}


def fused(
    op: Callable[..., None],
    params: list[Tensor],
    columns: Sequence[list[Tensor]],
    step: Tensor | None,
    learning_rate: Rate,
    **options: Any,
) -> bool:
    """Run one of torch's fused kernels, if it can take these tensors; False if it cannot and nothing was done.

    The wrappers in ``torch.optim`` spend five times as long as the kernel itself on small parameters: they group the
    tensors by device and advance a counter for each. Here one counter serves all, which the kernel only reads. They
    look at no strides either, so tensors of different layouts, or with gaps, are left to the other forms.

    Args:
        op: the kernel, ``torch._fused_adamw_`` or one of its siblings.
        params: overwritten.
        columns: the further lists (gradients, moments), each as long as ``params`` or empty.
        step: counts from 1; None for kernels that need none.
        learning_rate: number, or tensor on the device of the parameters.
        options: passed on.
    """
    if torch.compiler.is_compiling():
        return False
    kinds = tree.kinds(params)
    if not all(dtype.is_floating_point and has_kernel(op, of, device.type) for of, dtype, device in kinds) or not (
        all(map(tree.are_contiguous, (params, *columns))) or _alike_without_gaps(params, columns)
    ):
        return False
    for kind in kinds:
        _, _, device = kind
        chosen = [i for i, p in enumerate(params) if len(kinds) == 1 or tree.kind(p) == kind]
        whole = len(chosen) == len(params)
        lists = [column if whole or not column else [column[i] for i in chosen] for column in (params, *columns)]
        counters = [] if step is None else [[step.to(device, torch.float32)] * len(chosen)]
        rate = learning_rate.to(device) if isinstance(learning_rate, Tensor) else learning_rate
        op(*lists, *counters, lr=rate, grad_scale=None, found_inf=None, **options)
    return True


def _have_one_dtype(*columns: Sequence[Tensor]) -> bool:
    return len({dtype for column in columns for _, dtype, _ in tree.kinds(column)}) == 1


def _alike_without_gaps(params: Sequence[Tensor], columns: Sequence[Sequence[Tensor]]) -> bool:
    strides = [p.stride() for p in params]
    return all([t.stride() for t in column] == strides for column in columns if column) and all(
        p.is_contiguous() or p.stride() == torch.empty_like(p).stride() for p in params
    )


def each(op: str, tensors: list[Tensor], *args: Any, **kwargs: Any) -> list[Tensor]:
    """``torch._foreach_<op>`` where that is the faster form, else the same operation tensor by tensor.

    Args:
        op: "mul", "mul_", ...: an operation of ``Tensor`` that has a foreach form.
        tensors: the first operands; overwritten if ``op`` ends with an underscore. Not empty.
        args: lists of further operands, or numbers and 0-d tensors that all share.
        kwargs: numbers.

    Example:
        >>> each("mul", [torch.tensor([1.0]), torch.tensor([2.0])], 3.0)
        [tensor([3.]), tensor([6.])]
    """
    if loop_form(tensors, capturable=False)["foreach"]:
        out = getattr(torch, f"_foreach_{op}")(tensors, *args, **kwargs)
        return tensors if out is None else list(out)
    plain = getattr(Tensor, op)
    rows = zip(*(arg if isinstance(arg, list) else [arg] * len(tensors) for arg in args), strict=True)
    return [plain(t, *row, **kwargs) for t, row in zip(tensors, rows if args else [()] * len(tensors), strict=True)]


def is_plain(tensor_type: type) -> bool:
    """Whether tensors of this type are ordinary ones, not sharded (DTensor) or otherwise of a kind of their own."""
    return tensor_type in (Tensor, nn.Parameter)


def has_complex(params: Sequence[Tensor]) -> bool:
    """Whether a parameter is complex: torch's loops then work on its real and imaginary parts."""
    return any(p.is_complex() for p in params)


def check_non_negative(**values: float) -> None:
    """Raise ValueError for the first hyper-parameter that is negative or NaN."""
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{name}: got {value}, expected a number >= 0")


def check_betas(betas: tuple[float, float]) -> None:
    """Raise ValueError unless both decay rates are in [0, 1)."""
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas: got {betas}, expected two numbers in [0, 1)")


def check_real(params: Params, optimizer_name: str) -> None:
    """Raise ValueError if a parameter is complex."""
    found = [name for name, p in tree.named(params).items() if p.is_complex()]
    if found:
        raise ValueError(
            f"params: {', '.join(found)} complex, expected real tensors for {optimizer_name}; "
            "give torch.view_as_real of them, or use adam, which takes complex parameters"
        )


# -- count and rate ------------------------------------------------------------------------------------------------


def _rate_at(learning_rate: float | Tensor | Schedule) -> Callable[[Tensor], Rate]:
    """The rate as a function of the count. A number stays one, in full precision: it cannot change."""
    schedule = as_schedule(learning_rate)
    if isinstance(learning_rate, (int, float)):
        check_non_negative(learning_rate=learning_rate)
        number = float(learning_rate)
        return lambda count: number
    return lambda count: _floating(schedule(count))


def _floating(rate: Rate) -> Rate:
    # An integer schedule may be the count itself, which is about to be overwritten.
    return rate.to(torch.float32) if isinstance(rate, Tensor) and not rate.is_floating_point() else rate


def host_value(rate: Rate, device: torch.device) -> Rate:
    """The rate as a number where that costs nothing, or where torch has no kernel that takes a tensor."""
    if not isinstance(rate, Tensor) or torch.compiler.is_compiling():
        return rate
    return float(rate.item()) if rate.is_cpu or not _is_capturable(device.type) else rate


def _advanced(count: Tensor, reported: Tensor, rate: Rate) -> tuple[Tensor, Tensor]:
    if not tree.has_foreach():
        given = rate.to(torch.float32) if isinstance(rate, Tensor) else torch.full_like(reported, rate)
        return count + 1, given
    new_count, new_rate = tree.writable([count, reported])
    return new_count.add_(1), new_rate.fill_(rate)


def _after(opt_state: OptState, entries: dict[str, Any], reported: Tensor) -> OptState:
    unchanged = reported is opt_state[REPORT]["learning_rate"] and all(entries[k] is opt_state[k] for k in entries)
    return opt_state if unchanged else tree.frozen({**entries, REPORT: {"learning_rate": reported}})


# -- what torch can do where ---------------------------------------------------------------------------------------


@cache
def _is_capturable(device_type: str) -> bool:
    return device_type in _get_capturable_supported_devices()


@cache
def has_kernel(op: Any, tensor_type: type, device_type: str) -> bool:
    """Whether torch has one of its fused kernels for tensors of a type on a kind of device."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    # Sharded tensors (DTensor) have rules for Adam only.
    known = is_plain(tensor_type) or op in _FUSED_WHEN_SHARDED
    return key is not None and known and torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{op.__name__}", key)


_FUSED_WHEN_SHARDED = (torch._fused_adam_, torch._fused_adamw_)


# -- populations ---------------------------------------------------------------------------------------------------

F = TypeVar("F", bound=Callable[..., Any])


def population_safe(fn: F) -> F:
    """A pure function of trees that also works under an eager ``torch.vmap``: there it runs once per member.

    torch's fused and foreach kernels have no batching rules.

    Example:
        >>> double = population_safe(lambda tensors: torch._foreach_mul(tensors, 2.0))
        >>> torch.vmap(lambda row: double([row])[0])(torch.ones(2, 1))
        tensor([[2.],
                [2.]])
    """

    def guarded(*args: Any) -> Any:
        if torch.compiler.is_compiling() or not tree.under_vmap():
            return fn(*args)
        inputs, spec = pytree.tree_flatten(args)
        out_spec: list[Any] = []

        def flat(*leaves: Any) -> tuple[Tensor, ...]:
            outputs, made = pytree.tree_flatten(fn(*pytree.tree_unflatten(leaves, spec)))
            out_spec[:] = [made]
            return tuple(outputs)

        outputs = _PerMember.apply(flat, *inputs)  # type: ignore[no-untyped-call]
        return pytree.tree_unflatten(outputs, out_spec[0])

    return cast(F, guarded)


class _PerMember(torch.autograd.Function):
    """Calls a function of tensors; under ``vmap`` once per member, stacking what it returns."""

    @staticmethod
    def forward(flat: Callable[..., tuple[Tensor, ...]], *leaves: Any) -> tuple[Tensor, ...]:
        return flat(*leaves)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], flat: Any, *leaves: Any) -> tuple[tuple[Tensor, ...], int]:
        def member(i: int) -> list[Any]:
            pairs = zip(leaves, in_dims[1:], strict=True)
            return [leaf if dim is None else leaf.select(dim, i) for leaf, dim in pairs]

        outputs = [_PerMember.apply(flat, *member(i)) for i in range(info.batch_size)]  # type: ignore[no-untyped-call]
        return tuple(torch.stack(column) for column in zip(*outputs, strict=True)), 0


def _batching_rules() -> AbstractContextManager[Any]:
    """Inside a graph under ``vmap``: a scope in which torch's kernels use only what ``vmap`` has rules for.

    Without, it unrolls the loop over the members: 16 small models under AdamW took three times as long to compile, and
    four times as long to run.
    """
    return _BatchingRules() if torch.compiler.is_compiling() and tree.under_vmap() else nullcontext()


class _BatchingRules(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _RULES.get(func, func)(*args, **(kwargs or {}))


def _lerp_(self: Tensor, end: Tensor, weight: Any) -> Tensor:
    return self.add_((end - self) * weight)


def _lerp(self: Tensor, end: Tensor, weight: Any) -> Any:
    return self + (end - self) * weight


def _addcmul_(self: Tensor, a: Tensor, b: Tensor, *, value: Any = 1) -> Tensor:
    return self.add_(a * b * value)


def _addcdiv_(self: Tensor, a: Tensor, b: Tensor, *, value: Any = 1) -> Tensor:
    return self.add_(a / b * value)


def _add_(self: Tensor, other: Any, *, alpha: Any = 1) -> Tensor:
    return self.add_(other * alpha)


def _add(self: Tensor, other: Any, *, alpha: Any = 1) -> Any:
    return self + other * alpha


def _maximum(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    return torch.maximum(a, b) if out is None else out.copy_(torch.maximum(a, b))


_RULES: dict[Any, Callable[..., Tensor]] = {
    Tensor.lerp_: _lerp_,
    Tensor.lerp: _lerp,
    Tensor.addcmul_: _addcmul_,
    Tensor.addcdiv_: _addcdiv_,
    Tensor.add_: _add_,
    Tensor.add: _add,
    torch.maximum: _maximum,
}
