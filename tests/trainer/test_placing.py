"""Trees of tensors on their way to a device."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import torch
from transformers import BatchEncoding

from trainkit.trainer.placing import moved, placing

Pair = namedtuple("Pair", "a b")


def test_trees_are_moved_and_not_changed() -> None:
    tree = {"x": torch.ones(2), "rest": [Pair(torch.zeros(1), "text"), (torch.ones(1), 3)], "none": None}
    there = moved(tree, "meta")
    assert there["x"].device.type == "meta" and type(there["rest"][0]) is Pair
    assert there["rest"][0].a.device.type == "meta" and there["rest"][0].b == "text"
    assert there["rest"][1][1] == 3 and there["none"] is None
    assert tree["x"].device.type == "cpu"
    encoding = BatchEncoding({"x": torch.ones(2)})
    assert type(moved(encoding, "meta")) is BatchEncoding
    assert moved(encoding, "meta")["x"].device.type == "meta" and encoding["x"].device.type == "cpu"
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(2), torch.ones(1)])
    assert type(moved(packed, "cpu")) is type(packed)


def test_a_tensordict_keeps_its_batch_size() -> None:
    from tensordict import TensorDict

    data = TensorDict({"x": torch.ones(3, 2)}, batch_size=[3])
    there = moved(data, "meta")
    assert there.batch_size == data.batch_size and there["x"].device.type == "meta"


def test_parts_can_be_moved_by_somebody_else() -> None:
    seen: list[Any] = []
    tree = {"x": torch.ones(1), "y": [torch.zeros(1)]}
    assert moved(tree, "meta", inner=lambda part: seen.append(part) or part) == tree
    assert seen == [tree["x"], tree["y"]]
    assert moved(torch.ones(1), "meta", inner=seen.append).device.type == "meta"


def test_host_memory_needs_no_way() -> None:
    assert placing(None, True, True) is None
    away = placing("meta", True, False)
    assert away is not None and away([torch.ones(1)])[0].device.type == "meta"
