"""What only Adafactor needs beside the table: it has a rule of its own inside a graph."""

from __future__ import annotations

import pytest
import torch

from tests.optim.table import Options, assert_close, random_tree, row_of, run, run_torch, schedule
from trainkit.optim.transform import Transform


@pytest.mark.parametrize("options", row_of("adafactor").grid)
@pytest.mark.usefixtures("fresh_compiler")
def test_adafactor_has_the_same_rule_in_a_graph(options: Options) -> None:
    row = row_of("adafactor")
    tx = row.make(schedule, **options)
    apply = torch.compile(tx.apply, fullgraph=True, backend="eager")
    found, _ = run(Transform(tx.init, tx.update, apply), row, random_tree(row, 0), 20)
    assert_close(found, run_torch(row, options, random_tree(row, 0), 20))
