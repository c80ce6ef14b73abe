"""transformers with trainkit's Trainer in it, as code of other libraries sees it."""

from __future__ import annotations

import importlib
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import transformers
import transformers.trainer
import transformers.trainer_callback
import transformers.trainer_utils

import trainkit.trainer.trainer
from tests.trainer.tiny import make_net, make_rows
from trainkit.trainer.compat import MODULES, patch_transformers, replacements

THIRD_PARTY = """
from dataclasses import dataclass
import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalPrediction, IntervalStrategy
from transformers.trainer_callback import TrainerControl, TrainerState

@dataclass
class TheirArguments(TrainingArguments):
    margin: float = 0.5

class TheirCallback(TrainerCallback):
    def __init__(self):
        self.steps = []
    def on_step_end(self, args, state, control, **kwargs):
        assert isinstance(state, TrainerState) and isinstance(control, TrainerControl)
        self.steps.append(state.global_step)

class TheirTrainer(Trainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        assert isinstance(self.args, TrainingArguments)
        self.seen = TheirCallback()
        self.add_callback(self.seen)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        loss = loss * self.args.margin
        return (loss, outputs) if return_outputs else loss

def late_import():
    from transformers import Trainer as found
    return found
"""


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "a_third_party.py").write_text(THIRD_PARTY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "a_third_party", raising=False)
    return "a_third_party"


def everything() -> dict[tuple[str, str], Any]:
    """What transformers has under the names that are replaced."""
    names = replacements()
    loaded = [name for name in sys.modules if name.split(".")[0] == "transformers"]
    return {
        (module, name): vars(sys.modules[module])[name]
        for module in loaded
        for name in names
        if name in vars(sys.modules[module])
    }


def test_inside_everything_is_ours_and_afterwards_as_it_was() -> None:
    with patch_transformers():
        pass
    before = everything()
    own = replacements()
    assert not any(value is own[name] for (_, name), value in before.items())
    with patch_transformers():
        inside = everything()
        for module in MODULES:
            # Of the default callbacks, a list, there is one for each scope.
            assert all(value is own[name] or value == own[name] for (m, name), value in inside.items() if m == module)
        assert transformers.Trainer is transformers.trainer.Trainer is trainkit.trainer.trainer.Trainer
        assert [own["DefaultFlowCallback"]] == transformers.trainer.DEFAULT_CALLBACKS
    assert everything() == before


def test_an_error_inside_restores_as_well() -> None:
    before = (transformers.Trainer, transformers.TrainingArguments)
    with pytest.raises(KeyError), patch_transformers():
        raise KeyError
    assert (transformers.Trainer, transformers.TrainingArguments) == before


def test_a_scope_in_a_scope_ends_with_the_outer_one() -> None:
    before = transformers.Trainer
    with patch_transformers():
        with patch_transformers():
            assert transformers.Trainer is trainkit.trainer.trainer.Trainer
        assert transformers.Trainer is trainkit.trainer.trainer.Trainer
    assert transformers.Trainer is before


@pytest.mark.parametrize("name", sorted(replacements()))
def test_every_name_that_is_replaced_is_one_of_transformers(name: str) -> None:
    homes = [module for module in MODULES if hasattr(sys.modules.get(module) or importlib.import_module(module), name)]
    assert homes


def test_code_imported_inside_trains_with_ours(third_party: str, tmp_path: Path) -> None:
    with patch_transformers():
        theirs = importlib.import_module(third_party)
        assert issubclass(theirs.TheirTrainer, transformers.Trainer)
        args = theirs.TheirArguments(
            str(tmp_path / "out"), report_to="none", use_cpu=True, max_steps=2, save_strategy="no", margin=0.25
        )
        trainer = theirs.TheirTrainer(make_net(), args, train_dataset=make_rows(8))
        assert isinstance(trainer, transformers.Trainer) and isinstance(args, transformers.TrainingArguments)
        assert isinstance(trainer.seen, transformers.TrainerCallback)
        trainer.train()
        assert theirs.late_import() is trainkit.trainer.trainer.Trainer
    assert trainer.seen.steps == [1, 2]
    assert issubclass(theirs.TheirTrainer, trainkit.trainer.trainer.Trainer)
    assert not issubclass(theirs.TheirTrainer, transformers.Trainer)
    assert theirs.late_import() is transformers.Trainer
    # It goes on working after the scope.
    assert trainer.evaluate(make_rows(3))["eval_loss"] > 0


def test_callbacks_written_before_the_scope_are_called(tmp_path: Path) -> None:
    class Before(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.logs: list[dict[str, Any]] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.logs.append(dict(logs))

    before = Before()
    with patch_transformers():
        args = transformers.TrainingArguments(
            str(tmp_path), report_to="none", use_cpu=True, max_steps=1, logging_steps=1, save_strategy="no"
        )
        transformers.Trainer(make_net(), args, train_dataset=make_rows(8), callbacks=[before]).train()
    assert "loss" in before.logs[0] and "train_loss" in before.logs[-1]


def test_words_of_both_libraries_mean_the_same(tmp_path: Path) -> None:
    theirs = transformers.trainer_utils.IntervalStrategy.EPOCH
    args = trainkit.trainer.trainer.TrainingArguments(str(tmp_path), report_to="none", logging_strategy=theirs)
    assert args.logging_strategy == theirs == "epoch"
    with patch_transformers():
        assert isinstance(args.logging_strategy, transformers.IntervalStrategy)


def test_the_parser_of_transformers_reads_our_arguments(tmp_path: Path) -> None:
    with patch_transformers():
        parser = transformers.HfArgumentParser(transformers.TrainingArguments)
        words = ["--output_dir", str(tmp_path), "--learning_rate", "0.5", "--report_to", "none", "--bf16", "False"]
        (args,) = parser.parse_args_into_dataclasses([*words, "--eval_steps", "7", "--use_cpu"])
    assert isinstance(args, trainkit.trainer.trainer.TrainingArguments)
    assert (args.learning_rate, args.bf16, args.eval_steps, args.use_cpu) == (0.5, False, 7, True)


def test_modules_of_transformers_loaded_inside_are_restored() -> None:
    # In a process of its own, so that nothing is loaded before.
    code = """
        import sys
        from trainkit.trainer.compat import patch_transformers
        assert "transformers" not in sys.modules
        with patch_transformers():
            import transformers
            sys.modules["transformers.made_up"] = made_up = type(sys)("transformers.made_up")
            from transformers.trainer_callback import TrainerCallback
            made_up.TrainerCallback = TrainerCallback
            assert TrainerCallback.__module__ == "trainkit.trainer.events"
        assert made_up.TrainerCallback is transformers.TrainerCallback
        for name in ("Trainer", "TrainingArguments", "TrainerCallback", "Seq2SeqTrainer"):
            assert getattr(transformers, name).__module__.startswith("transformers."), name
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=300)
