"""Callbacks beside those of transformers: the same calls, flags and counts over the same sequences of events."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers import trainer_callback as theirs
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from trainkit.trainer.callbacks import (
    CallbackHandler,
    DefaultFlowCallback,
    EarlyStoppingCallback,
    EarlyStoppingError,
    TrainerCallback,
)
from trainkit.trainer.events import EVENTS
from trainkit.trainer.progress import PrinterCallback
from trainkit.trainer.state import TrainerControl, TrainerState

COMPANY = ("model", "processing_class", "optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader")
WITH = {
    "on_evaluate": {"metrics": {"eval_loss": 1.0}},
    "on_predict": {"metrics": {}},
    "on_log": {"logs": {"loss": 1.0}},
}


def flow_args(**changed: Any) -> SimpleNamespace:
    args = {
        "logging_first_step": False,
        "logging_strategy": IntervalStrategy.STEPS,
        "eval_strategy": IntervalStrategy.NO,
        "eval_delay": 0,
        "save_strategy": SaveStrategy.STEPS,
        "metric_for_best_model": "loss",
        "greater_is_better": False,
        "load_best_model_at_end": True,
    }
    return SimpleNamespace(**{**args, **changed})


def handler(*callbacks: Any) -> CallbackHandler:
    return CallbackHandler([DefaultFlowCallback, *callbacks], "m", "p", "o", "s")


def fire(target: Any, event: str, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
    return getattr(target, event)(args, state, control, **(kwargs or WITH.get(event, {})))


class Recorder(TrainerCallback):
    """Writes down every call."""

    def __init__(self) -> None:
        self.calls: list[Any] = []


def _recording(event: str) -> Callable[..., None]:
    def method(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.calls.append((event, args, vars(control).copy(), kwargs))

    return method


for _event in EVENTS:
    setattr(Recorder, _event, _recording(_event))


class TheirRecorder(theirs.TrainerCallback):
    def __init__(self) -> None:
        self.calls: list[Any] = []


for _event in EVENTS:
    setattr(TheirRecorder, _event, _recording(_event))


def test_the_events_are_those_of_transformers() -> None:
    found = {name for name in vars(theirs.TrainerCallback) if name.startswith("on_")}
    assert set(EVENTS) == found == {name for name in vars(TrainerCallback) if name.startswith("on_")}


@given(events=st.lists(st.sampled_from(EVENTS), max_size=12), flags=st.tuples(*[st.booleans()] * 5))
def test_calls_keywords_and_cleared_flags_are_those_of_transformers(events: list[str], flags: Any) -> None:
    ours, other = Recorder(), TheirRecorder()
    mine = CallbackHandler([DefaultFlowCallback, ours], "m", "p", "o", "s")
    reference = theirs.CallbackHandler([theirs.DefaultFlowCallback, other], "m", "p", "o", "s")
    controls = TrainerControl(*flags), transformers.TrainerControl(*flags)
    args = flow_args()
    for event in events:
        for target, control, state in zip(
            (mine, reference), controls, (TrainerState(epoch=1.0), transformers.TrainerState(epoch=1.0)), strict=True
        ):
            assert fire(target, event, args, state, control) is control
        assert vars(controls[0]) == vars(controls[1])
    assert ours.calls == other.calls
    assert all(call[3].keys() >= set(COMPANY) for call in ours.calls)


flow_steps = st.sampled_from([IntervalStrategy.NO, IntervalStrategy.STEPS, IntervalStrategy.EPOCH])


@given(
    logging=flow_steps,
    evaluating=flow_steps,
    saving=st.sampled_from(list(SaveStrategy)),
    first=st.booleans(),
    delay=st.sampled_from([0, 1, 2, 2.5, 4]),
    intervals=st.tuples(*[st.integers(1, 5)] * 3),
    max_steps=st.integers(0, 8),
    per_epoch=st.integers(1, 4),
)
def test_flags_over_a_run_are_those_of_transformers(
    logging: Any,
    evaluating: Any,
    saving: Any,
    first: bool,
    delay: float,
    intervals: Any,
    max_steps: int,
    per_epoch: int,
) -> None:
    args = flow_args(
        logging_strategy=logging,
        eval_strategy=evaluating,
        save_strategy=saving,
        logging_first_step=first,
        eval_delay=delay,
    )
    names = ("logging_steps", "eval_steps", "save_steps")
    states = [
        kind(max_steps=max_steps, **dict(zip(names, intervals, strict=True)))
        for kind in (TrainerState, transformers.TrainerState)
    ]
    controls = [TrainerControl(), transformers.TrainerControl()]
    handlers = [handler(), theirs.CallbackHandler([theirs.DefaultFlowCallback], None, None, None, None)]
    for step in range(1, 9):
        for target, state, control in zip(handlers, states, controls, strict=True):
            fire(target, "on_step_begin", args, state, control)
            state.global_step, state.epoch = step, step / per_epoch
            fire(target, "on_step_end", args, state, control)
        assert vars(controls[0]) == vars(controls[1])
        if step % per_epoch == 0:
            for target, state, control in zip(handlers, states, controls, strict=True):
                fire(target, "on_epoch_end", args, state, control)
            assert vars(controls[0]) == vars(controls[1])


def test_an_interval_of_zero_and_a_delay_of_none_are_no_error() -> None:
    args = flow_args(eval_strategy="steps", eval_delay=None)
    control, state = TrainerControl(), TrainerState(global_step=2, max_steps=9, logging_steps=0, eval_steps=2)
    handler().on_step_end(args, state, control)
    assert (control.should_log, control.should_evaluate) == (False, True)
    args = flow_args(eval_strategy="epoch", eval_delay=None)
    assert handler().on_epoch_end(args, TrainerState(epoch=1.0), TrainerControl()).should_evaluate


@given(
    metrics=st.lists(st.sampled_from([0.0, 1.0, 1.04, 1.05, 2.0, math.inf, math.nan]), min_size=1, max_size=8),
    patience=st.integers(0, 3),
    threshold=st.sampled_from([0.0, 0.05, 1.0]),
    greater=st.booleans(),
    prefixed=st.booleans(),
)
def test_early_stopping_counts_and_stops_as_in_transformers(
    metrics: list[float], patience: int, threshold: float, greater: bool, prefixed: bool
) -> None:
    name = "eval_f1" if prefixed else "f1"
    args = flow_args(metric_for_best_model=name, greater_is_better=greater, eval_strategy=IntervalStrategy.STEPS)
    pairs = [
        (EarlyStoppingCallback(patience, threshold), TrainerControl(), TrainerState()),
        (theirs.EarlyStoppingCallback(patience, threshold), transformers.TrainerControl(), transformers.TrainerState()),
    ]
    for step, metric in enumerate(metrics):
        for callback, control, state in pairs:
            state.global_step = step
            if step == 0:
                callback.on_train_begin(args, state, control)
            callback.on_evaluate(args, state, control, metrics={"eval_f1": metric, "eval_loss": 0.0})
            best = state.best_metric if state.best_metric is not None else (-math.inf if greater else math.inf)
            state.best_metric = metric if (metric > best if greater else metric < best) else best
        (ours, control, _), (reference, expected, _) = pairs
        assert ours.early_stopping_patience_counter == reference.early_stopping_patience_counter
        assert control.should_training_stop == expected.should_training_stop
        assert ours.state() == reference.state()


def test_the_example_of_the_specification_stops_at_the_fourth_evaluation() -> None:
    args, control, state = flow_args(eval_strategy="steps"), TrainerControl(), TrainerState()
    stopping = EarlyStoppingCallback(2)
    stopped = []
    for state.global_step, loss in enumerate([3.0, 2.0, 2.0, 2.5], 1):
        stopping.on_evaluate(args, state, control, metrics={"eval_loss": loss})
        state.best_metric = loss if state.best_metric is None or loss < state.best_metric else state.best_metric
        stopped.append(control.should_training_stop)
    assert stopped == [False, False, False, True]


def test_early_stopping_goes_on_from_its_state() -> None:
    args, control = flow_args(), TrainerControl()
    before = EarlyStoppingCallback(3, 0.5)
    for step in range(2):
        before.on_evaluate(args, TrainerState(global_step=step, best_metric=1.0), control, metrics={"eval_loss": 1.0})
    state = TrainerState()
    state.collect_callbacks([before, control])
    resumed = handler(TrainerCallback(), EarlyStoppingCallback(1), PrinterCallback())
    assert resumed.restore(state.stateful_callbacks, control) == TrainerControl()
    assert [type(c).__name__ for c in resumed.callbacks] == [
        "DefaultFlowCallback", "TrainerCallback", "EarlyStoppingCallback", "PrinterCallback",
    ]  # fmt: skip
    resumed.on_evaluate(args, TrainerState(global_step=3, best_metric=1.0), control, {"eval_loss": 1.0})
    assert control.should_training_stop
    assert resumed.callbacks[2].state()["args"] == before.state()["args"]


@pytest.mark.parametrize("order", list(itertools.permutations(["eval_a_loss", "eval_b_loss"])))
def test_of_several_datasets_the_one_with_the_metric_counts(order: tuple[str, ...]) -> None:
    args, control = flow_args(metric_for_best_model="eval_b_loss", eval_strategy="steps"), TrainerControl()
    target = handler(EarlyStoppingCallback(3))
    for step in range(3):
        state = TrainerState(global_step=step, best_metric=1.0, max_steps=9)
        for name in order:
            target.on_evaluate(args, state, control, {name: 1.0})
    target.on_train_end(args, state, control)
    assert control.should_training_stop


def test_a_metric_that_never_comes_is_one_warning() -> None:
    args, control = flow_args(eval_strategy="steps"), TrainerControl()
    target = handler(EarlyStoppingCallback(1))
    target.on_evaluate(args, TrainerState(global_step=0), control, {"eval_f1": 1.0})
    with pytest.warns(UserWarning, match="no evaluation at step 0 gave 'loss'"):
        target.on_evaluate(args, TrainerState(global_step=1), control, {"eval_f1": 1.0})
    # Warnings are errors here: once is enough.
    target.on_evaluate(args, TrainerState(global_step=2), control, {"eval_f1": 1.0})
    target.on_train_end(args, TrainerState(), control)
    assert not control.should_training_stop
    target.on_train_begin(args, TrainerState(), control)
    target.on_evaluate(args, TrainerState(global_step=7), control, {})
    with pytest.warns(UserWarning, match="no evaluation at step 7"):
        target.on_train_end(args, TrainerState(), control)


def test_early_stopping_refuses_what_cannot_work() -> None:
    callback = EarlyStoppingCallback()
    for bad in ({"metric_for_best_model": None}, {}):
        with pytest.raises(EarlyStoppingError, match="early stopping needs"):
            callback.on_train_begin(flow_args(**bad), TrainerState(), TrainerControl())
        # As with transformers, where it is an AssertionError.
        with pytest.raises(AssertionError):
            theirs.EarlyStoppingCallback().on_train_begin(flow_args(**bad), TrainerState(), TrainerControl())
    assert issubclass(EarlyStoppingError, AssertionError)
    with pytest.warns(UserWarning, match="load_best_model_at_end"):
        callback.on_train_begin(
            flow_args(eval_strategy="steps", load_best_model_at_end=False), TrainerState(), TrainerControl()
        )
    for bad_args in ((-1, 0.0), (1, -0.5), (1, math.nan)):
        with pytest.raises(ValueError, match="at least 0"):
            EarlyStoppingCallback(*bad_args)
    # Without a metric an evaluation outside of training counts nothing.
    callback.on_evaluate(flow_args(metric_for_best_model=None), TrainerState(), TrainerControl(), metrics={})
    assert callback.early_stopping_patience_counter == 0


class A(TrainerCallback):
    pass


class B(A):
    pass


@given(
    there=st.lists(st.sampled_from([A, B, TrainerCallback]), max_size=4, unique=True),
    wanted=st.sampled_from([A, B, TrainerCallback, Recorder]),
    how=st.sampled_from(["pop_callback", "remove_callback"]),
)
def test_removing_by_class_is_that_of_transformers(there: list[Any], wanted: Any, how: str) -> None:
    callbacks = [kind() for kind in there]
    mine = handler(*callbacks)
    reference = theirs.CallbackHandler([theirs.DefaultFlowCallback, *callbacks], None, None, None, None)
    # Both default flows are callbacks of the base that each has, so that class would remove them first.
    if wanted is TrainerCallback:
        assert getattr(mine, how)(wanted) is None or how == "pop_callback"
        assert not any(isinstance(c, DefaultFlowCallback) for c in mine.callbacks)
        return
    assert getattr(mine, how)(wanted) is getattr(reference, how)(wanted)
    assert mine.callbacks[1:] == reference.callbacks[1:]


def test_removing_an_instance() -> None:
    one, two = A(), B()
    target = handler(one, two)
    assert target.pop_callback(A()) is None
    with pytest.raises(ValueError, match=r"this A is not there; there are: \['DefaultFlowCallback', 'A', 'B'\]"):
        target.remove_callback(A())
    target.remove_callback(one)
    assert target.pop_callback(two) is two
    assert target.callback_list == "DefaultFlowCallback"
    assert target.remove_callback(A) is None


def test_a_class_of_transformers_removes_the_one_that_stands_for_it() -> None:
    target = handler(PrinterCallback())
    assert isinstance(target.pop_callback(transformers.PrinterCallback), PrinterCallback)
    assert target.pop_callback(transformers.ProgressCallback) is None


def test_warnings_for_a_second_one_and_for_no_flow() -> None:
    with pytest.warns(UserWarning, match=r"second A. There are: \['DefaultFlowCallback', 'A'\]"):
        handler(A, A)
    with pytest.warns(UserWarning, match=r"no DefaultFlowCallback.*\['A'\]"):
        CallbackHandler([A], None, None, None, None)
    CallbackHandler([theirs.DefaultFlowCallback], None, None, None, None)


def test_what_is_no_callback_is_refused() -> None:
    target = handler()
    for bad in ("text", 3, object):
        with pytest.raises(TypeError, match="has none of the events"):
            target.add_callback(bad)

    class Greedy(TrainerCallback):
        wants = ("batches",)

    with pytest.raises(ValueError, match=r"Greedy.wants: names \['batches'\]"):
        target.add_callback(Greedy)
    assert len(target.callbacks) == 1


def test_a_returned_control_is_what_the_next_ones_see() -> None:
    class Swap(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            return TrainerControl(should_save=True)

    class Wrong(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            return kwargs["logs"]

    seen, control = Recorder(), TrainerControl()
    target = handler(Swap(), seen, Wrong())
    args, state = flow_args(), TrainerState(max_steps=9, global_step=1)
    result = target.on_step_end(args, state, control)
    assert result is not control and result.should_save and not control.should_save
    assert seen.calls[-1][2]["should_save"]
    with pytest.raises(TypeError, match=r"Wrong.on_log: returned a dict, expected a TrainerControl or None"):
        target.on_log(args, state, control, {})


def test_a_callback_that_removes_itself_does_not_hide_the_next() -> None:
    class Once(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            target.remove_callback(self)

    seen = Recorder()
    target = handler(Once(), seen)
    for _ in range(2):
        target.on_step_begin(flow_args(), TrainerState(), TrainerControl())
    assert len(seen.calls) == 2 and len(target.callbacks) == 2


def test_logs_are_the_live_dict_and_the_printer_leaves_it_alone(capsys: Any) -> None:
    class Adds(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            logs["added"] = 1

    logs = {"loss": 0.123456, "total_flos": 5.0}
    seen = Recorder()
    handler(Adds(), PrinterCallback(), seen).on_log(flow_args(), TrainerState(), TrainerControl(), logs)
    assert capsys.readouterr().out == "{'loss': 0.1235, 'added': 1}\n"
    assert logs == {"loss": 0.123456, "total_flos": 5.0, "added": 1}
    assert seen.calls[0][3]["logs"] is logs
    PrinterCallback().on_log(flow_args(), TrainerState(is_local_process_zero=False), TrainerControl(), logs=logs)
    assert capsys.readouterr().out == ""


def test_who_listens_to_what() -> None:
    class Steps(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None: ...

    class TheirSteps(theirs.TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None: ...

    class Duck:
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None: ...

    def heard(*callbacks: Any) -> set[str]:
        target = handler(*callbacks)
        return {event for event in EVENTS if target.listens(event)}

    flow = {"on_step_end", "on_epoch_end"}
    assert heard() == heard(TrainerCallback(), theirs.TrainerCallback()) == flow
    assert heard(Steps()) == flow | {"on_substep_end"}
    assert heard(TheirSteps()) == flow | {"on_pre_optimizer_step"}
    assert heard(Duck()) == flow | {"on_save"}
    assert heard(PrinterCallback()) == flow | {"on_log"}
    patched = TrainerCallback()
    patched.on_optimizer_step = lambda *args, **kwargs: None
    assert heard(patched) == flow | {"on_optimizer_step"}
    handler(Duck()).on_step_begin(flow_args(), TrainerState(), TrainerControl())


def test_what_a_step_brings_goes_to_those_who_ask() -> None:
    got: dict[str, Any] = {}

    class Plain(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            got["plain"] = kwargs.keys() - set(COMPANY)

    class Named(TrainerCallback):
        """All keywords of transformers by name, and no others."""

        def on_step_end(
            self, args: Any, state: Any, control: Any, model: Any, processing_class: Any, optimizer: Any,
            lr_scheduler: Any, train_dataloader: Any, eval_dataloader: Any,
        ) -> None:  # fmt: skip
            got["named"] = model

    class Wants(TrainerCallback):
        wants = ("batch", "outputs")

        def on_step_end(self, args: Any, state: Any, control: Any, batch: Any, outputs: Any, **kwargs: Any) -> None:
            got["wants"] = (batch, outputs, kwargs["step_metrics"])

    target = handler(Plain(), Named())
    assert not target.wanted("batch")
    target.add_callback(Wants)
    assert target.wanted("batch") and target.wanted("outputs")
    state, control = TrainerState(max_steps=9), TrainerControl()
    target.on_step_end(flow_args(), state, control, step_metrics={"aux": 1.0}, batch="b", outputs="o")
    assert got == {"plain": {"step_metrics"}, "named": "m", "wants": ("b", "o", {"aux": 1.0})}
