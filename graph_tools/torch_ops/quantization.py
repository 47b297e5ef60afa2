"""QuantizeLinear and DequantizeLinear, so that quantized files can be run and compared.

Rounding stops gradients: a fake quantizer with a straight-through gradient is not an ONNX
operator.
"""

from __future__ import annotations

import onnx
import torch

from graph_tools.torch_ops.creation import convert
from graph_tools.torch_ops.dtypes import INTEGER_RANGES, torch_type
from graph_tools.torch_ops.registry import Compute, Node, operator

__all__ = ["dequantize_linear", "quantize_linear"]


def _spread(
    parameter: torch.Tensor, x: torch.Tensor, axis: int, block_size: int
) -> torch.Tensor:
    """Shape a scale or zero point, per tensor, axis or block, to broadcast against x."""
    if parameter.numel() == 1 and parameter.dim() < 2:
        return parameter.reshape(())
    axis %= x.dim()
    if block_size:
        return parameter.repeat_interleave(block_size, axis).narrow(axis, 0, x.shape[axis])
    return parameter.reshape(-1, *[1] * (x.dim() - axis - 1))


@operator("QuantizeLinear")
def quantize_linear(node: Node) -> Compute:
    """saturate(round(x / scale) + zero point), halves to even."""
    axis, block_size = node.integer("axis", 1), node.integer("block_size", 0)
    element_type = (
        node.integer("output_dtype", 0) or node.types.get(2, 0) or onnx.TensorProto.UINT8
    )
    dtype, saturate = torch_type(element_type), node.flag("saturate", default=True)
    precision = node.integer("precision", 0)

    def compute(
        x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None = None
    ) -> torch.Tensor:
        if precision:
            x, scale = x.to(torch_type(precision)), scale.to(torch_type(precision))
        steps = x.to(scale.dtype) / _spread(scale, x, axis, block_size)
        if element_type not in INTEGER_RANGES:
            return convert(steps, dtype, saturate)
        steps = torch.round(steps)
        if zero_point is not None:
            steps = steps + _spread(zero_point, x, axis, block_size).to(steps.dtype)
        return torch.clamp(steps, *INTEGER_RANGES[element_type]).to(dtype)

    return compute


@operator("DequantizeLinear")
def dequantize_linear(node: Node) -> Compute:
    """(x - zero point) scale, in the type of the scale."""
    axis, block_size = node.integer("axis", 1), node.integer("block_size", 0)
    output_type = node.integer("output_dtype", 0)

    def compute(
        x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None = None
    ) -> torch.Tensor:
        dtype = torch_type(output_type) if output_type else scale.dtype
        spread = _spread(scale, x, axis, block_size).to(dtype)
        if zero_point is None:
            return x.to(dtype) * spread
        wide = torch.float32 if x.dtype.is_floating_point else torch.int32
        shift = _spread(zero_point.to(wide), x, axis, block_size)
        return (x.to(wide) - shift).to(dtype) * spread

    return compute
