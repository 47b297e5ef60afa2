"""Operators that write elements or slices into a copy of a tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from graph_tools.torch_ops.indexing import from_start
from graph_tools.torch_ops.registry import Compute, Node, operator

__all__ = ["scatter_elements", "scatter_nd", "tensor_scatter"]

_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _scatter(
    x: torch.Tensor, axis: int, indices: torch.Tensor, updates: torch.Tensor, reduction: str
) -> torch.Tensor:
    if reduction == "none":
        return x.scatter(axis, indices, updates)
    return x.scatter_reduce(axis, indices, updates, _REDUCTIONS[reduction])


@operator("ScatterElements")
def scatter_elements(node: Node) -> Compute:
    """Write one element for each index, along an axis."""
    axis, reduction = node.integer("axis", 0), node.text("reduction", "none")

    def compute(x: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
        return _scatter(x, axis, from_start(indices, x.shape[axis]), updates, reduction)

    return compute


@operator("ScatterND")
def scatter_nd(node: Node) -> Compute:
    """Write slices at the index vectors in the last axis of ``indices``."""
    reduction = node.text("reduction", "none")

    def compute(x: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
        depth = indices.shape[-1]
        rows = _row_numbers(indices, x.shape[:depth])  # [number of slices]
        data = x.reshape(math.prod(x.shape[:depth]), -1)
        slices = updates.reshape(len(rows), data.shape[1])
        wide = rows[:, None].expand_as(slices)
        return _scatter(data, 0, wide, slices, reduction).reshape(x.shape)

    return compute


def _row_numbers(indices: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Return the index vectors as numbers into the flattened leading axes, in one row."""
    flat = indices.new_zeros(indices.shape[:-1], dtype=torch.int64)
    for position, length in enumerate(lengths):
        flat = flat * length + from_start(indices[..., position], length)
    return flat.reshape(-1)


@operator("TensorScatter")
def tensor_scatter(node: Node) -> Compute:
    """Write a stretch of each image's sequence, from the image's write index on."""
    axis, circular = node.integer("axis", -2), node.text("mode", "linear") == "circular"

    def compute(
        x: torch.Tensor, updates: torch.Tensor, starts: torch.Tensor | None = None
    ) -> torch.Tensor:
        place = axis % x.dim()
        first = torch.zeros(len(x), dtype=torch.int64) if starts is None else starts
        positions = first.to(x.device)[:, None] + torch.arange(
            updates.shape[place], device=x.device
        )
        if circular:
            positions = positions % x.shape[place]
        shape = [1] * x.dim()
        shape[0], shape[place] = positions.shape
        return x.scatter(place, positions.reshape(shape).expand_as(updates), updates)

    return compute
