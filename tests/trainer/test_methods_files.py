"""What each method of the Trainer does, continued: files, callbacks, search, devices, utilities, the hub."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from torch import nn

from tests.trainer.pairs import Pair, ours
from tests.trainer.scenarios import accuracy, make_gpt2, make_tokenizer, make_words, word_rows
from tests.trainer.stand_in_hub import StandInHub
from tests.trainer.tiny import make_net, make_rows
from trainkit.io.checkpoint import CheckpointError
from trainkit.trainer.callbacks import TrainerCallback
from trainkit.trainer.outputs import BestRun

optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


def names(folder: Any) -> set[str]:
    # The arguments are JSON here and a pickle there; the list of files is trainkit's.
    found = {p.name for p in Path(folder).iterdir() if p.is_file()} - {"manifest.json"}
    return {"training_args" if name.startswith("training_args.") else name for name in found}


def assert_same_model(one: nn.Module, other: nn.Module) -> None:
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


# -- 6. saving and loading -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [True, False])
def test_save_model(safe: bool, tmp_path: Path) -> None:
    pair = Pair(tmp_path, {"save_safetensors": safe})
    for trainer in pair.all:
        trainer.save_model()
    assert pair.same(lambda t: names(t.args.output_dir)) == {
        "model.safetensors" if safe else "pytorch_model.bin",
        "training_args",
    }


def test_save_model_of_transformers_with_its_tokenizer(tmp_path: Path) -> None:
    pair = Pair(tmp_path, make=make_gpt2, processing_class=make_tokenizer())
    for trainer in pair.all:
        trainer.save_model(str(tmp_path / type(trainer).__module__))
    folders = [tmp_path / type(trainer).__module__ for trainer in pair.all]
    assert names(folders[0]) == names(folders[1])
    loaded = type(pair.ours.model).from_pretrained(folders[0])
    assert_same_model(loaded, pair.ours.model)


def test_a_checkpoint_and_its_parts(tmp_path: Path) -> None:
    pair = Pair(tmp_path).train()
    for trainer in pair.all:
        trainer._save_checkpoint(trainer.model, None)
    folders = [Path(t.args.output_dir) / "checkpoint-12" for t in pair.all]
    assert names(folders[0]) == names(folders[1])
    states = [json.loads((folder / "trainer_state.json").read_text()) for folder in folders]
    assert states[0].keys() >= states[1].keys()
    for trainer in pair.all:
        other = tmp_path / f"parts-{type(trainer).__module__}"
        other.mkdir()
        trainer._save_optimizer_and_scheduler(str(other))
        trainer._save_rng_state(str(other))
        trainer._save_scaler(str(other))
        assert names(other) == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}


def test_weights_of_a_checkpoint(tmp_path: Path) -> None:
    trainer = ours(tmp_path)
    trainer.save_model(str(tmp_path / "saved"))
    other = ours(tmp_path, model=make_net(seed=1))
    other._load_from_checkpoint(str(tmp_path / "saved"))
    assert_same_model(other.model, trainer.model)
    third = make_net(seed=2)
    other._load_from_checkpoint(str(tmp_path / "saved"), model=third)
    assert_same_model(third, trainer.model)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no weights"):
        other._load_from_checkpoint(str(tmp_path / "empty"))


def test_optimizer_and_scheduler_are_loaded_as_they_were_saved(tmp_path: Path) -> None:
    trainer = ours(tmp_path / "a", {"max_steps": 3})
    trainer.train()
    (tmp_path / "saved").mkdir()
    trainer._save_optimizer_and_scheduler(str(tmp_path / "saved"))
    other = ours(tmp_path / "b", {"max_steps": 3})
    other.create_optimizer_and_scheduler(3)
    other._load_optimizer_and_scheduler(None)
    assert not other.optimizer.state
    other._load_optimizer_and_scheduler(str(tmp_path / "saved"))
    torch.testing.assert_close(
        other.optimizer.state_dict()["state"], trainer.optimizer.state_dict()["state"], rtol=0, atol=0
    )
    assert other.lr_scheduler.last_epoch == 3


def draws() -> Any:
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002


def test_random_states_are_loaded_as_they_were_saved(pair: Pair, tmp_path: Path) -> None:
    drawn = []
    for i, trainer in enumerate(pair.all):
        folder = tmp_path / f"rng-{i}"
        folder.mkdir()
        draws()
        trainer._save_rng_state(str(folder))
        drawn.append(draws())
        trainer._load_rng_state(None)
        assert draws() != drawn[i]
        trainer._load_rng_state(str(folder))
        assert draws() == drawn[i]
    assert drawn[0] != drawn[1]
    # Each reads what the other wrote.
    for i, trainer in enumerate(pair.all):
        trainer._load_rng_state(str(tmp_path / f"rng-{1 - i}"))
        assert draws() == drawn[1 - i]


def test_the_scaler(pair: Pair, tmp_path: Path) -> None:
    trainer = pair.ours
    trainer._save_scaler(str(tmp_path))
    assert not (tmp_path / "scaler.pt").exists()
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    trainer.accelerator.scaler.scale(torch.ones(()))
    trainer._save_scaler(str(tmp_path))
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    trainer._load_scaler(None)
    assert trainer.accelerator.scaler.get_scale() == 2.0
    trainer._load_scaler(str(tmp_path))
    assert trainer.accelerator.scaler.get_scale() == 8.0
    trainer.accelerator.scaler = None
    with pytest.raises(CheckpointError, match="fp16"):
        trainer._load_scaler(str(tmp_path))


def test_the_best_model(tmp_path: Path) -> None:
    trainer = ours(tmp_path)
    trainer.save_model(str(tmp_path / "best"))
    best = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    with torch.no_grad():
        trainer.model.first.weight.zero_()
    trainer.state.best_model_checkpoint = str(tmp_path / "best")
    trainer._load_best_model()
    assert all(torch.equal(v, best[k]) for k, v in trainer.model.state_dict().items())


@pytest.mark.parametrize("limit", [None, 1, 2, 3])
@pytest.mark.parametrize("best", [None, 2, 4, 5])
def test_order_and_rotation_of_checkpoints(limit: int | None, best: int | None, tmp_path: Path) -> None:
    pair = Pair(tmp_path, {"save_total_limit": limit})
    for trainer in pair.all:
        folder = Path(trainer.args.output_dir)
        for step in (10, 2, 4, 3, 5):
            (folder / f"checkpoint-{step}").mkdir()
            (folder / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
        (folder / "checkpoint-mine").mkdir()
        if best is not None:
            trainer.state.best_model_checkpoint = str(folder / f"checkpoint-{best}")

    def order(trainer: Any) -> list[str]:
        return [Path(p).name for p in trainer._sorted_checkpoints(output_dir=trainer.args.output_dir)]

    pair.same(order)
    for trainer in pair.all:
        trainer._rotate_checkpoints(use_mtime=False, output_dir=trainer.args.output_dir)
    pair.same(order)
    assert (Path(pair.ours.args.output_dir) / "checkpoint-mine").is_dir()


# -- 7. callbacks ----------------------------------------------------------------------------------------------------


def test_callbacks_come_and_go(tmp_path: Path) -> None:
    class Mine(TrainerCallback): ...

    trainer = ours(tmp_path)
    before = list(trainer.callback_handler.callbacks)
    trainer.add_callback(Mine)
    assert type(trainer.callback_handler.callbacks[-1]) is Mine
    popped = trainer.pop_callback(Mine)
    assert type(popped) is Mine
    assert trainer.pop_callback(Mine) is None
    assert trainer.pop_callback(popped) is None
    trainer.add_callback(popped)
    trainer.remove_callback(popped)
    trainer.remove_callback(Mine)
    assert trainer.callback_handler.callbacks == before
    with pytest.raises(ValueError, match=r"Mine|not in list"):
        trainer.remove_callback(popped)


# -- 8. search -------------------------------------------------------------------------------------------------------


def searching(folder: Path) -> Any:
    arguments = {"eval_strategy": "epoch", "num_train_epochs": 2}
    given = {"model": None, "model_init": lambda: make_net(), "eval_dataset": make_rows(7)}
    return ours(folder, arguments, **given)


def space(trial: Any) -> dict[str, Any]:
    return {"learning_rate": trial.suggest_categorical("learning_rate", [1e-5, 0.05])}


def test_a_search_finds_the_better_rate(tmp_path: Path) -> None:
    trainer = searching(tmp_path)
    sampler = optuna.samplers.GridSampler({"learning_rate": [1e-5, 0.05]})
    found = trainer.hyperparameter_search(hp_space=space, n_trials=2, backend="optuna", sampler=sampler)
    assert isinstance(found, BestRun)
    assert found.hyperparameters == {"learning_rate": 0.05}
    fixed = ours(tmp_path / "f", {"num_train_epochs": 2}, eval_dataset=make_rows(5, seed=1))
    assert math.isfinite(found.objective)
    assert trainer.hp_search_backend is None
    with pytest.raises(RuntimeError, match="model_init"):
        fixed.hyperparameter_search(backend="optuna")


def test_a_trial_sets_arguments_and_is_told_of_evaluations(tmp_path: Path) -> None:
    trainer = searching(tmp_path)
    trainer._hp_search_setup(None)
    assert trainer._trial is None
    trainer._report_to_hp_search(None, 1, {"eval_loss": 2.0})
    assert trainer.objective is None

    trial = optuna.create_study(pruner=optuna.pruners.ThresholdPruner(upper=1.0)).ask()
    trainer.hp_search_backend, trainer.hp_space = "optuna", lambda trial: {"learning_rate": "0.25"}
    trainer.compute_objective = lambda metrics: metrics["eval_loss"]
    trainer._hp_search_setup(trial)
    assert trainer.args.learning_rate == 0.25
    trainer._report_to_hp_search(trial, 1, {"eval_loss": 0.5})
    assert trainer.objective == 0.5
    with pytest.raises(optuna.TrialPruned):
        trainer._report_to_hp_search(trial, 2, {"eval_loss": 2.0})


# -- 9. devices ------------------------------------------------------------------------------------------------------


def test_placing_and_wrapping(pair: Pair) -> None:
    for trainer in pair.all:
        net = make_net()
        trainer._move_model_to_device(net, torch.device("meta"))
        assert net.first.weight.device.type == "meta"
        assert trainer._wrap_model(trainer.model) is trainer.model
        assert trainer._wrap_model(trainer.model, training=False) is trainer.model
    assert pair.same(lambda t: (t.is_local_process_zero(), t.is_world_process_zero())) == (True, True)
    placed = make_net()
    placed.hf_device_map = {"": "cpu"}
    with pytest.warns(UserWarning, match="device map"):
        pair.ours._move_model_to_device(placed, torch.device("meta"))
    assert placed.first.weight.device.type == "cpu"


# -- 10. utilities ---------------------------------------------------------------------------------------------------


def test_log(pair: Pair) -> None:
    for trainer in pair.all:
        trainer.state.epoch, trainer.state.global_step = 1.5, 3
        given = {"mine": 1.0}
        trainer.log(given)
        assert given == {"mine": 1.0, "epoch": 1.5}
    assert pair.same(lambda t: t.state.log_history) == [{"mine": 1.0, "epoch": 1.5, "step": 3}]


def test_inputs_are_prepared(pair: Pair) -> None:
    tree = {"x": (torch.ones(1), [torch.zeros(2), "text"]), "n": 3}
    for trainer in pair.all:
        trainer._set_signature_columns_if_needed()
        found = trainer._prepare_input(tree)
        assert found == {"x": (torch.ones(1), found["x"][1]), "n": 3}
        assert type(found["x"]) is tuple
        assert trainer._prepare_inputs({"x": torch.ones(1)})["x"].item() == 1
        with pytest.raises(ValueError, match="batch"):
            trainer._prepare_inputs({})


def test_floating_point_operations(tmp_path: Path) -> None:
    pair = Pair(tmp_path, make=make_gpt2)
    batch = {"input_ids": torch.zeros(2, 6, dtype=torch.long)}
    count = pair.same(lambda t: t.floating_point_ops(batch))
    assert count > 0
    for trainer in pair.all:
        trainer.current_flos = 2 * count
        trainer.store_flos()
        trainer.store_flos()
    assert pair.same(lambda t: (t.state.total_flos, t.current_flos)) == (2 * count, 0)
    assert Pair(tmp_path / "net").same(lambda t: t.floating_point_ops(batch)) == 0


# -- 11. special -----------------------------------------------------------------------------------------------------


def test_neftune_comes_and_goes(tmp_path: Path) -> None:
    pair = Pair(tmp_path, {"neftune_noise_alpha": 5.0}, make=make_words)
    for trainer in pair.all:
        model = trainer._activate_neftune(trainer.model)
        assert model is trainer.model
        assert len(model.embedding._forward_hooks) == 1
        assert model.embedding.neftune_noise_alpha == 5.0
        trainer._deactivate_neftune(model)
        assert not model.embedding._forward_hooks
    with pytest.raises(ValueError, match=r"(?i)neftune"):
        pair.ours._deactivate_neftune(pair.ours.model)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_tracing(pair: Pair) -> None:
    trainer = pair.ours
    loader = trainer.get_test_dataloader(make_rows(3))
    traced = trainer.torch_jit_model_eval(trainer.model, loader)
    assert isinstance(traced, torch.jit.ScriptModule)
    batch = next(iter(loader))
    torch.testing.assert_close(traced(**batch)["logits"], trainer.model(**batch)["logits"])
    assert trainer.torch_jit_model_eval(trainer.model, loader, training=True) is trainer.model
    with pytest.warns(UserWarning, match="traced"):
        assert trainer.torch_jit_model_eval(trainer.model, []) is trainer.model


def test_contexts(pair: Pair) -> None:
    for trainer in pair.all:
        for context in (trainer.autocast_smart_context_manager(), trainer.compute_loss_context_manager()):
            with context:
                assert not torch.is_autocast_enabled("cpu")
        inputs = {"x": torch.ones(1)}
        made, same = trainer._prepare_context_parallel_inputs(trainer.model, inputs)
        assert same is inputs
        with made():
            pass


# -- 12. the hub -----------------------------------------------------------------------------------------------------


def test_create_model_card(tmp_path: Path) -> None:
    trainer = ours(tmp_path, {"eval_strategy": "epoch"}, eval_dataset=make_rows(5, seed=1))
    trainer.train()
    trainer.create_model_card(model_name="mine", tags="tiny", license="mit")
    text = (tmp_path / "README.md").read_text()
    assert "# mine" in text and "license: mit" in text and "- tiny" in text
    assert "| Training Loss | Epoch | Step | Validation Loss |" in text


def test_pushes(tmp_path: Path, hub: StandInHub) -> None:
    arguments = {"push_to_hub": True, "hub_token": "hf_own", "max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = ours(tmp_path / "tiny", arguments)
    assert trainer.hub_model_id == "me/tiny"
    assert trainer.push_in_progress is None
    trainer.train()
    assert [entry["message"] for entry in hub.commits] == ["Training in progress, step 2"]
    assert trainer.push_to_hub(commit_message="mine") is not None
    assert hub.commits[-1]["message"] == "mine"
    assert {"README.md", "model.safetensors"} <= set(hub.files)
    assert not [name for name in hub.files if name.startswith("checkpoint-")]
    later = trainer.push_to_hub(blocking=False)
    later.result(timeout=30)
    trainer.init_hf_repo(token="hf_other")
    assert hub.tokens[-1] == "Bearer hf_other"
    trainer._push_from_checkpoint(str(tmp_path / "tiny" / "checkpoint-2"))
    trainer._finish_current_push()
    assert trainer.push_in_progress is None
    assert hub.commits[-1]["message"] == "Training in progress, step 2"


# -- 13. reports -----------------------------------------------------------------------------------------------------


def test_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = Pair(tmp_path, compute_metrics=accuracy)
    metrics = {"eval_loss": 0.123456, "eval_runtime": 3725.5, "total_flos": 3 << 30}
    for trainer in pair.all:
        trainer.log_metrics("eval", dict(metrics))
    text = capsys.readouterr().out
    assert text[: len(text) // 2] == text[len(text) // 2 :]
    for trainer in pair.all:
        trainer.save_metrics("eval", dict(metrics))
        trainer.save_metrics("test", {"mine": 1.0})
        trainer.save_state()
    for name in ("eval_results.json", "test_results.json", "all_results.json"):
        pair.same(lambda t, name=name: (Path(t.args.output_dir) / name).read_text())
    assert (Path(pair.ours.args.output_dir) / "trainer_state.json").is_file()


def test_words_are_models_too(tmp_path: Path) -> None:
    """NEFTune, flops and labels of a model with tokens, in one run."""
    arguments = {"neftune_noise_alpha": 1.0, "include_tokens_per_second": True, "num_train_epochs": 1}
    trainer = ours(tmp_path, arguments, model=make_words(), train_dataset=word_rows())
    assert trainer.train().metrics["train_tokens_per_second"] > 0
