"""The parts of a run that are no override points: set-up, updates, the end. ``Trainer`` builds on them."""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.trainer import (
    best,
    build,
    checkpoints,
    dataloaders,
    devices,
    evaluation,
    label_smoothing,
    lr_schedules,
    prediction,
    reporting,
    run_length,
    samplers,
    search,
)
from trainkit.trainer.arguments import TrainingArguments
from trainkit.trainer.callbacks import DefaultFlowCallback
from trainkit.trainer.evaluation_ranks import ranks_of
from trainkit.trainer.foreign import is_processor, is_tokenizer
from trainkit.trainer.outputs import EvalLoopOutput, TrainOutput
from trainkit.trainer.progress import PrinterCallback, ProgressCallback
from trainkit.trainer.state import ExportableState, TrainerState
from trainkit.trainer.updates import Updates

_SPILL_BYTES = 2**24
"""Predictions of an evaluation that are kept in memory; more of them go to a file in ``output_dir``."""


class Run(Updates):
    """What :class:`~trainkit.trainer.trainer.Trainer` does between its override points."""

    def _set_defaults(self) -> None:
        """What a trainer remembers before anything has happened."""
        self.hp_name: Any = None
        self.hp_search_backend: Any = None
        self.hp_space: Any = None
        self.compute_objective: Any = None
        self.objective: Any = None
        self._trial: Any = None
        self.is_in_train = False
        self.deepspeed: Any = None
        self.hub_model_id: Any = None
        self.neftune_noise_alpha: Any = self.args.neftune_noise_alpha
        self.neftune_hook_handle: Any = None
        self.current_flos = 0
        self.current_gradient_accumulation_steps = self.args.gradient_accumulation_steps
        self._train_batch_size = self.args.train_batch_size
        self._created_lr_scheduler = False
        self._eval_dataloaders: dict[Any, Any] = {}
        self._total_loss_scalar, self._globalstep_last_logged = 0.0, 0
        self._step = self._train_state = self._last_rate = None
        self.step_metrics = {}

    def _take_model(self, model: nn.Module) -> None:
        """Make a model this trainer's, with what is derived from it."""
        self.model = self.model_wrapped = model
        self.model_accepts_loss_kwargs = build.accepts_loss_kwargs(model)
        self.label_names = (
            prediction.default_label_names(model) if self.args.label_names is None else self.args.label_names
        )
        self.can_return_loss = prediction.can_return_loss(model)
        self._signature_columns: list[str] | None = None

    def _first_model(self, model: Any) -> Any:
        if model is None:
            model = self.call_model_init()
        elif self.model_init is not None:
            text = "model_init: it makes a new model at each train(); the one that was passed is replaced then"
            build.one_warning(text, FutureWarning)
        build.check_model(model)
        return model

    def _places_model(self) -> bool:
        """Whether the model goes to the device at once: not if something else places it, or casts it first."""
        args = self.args
        elsewhere = self.is_model_parallel or self.is_deepspeed_enabled or self.is_fsdp_enabled
        cast_later = (args.fp16_full_eval or args.bf16_full_eval) and not args.do_train
        return bool(args.place_model_on_device and not elsewhere and not cast_later)

    def _label_smoother(self) -> Any:
        if self.args.label_smoothing_factor == 0:
            return None
        config = getattr(self.model, "config", None)
        if getattr(config, "problem_type", None) == "multi_label_classification":
            build.one_warning("label_smoothing_factor: it means nothing for several labels per row and is left out")
            return None
        return label_smoothing.LabelSmoother(epsilon=self.args.label_smoothing_factor)

    def _callbacks(self, makers: list[type], given: list[Any]) -> list[Any]:
        last = PrinterCallback if self.args.disable_tqdm else ProgressCallback
        return [DefaultFlowCallback, *makers, *given, last]

    def _new_state(self) -> TrainerState:
        exportable = [c for c in (*self.callback_handler.callbacks, self.control) if isinstance(c, ExportableState)]
        return TrainerState(
            is_local_process_zero=self.is_local_process_zero(),
            is_world_process_zero=self.is_world_process_zero(),
            stateful_callbacks=exportable,
        )

    def _start_with_new_model(self, trial: Any) -> None:
        build.set_seed(self.args.seed, deterministic=self.args.full_determinism)
        self._take_model(self.call_model_init(trial))
        self.optimizer = self.lr_scheduler = None
        self.callback_handler.model = self.model

    def _has_special_tokens(self) -> bool:
        known = is_tokenizer(self.processing_class) or is_processor(self.processing_class)
        return known and hasattr(self.model, "config")

    def _leave_neftune(self) -> None:
        if self.neftune_hook_handle is not None:
            self._deactivate_neftune(self.model)

    def _snapshot(self) -> Callable[[], None]:
        """What puts model, optimizer and schedule back as they are now."""
        restore_model, made_here = devices.snapshot(self.model), self.optimizer is None
        memory = copy.deepcopy([None if o is None else o.state_dict() for o in (self.optimizer, self.lr_scheduler)])

        def restore() -> None:
            restore_model()
            if made_here:
                self.optimizer = None
            for one, before in zip((self.optimizer, self.lr_scheduler), memory, strict=True):
                if one is not None and before is not None:
                    one.load_state_dict(before)

        return restore

    def _planned_tokens(self, args: TrainingArguments, loader: Any, epochs: float | None, max_steps: int) -> int | None:
        if not args.include_tokens_per_second:
            return None
        steps = None if epochs is not None else max_steps
        tokens = self.num_tokens(loader, steps)
        return int(tokens * (args.num_train_epochs if epochs is not None else args.gradient_accumulation_steps))

    def _prepare_optimization(self, max_steps: int) -> None:
        if self._created_lr_scheduler:
            self.lr_scheduler, self._created_lr_scheduler = None, False
        self.create_optimizer_and_scheduler(num_training_steps=max_steps)

    def _prepare_state(self, args: TrainingArguments, trial: Any, max_steps: int, num_epochs: int) -> None:
        self.state = self._new_state()
        self.state.is_hyper_param_search = trial is not None
        self.state.train_batch_size = self._train_batch_size
        self.state.compute_steps(args, max_steps)
        self.state.init_training_references(self, max_steps, num_epochs, trial)
        self.state.epoch = 0

    def _prepare_model(self, loader: Any) -> Any:
        """The model as the loop calls it: with gradient checkpointing, wrapped, prepared; also in the callbacks."""
        if self.args.gradient_checkpointing:
            devices.enable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        self.model_wrapped = self._wrap_model(self.model_wrapped)
        if self.model_wrapped is self.model:
            self.model.train()
            prepared = self.accelerator.prepare(self.model, self.optimizer)
            self.model_wrapped, self.optimizer = prepared
        if self.is_fsdp_enabled:
            self.model = self.model_wrapped
        handler = self.callback_handler
        handler.model, handler.optimizer, handler.lr_scheduler = self.model, self.optimizer, self.lr_scheduler
        handler.train_dataloader = loader
        return self.model_wrapped

    def _resume_state(
        self, args: TrainingArguments, folder: str, per_epoch: int, max_steps: int, num_epochs: int, trial: Any
    ) -> tuple[int, int]:
        """Take counters and log from a checkpoint; where to go on: (epoch, microbatches to skip)."""
        stored = checkpoints.read_state(folder)
        self.compare_trainer_and_checkpoint_args(args, stored)
        stored.stateful_callbacks, exportable = self.state.stateful_callbacks, stored.stateful_callbacks
        self.state = stored
        self._stored_callbacks = exportable
        self._load_callback_state()
        self.state.compute_steps(args, max_steps)
        self.state.init_training_references(self, max_steps, num_epochs, trial)
        self.state.train_batch_size = self._train_batch_size
        epoch, skip = run_length.resume_position(self.state.global_step, per_epoch, args.gradient_accumulation_steps)
        return epoch, 0 if args.ignore_data_skip else skip

    def _start_epoch(self, loader: Any, checkpoint: str | None, first: int, epoch: int, skip: int) -> Iterable[Any]:
        """The microbatches of an epoch after those to skip."""
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        self._fire("on_epoch_begin")
        if epoch == first:
            # Before anything is fetched, so that what the data draw in this process is the same too.
            self._load_rng_state(checkpoint)
        return dataloaders.after(loader, skip) if skip else loader

    def _log_step(self, tr_loss: Tensor, grad_norm: Any, start_time: float, learning_rate: float | None) -> None:
        updates = self.state.global_step - self._globalstep_last_logged
        total = float(self._nested_gather(tr_loss).mean().item())
        tr_loss.zero_()
        logs: dict[str, float] = {"loss": total / updates}
        if grad_norm is not None:
            logs["grad_norm"] = float(grad_norm)
        logs["learning_rate"] = self._get_learning_rate() if learning_rate is None else learning_rate
        if bad := int(self._nan_losses):
            logs["nonfinite_losses"] = bad
        self._total_loss_scalar += total
        self._globalstep_last_logged = self.state.global_step
        self.store_flos()
        self.log(logs, start_time)

    def _end_training(
        self,
        trial: Any,
        tr_loss: Tensor,
        first_step: int,
        start: float,
        num_samples: float,
        max_steps: int,
        tokens: int | None,
    ) -> TrainOutput:
        """Best weights, final metrics, what is left of the files, last events."""
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        done = self.state.global_step - first_step
        self._total_loss_scalar += float(tr_loss)
        loss = self._total_loss_scalar / max(done, 0.001)
        share = done / max_steps if max_steps else 0.0
        metrics = reporting.speed_metrics(
            "train", start, num_samples=num_samples * share, num_steps=done, num_tokens=tokens
        )
        self.store_flos()
        metrics["total_flos"] = self.state.total_flos
        metrics["train_loss"] = loss
        self.is_in_train = False
        self._memory_tracker.stop_and_update_metrics("train", metrics)
        self.log(metrics)
        if self.args.should_save and self.args.save_total_limit == 1 and self.state.best_model_checkpoint is not None:
            checkpoints.keep_only(
                self.state.best_model_checkpoint, self._sorted_checkpoints(self._get_output_dir(trial))
            )
        self._fire("on_train_end")
        self._finish_current_push()
        self._step = self._train_state = None
        return TrainOutput(self.state.global_step, loss, metrics)

    def _with_speed(self, output: EvalLoopOutput, prefix: str, start: float) -> dict[str, Any]:
        total = self.args.eval_batch_size * self.args.world_size
        num_steps = math.ceil((output.num_samples or 0) / total)
        metrics: dict[str, Any] = dict(output.metrics or {})
        start += evaluation.preparation_seconds(metrics, prefix)
        metrics.update(reporting.speed_metrics(prefix, start, num_samples=output.num_samples, num_steps=num_steps))
        return metrics

    def _run_evaluation(
        self,
        evaluate: Callable[..., EvalLoopOutput],
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None,
        ignore_keys: list[str] | None,
        metric_key_prefix: str,
    ) -> EvalLoopOutput:
        """``evaluate`` the model, in evaluation mode, over a loader."""
        before = time.time()
        fresh = self._prepare_for_evaluation_alone()
        model = self._prepare_evaluation(dataloader)
        times = {"model_preparation_time": round(time.time() - before, 4)} if fresh else {}
        return evaluate(
            self._evaluation_hooks(model, dataloader),
            dataloader,
            times=times,
            description=description,
            prediction_loss_only=(
                self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
            ),
            ignore_keys=ignore_keys,
            metric_key_prefix=metric_key_prefix,
        )

    def _prepare_for_evaluation_alone(self) -> bool:
        """Let the accelerator have the model, where no training did; whether that was needed."""
        if self.is_in_train or self.accelerator._models:
            return False
        self.model_wrapped = self.accelerator.prepare_model(self.model, evaluation_mode=True)
        return True

    def _prepare_evaluation(self, dataloader: Any) -> Any:
        model = self._wrap_model(self.model, training=False, dataloader=dataloader)
        if not self.is_in_train and (self.args.fp16_full_eval or self.args.bf16_full_eval):
            model = model.to(torch.float16 if self.args.fp16_full_eval else torch.bfloat16).to(self.args.device)
        model.eval()
        if hasattr(self.optimizer, "eval") and callable(self.optimizer.eval):
            self.optimizer.eval()
        self.callback_handler.eval_dataloader = dataloader
        return model

    def _evaluation_hooks(self, model: Any, dataloader: Any) -> evaluation.EvaluationHooks:
        args = self.args
        gather, folder = self.gather_function if args.world_size > 1 else None, Path(str(args.output_dir))
        return evaluation.EvaluationHooks(
            prediction_step=functools.partial(self.prediction_step, model),
            compute_metrics=self.compute_metrics,
            preprocess_logits_for_metrics=self.preprocess_logits_for_metrics,
            on_prediction_step=lambda: self._fire("on_prediction_step"),
            prepare_input=self._prepare_input,
            num_examples=self.num_examples,
            ranks=ranks_of(self.accelerator, dataloader, gather),
            batch_eval_metrics=args.batch_eval_metrics,
            include_for_metrics=args.include_for_metrics,
            main_input_name=getattr(self.model, "main_input_name", "input_ids"),
            eval_batch_size=args.eval_batch_size,
            concat=args.eval_do_concat_batches,
            loss_weight=self._loss_weight if args.world_size > 1 else evaluation.rows_as_weight,
            spill_bytes=_SPILL_BYTES,
            folder=folder if folder.is_dir() else None,
        )

    def _loss_weight(self, inputs: Any, rows: int) -> float:
        """What the loss of this process counts among those of all: the items that it is a mean over."""
        count = self._count_items([inputs])
        return float(rows) if count is None else float(count)

    def _note_best(self, folder: Path) -> None:
        """Name the checkpoint of the best step, if there is one, and take the callbacks' states."""
        name = self.args.metric_for_best_model
        if name is not None:
            steps = {checkpoints.step_of(path): path for path in checkpoints.numbered(folder.parent)}
            steps[self.state.global_step] = str(folder)
            values = best.evaluations_of(self.state.log_history, name)
            step = best.best_saved(values, steps, greater_is_better=self.args.greater_is_better)
            self.state.best_model_checkpoint = None if step is None else steps[step]
        self.state.collect_callbacks([*self.callback_handler.callbacks, self.control])

    # -- companions of the surface, which subclasses override too ------------------------------------------------------

    def call_model_init(self, trial: Any = None) -> Any:
        """A model of ``model_init``."""
        assert self.model_init is not None
        return build.call_model_init(self.model_init, trial)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        count = self._count_items(batch_samples)
        if count is None:
            return None
        count = count.to(device)
        if self.args.average_tokens_across_devices and self.accelerator.num_processes > 1:
            count = self.accelerator.gather(count.reshape(1)).sum()
        return count

    def _count_items(self, batches: list[Any]) -> Tensor | None:
        """Labels that count, on this process; None where no loss asks for their number."""
        if not batches or not (self.model_accepts_loss_kwargs or self.compute_loss_func is not None):
            return None
        return run_length.count_items(batches, shifted=label_smoothing.is_causal_lm(self.model))

    def _count_for_evaluation(self, batch: Any) -> Any:
        """The count that makes the loss of a batch a mean over the items of this process."""
        count = self._count_items([batch])
        if count is None:
            return None
        shared = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return count.to(self.args.device) * shared

    def _evaluate(self, trial: Any, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False) -> Any:
        metrics = self.evaluate(ignore_keys=ignore_keys_for_eval)
        self._report_to_hp_search(trial, self.state.global_step, metrics)
        if lr_schedules.is_plateau(self.lr_scheduler) and not skip_scheduler:
            self.lr_scheduler.step(best.plateau_metric(metrics, self.args.metric_for_best_model))
        return metrics

    def _determine_best_metric(self, metrics: Mapping[str, float], trial: Any) -> bool:
        """Whether an evaluation is the best so far, which is then remembered."""
        if self.args.metric_for_best_model is None:
            return False
        found = best.best_update(
            metrics,
            metric_for_best_model=self.args.metric_for_best_model,
            greater_is_better=self.args.greater_is_better,
            best_metric=self.state.best_metric,
        )
        if found.is_better:
            self.state.best_metric = found.value
            self.state.best_global_step = self.state.global_step
        return found.is_better

    def _get_learning_rate(self) -> float:
        """The rate of the first group of parameters."""
        return lr_schedules.current_rate(self.lr_scheduler, self.optimizer)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return samplers.train_sampler_for(self.args, dataset, self.processing_class)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return samplers.eval_sampler_for(self.args, eval_dataset, self.processing_class)

    def _is_normalised(self, num_items_in_batch: Any) -> bool:
        """Whether ``compute_loss`` divides by the items of the group itself."""
        if self.compute_loss_func is not None:
            return True
        return self.model_accepts_loss_kwargs and num_items_in_batch is not None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """The files of :meth:`save_model`, on one process."""
        folder = str(self.args.output_dir) if output_dir is None else output_dir
        checkpoints.write_model(
            folder,
            self.model,
            processing=self.processing_class or getattr(self.data_collator, "tokenizer", None),
            args=self.args,
            state_dict=state_dict,
        )

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        checkpoints.report_load(load_result, self.model)

    def _get_output_dir(self, trial: Any) -> str:
        """The folder of this run: ``output_dir``, or that of the trial in it."""
        return search.run_folder(str(self.args.output_dir), self.hp_search_backend, trial, self.hp_name)

    def _load_callback_state(self) -> None:
        if self.args.restore_callback_states_from_checkpoint:
            self.control = self.callback_handler.restore(self._stored_callbacks, self.control)

    def compare_trainer_and_checkpoint_args(
        self, training_args: TrainingArguments, trainer_state: TrainerState
    ) -> None:
        """One warning with the settings that the checkpoint was written with and that are others now."""
        checkpoints.warn_of_changes(training_args, trainer_state, self._train_batch_size)

    def save_state(self) -> None:
        """``trainer_state.json`` in ``output_dir``."""
        if self.is_world_process_zero():
            self.state.save_to_json(str(Path(str(self.args.output_dir)) / checkpoints.STATE))

    def save_metrics(self, split: str, metrics: dict[str, Any], combined: bool = True) -> None:
        """``<split>_results.json`` and, combined, ``all_results.json`` in ``output_dir``."""
        if self.is_world_process_zero():
            reporting.save_metrics(str(self.args.output_dir), split, metrics, combined=combined)

    def log_metrics(self, split: str, metrics: dict[str, Any]) -> None:
        """Print metrics as a table."""
        if self.is_world_process_zero():
            reporting.log_metrics(split, metrics)

    @staticmethod
    def metrics_format(metrics: dict[str, Any]) -> dict[str, Any]:
        """Metrics as they are printed."""
        return reporting.metrics_format(metrics)
