"""Sums of products on integers: convolutions and matrix products.

Sums are exact, and the caller checks them against the accumulator. They are taken by torch's matrix
products, in the smallest type that holds every partial sum of the worst case: float32 up to 2**24
and float64 up to 2**53 hold all integers, so that nothing is rounded there in any order of summing;
int64 beyond.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from graph_tools.integer.arithmetic import Fixed, Integers
from graph_tools.integer.windows import Windows

__all__ = ["convolve", "convolve_transposed", "matrix_product"]


def _magnitude(values: Integers) -> int:
    return max(int(values.max(initial=0)), -int(values.min(initial=0)))


def _exact_type(largest: int) -> torch.dtype:
    """The fastest type that holds all integers up to ``largest``."""
    if largest <= 2**24:
        return torch.float32
    return torch.float64 if largest <= 2**53 else torch.int64


def _tensor(values: Integers, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(np.require(values, requirements=["C", "W"])).to(dtype)


def _integers(values: torch.Tensor) -> Integers:
    found: Integers = values.to(torch.int64).numpy()
    return found


def _largest_sum(x: Integers, weight: Integers, axis: int | tuple[int, ...]) -> int:
    """Largest magnitude of any partial sum; ``axis``: those of the weight that are summed."""
    return _magnitude(x) * int(np.abs(weight).sum(axis=axis).max(initial=0))


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
    largest = _largest_sum(x.mantissa, weight.mantissa, tuple(range(1, weight.mantissa.ndim)))
    dtype = _exact_type(largest)
    padded = _tensor(windows.padded(x.mantissa, 0), dtype)
    size = windows.output_size(x.shape[2:])
    inner = weight.shape[1]
    kernel = _tensor(weight.mantissa, dtype).reshape(groups, channels // groups, inner, -1)
    total = torch.zeros(
        (len(padded), groups, channels // groups, int(np.prod(size))), dtype=dtype
    )
    for image, result in zip(padded, total, strict=True):
        places = [part.reshape(groups, inner, -1) for part in windows.positions(image, size)]
        if inner == 1:
            for index, data in enumerate(places):
                result.addcmul_(kernel[..., index], data)
        else:
            columns = torch.stack(places, dim=2).reshape(groups, -1, result.shape[-1])
            torch.matmul(kernel.reshape(groups, channels // groups, -1), columns, out=result)
    return Fixed(mantissa=_integers(total).reshape(-1, channels, *size), exponent=exponent)


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
    dtype = _exact_type(_largest_sum(x.mantissa, weight.mantissa, 0))
    data = _tensor(x.mantissa, dtype).reshape(count, groups, x.shape[1] // groups, -1)
    kernels = _tensor(weight.mantissa, dtype).reshape(groups, x.shape[1] // groups, outer, -1)
    for index, offsets in enumerate(np.ndindex(*windows.kernel)):
        part = _integers(torch.matmul(kernels[..., index].transpose(1, 2)[None], data))
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
    dtype = _exact_type(
        _largest_sum(first.mantissa, second.mantissa, -2 % second.mantissa.ndim)
    )
    a, b = (_tensor(value.mantissa, dtype) for value in (first, second))
    return Fixed(mantissa=_integers(torch.matmul(a, b)), exponent=exponent)


def _drop_summed(value: Fixed) -> Integers:
    return value.exponent.reshape(()) if value.exponent.size == 1 else value.exponent
