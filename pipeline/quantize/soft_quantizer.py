"""Differentiable power-of-two quantizers of activations.

Rounding passes the gradient straight through. QDrop (arXiv 2203.05740) leaves a random share of
the elements unquantized, which flattens the loss that the weights are learned on.
"""

from __future__ import annotations

from typing import Any

import torch

from graph_tools.quantizer import TensorQuantizer

__all__ = ["soft_quantize"]


def soft_quantize(
    value: torch.Tensor, quantizer: TensorQuantizer, drop: float, generator: torch.Generator
) -> torch.Tensor:
    """Quantize and dequantize; the gradient passes where nothing saturates.

    Args:
        value: any shape, float32.
        quantizer: a per-tensor quantizer.
        drop: share of the elements that stay as they are, 0..1, in steps of 1/256.
        generator: draws them.
    """
    kept = _drawn(value, drop, generator) if drop else None
    low, high = quantizer.qmin, quantizer.qmax
    scale = float(quantizer.scale)
    quantized = _Quantize.apply(value, scale, low, high, kept)  # type: ignore[no-untyped-call]
    return torch.as_tensor(quantized)


class _Quantize(torch.autograd.Function):
    """Masks are float32: torch's loops over bool tensors take several times as long."""

    @staticmethod
    def forward(
        ctx: Any,
        value: torch.Tensor,
        scale: float,
        low: int,
        high: int,
        kept: torch.Tensor | None,
    ) -> torch.Tensor:
        scaled = value * (1 / scale)
        result = scaled.round().clamp_(low, high)
        passes = scaled.sub_(result).abs_().le_(0.5)
        result.mul_(scale)
        if kept is not None:
            result = torch.lerp(result, value, kept)
            torch.maximum(passes, kept, out=passes)
        ctx.save_for_backward(passes)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (passes,) = ctx.saved_tensors
        return gradients[0] * passes, None, None, None, None


def _drawn(value: torch.Tensor, share: float, generator: torch.Generator) -> torch.Tensor:
    """1 for ``share`` of the elements, else 0, in the memory format of ``value``."""
    count = value.numel()
    words = torch.randint(-(2**63), 2**63 - 1, (count // 8 + 1,), generator=generator)
    drawn = torch.empty_like(value)  # a byte an element: eight times fewer draws
    drawn.as_strided((count,), (1,)).copy_(words.view(torch.uint8)[:count])
    return drawn.lt_(round(256 * share))
