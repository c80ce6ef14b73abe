"""Trackers that write files, or to a server of the user's.

TensorBoard, MLflow and DagsHub with it, Trackio, DVCLive, CodeCarbon.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trainkit.trainer.secrets import without_secrets
from trainkit.trainer.tracker_names import is_set
from trainkit.trainer.tracker_services import (
    SUMMARY,
    Moment,
    Service,
    numbers,
    rewrite_logs,
    run_config,
    save_model,
)


def _tensorboard_start(_: Any, moment: Moment) -> Any:
    # torch's writer, where tensorboard is installed; tensorboardX has the same.
    home = "torch.utils.tensorboard" if find_spec("tensorboard") is not None else "tensorboardX"
    folder = moment.args.logging_dir
    if moment.state.is_hyper_param_search and moment.state.trial_name is not None:
        folder = os.path.join(folder, moment.state.trial_name)
    return import_module(home).SummaryWriter(log_dir=folder)


def _tensorboard_describe(writer: Any, moment: Moment, config: dict[str, Any]) -> None:
    writer.add_text("args", moment.args.to_json_string())
    model_config = getattr(moment.model, "config", None)
    if model_config is not None:
        to_text = getattr(model_config, "to_json_string", None)
        writer.add_text("model_config", json.dumps(model_config, default=str) if to_text is None else to_text())


def _tensorboard_log(writer: Any, logs: dict[str, Any], moment: Moment) -> None:
    texts = {name: value for name, value in logs.items() if isinstance(value, str)}
    scalars = numbers({name: value for name, value in logs.items() if name not in texts}, "TensorBoard")
    for name, value in rewrite_logs(scalars).items():
        writer.add_scalar(name, value, moment.state.global_step)
    for name, text in rewrite_logs(texts).items():
        writer.add_text(name, text, moment.state.global_step)
    writer.flush()


TENSORBOARD = Service(
    packages=("tensorboard", "tensorboardX"),
    install="tensorboard",
    start=_tensorboard_start,
    describe=_tensorboard_describe,
    log=_tensorboard_log,
    finish=lambda writer: writer.close(),
)


@dataclass(frozen=True)
class _MlflowRun:
    mlflow: Any
    run_id: str
    ours: bool


def _mlflow_start(before: _MlflowRun | None, moment: Moment) -> _MlflowRun:
    if before is not None:
        # What is logged names its run, which need not be the active one.
        return replace(before, ours=False)
    mlflow = import_module("mlflow")
    uri, nested = os.environ.get("MLFLOW_TRACKING_URI"), is_set("MLFLOW_NESTED_RUN")
    if uri and not mlflow.is_tracking_uri_set():
        mlflow.set_tracking_uri(uri)
    run_id = os.environ.get("MLFLOW_RUN_ID")
    active = mlflow.active_run()
    if active is not None and not nested and not run_id:
        return _MlflowRun(mlflow, active.info.run_id, ours=False)
    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME")
    if experiment:
        mlflow.set_experiment(experiment)
    run = mlflow.start_run(run_id=run_id, run_name=moment.args.run_name, nested=nested)
    return _MlflowRun(mlflow, run.info.run_id, ours=True)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found.update(_flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value})
    return found


def _mlflow_describe(run: _MlflowRun, moment: Moment, config: dict[str, Any]) -> None:
    limits = import_module("mlflow.utils.validation")
    longest, per_call = limits.MAX_PARAM_VAL_LENGTH, limits.MAX_PARAMS_TAGS_PER_BATCH
    params = _flat(config) if is_set("MLFLOW_FLATTEN_PARAMS") else config
    long = sorted(name for name, value in params.items() if len(str(value)) > longest)
    if long:
        warnings.warn(
            f"args: MLflow takes values of at most {longest} characters, so these are left out: {long}; "
            "MLFLOW_FLATTEN_PARAMS=1 logs nested ones one by one",
            UserWarning,
            stacklevel=2,
        )
    items = [(name, value) for name, value in params.items() if name not in long]
    most = os.environ.get("MLFLOW_MAX_LOG_PARAMS", "")
    items = items[: int(most)] if most.isdigit() else items
    for start in range(0, len(items), per_call):
        run.mlflow.log_params(dict(items[start : start + per_call]), run_id=run.run_id)
    if tags := os.environ.get("MLFLOW_TAGS"):
        run.mlflow.set_tags(json.loads(tags))


def _mlflow_log(run: _MlflowRun, logs: dict[str, Any], moment: Moment) -> None:
    taken = {re.sub(r"[^0-9A-Za-z_\-\. :/]", "_", k): v for k, v in numbers(logs, "MLflow").items()}
    run.mlflow.log_metrics(taken, step=moment.state.global_step, run_id=run.run_id, synchronous=False)


def _mlflow_save(run: _MlflowRun, moment: Moment) -> None:
    if is_set("HF_MLFLOW_LOG_ARTIFACTS"):
        folder = moment.checkpoint()
        run.mlflow.log_artifacts(str(folder), artifact_path=folder.name, run_id=run.run_id)


def _mlflow_finish(run: _MlflowRun) -> None:
    run.mlflow.flush_async_logging()
    if run.ours and run.mlflow.active_run() is not None:
        run.mlflow.end_run()


def _dagshub_start(before: _MlflowRun | None, moment: Moment) -> _MlflowRun:
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        raise RuntimeError("MLFLOW_TRACKING_URI: DagsHub needs it, it is not set; call dagshub.init() first")
    return _mlflow_start(before, moment)


def _dagshub_complete(run: _MlflowRun, moment: Moment) -> None:
    if is_set("HF_DAGSHUB_LOG_ARTIFACTS"):
        owner, name = os.environ["MLFLOW_TRACKING_URI"].rstrip("/").split("/")[-2:]
        repo = import_module("dagshub.upload").Repo(
            owner=owner, name=name.split(".")[0], branch=os.environ.get("BRANCH") or "main"
        )
        repo.directory("artifacts").add_dir(moment.args.output_dir)


MLFLOW = Service(
    packages=("mlflow",),
    install="mlflow",
    start=_mlflow_start,
    describe=_mlflow_describe,
    log=_mlflow_log,
    save=_mlflow_save,
    finish=_mlflow_finish,
)
DAGSHUB = Service(
    packages=("dagshub",),
    install="dagshub mlflow",
    start=_dagshub_start,
    describe=_mlflow_describe,
    log=_mlflow_log,
    save=_mlflow_save,
    complete=_dagshub_complete,
    finish=_mlflow_finish,
)


def _trackio_start(before: Any, moment: Moment) -> Any:
    args = moment.args
    return import_module("trackio").init(
        project=args.project,
        name=args.run_name if before is None else before.name,
        space_id=args.trackio_space_id,
        resume="allow",
        private=args.hub_private_repo,
        # Taken at the beginning only: what is put into the configuration later is not stored.
        config=run_config(args, moment.model),
    )


def _trackio_log(run: Any, logs: dict[str, Any], moment: Moment) -> None:
    series = {name: value for name, value in logs.items() if name not in SUMMARY}
    run.log({**rewrite_logs(series), "train/global_step": moment.state.global_step})


TRACKIO = Service(
    packages=("trackio",),
    install="trackio",
    start=_trackio_start,
    log=_trackio_log,
    finish=lambda run: run.finish(),
)


def _dvclive_start(before: Any, moment: Moment) -> Any:
    # A second run in one folder would delete what the first has written.
    return import_module("dvclive").Live(resume=before is not None)


def _dvclive_log(live: Any, logs: dict[str, Any], moment: Moment) -> None:
    rename = import_module("dvclive.utils").standardize_metric_name
    for name, value in numbers(logs, "DVCLive").items():
        live.log_metric(rename(name, "dvclive.huggingface"), value)
    live.next_step()


def _dvclive_save(live: Any, moment: Moment) -> None:
    if os.environ.get("HF_DVCLIVE_LOG_MODEL", "").lower() == "all":
        live.log_artifact(moment.args.output_dir)


def _dvclive_complete(live: Any, moment: Moment) -> None:
    if is_set("HF_DVCLIVE_LOG_MODEL"):
        name = "best" if moment.args.load_best_model_at_end else "last"
        folder = Path(moment.args.output_dir) / name
        save_model(moment, folder)
        live.log_artifact(str(folder), name=name, type="model", copy=True)


DVCLIVE = Service(
    packages=("dvclive",),
    install="dvclive",
    start=_dvclive_start,
    describe=lambda live, moment, config: live.log_params(without_secrets(moment.args.to_dict())),
    log=_dvclive_log,
    save=_dvclive_save,
    complete=_dvclive_complete,
    finish=lambda live: live.end(),
)


def _codecarbon_start(_: Any, moment: Moment) -> Any:
    tracker = import_module("codecarbon").EmissionsTracker(output_dir=moment.args.output_dir)
    tracker.start()
    return tracker


CODECARBON = Service(
    packages=("codecarbon",),
    install="codecarbon",
    start=_codecarbon_start,
    finish=lambda tracker: tracker.stop(),
    per_machine=True,
)
