"""Trackers of a hosting service: Weights & Biases, SwanLab, Comet, ClearML, Neptune, Azure ML, Flyte."""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from trainkit.trainer.tracker_names import is_set
from trainkit.trainer.tracker_services import (
    SUMMARY,
    Moment,
    Service,
    as_dict,
    numbers,
    rewrite_logs,
    save_model,
    split_name,
)


@dataclass(frozen=True)
class _WandbRun:
    wandb: Any
    run: Any
    ours: bool


def _wandb_start(_: Any, moment: Moment) -> _WandbRun:
    wandb = import_module("wandb")
    args, trial = moment.args, moment.state.trial_name
    ours = wandb.run is None
    if ours:
        named = {"name": trial, "group": args.run_name or args.output_dir} if trial else {"name": args.run_name}
        wandb.init(project=os.environ.get("WANDB_PROJECT", "huggingface"), **named)
    run = wandb.run
    run.define_metric("train/global_step")
    run.define_metric("*", step_metric="train/global_step", step_sync=True)
    watched = os.environ.get("WANDB_WATCH", "false")
    if watched in ("all", "parameters", "gradients") and moment.model is not None:
        run.watch(moment.model, log=watched, log_freq=max(100, moment.state.logging_steps))
    return _WandbRun(wandb, run, ours)


def _wandb_log(session: _WandbRun, logs: dict[str, Any], moment: Moment) -> None:
    for name in SUMMARY:
        if name in logs:
            session.run.summary[name] = logs[name]
    series = {name: value for name, value in logs.items() if name not in SUMMARY}
    session.run.log({**rewrite_logs(series), "train/global_step": moment.state.global_step})


def _wandb_upload(session: _WandbRun, moment: Moment, folder: Path, aliases: list[str]) -> None:
    run, unnamed = session.run, moment.args.run_name in (None, moment.args.output_dir)
    summary = {k: v for k, v in dict(run.summary).items() if isinstance(v, (int, float)) and k[0] != "_"}
    name = re.sub(r"[^0-9A-Za-z_.-]", "_", f"model-{run.id if unnamed else run.name}")
    artifact = session.wandb.Artifact(name=name, type="model", metadata=summary)
    artifact.add_dir(str(folder))
    run.log_artifact(artifact, aliases=aliases)


def _wandb_save(session: _WandbRun, moment: Moment) -> None:
    if os.environ.get("WANDB_LOG_MODEL") == "checkpoint":
        epoch, step = round(moment.state.epoch or 0, 2), moment.state.global_step
        _wandb_upload(session, moment, moment.checkpoint(), [f"epoch_{epoch}", f"checkpoint_global_step_{step}"])


def _wandb_complete(session: _WandbRun, moment: Moment) -> None:
    if os.environ.get("WANDB_LOG_MODEL") in ("end", "checkpoint"):
        with tempfile.TemporaryDirectory() as above:
            folder = Path(above) / "model"
            save_model(moment, folder)
            _wandb_upload(session, moment, folder, ["final_model"])


WANDB = Service(
    packages=("wandb",),
    install="wandb",
    start=_wandb_start,
    describe=lambda session, moment, config: session.run.config.update(config, allow_val_change=True),
    log=_wandb_log,
    save=_wandb_save,
    complete=_wandb_complete,
    # A run of a sweep or of the user's own is theirs to end.
    finish=lambda session: session.run.finish() if session.ours else None,
    stays_open=True,
)


def _swanlab_start(_: Any, moment: Moment) -> Any:
    swanlab = import_module("swanlab")
    if not swanlab.has_run():
        names = [name for name in (moment.args.run_name, moment.state.trial_name) if name is not None]
        swanlab.init(project=os.environ.get("SWANLAB_PROJECT"), experiment_name="-".join(names) or None)
    return swanlab


def _swanlab_log(swanlab: Any, logs: dict[str, Any], moment: Moment) -> None:
    step = moment.state.global_step
    once = {f"single_value/{name}": logs[name] for name in SUMMARY if name in logs}
    series = {name: value for name, value in logs.items() if name not in SUMMARY}
    swanlab.log({**once, **rewrite_logs(series), "train/global_step": step}, step=step)


SWANLAB = Service(
    packages=("swanlab",),
    install="swanlab",
    start=_swanlab_start,
    describe=lambda swanlab, moment, config: swanlab.config.update(config),
    log=_swanlab_log,
    finish=lambda swanlab: swanlab.finish(),
    stays_open=True,
)


def _comet_start(_: Any, moment: Moment) -> Any:
    comet_ml = import_module("comet_ml")
    wanted = os.environ.get("COMET_MODE", "").lower()
    online = {"online": True, "offline": False}.get(wanted)
    mode = wanted if wanted in ("get", "get_or_create", "create") else None
    if wanted and online is None and mode is None:
        raise ValueError(f"COMET_MODE: got {wanted!r}, expected get, get_or_create, create, online or offline")
    experiment = comet_ml.start(
        online=online,
        # Each trial of a search is an experiment of its own.
        mode="create" if moment.state.is_hyper_param_search else mode,
        experiment_config=comet_ml.ExperimentConfig(name=moment.args.run_name),
    )
    if moment.state.is_hyper_param_search:
        experiment.log_optimization(optimization_id=moment.state.trial_name, parameters=moment.state.trial_params)
    return experiment


def _comet_log(experiment: Any, logs: dict[str, Any], moment: Moment) -> None:
    experiment.log_metrics(rewrite_logs(logs), step=moment.state.global_step, epoch=moment.state.epoch)


def _comet_complete(experiment: Any, moment: Moment) -> None:
    if is_set("COMET_LOG_ASSETS"):
        step = moment.state.global_step
        experiment.log_asset_folder(moment.args.output_dir, recursive=True, log_file_name=True, step=step)


COMET = Service(
    packages=("comet_ml",),
    install="comet-ml",
    start=_comet_start,
    describe=lambda experiment, moment, config: experiment.log_parameters(config),
    log=_comet_log,
    complete=_comet_complete,
    finish=lambda experiment: experiment.end(),
    stays_open=True,
)


@dataclass(frozen=True)
class _ClearmlTask:
    task: Any
    ours: bool


def _clearml_start(_: Any, moment: Moment) -> _ClearmlTask:
    kind = import_module("clearml").Task
    current = kind.current_task()
    if current is not None:
        return _ClearmlTask(current, ours=False)
    task = kind.init(
        project_name=os.environ.get("CLEARML_PROJECT", "HuggingFace Transformers"),
        task_name=os.environ.get("CLEARML_TASK", "Trainer"),
        auto_connect_frameworks={"tensorboard": False, "pytorch": False},
        output_uri=True,
        # A task that is used again forgets what it was told: that would be the trial before.
        reuse_last_task_id=not moment.state.is_hyper_param_search,
    )
    return _ClearmlTask(task, ours=True)


def _clearml_log(run: _ClearmlTask, logs: dict[str, Any], moment: Moment) -> None:
    logger = run.task.get_logger()
    for name, value in numbers(logs, "ClearML").items():
        if name in SUMMARY or name == "epoch":
            logger.report_single_value(name=name, value=value)
        else:
            title, series = split_name(name)
            logger.report_scalar(title=title, series=series, value=value, iteration=moment.state.global_step)


def _clearml_save(run: _ClearmlTask, moment: Moment) -> None:
    if is_set("CLEARML_LOG_MODEL", "TRUE" if run.ours else "FALSE"):
        folder = moment.checkpoint()
        model = import_module("clearml").OutputModel(task=run.task, name=folder.name)
        model.update_weights_package(
            weights_path=str(folder),
            target_filename=folder.name,
            iteration=moment.state.global_step,
            auto_delete_file=False,
        )


CLEARML = Service(
    packages=("clearml",),
    install="clearml",
    start=_clearml_start,
    describe=lambda run, moment, config: run.task.set_parameters_as_dict({"Transformers": config}),
    log=_clearml_log,
    save=_clearml_save,
    finish=lambda run: run.task.close() if run.ours else None,
    stays_open=True,
)


def _neptune_start(_: Any, moment: Moment) -> Any:
    return import_module("neptune").init_run(name=moment.args.run_name)


def _neptune_describe(run: Any, moment: Moment, config: dict[str, Any]) -> None:
    plain = import_module("neptune.utils").stringify_unsupported
    run["finetuning/trainer_parameters"] = plain(moment.args.to_sanitized_dict())
    model_config = getattr(moment.model, "config", None)
    if model_config is not None:
        run["finetuning/model_parameters"] = plain(as_dict(model_config))
    if moment.state.is_hyper_param_search:
        run["finetuning/trial"] = moment.state.trial_name
        run["finetuning/trial_params"] = plain(moment.state.trial_params or {})


def _neptune_log(run: Any, logs: dict[str, Any], moment: Moment) -> None:
    for name, value in rewrite_logs(numbers(logs, "Neptune")).items():
        if name == "train/epoch":
            run["finetuning/train/epoch"] = value
        else:
            run[f"finetuning/{name}"].append(value, step=moment.state.global_step)


NEPTUNE = Service(
    packages=("neptune",),
    install="neptune",
    start=_neptune_start,
    describe=_neptune_describe,
    log=_neptune_log,
    finish=lambda run: run.stop(),
    stays_open=True,
)


def _azure_start(before: Any, moment: Moment) -> Any:
    return import_module("azureml.core.run").Run.get_context() if before is None else before


def _azure_log(run: Any, logs: dict[str, Any], moment: Moment) -> None:
    for name, value in numbers(logs, "Azure ML").items():
        run.log(name, value, description=name)


AZURE_ML = Service(packages=("azureml",), install="azureml-sdk", start=_azure_start, log=_azure_log, stays_open=True)


def _flyte_start(_: Any, moment: Moment) -> Any:
    return import_module("flytekit").current_context().checkpoint


def _flyte_complete(checkpoint: Any, moment: Moment) -> None:
    table = import_module("flytekitplugins.deck.renderer").TableRenderer()
    rows = import_module("pandas").DataFrame(moment.state.log_history)
    import_module("flytekit").Deck("Log History", table.to_html(rows))


FLYTE = Service(
    packages=("flytekit",),
    install="flytekit flytekitplugins-deck-standard pandas",
    start=_flyte_start,
    save=lambda checkpoint, moment: checkpoint.save(str(moment.checkpoint())),
    complete=_flyte_complete,
)
