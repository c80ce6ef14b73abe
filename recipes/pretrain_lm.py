"""Train a GPT on bytes, from scratch.

    python -m recipes.pretrain_lm                      # the source files of this Python's standard library
    python -m recipes.pretrain_lm --data my_texts/     # a text file, or a folder of them
    python -m recipes.pretrain_lm --resume             # go on with a run that was interrupted
    python -m recipes.pretrain_lm --help               # every option, with its unit

On 2 CPU cores (AMD EPYC, torch 2.13) the defaults train 0.85 million parameters in about 3 minutes, compiling included,
to about 1.95 bits per byte of validation text; a model that knows nothing needs 8. The run folder then holds
the weights, the metrics and a picture of the loss.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_model
from torch import Tensor
from tqdm import tqdm

from recipes.gpt import GPT, next_byte, sample
from trainkit import TrainState, evaluate, init_state, make_eval_step, make_train_step, run
from trainkit.execution import compile_step
from trainkit.io.checkpoint import Saver, load, load_latest
from trainkit.io.cli import parse
from trainkit.io.data import Loader
from trainkit.io.data.text import SEPARATOR, pack, split_by_name, text_documents
from trainkit.io.runlog import JsonLines, MetricWindow, describe_folder, plot_curves, read_jsonl
from trainkit.io.signals import EXIT_PREEMPTED, stop_on
from trainkit.losses import module_loss
from trainkit.optim import adamw, chain, clip_by_global_norm
from trainkit.schedules import cosine, warmup
from trainkit.state import num_parameters, write_to


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to train, on what, how, and where the results go."""

    data: Path | None = None
    """Text to train on: a file, or a folder whose files are read. Default: the standard library's sources."""
    dataset: str | None = None
    """Instead of data: a dataset with a text column, by its hub name (name:config) or as a local folder."""
    validation_share: float = 0.1
    """Share of the documents held out for validation, between 0 and 1; documents are not split."""
    seq_len: int = 256
    """Context, in bytes."""
    batch_size: int = 8
    """Rows of seq_len bytes per update."""
    accumulate: int = 1
    """Microbatches that a batch is cut into, to save memory; the result is the same."""
    steps: int = 1200
    """Number of updates."""
    num_layers: int = 4
    """Number of transformer blocks."""
    num_heads: int = 4
    """Attention heads per block."""
    width: int = 128
    """Width of the model, in features; a multiple of twice the number of heads."""
    tie_weights: bool = False
    """Use the byte embedding as the output layer as well."""
    learning_rate: float = 4e-3
    """Highest learning rate of AdamW, in parameter units per update."""
    warmup_steps: int = 60
    """Updates in which the rate rises from 0; it then falls along a cosine to a tenth of its peak."""
    weight_decay: float = 0.1
    """Share of a weight that an update removes, per unit of learning rate."""
    max_grad_norm: float = 1.0
    """Joint L2 norm that larger gradients are scaled down to; inf turns it off."""
    strategy: Literal["auto", "whole", "split", "eager"] = "auto"
    """How a step runs: as one graph, as two, not compiled, or as the first of these that works."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to train: cpu, cuda, cuda:1, ..."""
    log_every: int = 20
    """Updates per line of metrics.jsonl, which is the exact mean over them."""
    eval_every: int = 300
    """Updates between two validations; there is always one at the end."""
    eval_rows: int = 256
    """Rows of seq_len bytes to validate on, spread evenly over the validation text."""
    sample_bytes: int = 400
    """Length of the text that the trained model writes, in bytes."""
    save_every: int = 300
    """Updates between two checkpoints; there is always one at the end. The last 3 stay."""
    resume: bool = False
    """Go on from the newest checkpoint in the folder; the result is that of a run that was never interrupted."""
    resume_from: Path | None = None
    """Go on from this checkpoint instead; newer ones of the run in its folder are set aside."""
    seed: int = 0
    """Decides the first weights, the order of the data and the sample; an integer of 64 bits."""
    folder: Path = Path("runs/pretrain_lm")
    """Where the results go; without resume those of an earlier run in the same folder are replaced."""


RESULTS = {
    "model.safetensors": "the weights, under the module's names; safetensors.torch.load_model reads them",
    "metrics.jsonl": "one JSON object per line: loss, learning rate, gradient norm and speed over the steps",
    "loss.png": "training and validation loss over the steps",
    "checkpoints": "what --resume goes on from",
}


def main(config: Config) -> TrainState:
    device = torch.device(config.device)

    # Data: documents are split whole, then packed into rows of seq_len inputs and their targets.
    parts = split_by_name(text_documents(config.data, config.dataset), config.validation_share)
    training, validation = (pack(part, config.seq_len) for part in parts)
    order = partial(Loader, batch_size=config.batch_size, seed=config.seed, batches=config.steps, drop_last=True)
    loader = order(training, collate=Tensor.long, device=device)
    chosen = validation[:: math.ceil(len(validation) / config.eval_rows)].to(device, torch.int64)
    validation_batches = torch.split(chosen, config.batch_size)

    # Model: tokens are bytes. The loss is a function of the state's tensors, not of the module's.
    torch.manual_seed(config.seed)
    module = GPT(256, config.width, config.num_layers, config.num_heads, tie_weights=config.tie_weights).to(device)
    loss = module_loss(module, next_byte, inputs=lambda rows: rows[:, :-1], targets=lambda rows: rows[:, 1:])

    # Optimizer: clip, then AdamW at a rate that rises and falls.
    rise = min(config.warmup_steps, config.steps - 1)
    fall = cosine(config.learning_rate, config.steps - rise, final=config.learning_rate / 10)
    decayed = adamw(warmup(fall, rise), betas=(0.9, 0.95), weight_decay=config.weight_decay)
    optimizer = chain(clip_by_global_norm(config.max_grad_norm), decayed)
    state = init_state(module, optimizer, seed=config.seed)

    # Step: one update. The compiled step works in the memory of the state it is given.
    step = compile_step(make_train_step(loss, optimizer, accumulate=config.accumulate), strategy=config.strategy)
    print(f"{num_parameters(state.params):,} parameters on {device}, {training[:, 1:].numel():,} bytes to train on")

    # Checkpoint: the state, the position of the data, and what is not in the log yet.
    checkpoints = config.folder / "checkpoints"
    found = load(config.resume_from, like=state) if config.resume_from else None
    if config.resume and found is None:
        found = load_latest(checkpoints, like=state)
    saver = Saver(checkpoints, resumed_from=found.path if found else None, overwrite=not (found or config.resume))
    first, window, spent = 0, MetricWindow(), 0.0
    if found is None:
        # Before the log of an earlier run goes, so that whatever ends now goes on as this run and not as that one.
        saver.save(state, cursor=loader.state_dict(), metadata=[{}, 0.0])
        saver.wait()
    else:
        state, first, (merged, spent) = found.state, found.step, found.metadata
        window = MetricWindow(merged)
        loader.load_state_dict(found.cursor)
        print(f"resumed from {found.path} at step {first}")
    log = JsonLines(config.folder / "metrics.jsonl", until=first)

    # Loop: a record comes after every update; what to do with it is written here.
    since = time.perf_counter() - spent
    with stop_on() as stop, saver, log, tqdm(initial=first, total=config.steps, unit="step") as bar:
        for record in run(step, state, loader):
            state, is_last = record.state, record.step == config.steps
            window.add(record.metrics)
            bar.update()
            if record.step == first + 1:
                bar.write(str(step.explain()))
            if record.step == 1 or record.step % config.log_every == 0 or is_last:
                # The numbers are read here; between two readings the host does not wait for the device.
                row = window.read()
                if not math.isfinite(row["loss"]):
                    raise FloatingPointError(f"loss: {row['loss']} at step {record.step}; try a lower learning_rate")
                row["bytes_per_second"] = row.pop("tokens") / (time.perf_counter() - since)
                log.write(step=record.step, **row)
                bar.set_postfix_str("{bits_per_byte:.3f} bits/byte, {bytes_per_second:,.0f} bytes/s".format(**row))
                since = time.perf_counter()
            if record.step % config.eval_every == 0 or is_last:
                before = time.perf_counter()
                bits = float(evaluate(make_eval_step(loss), state, validation_batches)["bits_per_byte"].compute())
                log.write(step=record.step, validation_bits_per_byte=bits)
                bar.write(f"step {record.step}: validation {bits:.3f} bits per byte")
                since += time.perf_counter() - before
            if (stopping := bool(stop)) or is_last or record.step % config.save_every == 0:
                log.sync()
                not_logged = [window.state_dict(), time.perf_counter() - since]
                saver.save(state, cursor=loader.state_dict(), metadata=not_logged)
            if stopping and not is_last:
                sys.exit(EXIT_PREEMPTED)

    # Results: the weights under the module's own names, the curves, a text that the model writes.
    write_to(module, state)
    save_model(module, str(config.folder / "model.safetensors"))
    curves = {"bits_per_byte": "training", "validation_bits_per_byte": "validation"}
    rows = read_jsonl(config.folder / "metrics.jsonl")
    plot_curves(rows, config.folder / "loss.png", curves, y_label="bits per byte")
    prompt = torch.tensor(list(SEPARATOR), device=device)
    written = sample(module, prompt, context=config.seq_len, temperature=0.8, seed=config.seed)
    print(bytes(itertools.islice(written, config.sample_bytes)).decode(errors="replace"), end="\n\n")
    print(describe_folder(config.folder, RESULTS))
    return state


if __name__ == "__main__":
    main(parse(Config, description=__doc__))
