"""Rounding up or down, learned: AdaRound's parametrization (Nagel et al. 2020, arXiv 2004.10568).

A weight ``w`` with scale ``s`` becomes ``s * clip(floor(w / s) + h(v), qmin, qmax)`` with
``h(v) = clip(sigmoid(v) * (zeta - gamma) + gamma, 0, 1)``, zeta 1.1, gamma -0.1 (equations 22, 23).
``v`` starts where ``h(v)`` is the fraction that rounding cuts off, so the first weight is the float
one. The regularizer ``sum(1 - |2 h(v) - 1| ** beta)`` (equation 24) drives every h to 0 or 1 as
beta falls. The integers are those of ``h(v) >= 1/2``.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from graph_tools.quantizer import QuantizedConstant

__all__ = ["SoftRounding"]

_ZETA, _GAMMA = 1.1, -0.1


class SoftRounding:
    """The soft integers of one weight.

    Args:
        weight: the float weight, any shape.
        constant: its quantizer; the integers are not used.

    Attributes:
        logits: v of each weight, the parameter to learn.
    """

    def __init__(self, weight: torch.Tensor, constant: QuantizedConstant) -> None:
        quantizer = constant.quantizer
        self._constant = constant
        self._scale = torch.from_numpy(np.asarray(quantizer.scale_for(weight.dim())))
        self._low, self._high = quantizer.qmin, quantizer.qmax
        scaled = weight / self._scale
        self._floor = scaled.floor()
        share = (scaled - self._floor - _GAMMA) / (_ZETA - _GAMMA)
        self.logits = torch.logit(share).requires_grad_()

    def up(self) -> torch.Tensor:
        """How far each weight is rounded up, h(v) in 0..1."""
        return (torch.sigmoid(self.logits) * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)

    def weight(self) -> torch.Tensor:
        """The soft-rounded weight, differentiable in ``logits``."""
        return (self._floor + self.up()).clamp(self._low, self._high) * self._scale

    def regularizer(self, beta: float) -> torch.Tensor:
        """Sum over the weights of ``1 - |2h - 1| ** beta``: 0 where all are decided."""
        return (1 - (2 * self.up() - 1).abs().pow(beta)).sum()

    def hard(self) -> QuantizedConstant:
        """The integers."""
        with torch.no_grad():
            integers = (self._floor + (self.logits >= 0)).clamp(self._low, self._high)
        return replace(self._constant, integers=integers.numpy().astype(np.int32))
