"""Runs that save in one number of processes and go on in another, as test_worlds.py starts them in one and in two.

``python -m tests.trainer.world_programs FOLDER CASE...``: in this process, of those that a launcher started, every case
from its beginning, and then from the checkpoint that a single process has left in ``FOLDER``. What it saw goes to
``FOLDER/result-<rank>.json``. With ``part`` as the case it trains, and ends at the worst moment.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.trainer.tiny import SETTINGS, make_net, make_rows
from trainkit import Gradients, Trainer, TrainerCallback, TrainingArguments, init_state, make_train_step, run
from trainkit.io.checkpoint import Saver, load_latest
from trainkit.io.data import Loader
from trainkit.losses import classification, module_loss
from trainkit.optim import adamw

GLOBAL_BATCH, ROWS, SAVED = 4, 22, 4
"""Rows of all processes in a batch, rows of the data, and the step that is saved: in the middle of an epoch."""
_STEPS = 11
Result = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Which process this is.

    Args:
        rank: from 0.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1


def digest(tree: Any) -> str:
    """Of the bits of every tensor, and of everything else."""
    found = hashlib.sha256()
    for leaf in pytree.tree_leaves(tree):
        found.update(leaf.detach().numpy().tobytes() if isinstance(leaf, Tensor) else repr(leaf).encode())
    return found.hexdigest()


class _Watches(TrainerCallback):
    """The state when it is saved and when it has been loaded."""

    def __init__(self) -> None:
        self.saved = self.loaded = ""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == SAVED:
            self.saved = _of_trainer(**kwargs)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.loaded = _of_trainer(**kwargs)


def _of_trainer(model: Any, optimizer: Any, **kwargs: Any) -> str:
    return digest([model.state_dict(), optimizer.state_dict()])


def trained(folder: Path, source: Path | None, place: Place, **changes: Any) -> Result:
    """A run of the Trainer, from the beginning or from the checkpoint in ``source``."""
    given = {
        **SETTINGS,
        "per_device_train_batch_size": GLOBAL_BATCH // place.world,
        "num_train_epochs": 2,
        "save_strategy": "steps",
        "save_steps": SAVED,
        "ddp_timeout": 60,
        "optim": "adamw_torch",
        "learning_rate": 0.01,
    }
    watches = _Watches()
    args = TrainingArguments(str(folder), **{**given, **changes})
    trainer = Trainer(make_net(), args, train_dataset=make_rows(ROWS), callbacks=[watches])
    trainer.train(resume_from_checkpoint=None if source is None else str(source / f"checkpoint-{SAVED}"))
    losses = {str(log["step"]): log["loss"] for log in trainer.state.log_history if "loss" in log}
    return {"losses": losses, "saved": watches.saved, "loaded": watches.loaded}


def looped(folder: Path, source: Path | None, place: Place) -> Result:
    """A loop of one's own, from the beginning or from the checkpoint in ``source``; also the rows of each batch."""
    torch.manual_seed(0)
    module, optimizer = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), adamw(0.01)
    loss = module_loss(module, classification, inputs="x", targets="labels")
    step = make_train_step(loss, optimizer, reduce=_over_ranks if place.world > 1 else None)
    rows = make_rows(ROWS)
    columns = {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}
    data = {**columns, "row": torch.arange(ROWS)}
    loader = Loader(data, batch_size=GLOBAL_BATCH, seed=3, batches=_STEPS, rank=place.rank, world=place.world)
    state = init_state(module, optimizer)
    result: Result = {"losses": {}, "rows": {}, "saved": "", "loaded": ""}
    if source is not None:
        found = load_latest(source, like=state)
        assert found is not None
        state = found.state
        loader.load_state_dict(found.cursor)
        result["loaded"] = digest(state)

    def batches() -> Any:
        for number, batch in enumerate(loader, start=int(state.step) + 1):
            result["rows"][str(number)] = batch["row"].tolist()
            yield batch

    for record in run(step, state, batches()):
        result["losses"][str(record.step)] = float(record.metrics["loss"].compute())
        if record.step == SAVED and source is None:
            result["saved"] = digest(record.state)
            if place.rank == 0:
                with Saver(folder) as saver:
                    saver.save(record.state, cursor=loader.state_dict())
    return result


def _over_ranks(found: Gradients) -> Gradients:
    """The sums of all ranks."""

    def added(tensor: Any) -> Tensor:
        total: Tensor = tensor.clone()
        dist.all_reduce(total)
        return total

    grads = TensorDict({name: added(grad) for name, grad in found.grads.items()})
    return replace(found, grads=grads, loss_sum=added(found.loss_sum), weight=added(found.weight))


CASES: dict[str, Callable[[Path, Path | None, Place], Result]] = {
    "loop": looped,
    "trainer": trained,
    "trainer, accumulating": functools.partial(trained, gradient_accumulation_steps=2),
}


def main(folder: Path, cases: list[str]) -> None:
    place = Place(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    found = {}
    for i, name in enumerate(cases):
        whole = CASES[name](folder / f"two-{i}", None, place)
        found[name] = {"whole": whole, "continued": CASES[name](folder / f"one-two-{i}", folder / f"one-{i}", place)}
    (folder / f"result-{place.rank}.json").write_text(json.dumps(found))


def part(folder: Path) -> None:
    """Train and end at the worst moment: threads of the group are not done with a collective, and wait for this one."""
    place = Place(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    trained(folder / "parting", None, place, max_steps=1, save_strategy="no")
    sys.setswitchinterval(1.0)
    for _ in range(3):
        dist.all_gather([torch.zeros(1000) for _ in range(place.world)], torch.zeros(1000))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[2:] == ["part"]:
        part(Path(sys.argv[1]))
    else:
        main(Path(sys.argv[1]), sys.argv[2:])
        # Without the Trainer torch aborts if a thread of the group is not done with the last collective.
        time.sleep(0.2)
    dist.destroy_process_group()
