"""Quantize and dequantize on torch tensors."""

from __future__ import annotations

import torch

from graph_tools.quantizer import TensorQuantizer

__all__ = ["fake_quantize"]


def fake_quantize(value: torch.Tensor, quantizer: TensorQuantizer) -> torch.Tensor:
    """QuantizeLinear then DequantizeLinear: round half to even, saturate.

    Args:
        value: float32, any shape.
        quantizer: a per-tensor quantizer.

    Returns:
        Float32 of the same shape, bit-equal to onnxruntime's (the scale is a power of two).
    """
    scale = float(quantizer.scale)
    scaled = torch.round(value * (1.0 / scale))
    return scaled.clamp_(quantizer.qmin, quantizer.qmax).mul_(scale)
