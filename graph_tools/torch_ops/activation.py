"""Activation functions."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from graph_tools.torch_ops.registry import Compute, Node, alias, operator

__all__ = [
    "celu",
    "clip",
    "elu",
    "gelu",
    "hard_max",
    "hard_sigmoid",
    "leaky_relu",
    "log_softmax",
    "prelu",
    "selu",
    "shrink",
    "softmax",
    "swi_glu",
    "swish",
    "thresholded_relu",
]

alias("HardSwish", functional.hardswish)
alias("Mish", functional.mish)
alias("Relu", torch.relu)
alias("Sigmoid", torch.sigmoid)
alias("Softplus", functional.softplus)
alias("Softsign", functional.softsign)
alias("Tanh", torch.tanh)


@operator("LeakyRelu")
def leaky_relu(node: Node) -> Compute:
    """``x`` where x >= 0, alpha x elsewhere."""
    alpha = node.number("alpha", 0.01)
    return lambda x: functional.leaky_relu(x, alpha)


@operator("PRelu")
def prelu(node: Node) -> Compute:
    """``x`` where x >= 0, slope x elsewhere; the slope broadcasts to x."""

    def compute(x: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        per_channel = slope.dim() == x.dim() - 1 and slope.numel() == slope.shape[0]
        if slope.numel() == 1 or (per_channel and slope.numel() == x.shape[1]):
            if x.dtype.is_floating_point:
                return functional.prelu(x, slope.reshape(-1))
        return torch.where(x < 0, slope * x, x)

    return compute


@operator("Clip")
def clip(node: Node) -> Compute:
    """Limit to [min, max], either of which may be absent; max wins where they cross."""
    low, high = node.scalar(1), node.scalar(2)
    known = all(not node.has(index) or node.scalar(index) is not None for index in (1, 2))
    lowest = -math.inf if low is None else low
    highest = math.inf if high is None else high

    def compute(
        x: torch.Tensor, low: torch.Tensor | None = None, high: torch.Tensor | None = None
    ) -> torch.Tensor:
        if known and x.dtype.is_floating_point and lowest <= highest:
            # Several times faster than clamp, whose gradient differs only at the very bounds.
            return functional.hardtanh(x, lowest, highest)
        return x.clone() if low is None and high is None else torch.clamp(x, low, high)

    return compute


@operator("HardSigmoid")
def hard_sigmoid(node: Node) -> Compute:
    """max(0, min(1, alpha x + beta))."""
    alpha, beta = node.number("alpha", 0.2), node.number("beta", 0.5)
    if beta == 0.5 and abs(alpha - 1 / 6) < 1e-7:
        return functional.hardsigmoid
    return lambda x: functional.hardtanh(x * alpha + beta, 0.0, 1.0)


@operator("Elu")
def elu(node: Node) -> Compute:
    """``x`` where x > 0, alpha (e^x - 1) elsewhere."""
    alpha = node.number("alpha", 1.0)
    return lambda x: functional.elu(x, alpha)


@operator("Celu")
def celu(node: Node) -> Compute:
    """max(0, x) + min(0, alpha (e^(x / alpha) - 1))."""
    alpha = node.number("alpha", 1.0)
    return lambda x: functional.celu(x, alpha)


@operator("Selu")
def selu(node: Node) -> Compute:
    """``gamma x`` where x > 0, gamma alpha (e^x - 1) elsewhere."""
    alpha = node.number("alpha", 1.67326319217681884765625)
    gamma = node.number("gamma", 1.05070102214813232421875)
    return lambda x: functional.elu(x, alpha) * gamma


@operator("ThresholdedRelu")
def thresholded_relu(node: Node) -> Compute:
    """``x`` where x > alpha, 0 elsewhere."""
    alpha = node.number("alpha", 1.0)
    return lambda x: functional.threshold(x, alpha, 0.0)


@operator("Gelu")
def gelu(node: Node) -> Compute:
    """``x Phi(x)``, or its approximation by tanh."""
    approximate = node.text("approximate", "none")
    return lambda x: functional.gelu(x, approximate=approximate)


@operator("Swish")
def swish(node: Node) -> Compute:
    """``x sigmoid(alpha x)``."""
    alpha = node.number("alpha", 1.0)
    if alpha == 1.0:
        return functional.silu
    return lambda x: x * torch.sigmoid(x * alpha)


@operator("Softmax")
def softmax(node: Node) -> Compute:
    """Softmax over one axis (the meaning since opset 13)."""
    axis = node.integer("axis", -1)
    return lambda x: torch.softmax(x, axis)


@operator("LogSoftmax")
def log_softmax(node: Node) -> Compute:
    """Logarithm of the softmax over one axis (the meaning since opset 13)."""
    axis = node.integer("axis", -1)
    return lambda x: torch.log_softmax(x, axis)


@operator("Hardmax")
def hard_max(node: Node) -> Compute:
    """1 at the first maximum along an axis, 0 elsewhere (the meaning since opset 13)."""
    axis = node.integer("axis", -1)

    def compute(x: torch.Tensor) -> torch.Tensor:
        first = x.argmax(axis, keepdim=True)
        return torch.zeros_like(x).scatter(axis, first, 1.0)

    return compute


@operator("Shrink")
def shrink(node: Node) -> Compute:
    """Move x towards 0 by ``bias`` where it is further than ``lambd`` from 0; 0 elsewhere."""
    bias, limit = node.number("bias", 0.0), node.number("lambd", 0.5)

    def compute(x: torch.Tensor) -> torch.Tensor:
        moved = torch.where(x < -limit, x + bias, x - bias)
        return torch.where(x.abs() > limit, moved, 0).to(x.dtype)

    return compute


@operator("SwiGLU")
def swi_glu(node: Node) -> Compute:
    """``a sigmoid(alpha a) b``."""
    gate = swish(node)
    return lambda a, b: gate(a) * b
