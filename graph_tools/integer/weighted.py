"""Sums of products on integers: convolutions and matrix products.

Sums are taken in 64 bits; the caller checks them against the accumulator. The products of
matrices are torch's, in int64, as numpy's take forty times as long.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from graph_tools.integer.arithmetic import Fixed, Integers
from graph_tools.integer.windows import Windows

__all__ = ["convolve", "convolve_transposed", "matrix_product"]


def _product(first: Integers, second: Integers) -> Integers:
    a, b = (torch.from_numpy(np.array(x, order="C")) for x in (first, second))
    found: Integers = torch.matmul(a, b).numpy()
    return found


def _channel_exponent(weight: Fixed, axis: int, channels: int, rank: int) -> Integers:
    """The exponent of a weight that varies over ``axis`` alone, for [N, channels, ...]."""
    exponent = weight.exponent
    if exponent.ndim == 0:
        return exponent
    flat = exponent.reshape(-1)
    others = [size for index, size in enumerate(exponent.shape) if index != axis]
    if any(size != 1 for size in others):
        raise ValueError("the weight's scales vary over an axis that is summed")
    if flat.size != channels:  # a transposed convolution's groups share them
        flat = np.tile(flat, channels // flat.size)
    return flat.reshape(1, -1, *[1] * (rank - 2))


def _scalar(value: Fixed) -> Integers:
    if value.exponent.size != 1 or np.any(value.divisor != 1):
        raise ValueError("an input of sums has several scales")
    return value.exponent.reshape(())


def convolve(x: Fixed, weight: Fixed, *, windows: Windows, groups: int) -> Fixed:
    """Conv without bias: [N, C, ...] by [O, C / groups, ...].

    Raises:
        ValueError: the scales vary over what is summed.
    """
    channels, rank = weight.shape[0], x.mantissa.ndim
    exponent = _scalar(x) + _channel_exponent(weight, 0, channels, rank)
    padded = windows.padded(x.mantissa, 0)
    count, size = len(padded), windows.output_size(x.shape[2:])
    inner = weight.shape[1]
    kernel = weight.mantissa.reshape(groups, channels // groups, inner, -1)
    total = np.zeros((count, groups, channels // groups, int(np.prod(size))), np.int64)
    for index, part in enumerate(windows.positions(padded, size)):
        data = part.reshape(count, groups, inner, -1)
        column = kernel[..., index]
        if inner == 1:
            total += column[None] * data
        else:
            total += _product(column[None], data)
    return Fixed(mantissa=total.reshape(count, channels, *size), exponent=exponent)


def convolve_transposed(
    x: Fixed, weight: Fixed, *, windows: Windows, groups: int, output_padding: Sequence[int]
) -> Fixed:
    """ConvTranspose without bias: [N, C, ...] by [C, O / groups, ...].

    Raises:
        ValueError: the scales vary over what is summed.
    """
    outer, rank = weight.shape[1], x.mantissa.ndim
    exponent = _scalar(x) + _channel_exponent(weight, 1, groups * outer, rank)
    count, axes = len(x.mantissa), rank - 2
    full = [
        (size - 1) * stride + (kernel - 1) * dilation + 1 + extra
        for size, stride, kernel, dilation, extra in zip(
            x.shape[2:],
            windows.strides,
            windows.kernel,
            windows.dilations,
            output_padding,
            strict=True,
        )
    ]
    total = np.zeros((count, groups, outer, *full), np.int64)
    data = x.mantissa.reshape(count, groups, x.shape[1] // groups, -1)
    kernels = weight.mantissa.reshape(groups, x.shape[1] // groups, outer, -1)
    for index, offsets in enumerate(np.ndindex(*windows.kernel)):
        part = _product(np.moveaxis(kernels[..., index], 1, 2)[None], data)
        place: tuple[slice, ...] = tuple(
            slice(offset * dilation, offset * dilation + (size - 1) * stride + 1, stride)
            for offset, dilation, size, stride in zip(
                offsets, windows.dilations, x.shape[2:], windows.strides, strict=True
            )
        )
        total[(slice(None), slice(None), slice(None), *place)] += part.reshape(
            count, groups, outer, *x.shape[2:]
        )
    begins, ends = windows.pads[:axes], windows.pads[axes:]
    inside: tuple[slice, ...] = tuple(
        slice(b, size - e) for b, e, size in zip(begins, ends, full, strict=True)
    )
    cut = np.ascontiguousarray(total[(slice(None), slice(None), slice(None), *inside)])
    return Fixed(
        mantissa=cut.reshape(count, groups * outer, *cut.shape[3:]), exponent=exponent
    )


def matrix_product(first: Fixed, second: Fixed) -> Fixed:
    """MatMul of ONNX.

    Raises:
        ValueError: the scales vary over what is summed.
    """
    for value, axis in ((first, -1), (second, -2)):
        exponent = value.exponent
        varies = exponent.ndim > 1 and exponent.shape[axis] != 1
        if varies or np.any(value.divisor != 1):
            raise ValueError("the scales vary over an axis that is summed")
        if (
            exponent.ndim == 1
            and exponent.size != 1
            and (axis == -1 or value.mantissa.ndim == 1)
        ):
            raise ValueError("the scales vary over an axis that is summed")
    exponent = _drop_summed(first) + _drop_summed(second)
    return Fixed(mantissa=_product(first.mantissa, second.mantissa), exponent=exponent)


def _drop_summed(value: Fixed) -> Integers:
    return value.exponent.reshape(()) if value.exponent.size == 1 else value.exponent
