"""Operators that order elements."""

from __future__ import annotations

import torch

from graph_tools.torch_ops.registry import Compute, Node, operator

__all__ = ["top_k"]


@operator("TopK", host=(1,))
def top_k(node: Node) -> Compute:
    """The k largest (or smallest) elements, of equals the first, and their indices."""
    axis, largest = node.integer("axis", -1), node.flag("largest", default=True)
    count_input = node.ints_input(1)

    def compute(x: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (count,) = count_input(k) or (1,)
        values, indices = torch.sort(x, dim=axis, descending=largest, stable=True)
        return values.narrow(axis, 0, count), indices.narrow(axis, 0, count)

    return compute
