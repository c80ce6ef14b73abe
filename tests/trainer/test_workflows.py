"""Ways to customise a Trainer, beside the same code on transformers 4.57, and the two ways of an update."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.tiny import transformers_config
from tests.trainer.scenarios import classes, make_gpt2, make_words, token_rows, word_rows
from tests.trainer.tiny import SETTINGS, Net, make_net, make_rows
from trainkit import Trainer, TrainingArguments
from trainkit.trainer.callbacks import TrainerCallback

ARGUMENTS: dict[str, Any] = {**SETTINGS, "num_train_epochs": 2}


def losses(trainer: Any) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def tensors(trainer: Any) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in trainer.model.state_dict().items()}


def train(library: str, body: Any, folder: Path, arguments: dict[str, Any] | None = None, **given: Any) -> Any:
    """Train a subclass whose body is the same for both libraries."""
    cls, args_cls = classes(library)
    made = type("Own", (cls,), body(cls) if body else {})
    args = args_cls(str(folder / library), **{**ARGUMENTS, **(arguments or {})})
    if "model_init" not in given:
        given = {"model": make_net(), **given}
    given = {"train_dataset": make_rows(7), **given}
    if callable(make := given.get("model")) and not isinstance(make, nn.Module):
        given["model"] = make()
    trainer = made(args=args, **given)
    trainer.train()
    return trainer


def assert_same_training(body: Any, folder: Path, arguments: dict[str, Any] | None = None, **given: Any) -> Any:
    """Train with both; 4.57 rounds the logged loss to four decimals."""
    ours = train("ours", body, folder, arguments, **given)
    theirs = train("theirs", body, folder, arguments, **given)
    assert losses(ours) == pytest.approx(losses(theirs), abs=1e-4)
    for name, tensor in tensors(theirs).items():
        torch.testing.assert_close(tensors(ours)[name], tensor, rtol=1e-3, atol=2e-5)
    return ours


# -- compute_loss ----------------------------------------------------------------------------------------------------


def weighted_loss(cls: Any) -> dict[str, Any]:
    def compute_loss(
        self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs["logits"], labels, weight=torch.tensor([1.0, 2.0, 3.0]))
        return (loss, outputs) if return_outputs else loss

    return {"compute_loss": compute_loss}


def old_style_loss(cls: Any) -> dict[str, Any]:
    """As it was written before there was a count of items."""

    def compute_loss(self: Any, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super(type(self), self).compute_loss(model, inputs, return_outputs=True, **kwargs)
        loss = loss + 0.01 * sum(p.square().sum() for p in model.parameters())
        return (loss, outputs) if return_outputs else loss

    return {"compute_loss": compute_loss}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("body", [weighted_loss, old_style_loss])
def test_a_loss_of_ones_own(body: Any, accumulation: int, tmp_path: Path) -> None:
    assert_same_training(body, tmp_path, {"gradient_accumulation_steps": accumulation})


def items_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    total = F.cross_entropy(outputs["logits"], labels, reduction="sum")
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_a_loss_function_gets_the_items_of_the_whole_group(accumulation: int, tmp_path: Path) -> None:
    arguments = {"gradient_accumulation_steps": accumulation}
    ours = assert_same_training(None, tmp_path, arguments, compute_loss_func=items_loss)
    # The mean over the rows of a group, however they are cut into microbatches.
    whole = train("ours", None, tmp_path / "w", {"per_device_train_batch_size": 2 * accumulation})
    assert losses(ours) == pytest.approx(losses(whole), rel=1e-5)


# -- training_step ---------------------------------------------------------------------------------------------------


def noisy_step(cls: Any) -> dict[str, Any]:
    """Adds to the gradients, which are on the parameters then."""

    def training_step(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = cls.training_step(self, model, inputs, num_items_in_batch)
        for p in model.parameters():
            p.grad.add_(0.01 * p.detach())
        return loss

    return {"training_step": training_step}


def adversarial_step(cls: Any) -> dict[str, Any]:
    """Two backward passes through the accelerator, the second at moved weights."""

    def training_step(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        model.train()
        inputs = self._prepare_inputs(inputs)
        loss = self.compute_loss(model, dict(inputs)) / self.args.gradient_accumulation_steps
        self.accelerator.backward(loss)
        with torch.no_grad():
            moved = [(p, 0.01 * p.grad.sign()) for p in model.parameters()]
            for p, by in moved:
                p.add_(by)
        self.accelerator.backward(self.compute_loss(model, dict(inputs)) / self.args.gradient_accumulation_steps)
        with torch.no_grad():
            for p, by in moved:
                p.sub_(by)
        return loss.detach()

    return {"training_step": training_step}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("body", [noisy_step, adversarial_step])
def test_a_step_of_ones_own(body: Any, accumulation: int, tmp_path: Path) -> None:
    assert_same_training(body, tmp_path, {"gradient_accumulation_steps": accumulation, "optim": "sgd"})


# -- optimizers ------------------------------------------------------------------------------------------------------


def given_optimizers(net: Net) -> tuple[Any, Any]:
    groups = [{"params": list(net.first.parameters()), "lr": 0.2}, {"params": list(net.second.parameters())}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_an_optimizer_and_a_scheduler_of_torch(clip: float, tmp_path: Path) -> None:
    found = {}
    for library in ("ours", "theirs"):
        net = make_net()
        optimizers = given_optimizers(net)
        arguments = {"max_grad_norm": clip, "gradient_accumulation_steps": 2}
        found[library] = train(library, None, tmp_path, arguments, model=net, optimizers=optimizers)
        # What was passed is what was used.
        assert optimizers[0].state[net.first.weight]["momentum_buffer"].abs().sum() > 0
        assert found[library].lr_scheduler is optimizers[1]
        assert torch.equal(net.norm.weight, make_net().norm.weight)
    assert losses(found["ours"]) == pytest.approx(losses(found["theirs"]), abs=1e-4)
    rates = [[log["learning_rate"] for log in t.state.log_history if "loss" in log] for t in found.values()]
    assert rates[0] == rates[1]
    for name, tensor in tensors(found["theirs"]).items():
        torch.testing.assert_close(tensors(found["ours"])[name], tensor, rtol=1e-4, atol=1e-6)


def test_a_class_and_its_arguments(tmp_path: Path) -> None:
    given = (torch.optim.RMSprop, {"lr": 0.01, "alpha": 0.9})
    assert_same_training(None, tmp_path, optimizer_cls_and_kwargs=given)


# -- what a model returns --------------------------------------------------------------------------------------------


class Returns(nn.Module):
    """Returns its loss as one of the kinds that a Trainer knows."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.net, self.how = make_net(), how

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        found = self.net(x, labels)
        if self.how == "tuple":
            return tuple(found.values())
        if self.how == "ModelOutput":
            from transformers.modeling_outputs import SequenceClassifierOutput

            return SequenceClassifierOutput(**found)
        return found


@pytest.mark.parametrize("how", ["dict", "tuple", "ModelOutput"])
def test_what_a_model_may_return(how: str, tmp_path: Path) -> None:
    plain = train("ours", None, tmp_path / "plain")
    ours = assert_same_training(None, tmp_path, model=lambda: Returns(how))
    assert losses(ours) == losses(plain)


SIZES = {"vocab_size": 7, "hidden_size": 8, "intermediate_size": 8}


def bert() -> Any:
    from transformers import BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(transformers_config("BertConfig", **SIZES, num_labels=3))


def gpt2(**options: Any) -> Any:
    return make_gpt2(loss_type="ForCausalLMLoss", **options)


def llama() -> Any:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(transformers_config("LlamaConfig", **SIZES))


MODELS = {"BERT": (bert, word_rows), "GPT-2": (gpt2, token_rows), "Llama": (llama, token_rows)}


def counted_by(model: Any) -> float:
    """4.57 divides by all labels, the first ones included, of which a causal model has no loss."""
    return 1.0 if "Classification" in type(model).__name__ else 5 / 6


@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers(name: str, tmp_path: Path) -> None:
    make, rows = MODELS[name]
    found = []
    for library in ("ours", "theirs"):
        arguments = {"gradient_accumulation_steps": 2, "max_grad_norm": 1e-3}
        found.append(train(library, None, tmp_path, arguments, model=make(), train_dataset=rows()))
    ours, theirs = found
    factor = counted_by(ours.model)
    assert [factor * loss for loss in losses(ours)] == pytest.approx(losses(theirs), abs=2e-4)
    # Clipped to the same norm, so the different divisor does not show in the weights.
    for key, tensor in tensors(theirs).items():
        torch.testing.assert_close(tensors(ours)[key], tensor, rtol=1e-2, atol=1e-3)


def test_a_new_model_for_each_training(tmp_path: Path) -> None:
    for library in ("ours", "theirs"):
        trainer = train(library, None, tmp_path, model_init=lambda: Net())
        first, model = losses(trainer), trainer.model
        trainer.train()
        assert trainer.model is not model
        assert losses(trainer) == first
    assert_same_training(None, tmp_path, model_init=lambda: Net())


# -- switches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
def test_label_smoothing(accumulation: int, tmp_path: Path) -> None:
    """The arithmetic, since 4.57 needs a model with a config: (1 - e) * nll + e * mean over the classes."""
    arguments = {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": accumulation}
    ours = train("ours", None, tmp_path, arguments)

    def by_hand(cls: Any) -> dict[str, Any]:
        def compute_loss(self: Any, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            logits = model(x=inputs["x"])["logits"]
            loss = F.cross_entropy(logits, inputs["labels"], label_smoothing=0.1)
            return (loss, {"logits": logits}) if return_outputs else loss

        return {"compute_loss": compute_loss}

    expected = train("theirs", by_hand, tmp_path, {"gradient_accumulation_steps": accumulation})
    assert losses(ours) == pytest.approx(losses(expected), abs=1e-4)


def test_neftune_changes_training_and_leaves_nothing(tmp_path: Path) -> None:
    given: dict[str, Any] = {"train_dataset": word_rows()}
    ours = train("ours", None, tmp_path, {"neftune_noise_alpha": 5.0}, model=make_words(), **given)
    plain = train("ours", None, tmp_path / "plain", model=make_words(), **given)
    again = train("ours", None, tmp_path / "again", {"neftune_noise_alpha": 5.0}, model=make_words(), **given)
    assert losses(ours) != losses(plain)
    assert losses(ours) == losses(again)
    assert not ours.model.embedding._forward_hooks
    assert ours.neftune_hook_handle is None


@pytest.mark.parametrize("model", [gpt2, lambda: gpt2(resid_pdrop=0.3, embd_pdrop=0.3)], ids=["plain", "dropout"])
def test_gradient_checkpointing_changes_no_number(model: Any, tmp_path: Path) -> None:
    found = []
    for kwargs in (None, {"use_reentrant": False}):
        arguments = {"gradient_checkpointing": kwargs is not None, "gradient_checkpointing_kwargs": kwargs}
        given = {"model": model(), "train_dataset": token_rows()}
        found.append(train("ours", None, tmp_path / str(kwargs is None), arguments, **given))
    assert losses(found[0]) == pytest.approx(losses(found[1]), rel=1e-5)
    assert found[1].model.is_gradient_checkpointing


def test_bf16_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 4.57 leaves its precision in the environment, where accelerate would read it in the tests that follow.
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    ours = train("ours", None, tmp_path, {"bf16": True, "gradient_accumulation_steps": 2})
    full = train("ours", None, tmp_path / "full", {"gradient_accumulation_steps": 2})
    assert losses(ours) != losses(full)
    assert losses(ours) == pytest.approx(losses(full), rel=0.05)
    assert all(p.dtype == torch.float32 for p in ours.model.parameters())
    theirs = train("theirs", None, tmp_path, {"bf16": True, "gradient_accumulation_steps": 2})
    assert losses(ours) == pytest.approx(losses(theirs), abs=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_compiled_training_has_the_same_numbers(accumulation: int, tmp_path: Path) -> None:
    arguments = {"gradient_accumulation_steps": accumulation}
    eager = train("ours", None, tmp_path / "eager", arguments)
    compiled = train("ours", None, tmp_path / "compiled", {**arguments, "torch_compile": True})
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-4)


# -- one call per update, and microbatch by microbatch ---------------------------------------------------------------


def only_super(cls: Any) -> dict[str, Any]:
    def training_step(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        return cls.training_step(self, *args, **kwargs)

    return {"training_step": training_step}


class Listener(TrainerCallback):
    """Hears of the inside of an update, which therefore cannot be one call."""

    def __init__(self) -> None:
        self.gradients: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradients.append(
            float(sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None) ** 0.5)
        )


@dataclass(frozen=True)
class Way:
    arguments: dict[str, Any]
    given: Any


WAYS = {
    "plain": Way({}, dict),
    "accumulation": Way({"gradient_accumulation_steps": 2}, dict),
    # A third is rounded, before the sum of the gradients or after it; Adam makes much of little gradients.
    "thirds": Way({"gradient_accumulation_steps": 3, "optim": "sgd"}, dict),
    "no clipping": Way({"gradient_accumulation_steps": 2, "max_grad_norm": 0.0}, dict),
    "dropout": Way({"gradient_accumulation_steps": 2}, lambda: {"model": make_net(dropout=0.5)}),
    "items": Way({"gradient_accumulation_steps": 2}, lambda: {"compute_loss_func": items_loss}),
    "causal, dropout": Way(
        {"gradient_accumulation_steps": 2},
        lambda: {"model": gpt2(resid_pdrop=0.2, attn_pdrop=0.2), "train_dataset": token_rows()},
    ),
    "bf16": Way({"bf16": True, "gradient_accumulation_steps": 2}, dict),
    "frozen": Way({"gradient_accumulation_steps": 2}, lambda: {"model": frozen()}),
    "decay": Way({"weight_decay": 0.1, "optim": "sgd"}, dict),
}


def frozen() -> Net:
    net = make_net()
    net.first.requires_grad_(False)
    return net


@pytest.mark.parametrize("name", WAYS)
def test_both_ways_of_an_update_have_the_same_numbers(name: str, tmp_path: Path) -> None:
    way = WAYS[name]
    one = train("ours", None, tmp_path / "one", way.arguments, **way.given())
    several = train("ours", only_super, tmp_path / "several", way.arguments, **way.given())
    listener = Listener()
    heard = train("ours", None, tmp_path / "heard", way.arguments, **way.given(), callbacks=[listener])
    for other in (several, heard):
        assert losses(other) == pytest.approx(losses(one), rel=1e-6)
        norms = [[log.get("grad_norm", 0.0) for log in t.state.log_history if "loss" in log] for t in (one, other)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
        for key, tensor in tensors(one).items():
            torch.testing.assert_close(tensors(other)[key], tensor, rtol=1e-5, atol=1e-7)
    assert len(listener.gradients) == one.state.global_step


class Masked(nn.Module):
    """Remembers which of its inputs the dropout kept."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.kept = make_net(), []

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        mask = F.dropout(torch.ones_like(x), 0.5, self.training)
        self.kept.append((mask != 0).tolist())
        return self.net(x * mask, labels)


def test_both_ways_draw_the_same_masks(tmp_path: Path) -> None:
    found = []
    for body in (None, only_super):
        model = Masked()
        train("ours", body, tmp_path / str(body is None), {"gradient_accumulation_steps": 2}, model=model)
        found.append(model.kept)
    assert found[0] == found[1]
    assert len({str(mask) for mask in found[0]}) > len(found[0]) // 2


def test_the_model_is_the_truth_between_updates(tmp_path: Path) -> None:
    """A callback that writes to a parameter changes what is trained on, in both ways."""

    class Halve(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            with torch.no_grad():
                model.second.weight.mul_(0.5)

    one = train("ours", None, tmp_path / "one", callbacks=[Halve()])
    several = train("ours", only_super, tmp_path / "several", callbacks=[Halve()])
    untouched = train("ours", None, tmp_path / "untouched")
    assert losses(one) == pytest.approx(losses(several), rel=1e-6)
    assert losses(one) != pytest.approx(losses(untouched), rel=1e-3)


def test_a_trainer_needs_nothing_else(tmp_path: Path) -> None:
    trainer = Trainer(make_net(), TrainingArguments(str(tmp_path), **ARGUMENTS), train_dataset=make_rows(7))
    assert trainer.train().global_step == 8
