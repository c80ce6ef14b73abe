"""What the Trainer knows about its run (TrainerState), what callbacks ask of it (TrainerControl), and both as JSON."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from trainkit.trainer.foreign import is_instance

MAX_BYTES = 64 * 2**20
"""Largest state file that is read."""
MAX_DEPTH = 200
"""Deepest nesting in a state file that is read."""

_COUNTS = ("global_step", "max_steps", "num_input_tokens_seen")
_NUMBERS = ("epoch", "logging_steps", "eval_steps", "save_steps", "train_batch_size", "num_train_epochs", "total_flos")


class ExportableState:
    """Something whose state is saved with checkpoints and can be made again from it.

    A class implements ``state()``, which returns ``{"args": constructor arguments, "attributes": {name: value}}``, both
    JSON.

    Example:
        >>> class Counter(ExportableState):
        ...     def __init__(self, limit):
        ...         self.limit, self.count = limit, 0
        ...     def state(self):
        ...         return {"args": {"limit": self.limit}, "attributes": {"count": self.count}}
        >>> counter = Counter.from_state({"args": {"limit": 3}, "attributes": {"count": 2}})
        >>> counter.limit, counter.count
        (3, 2)

    Source: Trainer 4.57: ``ExportableState``.
    """

    def state(self) -> dict[str, Any]:
        """What :meth:`from_state` needs.

        Raises: NotImplementedError where a class does not implement it.
        """
        raise NotImplementedError(f"{type(self).__name__}: an ExportableState implements state()")

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Any:
        """A new object with this state.

        Raises: ValueError for another form, or an attribute that would replace a method.
        """
        return restored(cls, state)


def restored(kind: type[Any], state: Any) -> Any:
    """A new object of a class from what its ``state()`` gave, which a file may have held.

    Args:
        kind: the class.
        state: ``{"args": {...}, "attributes": {...}}``.

    Raises: ValueError for another form, or an attribute that would replace a method.
    """
    what = f"the state of {kind.__name__}"
    if not isinstance(state, Mapping):
        raise ValueError(f"{what}: is a {type(state).__name__}, expected an object with args and attributes")
    arguments, attributes = state.get("args", {}), state.get("attributes", {})
    for name, values in (("args", arguments), ("attributes", attributes)):
        if not isinstance(values, Mapping):
            raise ValueError(f"{what}: {name} is a {type(values).__name__}, expected an object")
    for name in attributes:
        if name.startswith("__") or callable(getattr(kind, name, None)):
            raise ValueError(f"{what}: the attribute {name!r} would replace a part of the class")
    made = kind(**arguments)
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def is_exportable(obj: Any) -> bool:
    """Whether an object derives from ExportableState, of this library or of transformers."""
    return isinstance(obj, ExportableState) or is_instance(obj, "transformers.trainer_callback", "ExportableState")


@dataclass
class TrainerControl(ExportableState):
    """Flags that callbacks raise and the loop obeys.

    Args:
        should_training_stop: leave after the current microbatch; cleared when training begins.
        should_epoch_stop: leave the pass; cleared when the next one begins.
        should_save: save at the next check; cleared when a step begins, and by the save.
        should_evaluate: evaluate at the next check; cleared likewise.
        should_log: log at the next check; cleared likewise.

    Source: Trainer 4.57: ``TrainerControl``.
    """

    should_training_stop: bool = False
    should_epoch_stop: bool = False
    should_save: bool = False
    should_evaluate: bool = False
    should_log: bool = False

    def state(self) -> dict[str, Any]:
        """The flags as constructor arguments."""
        flags = [flag.name for flag in fields(TrainerControl)]
        return {"args": {name: getattr(self, name) for name in flags}, "attributes": {}}


@dataclass
class TrainerState:
    """Where a run is. One step is one update of the parameters, however many microbatches it took.

    Args:
        epoch: position in passes over the data; None until training began.
        global_step: completed updates.
        max_steps: updates planned.
        logging_steps: updates from one log to the next.
        eval_steps: updates from one evaluation to the next.
        save_steps: updates from one save to the next.
        train_batch_size: rows per process and microbatch.
        num_train_epochs: passes planned.
        num_input_tokens_seen: by all processes.
        total_flos: floating-point operations of all processes.
        log_history: everything that was logged, each with its ``step``.
        best_metric: best value so far.
        best_global_step: its step.
        best_model_checkpoint: path of the best checkpoint, below ``output_dir`` as it was given.
        is_local_process_zero: whether this is the main process of its machine.
        is_world_process_zero: whether this is the main process of all.
        is_hyper_param_search: whether this run is a trial.
        trial_name: of the trial.
        trial_params: hyperparameters of the trial.
        stateful_callbacks: class name to exported state, or to a list of them; also taken as a list of callbacks.

    Raises: TypeError for a callback that cannot be exported.

    Source: Trainer 4.57: ``TrainerState``.
    """

    epoch: float | None = None
    global_step: int = 0
    max_steps: int = 0
    logging_steps: int = 500
    eval_steps: int = 500
    save_steps: int = 500
    train_batch_size: int | None = None
    num_train_epochs: int = 0
    num_input_tokens_seen: int = 0
    total_flos: float = 0
    log_history: list[dict[str, Any]] = None  # type: ignore[assignment]
    best_metric: float | None = None
    best_global_step: int | None = None
    best_model_checkpoint: str | None = None
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True
    is_hyper_param_search: bool = False
    trial_name: str | None = None
    trial_params: dict[str, Any] | None = None
    stateful_callbacks: Any = None

    def __post_init__(self) -> None:
        if self.log_history is None:
            self.log_history = []
        if not isinstance(self.stateful_callbacks, dict):
            self.stateful_callbacks = callback_states(self.stateful_callbacks or ())

    def to_json(self) -> str:
        """The text of a state file: one object, sorted names, indent 2, a newline at the end.

        NaN and infinities are the bare words ``NaN`` and ``Infinity``, as 4.57 writes and reads them. Numbers and
        arrays of NumPy and torch become numbers and lists.

        Raises: TypeError for a value that JSON cannot hold.

        Example:
            >>> print(TrainerState(global_step=3).to_json()[:29])
            {
              "best_global_step": null,
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return json.dumps(values, indent=2, sort_keys=True, default=plain) + "\n"

    def save_to_json(self, json_path: str | os.PathLike[str]) -> None:
        """Write the state file. An older one of that name is there, whole, until the new one is.

        Args:
            json_path: the file; its folder exists.

        Raises: TypeError for a value that JSON cannot hold; nothing is written then.

        Source: Trainer 4.57: ``TrainerState.save_to_json``.
        """
        write_whole(json_path, self.to_json())

    @classmethod
    def load_from_json(cls, json_path: str | os.PathLike[str]) -> TrainerState:
        """The state of a file.

        Args:
            json_path: the file, of at most 64 MiB and 200 levels.

        Raises: TypeError for names that a state does not have; ValueError for other contents.

        Source: Trainer 4.57: ``TrainerState.load_from_json``.
        """
        found = read_object(json_path)
        known = {field.name for field in fields(cls)}
        unknown = sorted(found.keys() - known)
        if unknown:
            raise TypeError(
                f"{json_path}: holds {unknown}, which {cls.__name__} does not have; expected {sorted(known)}"
            )
        _check_types(found, str(json_path))
        return cls(**found)

    def collect_callbacks(self, objects: Sequence[Any]) -> None:
        """Bring ``stateful_callbacks`` up to date, before a save.

        Each class gets the states of its callbacks as they are now, in their order. A control is stored with its flags
        lowered, as they are after the save. Entries of classes that are not there now are kept.

        Args:
            objects: the callbacks of the run and its control; those without a state are passed over.

        Source: Trainer 4.57: ``_save_checkpoint``.
        """
        found = callback_states(obj for obj in objects if is_exportable(obj))
        for obj in objects:
            if isinstance(obj, TrainerControl):
                found[type(obj).__name__] = TrainerControl().state()
        self.stateful_callbacks = {**self.stateful_callbacks, **found}

    def compute_steps(self, args: Any, max_steps: int) -> None:
        """Set the intervals from the arguments: ceil(max_steps * value) for a value below 1, else the value.

        Args:
            args: with ``logging_steps``, ``eval_steps`` and ``save_steps``; None leaves an interval as it is.
            max_steps: updates planned.

        Example:
            >>> from types import SimpleNamespace
            >>> state = TrainerState()
            >>> state.compute_steps(SimpleNamespace(logging_steps=0.25, eval_steps=None, save_steps=7), 30)
            >>> state.logging_steps, state.eval_steps, state.save_steps
            (8, 500, 7)

        Source: Trainer 4.57: ``TrainerState.compute_steps``.
        """
        for name in ("logging_steps", "eval_steps", "save_steps"):
            value = getattr(args, name)
            if value is not None:
                setattr(self, name, math.ceil(max_steps * value) if value < 1 else value)

    def init_training_references(self, trainer: Any, max_steps: int, num_train_epochs: int, trial: Any) -> None:
        """Set what belongs to this run, whatever a checkpoint said: its length, this process, the trial.

        Args:
            trainer: with ``hp_name``, ``_trial``, ``is_local_process_zero()`` and ``is_world_process_zero()``.
            max_steps: updates planned.
            num_train_epochs: passes planned.
            trial: of a hyperparameter search, or None.

        Source: Trainer 4.57: ``TrainerState.init_training_references``.
        """
        if trainer.hp_name is not None and trainer._trial is not None:
            self.trial_name = trainer.hp_name(trainer._trial)
        self.trial_params = None if trial is None else _trial_params(trial)
        self.max_steps = max_steps
        self.num_train_epochs = num_train_epochs
        self.is_local_process_zero = trainer.is_local_process_zero()
        self.is_world_process_zero = trainer.is_world_process_zero()


def _trial_params(trial: Any) -> dict[str, Any]:
    found = trial if isinstance(trial, Mapping) else getattr(trial, "params", getattr(trial, "assignments", None))
    if not isinstance(found, Mapping):
        raise TypeError(f"trial: is a {type(trial).__name__}, expected a trial of optuna or a dict of hyperparameters")
    return dict(found)


def callback_states(callbacks: Iterable[Any]) -> dict[str, Any]:
    """The states of exportable objects by the name of their class; of several of one class, a list in their order.

    Args:
        callbacks: all exportable.

    Raises: TypeError for one that is not.

    Example:
        >>> callback_states([TrainerControl()])["TrainerControl"]["attributes"]
        {}
    """
    found: dict[str, list[Any]] = {}
    for callback in callbacks:
        if not is_exportable(callback):
            raise TypeError(
                f"stateful_callbacks: {type(callback).__name__} has no state to save; expected classes that derive "
                "from ExportableState"
            )
        found.setdefault(type(callback).__name__, []).append(callback.state())
    return {name: states[0] if len(states) == 1 else states for name, states in found.items()}


def restored_callbacks(objects: Sequence[Any], stored: Mapping[str, Any]) -> list[Any]:
    """Callbacks made again from the states of a checkpoint.

    Each exportable one with a stored state is replaced by a new one of its class with that state; of several of one
    class the n-th gets the n-th state.

    Args:
        objects: the callbacks of the run, and its control.
        stored: ``stateful_callbacks`` of the checkpoint's state.

    Returns: the new and the other ones, in the same order.

    Raises: ValueError for a stored state that has another form.

    Source: Trainer 4.57: ``_load_callback_state``.
    """
    waiting = {name: list(s) if isinstance(s, list) else [s] for name, s in stored.items()}
    missing = sorted(waiting.keys() - {type(obj).__name__ for obj in objects if is_exportable(obj)})
    if missing:
        warnings.warn(
            f"resume_from_checkpoint: it has states of callbacks that this run lacks: {missing}; they are not restored",
            UserWarning,
            stacklevel=3,
        )

    def again(obj: Any) -> Any:
        states = waiting.get(type(obj).__name__) if is_exportable(obj) else None
        return restored(type(obj), states.pop(0)) if states else obj

    return [again(obj) for obj in objects]


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file so that a reader finds the old one or the new one, also after a crash.

    Args:
        path: the file, replaced if it exists.
        text: written as UTF-8.
    """
    with replacement(path) as beside, beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacement(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The name of a file to write, which takes the place of another one in one piece; after an error nothing changes.

    Args:
        path: the file that is replaced if it exists.
    """
    target = Path(path)
    beside = target.with_name(f".{target.name}.{os.getpid()}.new")
    try:
        yield beside
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object of a JSON file that nobody has vouched for; NaN and infinities may be bare words.

    Args:
        path: of at most 64 MiB and 200 levels.

    Raises: ValueError for more, for bad syntax, or if it holds something else than an object.
    """
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path}: has more than {MAX_BYTES} bytes, expected at most that")
    try:
        value = json.loads(data.decode("utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path}: nested deeper than {MAX_DEPTH}") from error
    except ValueError as error:
        raise ValueError(f"{path}: no valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, expected an object")
    _check_depth(value, str(path))
    return value


def _check_depth(value: Any, what: str) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for parent in level for child in _children(parent) if isinstance(child, (dict, list))]
        if not level:
            return
    raise ValueError(f"{what}: nested deeper than {MAX_DEPTH}")


def _children(parent: Any) -> Iterable[Any]:
    return parent.values() if isinstance(parent, dict) else parent


def _check_types(found: Mapping[str, Any], what: str) -> None:
    """Refuse what a loop would stumble over later."""
    for name in _COUNTS:
        value = found.get(name, 0)
        if not isinstance(value, int) or value < (-1 if name == "max_steps" else 0):
            raise ValueError(f"{what}: {name} is {str(value)[:80]!r}, expected an integer of at least 0")
    for name in _NUMBERS:
        value = found.get(name)
        if value is not None and not isinstance(value, (int, float)):
            raise ValueError(f"{what}: {name} is {str(value)[:80]!r}, expected a number")
    history = found.get("log_history")
    if history is not None and not (isinstance(history, list) and all(isinstance(row, dict) for row in history)):
        raise ValueError(f"{what}: log_history is no list of objects")
    if not isinstance(found.get("stateful_callbacks", {}), (dict, type(None))):
        raise ValueError(f"{what}: stateful_callbacks is no object")


def plain(value: Any) -> Any:
    """Numbers and arrays of NumPy and torch, which ``json`` does not know.

    Raises: TypeError for anything else.
    """
    if not hasattr(value, "tolist"):
        raise TypeError(
            f"the state holds a {type(value).__name__}, expected JSON: dict, list, str, int, float, bool, None"
        )
    return as_python(value)


def as_python(value: Any) -> Any:
    """A number or an array of NumPy or torch as a number of Python or a list of them; anything else as it is."""
    tolist = getattr(value, "tolist", None)
    return value if tolist is None else tolist()
