"""Trackers: what each service finds in its own files after a run, read back with the service's own means.

Services that are not installed are left out; none of those here needs a network.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import sqlite3
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from trainkit.trainer.callbacks import CallbackHandler, DefaultFlowCallback
from trainkit.trainer.state import TrainerControl, TrainerState
from trainkit.trainer.tracker_names import TRACKERS
from trainkit.trainer.tracker_services import Service, rewrite_logs, run_config
from trainkit.trainer.trackers import TensorBoardCallback, TrackerCallback, tracker_callbacks

LOGS: list[tuple[int, dict[str, Any]]] = [
    (1, {"loss": 1.5, "learning_rate": 0.1, "epoch": 0.5}),
    (2, {"loss": 0.5, "learning_rate": 0.05, "epoch": 1.0}),
    (2, {"eval_loss": 0.75, "epoch": 1.0}),
    (2, {"train_runtime": 2.5, "train_loss": 1.0, "total_flos": 8.0, "epoch": 1.0}),
]
AFTER = (2, {"eval_late": 0.25})
"""Logged after training: an evaluation that the user asks for."""


@dataclasses.dataclass
class Arguments:
    """The part of TrainingArguments that trackers read."""

    output_dir: str
    logging_dir: str
    run_name: str | None = "a-run"
    learning_rate: float = 0.1
    project: str = "a-project"
    trackio_space_id: str | None = None
    hub_private_repo: bool | None = None
    save_total_limit: int | None = None
    load_best_model_at_end: bool = False

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict())

    to_sanitized_dict = to_dict


class Model(nn.Linear):
    """A model with a configuration."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.config = {"hidden_size": 2}


def arguments(folder: Path, **changed: Any) -> Arguments:
    return Arguments(output_dir=str(folder / "out"), logging_dir=str(folder / "logs"), **changed)


def run(callback: TrackerCallback, args: Any, logs: Any = None, *, after: bool = True, **state: Any) -> TrackerCallback:
    """A run as the Trainer makes it, through the events."""
    handler = CallbackHandler([DefaultFlowCallback, callback], Model(), None, None, None)
    found, control = TrainerState(**state), TrainerControl()
    Path(args.output_dir).mkdir(exist_ok=True)
    handler.on_init_end(args, found, control)
    handler.on_train_begin(args, found, control)
    for step, values in LOGS if logs is None else logs:
        found.global_step = step
        handler.on_log(args, found, control, dict(values))
    folder = Path(args.output_dir) / f"checkpoint-{found.global_step}"
    folder.mkdir()
    (folder / "weights.txt").write_text("w")
    handler.on_save(args, found, control)
    handler.on_train_end(args, found, control)
    if after:
        handler.on_log(args, found, control, dict(AFTER[1]))
        callback._end()
    return callback


def tensorboard_events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def tensorboard_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = tensorboard_events(folder)
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def tensorboard_texts(folder: Path) -> dict[str, str]:
    events = tensorboard_events(folder)
    return {name: events.Tensors(name)[0].tensor_proto.string_val[0].decode() for name in events.Tags()["tensors"]}


needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)


def test_names_give_classes_in_their_order() -> None:
    names = list(TRACKERS)
    kinds = tracker_callbacks(names)
    assert len({*kinds}) == len(names) == 13
    assert tracker_callbacks(names[::-1]) == kinds[::-1]
    assert tracker_callbacks("none") == []
    with pytest.raises(ValueError, match="mlfow"):
        tracker_callbacks(["wandb", "mlfow"])


@pytest.mark.parametrize("name", TRACKERS)
def test_names_and_classes_are_those_of_transformers(name: str) -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert tracker_callbacks([name])[0].__name__ == INTEGRATION_TO_CALLBACK[name].__name__


def test_importing_the_trackers_imports_none_of_them() -> None:
    code = (
        "import sys, trainkit.trainer.trackers as t; t.tracker_callbacks(list(t.tracker_list('all')));"
        "found = {m.split('.')[0] for m in sys.modules}; print(sorted(found & {'wandb', 'mlflow', 'tensorboard',"
        "'transformers', 'accelerate', 'datasets', 'trackio', 'comet_ml', 'clearml', 'swanlab', 'neptune'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_named(name: str) -> None:
    (kind,) = tracker_callbacks([name])
    service: Service = kind.service
    if any(importlib.util.find_spec(package) for package in service.packages):
        assert kind().session is None
    else:
        with pytest.raises(RuntimeError, match=f"pip install {service.install}"):
            kind()


def test_logs_are_renamed_as_by_transformers() -> None:
    from transformers.integrations.integration_utils import rewrite_logs as theirs

    names = ["loss", "eval_loss", "eval_", "eval", "test_a_b", "test", "evaluation_x", "epoch", "_x", "train_runtime"]
    logs = {name: float(i) for i, name in enumerate(names)}
    assert rewrite_logs(logs) == theirs(logs)


def test_the_arguments_win_over_the_model_configuration(tmp_path: Path) -> None:
    model = Model()
    model.config = {"hidden_size": 2, "learning_rate": -1.0}
    found = run_config(arguments(tmp_path), model)
    assert (found["hidden_size"], found["learning_rate"], found["run_name"]) == (2, 0.1, "a-run")
    assert run_config(arguments(tmp_path), None) == arguments(tmp_path).to_dict()


@needs_tensorboard
def test_tensorboard_has_what_was_logged(tmp_path: Path) -> None:
    run(TensorBoardCallback(), arguments(tmp_path))
    found = tensorboard_scalars(tmp_path / "logs")
    assert found["train/loss"] == [(1, 1.5), (2, 0.5)]
    assert found["eval/loss"] == [(2, 0.75)]
    assert found["eval/late"] == [(2, 0.25)]
    assert found["train/train_runtime"] == [(2, 2.5)]
    texts = tensorboard_texts(tmp_path / "logs")
    assert json.loads(texts["args/text_summary"])["learning_rate"] == 0.1
    assert json.loads(texts["model_config/text_summary"]) == {"hidden_size": 2}


@needs_tensorboard
def test_tensorboard_has_the_same_as_with_transformers(tmp_path: Path) -> None:
    from transformers.integrations.integration_utils import TensorBoardCallback as Theirs

    logs = [(1, {"loss": 1.5, "note": "text", "flag": True, "count": 3, "eval_f1": float("nan")})]
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
    run(TensorBoardCallback(), arguments(tmp_path / "a"), logs, after=False)
    theirs, args, state = Theirs(), arguments(tmp_path / "b"), TrainerState(global_step=1)
    theirs.on_train_begin(args, state, TrainerControl())
    theirs.on_log(args, state, TrainerControl(), logs=dict(logs[0][1]))
    theirs.on_train_end(args, state, TrainerControl())
    ours, expected = (tensorboard_scalars(tmp_path / x / "logs") for x in "ab")
    assert ours.keys() == expected.keys()
    np.testing.assert_equal(ours, expected)
    assert tensorboard_texts(tmp_path / "a" / "logs")["train/note/text_summary"] == "text"


@needs_tensorboard
def test_tensorboard_takes_numbers_of_numpy_and_torch_and_names_the_rest(tmp_path: Path) -> None:
    logs = [
        (1, {"loss": torch.tensor(1.5), "eval_f1": np.float32(0.5), "eval_all": [1, 2], "eval_one": np.array([2.0])})
    ]
    with pytest.warns(UserWarning, match=r"left out: \{'eval_all': 'list'\}"):
        run(TensorBoardCallback(), arguments(tmp_path), logs, after=False)
    found = tensorboard_scalars(tmp_path / "logs")
    assert found == {"train/loss": [(1, 1.5)], "eval/f1": [(1, 0.5)], "eval/one": [(1, 2.0)]}


@needs_tensorboard
def test_a_trial_has_a_folder_of_its_own_and_other_processes_write_nothing(tmp_path: Path) -> None:
    callback = TensorBoardCallback()
    for trial in ("t1", "t2"):
        args = arguments(tmp_path, run_name=trial)
        args.output_dir = str(tmp_path / trial)
        run(callback, args, after=False, is_hyper_param_search=True, trial_name=trial)
    assert tensorboard_scalars(tmp_path / "logs" / "t1") == tensorboard_scalars(tmp_path / "logs" / "t2") != {}
    (tmp_path / "other").mkdir()
    run(TensorBoardCallback(), arguments(tmp_path / "other"), is_world_process_zero=False)
    assert not (tmp_path / "other" / "logs").exists()


@needs_tensorboard
def test_a_writer_of_the_user_is_used_and_left_open(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(tmp_path / "mine"))
    callback = TensorBoardCallback(tb_writer=writer)
    assert callback.tb_writer is writer
    run(callback, arguments(tmp_path), after=False)
    writer.add_scalar("mine", 1.0, 1)
    writer.close()
    assert {"mine", "train/loss"} <= tensorboard_scalars(tmp_path / "mine").keys()
    assert not (tmp_path / "logs").exists()


# -- services that write to this machine when they are offline -------------------------------------------------------

OFFLINE = {
    "WANDB_MODE": "offline",
    "WANDB_LOG_MODEL": "checkpoint",
    "SWANLAB_MODE": "offline",
    "COMET_MODE": "offline",
    "NEPTUNE_MODE": "offline",
    "NEPTUNE_PROJECT": "a/b",
    "CLEARML_OFFLINE_MODE": "1",
    # Its offline mode cannot hold models.
    "CLEARML_LOG_MODEL": "false",
    "HF_MLFLOW_LOG_ARTIFACTS": "1",
    "HF_DVCLIVE_LOG_MODEL": "true",
}
FOLDERS = {
    "HOME": "home",
    "WANDB_DIR": "wandb",
    "SWANLAB_LOG_DIR": "swanlab",
    "COMET_OFFLINE_DIRECTORY": "comet",
    "CLEARML_CACHE_DIR": "clearml",
    "TRACKIO_DIR": "trackio",
}


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own for everything that a service writes."""
    monkeypatch.chdir(tmp_path)
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    for name, folder in FOLDERS.items():
        (tmp_path / folder).mkdir()
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return tmp_path


def run_apart(name: str, folder: Path) -> None:
    """A run in a process of its own: services keep settings and open runs for the life of a process."""
    (kind,) = tracker_callbacks([name])
    if importlib.util.find_spec(kind.service.packages[0]) is None:
        pytest.skip(f"{name} is not installed")
    code = (
        f"import sys; from pathlib import Path; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_trackers as t\n"
        f"t.run(t.tracker_callbacks([{name!r}])[0](), t.arguments(Path({str(folder)!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def written(folder: Path) -> bytes:
    """All names and bytes below a folder, those in archives too."""
    parts = []
    for path in folder.rglob("*"):
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                parts += [archive.read(name) for name in archive.namelist() if not name.endswith("/")]
        elif path.is_file():
            parts += [str(path).encode(), path.read_bytes()]
    return b"\n".join(parts)


# What their imports and calls warn about is theirs.
installed = pytest.mark.filterwarnings("ignore")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("wandb", ["train/loss", "eval/loss", "eval/late", "train_runtime", "hidden_size"]),
        ("swanlab", ["train/loss", "eval/loss", "eval/late", "single_value/train_runtime", "hidden_size"]),
        ("comet_ml", ["train/loss", "eval/loss", "eval/late", "hidden_size"]),
        ("clearml", ['"loss"', '"late"', "hidden_size"]),
        ("neptune", ["train", "eval", "late", "hidden_size"]),
        ("trackio", ["train/loss", "eval/loss", "eval/late", "hidden_size"]),
        ("dvclive", ["loss", "eval/loss.tsv", "learning_rate"]),
        ("mlflow", ["loss", "eval_loss", "eval_late", "hidden_size"]),
    ],
)
def test_offline_a_service_finds_what_was_logged(offline: Path, name: str, found: list[str]) -> None:
    run_apart(name, offline)
    text = written(offline)
    assert [word for word in found if word.encode() not in text] == []


@pytest.mark.slow
@installed
def test_mlflow_has_series_parameters_and_checkpoints_of_one_run(offline: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    (kind,) = tracker_callbacks(["mlflow"])
    callback = run(kind(), arguments(offline))
    client = mlflow.MlflowClient()
    (experiment,) = client.search_experiments()
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_id, found.info.status) == (callback.session.run_id, "FINISHED")
    history = client.get_metric_history(found.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.5), (2, 0.5)]
    assert found.data.metrics["eval_late"] == 0.25
    assert (found.data.params["learning_rate"], found.data.params["hidden_size"]) == ("0.1", "2")
    assert [item.path for item in client.list_artifacts(found.info.run_id)] == ["checkpoint-2"]
    # A run that the user has open is used, and left open.
    with mlflow.start_run() as own:
        args = arguments(offline)
        args.output_dir = str(offline / "again")
        run(kind(), args)
        assert mlflow.active_run().info.run_id == own.info.run_id
    assert client.get_run(own.info.run_id).data.metrics["eval_late"] == 0.25


@pytest.mark.slow
def test_trackio_goes_on_in_the_same_run(offline: Path) -> None:
    run_apart("trackio", offline)
    (file,) = (offline / "trackio").glob("*.db")
    with contextlib.closing(sqlite3.connect(file)) as database:
        rows = database.execute("SELECT run_id, metrics FROM metrics ORDER BY id").fetchall()
        ((config,),) = database.execute("SELECT config FROM configs").fetchall()
    assert len({run_id for run_id, _ in rows}) == 1
    values = [json.loads(metrics) for _, metrics in rows]
    assert values[0] == {"train/loss": 1.5, "train/learning_rate": 0.1, "train/epoch": 0.5, "train/global_step": 1}
    assert values[-1] == {"eval/late": 0.25, "train/global_step": 2}
    assert json.loads(config)["learning_rate"] == 0.1


@pytest.mark.slow
def test_dvclive_has_the_series_and_the_model(offline: Path) -> None:
    run_apart("dvclive", offline)
    plots = offline / "dvclive" / "plots" / "metrics"
    assert (plots / "loss.tsv").read_text().split() == ["step", "loss", "0", "1.5", "1", "0.5"]
    assert (plots / "eval" / "late.tsv").read_text().split()[-1] == "0.25"
    assert (offline / "out" / "last" / "model.safetensors").exists()


@pytest.mark.slow
@installed
def test_wandb_has_the_summary_and_stays_open_until_the_next_trial(offline: Path) -> None:
    wandb = pytest.importorskip("wandb")
    (kind,) = tracker_callbacks(["wandb"])
    callback = run(kind(), arguments(offline), after=False, is_hyper_param_search=True, trial_name="t1")
    first = wandb.run
    assert (first.name, first.group, first.project) == ("t1", "a-run", "huggingface")
    assert dict(first.summary)["train_runtime"] == 2.5
    assert first.config["learning_rate"] == 0.1
    args = arguments(offline)
    args.output_dir = str(offline / "t2")
    run(callback, args, after=False, is_hyper_param_search=True, trial_name="t2")
    assert wandb.run is not first and wandb.run.name == "t2"
    callback._end()
    assert wandb.run is None
    # A run that someone else began, a sweep for instance, is used and left open.
    own = wandb.init(project="mine")
    args.output_dir = str(offline / "t3")
    run(kind(), args, after=False, is_hyper_param_search=True, trial_name="t3")
    assert wandb.run is own and dict(own.summary)["train_runtime"] == 2.5
    own.finish()
