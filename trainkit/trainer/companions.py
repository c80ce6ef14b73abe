"""Methods beside the 74 of the surface that subclasses override and scripts call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trainkit.trainer import (
    best,
    build,
    checkpoints,
    label_smoothing,
    lr_schedules,
    reporting,
    run_length,
    samplers,
    search,
)
from trainkit.trainer.arguments import TrainingArguments
from trainkit.trainer.state import TrainerState
from trainkit.trainer.updates import Updates


class Companions(Updates):
    """The companions of the surface; :class:`~trainkit.trainer.trainer.Trainer` has them through its bases."""

    loss_is_scaled_for_ga: bool | None = None
    """For subclasses whose ``compute_loss`` takes ``num_items_in_batch`` and divides by something else: False lets
    their losses be averaged over the microbatches of a group. As in transformers 5."""

    def call_model_init(self, trial: Any = None) -> Any:
        """A model of ``model_init``."""
        assert self.model_init is not None
        return build.call_model_init(self.model_init, trial)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        count = self._count_items(batch_samples)
        if count is None:
            return None
        if self._own_rows is not None and self._own_rows.share == 0:
            # The last batch has no row that is this process's to count.
            last = self._count_items(batch_samples[-1:])
            count = count if last is None else count - last
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
        if self.accelerator.num_processes == 1 or self._overridden(("_get_num_items_in_batch",)):
            return self._get_num_items_in_batch([batch], self.args.device)
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
        """Whether ``compute_loss`` divides by the items of the group itself.

        ``loss_is_scaled_for_ga`` says so. Where it is None, one that is not given their number does not.
        """
        if self.loss_is_scaled_for_ga is not None:
            return self.loss_is_scaled_for_ga
        if not self._loss_takes_count:
            return False
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
            reporting.save_state(str(self.args.output_dir), self.state)

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
