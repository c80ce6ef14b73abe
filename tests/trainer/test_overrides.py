"""An override of any method is called in trainkit when 4.57 calls it: as often, with arguments of the same kinds."""

from __future__ import annotations

import functools
import inspect
import tempfile
import warnings
from pathlib import Path
from typing import Any

import optuna
import pytest
import transformers

from tests.trainer.scenarios import COMMON, SCENARIOS, classes, overriding, run
from tests.trainer.surface import COMPANIONS, METHODS, Method
from tests.trainer.tiny import make_net, make_rows

optuna.logging.set_verbosity(optuna.logging.WARNING)

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Trainer.tokenizer:FutureWarning"),
]

# metrics_format is a function in the class there, which no trainer can call.
NAMES = (*(m.name for m in METHODS if m.name != "__init__"), *(n for n in COMPANIONS if n != "metrics_format"))
# Where an override of a method is reached; the others in "train".
SCENARIO_OF = {
    "tokenizer": "old name",
    "_remove_unused_columns": "table",
    "_align_special_tokens": "tokenizer",
    "num_tokens": "tokens",
    "_load_from_checkpoint": "resume",
    "_load_rng_state": "resume",
    "_load_callback_state": "resume",
    "compare_trainer_and_checkpoint_args": "resume",
    "prediction_loop": "legacy",
    "torch_jit_model_eval": "jit",
    "_activate_neftune": "neftune",
    "_deactivate_neftune": "neftune",
    "hyperparameter_search": "search",
    "call_model_init": "model_init",
    **dict.fromkeys(("create_model_card", "push_to_hub", "init_hf_repo", "_push_from_checkpoint"), "hub"),
    **dict.fromkeys(
        (
            *("get_test_dataloader", "predict", "get_num_trainable_parameters", "get_learning_rates"),
            *("get_optimizer_group", "_gather_and_numpify", "remove_callback", "pop_callback"),
            *("save_state", "save_metrics", "log_metrics"),
        ),
        "users",
    ),
}
# What the table says of methods that a run in "train" does not reach.
ELSEWHERE = (
    *("datasets.Dataset", "a tokenizer", "include_tokens_per_second", "neftune", "jit_mode_eval", "push_to_hub"),
    *("resuming", "use_legacy_prediction_loop", "predict"),
)
# Calls of 4.57 that trainkit makes otherwise: to which number and kinds, from theirs.
DIFFERENT: dict[str, str] = {
    "num_examples": "asked once, when the length of the run is found; evaluations count the rows that they see",
    "get_tp_size": "asked by every loader too, to know how many processes share a batch",
    "_rotate_checkpoints": "by numbers, never by times",
    "_sorted_checkpoints": "by numbers, never by times; not a second time where times cannot be relied on",
    "_gather_and_numpify": "prediction_loop collects as evaluation_loop does",
}
IN_A_SEARCH = {
    "create_accelerator_and_postprocess": "the settings from before the search are put back",
    "call_model_init": "the trainer has a model after the search",
    "_move_model_to_device": "that model is placed",
}
WITH_GATHERING = {"_nested_gather": "_gather_and_numpify calls it for one process too"}


def differs(scenario: str, name: str) -> bool:
    return name in {**DIFFERENT, **(IN_A_SEARCH if scenario == "search" else {})} or (
        scenario == "users" and name in WITH_GATHERING
    )


@functools.lru_cache
def theirs(scenario: str) -> dict[str, list[Any]]:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run("theirs", scenario, NAMES, Path(folder))


def both(scenario: str, names: tuple[str, ...], folder: Path, request: Any) -> tuple[Any, Any]:
    if SCENARIOS[scenario].hub:
        request.getfixturevalue("hub")
    return run("ours", scenario, names, folder), theirs(scenario)


@pytest.mark.parametrize("name", NAMES)
def test_an_override_is_called_as_in_transformers(name: str, tmp_path: Path, request: Any) -> None:
    scenario = SCENARIO_OF.get(name, "train")
    found, expected = both(scenario, (name,), tmp_path, request)
    assert found[name], "it is not called"
    assert expected[name], "transformers does not call it: another scenario is needed"
    if not differs(scenario, name):
        assert found[name] == expected[name]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_overrides_together_are_called_as_in_transformers(scenario: str, tmp_path: Path, request: Any) -> None:
    """All at once, in every kind of run: the calls of each, in their order."""
    found, expected = both(scenario, NAMES, tmp_path, request)
    other = [name for name in NAMES if not differs(scenario, name) and found[name] != expected[name]]
    assert {name: found[name] for name in other} == {name: expected[name] for name in other}


def times_as_numbers(call: Any) -> Any:
    positional, named = call
    return positional, tuple((k, False if k == "use_mtime" else v) for k, v in named)


@pytest.mark.parametrize("name", ["_rotate_checkpoints", "num_examples", "get_tp_size"])
def test_what_is_called_otherwise_has_the_same_arguments(name: str, tmp_path: Path) -> None:
    found = run("ours", "train", (name,), tmp_path)[name]
    expected = theirs("train")[name]
    assert set(map(times_as_numbers, found)) == set(map(times_as_numbers, expected))
    if name == "_rotate_checkpoints":
        assert len(found) == len(expected)


@pytest.mark.parametrize("method", [m for m in METHODS if m.name != "__init__"], ids=lambda m: m.name)
def test_the_table_says_through_what_a_method_is_reached(method: Method) -> None:
    calls = theirs("train")[method.name]
    if method.name in ("train", "get_test_dataloader"):
        return
    elsewhere = method.calls == "users" or any(word in method.calls for word in ELSEWHERE)
    assert bool(calls) is not elsewhere


def test_a_constructor_of_a_subclass_adds_arguments_and_changes_what_was_derived(tmp_path: Path) -> None:
    def results(library: str) -> Any:
        cls, args_cls = classes(library)

        class Own(cls):  # type: ignore[misc]
            def __init__(self, *args: Any, weight: float = 1.0, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                self.weight, self.label_names, self.model_accepts_loss_kwargs = weight, ["labels"], False

            def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
                found = super().compute_loss(*args, **kwargs)
                if isinstance(found, tuple):
                    return self.weight * found[0], found[1]
                return self.weight * found

        args = args_cls(str(tmp_path / library), **{**COMMON, "save_strategy": "no"})
        trainer = Own(make_net(), args, train_dataset=make_rows(7), eval_dataset=make_rows(4, seed=1), weight=3.0)
        trainer.train()
        return [log[k] for log in trainer.state.log_history for k in ("loss", "eval_loss") if k in log]

    assert results("ours") == pytest.approx(results("theirs"), abs=1e-4)


def test_an_override_set_on_the_object_counts(tmp_path: Path) -> None:
    """Some code assigns methods to the trainer instead of subclassing it."""

    def count(library: str) -> int:
        cls, args_cls = classes(library)
        args = args_cls(str(tmp_path / library), **{**COMMON, "save_strategy": "no", "eval_strategy": "no"})
        trainer = cls(make_net(), args, train_dataset=make_rows(7))
        calls = []
        step = trainer.training_step
        trainer.training_step = lambda *args: calls.append(len(args)) or step(*args)
        trainer.train()
        return len(calls)

    assert count("ours") == count("theirs") > 0


def test_methods_are_found_where_transformers_defines_them() -> None:
    """An override is noted for what both classes have."""
    for name in NAMES:
        assert inspect.getattr_static(classes("ours")[0], name) is not None
        assert inspect.getattr_static(transformers.Trainer, name) is not None
    assert issubclass(overriding(classes("ours")[0], (), {}), classes("ours")[0])
