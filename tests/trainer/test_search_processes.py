"""Searches whose trials run in several processes, or are proposed by a server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.tiny import Net, make_rows
from trainkit.trainer.arguments import TrainingArguments
from trainkit.trainer.trainer import Trainer

ROOT = Path(__file__).parents[2]

TOGETHER = """
import json, sys
import optuna
from tests.trainer.tiny import Net, make_rows
from trainkit.trainer.arguments import TrainingArguments
from trainkit.trainer.trainer import Trainer


class PruneSecond(optuna.pruners.BasePruner):
    def prune(self, study, trial):
        return trial.number == 1


class Watching(Trainer):
    def get_train_dataloader(self):
        seen.append(self.args.learning_rate)
        if len(seen) in (3, 5):
            raise ArithmeticError("diverged")
        return super().get_train_dataloader()


seen = []
folder = sys.argv[1]
args = TrainingArguments(
    folder, report_to="none", use_cpu=True, max_steps=2, save_strategy="no", eval_strategy="steps", eval_steps=1
)
rows = make_rows(12)
trainer = Watching(model_init=lambda: Net(), args=args, train_dataset=rows, eval_dataset=rows)
best = trainer.hyperparameter_search(
    lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 0.1)},
    n_trials=5, pruner=PruneSecond(), sampler=optuna.samplers.RandomSampler(seed=0), catch=ArithmeticError,
)
trainer.train()
found = {"best": best and best.hyperparameters, "seen": seen, "loss": trainer.evaluate()["eval_loss"]}
with open(f"{folder}-{args.process_index}.json", "w") as file:
    json.dump(found, file)
"""


@pytest.mark.slow
def test_processes_train_each_trial_together(tmp_path: Path) -> None:
    script = tmp_path / "search.py"
    script.write_text(TOGETHER)
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(script),
        str(tmp_path / "out"),
    ]
    subprocess.run([sys.executable, *command], check=True, timeout=300, cwd=ROOT, env=environment())
    first, second = (json.loads((tmp_path / f"out-{rank}.json").read_text()) for rank in (0, 1))
    # Five trials, the second of which both leave early, while the third and the last fail in both; and a run with the
    # rate of before.
    assert first["seen"] == second["seen"] and len(set(first["seen"])) == 6 and first["seen"][-1] == 5e-5
    assert first["best"]["learning_rate"] in (first["seen"][0], first["seen"][3])
    assert second["best"] is None and first["loss"] == second["loss"]


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def make_trainer(folder: Path, **options: Any) -> Trainer:
    args = TrainingArguments(
        str(folder), report_to="none", use_cpu=True, max_steps=2, save_strategy="no", disable_tqdm=False, **options
    )
    return Trainer(model_init=init_net, args=args, train_dataset=make_rows(12), eval_dataset=make_rows(5))


def init_net() -> Net:
    return Net()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_ray_trains_each_trial_in_a_process_of_its_own(tmp_path: Path) -> None:
    tune = pytest.importorskip("ray.tune")
    import ray

    ray.init(
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": environment()["PYTHONPATH"]}},
    )
    try:
        trainer = make_trainer(tmp_path / "out", eval_strategy="steps", eval_steps=1)
        before = trainer.args.to_dict()
        best = trainer.hyperparameter_search(
            lambda _: {"learning_rate": tune.grid_search([1e-4, 0.1])},
            n_trials=1,
            backend="ray",
            storage_path=str(tmp_path / "store"),
        )
    finally:
        ray.shutdown()
    assert not isinstance(best, list)
    assert best.hyperparameters == {"learning_rate": 0.1}
    reported = best.run_summary.trial_dataframes[best.run_id]["objective"]
    assert len(reported) == 2 and best.objective == reported.iloc[-1]
    assert trainer.args.to_dict() == before and isinstance(trainer.model, Net)


class ServedRun:
    """A run of the stand-in: keeps what is logged."""

    def __init__(self, name: str, config: dict[str, Any]) -> None:
        self.id, self.name, self.config = name, name, ServedConfig(config)
        self.summary: dict[str, Any] = {}
        self.logs: list[dict[str, Any]] = []

    def define_metric(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log(self, logs: dict[str, Any], **kwargs: Any) -> None:
        self.logs.append(logs)


class ServedConfig(dict[str, Any]):
    """What the server proposes; what the run says of itself beside it is not kept."""

    def update(self, *args: Any, **kwargs: Any) -> None:
        pass


class Server(types.ModuleType):
    """What of wandb a sweep needs; the server proposes the rates that it was made with."""

    def __init__(self, rates: list[float]) -> None:
        super().__init__("wandb")
        self.rates = rates
        self.runs: list[ServedRun] = []
        self.sweeps: list[Any] = []

    @property
    def run(self) -> ServedRun:
        return self.runs[-1]

    @property
    def config(self) -> ServedConfig:
        return self.run.config

    def sweep(self, space: dict[str, Any], project: str | None, entity: str | None) -> str:
        self.sweeps.append((space, project, entity))
        return "sweep-1"

    def agent(self, sweep_id: str, function: Any, count: int, **options: Any) -> None:
        for i, rate in enumerate(self.rates[:count]):
            self.runs.append(ServedRun(f"{sweep_id}/{i}", {"learning_rate": rate}))
            function()

    def define_metric(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log(self, logs: dict[str, Any], **kwargs: Any) -> None:
        self.run.log(logs)


def test_a_sweep_runs_what_the_server_proposes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server([1e-4, 0.1, 1e-3])
    server.__spec__ = sys.__spec__
    monkeypatch.setitem(sys.modules, "wandb", server)
    trainer = make_trainer(tmp_path)
    before, callbacks = dict(vars(trainer.args)), list(trainer.callback_handler.callbacks)
    best = trainer.hyperparameter_search(n_trials=3, backend="wandb", project="p", name="n", metric="eval/f1")
    assert not isinstance(best, list)
    assert best.hyperparameters == {"learning_rate": 0.1}
    assert (best.run_id, best.run_summary) == ("sweep-1/1", "sweep-1")
    ((space, project, _),) = server.sweeps
    assert (project, space["name"], space["metric"]) == ("p", "n", {"name": "eval/f1", "goal": "minimize"})
    assert all(any("train/train_loss" in logs or run.summary for logs in run.logs) for run in server.runs)
    assert vars(trainer.args) == before and trainer.callback_handler.callbacks == callbacks
    best = trainer.hyperparameter_search(n_trials=2, backend="wandb", sweep_id="mine", direction="maximize")
    assert not isinstance(best, list)
    assert best.hyperparameters == {"learning_rate": 1e-4} and len(server.sweeps) == 1
