"""The fluent setters of ``TrainingArguments``: groups of fields set by one call, which returns the arguments."""

from __future__ import annotations

from typing import Any, TypeVar

from trainkit.trainer.enums import HubStrategy, IntervalStrategy, OptimizerNames, SaveStrategy, SchedulerType
from trainkit.trainer.tracker_names import tracker_list

Self = TypeVar("Self", bound="ArgumentSetters")
Strategy = TypeVar("Strategy", IntervalStrategy, SaveStrategy)


def _checked(kind: type[Strategy], strategy: str, steps: float) -> Strategy:
    found = kind(strategy)
    if found == "steps" and steps == 0:
        raise ValueError("steps: got 0 with strategy 'steps', expected a number above 0")
    return found


class ArgumentSetters:
    """The setters; each sets all the fields that it has parameters for, also those that keep their default.

    Source: transformers 4.57: the methods ``set_...`` of ``TrainingArguments``.
    """

    def _set(self: Self, **values: Any) -> Self:
        for name, value in values.items():
            setattr(self, name, value)
        return self

    def set_training(
        self: Self,
        learning_rate: float = 5e-5,
        batch_size: int = 8,
        weight_decay: float = 0,
        num_epochs: float = 3,
        max_steps: int = -1,
        gradient_accumulation_steps: int = 1,
        seed: int = 42,
        gradient_checkpointing: bool = False,
    ) -> Self:
        """Set what training needs, and ``do_train``."""
        return self._set(
            do_train=True,
            learning_rate=learning_rate,
            per_device_train_batch_size=batch_size,
            weight_decay=weight_decay,
            num_train_epochs=num_epochs,
            max_steps=max_steps,
            gradient_accumulation_steps=gradient_accumulation_steps,
            seed=seed,
            gradient_checkpointing=gradient_checkpointing,
        )

    def set_evaluate(
        self: Self,
        strategy: str | IntervalStrategy = "no",
        steps: int = 500,
        batch_size: int = 8,
        accumulation_steps: int | None = None,
        delay: float | None = None,
        loss_only: bool = False,
        jit_mode: bool = False,
    ) -> Self:
        """Set what evaluation needs, and ``do_eval`` by the strategy; no delay is a delay of 0.

        Raises: ValueError for an unknown strategy, or 0 steps with strategy "steps".
        """
        checked = _checked(IntervalStrategy, strategy, steps)
        return self._set(
            eval_strategy=checked,
            do_eval=checked != IntervalStrategy.NO,
            eval_steps=steps,
            per_device_eval_batch_size=batch_size,
            eval_accumulation_steps=accumulation_steps,
            eval_delay=0 if delay is None else delay,
            prediction_loss_only=loss_only,
            jit_mode_eval=jit_mode,
        )

    def set_testing(self: Self, batch_size: int = 8, loss_only: bool = False, jit_mode: bool = False) -> Self:
        """Set what prediction needs, and ``do_predict``."""
        return self._set(
            do_predict=True,
            per_device_eval_batch_size=batch_size,
            prediction_loss_only=loss_only,
            jit_mode_eval=jit_mode,
        )

    def set_save(
        self: Self,
        strategy: str | SaveStrategy = "steps",
        steps: int = 500,
        total_limit: int | None = None,
        on_each_node: bool = False,
    ) -> Self:
        """Set what is saved when.

        Raises: ValueError for an unknown strategy, or 0 steps with strategy "steps".
        """
        return self._set(
            save_strategy=_checked(SaveStrategy, strategy, steps),
            save_steps=steps,
            save_total_limit=total_limit,
            save_on_each_node=on_each_node,
        )

    def set_logging(
        self: Self,
        strategy: str | IntervalStrategy = "steps",
        steps: int = 500,
        report_to: str | list[str] = "none",
        level: str = "passive",
        first_step: bool = False,
        nan_inf_filter: bool = False,
        on_each_node: bool = False,
        replica_level: str = "passive",
    ) -> Self:
        """Set what is logged when and where to.

        Raises: ValueError for an unknown strategy or tracker, or 0 steps with strategy "steps".
        """
        return self._set(
            logging_strategy=_checked(IntervalStrategy, strategy, steps),
            logging_steps=steps,
            report_to=tracker_list(report_to),
            log_level=level,
            logging_first_step=first_step,
            logging_nan_inf_filter=nan_inf_filter,
            log_on_each_node=on_each_node,
            log_level_replica=replica_level,
        )

    def set_push_to_hub(
        self: Self,
        model_id: str,
        strategy: str | HubStrategy = "every_save",
        token: str | None = None,
        private_repo: bool | None = None,
        always_push: bool = False,
        revision: str | None = None,
    ) -> Self:
        """Set what is uploaded when, and ``push_to_hub``.

        Raises: ValueError for an unknown strategy.
        """
        return self._set(
            push_to_hub=True,
            hub_model_id=model_id,
            hub_strategy=HubStrategy(strategy),
            hub_token=token,
            hub_private_repo=private_repo,
            hub_always_push=always_push,
            hub_revision=revision,
        )

    def set_optimizer(
        self: Self,
        name: str | OptimizerNames = "adamw_torch",
        learning_rate: float = 5e-5,
        weight_decay: float = 0,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        args: str | None = None,
    ) -> Self:
        """Set the optimizer.

        Raises: ValueError for an unknown name.
        """
        return self._set(
            optim=OptimizerNames(name),
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            adam_beta1=beta1,
            adam_beta2=beta2,
            adam_epsilon=epsilon,
            optim_args=args,
        )

    def set_lr_scheduler(
        self: Self,
        name: str | SchedulerType = "linear",
        num_epochs: float = 3.0,
        max_steps: int = -1,
        warmup_ratio: float = 0,
        warmup_steps: int = 0,
    ) -> Self:
        """Set the schedule and the length of the run.

        Raises: ValueError for an unknown name.
        """
        return self._set(
            lr_scheduler_type=SchedulerType(name),
            num_train_epochs=num_epochs,
            max_steps=max_steps,
            warmup_ratio=warmup_ratio,
            warmup_steps=warmup_steps,
        )

    def set_dataloader(
        self: Self,
        train_batch_size: int = 8,
        eval_batch_size: int = 8,
        drop_last: bool = False,
        num_workers: int = 0,
        pin_memory: bool = True,
        persistent_workers: bool = False,
        prefetch_factor: int | None = None,
        auto_find_batch_size: bool = False,
        ignore_data_skip: bool = False,
        sampler_seed: int | None = None,
    ) -> Self:
        """Set how data is loaded."""
        return self._set(
            per_device_train_batch_size=train_batch_size,
            per_device_eval_batch_size=eval_batch_size,
            dataloader_drop_last=drop_last,
            dataloader_num_workers=num_workers,
            dataloader_pin_memory=pin_memory,
            dataloader_persistent_workers=persistent_workers,
            dataloader_prefetch_factor=prefetch_factor,
            auto_find_batch_size=auto_find_batch_size,
            ignore_data_skip=ignore_data_skip,
            data_seed=sampler_seed,
        )
