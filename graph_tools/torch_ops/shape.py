"""Operators that ask for or change the shape: views wherever torch allows them."""

from __future__ import annotations

from math import prod

import numpy as np
import torch

from graph_tools.torch_ops.registry import Compute, Node, operator

__all__ = [
    "depth_to_space",
    "expand",
    "flatten",
    "reshape",
    "shape",
    "size",
    "space_to_depth",
    "squeeze",
    "tile",
    "transpose",
    "unsqueeze",
]


@operator("Shape")
def shape(node: Node) -> Compute:
    """Lengths of the axes from ``start`` to ``end``, int64 on the CPU."""
    start, end = node.integer("start", 0), node.attributes.get("end")
    return lambda x: torch.tensor(x.shape[start:end], dtype=torch.int64)


@operator("Size")
def size(node: Node) -> Compute:
    """Number of elements, int64 on the CPU."""
    return lambda x: torch.tensor(x.numel(), dtype=torch.int64)


@operator("Reshape", host=(1,))
def reshape(node: Node) -> Compute:
    """New shape: -1 is what is left, 0 keeps the length (with ``allowzero`` it is 0)."""
    shape_input = node.ints_input(1)
    keep_zero = node.flag("allowzero")

    def compute(x: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        target = shape_input(wanted) or ()
        if not keep_zero and 0 in target:
            target = tuple(length or x.shape[axis] for axis, length in enumerate(target))
        return torch.reshape(x, target)

    return compute


@operator("Flatten")
def flatten(node: Node) -> Compute:
    """Two axes: those before ``axis``, and the others."""
    axis = node.integer("axis", 1)

    def compute(x: torch.Tensor) -> torch.Tensor:
        split = axis % x.dim() if axis < 0 else axis
        return x.reshape(prod(x.shape[:split]), prod(x.shape[split:]))

    return compute


@operator("Squeeze", host=(1,))
def squeeze(node: Node) -> Compute:
    """Drop the named axes, or all of length 1."""
    axes_input = node.ints_input(1)

    def compute(x: torch.Tensor, axes: torch.Tensor | None = None) -> torch.Tensor:
        chosen = axes_input(axes)
        return x.squeeze() if chosen is None else x.squeeze(chosen)

    return compute


@operator("Unsqueeze", host=(1,))
def unsqueeze(node: Node) -> Compute:
    """Insert axes of length 1; the numbers count axes of the result."""
    axes_input = node.ints_input(1)

    def compute(x: torch.Tensor, axes: torch.Tensor) -> torch.Tensor:
        chosen = axes_input(axes) or ()
        rank = x.dim() + len(chosen)
        for axis in sorted(axis % rank for axis in chosen):
            x = x.unsqueeze(axis)
        return x

    return compute


@operator("Transpose")
def transpose(node: Node) -> Compute:
    """Permute the axes, by default reversing them."""
    order = node.integers("perm")
    if order is not None:
        return lambda x: x.permute(order)
    return lambda x: x.permute(*reversed(range(x.dim())))


@operator("Expand", host=(1,))
def expand(node: Node) -> Compute:
    """Broadcast against a shape (in both directions)."""
    shape_input = node.ints_input(1)

    def compute(x: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return x.expand(np.broadcast_shapes(x.shape, shape_input(wanted) or ()))

    return compute


@operator("Tile", host=(1,))
def tile(node: Node) -> Compute:
    """Repeat along each axis."""
    repeats_input = node.ints_input(1)
    return lambda x, repeats: x.repeat(repeats_input(repeats) or ())


@operator("DepthToSpace")
def depth_to_space(node: Node) -> Compute:
    """Move blocks of channels into space; the channels' order is DCR or CRD."""
    block, crd = node.attributes["blocksize"], node.text("mode", "DCR") == "CRD"

    def compute(x: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x.shape
        depth = channels // block**2
        if crd:
            blocks = x.reshape(batch, depth, block, block, height, width)
            blocks = blocks.permute(0, 1, 4, 2, 5, 3)
        else:
            blocks = x.reshape(batch, block, block, depth, height, width)
            blocks = blocks.permute(0, 3, 4, 1, 5, 2)
        return blocks.reshape(batch, depth, height * block, width * block)

    return compute


@operator("SpaceToDepth")
def space_to_depth(node: Node) -> Compute:
    """Move blocks of space into channels; the channels' order is DCR or CRD."""
    block, crd = node.attributes["blocksize"], node.text("mode", "DCR") == "CRD"
    order = (0, 1, 3, 5, 2, 4) if crd else (0, 3, 5, 1, 2, 4)

    def compute(x: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x.shape
        rows, columns = height // block, width // block
        blocks = x.reshape(batch, channels, rows, block, columns, block).permute(order)
        return blocks.reshape(batch, channels * block**2, rows, columns)

    return compute
