"""What each method of the Trainer does, called by itself, beside the same call in transformers 4.57."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

from tests.trainer.pairs import Pair
from tests.trainer.scenarios import (
    accuracy,
    classes,
    make_gpt2,
    make_tokenizer,
    make_words,
    table,
    word_rows,
)
from tests.trainer.surface import METHODS
from tests.trainer.tiny import SETTINGS, make_net, make_rows, without_times


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


# -- 1. initialisation -----------------------------------------------------------------------------------------------


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(make_rows(7))


class Old:
    def collate_batch(self, rows: Any) -> Any: ...


def sgd() -> Any:
    return torch.optim.SGD(make_net().parameters(), lr=0.1)


SGD = (torch.optim.SGD, {"lr": 0.1})
REFUSED: dict[str, tuple[type[Exception], dict[str, Any], dict[str, Any]]] = {
    "no model": (RuntimeError, {}, {"model": None}),
    "model_init of two": (RuntimeError, {}, {"model": None, "model_init": lambda a, b: make_net()}),
    "model_init of nothing": (RuntimeError, {}, {"model": None, "model_init": lambda: None}),
    "no compute_result": (ValueError, {"batch_eval_metrics": True}, {"compute_metrics": accuracy}),
    "no eval_dataset": (ValueError, {"eval_strategy": "steps"}, {"eval_dataset": None}),
    "best of nothing": (ValueError, {"save_strategy": "best"}, {}),
    "no length": (ValueError, {}, {"train_dataset": Endless()}),
    "lengths of a stream": (ValueError, {"max_steps": 1, "group_by_length": True}, {"train_dataset": Endless()}),
    "two optimizers": (
        RuntimeError,
        {},
        {"optimizers": (sgd(), None), "optimizer_cls_and_kwargs": (torch.optim.SGD, {})},
    ),
    "model_init, optimizer": (RuntimeError, {}, {"model": None, "model_init": make_net, "optimizers": (sgd(), None)}),
    "unknown tracker": (ValueError, {"report_to": "nothing"}, {}),
    "collate_batch": (TypeError, {}, {"data_collator": Old()}),
    "two tokenizers": (ValueError, {}, {"tokenizer": make_tokenizer(), "processing_class": make_tokenizer()}),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("library", ["ours", "theirs"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_the_constructor_refuses(case: str, library: str, tmp_path: Path) -> None:
    error, arguments, given = REFUSED[case]
    cls, args_cls = classes(library)
    rows = {"train_dataset": make_rows(3), "eval_dataset": make_rows(3)}
    given = {"model": make_net(), **rows, **given}
    before = torch.get_rng_state()
    with pytest.raises(error):
        cls(args=args_cls(str(tmp_path / "run"), **{**SETTINGS, **arguments}), **given)
    if library == "ours" and not case.startswith("model_init of"):
        assert torch.equal(torch.get_rng_state(), before)
        assert not (tmp_path / "run").exists()


def test_the_constructor_derives_what_4_57_does(pair: Pair) -> None:
    names = ("label_names", "can_return_loss", "model_accepts_loss_kwargs", "place_model_on_device", "is_in_train")
    for name in (*names, "is_model_parallel", "_train_batch_size", "current_flos", "hp_search_backend"):
        pair.same(lambda t, name=name: getattr(t, name))
    for trainer in pair.all:
        assert trainer.model_wrapped is trainer.model
        assert trainer.optimizer is trainer.lr_scheduler is None
        assert Path(trainer.args.output_dir).is_dir()


def test_create_accelerator_and_postprocess(pair: Pair) -> None:
    for trainer in pair.all:
        del trainer.accelerator, trainer.gather_function
        trainer.create_accelerator_and_postprocess()
    for name in ("is_deepspeed_enabled", "is_fsdp_enabled", "is_tp_enabled"):
        assert pair.same(lambda t, name=name: getattr(t, name)) is False
    assert pair.same(lambda t: t.accelerator.num_processes) == 1
    pair.same(lambda t: t.gather_function(torch.arange(3)).tolist())


@pytest.mark.filterwarnings("ignore:.*tokenizer.*:FutureWarning")
def test_tokenizer_is_the_old_name(tmp_path: Path) -> None:
    pair = Pair(tmp_path, make=make_gpt2, processing_class=make_tokenizer())
    for trainer in pair.all:
        assert trainer.tokenizer is trainer.processing_class
        trainer.tokenizer = other = make_tokenizer()
        assert trainer.processing_class is other


# -- 2. data ---------------------------------------------------------------------------------------------------------


def batches(loader: Any) -> list[Any]:
    return [{k: v.tolist() for k, v in sorted(batch.items())} for batch in loader]


def test_loaders_give_the_batches_of_4_57(pair: Pair) -> None:
    pair.same(lambda t: batches(t.get_train_dataloader()))
    pair.same(lambda t: batches(t.get_eval_dataloader()))
    pair.same(lambda t: batches(t.get_eval_dataloader(make_rows(4, seed=2))))
    pair.same(lambda t: batches(t.get_test_dataloader(make_rows(4, seed=3))))
    sizes = {"batch_size": 4, "sampler_fn": torch.utils.data.SequentialSampler}
    pair.same(lambda t: batches(t._get_dataloader(dataset=make_rows(6), description="mine", **sizes)))


def test_loaders_without_data_are_refused(tmp_path: Path) -> None:
    pair = Pair(tmp_path, train_dataset=None, eval_dataset=None)
    for trainer in pair.all:
        with pytest.raises(ValueError, match=r"train_dataset|requires a train"):
            trainer.get_train_dataloader()
        with pytest.raises(ValueError, match="eval_dataset"):
            trainer.get_eval_dataloader()


def test_evaluation_sets_have_names(tmp_path: Path) -> None:
    pair = Pair(tmp_path, eval_dataset={"a": make_rows(4), "b": make_rows(2)})
    assert pair.same(lambda t: len(batches(t.get_eval_dataloader("b")))) == 1


def test_unused_columns_go(pair: Pair) -> None:
    assert pair.same(lambda t: sorted(t._remove_unused_columns(table(3), "mine").column_names)) == ["labels", "x"]
    for trainer in pair.all:
        with pytest.raises(ValueError, match="column"):
            trainer._remove_unused_columns(table(3).select_columns(["unused"]))
    rows = [{"x": 1, "other": 2}, {"x": 3, "other": 4}]
    assert pair.same(lambda t: t._get_collator_with_removed_columns(list)(rows)) == [{"x": 1}, {"x": 3}]
    for trainer in pair.all:
        trainer.args.remove_unused_columns = False
        assert trainer._get_collator_with_removed_columns(list) is list


def test_signature_columns_are_found_once(pair: Pair) -> None:
    for trainer in pair.all:
        trainer._set_signature_columns_if_needed()
    pair.same(lambda t: set(t._signature_columns))
    for trainer in pair.all:
        trainer._signature_columns = ["mine"]
        trainer._set_signature_columns_if_needed()
        assert trainer._signature_columns == ["mine"]


def test_align_special_tokens(tmp_path: Path) -> None:
    pair = Pair(tmp_path, make=make_gpt2, processing_class=make_tokenizer())
    for trainer in pair.all:
        trainer._align_special_tokens()
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        pair.same(lambda t, name=name: getattr(t.model.config, name))
        pair.same(lambda t, name=name: getattr(t.model.generation_config, name))


def test_numbers_of_examples_and_tokens(tmp_path: Path) -> None:
    pair = Pair(tmp_path, make=make_words, train_dataset=word_rows(7))
    assert pair.same(lambda t: t.num_examples(t.get_train_dataloader())) == 7
    assert pair.same(lambda t: t.num_tokens(t.get_train_dataloader())) == 35
    assert pair.same(lambda t: t.num_tokens(t.get_train_dataloader(), max_steps=5)) == 50


# -- 3. optimizer and schedule ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adagrad", "adafactor"])
def test_create_optimizer(optim: str, tmp_path: Path) -> None:
    pair = Pair(tmp_path, {"optim": optim, "weight_decay": 0.1})
    for trainer in pair.all:
        assert trainer.create_optimizer() is trainer.optimizer is trainer.create_optimizer()
    names = ("lr", "weight_decay", "betas", "eps", "momentum")
    pair.same(lambda t: [{k: g.get(k) for k in names} for g in t.optimizer.param_groups])
    pair.same(lambda t: [[tuple(p.shape) for p in g["params"]] for g in t.optimizer.param_groups])
    assert pair.same(lambda t: t.get_learning_rates()) == [0.05, 0.05]
    pair.same(lambda t: [[tuple(p.shape) for p in g] for g in t.get_optimizer_group()])


def test_create_scheduler(tmp_path: Path) -> None:
    pair = Pair(tmp_path, {"warmup_steps": 2, "lr_scheduler_type": "cosine"})
    for trainer in pair.all:
        trainer.create_optimizer()
        made = trainer.create_scheduler(num_training_steps=8)
        assert made is trainer.lr_scheduler is trainer.create_scheduler(num_training_steps=9)
        assert trainer._created_lr_scheduler
    pair.same(lambda t: [t.lr_scheduler.lr_lambdas[0](i) for i in range(10)])
    own = sgd()
    for trainer in pair.all:
        trainer.lr_scheduler = None
        assert trainer.create_scheduler(8, own).optimizer is own


def test_create_optimizer_and_scheduler(pair: Pair) -> None:
    for trainer in pair.all:
        assert trainer.create_optimizer_and_scheduler(4) is None
        assert trainer.lr_scheduler.optimizer is trainer.optimizer


def test_get_optimizer_cls_and_kwargs(tmp_path: Path) -> None:
    pair = Pair(tmp_path, {"adam_beta2": 0.9})
    cls, kwargs = pair.same(lambda t: type(t).get_optimizer_cls_and_kwargs(t.args, t.model))
    assert cls is torch.optim.AdamW
    assert kwargs["betas"] == (0.9, 0.9)


def test_names_and_numbers_of_parameters(pair: Pair) -> None:
    assert pair.same(lambda t: t.get_decay_parameter_names(t.model)) == ["first.weight", "second.weight"]
    for trainer in pair.all:
        trainer.model.first.requires_grad_(False)
    assert pair.same(lambda t: t.get_num_trainable_parameters()) == 16 + 24 + 3


def test_optimizer_groups_by_parameter_or_name(pair: Pair) -> None:
    for trainer in pair.all:
        for ask in (trainer.get_learning_rates, trainer.get_optimizer_group):
            with pytest.raises(ValueError, match="optimizer"):
                ask()
        trainer.create_optimizer()
    # 4.57 compares by values, which only finds the first parameter.
    pair.same(lambda t: t.get_optimizer_group(t.model.first.weight)["weight_decay"])
    for name, p in pair.ours.model.named_parameters():
        group = pair.ours.get_optimizer_group(p)
        assert any(p is other for other in group["params"])
        assert pair.ours.get_optimizer_group(name) is group


# -- 4. training -----------------------------------------------------------------------------------------------------


def test_train_says_what_came_out(pair: Pair) -> None:
    results = [trainer.train() for trainer in pair.all]
    assert results[0].global_step == results[1].global_step == 12
    assert results[0].training_loss == pytest.approx(results[1].training_loss, abs=1e-4)
    assert results[0].metrics["train_loss"] == results[0].training_loss
    assert pair.same(lambda t: t.state.log_history[-1]["epoch"]) == 3.0
    for trainer in pair.all:
        with pytest.raises(TypeError, match="nothing"):
            trainer.train(nothing=1)
        assert trainer.is_in_train is (trainer is pair.theirs)


def test_a_second_training_goes_on_with_weights_and_moments(pair: Pair) -> None:
    for trainer in pair.train().all:
        optimizer = trainer.optimizer
        trainer.train()
        assert getattr(trainer.optimizer, "optimizer", trainer.optimizer) is getattr(optimizer, "optimizer", optimizer)
    pair.close(lambda t: [log["loss"] for log in t.state.log_history if "loss" in log], 2e-4)
    assert pair.same(lambda t: t.state.global_step) == 12


@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_step_and_compute_loss(accumulation: int, pair: Pair) -> None:
    batch = next(iter(pair.ours.get_train_dataloader()))
    for trainer in pair.all:
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = accumulation
    loss = pair.close(lambda t: t.training_step(t.model, dict(batch)))
    assert not loss.requires_grad
    pair.close(lambda t: [p.grad for p in t.model.parameters()])
    whole = pair.close(lambda t: t.compute_loss(t.model, dict(batch)).detach())
    assert float(loss) * accumulation == pytest.approx(float(whole))
    pair.close(lambda t: t.compute_loss(t.model, dict(batch), return_outputs=True)[1]["logits"])


def test_compute_loss_names_what_is_missing(pair: Pair) -> None:
    for trainer in pair.all:
        with pytest.raises(ValueError, match=r"logits[\s\S]*x"):
            trainer.compute_loss(trainer.model, {"x": torch.zeros(2, 4)})


def test_inner_training_loop_takes_a_batch_size(pair: Pair) -> None:
    results = [t._inner_training_loop(batch_size=3, args=t.args) for t in pair.all]
    assert results[0].global_step == results[1].global_step == 9
    assert pair.same(lambda t: t._train_batch_size) == 3


def test_lengths_of_a_run(tmp_path: Path) -> None:
    for number, arguments in enumerate([{}, {"max_steps": 5}, {"num_train_epochs": 1.5}]):
        pair = Pair(tmp_path / str(number), {"gradient_accumulation_steps": 2, **arguments})
        assert pair.same(lambda t: t.get_total_train_batch_size(t.args)) == 4
        assert pair.same(lambda t: t.get_tp_size()) == 1
        pair.same(lambda t: tuple(t.set_initial_training_values(t.args, t.get_train_dataloader(), 4)))
    for trainer in pair.all:
        trainer.model._tp_size = 2
    assert pair.same(lambda t: t.get_tp_size()) == 2


def test_get_batch_samples(tmp_path: Path) -> None:
    pair = Pair(tmp_path, compute_loss_func=lambda outputs, labels, num_items_in_batch=None: outputs["loss"])

    def ask(trainer: Any) -> Any:
        iterator = iter(trainer.get_train_dataloader())
        found = [trainer.get_batch_samples(iterator, 3, torch.device("cpu")) for _ in range(3)]
        return [(len(batches), None if items is None else int(items)) for batches, items in found]

    assert pair.same(ask) == [(3, 6), (1, 1), (0, None)]


# -- 5. evaluation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.filterwarnings("ignore:DistributedTensorGatherer:FutureWarning")
def test_evaluate_and_predict(legacy: bool, tmp_path: Path) -> None:
    pair = Pair(tmp_path, {"use_legacy_prediction_loop": legacy}, compute_metrics=accuracy)
    found = pair.close(lambda t: without_times(t.evaluate()))
    assert sorted(found) == ["eval_accuracy", "eval_loss"]
    pair.close(lambda t: without_times(t.evaluate(make_rows(4, seed=3), metric_key_prefix="mine")))
    pair.close(lambda t: without_times(t.evaluate({"a": make_rows(4, seed=3), "b": make_rows(2)})))
    rows = make_rows(4, seed=3)
    pair.close(lambda t: (lambda p: (torch.tensor(p.predictions), torch.tensor(p.label_ids)))(t.predict(rows)))
    assert pair.same(lambda t: sorted(without_times(t.predict(rows).metrics)))
    bare = [{"x": row["x"]} for row in rows]
    assert pair.same(lambda t: t.predict(bare).label_ids) is None


@pytest.mark.filterwarnings("ignore:DistributedTensorGatherer:FutureWarning")
@pytest.mark.parametrize("name", ["evaluation_loop", "prediction_loop"])
def test_the_loops_of_an_evaluation(name: str, pair: Pair) -> None:
    def ask(trainer: Any) -> Any:
        found = getattr(trainer, name)(trainer.get_eval_dataloader(), "mine", metric_key_prefix="mine")
        return torch.tensor(found.predictions), torch.tensor(found.label_ids), without_times(found.metrics)["mine_loss"]

    pair.close(ask)
    assert pair.same(lambda t: getattr(t, name)(t.get_eval_dataloader(), "mine", True).predictions) is None


def test_prediction_step(pair: Pair) -> None:
    batch = next(iter(pair.ours.get_eval_dataloader()))
    loss, logits, labels = pair.close(lambda t: t.prediction_step(t.model.eval(), dict(batch), False))
    assert not logits.requires_grad
    assert torch.equal(labels, batch["labels"])
    assert [part is None for part in pair.ours.prediction_step(pair.ours.model, dict(batch), True)] == [
        False,
        True,
        True,
    ]
    bare = {"x": batch["x"]}
    loss, logits, labels = pair.ours.prediction_step(pair.ours.model, bare, False)
    assert loss is labels is None
    assert torch.equal(logits, pair.theirs.prediction_step(pair.theirs.model, bare, False)[1])
    assert pair.same(lambda t: t.prediction_step(t.model, dict(batch), False, ignore_keys=["logits"])[1]) == ()


def test_gathering_in_one_process(pair: Pair) -> None:
    tree = (torch.arange(2), [torch.ones(1)])
    for trainer in pair.all:
        assert trainer._nested_gather(tree, "name") is tree
        assert trainer._nested_gather(None) is trainer._gather_and_numpify(None, "name") is None
        first, (second,) = trainer._gather_and_numpify(tree, "name")
        assert isinstance(first, np.ndarray) and first.tolist() == [0, 1] and second.tolist() == [1.0]


def test_every_method_is_known() -> None:
    """Every method is called by name, here or in test_methods_files; the constructor without it."""
    from tests.trainer import test_methods_files

    text = Path(__file__).read_text() + Path(test_methods_files.__file__).read_text()
    others = [m.name for m in METHODS if m.name != "__init__"]
    assert [name for name in others if not re.search(rf"[.\"]{name}\b", text)] == []
