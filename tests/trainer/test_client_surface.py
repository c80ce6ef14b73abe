"""What code that was written against the Trainer of transformers relies on: names, kinds of values, and when they hold.

The names are those that were counted in such code. Where the real Trainer has one, trainkit's has it at the same time,
with a value of the same kind.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import datasets
import pytest
import torch
import transformers
from torch import nn

import trainkit
from tests.trainer import tiny
from tests.trainer.tiny import make_net, make_rows

pytestmark = pytest.mark.filterwarnings("ignore:Trainer.tokenizer:FutureWarning")


def words(text: str) -> list[str]:
    return text.split()


OF_A_TRAINER = words("""
args train model state eval_dataset train_dataset add_callback callback_handler evaluate optimizer processing_class
data_collator save_model control log is_world_process_zero accelerator model_wrapped lr_scheduler evaluation_loop
compute_loss tokenizer _get_train_sampler _train_batch_size get_eval_dataloader get_train_dataloader log_metrics
save_metrics create_model_card push_to_hub is_deepspeed_enabled is_fsdp_enabled _prepare_inputs model_init predict
_eval_dataloaders can_return_loss call_model_init is_in_train label_names deepspeed _globalstep_last_logged
compute_loss_context_manager get_decay_parameter_names _get_eval_sampler _nested_gather get_optimizer_cls_and_kwargs
get_test_dataloader _load_best_model _load_from_checkpoint is_local_process_zero pop_callback save_state compute_metrics
_signature_columns _save_checkpoint hub_model_id model_accepts_loss_kwargs current_gradient_accumulation_steps
_get_learning_rate objective training_step _get_collator_with_removed_columns _issue_warnings_after_load
_remove_unused_columns _save _determine_best_metric _evaluate _load_optimizer_and_scheduler
_save_optimizer_and_scheduler _total_loss_scalar compute_objective create_optimizer create_optimizer_and_scheduler
current_flos hp_search_backend init_hf_repo optimizer_cls_and_kwargs remove_callback store_flos
_set_signature_columns_if_needed create_scheduler _maybe_log_save_evaluate prediction_step _inner_training_loop
compute_loss_func preprocess_logits_for_metrics is_model_parallel place_model_on_device neftune_noise_alpha
label_smoother gather_function
""")
OF_THE_STATE = words("""
global_step epoch max_steps best_model_checkpoint best_metric num_train_epochs is_world_process_zero
is_local_process_zero num_input_tokens_seen save_to_json load_from_json eval_steps logging_steps save_steps log_history
total_flos train_batch_size trial_name trial_params is_hyper_param_search best_global_step stateful_callbacks
""")
OF_THE_CONTROL = words("should_save should_evaluate should_log should_training_stop should_epoch_stop")
OF_THE_ARGUMENTS = words("""
output_dir dataloader_num_workers weight_decay seed fp16 device n_gpu dataloader_pin_memory dataloader_drop_last
eval_batch_size gradient_accumulation_steps per_device_train_batch_size hub_model_id num_train_epochs report_to
dataloader_persistent_workers dataloader_prefetch_factor resume_from_checkpoint gradient_checkpointing
per_device_eval_batch_size eval_strategy learning_rate world_size eval_steps logging_steps save_steps train_batch_size
to_dict should_save run_name do_train push_to_hub local_rank hub_token remove_unused_columns deepspeed lr_scheduler_type
process_index warmup_ratio load_best_model_at_end metric_for_best_model save_safetensors save_strategy do_eval
main_process_first overwrite_output_dir parallel_mode do_predict should_log get_process_log_level bf16
gradient_checkpointing_kwargs use_liger_kernel torch_empty_cache_steps debug eval_do_concat_batches
label_smoothing_factor max_steps optim eval_delay get_warmup_steps greater_is_better logging_dir logging_first_step
logging_nan_inf_filter logging_strategy save_total_limit _n_gpu batch_eval_metrics ddp_broadcast_buffers disable_tqdm
prediction_loss_only warmup_steps max_grad_norm use_cpu accelerator_config include_inputs_for_metrics label_names
save_only_model tf32
""")
OF_THE_ACCELERATOR = words("""
gather_for_metrics device gather is_main_process unwrap_model process_index prepare print num_processes prepare_model
state backward reduce wait_for_everyone local_process_index even_batches pad_across_processes free_memory accumulate
is_local_main_process autocast no_sync clip_grad_norm_ sync_gradients mixed_precision scaler gradient_state
""")

SETTINGS: dict[str, Any] = {
    **tiny.SETTINGS,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "max_steps": 4,
}
BOTH = {"ours": trainkit, "theirs": transformers}


def make(library: Any, folder: Path, trainer: Any = None, callbacks: Any = None, **settings: Any) -> Any:
    return (trainer or library.Trainer)(
        make_net(),
        library.TrainingArguments(str(folder), **{**SETTINGS, **settings}),
        train_dataset=make_rows(8),
        eval_dataset=make_rows(5, seed=1),
        callbacks=callbacks or [],
    )


def kind(value: Any) -> str:
    """What matters of a value to those who read it."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, (int, float)):
        return "number"
    if isinstance(value, str):
        return "str"
    if isinstance(value, torch.utils.data.DataLoader):
        return "DataLoader"
    if callable(value) and not isinstance(value, nn.Module):
        return "callable"
    return type(value).__name__


def kinds(obj: Any, names: list[str]) -> dict[str, str]:
    return {name: kind(getattr(obj, name)) for name in names if hasattr(obj, name)}


@dataclass
class Seen:
    """The kinds of everything, by phase."""

    phases: dict[str, dict[str, dict[str, str]]] = field(default_factory=dict)

    def look(self, phase: str, trainer: Any) -> None:
        self.phases[phase] = {
            "trainer": kinds(trainer, OF_A_TRAINER),
            "state": kinds(trainer.state, OF_THE_STATE),
            "control": kinds(trainer.control, OF_THE_CONTROL),
            "args": kinds(trainer.args, OF_THE_ARGUMENTS),
            "accelerator": kinds(trainer.accelerator, OF_THE_ACCELERATOR),
        }


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    found = {}
    for name, library in BOTH.items():
        looks = found[name] = Seen()

        class Looks(library.TrainerCallback):  # type: ignore[name-defined,misc]
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                looks.look("in", trainer)  # noqa: B023

            def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                looks.look("in an evaluation", trainer)  # noqa: B023

        trainer = make(library, tmp_path_factory.mktemp(name), callbacks=[Looks()])
        looks.look("before", trainer)
        trainer.train()
        looks.look("after", trainer)
    return found


PHASES = ("before", "in", "in an evaluation", "after")


@pytest.mark.filterwarnings("ignore:mtime may not be reliable:UserWarning")
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("of", ["trainer", "state", "control", "args", "accelerator"])
def test_names_and_kinds_are_those_of_transformers(of: str, phase: str, seen: dict[str, Seen]) -> None:
    ours, theirs = seen["ours"].phases[phase][of], seen["theirs"].phases[phase][of]
    missing = [name for name in theirs if name not in ours]
    assert not missing
    # A flag may be None there and False here.
    other = {name: (ours[name], value) for name, value in theirs.items() if ours[name] != value}
    assert not {name: pair for name, pair in other.items() if pair != ("bool", "NoneType")}


@pytest.mark.parametrize("phase", PHASES)
def test_every_name_is_there_at_every_time(phase: str, seen: dict[str, Seen]) -> None:
    found = seen["ours"].phases[phase]
    named = {
        "trainer": OF_A_TRAINER,
        "state": OF_THE_STATE,
        "control": OF_THE_CONTROL,
        "args": OF_THE_ARGUMENTS,
        "accelerator": OF_THE_ACCELERATOR,
    }
    assert not {of: missing for of, names in named.items() if (missing := [n for n in names if n not in found[of]])}


def test_the_accelerator_is_a_real_one(tmp_path: Path) -> None:
    trainer = make(trainkit, tmp_path)
    accelerator = trainer.accelerator
    assert isinstance(accelerator, accelerate.Accelerator)
    assert accelerator.state.deepspeed_plugin is None and getattr(accelerator.state, "fsdp_plugin", None) is None
    assert accelerator.unwrap_model(trainer.model_wrapped) is trainer.model
    rows = torch.arange(3)
    for gathered in (accelerator.gather(rows), accelerator.gather_for_metrics(rows), accelerator.reduce(rows)):
        assert torch.equal(gathered, rows)
    with accelerator.accumulate(trainer.model):
        assert accelerator.sync_gradients
    loader = accelerator.prepare(torch.utils.data.DataLoader(make_rows(4), batch_size=2))
    assert len(list(loader)) == 2


def test_old_settings_are_taken_by_name(tmp_path: Path) -> None:
    def metric(found: Any) -> dict[str, float]:
        return {"n": len(found.predictions)}

    made = trainkit.Trainer(
        model=make_net(),
        args=trainkit.TrainingArguments(str(tmp_path), **SETTINGS),
        data_collator=transformers.default_data_collator,
        train_dataset=make_rows(4),
        eval_dataset=make_rows(4),
        processing_class=None,
        model_init=None,
        compute_loss_func=None,
        compute_metrics=metric,
        callbacks=None,
        optimizers=(None, None),
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.5}),
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        tokenizer=None,
    )
    made.train()
    assert made.evaluate()["eval_n"] == 4
    assert isinstance(made.optimizer.optimizer, torch.optim.SGD) and made.compute_metrics is metric


# -- what callbacks get ------------------------------------------------------------------------------------------------

ALWAYS = {"model", "processing_class", "optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader"}
EVENTS = words("""
on_init_end on_train_begin on_train_end on_epoch_begin on_epoch_end on_step_begin on_pre_optimizer_step
on_optimizer_step on_substep_end on_step_end on_evaluate on_predict on_save on_log on_prediction_step
""")
WITH = {"on_evaluate": {"metrics"}, "on_predict": {"metrics"}, "on_log": {"logs"}}


def recorder(library: Any) -> Any:
    calls: list[tuple[str, dict[str, Any]]] = []

    def event(name: str) -> Any:
        def method(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert isinstance(args, library.TrainingArguments)
            assert isinstance(state, library.TrainerState) and isinstance(control, library.TrainerControl)
            calls.append((name, kwargs))

        return method

    made = type("Records", (library.TrainerCallback,), {name: event(name) for name in EVENTS})()
    return made, calls


@pytest.mark.filterwarnings("ignore:mtime may not be reliable:UserWarning")
def test_keyword_arguments_of_callbacks(tmp_path: Path) -> None:
    given = {}
    for name, library in BOTH.items():
        callback, calls = recorder(library)
        settings = {"gradient_accumulation_steps": 2, "num_train_epochs": 1}
        trainer = make(library, tmp_path / name, callbacks=[callback], **settings)
        trainer.train()
        trainer.predict(make_rows(2))
        given[name] = calls
        assert {event for event, _ in calls} == set(EVENTS)
        for event, kwargs in calls:
            assert ALWAYS | WITH.get(event, set()) <= kwargs.keys(), event
            assert kwargs["model"] is trainer.model
    assert [event for event, _ in given["ours"]] == [event for event, _ in given["theirs"]]
    for (event, ours), (_, theirs) in zip(given["ours"], given["theirs"], strict=True):
        assert theirs.keys() <= ours.keys(), event
        assert {k: kind(ours[k]) for k in theirs} == {k: kind(v) for k, v in theirs.items()}, event
        for name in WITH.get(event, set()):
            # With disable_tqdm, 4.57 takes total_flos out of the logs of the last event.
            assert theirs[name].keys() <= ours[name].keys() <= {*theirs[name], "total_flos"}, event


# -- subclasses --------------------------------------------------------------------------------------------------------


def test_a_training_step_of_ones_own_sees_gradients_and_parameters(tmp_path: Path) -> None:
    def subclass(library: Any) -> Any:
        class Own(library.Trainer):  # type: ignore[name-defined,misc]
            norms: list[float]
            weights: list[float]

            def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
                model.train()
                inputs = self._prepare_inputs(inputs)
                self.weights.append(float(self.model.first.weight.detach().sum()))
                with self.compute_loss_context_manager():
                    loss = self.compute_loss(model, inputs)
                self.accelerator.backward(loss)
                assert all(p.grad is not None for p in model.parameters())
                self.norms.append(float(sum(p.grad.pow(2).sum() for p in model.parameters()) ** 0.5))
                return loss.detach()

        Own.norms, Own.weights = [], []
        return Own

    trainers = {n: make(lib, tmp_path / n, subclass(lib), save_strategy="no") for n, lib in BOTH.items()}
    for trainer in trainers.values():
        trainer.train()
    ours, theirs = trainers["ours"], trainers["theirs"]
    assert len(ours.norms) == len(set(ours.weights)) == 4
    assert ours.norms == pytest.approx(theirs.norms, rel=1e-5)
    assert ours.weights == pytest.approx(theirs.weights, rel=1e-5)


def test_the_live_module_is_the_truth_between_updates(tmp_path: Path) -> None:
    sums = []

    class Looks(trainkit.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            sums.append(float(model.first.weight.detach().sum()))

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            sums.append(float(model.first.weight.detach().sum()))
            with torch.no_grad():
                model.second.bias.fill_(float(state.global_step))

    trainer = make(trainkit, tmp_path, callbacks=[Looks()], save_strategy="no", eval_strategy="no", learning_rate=1e-4)
    trainer.train()
    assert sums[1::2][:-1] == sums[2::2] and len(set(sums)) == 5
    # What was written into the module is what the last update and the end of the run have.
    assert torch.allclose(trainer.model.second.bias, torch.full((3,), 4.0), atol=1e-3)


def test_override_of_maybe_log_save_evaluate(tmp_path: Path) -> None:
    class Own(trainkit.Trainer):
        calls: list[tuple[int, bool]]

        def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
            assert isinstance(tr_loss, torch.Tensor) and float(grad_norm) > 0
            self.calls.append((self.state.global_step, self.control.should_log))
            if self.control.should_log and self.state.global_step > self._globalstep_last_logged:
                self.log({"loss": tr_loss.item(), "learning_rate": self._get_learning_rate()})
                self._total_loss_scalar += tr_loss.item()
                tr_loss -= tr_loss
                self._globalstep_last_logged = self.state.global_step
                self.control.should_log = False
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    Own.calls = []
    trainer = make(trainkit, tmp_path, Own)
    output = trainer.train()
    assert [step for step, _ in Own.calls] == [1, 2, 3, 4, 4]
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == 4 and output.training_loss == pytest.approx(sum(losses) / 4)
    assert sum("eval_loss" in log for log in trainer.state.log_history) == 2


def test_override_of_saving_and_loading_the_optimizer(tmp_path: Path) -> None:
    class Own(trainkit.Trainer):
        done: list[str]

        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            super()._save_optimizer_and_scheduler(output_dir)
            torch.save({"mine": self.state.global_step}, Path(output_dir, "mine.pt"))
            self.done.append("save")

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None:
                assert torch.load(Path(checkpoint, "mine.pt")) == {"mine": 2}
            self.done.append("load" if checkpoint else "load nothing")

    Own.done = []
    make(trainkit, tmp_path, Own).train()
    assert Own.done == ["load nothing", "save", "save"]
    make(trainkit, tmp_path, Own).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert Own.done[3:] == ["load", "save"]


def test_create_scheduler_may_ask_for_the_optimizer(tmp_path: Path) -> None:
    class Own(trainkit.Trainer):
        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            assert self.optimizer is not None and optimizer is self.optimizer
            inner = getattr(self.optimizer, "optimizer", self.optimizer)
            self.lr_scheduler = torch.optim.lr_scheduler.StepLR(inner, step_size=1, gamma=0.1)
            return self.lr_scheduler

    trainer = make(trainkit, tmp_path, Own, save_strategy="no", eval_strategy="no")
    trainer.train()
    rates = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    assert rates == pytest.approx([0.05, 0.005, 0.0005, 0.00005])


def test_a_wrapper_around_the_inner_loop(tmp_path: Path) -> None:
    class Own(trainkit.Trainer):
        seen: list[Any]

        def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
            self.seen.append((args, sorted(kwargs), self.is_in_train))
            output = super()._inner_training_loop(*args, **kwargs)
            self.seen.append(output.global_step)
            return output

    Own.seen = []
    trainer = make(trainkit, tmp_path, Own, save_strategy="no", eval_strategy="no")
    trainer.train()
    names = ["args", "batch_size", "ignore_keys_for_eval", "resume_from_checkpoint", "trial"]
    assert Own.seen == [((), names, True), 4] and not trainer.is_in_train


def test_a_subclass_may_take_and_give_other_state(tmp_path: Path) -> None:
    class Own(trainkit.Trainer):
        def _set_signature_columns_if_needed(self) -> None:
            if self._signature_columns is None:
                self._signature_columns = ["x", "labels", "weight"]

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            weight = inputs.pop("weight")
            outputs = model(**inputs)
            loss = outputs["loss"] * weight.mean()
            self.control.should_training_stop = self.state.global_step == 1
            return (loss, outputs) if return_outputs else loss

    rows = [{**row, "x": row["x"].tolist(), "weight": 2.0, "text": "left out"} for row in make_rows(8)]
    args = trainkit.TrainingArguments(str(tmp_path), **{**SETTINGS, "eval_strategy": "no", "save_strategy": "no"})
    trainer = Own(make_net(), args, train_dataset=datasets.Dataset.from_list(rows))
    assert trainer.train().global_step == 2


def test_a_loss_with_parameters_of_its_own(tmp_path: Path) -> None:
    # The optimizer holds a layer that is not the model's, as libraries of sentence encoders do it.
    class Own(trainkit.Trainer):
        head: nn.Module

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            labels = inputs.pop("labels")
            return nn.functional.cross_entropy(self.head(model(**inputs)["logits"]), labels)

        def create_optimizer(self) -> Any:
            self.optimizer = torch.optim.SGD([*self.model.parameters(), *self.head.parameters()], lr=0.5)
            return self.optimizer

    torch.manual_seed(1)
    Own.head = nn.Linear(3, 3)
    start = {name: t.clone() for name, t in Own.head.state_dict().items()}
    settings = {"save_strategy": "no", "eval_strategy": "no", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    trainer = make(trainkit, tmp_path, Own, **settings)
    batches = [{k: v.clone() for k, v in batch.items()} for batch in trainer.get_train_dataloader()]
    trainer.train()

    model, head = make_net(), nn.Linear(3, 3)
    head.load_state_dict(start)
    sgd = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.5)
    for batch in batches:
        sgd.zero_grad()
        nn.functional.cross_entropy(head(model(batch["x"])["logits"]), batch["labels"]).backward()
        sgd.step()
    torch.testing.assert_close(dict(Own.head.state_dict()), dict(head.state_dict()))
    torch.testing.assert_close(dict(trainer.model.state_dict()), dict(model.state_dict()))
