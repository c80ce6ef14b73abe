"""Label smoothing over the outputs of a model that was called without labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trainkit.losses import classification
from trainkit.losses.language import next_tokens
from trainkit.trainer.foreign import base_of

_CAUSAL_BY_ANOTHER_NAME = frozenset(
    {
        "BertGenerationDecoder",
        "BertLMHeadModel",
        "CTRLLMHeadModel",
        "GPT2LMHeadModel",
        "Gemma3ForConditionalGeneration",
        "Gemma3nForConditionalGeneration",
        "GotOcr2ForConditionalGeneration",
        "OpenAIGPTLMHeadModel",
        "QDQBertLMHeadModel",
        "ReformerModelWithLMHead",
        "TransfoXLLMHeadModel",
        "XLMWithLMHeadModel",
        "XLNetLMHeadModel",
    }
)


@dataclass(frozen=True)
class LabelSmoother:
    """The cross entropy against labels of which a share is spread over all classes.

    With e = epsilon, C classes and the sums over the labels that are not ignored:
    ((1 - e) sum_i -log p_i[y_i] + e / C sum_i sum_c -log p_i[c]) / n. It is computed in at least float32, and no copy
    of the logits is made that the plain cross entropy would not make.

    Args:
        epsilon: the share, in [0, 1).
        ignore_index: labels that count for nothing.

    Example:
        >>> import torch
        >>> logits, labels = torch.tensor([[2.0, 0.0], [1.0, 1.0]]), torch.tensor([0, -100])
        >>> LabelSmoother(0.1)({"logits": logits}, labels)
        tensor(0.2269)

    Source: Trainer 4.57: ``compute_loss`` with ``label_smoothing_factor``; Szegedy et al. 2016, sec. 7.
    """

    epsilon: float = 0.1
    ignore_index: int = -100

    def __call__(
        self,
        outputs: Any,
        labels: Tensor,
        shift_labels: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The loss.

        Args:
            outputs: a mapping with ``logits``, a tuple that starts with them, or the logits: [..., C].
            labels: [...] or [..., 1], integers.
            shift_labels: each position predicts the label of the next one.
            num_items_in_batch: n, the labels of the whole group of microbatches, so that the losses of the group add up
                to its mean; None divides by those of this batch.

        Returns: a 0-d tensor; NaN if there is nothing to divide by.

        Raises: ValueError for outputs without logits, shapes that disagree, or (looked at on the CPU) labels that are
            neither a class nor ignored.
        """
        logits = logits_of(outputs)
        if labels.dim() == logits.dim() and labels.shape[-1] == 1:
            labels = labels.squeeze(-1)
        if shift_labels:
            labels = next_tokens(labels, self.ignore_index)
        out = classification(logits, labels, ignore_index=self.ignore_index, label_smoothing=self.epsilon)
        count = out.weight if num_items_in_batch is None else num_items_in_batch
        return out.loss_sum / (count.to(out.loss_sum.device) if isinstance(count, Tensor) else count)


def logits_of(outputs: Any) -> Tensor:
    """The logits in what a model returned.

    Raises: ValueError if there are none.
    """
    if isinstance(outputs, Tensor):
        return outputs
    if not isinstance(outputs, Mapping):
        first: Tensor = outputs[0]
        return first
    if "logits" not in outputs:
        raise ValueError(f"outputs: entries {list(outputs)}, expected 'logits', which label smoothing needs")
    logits: Tensor = outputs["logits"]
    return logits


def is_causal_lm(model: Any) -> bool:
    """Whether a model predicts the next token, so that labels are to be shifted: told by the name of its class.

    A name that ends with "ForCausalLM", or one of the older names; that of a parent class will do. Wrappers and PEFT
    are looked through.

    Example:
        >>> class TinyForCausalLM: ...
        >>> class Tuned(TinyForCausalLM): ...
        >>> is_causal_lm(Tuned()), is_causal_lm(object())
        (True, False)

    Source: Trainer 4.57: ``compute_loss``, the names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.
    """
    names = {cls.__name__ for cls in type(base_of(model)).__mro__}
    return any(name.endswith("ForCausalLM") for name in names) or not names.isdisjoint(_CAUSAL_BY_ANOTHER_NAME)
