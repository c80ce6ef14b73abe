"""The loader beside those of transformers, accelerate and torch: the same batches in the same order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.state import GradientState
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, Sampler, TensorDataset, default_collate
from transformers import Trainer, TrainingArguments

from tests.trainer.rows import DATA, Stream, loader_of, same
from tests.trainer.tiny import make_net, make_rows
from trainkit.trainer.collators import default_data_collator
from trainkit.trainer.dataloaders import dataloader_for, length_of, make_dataloader
from trainkit.trainer.samplers import LengthGroupedSampler


def their_trainer(folder: Any, data: Any, **options: Any) -> Trainer:
    limit = {"max_steps": 4} if isinstance(data, IterableDataset) else {}
    args = TrainingArguments(str(folder), use_cpu=True, report_to=[], remove_unused_columns=False, **limit, **options)
    torch.manual_seed(args.seed)
    return Trainer(make_net(), args, train_dataset=data, eval_dataset=data)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("n", [7, 12])
@pytest.mark.parametrize("kind", DATA)
def test_training_batches_are_those_of_transformers(tmp_path: Any, kind: str, n: int, drop_last: bool) -> None:
    if kind == "stream":
        drop_last = False  # which transformers ignores there
    trainer = their_trainer(
        tmp_path, DATA[kind](n), seed=5, per_device_train_batch_size=3, dataloader_drop_last=drop_last
    )
    theirs = trainer.get_train_dataloader()
    data = DATA[kind](n)
    sampler = None if kind == "stream" else RandomSampler(data)
    ours = make_dataloader(
        data, batch_size=3, collate_fn=default_data_collator, sampler=sampler, drop_last=drop_last, seed=None
    )
    assert len(ours) == len(theirs)
    assert ours.total_batch_size == (3 if kind == "stream" else theirs.total_batch_size)
    # Passes follow each other by epochs of their own, until one is set.
    for epoch in (None, None, 7, None, 0):
        if epoch is not None:
            ours.set_epoch(epoch)
            theirs.set_epoch(epoch)
        assert same(list(ours), list(theirs))


@pytest.mark.parametrize("kind", DATA)
def test_evaluation_batches_are_those_of_transformers(tmp_path: Any, kind: str) -> None:
    trainer = their_trainer(tmp_path, DATA[kind](7), per_device_eval_batch_size=3)
    ours = make_dataloader(DATA[kind](7), batch_size=3, collate_fn=default_data_collator, is_training=False)
    for theirs in (trainer.get_eval_dataloader(), trainer.get_test_dataloader(DATA[kind](7))):
        ours.set_epoch(0)
        assert same(list(ours), list(theirs))


@pytest.mark.parametrize("seed", [0, 11])
def test_a_data_seed_orders_the_rows(tmp_path: Any, seed: int) -> None:
    trainer = their_trainer(tmp_path, make_rows(9), seed=1, data_seed=seed, per_device_train_batch_size=2)
    ours = dataloader_for(
        trainer.args,
        make_rows(9),
        batch_size=2,
        collate_fn=default_data_collator,
        sampler=RandomSampler(make_rows(9)),
        is_training=True,
    )
    assert same(list(ours), list(trainer.get_train_dataloader()))


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("options", [{}, {"even_batches": False}, {"split_batches": True}], ids=str)
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("n", [2, 7, 11, 12])
def test_batches_of_several_ranks_are_those_of_accelerate(
    n: int, drop_last: bool, options: dict[str, bool], world: int
) -> None:
    rows, size = make_rows(n), world * 2 if "split_batches" in options else 2
    for rank in range(world):
        plain: Any = DataLoader(rows, size, sampler=RandomSampler(rows), drop_last=drop_last)  # type: ignore[arg-type]
        given = {"num_processes": world, "process_index": rank, "use_seedable_sampler": True, "data_seed": 3}
        theirs: Any = prepare_data_loader(plain, **given, **options)
        ours = make_dataloader(
            rows,
            batch_size=size,
            collate_fn=default_collate,
            sampler=RandomSampler(rows),
            drop_last=drop_last,
            seed=3,
            rank=rank,
            world=world,
            **options,
        )
        assert len(ours) == len(theirs)
        assert ours.total_batch_size == theirs.total_batch_size
        for epoch in (0, 4):
            ours.set_epoch(epoch)
            theirs.set_epoch(epoch)
            assert same(list(ours), list(theirs))


def test_lengths() -> None:
    assert length_of(loader_of(Stream(7))) == 4
    assert length_of(loader_of(Stream(7), drop_last=True)) == 3 == len(list(loader_of(Stream(7), drop_last=True)))
    assert length_of(loader_of(Stream(7, sized=False))) is None
    assert length_of(loader_of(Stream(9), world=2)) == 3 == len(list(loader_of(Stream(9), world=2)))
    with pytest.raises(TypeError, match="Stream has no length"):
        len(loader_of(Stream(7, sized=False)))


def test_a_sampler_of_the_users_own_is_followed_step_by_step() -> None:
    class Adaptive(Sampler[int]):
        last = 0

        def __iter__(self) -> Iterator[int]:
            for _ in range(4):
                yield self.last

        def __len__(self) -> int:
            return 4

    sampler = Adaptive()
    data = [{"x": i} for i in range(9)]
    seen = []
    for batch in loader_of(data, sampler=sampler, batch_size=1):
        seen.append(int(batch["x"]))
        sampler.last += 2
    assert seen == [0, 2, 4, 6]


def test_an_unseeded_random_sampler_follows_torchs_generator() -> None:
    data = make_rows(8)
    loader = loader_of(data, sampler=RandomSampler(data), seedable_sampler=False)
    torch.manual_seed(1)
    ours = list(loader)
    torch.manual_seed(1)
    expected = list(RandomSampler(data))
    assert same(torch.cat([batch["x"] for batch in ours]), torch.stack([data[i]["x"] for i in expected]))


def test_grouping_by_length_follows_the_epoch() -> None:
    data = [{"input_ids": [1] * n} for n in (1, 1, 2, 2, 3, 3)]
    loader = loader_of(data, sampler=LengthGroupedSampler(2, data, seed=0), collate_fn=len, batch_size=4)
    assert list(loader) == [4, 2]
    sampler: Any = loader.batch_sampler
    assert sampler.sampler.epoch == 0
    loader.set_epoch(3)
    assert sampler.sampler.epoch == 3


def test_it_is_a_dataloader_that_accelerate_takes_as_it_is() -> None:
    from accelerate import Accelerator

    data = make_rows(4)
    loader = loader_of(data)
    assert isinstance(loader, DataLoader) and loader.dataset is data
    assert Accelerator(cpu=True).prepare(loader) is loader


def test_accelerate_is_told_of_the_last_batch_and_of_repeated_rows() -> None:
    state = GradientState()
    for n, last in ((7, 3), (8, 0)):
        loader = loader_of(make_rows(n), world=2, gradient_state=state)
        assert not state.in_dataloader
        ends = []
        for _ in loader:
            assert state.active_dataloader is loader
            ends.append((state.end_of_dataloader, state.remainder))
        assert ends == [(False, last), (True, last)]
        assert not state.in_dataloader
    batches = iter(loader)
    next(batches)
    assert state.in_dataloader
    batches.close()  # type: ignore[attr-defined]
    assert not state.in_dataloader
    loader = loader_of(Stream(7), world=2, gradient_state=state)
    assert [(state.end_of_dataloader, state.remainder) for _ in loader] == [(False, 0), (True, 3)]
    assert loader_of(make_rows(7), drop_last=True).remainder == -1


THEIRS_OF_A_STREAM = """
import json, sys, torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, IterableDataset

class Numbers(IterableDataset):
    def __init__(self, n): self.n = n
    def __iter__(self): return iter(range(self.n))

accelerator, found = Accelerator(cpu=True), {}
for n in map(int, sys.argv[2:]):
    loader = accelerator.prepare(DataLoader(Numbers(n), batch_size=2))
    found[n] = [batch.tolist() for batch in loader]
    found[f"{n} last"] = loader.remainder
with open(f"{sys.argv[1]}/{accelerator.process_index}.json", "w") as file:
    json.dump(found, file)
accelerator.end_training()
"""


@pytest.mark.slow
def test_the_parts_of_a_stream_are_those_that_accelerate_sends(tmp_path: Any) -> None:
    world, sizes = 2, [4, 5, 6, 7, 8]
    script = tmp_path / "theirs.py"
    script.write_text(THEIRS_OF_A_STREAM)
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={world}", "--standalone"]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, str(script), str(tmp_path), *map(str, sizes)], check=True, env=env, timeout=240)
    for rank in range(world):
        theirs = json.loads((tmp_path / f"{rank}.json").read_text())
        for n in sizes:
            data = [{"x": i} for i in range(n)]
            loader = loader_of(iter_of(data), rank=rank, world=world)
            assert [batch["x"].tolist() for batch in loader] == theirs[str(n)]
            assert loader.remainder == theirs[f"{n} last"] % 4


def iter_of(rows: list[Any]) -> Any:
    class Rows(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(rows)

    return Rows()


@pytest.mark.gpu
def test_batches_come_on_a_gpu_from_page_locked_memory() -> None:
    data = make_rows(40)
    for workers in (0, 2):
        options: dict[str, Any] = {"device": "cuda", "pin_memory": True, "workers": workers}
        for ours, expected in zip(loader_of(data, **options), loader_of(data), strict=True):
            assert ours["x"].is_cuda
            assert torch.equal(ours["x"].cpu(), expected["x"])


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"batch_size": 0}, ValueError, "batch_size: got 0"),
        ({"rank": 2, "world": 2}, ValueError, "rank: got 2 of world=2"),
        ({"split_batches": True, "batch_size": 3, "world": 2}, ValueError, "split_batches: got batch_size 3"),
        ({"persistent_workers": True}, ValueError, "persistent_workers"),
        ({"prefetch_factor": 2}, ValueError, "prefetch_factor"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        loader_of(make_rows(4), **options)


def test_rows_without_length_need_a_sampler() -> None:
    class Unsized:
        def __getitem__(self, i: int) -> Any:
            return {"x": i}

    with pytest.raises(TypeError, match="Unsized has no length"):
        loader_of(Unsized())
    assert [batch["x"].tolist() for batch in loader_of(Unsized(), sampler=[4, 2, 9])] == [[4, 2], [9]]


def test_arguments_give_the_loader(tmp_path: Any) -> None:
    args = TrainingArguments(
        str(tmp_path),
        use_cpu=True,
        report_to=[],
        dataloader_num_workers=1,
        dataloader_prefetch_factor=3,
        dataloader_persistent_workers=True,
        dataloader_drop_last=True,
        accelerator_config={"even_batches": False},
    )
    loader = dataloader_for(args, TensorDataset(torch.arange(7)), batch_size=2, collate_fn=default_collate, world=2)
    assert (loader.num_workers, loader.prefetch_factor, loader.persistent_workers) == (1, 3, True)
    assert [batch[0].tolist() for batch in loader] == [[0, 1]]
    assert loader.gradient_state is not None
