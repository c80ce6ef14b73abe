"""One batch of evaluation: loss, logits and labels of a model, whatever it takes and returns."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.trainer.accumulate_predictions import nested_detach
from trainkit.trainer.foreign import base_of, forward_parameters, unwrapped

_QUESTION_ANSWERING = ("start_positions", "end_positions")


def default_label_names(model: nn.Module) -> list[str]:
    """The parameters of ``forward`` that hold targets: all with ``label`` in their names, in their order.

    A model whose class name contains ``QuestionAnswering`` also has ``start_positions`` and ``end_positions``.

    Example:
        >>> class Model(nn.Module):
        ...     def forward(self, x, labels=None, label_weights=None): ...
        >>> default_label_names(Model())
        ['labels', 'label_weights']

    Source: Trainer 4.57: ``label_names``.
    """
    extra = _QUESTION_ANSWERING if "QuestionAnswering" in type(base_of(model)).__name__ else ()
    return [name for name in forward_parameters(model) if "label" in name or name in extra]


def required_label_names(model: nn.Module, label_names: Sequence[str]) -> list[str]:
    """Those of the default label names that a batch must have for a loss.

    These are the ones that ``forward`` cannot do without, and the two positions of question answering. Names
    that a user has chosen are all required; do not ask for those.

    Example:
        >>> class Model(nn.Module):
        ...     def forward(self, x, labels, label_weights=None): ...
        >>> required_label_names(Model(), ["labels", "label_weights"])
        ['labels']
    """
    parameters = forward_parameters(model)
    optional = {name for name, p in parameters.items() if p.default is not p.empty and name not in _QUESTION_ANSWERING}
    return [name for name in label_names if name not in optional]


def can_return_loss(model: nn.Module) -> bool:
    """Whether ``forward`` computes a loss without labels: it has ``return_loss``, True by default.

    Source: Trainer 4.57: ``can_return_loss``.
    """
    parameter = forward_parameters(model).get("return_loss")
    return parameter is not None and parameter.default is True


def default_ignore_keys(model: nn.Module) -> list[str]:
    """Outputs that are no predictions: ``config.keys_to_ignore_at_inference``, else ``past_key_values``.

    Nothing for a model without a config.

    Source: Trainer 4.57: ``prediction_step``.
    """
    config = getattr(unwrapped(model), "config", None)
    return [] if config is None else list(getattr(config, "keys_to_ignore_at_inference", ["past_key_values"]))


def has_labels(
    inputs: Mapping[str, Any],
    label_names: Sequence[str],
    can_return_loss: bool,
    *,
    required: Sequence[str] | None = None,
) -> bool:
    """Whether a loss can be computed for a batch.

    A model without label names decides itself, by ``return_loss`` in the batch or ``can_return_loss``. Else a batch
    needs a label, and all that are required. One that has only some of those gets a warning.

    Args:
        inputs: the batch.
        label_names: the keys that hold targets.
        can_return_loss: whether the model computes a loss without labels.
        required: see :func:`required_label_names`; None requires all.

    Example:
        >>> has_labels({"labels": 1}, ["labels", "label_weights"], False, required=[])
        True

    Source: Trainer 4.57: ``prediction_step``.
    """
    if not label_names:
        wanted = inputs.get("return_loss")
        return bool(can_return_loss if wanted is None else wanted)
    present = [name for name in label_names if inputs.get(name) is not None]
    missing = [name for name in (label_names if required is None else required) if name not in present]
    if present and missing:
        warnings.warn(
            f"label_names: the batch has {', '.join(present)} but no {', '.join(missing)}, so there is no loss and no "
            "metric. Add them to the data, or name in label_names only what the model needs",
            UserWarning,
            stacklevel=2,
        )
    return bool(present) and not missing


def label_values(inputs: Mapping[str, Any], label_names: Sequence[str]) -> Any:
    """The labels of a batch, detached: the one that there is, or a tuple in the order of their names.

    Example:
        >>> label_values({"labels": torch.tensor([1])}, ["labels"])
        tensor([1])

    Source: Trainer 4.57: ``prediction_step``.
    """
    labels = tuple(inputs[name] for name in label_names if inputs.get(name) is not None)
    return nested_detach(labels[0] if len(labels) == 1 else labels)


def logits_of(outputs: Any, ignore_keys: Sequence[str] = (), with_loss: bool = False) -> Any:
    """What a model predicts: all of its output that is not the loss, a tuple unless it is one thing.

    Args:
        outputs: a mapping, a sequence, or one tensor, which is the logits unless it has no dimension.
        ignore_keys: keys of a mapping to leave out.
        with_loss: whether there is a loss: under ``loss`` in a mapping, the first of a sequence.

    Example:
        >>> logits_of({"loss": 0.5, "logits": 1, "past": 2}, ["past"], with_loss=True)
        1
        >>> logits_of((0.5, 1, 2), with_loss=True)
        (1, 2)

    Source: Trainer 4.57: ``prediction_step``.
    """
    if isinstance(outputs, Mapping):
        left_out = {*ignore_keys, "loss"} if with_loss else set(ignore_keys)
        outputs = tuple(value for key, value in outputs.items() if key not in left_out and value is not None)
    elif isinstance(outputs, (tuple, list)):
        outputs = outputs[1:] if with_loss else outputs
    elif with_loss and isinstance(outputs, Tensor) and not outputs.dim():
        outputs = ()
    return outputs[0] if isinstance(outputs, (tuple, list)) and len(outputs) == 1 else outputs


def prediction_step(
    model: nn.Module,
    inputs: Mapping[str, Any],
    prediction_loss_only: bool,
    ignore_keys: Sequence[str] | None = None,
    *,
    label_names: Sequence[str],
    can_return_loss: bool,
    compute_loss: Callable[..., tuple[Any, Any]],
    required: Sequence[str] | None = None,
    prepare_inputs: Callable[[Any], Any] = lambda inputs: inputs,
    num_items: Callable[[Any], Any] = lambda inputs: None,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    on_outputs: Callable[[Any], object] = lambda outputs: None,
) -> tuple[Tensor | None, Any, Any]:
    """Loss, logits and labels of one batch, without gradients, on the device, of this process alone.

    Args:
        model: called with the inputs where there are no labels.
        inputs: a batch, as the loader gives it.
        prediction_loss_only: leaves logits and labels out.
        ignore_keys: outputs that are no predictions; None takes those of the model.
        label_names: keys of ``inputs`` that hold targets.
        can_return_loss: whether the model computes a loss without labels.
        compute_loss: ``(model, inputs, return_outputs=True, num_items_in_batch=n) -> (loss, outputs)``.
        required: label names that must be there; None for all.
        prepare_inputs: moves a batch to the device.
        num_items: counts what the loss of this batch is divided by; None leaves that to the loss.
        context: entered around the model.
        on_outputs: sees what the model returned where there are no labels.

    Returns: ``(loss, logits, labels)``, each None where there is none; the loss is 0-d.

    Raises: TypeError for a batch that is no mapping.

    Source: Trainer 4.57: ``prediction_step``.
    """
    if not isinstance(inputs, Mapping):
        raise TypeError(
            f"inputs: a batch is a {type(inputs).__name__}; expected a mapping from the model's argument names. Let "
            "the data collator make one, or override prediction_step"
        )
    with_loss = has_labels(inputs, label_names, can_return_loss, required=required)
    inputs = prepare_inputs(inputs)
    if ignore_keys is None:
        ignore_keys = default_ignore_keys(model)
    # Read first: a loss function may take them out of the batch.
    labels = label_values(inputs, label_names) if with_loss else None
    loss = None
    with torch.no_grad(), context():
        if with_loss:
            loss, outputs = compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items(inputs))
            loss = loss.detach().mean()
        else:
            outputs = model(**inputs)
            on_outputs(outputs)
    if prediction_loss_only:
        return loss, None, None
    return loss, nested_detach(logits_of(outputs, ignore_keys, with_loss)), labels
