"""From a criterion on outputs and targets to a loss on parameters and batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from trainkit import tree
from trainkit.functional import functional
from trainkit.types import Batch, Buffers, LossFn, LossOutput, Params

Criterion: TypeAlias = Callable[..., LossOutput]
"""``(outputs, *targets) -> LossOutput``: a pure function of tensors."""
Select: TypeAlias = "str | int | Callable[[Any], Any]"
"""One item of a batch: a field by name, an item of a tuple by position, or a function of the batch."""
Selection: TypeAlias = "Select | Sequence[Select] | Mapping[str, Select]"
"""Arguments out of a batch: one, several by position, or several by keyword."""


def pick(batch: Any, select: Select) -> Any:
    """One item of a batch.

    Args:
        batch: a mapping (dict, TensorDict), a tuple or list, a record with attributes; any tree for a function.
        select: the field's name, the item's position, or a function of the batch.

    Raises: KeyError or IndexError saying what there is; TypeError if the batch is not of the kind ``select`` needs.

    Example:
        >>> pick({"x": 1}, "x"), pick((1, 2), -1), pick((1, 2), sum)
        (1, 2, 3)
    """
    if callable(select):
        return select(batch)
    if isinstance(select, str):
        return _by_name(batch, select)
    if not isinstance(batch, (tuple, list)):
        raise TypeError(
            f"batch: got {type(batch).__name__}, expected a tuple or list to take item {select} of. Use a field's "
            "name for mappings, and a function (lambda batch: batch) for the whole"
        )
    if not -len(batch) <= select < len(batch):
        raise IndexError(f"batch: it has {len(batch)} items, none at position {select}")
    return batch[select]


def _by_name(batch: Any, name: str) -> Any:
    if tree.is_mapping(batch):
        names = list(batch.keys())
        if name not in names:
            raise KeyError(f"batch: no field {name!r} among {', '.join(map(repr, names)) or 'none'}")
        return batch[name]
    if isinstance(batch, Tensor) or not hasattr(batch, name):
        raise TypeError(f"batch: got {type(batch).__name__}, expected a mapping or a record with a field {name!r}")
    return getattr(batch, name)


def arguments(batch: Any, selection: Selection) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments out of a batch.

    Example:
        >>> batch = {"x": 1, "y": 2}
        >>> arguments(batch, "x"), arguments(batch, ("x", "y")), arguments(batch, {"input": "x"})
        (([1], {}), ([1, 2], {}), ([], {'input': 1}))
    """
    if isinstance(selection, Mapping):
        return [], {keyword: pick(batch, select) for keyword, select in selection.items()}
    if isinstance(selection, Sequence) and not isinstance(selection, str):
        return [pick(batch, select) for select in selection], {}
    return [pick(batch, selection)], {}


def module_loss(
    module: nn.Module,
    criterion: Criterion,
    *,
    inputs: Selection = 0,
    targets: Selection = 1,
    outputs: Select | None = None,
    weights: Mapping[str, str] | None = None,
    training: bool | None = None,
) -> LossFn:
    """The criterion of a module's outputs and a batch's targets, as a pure function of the parameters.

    loss(params, buffers, batch) = criterion(module(inputs; params, buffers), targets), with the buffers that the
    forward pass leaves.

    Args:
        module: the model; its own tensors are not read.
        criterion: ``(outputs, *targets) -> LossOutput``, such as :func:`~trainkit.losses.classification`.
        inputs: what of the batch the module is called with: a field's name, a position in a tuple, a function of
            the batch; a list of these for several arguments, a mapping for keyword arguments.
        targets: what of the batch the criterion gets after the outputs, in the same notation.
        outputs: what of the module's outputs the criterion gets ("logits"); None for all.
        weights: parameters (or buffers) that the criterion needs itself, as its keyword: their name in the state.
        training: True and False run the module in that mode; None leaves each submodule's mode as it is.

    Returns: a LossFn.

    Raises:
        TypeError: a selection of the wrong kind; when called: a target that is None, or a criterion that returns
            something else than a LossOutput.
        KeyError (when called): a field that the batch, or a weight that the state, does not have.

    Example:
        >>> from trainkit.losses import classification, mean_squared_error
        >>> from trainkit import init_state
        >>> from trainkit.optim import sgd
        >>> net = nn.Linear(2, 1)
        >>> loss = module_loss(net, mean_squared_error, inputs="x", targets="y")
        >>> state = init_state(net, sgd(0.1))
        >>> loss(state.params, state.buffers, {"x": torch.ones(3, 2), "y": torch.ones(3, 1)}).weight
        3

        A criterion is any function, so rules for batches are written where they are needed. Preferences with
        precomputed reference log-probabilities, chosen rows above rejected ones:

        >>> from trainkit.losses import dpo, sequence_log_probs
        >>> def preference(logits, labels, reference):
        ...     chosen, rejected = sequence_log_probs(logits, labels).chunk(2)
        ...     return dpo(chosen, rejected, *reference.chunk(2), beta=0.1)
        >>> lm = nn.Embedding(5, 5)
        >>> loss = module_loss(lm, preference, inputs="ids", targets=("ids", "reference"))
        >>> state = init_state(lm, sgd(0.1))
        >>> batch = {"ids": torch.arange(8).reshape(2, 4) % 5, "reference": torch.zeros(2)}
        >>> loss(state.params, state.buffers, batch).weight
        tensor(1.)
    """
    for name, selection in (("inputs", inputs), ("targets", targets)):
        _check_selection(name, selection)
    model = functional(module, training=training)

    def loss(params: Params, buffers: Buffers, batch: Batch) -> LossOutput:
        wanted, named = arguments(batch, targets)
        _check_present(targets, wanted, named)
        own = {keyword: _weight(params, buffers, name) for keyword, name in (weights or {}).items()}
        args, kwargs = arguments(batch, inputs)
        found, new_buffers = model(params, buffers, *args, **kwargs)
        out = criterion(found if outputs is None else pick(found, outputs), *wanted, **named, **own)
        if not isinstance(out, LossOutput):
            raise TypeError(f"criterion: returned {type(out).__name__}, expected LossOutput(loss_sum, weight, metrics)")
        return dataclasses.replace(out, buffers=new_buffers)

    return loss


def frozen_outputs(
    module: nn.Module, *, inputs: Selection = 0, outputs: Select | None = None
) -> Callable[[Batch], Any]:
    """A module's outputs as a function of the batch, without gradient: a teacher, a reference model.

    The module runs in evaluation mode with the tensors it has at this moment. As a target of :func:`module_loss` it
    is computed beside the student.

    Args:
        module: kept as it is.
        inputs: as for :func:`module_loss`.
        outputs: as for :func:`module_loss`.

    Example:
        >>> from trainkit.losses import distillation
        >>> teacher, student = nn.Linear(2, 3), nn.Linear(2, 3)
        >>> targets = {"teacher_logits": frozen_outputs(teacher, inputs="x"), "labels": "y"}
        >>> loss = module_loss(student, distillation, inputs="x", targets=targets)
    """
    _check_selection("inputs", inputs)
    model = functional(module, training=False)
    params = tree.frozen({name: p.detach() for name, p in module.named_parameters()})
    buffers = tree.frozen(dict(module.named_buffers()))

    def run(batch: Batch) -> Any:
        args, kwargs = arguments(batch, inputs)
        with torch.no_grad():
            found, _ = model(params, buffers, *args, **kwargs)
        return found if outputs is None else pick(found, outputs)

    return run


def _check_selection(name: str, selection: Selection) -> None:
    parts: Any = selection
    if isinstance(selection, Mapping):
        parts = list(selection.values())
    elif not isinstance(selection, (tuple, list)):
        parts = [selection]
    for part in parts:
        if isinstance(part, bool) or not (isinstance(part, (str, int)) or callable(part)):
            raise TypeError(
                f"{name}: got {part!r}, expected a field's name, a position in a tuple, a function of the batch, or a "
                "list or mapping of these"
            )


def _check_present(targets: Selection, wanted: list[Any], named: dict[str, Any]) -> None:
    if any(value is None for value in (*wanted, *named.values())):
        raise TypeError(
            f"targets: {targets!r} gave None, expected tensors. Does the batch come from a data set without labels?"
        )


def _weight(params: Params, buffers: Buffers, name: str) -> Tensor:
    for source in (params, buffers):
        tensor = source.get(name, None)
        if isinstance(tensor, Tensor):
            return tensor
    raise KeyError(
        f"weights: the state has no parameter or buffer {name!r}. Tied weights have one name, the first of "
        "module.named_parameters()"
    )
