"""``Trainer``: the surface of Hugging Face's Trainer 4.57, each method a few lines over a function of trainkit."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.trainer import (
    build,
    checkpoints,
    collators,
    data,
    dataloaders,
    devices,
    evaluation,
    flops,
    hub,
    label_smoothing,
    loop,
    lr_schedules,
    model_card,
    neftune,
    optimizers,
    prediction,
    processes,
    random_state,
    reporting,
    run_length,
    search,
    steps,
    trackers,
)
from trainkit.trainer.accumulate_predictions import nested_numpify
from trainkit.trainer.arguments import TrainingArguments
from trainkit.trainer.callbacks import TrainerCallback
from trainkit.trainer.outputs import BestRun, EvalLoopOutput, PredictionOutput, TrainOutput
from trainkit.trainer.run import Run
from trainkit.trainer.state import TrainerControl


class Trainer(Run):
    """Training and evaluation of a module, as Hugging Face's Trainer 4.57 does them.

    Every method is an override point: the loop calls what a subclass defines. Between updates the tensors of ``model``
    are the truth.

    Args:
        model: any module that takes keyword inputs and returns a loss, a tuple, a mapping or a ``ModelOutput``.
        args: what to do, a :class:`TrainingArguments`.
        data_collator: makes a batch of a list of samples.
        train_dataset: map-style data, or a stream.
        eval_dataset: the same, or several by name.
        processing_class: tokenizer or processor; saved with the model, pads batches.
        model_init: makes the model, for each call of :meth:`train` and each trial of a search.
        compute_loss_func: ``(outputs, labels, num_items_in_batch) -> loss``.
        compute_metrics: ``(EvalPrediction) -> dict``; or trainkit metrics by name, merged in constant memory.
        callbacks: objects or classes.
        optimizers: an optimizer and a scheduler of torch, each or None.
        optimizer_cls_and_kwargs: makes the optimizer.
        preprocess_logits_for_metrics: ``(logits, labels) -> what is kept of the logits``.
        tokenizer: the old name of ``processing_class``.

    Raises: RuntimeError, ValueError, TypeError for arguments that cannot go together, before anything is changed.

    Source: transformers 4.57.1 ``Trainer``; differences are listed in docs/differences.md.
    """

    # -- 1. initialisation -----------------------------------------------------------------------------------------

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[..., Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., Any] | None = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        tokenizer: Any = None,
    ) -> None:
        args = TrainingArguments(output_dir="tmp_trainer") if args is None else args
        processing_class = build.renamed(tokenizer, processing_class, "tokenizer", "processing_class")
        build.check_constructor(
            args,
            model=model,
            model_init=model_init,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=data_collator,
            compute_metrics=compute_metrics,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            processing_class=processing_class,
        )
        makers = trackers.tracker_callbacks(args.report_to)
        self.args = args
        build.set_log_level(args)
        build.set_seed(args.seed, deterministic=args.full_determinism)
        self._set_defaults()
        self.create_accelerator_and_postprocess()
        self._memory_tracker = reporting.MemoryTracker(skip=args.skip_memory_metrics)
        self._memory_tracker.start("init")
        self.model_init = model_init
        model = self._first_model(model)
        self.compute_loss_func, self.compute_metrics = compute_loss_func, compute_metrics
        self.preprocess_logits_for_metrics = preprocess_logits_for_metrics
        self.processing_class = processing_class
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.data_collator = data_collator or collators.default_collator_for(processing_class)
        self.optimizer, self.lr_scheduler = optimizers
        self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs
        self.is_model_parallel = build.is_model_parallel(model, args.device)
        self.place_model_on_device = self._places_model()
        if self.place_model_on_device and not getattr(model, "is_loaded_in_8bit", False):
            self._move_model_to_device(model, args.device)
        self._take_model(model)
        self._know_model()
        self.label_smoother = self._label_smoother()
        self.control = TrainerControl()
        self._take_callbacks([*makers, *(callbacks or [])])
        self.state = self._first_state()
        if args.push_to_hub:
            self.init_hf_repo()
        if args.should_save:
            Path(str(args.output_dir)).mkdir(parents=True, exist_ok=True)
        self.control = self.callback_handler.on_init_end(args, self.state, self.control)
        self._memory_tracker.stop("init")

    def _overridden(self, names: tuple[str, ...]) -> list[str]:
        return steps.overridden(self, Trainer, names)

    def create_accelerator_and_postprocess(self) -> None:
        """Make ``accelerator``, and set what is derived from it. Called anew by each trial of a search.

        Source: Trainer 4.57: the method of this name.
        """
        self.accelerator = devices.make_accelerator(self.args)
        self.gather_function = devices.gather_function(self.accelerator, use_object=self.args.eval_use_gather_object)
        self.is_deepspeed_enabled = devices.plugin_of(self.accelerator, "deepspeed_plugin") is not None
        self.is_fsdp_enabled = devices.plugin_of(self.accelerator, "fsdp_plugin") is not None
        self.is_tp_enabled = devices.plugin_of(self.accelerator, "torch_tp_plugin") is not None

    @property
    def tokenizer(self) -> Any:
        """The old name of ``processing_class``."""
        build.one_warning("Trainer.tokenizer: use Trainer.processing_class", FutureWarning)
        return self.processing_class

    @tokenizer.setter
    def tokenizer(self, processing_class: Any) -> None:
        build.one_warning("Trainer.tokenizer: use Trainer.processing_class", FutureWarning)
        self.processing_class = processing_class

    # -- 2. data ---------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        """The batches of ``train_dataset``, shuffled, of ``_train_batch_size`` rows."""
        if self.train_dataset is None:
            raise ValueError("train_dataset: training needs one")
        return self._get_dataloader(
            dataset=self.train_dataset,
            description="Training",
            batch_size=self._train_batch_size,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The batches of an evaluation data set, in order: given, or by its name in ``eval_dataset``, or that."""
        if eval_dataset is None and self.eval_dataset is None:
            raise ValueError("eval_dataset: evaluation needs one; pass it here or to the Trainer")
        key = eval_dataset if isinstance(eval_dataset, str) else "eval"
        chosen = self.eval_dataset[key] if isinstance(eval_dataset, str) else eval_dataset
        chosen = self.eval_dataset if chosen is None else chosen
        kept = self._eval_dataloaders.get(key)
        if kept is not None and kept[0] is chosen and self.args.dataloader_persistent_workers:
            return kept[1]
        return self._get_dataloader(
            dataset=chosen,
            description="Evaluation",
            batch_size=self.args.eval_batch_size,
            sampler_fn=self._get_eval_sampler,
            dataloader_key=key,
        )

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """The batches of a data set to predict on, in order."""
        size = self.args.eval_batch_size
        return self._get_dataloader(
            dataset=test_dataset, description="test", batch_size=size, sampler_fn=self._get_eval_sampler
        )

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Callable[[Any], Any] | None = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> Any:
        """Batches of any data set: unused columns left out, sharded over processes, on the device."""
        collator = self.data_collator
        chosen = dataset
        if data.is_table(dataset):
            dataset = self._remove_unused_columns(dataset, description=description)
        else:
            collator = self._get_collator_with_removed_columns(collator, description=description)
        made = dataloaders.dataloader_for(
            self.args,
            dataset,
            batch_size=batch_size,
            collate_fn=collator,
            sampler=None if sampler_fn is None else sampler_fn(dataset),
            is_training=is_training,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes // self.get_tp_size(),
            device=self.args.device,
        )
        if dataloader_key is not None and self.args.dataloader_persistent_workers:
            self._eval_dataloaders[dataloader_key] = (chosen, made)
        return made

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        """A ``datasets.Dataset`` with only the columns that the model takes."""
        if not self.args.remove_unused_columns:
            return dataset
        self._set_signature_columns_if_needed()
        return data.without_unused_columns(dataset, self._signature_columns, description)

    def _get_collator_with_removed_columns(
        self, data_collator: Callable[..., Any], description: str | None = None
    ) -> Callable[..., Any]:
        """A collator that sees only the keys that the model takes."""
        if not self.args.remove_unused_columns:
            return data_collator
        self._set_signature_columns_if_needed()
        return data.ColumnsOnly(data_collator, self._signature_columns, description)

    def _set_signature_columns_if_needed(self) -> None:
        """Find the names that the model takes, once. An open signature takes everything."""
        if self._signature_columns is None:
            self._signature_columns = data.signature_columns(self.model, self.label_names)

    def _align_special_tokens(self) -> None:
        """Let the model's configuration follow the tokenizer's special tokens."""
        data.align_special_tokens(self.model, self.processing_class)

    def num_examples(self, dataloader: Any) -> int:
        """Rows of the data set behind a loader, over all processes."""
        return run_length.num_examples(dataloader, self.args.per_device_train_batch_size)

    @staticmethod
    def num_tokens(train_dl: Any, max_steps: int | None = None) -> int:
        """Elements of ``input_ids`` over a loader; with ``max_steps`` those of its first batch times that."""
        return run_length.num_tokens(train_dl, max_steps)

    # -- 3. optimizer and schedule ---------------------------------------------------------------------------------

    def create_optimizer(self) -> Any:
        """``optimizer``: the given one, else made of ``args.optim`` over groups with and without weight decay."""
        if self.optimizer is None:
            names = self.get_decay_parameter_names(self.model)
            groups = optimizers.parameter_groups(self.model, names, self.args.weight_decay)
            cls, kwargs = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizers.build_optimizer(self.model, groups, cls, kwargs)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """``lr_scheduler``: the given one, else made of ``args.lr_scheduler_type``."""
        if self.lr_scheduler is None:
            self.lr_scheduler = lr_schedules.make_lr_scheduler(
                self.args.lr_scheduler_type,
                optimizers.raw(self.optimizer if optimizer is None else optimizer),
                self.args.get_warmup_steps(num_training_steps),
                num_training_steps,
                dict(self.args.lr_scheduler_kwargs or {}),  # type: ignore[arg-type]
                greater_is_better=self.args.greater_is_better,
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        """Both, in this order."""
        self.create_optimizer()
        self.create_scheduler(num_training_steps=num_training_steps, optimizer=self.optimizer)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: Any = None) -> tuple[Any, Any]:
        """The class and the keyword arguments that ``args.optim`` and ``args.optim_args`` mean."""
        return optimizers.optimizer_class_and_kwargs(args, model)

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Names of the parameters with weight decay: all but biases and norms."""
        return optimizers.decay_parameter_names(model)

    def get_num_trainable_parameters(self) -> int:
        """Elements of the parameters that require gradients."""
        return optimizers.num_trainable_parameters(self.model)

    def get_learning_rates(self) -> list[float]:
        """The rate of every group of parameters. Raises: ValueError before there is an optimizer."""
        return optimizers.learning_rates(self.optimizer)

    def get_optimizer_group(self, param: Any = None) -> Any:
        """The group that a parameter (or its name) is in; without one, the parameters of every group."""
        return optimizers.optimizer_group(self.optimizer, self.model.named_parameters(), param)

    # -- 4. training -----------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
        **kwargs: Any,
    ) -> TrainOutput:
        """Train, from the beginning or from a checkpoint.

        Args:
            resume_from_checkpoint: a folder, or True for the newest whole one in ``output_dir``.
            trial: of a search.
            ignore_keys_for_eval: outputs that evaluations during training leave out.
            kwargs: ``model_path``, the old name of ``resume_from_checkpoint``.

        Returns: updates done, mean loss of this call, metrics.

        Raises:
            ValueError: nothing to resume from.
            TypeError: unknown keywords.
            RuntimeError: another process of the run has ended; with two it is named.
        """
        resume = checkpoints.wanted(resume_from_checkpoint, kwargs, str(self.args.output_dir))
        self._memory_tracker.start("train")
        self.is_in_train = True
        with processes.naming_lost_processes(self.args), ExitStack() as stack:
            stack.callback(self._leave_training)
            self._hp_search_setup(trial)
            self._train_batch_size = self.args.train_batch_size
            if self.model_init is not None:
                self._start_with_new_model(trial)
            if self._has_special_tokens():
                self._align_special_tokens()
            if self.neftune_noise_alpha is not None:
                self.model = self._activate_neftune(self.model)
                stack.callback(self._leave_neftune)
            if resume is not None and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
                self._load_from_checkpoint(resume)
            if self._is_elsewhere():
                self._move_model_to_device(self.model, self.args.device)
            run = functools.partial(
                self._inner_training_loop,
                args=self.args,
                resume_from_checkpoint=resume,
                trial=trial,
                ignore_keys_for_eval=ignore_keys_for_eval,
            )
            result: TrainOutput = devices.with_batch_size(
                run, self._train_batch_size, search=self.args.auto_find_batch_size, keep=self._snapshot
            )
            return result

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward pass of one microbatch.

        Returns: the loss, detached, as it counts in its group: divided by the number of microbatches unless it is
            divided by the number of items already.
        """
        context, inputs = self._prepare_context_parallel_inputs(model, inputs)
        with context():
            model.train()
            if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
                self.optimizer.train()
            inputs = self._prepare_inputs(inputs)
            with self.compute_loss_context_manager():
                loss = self._loss_of(model, inputs, num_items_in_batch)
            del inputs
            loss = self._in_group(loss, num_items_in_batch)
            self.accelerator.backward(loss, **optimizers.backward_kwargs(self.args, self._get_learning_rate))
            detached: Tensor = loss.detach()
            return detached

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of a microbatch: of ``compute_loss_func``, of label smoothing, or the model's own.

        Returns: the loss, or ``(loss, outputs)``.
        """
        labels = None
        if (self.label_smoother is not None or self.compute_loss_func is not None) and "labels" in inputs:
            labels = inputs.pop("labels")
        kwargs = {}
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            kwargs["num_items_in_batch"] = num_items_in_batch
        outputs = model(**inputs, **kwargs)
        if self.compute_loss_func is not None:
            if labels is None:
                build.one_warning("compute_loss_func: the batch has no labels, it is called with None")
            loss = self.compute_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
        elif labels is not None:
            shift = label_smoothing.is_causal_lm(model)
            count = num_items_in_batch if self._is_normalised(num_items_in_batch) else None
            loss = self.label_smoother(outputs, labels, shift_labels=shift, num_items_in_batch=count)
        else:
            loss = steps.loss_of(outputs, inputs)
        if self.args.average_tokens_across_devices and self._is_normalised(num_items_in_batch):
            loss = loss * self.accelerator.num_processes if num_items_in_batch is not None else loss
        return (loss, outputs) if return_outputs else loss

    def _inner_training_loop(
        self,
        batch_size: int | None = None,
        args: TrainingArguments | None = None,
        resume_from_checkpoint: str | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """One attempt: set-up, epochs, end of the run."""
        args = self.args if args is None else args
        self.accelerator.free_memory()
        self._train_batch_size = args.train_batch_size if batch_size is None else batch_size
        loader = self.get_train_dataloader()
        total_batch = self.get_total_train_batch_size(args)
        num_epochs, per_epoch, _, num_samples, epoch_based, length, max_steps = self.set_initial_training_values(
            args, loader, total_batch
        )
        tokens = self._planned_tokens(args, loader, num_epochs if epoch_based else None, max_steps)
        self._prepare_optimization(max_steps)
        self._prepare_state(args, trial, max_steps)
        model = self._prepare_model(loader)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        self._load_scaler(resume_from_checkpoint)
        start_epoch, skip = self._resume_state(args, resume_from_checkpoint, per_epoch, length, max_steps)
        self.state.init_training_references(self, max_steps, num_epochs, trial)
        start = time.time()
        first_step = self.state.global_step
        self._begin_steps(model)
        tr_loss = self._begin_losses(resume_from_checkpoint)
        self._fire("on_train_begin")
        if args.eval_on_start:
            self._evaluate(trial, ignore_keys_for_eval, skip_scheduler=True)
        plan = loop.Plan(num_epochs, max_steps, args.gradient_accumulation_steps, length, start_epoch, skip)
        batches = functools.partial(self._start_epoch, loader, resume_from_checkpoint, start_epoch)
        report = functools.partial(self._report_step, tr_loss, model, trial, ignore_keys_for_eval, start)
        self._run_epochs(plan, self._loop_hooks(model, tr_loss, batches, report), model, trial)
        return self._end_training(trial, tr_loss, first_step, start, num_samples, max_steps, tokens)

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Rows per update over all processes."""
        world = args.world_size // self.get_tp_size()
        return self._train_batch_size * args.gradient_accumulation_steps * world

    def get_tp_size(self) -> int:
        """Processes that share one model by tensor parallelism."""
        size = getattr(self.model, "_tp_size", None) if hasattr(self, "model") else None
        return 1 if size is None else int(size)

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any, total_train_batch_size: int) -> Any:
        """How long the run is: (epochs, updates per epoch, examples, samples, epoch based, batches, updates)."""
        length = dataloaders.length_of(dataloader)
        examples = 0 if length is None else self.num_examples(dataloader)
        return run_length.run_length(args, length, examples, total_train_batch_size)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Up to ``num_batches`` microbatches, and the number of items that their losses are over."""
        batches = run_length.take_group(epoch_iterator, num_batches)
        return batches, self._get_num_items_in_batch(batches, device)

    # -- log, evaluate, save ---------------------------------------------------------------------------------------

    def _maybe_log_save_evaluate(
        self,
        tr_loss: Tensor,
        grad_norm: Any,
        model: Any,
        trial: Any,
        epoch: Any,
        ignore_keys_for_eval: list[str] | None,
        start_time: float,
        learning_rate: float | None = None,
    ) -> None:
        """Log, evaluate and save, as the flags say; an evaluation is in the checkpoint of its step."""
        if self.control.should_log and self.state.global_step > self._globalstep_last_logged:
            self._log_step(tr_loss, grad_norm, start_time, learning_rate)
        metrics = None
        if self.control.should_evaluate:
            metrics = self._evaluate(trial, ignore_keys_for_eval)
            is_best = self._determine_best_metric(metrics=metrics, trial=trial)
            if self.args.save_strategy == "best":
                self.control.should_save = is_best
        if self.control.should_save:
            self._save_checkpoint(model, trial)
            self._fire("on_save")

    # -- 5. evaluation and prediction --------------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Metrics on a data set, or on each of several: logged, given to the callbacks, returned."""
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(chosen, dict):
            found: dict[str, float] = {}
            for name, one in chosen.items():
                argument = one if eval_dataset is not None else name
                prefix = f"{metric_key_prefix}_{name}"
                found.update(self.evaluate(eval_dataset=argument, ignore_keys=ignore_keys, metric_key_prefix=prefix))
            return found
        self._memory_tracker.start("eval")
        loader = self.get_eval_dataloader(chosen)
        start = time.time()
        run = self.prediction_loop if self.args.use_legacy_prediction_loop else self.evaluation_loop
        output = run(
            loader,
            description="Evaluation",
            prediction_loss_only=True if self.compute_metrics is None else None,
            ignore_keys=ignore_keys,
            metric_key_prefix=metric_key_prefix,
        )
        metrics = self._with_speed(output, metric_key_prefix, start)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._memory_tracker.stop_and_update_metrics("eval", metrics)
        return metrics

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Predictions and, with labels, metrics on a data set."""
        self._memory_tracker.start("test")
        loader = self.get_test_dataloader(test_dataset)
        start = time.time()
        run = self.prediction_loop if self.args.use_legacy_prediction_loop else self.evaluation_loop
        output = run(loader, description="Prediction", ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)
        metrics = self._with_speed(output, metric_key_prefix, start)
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, metrics)
        self._memory_tracker.stop_and_update_metrics("test", metrics)
        return PredictionOutput(output.predictions, output.label_ids, metrics)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Run the model over a loader: predictions, labels, mean loss, metrics."""
        run = functools.partial(self._run_evaluation, evaluation.evaluate_batches)
        return run(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)

    def prediction_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The older form of :meth:`evaluation_loop`: needs a length, does not preprocess logits."""
        run = functools.partial(self._run_evaluation, evaluation.prediction_loop)
        return run(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """Loss, logits and labels of one batch, each or None, detached."""
        return prediction.prediction_step(
            model,
            inputs,
            prediction_loss_only,
            prediction.default_ignore_keys(self.model) if ignore_keys is None else ignore_keys,
            prepare_inputs=self._prepare_inputs,
            label_names=self.label_names,
            required=prediction.required_label_names(self.model, self.label_names)
            if self.args.label_names is None
            else None,
            can_return_loss=self.can_return_loss,
            compute_loss=self._call_loss,
            num_items=self._count_for_evaluation,
            context=self.compute_loss_context_manager,
        )

    def _gather_and_numpify(self, tensors: Any, name: str) -> Any:
        """Tensors of all processes as NumPy arrays."""
        return None if tensors is None else nested_numpify(self._nested_gather(tensors, name))

    def _nested_gather(self, tensors: Any, name: str | None = None) -> Any:
        """Tensors of all processes, one after the other along the first axis."""
        return tensors if tensors is None or self.args.world_size == 1 else devices.gathered(self.accelerator, tensors)

    # -- 6. saving and loading ---------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model, and what belongs to it, so that it can be loaded again. To be called by all processes."""
        folder = str(self.args.output_dir) if output_dir is None else output_dir
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            state_dict = self.accelerator.get_state_dict(self.model_wrapped)
            if self.args.should_save:
                self._save(folder, state_dict=state_dict)
        elif self.args.should_save:
            self._save(folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A folder ``checkpoint-<global_step>``, which is there whole or not at all; older ones go by the limit."""
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        whole = checkpoints.whole_folder(folder, main=self.args.should_save, wait=self.accelerator.wait_for_everyone)
        with whole as staging:
            self.save_model(str(staging), _internal_call=True)
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(str(staging))
                self._save_scaler(str(staging))
                self._save_rng_state(str(staging))
            self._save_losses(str(staging))
            self._note_best(folder)
            if self.args.should_save:
                self.state.save_to_json(str(staging / checkpoints.STATE))
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            self._rotate_checkpoints(use_mtime=False, output_dir=str(folder.parent))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Weights from a checkpoint into the model."""
        result = checkpoints.load_weights(resume_from_checkpoint, self.model if model is None else model)
        self._issue_warnings_after_load(result)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        checkpoints.write_optimizer(output_dir, self.optimizer, self.lr_scheduler, should_save=self.args.should_save)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            checkpoints.load_optimizer(checkpoint, self.optimizer, self.lr_scheduler)

    def _save_rng_state(self, output_dir: str) -> None:
        """Random state of Python, NumPy and torch, for code of the user's own; the trainer's draws need none."""
        random_state.write_random_state(output_dir, self.accelerator.process_index, self.accelerator.num_processes)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            random_state.load_random_state(checkpoint, self.accelerator.process_index, self.accelerator.num_processes)

    def _load_best_model(self) -> None:
        """Weights of the best checkpoint into the model."""
        assert self.state.best_model_checkpoint is not None
        self._issue_warnings_after_load(checkpoints.load_weights(self.state.best_model_checkpoint, self.model))

    def _sorted_checkpoints(
        self, output_dir: str | None = None, checkpoint_prefix: str = "checkpoint", use_mtime: bool = False
    ) -> list[str]:
        """Checkpoints, the oldest first, the best at most before the newest."""
        folder = str(self.args.output_dir) if output_dir is None else output_dir
        return checkpoints.sorted_checkpoints(folder, checkpoint_prefix, use_mtime, self.state.best_model_checkpoint)

    def _rotate_checkpoints(self, use_mtime: bool = False, output_dir: str | None = None) -> None:
        """Delete the oldest checkpoints beyond ``save_total_limit``, never the newest nor the best."""
        found = self._sorted_checkpoints(use_mtime=use_mtime, output_dir=output_dir)
        checkpoints.rotate(found, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _save_scaler(self, output_dir: str) -> None:
        if self.accelerator.scaler is not None and self.args.should_save:
            checkpoints.write_scaler(output_dir, self.accelerator.scaler)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            checkpoints.load_scaler(checkpoint, self.accelerator.scaler)

    # -- 7. callbacks ------------------------------------------------------------------------------------------------

    def add_callback(self, callback: type | TrainerCallback) -> None:
        """Append a callback; a class is instantiated."""
        self.callback_handler.add_callback(callback)

    def remove_callback(self, callback: type | TrainerCallback) -> None:
        """Remove a callback, or the first of a class."""
        self.callback_handler.remove_callback(callback)

    def pop_callback(self, callback: type | TrainerCallback) -> Any:
        """Remove and return a callback, or the first of a class; None if there is none."""
        return self.callback_handler.pop_callback(callback)

    # -- 8. search ---------------------------------------------------------------------------------------------------

    def hyperparameter_search(
        self,
        hp_space: Callable[..., Any] | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        n_trials: int = 20,
        direction: str | list[str] = "minimize",
        backend: Any = None,
        hp_name: Callable[..., str] | None = None,
        **kwargs: Any,
    ) -> BestRun | list[BestRun]:
        """Train with several settings and return the best."""
        if self.model_init is None:
            raise RuntimeError("model_init: a search needs it, since every trial starts with a new model")
        chosen = search.backend_of(backend)
        self.hp_search_backend, self.hp_name = chosen.name, hp_name
        self.hp_space = chosen.default_space if hp_space is None else hp_space
        self.compute_objective = search.default_objective if compute_objective is None else compute_objective
        try:
            found: BestRun | list[BestRun] = chosen.run(self, n_trials, direction, **kwargs)
            return found
        finally:
            self.hp_search_backend = None

    def _hp_search_setup(self, trial: Any) -> None:
        self._trial = trial
        if self.hp_search_backend is None or trial is None:
            return
        search.apply_parameters(self.args, search.parameters_of(self.hp_search_backend, trial, self.hp_space))
        self.create_accelerator_and_postprocess()

    def _report_to_hp_search(self, trial: Any, step: int, metrics: dict[str, float]) -> None:
        if self.hp_search_backend is None or trial is None:
            return
        self.objective = self.compute_objective(dict(metrics))
        save = self._tune_save_checkpoint if self.control.should_save else None
        if search.should_prune(self.hp_search_backend, trial, self.objective, step, metrics=metrics, save=save):
            self._fire("on_train_end")
            raise search.pruned(self.hp_search_backend)

    # -- 9. device and processes -------------------------------------------------------------------------------------

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if getattr(model, "hf_device_map", None) is not None:
            build.one_warning("model: it has a device map and is not moved")
            return
        model.to(device)

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        """The model itself, with the options set that its preparation for several processes needs."""
        if training and self.accelerator.num_processes > 1:
            devices.set_ddp_options(self.accelerator, self.args, self.model)
        if self.args.jit_mode_eval:
            return self.torch_jit_model_eval(model, dataloader, training)
        return model

    def is_local_process_zero(self) -> bool:
        """Whether this is the first process of its machine."""
        return bool(self.args.local_process_index == 0)

    def is_world_process_zero(self) -> bool:
        """Whether this is the first of all processes."""
        return bool(self.args.process_index == 0)

    # -- 10. utilities -----------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the epoch, remember, and give to the callbacks."""
        if self.state.epoch is not None:
            logs["epoch"] = self.state.epoch
        if self.args.include_num_input_tokens_seen != "no":
            logs["num_input_tokens_seen"] = self.state.num_input_tokens_seen
            if start_time is not None:
                speed = reporting.speed_metrics("train", start_time, num_tokens=self.state.num_input_tokens_seen)
                logs.update(speed)
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def _prepare_input(self, data: Any) -> Any:
        """A tree of tensors on the device."""
        return dataloaders.moved(data, self._device, inner=self._prepare_input)

    def _prepare_inputs(self, inputs: Any) -> Any:
        """A batch on the device. Raises: ValueError for an empty one."""
        inputs = self._prepare_input(inputs)
        if isinstance(inputs, Mapping) and not inputs:
            names = ", ".join(self._signature_columns or [])
            raise ValueError(
                f"batch: it is empty; the model takes {names or 'nothing that is known'}. Check the names of the "
                "columns, or pass remove_unused_columns=False"
            )
        return inputs

    def floating_point_ops(self, inputs: Any) -> int:
        """Floating-point operations of a forward and backward pass, as the model says; 0 if it does not."""
        return flops.floating_point_ops(self.model, inputs)

    def store_flos(self) -> None:
        """Add what was counted since the last call, over all processes, to the state."""
        total = self.current_flos
        if self.args.world_size > 1:
            total = float(self.accelerator.gather(torch.tensor([total], device=self.args.device)).sum())
        self.state.total_flos += total
        self.current_flos = 0

    # -- 11. special -------------------------------------------------------------------------------------------------

    def _activate_neftune(self, model: Any) -> Any:
        self.neftune_hook_handle = neftune.activate_neftune(model, self.neftune_noise_alpha)
        return model

    def _deactivate_neftune(self, model: Any) -> None:
        if self.neftune_hook_handle is None:
            raise ValueError("neftune: it is not active")
        neftune.deactivate_neftune(model, self.neftune_hook_handle)
        self.neftune_hook_handle = None

    def torch_jit_model_eval(self, model: Any, dataloader: Any, training: bool = False) -> Any:
        """The model, traced for evaluation where that is possible."""
        return model if training else devices.traced(model, dataloader, self._prepare_inputs)

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager[Any]:
        """Nothing: the accelerator runs the forward pass under autocast."""
        return nullcontext()

    def compute_loss_context_manager(self) -> AbstractContextManager[Any]:
        """What forward passes run under."""
        stack = ExitStack()
        stack.enter_context(self.autocast_smart_context_manager())
        return stack

    def _prepare_context_parallel_inputs(self, model: Any, inputs: Any) -> tuple[Callable[[], Any], Any]:
        """A context for the step, and the inputs; both unchanged where nothing is split along the sequence."""
        return nullcontext, inputs

    # -- 12. model card and hub --------------------------------------------------------------------------------------

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """``README.md`` in ``output_dir``: what was trained, how, with what results."""
        if not self.is_world_process_zero():
            return
        model_card.write_model_card(
            Path(str(self.args.output_dir)),
            args=self.args,
            state=self.state,
            model=self.model,
            datasets=(self.eval_dataset, self.train_dataset),
            language=language,
            license=license,
            tags=tags,
            model_name=model_name,
            finetuned_from=finetuned_from,
            tasks=tasks,
            dataset_tags=dataset_tags,
            dataset=dataset,
            dataset_args=dataset_args,
        )

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save, write the card, upload ``output_dir``."""
        name = kwargs.pop("model_name", None) or hub.model_name(self.args)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token)
        # An upload that is under way reads the files that are written next.
        self._finish_current_push()
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(model_name=name, **hub.with_model_tags(kwargs, self.model))
        return hub.upload_run(
            self.args, self.hub_model_id, message=commit_message, blocking=blocking, token=token, revision=revision
        )

    def init_hf_repo(self, token: str | None = None) -> None:
        """Make the repository of the run, if it is not there."""
        if self.is_world_process_zero():
            self.hub_model_id = hub.create_repository(self.args, token)
            self.push_in_progress: Any = None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero():
            self.push_in_progress = hub.push_checkpoint(
                self.args,
                self.state,
                self.hub_model_id,
                checkpoint_folder,
                self.processing_class,
                self.push_in_progress,
            )

    def _finish_current_push(self) -> None:
        if getattr(self, "push_in_progress", None) is not None:
            hub.wait_for(self.push_in_progress)
            self.push_in_progress = None
