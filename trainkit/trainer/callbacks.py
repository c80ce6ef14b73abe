"""Callbacks: what a run tells its listeners, in which order, and the two that decide when it logs, saves and stops."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from trainkit.trainer.build import takes
from trainkit.trainer.events import EVENTS, ON_REQUEST, heard
from trainkit.trainer.events import TrainerCallback as TrainerCallback
from trainkit.trainer.foreign import is_instance
from trainkit.trainer.state import ExportableState, TrainerControl, TrainerState, restored_callbacks

_takes = lru_cache(maxsize=512)(takes)


class CallbackHandler(TrainerCallback):
    """The callbacks of a run, called one after the other.

    An event clears the flags that it answers before its callbacks run, so that one of them may raise them again.
    ``saved_step`` is the step of the last checkpoint of this run while it holds all that the run is, else None.

    Args:
        callbacks: objects, or classes to be made without arguments.
        model: the bare model; handed to callbacks, as the next three.
        processing_class: tokenizer or processor.
        optimizer: None until there is one.
        lr_scheduler: None until there is one.

    Raises: TypeError for something that is no callback; ValueError for a callback that wants what there is not.

    Example:
        >>> handler = CallbackHandler([DefaultFlowCallback], None, None, None, None)
        >>> handler.listens("on_step_end"), handler.listens("on_log")
        (True, False)

    Source: Trainer 4.57: ``CallbackHandler``.
    """

    def __init__(
        self, callbacks: Iterable[Any], model: Any, processing_class: Any, optimizer: Any, lr_scheduler: Any
    ) -> None:
        self.callbacks: list[Any] = []
        for callback in callbacks:
            self.add_callback(callback)
        self.model = model
        self.processing_class = processing_class
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.train_dataloader: Any = None
        self.eval_dataloader: Any = None
        self.saved_step: int | None = None
        if not any(_is_default_flow(callback) for callback in self.callbacks):
            warnings.warn(
                "callbacks: there is no DefaultFlowCallback, so nothing is logged, evaluated, saved or stopped by the "
                f"arguments; add it unless a callback of yours does that. There are: {self._names()}",
                UserWarning,
                stacklevel=2,
            )

    def add_callback(self, callback: Any) -> None:
        """Append a callback, or one made from a class; a second one of a class with a warning.

        Raises: TypeError for something that is no callback; ValueError for one that wants what there is not.
        """
        added = callback() if isinstance(callback, type) else callback
        if not any(hasattr(added, event) for event in EVENTS):
            raise TypeError(f"callback: {type(added).__name__} has none of the events, expected a TrainerCallback")
        unknown = set(getattr(added, "wants", ())) - {*ON_REQUEST, "step_metrics"}
        if unknown:
            raise ValueError(f"{type(added).__name__}.wants: names {sorted(unknown)}, expected some of {ON_REQUEST}")
        if any(type(known) is type(added) for known in self.callbacks):
            warnings.warn(
                f"callback: this is a second {type(added).__name__}. There are: {self._names()}",
                UserWarning,
                stacklevel=3,
            )
        self.callbacks.append(added)

    def pop_callback(self, callback: Any) -> Any:
        """Remove a callback, or the first of a class, and return it; None if it is not there."""
        place = self._place(callback)
        return None if place is None else self.callbacks.pop(place)

    def remove_callback(self, callback: Any) -> None:
        """Remove a callback, or the first of a class if there is one.

        Raises: ValueError for a callback that is not there.
        """
        if self.pop_callback(callback) is None and not isinstance(callback, type):
            raise ValueError(f"callback: this {type(callback).__name__} is not there; there are: {self._names()}")

    @property
    def callback_list(self) -> str:
        """The class names of the callbacks, a line each."""
        return "\n".join(type(callback).__name__ for callback in self.callbacks)

    def listens(self, event: str) -> bool:
        """Whether any callback overrides an event; if none does, the event need not be fired."""
        return any(heard(callback, event) is not None for callback in self.callbacks)

    def wanted(self, name: str) -> bool:
        """Whether any callback asks for ``batch`` or ``outputs``."""
        return any(name in getattr(callback, "wants", ()) for callback in self.callbacks)

    def on_init_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        return self.call_event("on_init_end", args, state, control, **kwargs)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        control.should_training_stop = False
        self.saved_step = None
        return self.call_event("on_train_begin", args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        return self.call_event("on_train_end", args, state, control, **kwargs)

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        control.should_epoch_stop = False
        return self.call_event("on_epoch_begin", args, state, control, **kwargs)

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        # What the end of a pass changes is not in a checkpoint of its last step.
        self.saved_step = None
        return self.call_event("on_epoch_end", args, state, control, **kwargs)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        control.should_log = False
        control.should_evaluate = False
        control.should_save = False
        return self.call_event("on_step_begin", args, state, control, **kwargs)

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        return self.call_event("on_pre_optimizer_step", args, state, control, **kwargs)

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        return self.call_event("on_optimizer_step", args, state, control, **kwargs)

    def on_substep_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        return self.call_event("on_substep_end", args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        return self.call_event("on_step_end", args, state, control, **kwargs)

    def on_evaluate(  # type: ignore[override]
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any
    ) -> Any:
        control.should_evaluate = False
        return self.call_event("on_evaluate", args, state, control, metrics=metrics, **kwargs)

    def on_predict(self, args: Any, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any) -> Any:
        return self.call_event("on_predict", args, state, control, metrics=metrics, **kwargs)

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        control.should_save = False
        self.saved_step = state.global_step
        return self.call_event("on_save", args, state, control, **kwargs)

    def on_log(  # type: ignore[override]
        self, args: Any, state: TrainerState, control: TrainerControl, logs: Any, **kwargs: Any
    ) -> Any:
        control.should_log = False
        return self.call_event("on_log", args, state, control, logs=logs, **kwargs)

    def on_prediction_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        return self.call_event("on_prediction_step", args, state, control, **kwargs)

    def call_event(self, event: str, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """Call the method of an event on every callback, in order.

        Args:
            event: its name.
            args: the arguments of the run.
            state: of the run.
            control: its flags.
            **kwargs: what the event brings besides the model and its company.

        Returns: the control that the last callback left.

        Raises: TypeError for a callback that returns something else than a control.
        """
        # A copy: a callback may remove itself, and the one after it is still called.
        for callback in tuple(self.callbacks):
            method = heard(callback, event)
            if method is None:
                continue
            result = method(
                args,
                state,
                control,
                model=self.model,
                processing_class=self.processing_class,
                optimizer=self.optimizer,
                lr_scheduler=self.lr_scheduler,
                train_dataloader=self.train_dataloader,
                eval_dataloader=self.eval_dataloader,
                **(_for(callback, method, kwargs) if event == "on_step_end" and kwargs else kwargs),
            )
            if result is None or result is control:
                continue
            if not hasattr(result, "should_training_stop"):
                raise TypeError(
                    f"{type(callback).__name__}.{event}: returned a {type(result).__name__}, expected a TrainerControl "
                    "or None"
                )
            control = result
        return control

    def restore(self, stored: Mapping[str, Any], control: TrainerControl) -> Any:
        """Make exportable callbacks again from the states of a checkpoint, each at its place.

        See :func:`~trainkit.trainer.state.restored_callbacks`.

        Args:
            stored: ``stateful_callbacks`` of the checkpoint's state.
            control: the flags, restored likewise.

        Returns: the control.

        Raises: ValueError for a stored state that has another form; nothing is changed then.
        """
        *self.callbacks, control = restored_callbacks([*self.callbacks, control], stored)
        return control

    def _place(self, callback: Any) -> int | None:
        matches = _is_of if isinstance(callback, type) else _same
        return next((i for i, known in enumerate(self.callbacks) if matches(known, callback)), None)

    def _names(self) -> list[str]:
        return [type(callback).__name__ for callback in self.callbacks]


def _same(known: Any, callback: Any) -> bool:
    return bool(known == callback)


def _is_of(known: Any, kind: type) -> bool:
    """Of a class, or of the one here that has the name of a built-in one of transformers."""
    if isinstance(known, kind):
        return True
    return kind.__module__.startswith("transformers.") and any(
        base.__name__ == kind.__name__ and base.__module__.startswith("trainkit.") for base in type(known).__mro__
    )


def _is_default_flow(callback: Any) -> bool:
    return isinstance(callback, DefaultFlowCallback) or is_instance(
        callback, "transformers.trainer_callback", "DefaultFlowCallback"
    )


def _for(callback: Any, method: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a callback gets of what a step brings: on request, or (``step_metrics``) if it takes that keyword."""
    wanted = getattr(callback, "wants", ())
    function = getattr(method, "__func__", method)
    return {
        name: value
        for name, value in kwargs.items()
        if name in wanted or (name not in ON_REQUEST and _takes(function, name))
    }


class DefaultFlowCallback(TrainerCallback):
    """Raises the flags that the arguments ask for, after a step s and at the end of a pass.

    After a step: log if s = 1 and ``logging_first_step``, or s is a multiple of the interval; evaluate if it is a
    multiple and at least ``eval_delay``; save if it is a multiple; at ``max_steps`` stop, and save if saves go by
    steps. At the end of a pass: whatever goes by epochs, evaluation from ``eval_delay`` passes on. Intervals are those
    of the state.

    Source: Trainer 4.57: ``DefaultFlowCallback``.
    """

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        step = state.global_step
        if (step == 1 and args.logging_first_step) or _due(args.logging_strategy, step, state.logging_steps):
            control.should_log = True
        if _due(args.eval_strategy, step, state.eval_steps) and (args.eval_delay or 0) <= step:
            control.should_evaluate = True
        if _due(args.save_strategy, step, state.save_steps):
            control.should_save = True
        if step >= state.max_steps:
            control.should_training_stop = True
            if args.save_strategy == "steps":
                control.should_save = True
        return control

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        if args.logging_strategy == "epoch":
            control.should_log = True
        if args.eval_strategy == "epoch" and (args.eval_delay or 0) <= (state.epoch or 0):
            control.should_evaluate = True
        if args.save_strategy == "epoch":
            control.should_save = True
        return control


def _due(strategy: Any, step: int, every: float) -> bool:
    return strategy == "steps" and every > 0 and step % every == 0


class EarlyStoppingError(ValueError, AssertionError):
    """Early stopping without a metric or without evaluations. Trainer 4.57 raises AssertionError."""


class EarlyStoppingCallback(TrainerCallback, ExportableState):
    """Stops when a metric has not improved for so many evaluations.

    A value is better if it is greater (or less, as ``greater_is_better`` says) than the best of the evaluations before,
    by more than the threshold. Then the count starts again, else it grows; at the patience training stops.

    Several datasets give an event each. Those without the metric are passed over; one warning tells if none had it.

    Args:
        early_stopping_patience: evaluations without improvement.
        early_stopping_threshold: least improvement, in the unit of the metric.

    Raises: ValueError for a negative argument; EarlyStoppingError when training begins without
        ``metric_for_best_model`` or without evaluations.

    Example:
        >>> from types import SimpleNamespace
        >>> args = SimpleNamespace(metric_for_best_model="loss", greater_is_better=False)
        >>> stopping, control = EarlyStoppingCallback(2), TrainerControl()
        >>> for step, loss in enumerate([2.0, 2.5, 2.1]):
        ...     state = TrainerState(global_step=step, best_metric=2.0 if step else None)
        ...     stopping.on_evaluate(args, state, control, metrics={"eval_loss": loss})
        >>> stopping.early_stopping_patience_counter, control.should_training_stop
        (2, True)

    Source: Trainer 4.57: ``EarlyStoppingCallback``.
    """

    def __init__(self, early_stopping_patience: int = 1, early_stopping_threshold: float | None = 0.0) -> None:
        for name, value in (("patience", early_stopping_patience), ("threshold", early_stopping_threshold or 0)):
            if not value >= 0:
                raise ValueError(f"early_stopping_{name}: got {value}, expected at least 0")
        self.early_stopping_patience = early_stopping_patience
        self.early_stopping_threshold = early_stopping_threshold
        self.early_stopping_patience_counter = 0
        self._found_at: int | None = None
        self._missed_at: int | None = None
        self._warned = False

    def check_metric_value(self, args: Any, state: TrainerState, control: TrainerControl, metric_value: Any) -> None:
        """Start the count again, or raise it."""
        best = state.best_metric
        if best is None:
            self.early_stopping_patience_counter = 0
            return
        better = metric_value > best if args.greater_is_better else metric_value < best
        if better and abs(metric_value - best) > (self.early_stopping_threshold or 0):
            self.early_stopping_patience_counter = 0
        else:
            self.early_stopping_patience_counter += 1

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.metric_for_best_model is None:
            raise EarlyStoppingError("metric_for_best_model: early stopping needs the name of a metric, got None")
        if args.eval_strategy == "no":
            raise EarlyStoppingError("eval_strategy: early stopping needs 'steps' or 'epoch', got 'no'")
        if not args.load_best_model_at_end:
            warnings.warn(
                "load_best_model_at_end: it is False, so after early stopping the model is the last, not the best",
                UserWarning,
                stacklevel=2,
            )
        self._found_at = self._missed_at = None
        self._warned = False

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        name = args.metric_for_best_model
        if name is None:
            return
        name = name if name.startswith("eval_") else f"eval_{name}"
        value = (metrics or {}).get(name)
        if self._missed_at != state.global_step:
            self._warn_if_missed(args)
        if value is None:
            if self._found_at != state.global_step:
                self._missed_at = state.global_step
            return
        self._found_at, self._missed_at = state.global_step, None
        self.check_metric_value(args, state, control, value)
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._warn_if_missed(args)

    def _warn_if_missed(self, args: Any) -> None:
        """Several datasets have an event each, so only a later step tells that none had the metric."""
        if self._missed_at is not None and not self._warned:
            self._warned = True
            warnings.warn(
                f"metric_for_best_model: no evaluation at step {self._missed_at} gave {args.metric_for_best_model!r}, "
                "so early stopping did not count it; expected one of the names that evaluate() returns",
                UserWarning,
                stacklevel=3,
            )
        self._missed_at = None

    def state(self) -> dict[str, Any]:
        """Patience, threshold and the count."""
        return {
            "args": {
                "early_stopping_patience": self.early_stopping_patience,
                "early_stopping_threshold": self.early_stopping_threshold,
            },
            "attributes": {"early_stopping_patience_counter": self.early_stopping_patience_counter},
        }
