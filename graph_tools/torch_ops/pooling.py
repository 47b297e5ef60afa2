"""MaxPool, AveragePool and their global forms over one, two or three spatial axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch.nn import functional

from graph_tools.torch_ops.registry import Compute, Node, operator
from graph_tools.torch_ops.windows import Padding, Window, torch_pads

__all__ = [
    "average_pool",
    "col2im",
    "global_average_pool",
    "global_lp_pool",
    "global_max_pool",
    "lp_pool",
    "max_pool",
    "max_unpool",
]

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


def _sums(window: Window, padded: torch.Tensor) -> torch.Tensor:
    """Sum over the windows of a padded input."""
    rank = len(window.kernel)
    if max(window.dilations) == 1:
        pooled = _AVERAGE_POOL[rank](padded, window.kernel, window.strides)
        return pooled * prod(window.kernel)
    planes = padded.reshape(-1, 1, *padded.shape[2:])
    ones = planes.new_ones(1, 1, *window.kernel)
    summed = _CONV[rank](planes, ones, None, window.strides, 0, window.dilations)
    return summed.reshape(*padded.shape[:2], *summed.shape[2:])


@operator("AveragePool")
def average_pool(node: Node) -> Compute:
    """Mean over windows.

    Padding counts with ``count_include_pad``; what ``ceil_mode`` reaches over never does.
    """
    window = Window.of(node, node.attributes["kernel_shape"])
    rank = len(window.kernel)
    include_pad = node.flag("count_include_pad")
    dilated = max(window.dilations) > 1

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
        return _sums(window, functional.pad(x, torch_pads(before, behind))) / _sums(
            window, counted
        )

    return compute


@operator("GlobalAveragePool")
def global_average_pool(node: Node) -> Compute:
    """Mean over all spatial axes, which stay with length 1."""
    return lambda x: x.mean(dim=tuple(range(2, x.dim())), keepdim=True)


@operator("GlobalMaxPool")
def global_max_pool(node: Node) -> Compute:
    """Maximum over all spatial axes, which stay with length 1."""
    return lambda x: x.amax(dim=tuple(range(2, x.dim())), keepdim=True)


@operator("LpPool")
def lp_pool(node: Node) -> Compute:
    """Norm over windows; padding counts as zeros."""
    window, p = Window.of(node, node.attributes["kernel_shape"]), node.integer("p", 2)

    def compute(x: torch.Tensor) -> torch.Tensor:
        pads = torch_pads(*window.exact_padding(x.shape[2:]))
        sums = _sums(window, functional.pad(x.abs() ** p, pads))
        # The root has no gradient at zero, where whole windows are after a Relu.
        root = torch.where(sums > 0, sums, 1) ** (1 / p)
        return torch.where(sums > 0, root, 0)

    return compute


@operator("GlobalLpPool")
def global_lp_pool(node: Node) -> Compute:
    """Norm over all spatial axes, which stay with length 1."""
    p = node.integer("p", 2)
    return lambda x: torch.linalg.vector_norm(x, p, tuple(range(2, x.dim())), keepdim=True)


@operator("MaxUnpool", host=(2,))
def max_unpool(node: Node) -> Compute:
    """Put elements back to where MaxPool found them, zeros elsewhere.

    The indices count in a tensor of the size that the window implies; a larger
    ``output_shape`` adds zeros behind it.
    """
    window, shape_input = Window.of(node, node.attributes["kernel_shape"]), node.ints_input(2)

    def compute(
        x: torch.Tensor, indices: torch.Tensor, wanted: torch.Tensor | None = None
    ) -> torch.Tensor:
        inferred = [
            (size - 1) * stride - begin - end + kernel
            for size, stride, begin, end, kernel in zip(
                x.shape[2:],
                window.strides,
                window.begin,
                window.end,
                window.kernel,
                strict=True,
            )
        ]
        shape = (*x.shape[:2], *inferred)
        flat = x.new_zeros(prod(shape)).scatter(0, indices.reshape(-1), x.reshape(-1))
        target = shape_input(wanted) or shape
        more = [t - s for t, s in zip(target[2:], inferred, strict=True)]
        return functional.pad(flat.reshape(shape), torch_pads((0,) * len(more), more))

    return compute


@operator("Col2Im", host=(1, 2))
def col2im(node: Node) -> Compute:
    """Add up overlapping blocks ``[N, C * K, L]`` to an image: the gradient of unfolding."""
    image_input, block_input = node.ints_input(1), node.ints_input(2)

    def compute(x: torch.Tensor, image: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
        sizes, kernel = image_input(image) or (), block_input(block) or ()
        window = Window.of(node, kernel)
        padded = [
            size + begin + end
            for size, begin, end in zip(sizes, window.begin, window.end, strict=True)
        ]
        counts = window.output_sizes(sizes, (window.begin, window.end))
        places = torch.zeros(*[1] * (2 * len(sizes)), dtype=torch.int64, device=x.device)
        for axis, (size, count) in enumerate(zip(padded, counts, strict=True)):
            elements = torch.arange(kernel[axis], device=x.device) * window.dilations[axis]
            starts = torch.arange(count, device=x.device) * window.strides[axis]
            shape = [1] * (2 * len(sizes))
            shape[axis], shape[len(sizes) + axis] = len(elements), len(starts)
            places = places * size + (elements[:, None] + starts).reshape(shape)
        blocks = x.reshape(x.shape[0], -1, places.numel())
        result = x.new_zeros(*blocks.shape[:2], prod(padded))
        result = result.scatter_add(2, places.reshape(-1).expand_as(blocks), blocks)
        cut = torch_pads([-pad for pad in window.begin], [-pad for pad in window.end])
        return functional.pad(result.reshape(*blocks.shape[:2], *padded), cut)

    return compute
