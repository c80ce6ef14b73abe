"""Interrupted after any step and resumed equals never interrupted, over what may differ between runs."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from trainkit import init_state, make_train_step, run
from trainkit.execution import compile_step
from trainkit.execution.precision import bf16_mixed, full
from trainkit.io.checkpoint import Retention, Saver, load, verify
from trainkit.io.data import Loader
from trainkit.losses import classification, module_loss
from trainkit.optim import adamw, chain, clip_by_global_norm

ROWS, BATCH, EPOCHS = 22, 6, 2
STEPS = EPOCHS * -(-ROWS // BATCH)


def row(i: int) -> tuple[Tensor, Tensor]:
    return torch.tensor([float(i), 1.0, i % 5, i % 3]), torch.tensor(i % 3)


class Stream(IterableDataset[Any]):
    """Without a state of its own."""

    def __iter__(self) -> Iterator[Any]:
        return map(row, range(ROWS))


def outcome(folder: Path, *, start: Path | None, options: dict[str, Any]) -> tuple[list[float], dict[str, Any]]:
    """Train to the end, saving after every step.

    Returns: the losses of the steps that ran, and the digests of the last checkpoint's files.
    """
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.Dropout(options["dropout"]), nn.Tanh(), nn.Linear(8, 3))
    tx = chain(clip_by_global_norm(1.0), adamw(1e-2))
    policy = {"fp32": full, "bf16": bf16_mixed}[options["precision"]]()
    loss = module_loss(module, classification, inputs=0, targets=1)
    step = compile_step(
        make_train_step(loss, tx, accumulate=options["accumulate"], precision=policy), strategy=options["strategy"]
    )
    data = Stream() if options["stream"] else [row(i) for i in range(ROWS)]
    loader = Loader(data, batch_size=BATCH, shuffle=options["shuffle"], workers=options["workers"], seed=3)
    state = init_state(module, tx, seed=5)
    if start is not None:
        restored = load(start, state)
        state = restored.state
        loader.load_state_dict(restored.cursor)
    torch.rand(7)
    losses = []
    with Saver(folder, keep=Retention(last=100), run_id="run") as saver:
        for record in run(step, state, loader.epochs(EPOCHS)):
            losses.append(float(record.metrics["loss"].compute()))
            saver.save(record.state, cursor=loader.state_dict(), metadata={"losses": len(losses)})
        final = saver.wait()
    assert final == folder / f"checkpoint-{STEPS}"
    files = verify(final).files
    return losses, {name: files[name] for name in ("model.safetensors", "training.safetensors")}


def cases() -> Iterator[Any]:
    names = ("dropout", "shuffle", "accumulate", "workers", "precision", "stream")
    for values in itertools.product((0.0, 0.5), (False, True), (1, 3), (0, 2), ("fp32", "bf16"), (False, True)):
        options = dict(zip(names, values, strict=True)) | {"strategy": "eager"}
        # By default those where most comes together; each value occurs.
        usual = values[0] == 0.5 and values[1] and not values[3] and values[2] == (3 if values[4] == "bf16" else 1)
        yield pytest.param(options, marks=() if usual else pytest.mark.slow, id="-".join(map(str, values)))
    both = {"dropout": 0.5, "shuffle": True, "accumulate": 3, "workers": 2, "precision": "fp32", "stream": False}
    yield pytest.param(both | {"strategy": "whole"}, marks=pytest.mark.slow, id="whole")
    yield pytest.param(both | {"strategy": "split", "workers": 0}, marks=pytest.mark.slow, id="split")
    yield pytest.param(both | {"strategy": "eager"}, id="workers")


@pytest.mark.parametrize("options", list(cases()))
def test_a_run_that_goes_on_after_any_step_ends_in_the_same_bits(options: dict[str, Any], tmp_path: Path) -> None:
    losses, final = outcome(tmp_path / "whole", start=None, options=options)
    assert len(losses) == STEPS
    for k in range(1, STEPS):
        start = tmp_path / "whole" / f"checkpoint-{k}"
        rest, end = outcome(tmp_path / f"from {k}", start=start, options=options)
        assert rest == losses[k:]
        assert end == final
