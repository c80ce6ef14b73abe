"""What only Muon needs beside the table: its iteration is in bfloat16, and for matrices."""

from __future__ import annotations

import pytest
import torch

from trainkit import optim, tree


def test_muon_keeps_its_momentum_in_bfloat16() -> None:
    # torch's iteration scales a bfloat16 matrix in place.
    g = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    params = tree.frozen({"w": torch.zeros(4, 4, dtype=torch.bfloat16)})
    tx = optim.muon(0.1, momentum=0.5, nesterov=False)
    _, opt_state = tx.apply(tree.frozen({"w": g}), tx.init(params), params)
    assert torch.equal(opt_state["momentum_buffer"]["w"], 0.5 * g)


def test_muon_names_what_is_no_matrix_and_what_to_do() -> None:
    params = tree.frozen({"weight": torch.zeros(2, 2), "bias": torch.zeros(2), "conv": torch.zeros(2, 2, 1, 1)})
    with pytest.raises(ValueError, match=r"none: bias \(2,\), conv \(2, 2, 1, 1\).*partition"):
        optim.muon(0.1).init(params)
