"""Losses of transformers' models that read their own labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainkit import tree
from trainkit.functional import functional
from trainkit.losses.checks import IGNORED, at_least_float32
from trainkit.types import Batch, Buffers, LossFn, LossOutput, Params

Count = Callable[[Mapping[str, Any]], Tensor]
"""Over how many items a model's mean loss was taken, from the batch: a 0-d tensor."""


def huggingface_loss(module: nn.Module, *, weight: Count | None = None, training: bool | None = None) -> LossFn:
    """The loss that a model of transformers computes from the ``labels`` in its batch, as a sum.

    loss_sum = module(**batch).loss * n, since that loss is a mean over n items; the weight is n:

    - ``ForCausalLM``, ``LMHeadModel``, and ``ForConditionalGeneration`` of decoders: labels[..., 1:] other than -100;
    - ``ForMaskedLM``, ``ForTokenClassification``, and ``ForConditionalGeneration`` of encoder-decoders: labels other
      than -100;
    - ``ForSequenceClassification``, ``ForImageClassification``, ``ForAudioClassification``, ``ForVideoClassification``:
      rows with a label other than -100 for one class per row; all labels' elements for regression and several
      classes, by ``config.problem_type`` (found as the model finds it, where it is None);
    - ``ForMultipleChoice``: rows.

    The class, or the nearest of its ancestors, decides. Without any item the sum, its weight and the gradient are zero,
    where the model's own mean would be NaN. Where a model adds another loss of its own (router balance), n
    multiplies that as well. Reports nothing of its own.

    Args:
        module: takes the batch's fields as keyword arguments and returns an output with ``loss``.
        weight: another rule for n, a function of the batch; needed for classes that are not listed.
        training: True and False run the module in that mode; None leaves each submodule's mode as it is.

    Returns: a LossFn over mappings (dict, BatchEncoding, TensorDict).

    Raises:
        ValueError: no rule for this class and no ``weight``; when called: no labels, or no loss in the output.
        TypeError (when called): a batch that is no mapping.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from trainkit import init_state
        >>> from trainkit.optim import sgd
        >>> config = LlamaConfig(
        ...     vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> model = LlamaForCausalLM(config)
        >>> state = init_state(model, sgd(0.1))
        >>> ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
        >>> huggingface_loss(model)(state.params, state.buffers, {"input_ids": ids, "labels": ids}).weight
        tensor(4)

    Source: the losses of transformers 4.57.1 (``loss/loss_utils.py``).
    """
    count = _count_of(module) if weight is None else weight
    model = functional(module, training=training)

    def loss(params: Params, buffers: Buffers, batch: Batch) -> LossOutput:
        fields = _fields(batch)
        if weight is None and not isinstance(fields.get("labels"), Tensor):
            raise ValueError(
                f"batch: no labels among its fields ({', '.join(fields)}); expected a tensor 'labels' that the model "
                "reads. Add them in the data or the collator, or pass weight for a model that needs none"
            )
        n = torch.as_tensor(count(fields)).detach()
        outputs, new_buffers = model(params, buffers, **_with_safe_labels(fields, n))
        mean = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
        if not isinstance(mean, Tensor):
            raise ValueError(
                f"module: the output of {type(module).__name__} ({type(outputs).__name__}) has no loss; expected a "
                "model that computes one from 'labels'. Use module_loss with a criterion for other models"
            )
        return LossOutput(at_least_float32(mean) * n, n, buffers=new_buffers)

    return loss


def _fields(batch: Batch) -> dict[str, Any]:
    if not tree.is_mapping(batch):
        raise TypeError(f"batch: got {type(batch).__name__}, expected a mapping from the model's argument names")
    return dict(batch.items())


def _with_safe_labels(fields: dict[str, Any], n: Tensor) -> dict[str, Any]:
    """Labels that give a finite mean where none counts: that mean is multiplied by zero, and so is its gradient.

    Masking the NaN afterwards would not do, because its backward pass divides by the count again.
    """
    labels = fields.get("labels")
    if not isinstance(labels, Tensor):
        return fields
    return {**fields, "labels": torch.where(n.to(labels.device) > 0, labels, torch.zeros_like(labels))}


def _count_of(module: nn.Module) -> Count:
    for ancestor in type(module).__mro__:
        for suffix, rule in _RULES.items():
            if ancestor.__name__.endswith(suffix):
                return rule(module)
    raise ValueError(
        f"module: no rule for how many items the loss of {type(module).__name__} is a mean of; expected a class "
        f"named ...{', ...'.join(_RULES)}. Pass weight, a function of the batch that counts them"
    )


def _next_tokens(module: nn.Module) -> Count:
    return lambda batch: (batch["labels"][..., 1:] != IGNORED).sum()


def _tokens(module: nn.Module) -> Count:
    return lambda batch: (batch["labels"] != IGNORED).sum()


def _generation(module: nn.Module) -> Count:
    config: Any = module.config
    return _tokens(module) if config.is_encoder_decoder else _next_tokens(module)


def _rows(module: nn.Module) -> Count:
    return lambda batch: torch.tensor(len(batch["labels"]), device=batch["labels"].device)


def _by_problem_type(module: nn.Module) -> Count:
    config: Any = module.config

    def count(batch: Mapping[str, Any]) -> Tensor:
        labels = batch["labels"]
        one_class = config.problem_type == "single_label_classification" or (
            config.problem_type is None and config.num_labels > 1 and not labels.is_floating_point()
        )
        return (labels != IGNORED).sum() if one_class else torch.tensor(labels.numel(), device=labels.device)

    return count


_RULES: dict[str, Callable[[nn.Module], Count]] = {
    "ForCausalLM": _next_tokens,
    "LMHeadModel": _next_tokens,
    "ForMaskedLM": _tokens,
    "ForTokenClassification": _tokens,
    "ForConditionalGeneration": _generation,
    "ForSequenceClassification": _by_problem_type,
    "ForImageClassification": _by_problem_type,
    "ForAudioClassification": _by_problem_type,
    "ForVideoClassification": _by_problem_type,
    "ForMultipleChoice": _rows,
}
