"""Callbacks that show a run: bars, or printed lines."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from trainkit.trainer.dataloaders import length_of
from trainkit.trainer.events import TrainerCallback
from trainkit.trainer.state import TrainerControl, TrainerState


def shown_logs(logs: Mapping[str, Any], max_str_len: int | None = None) -> dict[str, Any]:
    """What is displayed of a log: without ``total_flos``, ``loss`` to four decimals (below 0.001 to four digits).

    Args:
        logs: left as they are.
        max_str_len: longer strings are replaced by a note; None keeps them.

    Example:
        >>> shown_logs({"loss": 0.123456, "total_flos": 1e9, "epoch": 0.5}), shown_logs({"loss": 0.0000123456})
        ({'loss': 0.1235, 'epoch': 0.5}, {'loss': 1.235e-05})
    """
    shown = {name: _short(value, max_str_len) for name, value in logs.items() if name != "total_flos"}
    loss = shown.get("loss")
    if isinstance(loss, float):
        shown["loss"] = round(loss, 4) if abs(loss) >= 1e-3 else float(f"{loss:.3e}")
    return shown


def _short(value: Any, limit: int | None) -> Any:
    if limit is None or not isinstance(value, str) or len(value) <= limit:
        return value
    return f"[String too long to display, length: {len(value)} > {limit}. Consider increasing `max_str_len` if needed.]"


class ProgressCallback(TrainerCallback):
    """A bar for the run and one for each evaluation, on the main process; logs are written above them.

    Args:
        max_str_len: characters; longer strings in a log are replaced by a note.

    Source: Trainer 4.57: ``ProgressCallback``.
    """

    def __init__(self, max_str_len: int = 100) -> None:
        self.training_bar: Any = None
        self.prediction_bar: Any = None
        self.max_str_len = max_str_len
        self.current_step = 0

    def make_bar(self, **options: Any) -> Any:
        """A bar of tqdm; it is drawn as a widget in a notebook that has ipywidgets."""
        from tqdm.auto import tqdm

        return tqdm(dynamic_ncols=True, **options)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.current_step = state.global_step
        if state.is_world_process_zero:
            # A run that goes on is not shown as if its first steps had taken no time.
            self.training_bar = self.make_bar(total=state.max_steps, initial=state.global_step)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.training_bar is not None:
            self.training_bar.update(state.global_step - self.current_step)
            self.current_step = state.global_step

    def on_prediction_step(
        self, args: Any, state: TrainerState, control: TrainerControl, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        if self.prediction_bar is None:
            total = length_of(eval_dataloader)
            if total is None:
                return
            self.prediction_bar = self.make_bar(total=total, leave=self.training_bar is None)
        self.prediction_bar.update(1)

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._close_prediction_bar()

    def on_predict(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        self._close_prediction_bar()

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is None:
            return
        shown = shown_logs(logs, self.max_str_len)
        if "epoch" in shown:
            shown["epoch"] = round(shown["epoch"], 2)
        self.training_bar.write(str(shown))

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None

    def _close_prediction_bar(self) -> None:
        if self.prediction_bar is not None:
            self.prediction_bar.close()
            self.prediction_bar = None


class NotebookProgressCallback(ProgressCallback):
    """The same with the widgets of a notebook, whatever tqdm takes the surroundings for.

    Raises: ImportError when training begins and ipywidgets is missing.
    """

    def make_bar(self, **options: Any) -> Any:
        """A bar as a widget."""
        if importlib.util.find_spec("ipywidgets") is None:
            raise ImportError("NotebookProgressCallback: needs a package: pip install ipywidgets")
        from tqdm.notebook import tqdm

        return tqdm(**options)


class PrinterCallback(TrainerCallback):
    """Prints each log as a dict, on the main process of each machine.

    Source: Trainer 4.57: ``PrinterCallback``, which also takes ``total_flos`` out of the log that others see.
    """

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        if state.is_local_process_zero:
            print(shown_logs(logs))
