"""Operators that pick, cut and join."""

from __future__ import annotations

from math import prod

import torch
from torch.nn import functional

from graph_tools.torch_ops.registry import Compute, Node, operator

__all__ = [
    "center_crop_pad",
    "compress",
    "concat",
    "from_start",
    "gather",
    "gather_elements",
    "gather_nd",
    "non_zero",
    "one_hot",
    "reverse_sequence",
    "slice_",
    "split",
    "trilu",
]


def from_start(indices: torch.Tensor, length: int) -> torch.Tensor:
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
        flat = from_start(indices.reshape(-1), x.shape[axis])
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
    return lambda x, indices: x.gather(axis, from_start(indices, x.shape[axis]))


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
            offsets = offsets * length + from_start(indices[..., position], length)
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


@operator("CenterCropPad", host=(1,))
def center_crop_pad(node: Node) -> Compute:
    """Cut or pad with zeros to a size; odd rests fall behind what is kept."""
    axes_given, shape_input = node.integers("axes"), node.ints_input(1)

    def compute(x: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        axes = tuple(range(x.dim())) if axes_given is None else axes_given
        for axis, length in zip(axes, shape_input(wanted) or (), strict=True):
            size = x.shape[axis]
            if length <= size:
                x = x.narrow(axis, (size - length) // 2, length)
            else:
                before = (length - size) // 2
                behind = length - size - before
                x = functional.pad(
                    x, [*[0, 0] * (x.dim() - 1 - axis % x.dim()), before, behind]
                )
        return x

    return compute


@operator("OneHot", host=(1,))
def one_hot(node: Node) -> Compute:
    """One value where the position on the new axis is the index, another elsewhere."""
    axis, depth_input = node.integer("axis", -1), node.ints_input(1)

    def compute(
        indices: torch.Tensor, depth: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        (count,) = depth_input(depth) or (0,)
        count = int(count)
        place = axis % (indices.dim() + 1)
        wanted = from_start(indices, count).unsqueeze(place)
        shape = [1] * wanted.dim()
        shape[place] = count
        positions = torch.arange(count, device=indices.device).reshape(shape)
        return torch.where(wanted == positions, values[1], values[0])

    return compute


@operator("ReverseSequence")
def reverse_sequence(node: Node) -> Compute:
    """Reverse the first elements of each sequence, as many as its length says."""
    batch, time = node.integer("batch_axis", 1), node.integer("time_axis", 0)

    def compute(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        steps = torch.arange(x.shape[time], device=x.device)
        ends = lengths.long().to(x.device)[:, None]
        sources = torch.where(steps < ends, ends - 1 - steps, steps)  # [batch, time]
        sources = sources if batch < time else sources.t()
        return x.gather(
            time, sources.reshape(*sources.shape, *[1] * (x.dim() - 2)).expand_as(x)
        )

    return compute


@operator("Compress")
def compress(node: Node) -> Compute:
    """Keep the slices along an axis (or the elements) where a condition holds."""
    axis = node.attributes.get("axis")

    def compute(x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        kept = condition.nonzero().reshape(-1)
        return x.reshape(-1)[kept] if axis is None else x.index_select(axis, kept)

    return compute


@operator("NonZero")
def non_zero(node: Node) -> Compute:
    """Indices of the elements other than zero, a column an element."""
    return lambda x: x.nonzero().t()
