"""The events of a run and the base of those who listen to them."""

from __future__ import annotations

from functools import lru_cache
from types import FunctionType
from typing import Any

from trainkit.trainer.state import TrainerControl, TrainerState

EVENTS = (
    "on_init_end",
    "on_train_begin",
    "on_train_end",
    "on_epoch_begin",
    "on_epoch_end",
    "on_step_begin",
    "on_pre_optimizer_step",
    "on_optimizer_step",
    "on_substep_end",
    "on_step_end",
    "on_evaluate",
    "on_predict",
    "on_save",
    "on_log",
    "on_prediction_step",
)
"""The names of all events."""
ON_REQUEST = ("batch", "outputs")
"""What a callback gets with ``on_step_end`` only if its ``wants`` names it."""


class TrainerCallback:
    """Base of callbacks: override the events of interest.

    Each is called as ``(args, state, control, **kwargs)`` with the keywords ``model``, ``processing_class``,
    ``optimizer``, ``lr_scheduler``, ``train_dataloader`` and ``eval_dataloader``. It may change ``control``, and may
    return another control, which the callbacks after it and the loop then see. All processes call all callbacks, in
    their order.

    ``on_log`` gets ``logs`` too, the dict itself: what is changed in it is seen by the callbacks after it.
    ``on_evaluate`` and ``on_predict`` get ``metrics``. ``on_step_end`` gets ``step_metrics``, all metrics of the
    update, as tensors that may still be computed; and ``batch`` and ``outputs`` if the class says
    ``wants = ("batch", "outputs")``.

    Example:
        >>> class StopAt(TrainerCallback):
        ...     def on_step_end(self, args, state, control, **kwargs):
        ...         control.should_training_stop = state.global_step >= 3
        >>> control = TrainerControl()
        >>> StopAt().on_step_end(None, TrainerState(global_step=3), control)
        >>> control.should_training_stop
        True

    Source: Trainer 4.57: ``TrainerCallback``.
    """

    wants: tuple[str, ...] = ()
    """Which of ``batch`` and ``outputs`` this class asks for."""

    def on_init_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """At the end of the Trainer's constructor."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """After set-up and resume, before the first pass."""

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """After the best model was loaded and the last log written."""

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """Before the first batch of a pass is read."""

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """After a pass, also one that was left early."""

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """Before the first microbatch of an update; its data are there."""

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """After clipping, before the optimizer's step."""

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """After the optimizer's step, while the gradients are still there."""

    def on_substep_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """After a microbatch that is not the last of its update."""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """After an update, when ``global_step`` and ``epoch`` have moved."""

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """After one dataset was evaluated and logged, before the best metric is updated."""

    def on_predict(self, args: Any, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any) -> Any:
        """At the end of a prediction."""

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """After a checkpoint is complete and older ones are deleted."""

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """When something is logged."""

    def on_prediction_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """After each batch of an evaluation or prediction."""


@lru_cache(maxsize=1024)
def _does_nothing(function: FunctionType) -> bool:
    """Whether a function is one of those above, or of their counterparts in transformers."""
    home = (__name__, "transformers.trainer_callback")
    return function.__qualname__.startswith("TrainerCallback.") and function.__module__ in home


def heard(callback: Any, event: str) -> Any:
    """What a callback does at an event; None for nothing."""
    method = getattr(callback, event, None)
    function = getattr(method, "__func__", None)
    return None if type(function) is FunctionType and _does_nothing(function) else method
