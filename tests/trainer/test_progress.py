"""Bars and printed logs beside those of transformers."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Callable
from contextlib import redirect_stderr
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers import trainer_callback as theirs

from trainkit.trainer.progress import NotebookProgressCallback, ProgressCallback, shown_logs
from trainkit.trainer.state import TrainerControl, TrainerState


class Loader:
    def __init__(self, length: int | None) -> None:
        self.length = length

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("no length")
        return self.length


def bars(callback: Any, make_state: Callable[..., Any], **state: Any) -> tuple[list[Any], str]:
    """What a progress callback holds after each event of a small run, and what it wrote."""
    found, written = make_state(max_steps=4, **state), io.StringIO()
    seen: list[Any] = []

    def note() -> None:
        bar, other = callback.training_bar, callback.prediction_bar
        seen.append((bar is not None and (bar.n, bar.total), other is not None and (other.n, other.total)))

    control = TrainerControl()
    with redirect_stderr(written):
        callback.on_prediction_step(None, found, control, eval_dataloader=Loader(2))
        note()
        callback.on_predict(None, found, control, metrics={})
        callback.on_train_begin(None, found, control)
        for found.global_step in (1, 2, 4):
            callback.on_step_end(None, found, control)
            note()
        for length in (None, 3):
            callback.on_prediction_step(None, found, control, eval_dataloader=Loader(length))
            note()
        callback.on_evaluate(None, found, control)
        callback.on_log(None, found, control, logs={"loss": 0.5, "total_flos": 1.0, "epoch": 1 / 3, "s": "x" * 101})
        note()
        callback.on_train_end(None, found, control)
        note()
    return seen, written.getvalue()


@pytest.mark.parametrize("main", [True, False])
def test_bars_are_those_of_transformers(main: bool, capsys: Any) -> None:
    ours = bars(ProgressCallback(), TrainerState, is_world_process_zero=main)
    out = capsys.readouterr().out
    reference = bars(theirs.ProgressCallback(), transformers.TrainerState, is_world_process_zero=main)
    assert ours[0] == reference[0]
    assert out == capsys.readouterr().out
    assert ("'epoch': 0.33, 's': '[String too long to display, length: 101 > 100." in out) is main
    assert bool(ours[1]) is main


def test_a_run_that_goes_on_begins_its_bar_where_it_is() -> None:
    callback = ProgressCallback()
    with redirect_stderr(io.StringIO()):
        callback.on_train_begin(None, TrainerState(global_step=3, max_steps=4), TrainerControl())
        callback.on_step_end(None, TrainerState(global_step=4), TrainerControl())
        assert (callback.training_bar.initial, callback.training_bar.n) == (3, 4)
        callback.on_train_end(None, TrainerState(), TrainerControl())
    # A run that failed before it began has no bar to close.
    ProgressCallback().on_train_end(None, TrainerState(), TrainerControl())


def test_a_notebook_bar_is_a_widget_or_says_what_is_missing() -> None:
    callback = NotebookProgressCallback()
    if importlib.util.find_spec("ipywidgets") is None:
        with pytest.raises(ImportError, match="pip install ipywidgets"):
            callback.on_train_begin(None, TrainerState(max_steps=2), TrainerControl())
        return
    callback.on_train_begin(None, TrainerState(max_steps=2), TrainerControl())
    assert callback.training_bar.container is not None
    callback.on_train_end(None, TrainerState(), TrainerControl())


@given(loss=st.floats(allow_nan=False))
def test_shown_losses_are_those_of_transformers_or_no_longer_zero(loss: float) -> None:
    shown = shown_logs({"loss": loss})["loss"]
    if abs(loss) >= 1e-3:
        assert shown == round(loss, 4)
    else:
        assert math.isclose(shown, loss, rel_tol=1e-3)
        assert (shown == 0) == (loss == 0)
