"""Reading a tensor at positions between its elements: GridSample, AffineGrid, DeformConv.

torch's own kernels serve 2-D and 3-D grids; the general way, for every rank and mode, gathers
the neighbors ("taps") of each position and adds them up by weight.
"""

from __future__ import annotations

from itertools import product

import torch
from torch.nn import functional

from graph_tools.torch_ops.registry import Compute, Node, operator
from graph_tools.torch_ops.windows import Window

__all__ = ["affine_grid", "deform_conv", "grid_sample"]

_MODES = {"bilinear": "linear", "bicubic": "cubic"}  # the names of opset 16
_TORCH_MODES = {
    ("linear", 4): "bilinear",
    ("cubic", 4): "bicubic",
    ("nearest", 4): "nearest",
    ("linear", 5): "bilinear",
    ("nearest", 5): "nearest",
}
_CUBIC_COEFFICIENT = -0.75


@operator("GridSample")
def grid_sample(node: Node) -> Compute:
    """Interpolate ``[N, C, *in]`` at positions ``[N, *out, d]``.

    Positions reach from -1 to 1; the coordinate of the last axis comes first.
    """
    mode = node.text("mode", "linear")
    mode = _MODES.get(mode, mode)
    padding, corners = node.text("padding_mode", "zeros"), node.flag("align_corners")

    def compute(x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        if native := _TORCH_MODES.get((mode, x.dim())):
            return functional.grid_sample(
                x, grid.to(x.dtype), mode=native, padding_mode=padding, align_corners=corners
            )
        sizes = torch.tensor(x.shape[2:], dtype=x.dtype, device=x.device)
        unit = (grid.to(x.dtype).flip(-1) + 1) / 2
        positions = unit * (sizes - 1) if corners else unit * sizes - 0.5
        sampled = _sample(x, positions.flatten(1, -2), mode, padding, corners)
        return sampled.reshape(*x.shape[:2], *grid.shape[1:-1])

    return compute


def _sample(
    x: torch.Tensor, positions: torch.Tensor, mode: str, padding: str, corners: bool
) -> torch.Tensor:
    """Interpolate ``[N, C, *in]`` at ``[N, P, d]`` positions in elements; ``[N, C, P]``."""
    sizes = x.shape[2:]
    taps = [_taps(positions[..., axis], mode) for axis in range(len(sizes))]
    flat = x.flatten(2)
    total = x.new_zeros(*x.shape[:2], positions.shape[1])
    for chosen in product(*taps):
        offset, weight = torch.zeros_like(chosen[0][0]), torch.ones_like(chosen[0][1])
        for (index, share), size in zip(chosen, sizes, strict=True):
            if padding == "zeros":
                share = share * ((index >= 0) & (index < size))
            elif padding == "reflection":
                index = _reflect(index, size, corners)
            offset, weight = offset * size + index.clamp(0, size - 1), weight * share
        picked = flat.gather(2, offset[:, None].expand_as(total))
        total = total + picked * weight[:, None]
    return total


def _taps(position: torch.Tensor, mode: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return index and weight of each element that counts at a position along one axis."""
    if mode == "nearest":
        return [(position.round().long(), torch.ones_like(position))]
    first = position.floor()
    rest, start = position - first, first.long()
    if mode == "linear":
        return [(start, 1 - rest), (start + 1, rest)]
    return [(start + step, _cubic((rest - step).abs())) for step in (-1, 0, 1, 2)]


def _cubic(distance: torch.Tensor) -> torch.Tensor:
    """Keys' cubic convolution kernel (1981), up to distance 2."""
    a, d = _CUBIC_COEFFICIENT, distance
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((d - 5) * d + 8) * d * a - 4 * a
    return torch.where(d <= 1, near, far)


def _reflect(index: torch.Tensor, size: int, corners: bool) -> torch.Tensor:
    """Mirror indices at the centers of the outermost elements, or at their outer edges."""
    period = max(2 * (size - 1), 1) if corners else 2 * size
    index = index % period
    return torch.minimum(index, period - index if corners else period - 1 - index)


@operator("AffineGrid", host=(1,))
def affine_grid(node: Node) -> Compute:
    """Positions for GridSample from one affine matrix an image, ``[N, d, d + 1]``."""
    corners, size_input = node.flag("align_corners"), node.ints_input(1)

    def compute(theta: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        return functional.affine_grid(theta, list(size_input(size) or ()), corners)

    return compute


@operator("DeformConv")
def deform_conv(node: Node) -> Compute:
    """Conv whose kernel elements are each moved by an offset and scaled by a mask.

    Shapes: weight ``[out, in / group, *kernel]``, offset ``[N, offset groups * K * d, *out]``,
    mask ``[N, offset groups * K, *out]`` with K kernel elements and d spatial axes.
    Dai et al., "Deformable Convolutional Networks", 2017; Zhu et al., 2019.
    """
    group, offset_groups = node.integer("group", 1), node.integer("offset_group", 1)

    def compute(
        x: torch.Tensor,
        weight: torch.Tensor,
        offset: torch.Tensor,
        bias: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        batch, rank, outputs = x.shape[0], x.dim() - 2, offset.shape[2:]
        window = Window.of(node, weight.shape[2:])
        grid = _kernel_positions(window, outputs, x)  # [K * P, d]
        moves = offset.reshape(batch * offset_groups, -1, rank, outputs.numel())
        moves = moves.transpose(2, 3).flatten(1, 2)
        parts = x.reshape(batch * offset_groups, -1, *x.shape[2:])
        columns = _sample(parts, grid + moves, "linear", "zeros", corners=True)
        if mask is not None:
            columns = columns * mask.reshape(batch * offset_groups, 1, -1)
        columns = columns.reshape(batch, group, weight[0].numel(), outputs.numel())
        kernels = weight.reshape(group, -1, weight[0].numel())
        result = torch.matmul(kernels, columns).reshape(batch, -1, *outputs)
        return result if bias is None else result + bias.reshape(-1, *[1] * rank)

    return compute


def _kernel_positions(window: Window, outputs: torch.Size, like: torch.Tensor) -> torch.Tensor:
    """Return where each kernel element reads for each output, ``[K * P, d]`` in elements."""
    axes = []
    for kernel, dilation, stride, begin, count in zip(
        window.kernel, window.dilations, window.strides, window.begin, outputs, strict=True
    ):
        elements = torch.arange(kernel, device=like.device) * dilation
        starts = torch.arange(count, device=like.device) * stride - begin
        axes.append(elements[:, None] + starts)  # [kernel, out]
    rank = len(axes)
    shaped = []
    for axis, positions in enumerate(axes):
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = positions.shape
        shaped.append(positions.reshape(shape))
    full = (*window.kernel, *outputs)
    flat = [positions.expand(full).reshape(-1) for positions in shaped]
    return torch.stack(flat, -1).to(like.dtype)
