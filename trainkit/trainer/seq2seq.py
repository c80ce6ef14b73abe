"""``Seq2SeqTrainer``: a Trainer whose evaluation and prediction may generate sequences."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.trainer.devices import plugin_of
from trainkit.trainer.foreign import is_instance
from trainkit.trainer.outputs import PredictionOutput
from trainkit.trainer.seq2seq_arguments import Seq2SeqTrainingArguments
from trainkit.trainer.trainer import Trainer


class Seq2SeqTrainer(Trainer):
    """A Trainer that, with ``args.predict_with_generate``, predicts the sequences that the model generates.

    The loss of an evaluation is that of the labels, computed as in training.

    Args:
        model: with ``generate`` and ``generation_config``, as models of transformers have, if it is to generate.
        args: a :class:`Seq2SeqTrainingArguments`.
        data_collator: as the others, of :class:`~trainkit.trainer.trainer.Trainer`.
        train_dataset: see there.
        eval_dataset: see there.
        processing_class: its padding token, or else its end token, fills up generated sequences.
        model_init: see there.
        compute_loss_func: see there.
        compute_metrics: gets the generated sequences as predictions.
        callbacks: see there.
        optimizers: see there.
        preprocess_logits_for_metrics: gets the generated sequences as logits.
        optimizer_cls_and_kwargs: see there.
        tokenizer: the old name of ``processing_class``.

    Raises: TypeError for arguments without generation; as the Trainer does.

    Source: transformers 4.57: ``Seq2SeqTrainer``.
    """

    args: Seq2SeqTrainingArguments

    def __init__(
        self,
        model: Any = None,
        args: Seq2SeqTrainingArguments | None = None,
        data_collator: Callable[..., Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., Any] | None = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        *,
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
        tokenizer: Any = None,
    ) -> None:
        args = Seq2SeqTrainingArguments(output_dir="tmp_trainer") if args is None else args
        if not hasattr(args, "predict_with_generate"):
            raise TypeError(f"args: got {type(args).__name__}, expected Seq2SeqTrainingArguments")
        self._generation_config: Any = None
        self._gen_kwargs: dict[str, Any] = {}
        self._given: dict[str, Any] | None = None
        if args.generation_config is not None:
            self._generation_config = self.load_generation_config(args.generation_config)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            tokenizer=tokenizer,
        )

    def _take_model(self, model: nn.Module) -> None:
        super()._take_model(model)
        if self._generation_config is not None:
            self.model.generation_config = copy.deepcopy(self._generation_config)

    @staticmethod
    def load_generation_config(gen_config_arg: Any) -> Any:
        """A checked configuration of generation.

        Args:
            gen_config_arg: a ``transformers.GenerationConfig``, which is copied; a JSON file, a folder with
                ``generation_config.json``, or the name of a model on the hub.

        Raises: ValueError if the configuration contradicts itself: the model could not be saved with it. OSError if
            there is none.

        Source: transformers 4.57: ``Seq2SeqTrainer.load_generation_config``.
        """
        from transformers import GenerationConfig

        config: Any
        if isinstance(gen_config_arg, GenerationConfig):
            config = copy.deepcopy(gen_config_arg)
        elif Path(gen_config_arg).is_file():
            path = Path(gen_config_arg)
            config = GenerationConfig.from_pretrained(str(path.parent), path.name)
        else:
            config = GenerationConfig.from_pretrained(str(gen_config_arg))
        try:
            config.validate(strict=True)
        except ValueError as error:
            raise ValueError(f"generation_config: {error}\nCorrect it before training") from error
        return config

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **gen_kwargs: Any,
    ) -> dict[str, float]:
        """Metrics on a data set, with ``gen_kwargs`` for ``model.generate``."""
        with self._generating(gen_kwargs):
            return super().evaluate(eval_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
        **gen_kwargs: Any,
    ) -> PredictionOutput:
        """Predictions on a data set, with ``gen_kwargs`` for ``model.generate``."""
        with self._generating(gen_kwargs):
            return super().predict(test_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[Any, Any, Any]:
        """Loss, generated sequences and labels of one batch; logits in the place of sequences if nothing is generated.

        Args:
            model: computes the loss.
            inputs: a batch.
            prediction_loss_only: generates nothing.
            ignore_keys: outputs that are no predictions, if nothing is generated.
            gen_kwargs: for ``model.generate``; default those of :meth:`evaluate` or :meth:`predict`.

        Returns: sequences and labels are filled up to the length that the model's configuration of generation allows.

        Source: transformers 4.57: ``Seq2SeqTrainer.prediction_step``.
        """
        if not self.args.predict_with_generate or prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        inputs = self._prepare_inputs(inputs)
        options = {name: value for name, value in (gen_kwargs or self._gen_kwargs).items() if value is not None}
        options.setdefault("synced_gpus", self.is_fsdp_enabled or shards_parameters(self.accelerator))
        with whole_parameters(self.model), torch.no_grad():
            tokens = self.model.generate(**generation_inputs(inputs), **options)
        config = self.model.generation_config
        # Else each batch would derive the configuration of generation from that of the model again.
        config._from_model_config = False
        labels, loss = inputs.get("labels"), None
        if labels is not None:
            # A copy of the dict: a loss may take the labels out.
            loss = super().prediction_step(model, dict(inputs), True, ignore_keys=ignore_keys)[0]
        if self.args.prediction_loss_only:
            return loss, None, None
        return loss, self._filled(tokens, config), None if labels is None else self._filled(labels, config)

    def _filled(self, tokens: Tensor, config: Any) -> Tensor:
        length = allowed_length(tokens.shape[-1], config)
        return tokens if length is None else self._pad_tensors_to_max_len(tokens, length)

    def _pad_tensors_to_max_len(self, tensor: Tensor, max_length: int) -> Tensor:
        """Sequences [B, T] filled up with the padding token on the right to [B, max_length].

        Raises: ValueError if neither processing class nor model has a padding token.
        """
        return padded(tensor, max_length, padding_token(self.processing_class, self.model))

    @contextlib.contextmanager
    def _generating(self, given: dict[str, Any]) -> Iterator[None]:
        """Take the arguments of generation; an evaluation of one of several data sets has those of the whole."""
        outer, self._given = self._given, given or self._given
        self._gen_kwargs = with_defaults(self._given or {}, self.args)
        try:
            yield
        finally:
            self._given = outer


def with_defaults(gen_kwargs: Mapping[str, Any], args: Any) -> dict[str, Any]:
    """Arguments of generation, with length and beams of ``args`` where they leave those open.

    Example:
        >>> args = Seq2SeqTrainingArguments("out", generation_max_length=9, generation_num_beams=2, report_to="none")
        >>> with_defaults({"max_new_tokens": 3}, args)
        {'max_new_tokens': 3, 'num_beams': 2}

    Source: transformers 4.57: ``Seq2SeqTrainer.evaluate``.
    """
    found = dict(gen_kwargs)
    is_open = found.get("max_length") is None and found.get("max_new_tokens") is None
    if is_open and args.generation_max_length is not None:
        found["max_length"] = args.generation_max_length
    if found.get("num_beams") is None and args.generation_num_beams is not None:
        found["num_beams"] = args.generation_num_beams
    return found


def generation_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A batch for ``generate``: without the decoder's inputs where those were made of the labels.

    Example:
        >>> ids = torch.ones(1, 3)
        >>> sorted(generation_inputs({"input_ids": ids, "labels": ids, "decoder_input_ids": ids}))
        ['input_ids', 'labels']

    Source: transformers 4.57: ``Seq2SeqTrainer.prediction_step``.
    """
    labels, decoder = inputs.get("labels"), inputs.get("decoder_input_ids")
    made_of_labels = labels is not None and decoder is not None and labels.shape == decoder.shape
    left_out = ("decoder_input_ids", "decoder_attention_mask") if made_of_labels else ()
    return {name: value for name, value in inputs.items() if name not in left_out}


def allowed_length(length: int, config: Any) -> int | None:
    """The length to which sequences are filled up: ``max_length``, or ``max_new_tokens`` and the start token.

    Args:
        length: of the sequences, in tokens.
        config: of generation.

    Returns: None for sequences that are that long.

    Source: transformers 4.57: ``Seq2SeqTrainer.prediction_step``.
    """
    if config.max_length is not None and length < config.max_length:
        return int(config.max_length)
    if config.max_new_tokens is not None and length < config.max_new_tokens + 1:
        return int(config.max_new_tokens) + 1
    return None


def padded(tokens: Tensor, length: int, token: int) -> Tensor:
    """Sequences [B, T] filled up on the right with a token to [B, length].

    Example:
        >>> padded(torch.tensor([[1, 2]]), 4, 0)
        tensor([[1, 2, 0, 0]])
    """
    return nn.functional.pad(tokens, (0, length - tokens.shape[-1]), value=token)


def padding_token(processing_class: Any, model: Any) -> int:
    """The padding token of the processing class, or its end token; without such a class, that of the model.

    Raises: ValueError if there is none.

    Source: transformers 4.57: ``Seq2SeqTrainer._pad_tensors_to_max_len``.
    """
    token = None
    if hasattr(processing_class, "pad_token_id"):
        token = processing_class.pad_token_id
        token = processing_class.eos_token_id if token is None else token
    else:
        token = getattr(getattr(model, "config", None), "pad_token_id", None)
    if token is None:
        raise ValueError(
            "pad_token_id: neither processing_class nor model.config has one, expected a token to fill up sequences"
        )
    return int(token)


def shards_parameters(accelerator: Any) -> bool:
    """Whether DeepSpeed keeps the parameters in pieces (ZeRO 3), so that all processes have to generate in step."""
    plugin = plugin_of(accelerator, "deepspeed_plugin")
    return plugin is not None and plugin.zero_stage == 3


def whole_parameters(model: nn.Module) -> AbstractContextManager[Any]:
    """A scope in which a model under FSDP has its parameters whole."""
    if not is_instance(model, "torch.distributed.fsdp", "FullyShardedDataParallel"):
        return contextlib.nullcontext()
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel.summon_full_params(model)
