"""MaxPool, AveragePool and their global forms over one, two or three spatial axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch.nn import functional

from graph_tools.torch_ops.registry import Compute, Node, operator
from graph_tools.torch_ops.windows import Padding, Window, torch_pads

__all__ = ["average_pool", "global_average_pool", "global_max_pool", "max_pool"]

_MAX_POOL: dict[int, Callable[..., torch.Tensor]] = {
    1: functional.max_pool1d,
    2: functional.max_pool2d,
    3: functional.max_pool3d,
}
_MAX_POOL_INDICES: dict[int, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    1: functional.max_pool1d_with_indices,
    2: functional.max_pool2d_with_indices,
    3: functional.max_pool3d_with_indices,
}
_AVERAGE_POOL: dict[int, Callable[..., torch.Tensor]] = {
    1: functional.avg_pool1d,
    2: functional.avg_pool2d,
    3: functional.avg_pool3d,
}
_CONV: dict[int, Callable[..., torch.Tensor]] = {
    1: torch.conv1d,
    2: torch.conv2d,
    3: torch.conv3d,
}


def _torch_pads_alike(window: Window, padding: Padding) -> bool:
    """Tell whether torch's poolings can pad so: evenly, by half a kernel at most."""
    begin, end = padding
    return begin == end and all(
        2 * pad <= kernel for pad, kernel in zip(begin, window.kernel, strict=True)
    )


@operator("MaxPool")
def max_pool(node: Node) -> Compute:
    """Maximum over windows; the second output, if wanted, is where each maximum was found."""
    window = Window.of(node, node.attributes["kernel_shape"])
    rank = len(window.kernel)
    column_major = node.flag("storage_order")
    wants_indices = node.wants(1)

    def compute(x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        if not x.dtype.is_floating_point:  # torch pools no bytes; float64 holds them exactly
            pooled = compute(x.double())
            first, *rest = pooled if isinstance(pooled, tuple) else (pooled,)
            return first.to(x.dtype), *rest
        sizes = x.shape[2:]
        begin, ceil_mode, padded = window.padding(sizes)[0], window.ceil_mode, x
        if not _torch_pads_alike(window, window.padding(sizes)):
            begin, end = window.exact_padding(sizes)
            padded = functional.pad(x, torch_pads(begin, end), value=-torch.inf)
            ceil_mode = False
        pads = begin if padded is x else (0,) * rank
        options = (window.kernel, window.strides, pads, window.dilations, ceil_mode)
        if not wants_indices:
            return _MAX_POOL[rank](padded, *options)
        values, indices = _MAX_POOL_INDICES[rank](padded, *options)
        shift = (0,) * rank if padded is x else begin
        return values, _flat_indices(indices, padded.shape[2:], sizes, shift, column_major)

    return compute


def _flat_indices(
    indices: torch.Tensor,
    padded_sizes: Sequence[int],
    sizes: Sequence[int],
    shift: Sequence[int],
    column_major: bool,
) -> torch.Tensor:
    """Turn indices into a padded plane, ``[N, C, *out]``, into those into the whole input."""
    coordinates = []
    for size, before in zip(reversed(padded_sizes), reversed(shift), strict=True):
        coordinates.append(indices % size - before)  # last axis first
        indices = torch.div(indices, size, rounding_mode="floor")
    axes = list(zip(coordinates, reversed(sizes), strict=True))
    flat = torch.zeros_like(indices)
    for coordinate, size in axes if column_major else reversed(axes):
        flat = flat * size + coordinate
    planes = torch.arange(indices.shape[0] * indices.shape[1], device=indices.device)
    planes = planes.reshape(*indices.shape[:2], *[1] * len(sizes))
    return flat + planes * prod(sizes)


@operator("AveragePool")
def average_pool(node: Node) -> Compute:
    """Mean over windows.

    Padding counts with ``count_include_pad``; what ``ceil_mode`` reaches over never does.
    """
    window = Window.of(node, node.attributes["kernel_shape"])
    rank = len(window.kernel)
    include_pad = node.flag("count_include_pad")
    dilated = max(window.dilations) > 1

    def sums(padded: torch.Tensor) -> torch.Tensor:
        if not dilated:
            pooled = _AVERAGE_POOL[rank](padded, window.kernel, window.strides)
            return pooled * prod(window.kernel)
        planes = padded.reshape(-1, 1, *padded.shape[2:])
        ones = planes.new_ones(1, 1, *window.kernel)
        summed = _CONV[rank](planes, ones, None, window.strides, 0, window.dilations)
        return summed.reshape(*padded.shape[:2], *summed.shape[2:])

    def compute(x: torch.Tensor) -> torch.Tensor:
        sizes = x.shape[2:]
        begin, end = window.padding(sizes)
        if not dilated and _torch_pads_alike(window, (begin, end)):
            return _AVERAGE_POOL[rank](
                x, window.kernel, window.strides, begin, window.ceil_mode, include_pad
            )
        before, behind = window.exact_padding(sizes)
        counted = x.new_ones(1, 1, *sizes)
        if include_pad:
            counted = functional.pad(counted, torch_pads(begin, end), value=1.0)
            behind_counted = [b - e for b, e in zip(behind, end, strict=True)]
            counted = functional.pad(counted, torch_pads((0,) * rank, behind_counted))
        else:
            counted = functional.pad(counted, torch_pads(before, behind))
        return sums(functional.pad(x, torch_pads(before, behind))) / sums(counted)

    return compute


@operator("GlobalAveragePool")
def global_average_pool(node: Node) -> Compute:
    """Mean over all spatial axes, which stay with length 1."""
    return lambda x: x.mean(dim=tuple(range(2, x.dim())), keepdim=True)


@operator("GlobalMaxPool")
def global_max_pool(node: Node) -> Compute:
    """Maximum over all spatial axes, which stay with length 1."""
    return lambda x: x.amax(dim=tuple(range(2, x.dim())), keepdim=True)
