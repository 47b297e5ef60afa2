"""Conv and ConvTranspose over one, two or three spatial axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from graph_tools.torch_ops.registry import Compute, Node, operator
from graph_tools.torch_ops.windows import Padding, Window, torch_pads

__all__ = ["causal_conv_with_state", "conv", "conv_transpose"]

_CONV: dict[int, Callable[..., torch.Tensor]] = {
    1: torch.conv1d,
    2: torch.conv2d,
    3: torch.conv3d,
}
_CONV_TRANSPOSE: dict[int, Callable[..., torch.Tensor]] = {
    1: torch.conv_transpose1d,
    2: torch.conv_transpose2d,
    3: torch.conv_transpose3d,
}


@operator("Conv")
def conv(node: Node) -> Compute:
    """Cross-correlate; weight ``[out, in / group, *kernel]``."""
    group = node.integer("group", 1)

    def compute(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        window = Window.of(node, weight.shape[2:])
        begin, end = window.padding(x.shape[2:])
        if begin != end:
            x, begin = functional.pad(x, torch_pads(begin, end)), (0,) * len(begin)
        function = _CONV[weight.dim() - 2]
        return function(x, weight, bias, window.strides, begin, window.dilations, group)

    return compute


@operator("ConvTranspose")
def conv_transpose(node: Node) -> Compute:
    """Transpose of a cross-correlation; weight ``[in, out / group, *kernel]``."""
    group = node.integer("group", 1)

    def compute(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        window = Window.of(node, weight.shape[2:])
        function = _CONV_TRANSPOSE[weight.dim() - 2]
        extra = node.integers("output_padding") or (0,) * len(window.kernel)
        begin, end = _transposed_padding(node, window, x.shape[2:], extra)
        small = all(
            pad < max(stride, dilation)
            for pad, stride, dilation in zip(
                extra, window.strides, window.dilations, strict=True
            )
        )
        if begin == end and min(begin) >= 0 and small:
            return function(
                x, weight, bias, window.strides, begin, extra, group, window.dilations
            )
        full = function(x, weight, None, window.strides, 0, 0, group, window.dilations)
        crop = [more - behind for more, behind in zip(extra, end, strict=True)]
        result = functional.pad(full, torch_pads([-pad for pad in begin], crop))
        if bias is None:
            return result
        return result + bias.reshape(-1, *[1] * len(window.kernel))

    return compute


def _transposed_padding(
    node: Node, window: Window, sizes: Sequence[int], extra: Sequence[int]
) -> Padding:
    """Return what to cut off before and behind each axis of the full result."""
    wanted = node.integers("output_shape")
    same = window.auto_pad in ("SAME_UPPER", "SAME_LOWER")
    if wanted is None and not same:
        return window.padding(sizes)
    if wanted is None:
        wanted = tuple(n * stride for n, stride in zip(sizes, window.strides, strict=True))
    totals = [
        stride * (size - 1) + more + extent - target
        for stride, size, more, extent, target in zip(
            window.strides, sizes, extra, window.extents, wanted[-len(sizes) :], strict=True
        )
    ]
    small = tuple(total // 2 for total in totals)
    large = tuple(total - total // 2 for total in totals)
    return (small, large) if window.auto_pad == "SAME_UPPER" else (large, small)


@operator("CausalConvWithState")
def causal_conv_with_state(node: Node) -> Compute:
    """Depthwise convolution ``[N, C, length]`` over the present and the past only.

    The second output is what the next call needs as past: the last kernel - 1 positions.
    """
    activated = node.text("activation", "none") != "none"

    def compute(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        past: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        reach = weight.shape[2] - 1
        padded = functional.pad(x, (reach, 0)) if past is None else torch.cat([past, x], 2)
        result = torch.conv1d(padded, weight, bias, groups=x.shape[1])
        result = functional.silu(result) if activated else result
        return result, padded[:, :, padded.shape[2] - reach :]

    return compute
