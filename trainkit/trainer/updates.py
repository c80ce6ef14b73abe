"""How the Trainer makes an update out of a group of microbatches: in one call, or microbatch by microbatch."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainkit import rng
from trainkit.trainer import build, devices, loop, loss_sum, lr_schedules, optimizers, ragged, run_length, steps
from trainkit.trainer.accumulate_predictions import nested_detach
from trainkit.trainer.arguments import TrainingArguments
from trainkit.trainer.callbacks import CallbackHandler
from trainkit.trainer.state import TrainerControl, TrainerState

_PER_MICROBATCH = ("training_step", "autocast_smart_context_manager", "_prepare_context_parallel_inputs")
"""Overrides of these see single microbatches, or another backward pass, so an update is not one call then."""
_AROUND_LOSS = ("compute_loss_context_manager", "autocast_smart_context_manager")
_IS_TRAINING = operator.attrgetter("training")
_INNER_EVENTS = ("on_substep_end", "on_pre_optimizer_step", "on_optimizer_step")


class Updates:
    """The parts of :class:`~trainkit.trainer.run.Run` that make updates."""

    args: TrainingArguments
    state: TrainerState
    control: TrainerControl
    accelerator: Any
    model: Any
    model_wrapped: Any
    optimizer: Any
    lr_scheduler: Any
    current_flos: float
    step_metrics: dict[str, Any]
    _step: Any
    _beside: list[nn.Parameter]
    _device: torch.device
    _own_rows: ragged.OwnRows | None
    _modules: list[nn.Module]
    _loss_takes_count: bool
    _step_takes_count: bool
    _share: float
    _last_rate: float | None
    _losses: Tensor
    _nan_losses: Tensor
    _globalstep_last_logged: int
    _total_loss_scalar: float
    _group: list[Any]
    _group_outputs: list[Any]
    callback_handler: CallbackHandler

    if TYPE_CHECKING:
        # Everything else that the Trainer keeps, and its methods, which subclasses replace.
        def __getattr__(self, name: str) -> Any: ...

    def _begin_steps(self, model: Any) -> None:
        """Choose between one call of a StepFn per update and a call of ``training_step`` per microbatch."""
        self._last_rate = None
        self._nan_losses = torch.zeros((), dtype=torch.int64, device=self.args.device)
        self._own_rows = None
        model.zero_grad()
        self._choose_steps(model)

    def _choose_steps(self, model: Any) -> None:
        self._end_steps()
        self._look_at_overrides()
        self._modules = list(self.model.modules())
        self._step = None
        self._share = 1.0
        self._beside = optimizers.parameters_beside(self.optimizer, self.model)
        if not self._works_on_microbatches(model):
            plain = not self._overridden(_AROUND_LOSS) and not self.callback_handler.wanted("outputs")
            self._step = steps.LiveRun(
                self.model,
                self._loss_in_graph if plain else self._loss_in_step,
                optimizers.raw(self.optimizer),
                max_grad_norm=self.args.max_grad_norm,
                compiled=self.args.torch_compile,
                seed=self.args.seed,
                step=self.state.global_step,
            )

    def _end_steps(self) -> None:
        if self._step is not None:
            self._step.close()
        self._step, self._modules = None, []

    def _works_on_microbatches(self, model: Any) -> bool:
        """Whether something wants to see single microbatches, gradients on the parameters, or another backward."""
        return bool(
            self._overridden(_PER_MICROBATCH)
            or model is not self.model
            or self.accelerator.num_processes > 1
            or self.accelerator.scaler is not None
            or self.is_deepspeed_enabled
            or self.is_fsdp_enabled
            or optimizers.needs_live_gradients(self.optimizer)
            or self._beside
            or devices.recomputes_by_reentry(self.model)
            or devices.wants_gradients_in_place(self.model)
            or any(self.callback_handler.listens(event) for event in _INNER_EVENTS)
            or self.args.include_num_input_tokens_seen != "no"
        )

    def _look_at_overrides(self) -> None:
        """Which of the methods that users replace know the number of items in a group; some are written without it."""
        self._loss_takes_count = build.takes(self.compute_loss, "num_items_in_batch")
        self._step_takes_count = build.takes(self.training_step, "num_items_in_batch", position=2)

    def _call_loss(self, model: Any, inputs: Any, **options: Any) -> Any:
        """``compute_loss``, with the number of items if it takes that."""
        if not self._loss_takes_count:
            options.pop("num_items_in_batch", None)
        return self.compute_loss(model, inputs, **options)

    def _loss_in_graph(self, inputs: Any, items: Any) -> Tensor:
        """``compute_loss`` with nothing around it that a graph could not hold."""
        loss: Tensor = self._call_loss(self.model, inputs, num_items_in_batch=items)
        return loss

    def _loss_in_step(self, inputs: Any, items: Any) -> Tensor:
        with self.compute_loss_context_manager():
            return self._loss_of(self.model, inputs, items)

    def _loss_of(self, model: Any, inputs: Any, items: Any) -> Tensor:
        """``compute_loss``; what the model returned is kept for callbacks that ask for it."""
        loss: Tensor
        if not self.callback_handler.wanted("outputs"):
            loss = self._call_loss(model, inputs, num_items_in_batch=items)
            return loss
        loss, outputs = self._call_loss(model, inputs, return_outputs=True, num_items_in_batch=items)
        self._group_outputs.append(nested_detach(outputs))
        return loss

    def _update(self, model: Any, tr_loss: Tensor, group: list[Any], items: Any) -> loop.UpdateResult:
        """One update from a group of microbatches."""
        if self._step is not None and not self._step.is_of_its_module():
            self._choose_steps(model)
        self.current_gradient_accumulation_steps = len(group)
        self._group, self._group_outputs = group, []
        for inputs in group:
            self.current_flos += float(self.floating_point_ops(inputs))
        if self._step is None:
            return self._update_by_microbatch(model, tr_loss, group, items)
        self._set_training_mode(model)
        batch = steps.inputs_of(group, self._prepare_inputs, items, self._is_normalised(items))
        self.step_metrics = metrics = self._step(batch)
        self._add_loss(tr_loss, metrics["loss"].compute())
        self._advance_schedule()
        norm: Any = metrics.get("grad_norm")
        return loop.UpdateResult(True, None if norm is None else norm.value)

    def _loop_hooks(
        self,
        model: Any,
        tr_loss: Tensor,
        start_epoch: Callable[[int, int], Iterable[Any]],
        report: Callable[[int, Any], None],
    ) -> loop.Hooks:
        device = self._device
        return loop.Hooks(
            event=self._fire,
            control=lambda: self.control,
            global_step=lambda: self.state.global_step,
            start_epoch=start_epoch,
            get_batch_samples=lambda iterator, n: self.get_batch_samples(iterator, n, device),
            update=functools.partial(self._update, model, tr_loss),
            finished_update=self._finished_update,
            report=report,
        )

    def _report_step(
        self, tr_loss: Tensor, model: Any, trial: Any, ignore_keys: Any, start: float, epoch: int, grad_norm: Any
    ) -> None:
        self._maybe_log_save_evaluate(
            tr_loss, grad_norm, model, trial, epoch, ignore_keys, start, learning_rate=self._last_rate
        )

    def _begin_losses(self, checkpoint: str | None) -> Tensor:
        """The sum of the losses that no log has told; of a run that goes on, with those before its checkpoint."""
        process, step = self.accelerator.process_index, self.state.global_step
        told = loss_sum.LossSum(0.0, step, loss_sum.nonfinite_in(self.state.log_history))
        if checkpoint is not None:
            told = loss_sum.read(checkpoint, process, self.accelerator.num_processes) or told
        self._losses = torch.tensor(told.loss, device=self.args.device)
        self._nan_losses += told.nonfinite
        self._globalstep_last_logged = told.logged_at
        # The mean of this call is over its own updates.
        self._total_loss_scalar = -told.loss
        return self._losses

    def _save_losses(self, folder: str) -> None:
        now = loss_sum.LossSum(float(self._losses), self._globalstep_last_logged, int(self._nan_losses))
        if now.logged_at < self.state.global_step:
            loss_sum.write(folder, now, self.accelerator.process_index, self.accelerator.num_processes)

    def _set_training_mode(self, model: nn.Module) -> None:
        # `train()` walks the modules and costs more than a small step.
        if not all(map(_IS_TRAINING, self._modules)):
            model.train()
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
            self.optimizer.train()

    def _add_loss(self, tr_loss: Tensor, loss: Tensor) -> None:
        # Of a loss on the host one look is cheaper than three kernels, and waits for nothing.
        if self.args.logging_nan_inf_filter and not (loss.is_cpu and math.isfinite(loss)):
            since = self.state.global_step - self._globalstep_last_logged
            loss, bad = steps.filtered(tr_loss, loss, since)
            self._nan_losses += bad
        tr_loss += loss

    def _update_by_microbatch(self, model: Any, tr_loss: Tensor, group: list[Any], items: Any) -> loop.UpdateResult:
        self.step_metrics = {}
        share = 1.0
        if self._own_rows is not None:
            share, self._own_rows.share = self._own_rows.share, 1.0
        for i, inputs in enumerate(group):
            last = i == len(group) - 1
            self._share = share if last else 1.0
            self._count_tokens(inputs)
            seed = steps.seed_of_microbatch(
                self.args.seed, self.state.global_step, i if len(group) > 1 else None, self.accelerator.process_index
            )
            with rng.seeded(seed, self.args.device), self._sync(model, last):
                counted = (items,) if self._step_takes_count else ()
                loss = self.training_step(model, inputs, *counted)
            self._add_loss(tr_loss, loss)
            if not last:
                self._fire("on_substep_end")
                if self.control.should_epoch_stop or self.control.should_training_stop:
                    self._forget_gradients(model)
                    return loop.UpdateResult(False)
        self.accelerator.gradient_state._set_sync_gradients(True)
        self._share_gradients_beside()
        norm = None
        if self.args.max_grad_norm is not None and self.args.max_grad_norm > 0:
            norm = self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
        self._fire("on_pre_optimizer_step")
        self.optimizer.step()
        self._fire("on_optimizer_step")
        self._advance_schedule()
        self._forget_gradients(model)
        return loop.UpdateResult(True, norm)

    def _forget_gradients(self, model: nn.Module) -> None:
        model.zero_grad()
        for parameter in self._beside:
            parameter.grad = None

    def _share_gradients_beside(self) -> None:
        # Those of the model are shared by its wrapper, during the backward pass.
        if self.accelerator.num_processes > 1:
            for parameter in self._beside:
                own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.accelerator.reduce(own, reduction="mean")

    def _in_group(self, loss: Tensor, items: Any) -> Tensor:
        """A loss as it counts in its group: among its microbatches, and where rows are missing among processes."""
        if self._is_normalised(items):
            return loss if self._share else loss * 0.0
        return loss / self.current_gradient_accumulation_steps * self._share

    def _sync(self, model: Any, last: bool) -> AbstractContextManager[Any]:
        if last or self.is_deepspeed_enabled:
            return nullcontext()
        context: AbstractContextManager[Any] = self.accelerator.no_sync(model)
        return context

    def _advance_schedule(self) -> None:
        self._last_rate = self._get_learning_rate()
        skipped = bool(getattr(self.optimizer, "step_was_skipped", False))
        if not skipped and not lr_schedules.is_plateau(self.lr_scheduler):
            self.lr_scheduler.step()

    def _finished_update(self, epoch: float) -> None:
        self.state.global_step += 1
        self.state.epoch = epoch
        self.control = self.callback_handler.on_step_end(
            self.args,
            self.state,
            self.control,
            step_metrics=self.step_metrics,
            batch=self._group,
            outputs=self._group_outputs,
        )

    def _count_tokens(self, inputs: Any) -> None:
        if self.args.include_num_input_tokens_seen == "no":
            return
        seen = run_length.tokens_in(inputs, self.model, self.processing_class, self.args.include_num_input_tokens_seen)
        if seen is not None:
            counted = self.accelerator.gather(torch.tensor([seen], device=self.args.device)).sum()
            self.state.num_input_tokens_seen += int(counted)

    def _fire(self, event: str) -> TrainerControl:
        self.control = getattr(self.callback_handler, event)(self.args, self.state, self.control)
        return self.control
