"""Matrix products."""

from __future__ import annotations

import torch
from torch.nn import functional

from graph_tools.torch_ops.registry import Compute, Node, alias, operator

__all__ = ["einsum", "gemm"]

alias("Det", torch.linalg.det)
alias("MatMul", torch.matmul)


@operator("Gemm")
def gemm(node: Node) -> Compute:
    """``alpha A' B' + beta C``, where C broadcasts to [rows, columns] and may be absent."""
    alpha, beta = node.number("alpha", 1.0), node.number("beta", 1.0)
    transpose_a, transpose_b = node.flag("transA"), node.flag("transB")

    def compute(
        a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None = None
    ) -> torch.Tensor:
        a = a.t() if transpose_a else a
        if transpose_b and alpha == beta == 1.0 and (c is None or c.dim() == 1):
            return functional.linear(a, b, c)
        product = torch.matmul(a, b.t() if transpose_b else b)
        product = product if alpha == 1.0 else product * alpha
        if c is None:
            return product
        return product + (c if beta == 1.0 else c * beta)

    return compute


@operator("Einsum")
def einsum(node: Node) -> Compute:
    """Sum of products by an index equation."""
    equation = node.attributes["equation"].replace(" ", "")
    return lambda *operands: torch.einsum(equation, *operands)
