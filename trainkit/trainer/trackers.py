"""Callbacks that send what a run logs to experiment trackers, each found when it is wanted."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from trainkit.trainer import tracker_hosted as hosted
from trainkit.trainer import tracker_local as local
from trainkit.trainer.events import TrainerCallback
from trainkit.trainer.state import TrainerControl, TrainerState
from trainkit.trainer.tracker_names import tracker_list
from trainkit.trainer.tracker_services import Moment, Service, nothing, run_config


class TrackerCallback(TrainerCallback):
    """One tracker: a run of its service begins with training or the first log, on the main process only.

    The arguments and the model's configuration are logged once per run. After training the run of the service ends,
    unless its users expect it to stay open; a log after that (of an evaluation, say) takes it up again. Each trial of a
    hyperparameter search is a run of its own.

    Args:
        session: a run of the service that was started already; it is used, and left open.

    Raises: RuntimeError if the package is missing.
    """

    service: ClassVar[Service]

    def __init__(self, session: Any = None) -> None:
        if session is None and not any(importlib.util.find_spec(name) for name in self.service.packages):
            raise RuntimeError(f"{type(self).__name__}: needs a package: pip install {self.service.install}")
        self.session = session
        self._given = session is not None
        self._open = session is not None
        self._described = False

    def setup(self, args: Any, state: TrainerState, model: Any = None, **kwargs: Any) -> None:
        """Begin or take up the run of the service; override to choose how."""
        moment = Moment(args, state, model)
        if not self._open:
            self.session = self.service.start(self.session, moment)
            self._open = True
        if not self._described:
            self.service.describe(self.session, moment, run_config(args, model))
            self._described = True

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if not self._is_main(state):
            return
        if state.is_hyper_param_search and not self._given:
            self._end()
            self.session, self._described = None, False
        self.setup(args, state, model)

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: Any = None,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        self._log(args, state, model, logs)

    def on_predict(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        metrics: Any = None,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        self._log(args, state, model, metrics)

    def on_save(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if self._open and self._is_main(state):
            self.service.save(self.session, Moment(args, state, model))

    def on_train_end(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        if self._open and self._is_main(state):
            self.service.complete(self.session, Moment(args, state, model, processing_class))
            if not self.service.stays_open and not self._given:
                self._end()

    def _log(self, args: Any, state: TrainerState, model: Any, values: Mapping[str, Any] | None) -> None:
        if values is None or self.service.log is nothing or not self._is_main(state):
            return
        if not self._open or not self._described:
            self.setup(args, state, model)
        plain = {name: _number(value) for name, value in values.items()}
        self.service.log(self.session, plain, Moment(args, state, model))

    def _end(self) -> None:
        if self._open:
            self._open = False
            self.service.finish(self.session)

    def _is_main(self, state: TrainerState) -> bool:
        return state.is_local_process_zero if self.service.per_machine else state.is_world_process_zero


def _number(value: Any) -> Any:
    """A number, or an array of one number, of NumPy or torch as one of Python; anything else as it is."""
    one = math.prod(getattr(value, "shape", (0,))) == 1
    return value.item() if one and hasattr(value, "item") else value


class TensorBoardCallback(TrackerCallback):
    """TensorBoard: scalars by step, strings as text, into ``logging_dir``.

    Args:
        tb_writer: a ``SummaryWriter`` to use.
    """

    service = local.TENSORBOARD

    def __init__(self, tb_writer: Any = None) -> None:
        super().__init__(tb_writer)

    @property
    def tb_writer(self) -> Any:
        """The writer; None while there is none."""
        return self.session if self._open else None


class MLflowCallback(TrackerCallback):
    """MLflow; settings: ``MLFLOW_TRACKING_URI``, ``_EXPERIMENT_NAME``, ``_RUN_ID``, ``_TAGS``, ``_NESTED_RUN``,
    ``_FLATTEN_PARAMS``, ``_MAX_LOG_PARAMS``, ``HF_MLFLOW_LOG_ARTIFACTS``."""

    service = local.MLFLOW


class DagsHubCallback(TrackerCallback):
    """DagsHub, through MLflow; further settings: ``HF_DAGSHUB_LOG_ARTIFACTS``, ``BRANCH``."""

    service = local.DAGSHUB


class TrackioCallback(TrackerCallback):
    """Trackio; settings: the arguments ``project``, ``trackio_space_id``, ``hub_private_repo``."""

    service = local.TRACKIO


class DVCLiveCallback(TrackerCallback):
    """DVCLive; setting: ``HF_DVCLIVE_LOG_MODEL`` (true, all).

    Args:
        live: a ``dvclive.Live`` to use.
    """

    service = local.DVCLIVE

    def __init__(self, live: Any = None) -> None:
        super().__init__(live)


class CodeCarbonCallback(TrackerCallback):
    """CodeCarbon: the emissions of training, measured on each machine."""

    service = local.CODECARBON


class WandbCallback(TrackerCallback):
    """Weights & Biases; settings: ``WANDB_PROJECT``, ``WANDB_LOG_MODEL`` (false, end, checkpoint), ``WANDB_WATCH``."""

    service = hosted.WANDB


class SwanLabCallback(TrackerCallback):
    """SwanLab; settings: ``SWANLAB_PROJECT``, ``SWANLAB_MODE``, ``SWANLAB_LOG_DIR``."""

    service = hosted.SWANLAB


class CometCallback(TrackerCallback):
    """Comet; settings: ``COMET_MODE``, ``COMET_LOG_ASSETS``, ``COMET_START_ONLINE``."""

    service = hosted.COMET


class ClearMLCallback(TrackerCallback):
    """ClearML; settings: ``CLEARML_PROJECT``, ``CLEARML_TASK``, ``CLEARML_LOG_MODEL``."""

    service = hosted.CLEARML


class NeptuneCallback(TrackerCallback):
    """Neptune; settings: ``NEPTUNE_API_TOKEN``, ``NEPTUNE_PROJECT``.

    Args:
        run: a run of Neptune to use.
    """

    service = hosted.NEPTUNE

    def __init__(self, *, run: Any = None) -> None:
        super().__init__(run)


class AzureMLCallback(TrackerCallback):
    """Azure ML: numbers, in the run of the surroundings.

    Args:
        azureml_run: a run to use.
    """

    service = hosted.AZURE_ML

    def __init__(self, azureml_run: Any = None) -> None:
        super().__init__(azureml_run)


class FlyteCallback(TrackerCallback):
    """Flyte, within one of its tasks: checkpoints, and the log as a deck."""

    service = hosted.FLYTE


_CALLBACKS: dict[str, type[TrackerCallback]] = {
    "azure_ml": AzureMLCallback,
    "clearml": ClearMLCallback,
    "codecarbon": CodeCarbonCallback,
    "comet_ml": CometCallback,
    "dagshub": DagsHubCallback,
    "dvclive": DVCLiveCallback,
    "flyte": FlyteCallback,
    "mlflow": MLflowCallback,
    "neptune": NeptuneCallback,
    "swanlab": SwanLabCallback,
    "tensorboard": TensorBoardCallback,
    "trackio": TrackioCallback,
    "wandb": WandbCallback,
}


def tracker_callbacks(names: Iterable[str] | str | None) -> list[type[TrainerCallback]]:
    """The callback classes of trackers. Nothing is imported yet.

    Args:
        names: as in ``report_to``: names, "all", "none"; None for all that are installed.

    Raises: ValueError for a name that is not a tracker.

    Example:
        >>> [kind.__name__ for kind in tracker_callbacks(["tensorboard", "wandb"])]
        ['TensorBoardCallback', 'WandbCallback']

    Source: Trainer 4.57: ``get_reporting_integration_callbacks``.
    """
    return [_CALLBACKS[name] for name in tracker_list(names)]
