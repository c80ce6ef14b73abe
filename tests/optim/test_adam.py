"""What only Adam needs beside the table."""

from collections.abc import Callable

import pytest
import torch

from trainkit import tree
from trainkit.optim import adam, adamw
from trainkit.optim.transform import Transform
from trainkit.schedules import linear


@pytest.mark.parametrize("make", [adam, adamw])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_rate_of_zero_changes_nothing_in_a_graph_either(make: Callable[..., Transform], amsgrad: bool) -> None:
    # torch's kernel for rates on the device divides by the rate: 0 / 0 where the gradient is 0.
    tx = make(linear(0.0, 1.0, 10), amsgrad=amsgrad)
    params = tree.frozen({"w": torch.tensor([1.0, -2.0, 3.0])})
    grads = tree.frozen({"w": torch.tensor([0.0, 1e-3, 1e3])})
    compiled = torch.compile(lambda g, s, p: tx.apply(g, s, p), fullgraph=True, backend="eager")
    after, state = compiled(grads, tx.init(params), params)
    assert torch.equal(after["w"], params["w"])
    # The update after it, at rate 0.1, is that of the uncompiled form.
    expected, _ = tx.apply(grads, tx.apply(grads, tx.init(params), params)[1], params)
    torch.testing.assert_close(compiled(grads, state, after)[0]["w"], expected["w"])
