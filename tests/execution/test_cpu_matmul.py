"""The oneDNN product: right for every layout, chosen by its rule, and used by compiled graphs."""

import re

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from trainkit.execution.cpu_matmul import is_faster, rowwise_mm
from trainkit.execution.inductor import Compiler, default_options


@pytest.mark.parametrize("transposed", [False, True])
def test_equals_float64(transposed):
    a, b = torch.randn(130, 70), torch.randn(70, 50)
    b = b.t().contiguous().t() if transposed else b
    torch.testing.assert_close(rowwise_mm(a, b), (a.double() @ b.double()).float(), rtol=1e-5, atol=1e-4)


def test_the_rule():
    big = torch.randn(256, 256)
    assert is_faster(big, big) and is_faster(big, big.t())
    assert not is_faster(big.t(), big)
    assert not is_faster(big[:8, :8], big[:8, :8])
    assert not is_faster(big.double(), big.double())
    assert not is_faster(big.bfloat16(), big.bfloat16())


@pytest.mark.parametrize("cpp_wrapper", [False, True])
def test_a_compiled_graph_uses_it_and_is_right(cpp_wrapper):
    def two_products(a, b):
        return torch.relu(a @ b.t()) @ b

    a, b = torch.randn(256, 128), torch.randn(192, 128)
    compiler = Compiler(False, {**default_options(), "cpp_wrapper": cpp_wrapper})
    found, code = run_and_get_code(compiler.compile(two_products, fullgraph=True), a, b)
    torch.testing.assert_close(found, two_products(a.double(), b.double()).float(), rtol=1e-4, atol=1e-3)
    assert compiler.without_wrapper == []
    assert len(re.findall(r"linear_pointwise(?:\.default)?\(", "".join(code))) == 2
