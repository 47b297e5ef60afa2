"""Operators that order elements."""

from __future__ import annotations

import numpy as np
import torch

from graph_tools.torch_ops.registry import Compute, Node, operator

__all__ = ["top_k", "unique"]


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


@operator("Unique", host=(0,))
def unique(node: Node) -> Compute:
    """The different elements (or slices along an axis), ascending or by first occurrence.

    Further outputs: where each occurs first, which of them each element is, how often each
    occurs.
    """
    axis, ascending = node.attributes.get("axis"), node.flag("sorted", default=True)

    def compute(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        data = x.reshape(-1) if axis is None else x
        along = 0 if axis is None else axis
        known = data.detach()
        known = known.float() if known.dtype == torch.bfloat16 else known  # numpy has none
        _, first, inverse, counts = np.unique(
            known.numpy(),
            return_index=True,
            return_inverse=True,
            return_counts=True,
            axis=along,
        )
        order = np.arange(len(first)) if ascending else np.argsort(first)
        rank = np.argsort(order)
        found = torch.from_numpy(first[order])
        rest = (torch.from_numpy(a) for a in (rank[inverse.reshape(-1)], counts[order]))
        return data.index_select(along, found), found, *rest

    return compute
