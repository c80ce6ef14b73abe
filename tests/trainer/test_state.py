"""TrainerState and TrainerControl beside those of transformers, their files, and what a file may not do."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers.trainer_callback import ExportableState as TheirExportableState

from trainkit.trainer.outputs import BestRun, EvalLoopOutput, EvalPrediction, PredictionOutput, TrainOutput
from trainkit.trainer.state import (
    MAX_BYTES,
    MAX_DEPTH,
    ExportableState,
    TrainerControl,
    TrainerState,
    callback_states,
    restored_callbacks,
    write_whole,
)


class Counting(ExportableState):
    def __init__(self, limit: int = 1) -> None:
        self.limit, self.count = limit, 0

    def state(self) -> dict[str, Any]:
        return {"args": {"limit": self.limit}, "attributes": {"count": self.count}}


class Other(Counting):
    pass


def counting(limit: int, count: int, kind: type[Counting] = Counting) -> Counting:
    made = kind(limit)
    made.count = count
    return made


values = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8), st.lists(st.integers())
)
rows = st.lists(st.dictionaries(st.text(max_size=8), values, max_size=4), max_size=4)
states = st.fixed_dictionaries(
    {},
    optional={
        "epoch": st.floats(allow_nan=False),
        "global_step": st.integers(0, 2**62),
        "max_steps": st.integers(0, 2**62),
        "eval_steps": st.integers(1, 10**6),
        "total_flos": st.floats(allow_nan=False),
        "log_history": rows,
        "best_metric": st.floats(),
        "best_model_checkpoint": st.text(max_size=8),
        "is_world_process_zero": st.booleans(),
        "trial_params": st.dictionaries(st.text(max_size=4), st.floats(allow_nan=False), max_size=3),
        "stateful_callbacks": st.dictionaries(
            st.text(max_size=4),
            st.fixed_dictionaries({"args": st.just({}), "attributes": st.just({"a": 1})}),
            max_size=3,
        ),
    },
)


@given(fields=states)
def test_the_file_is_that_of_transformers_byte_for_byte(tmp_path_factory: Any, fields: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("state")
    transformers.TrainerState(**fields).save_to_json(str(folder / "theirs.json"))
    TrainerState(**fields).save_to_json(folder / "ours.json")
    assert (folder / "ours.json").read_bytes() == (folder / "theirs.json").read_bytes()


@given(fields=states)
def test_each_reads_the_other(tmp_path_factory: Any, fields: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("state")
    transformers.TrainerState(**fields).save_to_json(str(folder / "theirs.json"))
    TrainerState(**fields).save_to_json(folder / "ours.json")
    ours = TrainerState.load_from_json(str(folder / "theirs.json"))
    theirs = transformers.TrainerState.load_from_json(str(folder / "ours.json"))
    # NaN differs from itself, but not as text.
    assert repr(vars(ours)) == repr(vars(theirs))
    assert ours.to_json() == TrainerState(**fields).to_json()


def test_fields_and_defaults_are_those_of_transformers() -> None:
    assert vars(TrainerState()) == vars(transformers.TrainerState())
    assert TrainerState.__init__.__code__.co_varnames == transformers.TrainerState.__init__.__code__.co_varnames
    assert vars(TrainerControl()) == vars(transformers.TrainerControl())
    assert TrainerControl(should_save=True).state() == transformers.TrainerControl(should_save=True).state()


def test_nan_and_infinity_come_back(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    TrainerState(log_history=[{"a": math.nan, "b": math.inf, "c": -math.inf}]).save_to_json(path)
    (row,) = TrainerState.load_from_json(path).log_history
    assert math.isnan(row["a"]) and (row["b"], row["c"]) == (math.inf, -math.inf)
    assert '"a": NaN' in path.read_text()


def test_numbers_of_numpy_and_torch_do_not_make_a_save_fail(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    logs = {"a": np.float32(0.5), "b": torch.tensor(2), "c": np.arange(2), "d": np.int64(3)}
    TrainerState(log_history=[logs], best_metric=torch.tensor(0.25)).save_to_json(path)
    found = TrainerState.load_from_json(path)
    assert (found.log_history, found.best_metric) == ([{"a": 0.5, "b": 2, "c": [0, 1], "d": 3}], 0.25)


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    TrainerState(global_step=1).save_to_json(path)
    with pytest.raises(TypeError, match="holds a object"):
        TrainerState(log_history=[{"a": object()}]).save_to_json(path)
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "\ud800")
    assert TrainerState.load_from_json(path).global_step == 1
    assert os.listdir(tmp_path) == ["state.json"]


@pytest.mark.parametrize("extra", [{"global_stepp": 1}, {"b": 1, "a": 2}])
def test_unknown_names_are_a_type_error_that_names_them(tmp_path: Path, extra: dict[str, Any]) -> None:
    path = tmp_path / "state.json"
    path.write_text(json.dumps({"global_step": 1, **extra}))
    with pytest.raises(TypeError, match=str(sorted(extra)).replace("[", r"\[")):
        TrainerState.load_from_json(path)
    with pytest.raises(TypeError):
        transformers.TrainerState.load_from_json(str(path))


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "no valid JSON"),
        ('{"global_step": 1', "no valid JSON"),
        ("[1]", "expected an object"),
        ("null", "expected an object"),
        ('{"global_step": "3"}', "global_step"),
        ('{"global_step": -1}', "global_step"),
        ('{"epoch": []}', "epoch"),
        ('{"log_history": [1]}', "log_history"),
        ('{"stateful_callbacks": [1]}', "stateful_callbacks"),
        ("[" * 100_000, "nested deeper"),
        ('{"log_history": ' + "[" * MAX_DEPTH + "]" * MAX_DEPTH + "}", "nested deeper"),
        ('{"global_step": ' + "9" * 5000 + "}", "no valid JSON"),
    ],
)
def test_other_contents_are_a_value_error_with_file_and_cause(tmp_path: Path, text: str, cause: str) -> None:
    path = tmp_path / "state.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"state.json.*{cause}"):
        TrainerState.load_from_json(path)


def test_depth_and_size_up_to_the_limit_are_read(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    nested: Any = 1
    for _ in range(MAX_DEPTH - 3):
        nested = [nested]
    TrainerState(log_history=[{"a": nested}]).save_to_json(path)
    assert TrainerState.load_from_json(path).log_history == [{"a": nested}]
    TrainerState(log_history=[{"a": [nested]}]).save_to_json(path)
    with pytest.raises(ValueError, match="nested deeper"):
        TrainerState.load_from_json(path)
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(ValueError, match="more than 67108864 bytes"):
        TrainerState.load_from_json(path)


@given(
    steps=st.tuples(*[st.one_of(st.none(), st.integers(1, 1000), st.floats(0.001, 0.999))] * 3),
    max_steps=st.integers(0, 10**6),
)
def test_intervals_are_those_of_transformers(steps: tuple[Any, Any, Any], max_steps: int) -> None:
    args = SimpleNamespace(**dict(zip(("logging_steps", "eval_steps", "save_steps"), steps, strict=True)))
    ours, theirs = TrainerState(), transformers.TrainerState()
    ours.compute_steps(args, max_steps)
    theirs.compute_steps(args, max_steps)
    assert vars(ours) == vars(theirs)


@pytest.mark.parametrize("trial", [None, {"lr": 0.1}, SimpleNamespace(params={"lr": 0.2})])
@pytest.mark.parametrize("named", [True, False])
def test_references_of_a_run_and_its_trial(trial: Any, named: bool) -> None:
    trainer = SimpleNamespace(
        hp_name=(lambda t: f"name of {t}") if named else None,
        _trial=trial,
        is_local_process_zero=lambda: True,
        is_world_process_zero=lambda: False,
    )
    state = TrainerState()
    state.init_training_references(trainer, 7, 3, trial)
    assert (state.max_steps, state.num_train_epochs) == (7, 3)
    assert (state.is_local_process_zero, state.is_world_process_zero) == (True, False)
    assert state.trial_name == (f"name of {trial}" if named and trial is not None else None)
    assert state.trial_params == (trial if trial is None or isinstance(trial, dict) else trial.params)
    with pytest.raises(TypeError, match="trial: is a int"):
        state.init_training_references(trainer, 7, 3, 5)


def test_callback_states_are_those_of_transformers() -> None:
    class Theirs(TheirExportableState):
        def __init__(self, limit: int) -> None:
            self.limit = limit

        def state(self) -> dict[str, Any]:
            return {"args": {"limit": self.limit}, "attributes": {}}

    mixed = [Theirs(1), Theirs(2), Theirs(3)]
    assert TrainerState(stateful_callbacks=mixed).stateful_callbacks == (
        transformers.TrainerState(stateful_callbacks=mixed).stateful_callbacks
    )
    assert callback_states([Counting(4), Theirs(1), Other()]).keys() == {"Counting", "Theirs", "Other"}
    with pytest.raises(TypeError, match="int has no state"):
        TrainerState(stateful_callbacks=[1])


def test_collecting_again_replaces_and_adds(tmp_path: Path) -> None:
    first, second = counting(1, 0), counting(2, 0)
    state = TrainerState(stateful_callbacks={"Gone": {"args": {}, "attributes": {}}})
    control = TrainerControl(should_save=True, should_training_stop=True)
    for count in range(5):
        first.count = second.count = count
        state.collect_callbacks([first, "no callback", second, Other(9), control])
    found = state.stateful_callbacks
    # transformers appends two more at each save, and has no entry for a class that the checkpoint did not know.
    assert [s["attributes"]["count"] for s in found["Counting"]] == [4, 4]
    assert found["Other"]["args"] == {"limit": 9}
    assert "Gone" in found
    assert found["TrainerControl"] == TrainerControl().state()
    assert control.should_save and control.should_training_stop
    state.save_to_json(tmp_path / "s.json")
    assert TrainerState.load_from_json(tmp_path / "s.json").stateful_callbacks == found


@given(counts=st.lists(st.integers(0, 9), max_size=4), now=st.integers(0, 4), others=st.booleans())
def test_states_come_back_in_place(counts: list[int], now: int, others: bool) -> None:
    state = TrainerState()
    control = TrainerControl()
    state.collect_callbacks([*(counting(i, count) for i, count in enumerate(counts)), control])
    mine: list[Any] = [Counting(100 + i) for i in range(now)]
    if others:
        mine.insert(now // 2, "keeps its place")
    if counts and not now:
        with pytest.warns(UserWarning, match=r"lacks: \['Counting'\]"):
            again = restored_callbacks([*mine, control], state.stateful_callbacks)
    else:
        again = restored_callbacks([*mine, control], state.stateful_callbacks)
    assert [isinstance(x, Counting) for x in again] == [isinstance(x, Counting) for x in [*mine, control]]
    found = [(x.limit, x.count) for x in again if isinstance(x, Counting)]
    expected = list(enumerate(counts))[:now] + [(100 + i, 0) for i in range(len(counts), now)]
    assert found == expected


def test_a_stored_stop_flag_is_not_restored_but_one_that_was_stored_otherwise_is() -> None:
    stored = {"TrainerControl": TrainerControl(should_epoch_stop=True).state()}
    assert restored_callbacks([TrainerControl()], stored) == [TrainerControl(should_epoch_stop=True)]


@pytest.mark.parametrize(
    "stored",
    [
        5,
        {"args": [1]},
        {"attributes": 3},
        {"args": {}, "attributes": {"__class__": "x"}},
        {"args": {}, "attributes": {"state": "x"}},
    ],
)
def test_a_state_of_another_form_is_refused(stored: Any) -> None:
    with pytest.raises(ValueError, match="the state of Counting"):
        restored_callbacks([Counting()], {"Counting": stored})
    with pytest.raises(ValueError, match="the state of Counting"):
        Counting.from_state(stored)


def test_state_must_be_implemented() -> None:
    with pytest.raises(NotImplementedError, match="ExportableState: an ExportableState implements state"):
        ExportableState().state()


@given(inputs=st.one_of(st.none(), st.integers()), losses=st.one_of(st.none(), st.integers()), index=st.integers(-5, 5))
def test_eval_prediction_is_that_of_transformers(inputs: Any, losses: Any, index: int) -> None:
    ours = EvalPrediction("p", "l", inputs, losses)
    theirs = transformers.EvalPrediction("p", "l", inputs, losses)
    assert list(ours) == list(theirs)
    assert vars(ours) == vars(theirs)
    try:
        expected = theirs[index]
    except IndexError:
        with pytest.raises(IndexError, match=f"index {index}"):
            ours[index]
    else:
        assert ours[index] == expected


@pytest.mark.parametrize("ours", [EvalLoopOutput, PredictionOutput, TrainOutput, BestRun])
def test_named_tuples_are_those_of_transformers(ours: Any) -> None:
    theirs = getattr(transformers.trainer_utils, ours.__name__)
    assert ours._fields == theirs._fields
    assert ours._field_defaults == theirs._field_defaults
