"""Operators that pick, cut and join."""

from __future__ import annotations

from math import prod

import torch

from graph_tools.torch_ops.registry import Compute, Node, operator

__all__ = ["concat", "gather", "gather_elements", "gather_nd", "slice_", "split", "trilu"]


def _from_start(indices: torch.Tensor, length: int) -> torch.Tensor:
    """Let negative indices count from the end; int64."""
    indices = indices.long()
    return torch.where(indices < 0, indices + length, indices)


@operator("Concat")
def concat(node: Node) -> Compute:
    """Join along an axis."""
    axis = node.attributes["axis"]
    return lambda *parts: torch.cat(parts, axis)


@operator("Split", host=(1,))
def split(node: Node) -> Compute:
    """Cut along an axis, into given lengths or into as many parts as there are outputs."""
    axis, parts = node.integer("axis", 0), node.integer("num_outputs", len(node.outputs))
    lengths_input = node.ints_input(1)

    def compute(
        x: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        chosen = lengths_input(lengths)
        if chosen is None:
            length = -(-x.shape[axis] // parts)
            chosen = tuple(
                min(length, max(x.shape[axis] - part * length, 0)) for part in range(parts)
            )
        return torch.split(x, list(chosen), axis)

    return compute


@operator("Slice", host=(1, 2, 3, 4))
def slice_(node: Node) -> Compute:
    """Cut ranges out of axes; a negative step walks backwards."""
    inputs = [node.ints_input(index) for index in range(1, 5)]

    def compute(
        x: torch.Tensor,
        starts: torch.Tensor,
        ends: torch.Tensor,
        axes: torch.Tensor | None = None,
        steps: torch.Tensor | None = None,
    ) -> torch.Tensor:
        first, last = inputs[0](starts) or (), inputs[1](ends) or ()
        chosen = inputs[2](axes) or tuple(range(len(first)))
        strides = inputs[3](steps) or (1,) * len(first)
        for axis, start, end, step in zip(chosen, first, last, strides, strict=True):
            indices = range(x.shape[axis])[start:end:step]
            if step < 0:
                indices = indices[::-1]
            if len(indices) == x.shape[axis]:
                pass
            elif len(indices) and indices.step == 1:
                x = x.narrow(axis, indices.start, len(indices))
            else:
                cut = [slice(None)] * x.dim()
                cut[axis] = slice(indices.start, indices.stop, indices.step)
                x = x[tuple(cut)]
            x = x.flip(axis) if step < 0 else x
        return x

    return compute


@operator("Gather")
def gather(node: Node) -> Compute:
    """Pick slices along an axis; the indices' shape takes the place of the axis."""
    axis = node.integer("axis", 0)
    fixed = node.scalar(1) if node.constants.get(1, torch.ones(1)).dim() == 0 else None
    if fixed is not None:
        return lambda x, _: x.select(axis, int(fixed))

    def compute(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        flat = _from_start(indices.reshape(-1), x.shape[axis])
        picked = x.index_select(axis, flat)
        if indices.dim() == 1:
            return picked
        before = axis % x.dim()
        return picked.reshape((*x.shape[:before], *indices.shape, *x.shape[before + 1 :]))

    return compute


@operator("GatherElements")
def gather_elements(node: Node) -> Compute:
    """Pick one element for each index, along an axis."""
    axis = node.integer("axis", 0)
    return lambda x, indices: x.gather(axis, _from_start(indices, x.shape[axis]))


@operator("GatherND")
def gather_nd(node: Node) -> Compute:
    """Pick slices by the index vectors in the last axis of ``indices``."""
    batch_dims = node.integer("batch_dims", 0)

    def compute(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        depth = indices.shape[-1]
        batch, indexed = x.shape[:batch_dims], x.shape[batch_dims : batch_dims + depth]
        rest = x.shape[batch_dims + depth :]
        offsets = indices.new_zeros(indices.shape[:-1], dtype=torch.int64)
        for position, length in enumerate(indexed):
            offsets = offsets * length + _from_start(indices[..., position], length)
        rows = torch.arange(prod(batch), device=x.device) * prod(indexed)
        offsets = offsets + rows.reshape((*batch, *[1] * (indices.dim() - 1 - batch_dims)))
        picked = x.reshape(-1, *rest).index_select(0, offsets.reshape(-1))
        return picked.reshape((*indices.shape[:-1], *rest))

    return compute


@operator("Trilu", host=(1,))
def trilu(node: Node) -> Compute:
    """Keep the upper or lower triangle of the last two axes."""
    upper, diagonal_input = node.flag("upper", default=True), node.ints_input(1)

    def compute(x: torch.Tensor, k: torch.Tensor | None = None) -> torch.Tensor:
        (diagonal,) = diagonal_input(k) or (0,)
        return torch.triu(x, diagonal) if upper else torch.tril(x, diagonal)

    return compute
