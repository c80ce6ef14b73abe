"""Subclasses as users write them, with and without the number of items, beside a plain loop."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.trainer.tiny import Net, make_net, make_rows
from trainkit import Trainer, TrainerCallback, TrainingArguments

ROWS, BATCH, GROUP, RATE = 10, 2, 2, 0.1


class Open(nn.Module):
    """A net that takes any keyword, so that it is told the number of items; it divides by that."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, labels: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        logits = self.net(x)["logits"]
        n = kwargs.get("num_items_in_batch")
        total = F.cross_entropy(logits, labels, reduction="sum")
        return {"loss": total / (len(labels) if n is None else n), "logits": logits}


class WithoutCount(Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:
        outputs = model(**inputs)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]


class MeanInSpiteOfCount(Trainer):
    loss_is_scaled_for_ga = False

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]


class StepWithoutCount(Trainer):
    def training_step(self, model: Any, inputs: Any) -> Tensor:
        return super().training_step(model, inputs)


def trained(cls: type[Trainer], model: nn.Module, folder: Path, **options: Any) -> Trainer:
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=GROUP,
        num_train_epochs=1,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = make_rows(ROWS)
    trainer = cls(model=model, args=args, train_dataset=rows, eval_dataset=rows, **options)
    trainer.train()
    return trainer


def by_hand(net: Net) -> list[float]:
    """Mean of the microbatches' means, in the order that the Trainer's loader has."""
    loader = Trainer(
        model=make_net(),
        args=TrainingArguments("unused", per_device_train_batch_size=BATCH, report_to="none", use_cpu=True),
        train_dataset=make_rows(ROWS),
    ).get_train_dataloader()
    losses, batches = [], list(loader)
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    for start in range(0, len(batches), GROUP):
        group = batches[start : start + GROUP]
        loss = sum(net(**batch)["loss"] for batch in group) / len(group)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("cls", [WithoutCount, MeanInSpiteOfCount, StepWithoutCount])
@pytest.mark.parametrize("wrap", [lambda net: net, Open], ids=["named", "open"])
def test_means_are_averaged_over_the_group(cls: type[Trainer], wrap: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    net, plain = make_net(), make_net()
    trainer = trained(cls, wrap(net), tmp_path / "run")
    logged = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert logged == pytest.approx(by_hand(plain), rel=1e-5)
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert "eval_loss" in trainer.evaluate()


class Quiet(TrainerCallback):
    """Puts one submodule into evaluation mode before each update."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.dropout.eval()


class ByMicrobatch(Trainer):
    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().training_step(*args, **kwargs)


def test_the_mode_of_a_submodule_is_the_same_on_both_paths(tmp_path: Path) -> None:
    def losses(cls: type[Trainer]) -> list[float]:
        trainer = trained(cls, make_net(dropout=0.5), tmp_path / cls.__name__, callbacks=[Quiet()])
        return [log["loss"] for log in trainer.state.log_history if "loss" in log]

    assert losses(Trainer) == pytest.approx(losses(ByMicrobatch), rel=1e-6)


@pytest.mark.slow
def test_an_error_in_a_compiled_run_leaves_the_optimizer_as_its_own_step_needs_it(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    args = TrainingArguments(
        str(tmp_path), torch_compile=True, max_steps=2, save_strategy="no", report_to="none", use_cpu=True
    )
    trainer = Trainer(model=make_net(), args=args, train_dataset=make_rows(ROWS), callbacks=[Stop()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    counters = [memory["step"] for memory in trainer.optimizer.state.values()]
    assert len({counter.data_ptr() for counter in counters}) == len(counters) > 1
    assert {float(counter) for counter in counters} == {1.0}


def test_what_a_subclass_knows_better_stays_when_model_init_makes_the_model(tmp_path: Path) -> None:
    class Knowing(Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.label_names, self.model_accepts_loss_kwargs = ["labels", "x"], True

    args = TrainingArguments(str(tmp_path), max_steps=1, save_strategy="no", report_to="none", use_cpu=True)
    trainer = Knowing(model_init=lambda: make_net(), args=args, train_dataset=make_rows(ROWS))
    with pytest.raises(TypeError, match="num_items_in_batch"):
        trainer.train()
    assert trainer.label_names == ["labels", "x"]


def test_the_level_of_the_log_is_that_of_the_arguments(tmp_path: Path) -> None:
    logger = logging.getLogger("trainkit")
    before = logger.level
    try:
        for word, level in (("error", logging.ERROR), ("passive", logging.ERROR), ("info", logging.INFO)):
            Trainer(make_net(), TrainingArguments(str(tmp_path), log_level=word, report_to="none", use_cpu=True))
            assert logger.level == level
    finally:
        logger.setLevel(before)
