"""Differentiable power-of-two quantizers of activations.

Rounding passes the gradient straight through; the exponent of the scale is learned in the log
domain, rounded straight through, too, so that the scale is a power of two at every step and not
only at the end (TQT, arXiv 1903.08066, section 3). QDrop (arXiv 2203.05740) leaves a random share
of the elements unquantized, which flattens the loss that the weights are learned on.
"""

from __future__ import annotations

import torch

from graph_tools.quantizer import TensorQuantizer

__all__ = ["SoftQuantizer"]


class SoftQuantizer:
    """Quantize and dequantize with gradients to the value and to the exponent.

    Args:
        quantizer: a per-tensor quantizer; its exponent is where learning starts.

    Attributes:
        exponent: the parameter, scalar float32; its nearest integer is in force.
    """

    def __init__(self, quantizer: TensorQuantizer) -> None:
        assert isinstance(quantizer.exponent, int)
        self._low, self._high = quantizer.qmin, quantizer.qmax
        self.exponent = torch.tensor(float(quantizer.exponent))

    def __call__(
        self, value: torch.Tensor, drop: float, generator: torch.Generator
    ) -> torch.Tensor:
        """Quantize ``value``.

        Args:
            value: any shape.
            drop: share of the elements that stay as they are, 0..1.
            generator: draws them.
        """
        scale = torch.exp2(_through(self.exponent, self.exponent.round()))
        scaled = (value / scale).clamp(self._low, self._high)
        quantized = _through(scaled, scaled.round()) * scale
        if drop == 0:
            return quantized
        kept = torch.rand(value.shape, generator=generator) < drop
        return torch.where(kept, value, quantized)


def _through(value: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """``rounded``, with the gradient of ``value``."""
    return value + (rounded - value).detach()
