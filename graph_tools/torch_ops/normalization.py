"""Normalizations, with the statistics of training or of the input itself."""

from __future__ import annotations

import torch
from torch.nn import functional

from graph_tools.torch_ops.dtypes import torch_type
from graph_tools.torch_ops.registry import Compute, Node, operator

__all__ = [
    "batch_normalization",
    "dropout",
    "group_normalization",
    "instance_normalization",
    "layer_normalization",
    "local_response_normalization",
    "lp_normalization",
    "mean_variance_normalization",
    "rms_normalization",
]


@operator("BatchNormalization")
def batch_normalization(node: Node) -> Compute:
    """Normalize each channel of ``[N, C, ...]`` with stored mean and variance."""
    epsilon = node.number("epsilon", 1e-5)
    if node.integer("training_mode", 0):
        raise node.fault("training mode", "export the model in inference mode")

    def compute(
        x: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor,
        mean: torch.Tensor,
        variance: torch.Tensor,
    ) -> torch.Tensor:
        if not x.is_cpu or x.dim() < 2:
            return functional.batch_norm(x, mean, variance, scale, bias, eps=epsilon)
        # On the CPU twice as fast as batch_norm, and autograd need not keep x.
        gain = scale * torch.rsqrt(variance + epsilon)
        shift = bias - mean * gain
        shape = (-1, *[1] * (x.dim() - 2))
        return torch.addcmul(shift.reshape(shape), x, gain.reshape(shape))

    return compute


@operator("InstanceNormalization")
def instance_normalization(node: Node) -> Compute:
    """Normalize each image's channels over their spatial axes."""
    epsilon = node.number("epsilon", 1e-5)
    return lambda x, scale, bias: functional.group_norm(x, x.shape[1], scale, bias, epsilon)


@operator("GroupNormalization")
def group_normalization(node: Node) -> Compute:
    """Normalize groups of channels.

    Scale and bias are per group before opset 21, and per channel since.
    """
    groups, epsilon = node.attributes["num_groups"], node.number("epsilon", 1e-5)
    per_group = node.opset < 21

    def compute(x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        if per_group:
            size = x.shape[1] // groups
            scale, bias = scale.repeat_interleave(size), bias.repeat_interleave(size)
        return functional.group_norm(x, groups, scale, bias, epsilon)

    return compute


@operator("LayerNormalization")
def layer_normalization(node: Node) -> Compute:
    """Normalize over the axes from ``axis`` on.

    Further outputs, if wanted: mean and 1 / standard deviation.
    """
    axis, epsilon = node.integer("axis", -1), node.number("epsilon", 1e-5)
    wants_statistics = node.wants(1) or node.wants(2)

    def compute(
        x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        shape = x.shape[axis:]
        if scale.shape == shape and (bias is None or bias.shape == shape):
            y = functional.layer_norm(x, shape, scale, bias, epsilon)
        else:
            y = functional.layer_norm(x, shape, eps=epsilon) * scale
            y = y if bias is None else y + bias
        if not wants_statistics:
            return y
        axes = tuple(range(axis % x.dim(), x.dim()))
        variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
        return y, mean, torch.rsqrt(variance + epsilon)

    return compute


@operator("RMSNormalization")
def rms_normalization(node: Node) -> Compute:
    """Divide by the root of the mean square over the axes from ``axis`` on, then scale.

    Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """
    axis, epsilon = node.integer("axis", -1), node.number("epsilon", 1e-5)
    stash = torch_type(node.integer("stash_type", 1))

    def compute(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        axes = tuple(range(axis % x.dim(), x.dim()))
        wide = x.to(torch.promote_types(x.dtype, stash))
        inverse = torch.rsqrt(wide.square().mean(axes, keepdim=True) + epsilon)
        return (wide * inverse).to(x.dtype) * scale

    return compute


@operator("LpNormalization")
def lp_normalization(node: Node) -> Compute:
    """Divide by the norm along an axis; zeros stay zeros."""
    axis, p = node.integer("axis", -1), node.integer("p", 2)

    def compute(x: torch.Tensor) -> torch.Tensor:
        norm = torch.linalg.vector_norm(x, p, axis, keepdim=True)
        return x / torch.where(norm == 0, 1.0, norm)

    return compute


@operator("MeanVarianceNormalization")
def mean_variance_normalization(node: Node) -> Compute:
    """Subtract the mean and divide by the standard deviation over some axes."""
    axes = node.integers("axes") or (0, 2, 3)

    def compute(x: torch.Tensor) -> torch.Tensor:
        variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
        return (x - mean) / (variance.sqrt() + 1e-9)  # epsilon of the function's definition

    return compute


@operator("LRN")
def local_response_normalization(node: Node) -> Compute:
    """``x / (bias + alpha m) ^ beta``, m = mean of x^2 over ``size`` neighboring channels."""
    size = node.attributes["size"]
    alpha, beta, bias = (
        node.number("alpha", 1e-4),
        node.number("beta", 0.75),
        node.number("bias", 1.0),
    )
    before, behind = (size - 1) // 2, size - 1 - (size - 1) // 2

    def compute(x: torch.Tensor) -> torch.Tensor:
        channels = x.square().flatten(2).transpose(1, 2)  # [N, D, C]
        means = functional.avg_pool1d(functional.pad(channels, (before, behind)), size, 1)
        means = means.transpose(1, 2).reshape(x.shape)
        return x / (bias + alpha * means) ** beta

    return compute


@operator("Dropout", host=(1, 2))
def dropout(node: Node) -> Compute:
    """Keep everything, as in inference; the second output, if wanted, is an all-true mask."""
    training = node.constant(2)
    if training is not None and bool(training):
        raise node.fault("training mode", "export the model in inference mode")

    def compute(
        x: torch.Tensor,
        ratio: torch.Tensor | None = None,
        training: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        if training is not None and bool(training):
            raise node.fault("training mode", "export the model in inference mode")
        return (x, torch.ones_like(x, dtype=torch.bool)) if node.wants(1) else x

    return compute
