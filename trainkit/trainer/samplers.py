"""In which order rows are read."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, RandomSampler, Sampler, SequentialSampler

from trainkit.trainer import foreign

_MEGABATCHES = 50
"""Batches that are sorted together at most."""


def has_length(data: Any) -> bool:
    """Whether ``len`` works.

    Example:
        >>> has_length([1]), has_length(iter([1]))
        (True, False)
    """
    try:
        return len(data) is not None
    except (TypeError, NotImplementedError, AttributeError):
        return False


def is_stream(dataset: Any) -> bool:
    """Whether rows can only be read in their own order: a torch ``IterableDataset``, or anything without
    ``__getitem__``.

    Example:
        >>> is_stream([1]), is_stream(iter([1]))
        (False, True)
    """
    return isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")


def lengths_of(dataset: Any, column: str | None = None, model_input_name: str | None = None) -> list[int]:
    """The length of each row, for grouping rows of similar lengths.

    Args:
        dataset: map-style, with a length.
        column: of a ``datasets.Dataset``, which has lengths computed before; ignored where there is none such.
        model_input_name: the field whose length counts otherwise; None for "input_ids". Every row is read once, a
            ``datasets.Dataset`` in columns.

    Raises: ValueError if rows are not mappings with that field.

    Example:
        >>> lengths_of([{"input_ids": [1, 2]}, {"input_ids": [3]}])
        [2, 1]

    Source: Trainer 4.57: _get_train_sampler, LengthGroupedSampler.
    """
    if column is not None and foreign.is_hf_dataset(dataset) and column in dataset.column_names:
        return [int(length) for length in dataset[column]]
    name = model_input_name or "input_ids"
    if foreign.is_hf_dataset(dataset) and name in dataset.column_names:
        from trainkit.io.data import row_lengths

        return [int(length) for length in row_lengths(dataset, name)]
    lengths = []
    for i in range(len(dataset)):
        row = dataset[i]
        try:
            lengths.append(len(row[name]))
        except (KeyError, TypeError, IndexError):
            raise ValueError(
                f"group_by_length: row {i} is {type(row).__name__} without a sequence {name!r}; expected mappings with "
                "one, a tokenizer that names its main input, or a column of lengths (length_column_name)"
            ) from None
    return lengths


def length_grouped_order(lengths: Sequence[int], batch_size: int, generator: torch.Generator | None = None) -> Tensor:
    """A random order in which rows of similar lengths stand together, the longest of all first.

    A random permutation is cut into pieces of m * b rows, m = min(N div 4b, 50) and at least 1; each is sorted from
    long to short. Then the longest row of all changes places with the first, so that a batch that is too large for
    the memory is met at once.

    Args:
        lengths: one per row.
        batch_size: b, rows.
        generator: None for torch's global one.

    Returns: int64 tensor of shape (rows,).

    Raises: ValueError for a batch size below 1.

    Example:
        >>> length_grouped_order([3, 1, 2], 1, torch.Generator().manual_seed(0))[0]
        tensor(0)

    Source: Trainer 4.57: get_length_grouped_indices.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
    order = torch.randperm(len(lengths), generator=generator)
    if not len(order):
        return order
    known = torch.as_tensor(lengths)
    piece = max(1, min(len(order) // (batch_size * 4), _MEGABATCHES)) * batch_size
    pieces = [part[known[part].argsort(descending=True, stable=True)] for part in torch.split(order, piece)]
    longest = max(range(len(pieces)), key=lambda i: int(known[pieces[i][0]]))
    first, other = int(pieces[0][0]), int(pieces[longest][0])
    pieces[0][0], pieces[longest][0] = other, first
    return torch.cat(pieces)


class SeededRandomSampler(RandomSampler):
    """A ``RandomSampler`` whose order in epoch e follows from seed + e alone.

    Args:
        sampler: whose data, number of samples and replacement are taken.
        seed: of epoch 0; fits 64 bits.

    Example:
        >>> sampler = SeededRandomSampler(RandomSampler(range(4)), seed=7)
        >>> sampler.set_epoch(1)
        >>> list(sampler) == torch.randperm(4, generator=torch.Generator().manual_seed(8)).tolist()
        True

    Source: accelerate.data_loader.SeedableRandomSampler, which Trainer 4.57 shuffles with.
    """

    def __init__(self, sampler: RandomSampler, seed: int) -> None:
        super().__init__(
            sampler.data_source,
            replacement=sampler.replacement,
            num_samples=sampler._num_samples,
            generator=torch.Generator(),
        )
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order comes next."""
        self.epoch = epoch

    def order(self) -> Tensor:
        """The whole order of the epoch: int64."""
        self.generator.manual_seed(self.seed + self.epoch)
        rows = len(self.data_source)
        if not self.replacement and self.num_samples == rows:
            return torch.randperm(rows, generator=self.generator)
        return torch.tensor(list(super().__iter__()), dtype=torch.int64)

    def __iter__(self) -> Iterator[int]:
        yield from self.order().tolist()
        self.epoch += 1


class LengthGroupedSampler(Sampler[int]):
    """Rows of similar lengths together; see :func:`length_grouped_order`.

    With a ``seed`` the order of epoch e follows from seed + e, so that a run can go on in the middle of any epoch.
    Without it, as in 4.57, it is drawn from ``generator`` or torch's global one.

    Args:
        batch_size: rows that are read together: of one update.
        dataset: whose lengths are measured if none are given.
        lengths: one per row.
        model_input_name: the field that is measured; "input_ids" by default.
        generator: to draw from.
        seed: of epoch 0; excludes ``generator``.

    Raises: ValueError without data set and lengths, with seed and generator, or as :func:`lengths_of`.

    Example:
        >>> list(LengthGroupedSampler(1, lengths=[1, 3, 2], seed=0))[0]
        1

    Source: Trainer 4.57: LengthGroupedSampler.
    """

    def __init__(
        self,
        batch_size: int,
        dataset: Any = None,
        lengths: Sequence[int] | Tensor | None = None,
        model_input_name: str | None = None,
        generator: torch.Generator | None = None,
        *,
        seed: int | None = None,
    ) -> None:
        if seed is not None and generator is not None:
            raise ValueError("seed, generator: got both, expected one: the generator to draw from, or a seed for it")
        self.batch_size, self.lengths = batch_size, _known(dataset, lengths, model_input_name)
        self.generator, self.seed, self.epoch = generator, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order comes next."""
        self.epoch = epoch

    def order(self) -> Tensor:
        """The whole order of the epoch: int64."""
        generator = self.generator
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return length_grouped_order(self.lengths, self.batch_size, generator)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order().tolist())


class DistributedLengthGroupedSampler(Sampler[int]):
    """The rows of one process in a length-grouped order: of N' rows those at rank, rank + R, rank + 2R, ...

    N' is N filled up from the start of the order to a multiple of R, or with ``drop_last`` cut down to one.

    Args:
        batch_size: rows that are read together, over all processes.
        dataset: whose lengths are measured if none are given.
        num_replicas: R; None asks ``torch.distributed``.
        rank: of this process; None asks ``torch.distributed``.
        seed: the order of epoch e follows from seed + e.
        drop_last: leave out rows that not every process can have.
        lengths: one per row.
        model_input_name: the field that is measured; "input_ids" by default.

    Raises: ValueError as :class:`LengthGroupedSampler`, and for a rank out of range.

    Example:
        >>> a, b = (DistributedLengthGroupedSampler(1, None, 2, rank, lengths=[3, 1, 2]) for rank in (0, 1))
        >>> len(a), len(b), list(a)[0]
        (2, 2, 0)

    Source: Trainer 4.57: DistributedLengthGroupedSampler.
    """

    def __init__(
        self,
        batch_size: int,
        dataset: Any = None,
        num_replicas: int | None = None,
        rank: int | None = None,
        seed: int = 0,
        drop_last: bool = False,
        lengths: Sequence[int] | Tensor | None = None,
        model_input_name: str | None = None,
    ) -> None:
        if num_replicas is None:
            num_replicas = torch.distributed.get_world_size()
        if rank is None:
            rank = torch.distributed.get_rank()
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank: got {rank} of num_replicas={num_replicas}, expected a number below it")
        self.batch_size, self.lengths = batch_size, _known(dataset, lengths, model_input_name)
        self.num_replicas, self.rank, self.seed, self.drop_last, self.epoch = num_replicas, rank, seed, drop_last, 0
        rows = len(self.lengths)
        self.num_samples = rows // num_replicas if drop_last else math.ceil(rows / num_replicas)
        self.total_size = self.num_samples * num_replicas

    def __len__(self) -> int:
        return self.num_samples

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order comes next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = length_grouped_order(self.lengths, self.batch_size, generator).tolist()
        whole = list(itertools.islice(itertools.cycle(order), self.total_size))
        return iter(whole[self.rank :: self.num_replicas])


def train_sampler(
    dataset: Any,
    *,
    group_by_length: bool = False,
    batch_size: int = 1,
    lengths: Sequence[int] | None = None,
    model_input_name: str | None = None,
    seed: int | None = None,
) -> Sampler[int] | None:
    """The order of training: random, or random with rows of similar lengths together.

    Args:
        dataset: to train on.
        group_by_length: as above.
        batch_size: rows per update of one process, for the grouping.
        lengths: of the rows; measured if there are none.
        model_input_name: the field that is measured.
        seed: the grouped order of epoch e follows from seed + e; None draws from torch's global generator, as 4.57.
            The random order is seeded by the loader.

    Returns: a sampler; None for data that are read in their own order.

    Example:
        >>> train_sampler(iter([])), type(train_sampler([1, 2])).__name__
        (None, 'RandomSampler')

    Source: Trainer 4.57: _get_train_sampler.
    """
    if dataset is None or is_stream(dataset) or not has_length(dataset):
        return None
    if group_by_length:
        return LengthGroupedSampler(batch_size, dataset, lengths=lengths, model_input_name=model_input_name, seed=seed)
    return RandomSampler(dataset)


def eval_sampler(
    dataset: Any,
    *,
    world: int = 1,
    group_by_length: bool = False,
    batch_size: int = 1,
    lengths: Sequence[int] | None = None,
    model_input_name: str | None = None,
) -> Sampler[int] | None:
    """The order of evaluation: that of the data, so that predictions stand beside their rows.

    Args:
        dataset: to evaluate.
        world: number of processes.
        group_by_length: rows of similar lengths together instead, as 4.57 does.
        batch_size: rows per batch, for the grouping.
        lengths: of the rows; measured if there are none.
        model_input_name: the field that is measured.

    Returns: a sampler; None for data that are read in their own order, and for several processes, whose loaders keep
        the order by themselves.

    Example:
        >>> list(eval_sampler([5, 6]))
        [0, 1]

    Source: Trainer 4.57: _get_eval_sampler.
    """
    if dataset is None or is_stream(dataset) or not has_length(dataset):
        return None
    if group_by_length:
        return LengthGroupedSampler(batch_size, dataset, lengths=lengths, model_input_name=model_input_name, seed=0)
    return SequentialSampler(dataset) if world == 1 else None


def train_sampler_for(args: Any, dataset: Any, processing_class: Any = None) -> Sampler[int] | None:
    """:func:`train_sampler` by training arguments.

    Args:
        args: ``group_by_length``, ``length_column_name``, ``train_batch_size``, ``gradient_accumulation_steps``,
            ``data_seed``, ``seed``.
        dataset: to train on.
        processing_class: the first of its ``model_input_names`` is what lengths are measured on.

    Example:
        >>> from types import SimpleNamespace
        >>> type(train_sampler_for(SimpleNamespace(group_by_length=False), [1])).__name__
        'RandomSampler'

    Source: Trainer 4.57: _get_train_sampler.
    """
    if not args.group_by_length or dataset is None or is_stream(dataset) or not has_length(dataset):
        return train_sampler(dataset)
    names = getattr(processing_class, "model_input_names", None) or ["input_ids"]
    seed = args.seed if args.data_seed is None else args.data_seed
    return train_sampler(
        dataset,
        group_by_length=True,
        batch_size=args.train_batch_size * args.gradient_accumulation_steps,
        lengths=lengths_of(dataset, args.length_column_name, names[0]),
        seed=seed,
    )


def eval_sampler_for(args: Any, dataset: Any, processing_class: Any = None) -> Sampler[int] | None:
    """:func:`eval_sampler` by training arguments: the order of the data, also with ``group_by_length``.

    Args:
        args: ``world_size``.
        dataset: to evaluate.
        processing_class: not asked; it is there for overrides.

    Example:
        >>> from types import SimpleNamespace
        >>> list(eval_sampler_for(SimpleNamespace(world_size=1), "ab"))
        [0, 1]

    Source: Trainer 4.57: _get_eval_sampler.
    """
    return eval_sampler(dataset, world=args.world_size)


def _known(dataset: Any, lengths: Any, model_input_name: str | None) -> list[int]:
    if lengths is None and dataset is None:
        raise ValueError("dataset, lengths: got neither, expected one of them")
    if lengths is None:
        return lengths_of(dataset, model_input_name=model_input_name)
    return lengths.tolist() if isinstance(lengths, Tensor) else [int(length) for length in lengths]
