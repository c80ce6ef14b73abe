"""Hyperparameter search: parameters, folders, objectives, and studies of Optuna with real training."""

from __future__ import annotations

import gc
import time
import weakref
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from transformers.trainer_utils import default_compute_objective
from transformers.trainer_utils import default_hp_space_optuna as peer_space

from tests.trainer.tiny import Net, make_net, make_rows
from trainkit.trainer import search, search_optuna
from trainkit.trainer.arguments import TrainingArguments
from trainkit.trainer.enums import HPSearchBackend
from trainkit.trainer.search_parameters import as_declared
from trainkit.trainer.trainer import Trainer

optuna.logging.set_verbosity(optuna.logging.WARNING)


def make_args(folder: Any = "out", **options: Any) -> TrainingArguments:
    defaults = {"report_to": "none", "use_cpu": True, "disable_tqdm": False, "save_strategy": "no"}
    return TrainingArguments(str(folder), **{**defaults, **options})


# -- parameters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("declared", "value", "expected"),
    [
        (bool, "False", False),
        (bool, "true", True),
        (bool, 1, True),
        (bool, np.bool_(False), False),
        (int, "12", 12),
        (int, 12.0, 12),
        (int, np.int64(3), 3),
        (float, "1e-4", 1e-4),
        (float, 3, 3.0),
        (float, np.float32(0.5), 0.5),
        (float | None, "0.5", 0.5),
        (float | None, None, None),
        (int | None, "7", 7),
        (str | None, "x", "x"),
        (str | bool, "all", "all"),
        (None | str | list[str], ["a"], ["a"]),
        (dict[str, Any] | str, {"a": 1}, {"a": 1}),
        (Any, 5, 5),
    ],
)
def test_a_value_is_read_as_its_field_is_declared(declared: Any, value: Any, expected: Any) -> None:
    found = as_declared("field", value, declared)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("declared", "value", "message"),
    [
        (bool, "maybe", "field: got 'maybe', expected bool"),
        (bool, 2, "field: got 2, expected bool"),
        (int, "many", "field: got 'many', expected int"),
        (int, float("inf"), "expected int"),
        (float | None, "fast", "field: got 'fast', expected float or None"),
        (float, True, "field: got True, expected float"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(declared: Any, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_declared("field", value, declared)
    with pytest.raises(TypeError, match="field: got None"):
        as_declared("field", None, int)


def test_a_fraction_for_an_integer_is_cut_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"seed: got 17\.3 for an integer, which becomes 17"):
        assert as_declared("seed", 17.3, int) == 17


def test_parameters_are_set_and_checked_again() -> None:
    args = make_args()
    search.apply_parameters(args, {"learning_rate": "1e-3", "bf16": "False", "lr_scheduler_type": "cosine"})
    assert (args.learning_rate, args.bf16, args.lr_scheduler_type.name) == (1e-3, False, "COSINE")


@pytest.mark.parametrize("bad", [{"learning_rate": -1.0}, {"optim": "fast"}, {"gradient_accumulation_steps": 0}])
def test_what_the_arguments_refuse_changes_nothing(bad: dict[str, Any]) -> None:
    args = make_args()
    before = dict(vars(args))
    with pytest.raises(ValueError, match=r"learning_rate|OptimizerNames|gradient_accumulation_steps"):
        search.apply_parameters(args, {"seed": 3, **bad})
    assert vars(args) == before


def test_unknown_names_are_left_out_with_one_warning() -> None:
    args = make_args()
    with pytest.warns(UserWarning, match="hidden_size, layers: no field of TrainingArguments") as told:
        search.apply_parameters(args, {"layers": 3, "seed": 7, "hidden_size": 5})
    assert len(told) == 1 and args.seed == 7 and not hasattr(args, "layers")


@dataclass
class OwnArguments(TrainingArguments):
    margin: float = 0.5
    checked: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.checked += 1


def test_fields_of_a_subclass_are_parameters_and_its_checks_run() -> None:
    args = OwnArguments("out", report_to="none")
    search.apply_parameters(args, {"margin": "0.25"})
    assert (args.margin, args.checked) == (0.25, 2)


def test_every_field_takes_back_the_value_that_it_has() -> None:
    args = make_args()
    values = {field.name: getattr(args, field.name) for field in fields(args) if field.init}
    search.apply_parameters(args, values)
    assert {name: getattr(args, name) for name in values} == values


# -- folders, objectives, libraries ------------------------------------------------------------------------------------


def test_the_folder_of_a_trial() -> None:
    trial = SimpleNamespace(number=2)
    assert search.run_folder("out", None, trial) == search.run_folder("out", "optuna", None) == "out"
    assert search.run_folder("out", "optuna", trial) == "out/run-2"
    assert search.run_folder("out", "optuna", trial, lambda t: f"lr/{t.number}") == "out/lr/2"
    for name in ("/elsewhere", "../up", "a/../../up"):
        with pytest.raises(ValueError, match="hp_name: got"):
            search.run_folder("out", "optuna", trial, lambda _, name=name: name)


SPEED = {"eval_runtime": 9.0, "eval_samples_per_second": 1.0, "eval_steps_per_second": 1.0, "epoch": 3.0}


@pytest.mark.parametrize("metrics", [{"eval_loss": 2.0}, {"eval_loss": 2.0, "eval_f1": 0.5, "eval_accuracy": 0.25}])
def test_the_default_objective_equals_that_of_the_peer(metrics: dict[str, float]) -> None:
    metrics = {**metrics, **SPEED}
    before = dict(metrics)
    assert search.default_objective(metrics) == default_compute_objective(metrics)
    assert metrics == before


def test_the_default_objective_counts_no_bookkeeping() -> None:
    extra = {"eval_model_preparation_time": 4.0, "eval_mem_cpu_alloc_delta": 10**9, "num_input_tokens_seen": 99}
    metrics = {"eval_loss": 2.0, **SPEED, **extra}
    assert default_compute_objective(metrics) > 10**9
    assert search.default_objective(metrics) == 2.0
    assert search.default_objective({**metrics, "eval_hinge_loss": 7.0}) == 7.0


def test_the_default_objective_of_several_data_sets_adds_up() -> None:
    metrics = {"eval_a_loss": 1.0, "eval_a_runtime": 5.0, "eval_b_loss": 2.0, "eval_b_runtime": 5.0}
    assert search.default_objective(metrics) == 3.0
    with pytest.raises(ValueError, match="expected a metric or eval_loss"):
        search.default_objective(SPEED)


def test_the_space_is_that_of_the_peer() -> None:
    params = {"learning_rate": 1e-5, "num_train_epochs": 2, "seed": 3, "per_device_train_batch_size": 16}
    trial = optuna.trial.FixedTrial(params)
    assert search.backend_of("optuna").default_space(trial) == peer_space(trial) == params


def test_libraries_are_found_by_name_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert search.backend_of(None).name == search.backend_of(HPSearchBackend.OPTUNA).name == "optuna"
    with pytest.raises(ValueError, match="HPSearchBackend: got 'hyperopt'"):
        search.backend_of("hyperopt")
    with pytest.raises(RuntimeError, match=r"sigopt.*use optuna"):
        search.backend_of("sigopt")
    monkeypatch.setattr(search.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="ray is not installed; pip install 'ray\\[tune\\]'"):
        search.backend_of("ray")
    with pytest.raises(RuntimeError, match="expected one of: optuna, ray, wandb"):
        search.backend_of(None)


def test_parameters_of_a_trial() -> None:
    trial = optuna.trial.FixedTrial({"lr": 0.5})
    assert search.parameters_of("optuna", trial, lambda t: {"learning_rate": t.suggest_float("lr", 0, 1)}) == {
        "learning_rate": 0.5
    }
    assert search.parameters_of("ray", {"seed": 1, "wandb": {}}, lambda _: {}) == {"seed": 1}
    with pytest.raises(TypeError, match="hp_space: it returned NoneType"):
        search.parameters_of("optuna", trial, lambda t: None)


def test_only_optuna_has_an_exception_for_pruned_trials() -> None:
    assert isinstance(search.pruned("optuna"), optuna.TrialPruned)
    with pytest.raises(ValueError, match="expected 'optuna'"):
        search.pruned("wandb")


# -- studies -----------------------------------------------------------------------------------------------------------


def init_net() -> Net:
    return Net()


def make_trainer(folder: Path, **options: Any) -> Trainer:
    args = make_args(folder, max_steps=3, per_device_train_batch_size=4, **options)
    rows = make_rows(12)
    return Trainer(model_init=init_net, args=args, train_dataset=rows, eval_dataset=rows[:5])


def rates(trial: optuna.Trial) -> dict[str, Any]:
    return {"learning_rate": trial.suggest_categorical("learning_rate", [1e-4, 0.1, 1e-3])}


def grid(**values: Any) -> dict[str, Any]:
    return {"sampler": optuna.samplers.GridSampler(values, seed=0)}


def loss_of(folder: Path, rate: float) -> float:
    """What a run with one rate reaches."""
    trainer = make_trainer(folder, learning_rate=rate)
    trainer.train()
    return trainer.evaluate()["eval_loss"]


def test_a_search_returns_the_trial_that_is_best_when_run_alone(tmp_path: Path) -> None:
    values = [1e-4, 0.1, 1e-3]
    expected = {rate: loss_of(tmp_path / "alone", rate) for rate in values}
    trainer = make_trainer(tmp_path / "search", save_strategy="steps", save_steps=3)
    best = trainer.hyperparameter_search(rates, n_trials=3, backend="optuna", **grid(learning_rate=values))
    assert best.hyperparameters == {"learning_rate": min(expected, key=expected.__getitem__)}
    assert best.objective == pytest.approx(min(expected.values()), rel=1e-6)
    assert best.run_summary is None
    folders = sorted(path.relative_to(tmp_path / "search").as_posix() for path in (tmp_path / "search").glob("*/*"))
    assert folders == [f"run-{i}/checkpoint-3" for i in range(3)]
    assert int(best.run_id) in range(3)


def test_after_a_search_the_trainer_is_as_before(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    before = dict(vars(trainer.args))
    trainer.hyperparameter_search(rates, n_trials=2, **grid(learning_rate=[1e-4, 0.1]))
    assert vars(trainer.args) == before
    assert isinstance(trainer.model, Net) and trainer.hp_search_backend is None
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss_of(tmp_path / "alone", trainer.args.learning_rate))
    assert trainer._get_output_dir(None) == str(tmp_path)


def test_after_a_search_labels_are_smoothed_as_before(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.hyperparameter_search(lambda trial: {"label_smoothing_factor": 0.5}, n_trials=1)
    assert trainer.label_smoother is None


def test_a_search_that_fails_leaves_the_trainer_as_before(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    before = dict(vars(trainer.args))

    def space(trial: optuna.Trial) -> dict[str, Any]:
        return {"learning_rate": -1.0, "seed": 9}

    with pytest.raises(ValueError, match="learning_rate: got -1"):
        trainer.hyperparameter_search(space, n_trials=1)
    assert vars(trainer.args) == before and isinstance(trainer.model, Net)
    assert trainer.hp_search_backend is None and not trainer.is_in_train
    assert trainer.train().global_step == 3


def test_a_trial_does_not_see_what_another_one_set(tmp_path: Path) -> None:
    seen = []

    class Watching(Trainer):
        def get_train_dataloader(self) -> Any:
            seen.append((self.args.learning_rate, self.args.weight_decay))
            return super().get_train_dataloader()

    def space(trial: optuna.Trial) -> dict[str, Any]:
        return {"weight_decay": 0.5} if trial.number == 0 else {"learning_rate": 0.25}

    args = make_args(tmp_path, max_steps=1, learning_rate=0.125)
    rows = make_rows(4)
    trainer = Watching(model_init=init_net, args=args, train_dataset=rows, eval_dataset=rows)
    trainer.hyperparameter_search(space, n_trials=2)
    assert seen == [(0.125, 0.5), (0.25, 0.0)]


def test_no_two_models_are_there_at_once(tmp_path: Path) -> None:
    alive: list[weakref.ref[Net]] = []
    most = []

    def init() -> Net:
        gc.collect()
        most.append(sum(ref() is not None for ref in alive))
        net = make_net()
        alive.append(weakref.ref(net))
        return net

    rows = make_rows(4)
    args = make_args(tmp_path, max_steps=1)
    trainer = Trainer(model_init=init, args=args, train_dataset=rows, eval_dataset=rows)
    trainer.hyperparameter_search(rates, n_trials=3)
    assert len(most) == 5 and max(most) == 0


def test_several_directions_give_the_trials_that_none_beats(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    found = trainer.hyperparameter_search(
        rates,
        compute_objective=lambda metrics: [metrics["eval_loss"], trainer.args.learning_rate],
        direction=["minimize", "minimize"],
        n_trials=3,
        **grid(learning_rate=[1e-4, 0.1, 1e-3]),
    )
    assert isinstance(found, list)
    points = {run.hyperparameters["learning_rate"]: run.objective for run in found}
    assert 1e-4 in points and all(isinstance(value, list) and len(value) == 2 for value in points.values())
    assert all(a[0] < b[0] or a[1] < b[1] for a in points.values() for b in points.values() if a is not b)


class PruneFrom(optuna.pruners.BasePruner):
    """Prunes every trial but the first at its first report."""

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        return trial.number > 0


def test_a_pruned_trial_ends_at_its_evaluation_and_tells_the_callbacks(tmp_path: Path) -> None:
    from trainkit.trainer.callbacks import TrainerCallback

    ends = []

    class Watch(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ends.append(state.global_step)

    trainer = make_trainer(tmp_path, eval_strategy="steps", eval_steps=1)
    trainer.add_callback(Watch())
    best = trainer.hyperparameter_search(rates, n_trials=3, pruner=PruneFrom())
    assert ends == [3, 1, 1] and best.run_id == "0"
    assert isinstance(trainer.model, Net) and not trainer.is_in_train


def test_a_search_without_a_finished_trial_says_so(tmp_path: Path) -> None:
    class All(PruneFrom):
        def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
            return True

    trainer = make_trainer(tmp_path, eval_strategy="steps", eval_steps=1)
    with pytest.raises(RuntimeError, match="no trial came to its end with a value; trials: 0 pruned, 1 pruned"):
        trainer.hyperparameter_search(rates, n_trials=2, pruner=All())


def test_options_reach_the_study_and_its_optimisation(tmp_path: Path) -> None:
    told: list[str] = []

    def slow(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        told.append(study.study_name)
        time.sleep(0.5)

    trainer = make_trainer(tmp_path)
    best = trainer.hyperparameter_search(
        rates,
        n_trials=5,
        direction="maximize",
        timeout=0.5,
        gc_after_trial=True,
        study_name="named",
        callbacks=[slow],
    )
    # The time is over after the first trial.
    assert told == ["named"] and best.run_id == "0"
    with pytest.raises(ValueError, match="n_jobs: got 2, expected 1"):
        trainer.hyperparameter_search(rates, n_trials=1, n_jobs=2)


def test_errors_that_the_study_catches_do_not_end_the_search(tmp_path: Path) -> None:
    def space(trial: optuna.Trial) -> dict[str, Any]:
        return {"learning_rate": -1.0 if trial.number != 1 else 0.1}

    best = make_trainer(tmp_path).hyperparameter_search(space, n_trials=3, catch=ValueError)
    assert best.run_id == "1"


def test_a_search_needs_model_init(tmp_path: Path) -> None:
    trainer = Trainer(make_net(), make_args(tmp_path), train_dataset=make_rows(4))
    with pytest.raises(RuntimeError, match="model_init"):
        trainer.hyperparameter_search(rates)


def test_reports_go_to_the_study_with_their_step() -> None:
    study = optuna.create_study(pruner=PruneFrom())
    first, second = study.ask(), study.ask()
    assert not search.should_prune("optuna", first, 0.5, 10)
    assert search.should_prune("optuna", second, 0.25, 20)
    reported = [trial.intermediate_values for trial in study.get_trials(deepcopy=False)]
    assert reported == [{10: 0.5}, {20: 0.25}]
    several = optuna.create_study(directions=["minimize", "minimize"]).ask()
    assert not search_optuna.should_prune(several, [1.0, 2.0], 1)


def test_torch_is_seeded_as_by_the_constructor(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.hyperparameter_search(rates, n_trials=1)
    assert torch.equal(trainer.model.first.weight, make_net(trainer.args.seed).first.weight)
