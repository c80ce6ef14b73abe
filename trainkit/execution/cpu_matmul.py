"""Matrix products of a compiled step on a CPU by oneDNN instead of the BLAS that torch was built with.

torch sends float32 ``mm`` to its BLAS (MKL in the released builds). oneDNN, which torch carries as well, is faster
for products whose left factor is stored by rows: 1.03 to 1.25 times on an AMD EPYC with AVX-512, 2 threads, for the
shapes of small transformers; slower for a transposed left factor (weight gradients) and for very small products, which
stay where they are. Both compute in float32; sums are taken in another order.

The choice is a fixed rule and not a measurement at run time: a resumed run must get the same kernels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor import ir, mkldnn_ir
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.lowering import register_lowering

SMALLEST = 2**21
"""Multiply-adds below which the call costs more than it saves."""


@torch.library.custom_op("trainkit::rowwise_mm", mutates_args=())
def rowwise_mm(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` by oneDNN, for float32 matrices on a CPU; ``a`` stored by rows."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return product


@rowwise_mm.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


@register_lowering(torch.ops.trainkit.rowwise_mm.default, type_promotion_kind=None)
def _lower(a: Any, b: Any) -> Any:
    # Straight to torch's node for the oneDNN call: a Python operator would be called back from the C++ wrapper. Its own
    # `create` would copy a transposed weight, which oneDNN can read as it is.
    left = ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(a))
    right = ir.ExternKernel.realize_input(lowered_transpose(b))
    layout = ir.FixedLayout(
        device=left.get_device_or_error(), dtype=left.get_dtype(), size=[left.get_size()[0], right.get_size()[0]]
    )
    node = mkldnn_ir.LinearUnary(layout=layout, inputs=[left, right], constant_args=[None, "none", [-1], ""])
    return ir.TensorBox.create(mkldnn_ir._create_output_node(node))  # type: ignore[no-untyped-call]


def lowered_transpose(matrix: Any) -> Any:
    """The Inductor node of ``matrix.t()``."""
    from torch._inductor.lowering import permute

    return permute(matrix, [1, 0])


class RowwiseProducts(CustomGraphPass):
    """Rewrite ``aten.mm`` into :func:`rowwise_mm` where that is faster."""

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default):
            if is_faster(*(argument.meta["val"] for argument in node.args)):
                node.target = torch.ops.trainkit.rowwise_mm.default

    def uuid(self) -> Any:
        return f"trainkit-rowwise-products-{SMALLEST}"


def is_faster(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN is the better one for ``a @ b``."""
    sizes = (*a.shape, b.shape[1])
    static = all(isinstance(size, int) for size in sizes)
    return (
        static
        and a.device.type == "cpu"
        and a.dtype == torch.float32
        and a.stride(1) == 1
        and math.prod(sizes) >= SMALLEST
    )
