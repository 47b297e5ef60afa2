"""Windows that slide over the axes behind batch and channels, and what pooling does in them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from onnx import NodeProto

from graph_tools.integer.arithmetic import Fixed, Integers
from graph_tools.quantized_graph import attribute

__all__ = ["Windows", "average_pool", "max_pool", "mean", "read_windows"]

_Array = TypeVar("_Array", Integers, torch.Tensor)

_LEAST = np.iinfo(np.int64).min


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Kernel sizes, strides, dilations and pads (begins, then ends), an entry an axis."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    ceil: bool = False

    def output_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """How many windows there are along each axis of an input of ``size``."""
        axes = len(self.kernel)
        found = []
        for axis, length in enumerate(size):
            reach = (self.kernel[axis] - 1) * self.dilations[axis] + 1
            begin, end = self.pads[axis], self.pads[axes + axis]
            free, stride = length + begin + end - reach, self.strides[axis]
            count = (-(-free // stride) if self.ceil else free // stride) + 1
            if self.ceil and (count - 1) * stride >= length + begin:
                count -= 1  # a window that starts in the padding at the end is none
            found.append(count)
        return tuple(found)

    def padded(self, values: Integers, filler: int) -> Integers:
        """``values`` with ``filler`` around them, far enough for the last window."""
        axes = len(self.kernel)
        size = self.output_size(values.shape[2:])
        widths = [(0, 0), (0, 0)]
        for axis, length in enumerate(values.shape[2:]):
            reach = (self.kernel[axis] - 1) * self.dilations[axis] + 1
            needed = (size[axis] - 1) * self.strides[axis] + reach
            begin = self.pads[axis]
            end = max(self.pads[axes + axis], needed - begin - length)
            widths.append((begin, end))
        if not any(map(any, widths)):
            return values
        return np.pad(values, widths, constant_values=filler)

    def positions(self, padded: _Array, size: Sequence[int]) -> Iterator[_Array]:
        """For each place in the kernel, the elements under it in every window.

        Args:
            padded: [..., height, width], numpy or torch; spatial axes last.
            size: of the output's spatial axes.
        """
        for offsets in itertools.product(*map(range, self.kernel)):
            place: tuple[slice, ...] = tuple(
                slice(first := offset * dilation, first + (count - 1) * stride + 1, stride)
                for offset, dilation, count, stride in zip(
                    offsets, self.dilations, size, self.strides, strict=True
                )
            )
            yield padded[(*(slice(None),) * (padded.ndim - len(place)), *place)]


def read_windows(
    node: NodeProto, size: Sequence[int], kernel: Sequence[int] | None = None
) -> Windows:
    """The windows of a Conv or pooling node over an input of ``size``."""
    axes = len(size)
    kernel = tuple(attribute(node, "kernel_shape", kernel))
    windows = Windows(
        kernel=kernel,
        strides=tuple(attribute(node, "strides", [1] * axes)),
        dilations=tuple(attribute(node, "dilations", [1] * axes)),
        pads=tuple(attribute(node, "pads", [0] * 2 * axes)),
        ceil=bool(attribute(node, "ceil_mode", 0)),
    )
    auto = attribute(node, "auto_pad", b"NOTSET").decode()
    if auto.startswith("SAME"):
        begins, ends = [], []
        for axis, length in enumerate(size):
            reach = (kernel[axis] - 1) * windows.dilations[axis] + 1
            stride = windows.strides[axis]
            total = max(0, (-(-length // stride) - 1) * stride + reach - length)
            small, large = total // 2, total - total // 2
            begins.append(small if auto == "SAME_UPPER" else large)
            ends.append(large if auto == "SAME_UPPER" else small)
        return replace(windows, pads=(*begins, *ends))
    return replace(windows, pads=(0,) * 2 * axes) if auto == "VALID" else windows


def max_pool(x: Fixed, windows: Windows) -> Fixed:
    """MaxPool; outside there is nothing."""

    def move(values: Integers) -> Integers:
        size = windows.output_size(values.shape[2:])
        result: Integers | None = None
        for part in windows.positions(windows.padded(values, _LEAST), size):
            result = part.copy() if result is None else np.maximum(result, part, out=result)
        return values if result is None else result

    if (x.exponent.ndim and x.exponent.size != 1) or x.divisor.size != 1:
        raise ValueError("the scales vary over what is compared")
    return replace(x, mantissa=move(x.mantissa))


def average_pool(x: Fixed, windows: Windows, *, count_pads: bool) -> Fixed:
    """AveragePool: the sum over its window, with the number of elements as divisor."""
    if x.exponent.size != 1 or x.divisor.size != 1:
        raise ValueError("the scales vary over what is summed")
    size = windows.output_size(x.shape[2:])
    total = np.zeros((*x.shape[:2], *size), np.int64)
    for part in windows.positions(windows.padded(x.mantissa, 0), size):
        total += part
    count = np.zeros((1, 1, *size), np.int64)
    inside = np.ones((1, 1, *x.shape[2:]), np.int64)
    if count_pads:  # what ceil_mode adds behind the pads does not count
        axes = len(windows.kernel)
        pads = windows.pads
        inside = np.pad(
            inside,
            [(0, 0), (0, 0), *[(pads[a], pads[a + axes]) for a in range(axes)]],
            constant_values=1,
        )
        bare = replace(windows, pads=(0,) * 2 * axes)
        for part in windows.positions(_grown(inside, bare, size), size):
            count += part
    else:
        for part in windows.positions(windows.padded(inside, 0), size):
            count += part
    return Fixed(
        mantissa=total, exponent=x.exponent.reshape(()), divisor=x.divisor.reshape(()) * count
    )


def _grown(inside: Integers, windows: Windows, size: Sequence[int]) -> Integers:
    widths = [(0, 0), (0, 0)]
    for axis, length in enumerate(inside.shape[2:]):
        reach = (windows.kernel[axis] - 1) * windows.dilations[axis] + 1
        needed = (size[axis] - 1) * windows.strides[axis] + reach
        widths.append((0, max(0, needed - length)))
    return np.pad(inside, widths)


def mean(x: Fixed, axes: Sequence[int], *, keep: bool, divide: bool = True) -> Fixed:
    """ReduceMean, ReduceSum and GlobalAveragePool: the sum, with the number as divisor."""
    if x.exponent.size != 1 or x.divisor.size != 1:
        raise ValueError("the scales vary over what is summed")
    count = int(np.prod([x.shape[axis] for axis in axes])) if divide else 1
    return Fixed(
        mantissa=x.mantissa.sum(axis=tuple(axes), keepdims=keep, dtype=np.int64),
        exponent=x.exponent.reshape(()),
        divisor=x.divisor.reshape(()) * count,
    )
