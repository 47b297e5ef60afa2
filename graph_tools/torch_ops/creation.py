"""Tensors made from shapes and numbers, and changes of type."""

from __future__ import annotations

import torch

from graph_tools.torch_ops.dtypes import FLOAT8_TYPES, INTEGER_RANGES, torch_type
from graph_tools.torch_ops.registry import Compute, Node, operator

__all__ = [
    "cast",
    "cast_like",
    "constant_of_shape",
    "constant_value",
    "convert",
    "eye_like",
    "range_",
]


def constant_value(node: Node) -> torch.Tensor:
    """Return the value of a Constant node.

    Raises:
        ModelError: strings or sparse tensors.
    """
    attributes = node.attributes
    if "value" in attributes:
        return attributes["value"]  # type: ignore[no-any-return]
    for kind in ("value_float", "value_floats"):
        if kind in attributes:
            return torch.tensor(attributes[kind], dtype=torch.float32)
    for kind in ("value_int", "value_ints"):
        if kind in attributes:
            return torch.tensor(attributes[kind], dtype=torch.int64)
    raise node.fault("only tensors, floats and integers are supported")


@operator("Constant")
def constant(node: Node) -> Compute:
    """A tensor that the node itself holds."""
    value = constant_value(node)
    return lambda: value


@operator("ConstantOfShape", host=(0,))
def constant_of_shape(node: Node) -> Compute:
    """A tensor of one repeated value, by default float zero."""
    shape_input = node.ints_input(0)
    value = node.attributes.get("value", torch.zeros(1)).reshape(())
    return lambda wanted: value.expand(shape_input(wanted) or ()).clone()


@operator("Range", host=(0, 1, 2))
def range_(node: Node) -> Compute:
    """Numbers from start (included) to limit (not included)."""

    def compute(start: torch.Tensor, limit: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        wide = start.double() if start.dtype.is_floating_point else start.long()
        count = torch.ceil((limit.to(wide.dtype) - wide) / delta.to(wide.dtype))
        steps = torch.arange(max(int(count), 0), dtype=wide.dtype)
        return (wide + steps * delta.to(wide.dtype)).to(start.dtype)

    return compute


@operator("EyeLike")
def eye_like(node: Node) -> Compute:
    """1 on one diagonal and 0 elsewhere, in the shape of another matrix."""
    dtype = torch_type(node.attributes["dtype"]) if "dtype" in node.attributes else None
    diagonal = node.integer("k", 0)

    def compute(x: torch.Tensor) -> torch.Tensor:
        rows, columns = (torch.arange(length, device=x.device) for length in x.shape)
        return (columns == rows[:, None] + diagonal).to(dtype or x.dtype)

    return compute


_OVERFLOW = 464.0
"""Halfway from the largest number of float8_e4m3fn to what would come next."""


def convert(x: torch.Tensor, dtype: torch.dtype, saturate: bool) -> torch.Tensor:
    """Change the type; to 8-bit floats with or without saturation, to integers by truncation."""
    if dtype in FLOAT8_TYPES and saturate:
        limit = torch.finfo(dtype).max
        x = x.float().clamp(-limit, limit)
    elif dtype == torch.float8_e4m3fn:  # torch would saturate, since it has no infinity
        x = torch.where(x.abs() > _OVERFLOW, torch.nan, x.float())
    return x.to(dtype)


def _narrow(x: torch.Tensor, element_type: int) -> torch.Tensor:
    """Wrap integers around where the ONNX type has fewer bits than the byte that holds it."""
    low, high = INTEGER_RANGES.get(element_type, (0, 255))
    return x if high - low >= 255 else (x - low) % (high - low + 1) + low


@operator("Cast")
def cast(node: Node) -> Compute:
    """Change the type to that of an attribute."""
    dtype, saturate = torch_type(node.attributes["to"]), node.flag("saturate", default=True)
    element_type = node.integer("to", 0)
    return lambda x: _narrow(convert(x, dtype, saturate), element_type)


@operator("CastLike")
def cast_like(node: Node) -> Compute:
    """Change the type to that of another tensor."""
    saturate = node.flag("saturate", default=True)
    element_type = node.types.get(1, 0)
    return lambda x, like: _narrow(convert(x, like.dtype, saturate), element_type)
