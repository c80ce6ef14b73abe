"""The parts of a run that are no override points: set-up, updates, the end. ``Trainer`` builds on them."""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from trainkit.io.seeding import seeded
from trainkit.io.signals import EXIT_PREEMPTED
from trainkit.trainer import (
    best,
    build,
    checkpoints,
    dataloaders,
    devices,
    evaluation,
    label_smoothing,
    loop,
    prediction,
    preemption,
    ragged,
    reporting,
    run_length,
)
from trainkit.trainer.arguments import TrainingArguments
from trainkit.trainer.callbacks import CallbackHandler, DefaultFlowCallback
from trainkit.trainer.companions import Companions
from trainkit.trainer.deepspeed_options import finish_deepspeed
from trainkit.trainer.evaluation_ranks import ranks_of
from trainkit.trainer.foreign import is_processor, is_tokenizer
from trainkit.trainer.outputs import EvalLoopOutput, TrainOutput
from trainkit.trainer.progress import PrinterCallback, ProgressCallback
from trainkit.trainer.state import ExportableState, TrainerState

_SPILL_BYTES = 2**24
"""Predictions of an evaluation that are kept in memory; more of them go to a file in ``output_dir``."""


class Run(Companions):
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
        # Asked for once: accelerate's answer takes as long as a layer.
        self._device = self.args.device
        self.current_gradient_accumulation_steps = self.args.gradient_accumulation_steps
        self._train_batch_size = self.args.train_batch_size
        self._created_lr_scheduler = False
        self._eval_dataloaders: dict[Any, Any] = {}
        self._total_loss_scalar, self._globalstep_last_logged = 0.0, 0
        self._step = self._last_rate = self._own_rows = None
        self._share = 1.0
        self.step_metrics = {}
        self._look_at_overrides()

    def _take_model(self, model: nn.Module) -> None:
        """Make a model this trainer's."""
        self.model = self.model_wrapped = model

    def _know_model(self) -> None:
        """What is derived from the first model. Subclasses write over it, so later models do not change it."""
        model = self.model
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

    def _take_callbacks(self, given: list[Any]) -> None:
        """The flow first, then what is given, what reports progress last."""
        self.callback_handler = CallbackHandler(
            [DefaultFlowCallback, *given], self.model, self.processing_class, self.optimizer, self.lr_scheduler
        )
        self.add_callback(PrinterCallback if self.args.disable_tqdm else ProgressCallback)

    def _first_state(self) -> TrainerState:
        state = self._new_state()
        state.is_local_process_zero = self.is_local_process_zero()
        state.is_world_process_zero = self.is_world_process_zero()
        return state

    def _new_state(self) -> TrainerState:
        exportable = [c for c in (*self.callback_handler.callbacks, self.control) if isinstance(c, ExportableState)]
        return TrainerState(stateful_callbacks=exportable)

    def _is_elsewhere(self) -> bool:
        """Whether the model may not be on the device: it is new, or the constructor left its placing to evaluations."""
        if self.model_init is not None:
            return bool(self.place_model_on_device)
        args = self.args
        return (args.fp16_full_eval or args.bf16_full_eval) and not args.do_train and not self.is_model_parallel

    def _start_with_new_model(self, trial: Any) -> None:
        build.set_seed(self.args.seed, deterministic=self.args.full_determinism)
        self._take_model(self.call_model_init(trial))
        if trial is not None:
            self._take_searched_settings()
        self.optimizer = self.lr_scheduler = None
        self.callback_handler.model = self.model

    def _has_special_tokens(self) -> bool:
        known = is_tokenizer(self.processing_class) or is_processor(self.processing_class)
        return known and hasattr(self.model, "config")

    def _take_searched_settings(self) -> None:
        self.label_smoother = self._label_smoother()
        self.neftune_noise_alpha = self.args.neftune_noise_alpha

    def _tune_save_checkpoint(self, checkpoint_dir: str) -> None:
        """A checkpoint for a search that restarts trials, in a folder of its choice."""
        folder = str(Path(checkpoint_dir) / f"checkpoint-{self.state.global_step}")
        self.save_model(folder, _internal_call=True)
        if self.args.should_save:
            self._save_optimizer_and_scheduler(folder)
            self.state.save_to_json(str(Path(folder) / checkpoints.STATE))

    def _leave_training(self) -> None:
        """Also after an error: what stands for a run that is under way."""
        self.is_in_train = False
        self._memory_tracker.cur_stage = None
        self._end_steps()

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
        config: Any = self.args.accelerator_config
        if self.accelerator.num_processes > 1 and not config.even_batches:
            raise ValueError(
                "accelerator_config: with even_batches=False processes would have unequal numbers of batches and wait "
                "for each other; leave it True for training (repeated rows count once)"
            )
        if self._created_lr_scheduler:
            self.lr_scheduler, self._created_lr_scheduler = None, False
        self.create_optimizer_and_scheduler(num_training_steps=max_steps)
        if self.is_deepspeed_enabled:
            settings = devices.plugin_of(self.accelerator, "deepspeed_plugin").hf_ds_config.config
            finish_deepspeed(settings, self.args, self.model, max_steps)

    def _prepare_state(self, args: TrainingArguments, trial: Any, max_steps: int) -> None:
        if args.should_save:
            # Not by an override, which is called as often as transformers calls it; every save does it too.
            checkpoints.remove_interrupted(Path(Companions._get_output_dir(self, trial)))
        self.state = self._new_state()
        self.state.is_hyper_param_search = trial is not None
        self.state.train_batch_size = self._train_batch_size
        self.state.compute_steps(args, max_steps)
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
            devices.give_group_up_last(self.model_wrapped)
        if self.is_fsdp_enabled:
            self.model = self.model_wrapped
        handler = self.callback_handler
        handler.model, handler.optimizer, handler.lr_scheduler = self.model, self.optimizer, self.lr_scheduler
        handler.train_dataloader = loader
        return self.model_wrapped

    def _resume_state(
        self, args: TrainingArguments, folder: str | None, per_epoch: int, length: int | None, max_steps: int
    ) -> tuple[int, int]:
        """Take counters and log from a checkpoint, if there is one; where to go on: (epoch, microbatches to skip)."""
        if folder is None:
            return 0, 0
        stored = checkpoints.read_state(folder)
        self.compare_trainer_and_checkpoint_args(args, stored)
        stored.stateful_callbacks, exportable = self.state.stateful_callbacks, stored.stateful_callbacks
        self.state = stored
        self._stored_callbacks = exportable
        self._load_callback_state()
        self.state.compute_steps(args, max_steps)
        self.state.train_batch_size = self._train_batch_size
        step, group = self.state.global_step, args.gradient_accumulation_steps
        epoch, skip = run_length.resume_position(step, per_epoch, group)
        if length is None and self.state.epoch is not None and stored.max_steps > 0:
            epoch, skip = run_length.resume_position_in_stream(step, self.state.epoch, stored.max_steps, group)
        if length:
            checkpoints.warn_of_other_place(self.state, epoch + skip / length)
        return epoch, 0 if args.ignore_data_skip else skip

    def _start_epoch(self, loader: Any, checkpoint: str | None, first: int, epoch: int, skip: int) -> Iterable[Any]:
        """The microbatches of an epoch after those to skip."""
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        self._fire("on_epoch_begin")
        if epoch == first and checkpoint is not None:
            # Before anything is fetched, so that what the data draw in this process is the same too.
            self._load_rng_state(checkpoint)
        batches = dataloaders.after(loader, skip) if skip else loader
        if self.accelerator.num_processes == 1:
            return batches
        self._own_rows = ragged.OwnRows(loader, batches, self.accelerator.process_index, self.accelerator.num_processes)
        return self._own_rows

    def _run_epochs(self, plan: loop.Plan, hooks: loop.Hooks, model: Any, trial: Any) -> None:
        """The passes of a run; if the machine is taken away meanwhile, a checkpoint and the end of the process."""
        preemption.until_asked(
            functools.partial(loop.run_epochs, plan, hooks),
            step=hooks.global_step,
            end=functools.partial(self._end_preempted, model, trial),
            world=self.accelerator.num_processes,
            wait=self.accelerator.wait_for_everyone,
            device=self._device,
        )

    def _end_preempted(self, model: Any, trial: Any) -> NoReturn:
        if self.callback_handler.saved_step != self.state.global_step:
            self._save_checkpoint(model, trial)
            self._fire("on_save")
        self._fire("on_train_end")
        self._finish_current_push()
        if self.is_world_process_zero():
            preemption.tell(self.state.global_step, self._get_output_dir(trial))
        raise SystemExit(EXIT_PREEMPTED)

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
        found = self._sorted_checkpoints(use_mtime=False, output_dir=self._get_output_dir(trial))
        if self.args.should_save and self.args.save_total_limit == 1 and self.state.best_model_checkpoint is not None:
            checkpoints.keep_only(self.state.best_model_checkpoint, found)
        self._fire("on_train_end")
        self._finish_current_push()
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
        loss_only = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        # What data and metrics draw must not change the training that an evaluation interrupts.
        with seeded(self.args.seed):
            return evaluate(
                self._evaluation_hooks(model, dataloader),
                dataloader,
                times=times,
                description=description,
                prediction_loss_only=loss_only,
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
        self._look_at_overrides()
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
