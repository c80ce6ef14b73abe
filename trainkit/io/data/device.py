"""Batches on their device, one ahead of the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from trainkit.io.data.assemble import Item, Loaded

Arrival = Callable[[], Loaded]
"""Gives a batch once the loop's stream has been told to wait for it."""


def one_ahead(items: Iterator[Item], device: torch.device) -> Iterator[Item]:
    """Items whose batches are on ``device``; while the loop works on one, the next is loaded and being copied.

    On CUDA the copy runs in a stream of its own, from page-locked memory. What goes wrong with a batch is told when its
    turn comes, after the batch before it.

    Args:
        items: with batches in host memory.
        device: where they go; for the CPU this is the identity.
    """
    if device.type == "cpu":
        yield from items
        return
    copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
    waiting: Arrival | None = None
    while True:
        item, sent, error = _next(items, device, copies)
        if waiting is not None:
            yield waiting()
        waiting = sent
        if error is not None:
            raise error
        if item is None:
            return
        if sent is None:
            yield item


def _next(
    items: Iterator[Item], device: torch.device, copies: torch.cuda.Stream | None
) -> tuple[Item | None, Arrival | None, Exception | None]:
    """The next item, on its way to the device if it has a batch, or what went wrong."""
    try:
        item = next(items, None)
        return item, _sent(item, device, copies) if isinstance(item, Loaded) else None, None
    except Exception as error:
        return None, None, error


def _sent(item: Loaded, device: torch.device, copies: torch.cuda.Stream | None) -> Arrival:
    if copies is None:
        moved = Loaded(item.after, _mapped(lambda t: t.to(device), item.batch), item.where)
        return lambda: moved
    # Page-locked memory is not given away before the copy from it is done: torch's allocator of it keeps account.
    # What a collator made on a GPU is moved in the loop's stream, which it was made in.
    host = _mapped(lambda t: t.to(device) if t.is_cuda else t if t.is_pinned() else t.pin_memory(), item.batch)
    with torch.cuda.stream(copies):
        batch = _mapped(lambda t: t.to(device, non_blocking=True), host)
        copied = copies.record_event()

    def arrive() -> Loaded:
        current = torch.cuda.current_stream(device)
        current.wait_event(copied)
        # The memory belongs to the stream of the copies, and must not be given away before the loop's is done with it.
        for leaf in pytree.tree_leaves(batch):
            if isinstance(leaf, Tensor):
                leaf.record_stream(current)
        return Loaded(item.after, batch, item.where)

    return arrive


def _mapped(fn: Callable[[Tensor], Tensor], tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, fn, tree)
