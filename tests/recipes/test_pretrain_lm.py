import hashlib
import json
import math
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file, load_model

from recipes import pretrain_lm
from recipes.gpt import GPT
from recipes.pretrain_lm import Config, main
from trainkit import Record, run
from trainkit.io.checkpoint import latest, verify
from trainkit.io.signals import EXIT_PREEMPTED
from trainkit.rng import fold_in_host
from trainkit.schedules import cosine, warmup

# A command line is an interface: who changes an option changes this list.
OPTIONS = [
    "data", "dataset", "validation_share", "seq_len", "batch_size", "accumulate", "steps", "num_layers", "num_heads",
    "width", "tie_weights", "learning_rate", "warmup_steps", "weight_decay", "max_grad_norm", "strategy", "device",
    "log_every", "eval_every", "eval_rows", "sample_bytes", "save_every", "resume", "resume_from", "seed",
    "folder",
]  # fmt: skip
SEQ_LEN, BATCH_SIZE, STEPS, SHARE = 16, 4, 3, 0.4
TEXTS = {f"{i}.txt": f"Text number {i}: " + "abcdefgh"[i:] * 40 for i in range(6)}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    data = tmp_path / "texts"
    data.mkdir()
    for name, text in TEXTS.items():
        (data / name).write_text(text)
    return Config(
        data=data,
        validation_share=SHARE,
        seq_len=SEQ_LEN,
        batch_size=BATCH_SIZE,
        steps=STEPS,
        num_layers=1,
        num_heads=2,
        width=16,
        warmup_steps=1,
        strategy="eager",
        device="cpu",
        log_every=2,
        eval_every=2,
        sample_bytes=8,
        folder=tmp_path / "run",
    )


def rows_of_texts() -> tuple[torch.Tensor, torch.Tensor]:
    """Training and validation rows, made without trainkit."""
    sides: tuple[bytearray, bytearray] = (bytearray(), bytearray())
    for name, text in sorted(TEXTS.items()):
        held_out = hashlib.sha256(name.encode()).digest()[0] / 256 < SHARE
        sides[held_out].extend(b"\0" + text.encode())
    whole = [(len(side) - 1) // SEQ_LEN for side in sides]
    training, validation = (
        torch.tensor([list(side[i * SEQ_LEN : (i + 1) * SEQ_LEN + 1]) for i in range(n)])
        for side, n in zip(sides, whole, strict=True)
    )
    return training, validation


def read_metrics(config: Config) -> list[dict[str, float]]:
    return [json.loads(line) for line in (config.folder / "metrics.jsonl").read_text().splitlines()]


def loaded(config: Config) -> GPT:
    module = GPT(256, 16, 1, 2, tie_weights=config.tie_weights)
    load_model(module, config.folder / "model.safetensors")
    return module


def test_the_options_are_frozen() -> None:
    assert [field.name for field in fields(Config)] == OPTIONS


def test_help_explains_every_option() -> None:
    command = [sys.executable, "-m", "recipes.pretrain_lm", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith("usage: python -m recipes.pretrain_lm ")
    assert "Train a GPT on bytes" in shown.stdout
    text = " ".join(shown.stdout.split())
    assert not [name for name in OPTIONS if f"--{name.replace('_', '-')}" not in text]
    assert "Context, in bytes. (default: 256)" in text


def test_a_run_leaves_its_files_and_describes_them(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    state = main(config)
    assert int(state.step) == STEPS
    names = sorted(file.name for file in config.folder.iterdir())
    assert names == ["checkpoints", "loss.png", "metrics.jsonl", "model.safetensors"]
    assert (config.folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert all(name in out.splitlines()[-len(names) + i] for i, name in enumerate(reversed(names)))
    assert "strategy: eager" in out


def test_the_weights_are_those_of_a_plain_loop(config: Config) -> None:
    main(config)
    torch.manual_seed(config.seed)
    module = GPT(256, 16, 1, 2)
    decayed = torch.optim.AdamW(module.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=config.weight_decay)
    rate = warmup(cosine(config.learning_rate, STEPS - 1, final=config.learning_rate / 10), 1)
    rows, _ = rows_of_texts()
    generator = torch.Generator().manual_seed(fold_in_host(config.seed, 0))
    order = torch.randperm(len(rows), generator=generator)
    for i in range(STEPS):
        batch = rows[order[i * BATCH_SIZE : (i + 1) * BATCH_SIZE]]
        loss = torch.nn.functional.cross_entropy(module(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        decayed.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), config.max_grad_norm)
        decayed.param_groups[0]["lr"] = float(rate(torch.tensor(i)))
        decayed.step()
    found = loaded(config)
    for name, p in module.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), p, rtol=1e-4, atol=1e-6)


def test_bits_per_byte_are_those_of_the_saved_weights(config: Config) -> None:
    main(replace(config, eval_rows=10_000))
    _, rows = rows_of_texts()
    module = loaded(config).double()
    with torch.no_grad():
        log_probs = module(rows[:, :-1]).log_softmax(-1)
    nats = -sum(float(log_probs[i, t, rows[i, t + 1]]) for i in range(len(rows)) for t in range(SEQ_LEN))
    expected = nats / math.log(2) / (len(rows) * SEQ_LEN)
    measured = {row["step"]: row["validation_bits_per_byte"] for row in read_metrics(config) if len(row) == 2}
    assert sorted(measured) == [2, 3]
    assert measured[STEPS] == pytest.approx(expected, rel=1e-5)


def test_a_line_of_metrics_is_the_mean_over_its_updates(config: Config) -> None:
    main(replace(config, log_every=1))
    single = [row["loss"] for row in read_metrics(config) if "loss" in row]
    main(replace(config, log_every=3))
    first, mean = [row["loss"] for row in read_metrics(config) if "loss" in row]
    assert first == single[0]
    assert mean == pytest.approx((single[1] + single[2]) / 2)


def test_accumulation_gives_the_same_weights(config: Config) -> None:
    main(config)
    whole = load_file(config.folder / "model.safetensors")
    main(replace(config, accumulate=3))
    for name, tensor in load_file(config.folder / "model.safetensors").items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-4, atol=1e-6)


def test_tied_weights_are_saved_once_and_load(config: Config) -> None:
    config = replace(config, tie_weights=True)
    state = main(config)
    assert len(load_file(config.folder / "model.safetensors")) == len(state.params.keys())
    module = loaded(config)
    assert torch.equal(module.head.weight, state.params["embedding.weight"])


def test_a_text_file_will_do(config: Config) -> None:
    file = config.folder.parent / "one.txt"
    file.write_text("All work and no play. " * 30)
    assert int(main(replace(config, data=file)).step) == STEPS


def test_a_dataset_folder_will_do(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", config.folder.parent / "cache")
    folder = config.folder.parent / "dataset"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS.values()))
    assert int(main(replace(config, data=None, dataset=str(folder))).step) == STEPS


Results = tuple[list[dict[str, float]], dict[str, torch.Tensor], list[str]]


def results(config: Config) -> Results:
    """The log without its speed, the weights, and the names of the checkpoints."""
    rows = [{k: v for k, v in row.items() if k != "bytes_per_second"} for row in read_metrics(config)]
    names = sorted(path.name for path in (config.folder / "checkpoints").glob("checkpoint-*"))
    return rows, load_file(config.folder / "model.safetensors"), names


def same(a: Results, b: Results) -> bool:
    (rows, weights, names), (other_rows, other_weights, other_names) = a, b
    equal = weights.keys() == other_weights.keys() and all(torch.equal(weights[k], other_weights[k]) for k in weights)
    return rows == other_rows and names == other_names and equal


class Interrupted(Exception):
    pass


def test_a_resumed_run_is_the_run_that_was_never_interrupted(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(config, steps=9, save_every=2, log_every=3, eval_every=4)
    whole = replace(config, folder=config.folder.parent / "whole")
    main(whole)
    assert results(whole)[2] == ["checkpoint-6", "checkpoint-8", "checkpoint-9"]

    def ends_at(number: int) -> None:
        def interrupted(step: object, state: object, batches: object) -> Iterator[Record]:
            for record in run(step, state, batches):  # type: ignore[arg-type]
                yield record
                if record.step == number:
                    raise Interrupted

        monkeypatch.setattr(pretrain_lm, "run", interrupted)

    for number in (1, 3, 4, 7):
        ends_at(number)
        with pytest.raises(Interrupted):
            main(replace(config, resume=number > 1))
    monkeypatch.setattr(pretrain_lm, "run", run)
    main(replace(config, resume=True))
    assert same(results(config), results(whole))
    before = {file: file.stat().st_mtime_ns for file in (config.folder / "checkpoints").rglob("c*/*")}
    main(replace(config, resume=True))
    assert same(results(config), results(whole))
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_what_ends_before_its_first_save_is_not_taken_for_the_run_before(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(replace(config, seed=1))
    whole = replace(config, folder=config.folder.parent / "whole")
    main(whole)

    def interrupted(step: object, state: object, batches: object) -> Iterator[Record]:
        yield next(run(step, state, batches))  # type: ignore[arg-type]
        raise Interrupted

    monkeypatch.setattr(pretrain_lm, "run", interrupted)
    with pytest.raises(Interrupted):
        main(config)
    monkeypatch.setattr(pretrain_lm, "run", run)
    main(replace(config, resume=True))
    assert same(results(config), results(whole))


GOES_BACK = """
import os, pathlib, sys, time
from recipes import pretrain_lm
from trainkit import run

manifest = pathlib.Path(sys.argv[-1], "checkpoints", "checkpoint-4", "manifest.json")


def interrupted(step, state, batches):
    for record in run(step, state, batches):
        yield record
        if record.step == 5:
            while not manifest.exists():
                time.sleep(0.01)
            os.kill(os.getpid(), 9)


pretrain_lm.run = interrupted
pretrain_lm.main(pretrain_lm.parse(pretrain_lm.Config))
"""


def test_a_run_goes_back_to_an_older_checkpoint(config: Config) -> None:
    config = replace(config, steps=6, save_every=2, log_every=1, eval_every=6)
    main(config)
    whole = results(config)
    checkpoints = config.folder / "checkpoints"
    start = checkpoints / "checkpoint-2"
    assert whole[2] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    # Killed after its first save; at another rate, so that it can be told from the run before.
    gone_back = replace(config, resume_from=start, learning_rate=1e-3)
    changed = {k: v for k, v in vars(gone_back).items() if v != getattr(Config(), k)}
    options = [f"--{k.replace('_', '-')}={v}" for k, v in changed.items() if k != "folder"]
    command = [sys.executable, "-c", GOES_BACK, *options, "--folder", str(config.folder)]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL and f"resumed from {start} at step 2" in result.stdout
    assert "its newer checkpoints are set aside and not removed" in result.stderr
    assert latest(checkpoints) == checkpoints / "checkpoint-4"
    for step in (4, 6):
        (old,) = checkpoints.glob(f"checkpoint-{step}.abandoned-*")
        verify(old)
    # An ordinary resumption goes on with the newer run, and ends as one that was not killed, in a folder of its own.
    main(replace(gone_back, resume=True, resume_from=None))
    other = replace(gone_back, folder=config.folder.parent / "other")
    main(other)
    (rows, weights, names), (other_rows, other_weights, _) = results(gone_back), results(other)
    assert [name for name in names if "abandoned" not in name] == whole[2] and len(names) == 5
    assert [row["step"] for row in rows] == [row["step"] for row in whole[0]]
    assert rows[-1] == other_rows[-1] != whole[0][-1]
    assert all(torch.equal(weights[k], other_weights[k]) for k in weights)


PROGRAM = """
import json, pathlib, sys
from recipes.pretrain_lm import Config, main

options = json.loads(sys.argv[1])
main(Config(**{k: pathlib.Path(v) if k in ("data", "folder") else v for k, v in options.items()}))
"""


def test_a_signal_ends_the_run_with_a_checkpoint_and_its_own_exit_code(config: Config, tmp_path: Path) -> None:
    config = replace(config, steps=400, save_every=1000, log_every=7, eval_every=1000)
    whole = replace(config, folder=tmp_path / "whole")
    main(whole)
    told = {k: str(v) if isinstance(v, Path) else v for k, v in vars(config).items()}
    command = [sys.executable, "-c", PROGRAM, json.dumps(told)]
    process = subprocess.Popen(
        command, cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    log = config.folder / "metrics.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) > 3):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == EXIT_PREEMPTED
    first, saved = sorted((config.folder / "checkpoints").glob("checkpoint-*"), key=lambda path: len(path.name))
    assert first.name == "checkpoint-0"
    assert 20 < int(saved.name.split("-")[1]) < 400
    main(replace(config, resume=True))
    (rows, weights, _), (other_rows, other_weights, _) = results(config), results(whole)
    assert rows == other_rows
    assert all(torch.equal(weights[k], other_weights[k]) for k in other_weights)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"data": Path("nowhere")},
            FileNotFoundError,
            "data: nothing is at 'nowhere'; expected a text file or a folder",
        ),
        (
            {"seq_len": 5000},
            ValueError,
            "do not fill a row of seq_len \\+ 1 = 5001; give more text or a smaller seq_len",
        ),
        ({"batch_size": 500}, ValueError, "batch_size: got 500 with drop_last for .* rows"),
        ({"strategy": "fast"}, ValueError, "strategy: got 'fast', expected 'auto', 'whole', 'split' or 'eager'"),
        ({"dataset": "name"}, ValueError, "data and dataset: both are given"),
        ({"steps": 0}, ValueError, "steps"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(
    config: Config, changes: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        main(replace(config, **changes))  # type: ignore[arg-type]
    assert not config.folder.exists()


@pytest.mark.slow
def test_the_defaults_learn(tmp_path: Path) -> None:
    config = Config(folder=tmp_path, device="cpu")
    main(config)
    last = [row for row in read_metrics(config) if "validation_bits_per_byte" in row][-1]
    assert last["validation_bits_per_byte"] < 2.4
