"""Checkpoints of transformers' Trainer go on in trainkit as they would there; model folders are read and written."""

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from trainkit import init_state, make_train_step, run, write_to
from trainkit.io.checkpoint import CheckpointError, CheckpointWarning, save
from trainkit.io.checkpoint.interop import ImportedRun, hf_decayed_names, import_hf_trainer
from trainkit.io.checkpoint.model_files import export_model, read_model
from trainkit.io.checkpoint.pretrained import from_pretrained, save_pretrained
from trainkit.losses import huggingface_loss
from trainkit.optim import adamw, chain, clip_by_global_norm, from_torch, partition, sgd
from trainkit.schedules import linear, warmup

VOCABULARY, ROWS, LENGTH, BATCH = 31, 40, 10, 4
STEPS, STOP = 12, 7
RATE, WARMUP, DECAY, NORM = 1e-2, 3, 0.3, 0.5


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
        attention_bias=True,
    )
    return transformers.LlamaForCausalLM(config)


def rows() -> list[dict[str, Tensor]]:
    tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    # Unequal counts of tokens, so that a mean of means is not the mean. Nothing predicts the first token of a row, but
    # the Trainer counts it where it has a label.
    for i in range(ROWS):
        labels[i, : 1 + i % 6] = -100
    return [{"input_ids": t, "labels": label} for t, label in zip(tokens, labels, strict=True)]


class InOrder(transformers.Trainer):
    """The Trainer with the rows in their order, that adds up the losses of the microbatches of every step."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.losses: dict[int, float] = {}

    def _get_train_sampler(self, *args: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        loss = super().training_step(*args, **options)
        step = self.state.global_step
        self.losses[step] = self.losses.get(step, 0.0) + float(loss)
        return loss


@dataclass
class Reference:
    """What the Trainer did: stopped and saved at STOP, and went on in another process' stead."""

    checkpoint: Path
    losses: list[float]
    final: dict[str, Tensor]
    accumulate: int
    one_group: bool = False


def trainer(folder: Path, accumulate: int, one_group: bool) -> InOrder:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=accumulate,
        max_steps=STEPS,
        save_steps=STOP,
        learning_rate=RATE,
        warmup_steps=WARMUP,
        weight_decay=DECAY,
        max_grad_norm=NORM,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    model = llama()
    own = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY) if one_group else None
    return InOrder(model=model, args=arguments, train_dataset=rows(), optimizers=(own, None))


def trained(folder: Path, accumulate: int = 1, one_group: bool = False) -> Reference:
    trainer(folder, accumulate, one_group).train()
    checkpoint = folder / f"checkpoint-{STOP}"
    second = trainer(folder, accumulate, one_group)
    second.train(resume_from_checkpoint=str(checkpoint))
    final = {name: p.detach().clone() for name, p in second.model.named_parameters()}
    assert list(second.losses) == list(range(STOP, STEPS))
    return Reference(checkpoint, list(second.losses.values()), final, accumulate, one_group)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return trained(tmp_path_factory.mktemp("reference"))


def schedule() -> Any:
    return warmup(linear(RATE, 0.0, STEPS - WARMUP), WARMUP)


def optimizer_of(module: nn.Module, make: Callable[..., Any], one_group: bool = False) -> Any:
    if one_group:
        return chain(clip_by_global_norm(NORM), make(schedule(), weight_decay=DECAY))
    decayed = hf_decayed_names(module)
    parts = {"decay": make(schedule(), weight_decay=DECAY), "rest": make(schedule(), weight_decay=0.0)}
    return chain(clip_by_global_norm(NORM), partition(parts, lambda n, p: "decay" if n in decayed else "rest"))


def lifted(rate: Any, **options: Any) -> Any:
    return from_torch(torch.optim.AdamW, lr=rate, **options)


def continued(reference: Reference, make: Callable[..., Any]) -> tuple[ImportedRun, list[float], dict[str, Tensor]]:
    """The rest of the run in trainkit, from the place that the checkpoint names."""
    module = llama()
    # Values must come from the checkpoint.
    nn.init.zeros_(module.model.embed_tokens.weight)
    module.train()
    optimizer = optimizer_of(module, make, reference.one_group)
    batches_per_epoch = ROWS // BATCH if reference.accumulate > 1 else None
    found = import_hf_trainer(
        reference.checkpoint,
        module,
        optimizer,
        schedule=schedule(),
        batches_per_epoch=batches_per_epoch,
        accumulate=reference.accumulate,
    )
    step = make_train_step(huggingface_loss(module), optimizer, accumulate=reference.accumulate)
    data, at, size = rows(), found.batch * BATCH, BATCH * reference.accumulate
    batches = []
    for _ in range(STEPS - STOP):
        chosen = data[at : at + size]
        batches.append({name: torch.stack([row[name] for row in chosen]) for name in chosen[0]})
        at = (at + len(chosen)) % ROWS
    records = list(run(step, found.state, batches))
    losses = [float(record.metrics["loss"].compute()) for record in records]
    return found, losses, dict(records[-1].state.params.items())


def assert_goes_on_alike(reference: Reference, make: Callable[..., Any]) -> ImportedRun:
    found, losses, params = continued(reference, make)
    # float32: the Trainer divides the loss where trainkit divides the gradient, and the norm is added up otherwise.
    assert losses == pytest.approx(reference.losses, rel=1e-5)
    assert params.keys() == reference.final.keys()
    for name, tensor in params.items():
        torch.testing.assert_close(tensor, reference.final[name], rtol=0, atol=2e-6)
    return found


@pytest.mark.parametrize("make", [adamw, lifted])
def test_a_run_goes_on_as_in_the_trainer(reference: Reference, make: Callable[..., Any]) -> None:
    found = assert_goes_on_alike(reference, make)
    assert (int(found.state.step), found.epoch, found.batch) == (STOP, 0, STOP)
    assert found.learning_rates == pytest.approx([float(schedule()(torch.tensor(STOP)))] * 2)
    assert [group["weight_decay"] for group in found.param_groups] == [DECAY, 0.0]
    assert found.scheduler is not None and found.scheduler["last_epoch"] == STOP
    assert found.progress["max_steps"] == STEPS
    # One of the two is reached: the state of AdamW at STOP, not that of a fresh one.
    fresh = init_state(llama(), optimizer_of(llama(), make))
    step = make_train_step(huggingface_loss(llama().train()), optimizer_of(llama(), make))
    batch = {name: torch.stack([row[name] for row in rows()[:BATCH]]) for name in rows()[0]}
    cold, _ = step(fresh.replace(params=found.state.params), batch)
    warm, _ = step(found.state, batch)
    assert (cold.params["model.norm.weight"] - warm.params["model.norm.weight"]).abs().max() > 1e-4


def test_accumulated_batches_and_a_later_epoch(tmp_path: Path) -> None:
    found = assert_goes_on_alike(trained(tmp_path, accumulate=3), adamw)
    # Ten batches in an epoch make four updates, the last one of a single batch.
    assert (int(found.state.step), found.epoch, found.batch) == (STOP, 1, 9)


def test_one_group_for_all_parameters(tmp_path: Path) -> None:
    found = assert_goes_on_alike(trained(tmp_path, one_group=True), adamw)
    assert len(found.names) == 1


def import_from(folder: Path, **options: Any) -> ImportedRun:
    module = options.pop("module", None) or llama()
    optimizer = options.pop("optimizer", None) or optimizer_of(module, adamw)
    return import_hf_trainer(folder, module, optimizer, **options)


@pytest.fixture
def copy(reference: Reference, tmp_path: Path) -> Path:
    return Path(shutil.copytree(reference.checkpoint, tmp_path / "checkpoint"))


class Hostile:
    """Makes a folder when it is unpickled by somebody who trusts it."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.made,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
def test_code_in_a_checkpoint_is_not_run(copy: Path, name: str) -> None:
    made = copy.parent / "made"
    torch.save({"state": Hostile(made), "param_groups": []}, copy / name)
    with pytest.raises(CheckpointError, match=rf"{name}: cannot be read by torch.load\(weights_only=True\)"):
        import_from(copy)
    (copy / name).write_bytes(pickle.dumps(Hostile(made)))
    with pytest.raises(CheckpointError, match=name):
        import_from(copy)
    assert not made.exists()
    # It would have worked: that is what the two refuse.
    pickle.loads(pickle.dumps(Hostile(made)))
    assert made.exists()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def link(file: Path) -> None:
    file.rename(file.with_suffix(".moved"))
    file.symlink_to(file.with_suffix(".moved"))


def compress(file: Path) -> None:
    with zipfile.ZipFile(file) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in parts.items():
            new.writestr(name, data)


@pytest.mark.parametrize(
    ("name", "damage", "text"),
    [
        ("optimizer.pt", truncate, "cannot be read"),
        ("optimizer.pt", link, "is a link"),
        ("optimizer.pt", compress, "is compressed"),
        ("optimizer.pt", Path.unlink, "No such file"),
        ("scheduler.pt", truncate, "cannot be read"),
        ("model.safetensors", truncate, "one after the other"),
        ("model.safetensors", link, "is a link"),
        ("trainer_state.json", truncate, "no valid JSON"),
        ("trainer_state.json", Path.unlink, "No such file"),
        ("trainer_state.json", lambda file: file.write_text("[" * 100_000), "no valid JSON"),
        ("trainer_state.json", lambda file: file.write_text('{"global_step": "7"}'), "has no global_step"),
        ("trainer_state.json", lambda file: file.write_text('{"global_step": 7, "epoch": NaN}'), "has epoch nan"),
    ],
)
def test_damaged_files_are_refused_by_name(copy: Path, name: str, damage: Callable[[Path], Any], text: str) -> None:
    damage(copy / name)
    with pytest.raises(CheckpointError, match=rf"{name}: .*{text}"):
        import_from(copy)


def edit(copy: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    saved = torch.load(copy / "optimizer.pt", weights_only=True)
    change(saved)
    torch.save(saved, copy / "optimizer.pt")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda saved: saved.pop("param_groups"), "no state and param_groups"),
        (lambda saved: saved["state"].pop(3), "no memory for 'model.layers.0.self_attn.v_proj.weight'"),
        (
            lambda saved: saved["state"][3].pop("exp_avg"),
            r"expected those of AdamW: \['exp_avg', 'exp_avg_sq', 'step'\]",
        ),
        (
            lambda saved: saved["state"][3].update(exp_avg=torch.zeros(2)),
            r"'exp_avg' as Tensor \(2,\), expected a tensor",
        ),
        (lambda saved: saved["state"][3].update(step=7), "'step' as int"),
        (lambda saved: saved["state"][3].update(step=torch.tensor(5.0)), r"updated \[5.0, 7.0\] times"),
        (lambda saved: saved["state"][3].update(max_exp_avg_sq=torch.zeros(16, 16)), "for some parameters only"),
        (
            lambda saved: saved["param_groups"][0]["params"].pop(),
            r"have \[14, 13\] parameters, those of the module \[15, 13\]",
        ),
        (lambda saved: saved["param_groups"][0].update(params=[[]]), "no state and param_groups"),
        (lambda saved: saved["param_groups"][0].update(lr="fast"), "no state and param_groups"),
    ],
)
def test_memory_that_is_not_of_this_model_and_adamw_is_refused(copy: Path, change: Any, text: str) -> None:
    edit(copy, change)
    with pytest.raises(CheckpointError, match=text):
        import_from(copy)


@pytest.mark.parametrize(
    ("optimizer", "text"),
    [
        (sgd(0.1), r"has no place for \['exp_avg/model"),
        (adamw(RATE, amsgrad=True), r"keeps \['max_exp_avg_sq/model"),
        (from_torch(torch.optim.Adamax, lr=RATE), "exp_inf"),
        (chain(clip_by_global_norm(1.0), adamw(RATE), adamw(RATE)), r"several for \['exp_avg/model"),
    ],
)
def test_an_optimizer_with_other_memory_is_refused(copy: Path, optimizer: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        import_from(copy, optimizer=optimizer)


def test_arguments_that_contradict_the_checkpoint_are_refused(copy: Path) -> None:
    with pytest.raises(ValueError, match=r"schedule: gives 0.01 after 7 updates, the checkpoint goes on with 0.0055"):
        import_from(copy, schedule=lambda step: torch.tensor(RATE))
    with pytest.raises(ValueError, match="batches_per_epoch: needed for accumulate = 2"):
        import_from(copy, accumulate=2)
    with pytest.raises(ValueError, match=r"with 9 batches and accumulate = 1, 7 steps are 0\.7777"):
        import_from(copy, batches_per_epoch=9)
    names = [name for name, _ in llama().named_parameters()]
    with pytest.raises(ValueError, match=r"groups: .* each parameter once"):
        import_from(copy, groups=[[*names[:14], names[0]], names[14:27]])
    other = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2
    )
    with pytest.raises(CheckpointError, match="is it another model"):
        import_from(copy, module=transformers.LlamaForCausalLM(other))


def test_a_scheduler_that_ran_apart_is_told(copy: Path) -> None:
    saved = torch.load(copy / "scheduler.pt", weights_only=True)
    torch.save(saved | {"last_epoch": 9}, copy / "scheduler.pt")
    with pytest.warns(CheckpointWarning, match="made 9 steps and optimizer.pt 7"):
        import_from(copy)
    (copy / "scheduler.pt").unlink()
    assert import_from(copy).scheduler is None


def test_a_log_with_nan_does_not_hinder(copy: Path) -> None:
    progress = json.loads((copy / "trainer_state.json").read_text())
    progress["log_history"].append({"loss": float("nan")})
    (copy / "trainer_state.json").write_text(json.dumps(progress))
    assert int(import_from(copy).state.step) == STOP


def models() -> dict[str, nn.Module]:
    tiny = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {
        "llama": llama(),
        "bert": transformers.BertForMaskedLM(transformers.BertConfig(**tiny, intermediate_size=8)),
        "gpt2": transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2)),
        "t5": transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
        ),
        "qwen3": transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**tiny, intermediate_size=8, head_dim=4)),
        "plain": nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.GroupNorm(1, 2), nn.LayerNorm(4)),
    }


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "t5", "qwen3", "plain"])
def test_weight_decay_is_for_the_parameters_that_the_trainer_decays(name: str) -> None:
    module = models()[name]
    theirs = set(transformers.Trainer.get_decay_parameter_names(None, module))
    own = {name for name, _ in module.named_parameters()}
    assert hf_decayed_names(module) == theirs & own
    assert 0 < len(theirs & own) < len(own)


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "t5"])
def test_a_pretrained_folder_has_what_the_module_would_write(name: str, tmp_path: Path) -> None:
    module, other = models()[name], models()[name]
    state = init_state(module, sgd(0.1))
    # The values are the state's, not those of the module that writes.
    nn.init.zeros_(next(module.parameters()))
    folder = save_pretrained(module, state, tmp_path / "ours")
    assert not next(module.parameters()).any()
    write_to(other, state)
    other.save_pretrained(tmp_path / "theirs")
    ours, theirs = read_model(folder), read_model(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[n]) for n, tensor in ours.items())
    assert (folder / "config.json").read_text() == (tmp_path / "theirs/config.json").read_text()
    back = from_pretrained(type(module), folder)
    for n, tensor in other.state_dict().items():
        assert torch.equal(back.state_dict()[n], tensor), n


def test_a_sharded_pretrained_folder_is_read(tmp_path: Path) -> None:
    module = llama()
    folder = save_pretrained(module, init_state(module, sgd(0.1)), tmp_path / "model", max_shard_size="4KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    back = from_pretrained(transformers.AutoModelForCausalLM, folder)
    assert all(torch.equal(back.state_dict()[n], t) for n, t in module.state_dict().items())
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o644 & (folder.stat().st_mode & 0o777)}


def test_what_transformers_reads_can_be_exported_without_it(tmp_path: Path) -> None:
    module = llama()
    state = init_state(module, sgd(0.1))
    folder = export_model(state, tmp_path / "model", module=module, max_shard_bytes=6000)
    module.config.save_pretrained(folder)
    back, info = transformers.LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert all(torch.equal(back.state_dict()[n], t) for n, t in module.state_dict().items())


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "t5", "qwen3"])
def test_the_model_file_of_a_checkpoint_is_read_as_it_is(name: str, tmp_path: Path) -> None:
    module = models()[name]
    path = save(tmp_path / "run", init_state(module, adamw(1e-3)))
    folder = tmp_path / "model"
    module.config.save_pretrained(folder)
    shutil.copy(path / "model.safetensors", folder)
    back, info = type(module).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    # What is more are buffers that the module makes itself.
    assert set(info["unexpected_keys"]) <= {n for n, _ in module.named_buffers()} - module.state_dict().keys()
    assert all(torch.equal(back.state_dict()[n], t) for n, t in module.state_dict().items())


def test_pretrained_folders_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    module = llama()
    folder = save_pretrained(module, init_state(module, sgd(0.1)), tmp_path / "model")
    with pytest.raises(CheckpointError, match="is there already"):
        save_pretrained(module, init_state(module, sgd(0.1)), folder)
    load = partial(from_pretrained, transformers.LlamaForCausalLM, folder)
    weights = read_model(folder)
    rest = {name: t for name, t in weights.items() if name != "model.norm.weight"}
    for changed, text in [(rest, "missing_keys.*model.norm.weight"), (weights | {"x": torch.ones(1)}, "unexpected.*x")]:
        shutil.rmtree(folder)
        export_model(changed, folder)
        module.config.save_pretrained(folder)
        with pytest.raises(CheckpointError, match=text):
            load()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be read: No such file"):
        load()


def test_modules_and_states_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Linear has no save_pretrained"):
        save_pretrained(nn.Linear(2, 2), init_state(nn.Linear(2, 2), sgd(0.1)), tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"state: has no 'model\.embed_tokens\.weight'"):
        save_pretrained(llama(), init_state(nn.Linear(2, 2), sgd(0.1)), tmp_path / "model")
    assert not list(tmp_path.iterdir())
