"""Resize: nearest, linear and cubic in every coordinate mode of ONNX.

Interpolation is linear in the input and works axis by axis, so the general way is one matrix
an axis, ``[output length, input length]``, which holds all of the standard's rules:
coordinates, neighbors, edges, ``exclude_outside``, ``antialias``. The usual cases go to
torch's own kernels instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import floor

import numpy as np
import torch
from torch.nn import functional

from graph_tools.torch_ops.registry import Compute, Node, operator

__all__ = ["resize"]

_NATIVE_MODES = {
    ("nearest", 3): "nearest",
    ("nearest", 4): "nearest",
    ("nearest", 5): "nearest",
    ("linear", 3): "linear",
    ("linear", 4): "bilinear",
    ("linear", 5): "trilinear",
    ("cubic", 4): "bicubic",
}
_TORCH_CUBIC_COEFFICIENT = -0.75


@dataclass(frozen=True, kw_only=True)
class _Sampling:
    """How output positions of an axis read the input; the attributes of the same names."""

    mode: str
    coordinates: str
    nearest: str
    cubic: float
    exclude_outside: bool
    antialias: bool


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """One resized axis; ``scale`` may be such that ``size * scale`` is no integer."""

    axis: int
    size: int
    output: int
    scale: float
    start: float = 0.0
    end: float = 1.0


@operator("Resize", host=(1, 2, 3))
def resize(node: Node) -> Compute:
    """Resample the axes to a scale or to sizes."""
    sampling = _Sampling(
        mode=node.text("mode", "nearest"),
        coordinates=node.text("coordinate_transformation_mode", "half_pixel"),
        nearest=node.text("nearest_mode", "round_prefer_floor"),
        cubic=node.number("cubic_coeff_a", -0.75),
        exclude_outside=node.flag("exclude_outside"),
        antialias=node.flag("antialias"),
    )
    policy = node.text("keep_aspect_ratio_policy", "stretch")
    outside_value = node.number("extrapolation_value", 0.0)
    axes_given = node.integers("axes")
    roi_input, scales_input, sizes_input = (node.ints_input(index) for index in (1, 2, 3))
    crops = sampling.coordinates == "tf_crop_and_resize"

    def compute(
        x: torch.Tensor,
        roi: torch.Tensor | None = None,
        scales: torch.Tensor | None = None,
        sizes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        axes = tuple(range(x.dim())) if axes_given is None else axes_given
        axes = tuple(axis % x.dim() for axis in axes)
        resized = _axes(
            [x.shape[axis] for axis in axes],
            axes,
            (roi_input(roi) if crops else None) or (),
            scales_input(scales) or (),
            sizes_input(sizes) or (),
            policy,
        )
        if not x.dtype.is_floating_point and sampling.mode != "nearest":
            info = torch.iinfo(x.dtype)
            values = _resample(x.double(), resized, sampling, outside_value)
            return values.clamp(info.min, info.max).to(x.dtype)
        return _resample(x, resized, sampling, outside_value)

    return compute


def _axes(
    lengths: Sequence[int],
    axes: Sequence[int],
    roi: Sequence[float],
    scales: Sequence[float],
    sizes: Sequence[int],
    policy: str,
) -> list[_Axis]:
    """Work out scale and output length of each axis."""
    count = len(axes)
    starts, ends = (roi[:count], roi[count:]) if roi else ((0.0,) * count, (1.0,) * count)
    if sizes:
        scales = [size / length for size, length in zip(sizes, lengths, strict=True)]
        if policy != "stretch":
            common = min(scales) if policy == "not_larger" else max(scales)
            scales = [common] * count
            sizes = [floor(common * length + 0.5) for length in lengths]
    else:
        parts = zip(lengths, scales, starts, ends, strict=True)
        sizes = [floor(length * (end - start) * scale) for length, scale, start, end in parts]
    return [
        _Axis(axis=axis, size=length, output=output, scale=scale, start=start, end=end)
        for axis, length, output, scale, start, end in zip(
            axes, lengths, sizes, scales, starts, ends, strict=True
        )
        if (length, scale, start, end) != (output, 1.0, 0.0, 1.0)
    ]


def _resample(
    x: torch.Tensor, axes: Sequence[_Axis], sampling: _Sampling, outside_value: float
) -> torch.Tensor:
    if _is_native(x, axes, sampling):
        return _interpolate(x, axes, sampling)
    for axis in axes:
        if sampling.mode == "nearest":
            indices = torch.from_numpy(_nearest_indices(axis, sampling))
            x = x.index_select(axis.axis, indices.to(x.device))
        else:
            x = _multiply(x, axis, sampling)
    if sampling.coordinates == "tf_crop_and_resize":
        for axis in axes:
            source = _source(axis, sampling.coordinates)
            outside = torch.from_numpy((source < 0) | (source > axis.size - 1)).to(x.device)
            shape = [1] * x.dim()
            shape[axis.axis] = -1
            x = torch.where(outside.reshape(shape), outside_value, x)
    return x


def _multiply(x: torch.Tensor, axis: _Axis, sampling: _Sampling) -> torch.Tensor:
    matrix = torch.from_numpy(_matrix(axis, sampling)).to(x.device, x.dtype)
    if axis.axis == x.dim() - 1:
        return torch.matmul(x, matrix.t())
    if axis.axis == x.dim() - 2:
        return torch.matmul(matrix, x)
    return torch.matmul(x.movedim(axis.axis, -1), matrix.t()).movedim(-1, axis.axis)


def _is_native(x: torch.Tensor, axes: Sequence[_Axis], sampling: _Sampling) -> bool:
    """Tell whether torch's own interpolation follows exactly the same rules."""
    mode = sampling.mode
    if (mode, x.dim()) not in _NATIVE_MODES or not all(axis.axis >= 2 for axis in axes):
        return False
    if mode == "nearest":
        return x.dtype.is_floating_point and all(
            axis.output % axis.size == 0
            and np.array_equal(
                _nearest_indices(axis, sampling),
                np.arange(axis.output) // (axis.output // axis.size),
            )
            for axis in axes
        )
    half_pixel = sampling.coordinates in ("half_pixel", "pytorch_half_pixel")
    return (
        (half_pixel or sampling.coordinates == "align_corners")
        and not sampling.antialias
        and (mode == "linear" or not sampling.exclude_outside)
        and (mode == "linear" or sampling.cubic == _TORCH_CUBIC_COEFFICIENT)
        and all(axis.output > 1 and axis.size * axis.scale == axis.output for axis in axes)
    )


def _interpolate(x: torch.Tensor, axes: Sequence[_Axis], sampling: _Sampling) -> torch.Tensor:
    sizes = list(x.shape[2:])
    for axis in axes:
        sizes[axis.axis - 2] = axis.output
    mode = _NATIVE_MODES[sampling.mode, x.dim()]
    corners = None if mode == "nearest" else sampling.coordinates == "align_corners"
    return functional.interpolate(x, sizes, mode=mode, align_corners=corners)


@lru_cache(maxsize=256)
def _nearest_indices(axis: _Axis, sampling: _Sampling) -> np.ndarray:
    source = _source(axis, sampling.coordinates)
    if sampling.nearest == "floor":
        rounded = np.floor(source)
    elif sampling.nearest == "ceil":
        rounded = np.ceil(source)
    elif sampling.nearest == "round_prefer_ceil":
        rounded = np.floor(source + 0.5)
    else:
        rounded = np.ceil(source - 0.5)
    indices: np.ndarray = np.clip(rounded, 0, axis.size - 1).astype(np.int64)
    return indices


def _source(axis: _Axis, coordinates: str) -> np.ndarray:
    """Return the input coordinate of each output position, ``[output] float64``."""
    position = np.arange(axis.output, dtype=np.float64)
    exact_output = axis.size * axis.scale
    last = axis.size - 1
    if coordinates == "asymmetric":
        return position / axis.scale
    if coordinates == "align_corners":
        return position * last / (exact_output - 1) if exact_output != 1 else position * 0.0
    if coordinates == "tf_crop_and_resize":
        if axis.output == 1:
            return position * 0.0 + 0.5 * (axis.start + axis.end) * last
        step = (axis.end - axis.start) * last / (axis.output - 1)
        return axis.start * last + position * step
    if coordinates == "tf_half_pixel_for_nn":  # of opsets 11 and 12; still written by some
        return (position + 0.5) / axis.scale
    source = (position + 0.5) / axis.scale - 0.5
    if coordinates == "half_pixel_symmetric":
        return source + axis.size / 2 * (1 - axis.output / exact_output)
    if coordinates == "pytorch_half_pixel" and axis.output == 1:
        return position * 0.0
    return source


@lru_cache(maxsize=64)
def _matrix(axis: _Axis, sampling: _Sampling) -> np.ndarray:
    """Return the interpolation along an axis, ``[output, size] float64``."""
    source = _source(axis, sampling.coordinates)
    stretch = min(axis.scale, 1.0) if sampling.antialias else 1.0
    reach = int(np.ceil((1 if sampling.mode == "linear" else 2) / stretch))
    neighbors = np.floor(source)[:, None] + np.arange(-reach, reach + 2)
    distance = np.abs(neighbors - source[:, None]) * stretch
    if sampling.mode == "linear":
        weights = np.clip(1 - distance, 0, 1)
    else:
        weights = _cubic(distance, sampling.cubic)
    if sampling.exclude_outside:
        weights = np.where((neighbors < 0) | (neighbors >= axis.size), 0.0, weights)
    if sampling.exclude_outside or sampling.antialias:
        total = weights.sum(axis=1, keepdims=True)
        weights = weights / np.where(total == 0, 1.0, total)
    columns = np.clip(neighbors, 0, axis.size - 1).astype(np.int64)
    matrix = np.zeros((axis.output, axis.size))
    np.add.at(matrix, (np.arange(axis.output)[:, None], columns), weights)
    return matrix


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel (1981, equation 15 with free coefficient ``a``)."""
    d = distance
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((d - 5) * d + 8) * d * a - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))
