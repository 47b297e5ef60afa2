"""Operators that only move elements, on integers of any meaning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import NodeProto

from graph_tools.quantized_graph import attribute

__all__ = ["MOVES", "Move"]

Array = npt.NDArray[Any]
Move = Callable[[Array], Array]
_Constants = Sequence[
    "Array | None"
]  # of the inputs behind the data; None where one is absent


def _get(constants: _Constants, index: int) -> Array | None:
    return constants[index] if index < len(constants) else None


def _list(values: Array | None, default: Sequence[int] | None = None) -> list[int] | None:
    if values is None:
        return None if default is None else list(default)
    return [int(value) for value in np.reshape(values, -1)]


def _reshape(node: NodeProto, constants: _Constants) -> list[Move]:
    target = _list(constants[0]) or []
    zero_is_zero = attribute(node, "allowzero", 0)

    def move(x: Array) -> Array:
        shape = [
            x.shape[i] if dim == 0 and not zero_is_zero else dim
            for i, dim in enumerate(target)
        ]
        return x.reshape(shape)

    return [move]


def _flatten(node: NodeProto, constants: _Constants) -> list[Move]:
    axis = attribute(node, "axis", 1)
    return [lambda x: x.reshape(int(np.prod(x.shape[:axis])), -1)]


def _transpose(node: NodeProto, constants: _Constants) -> list[Move]:
    order = attribute(node, "perm")
    return [lambda x: np.ascontiguousarray(np.transpose(x, order))]


def _squeeze(node: NodeProto, constants: _Constants) -> list[Move]:
    axes = _list(_get(constants, 0))
    return [lambda x: np.squeeze(x, None if axes is None else tuple(axes))]


def _unsqueeze(node: NodeProto, constants: _Constants) -> list[Move]:
    axes = _list(constants[0]) or []
    return [lambda x: np.expand_dims(x, tuple(axes))]


def _slice(node: NodeProto, constants: _Constants) -> list[Move]:
    starts, ends = _list(constants[0]) or [], _list(constants[1]) or []
    axes = _list(_get(constants, 2), range(len(starts))) or []
    steps = _list(_get(constants, 3), [1] * len(starts)) or []

    def move(x: Array) -> Array:
        place = [slice(None)] * x.ndim
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
            size = x.shape[axis]
            # Beyond the beginning is no index from the end, as it would be in Python.
            first = start + size if start < 0 else start
            last: int | None = end + size if end < 0 else end
            if step > 0:
                first, last = max(first, 0), max(last or 0, 0)
            else:
                first = min(first, size - 1)
                last = None if last is not None and last < 0 else last
            place[axis] = slice(first, last, step)
        return np.ascontiguousarray(x[tuple(place)])

    return [move]


def _split(node: NodeProto, constants: _Constants) -> list[Move]:
    axis, count = attribute(node, "axis", 0), len(node.output)
    sizes = _list(_get(constants, 0))

    def part(index: int) -> Move:
        def move(x: Array) -> Array:
            whole = x.shape[axis]
            even = -(-whole // count)
            widths = sizes or [min(even, whole - even * i) for i in range(count)]
            begin = sum(widths[:index])
            place = np.arange(begin, begin + widths[index])
            return np.take(x, place, axis=axis)

        return move

    return [part(index) for index in range(count)]


def _gather(node: NodeProto, constants: _Constants) -> list[Move]:
    axis = attribute(node, "axis", 0)
    place = np.asarray(constants[0], np.int64)
    return [lambda x: np.take(x, place, axis=axis)]


def _expand(node: NodeProto, constants: _Constants) -> list[Move]:
    target = _list(constants[0]) or []
    return [
        lambda x: np.ascontiguousarray(
            np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(target)))
        )
    ]


def _tile(node: NodeProto, constants: _Constants) -> list[Move]:
    times = _list(constants[0]) or []
    return [lambda x: np.tile(x, times)]


def _depth_to_space(node: NodeProto, constants: _Constants) -> list[Move]:
    block, mode = attribute(node, "blocksize"), attribute(node, "mode", b"DCR")

    def move(x: Array) -> Array:
        n, c, h, w = x.shape
        if mode == b"DCR":
            split = x.reshape(n, block, block, c // block**2, h, w).transpose(0, 3, 4, 1, 5, 2)
        else:
            split = x.reshape(n, c // block**2, block, block, h, w).transpose(0, 1, 4, 2, 5, 3)
        return split.reshape(n, c // block**2, h * block, w * block)

    return [move]


def _space_to_depth(node: NodeProto, constants: _Constants) -> list[Move]:
    block = attribute(node, "blocksize")

    def move(x: Array) -> Array:
        n, c, h, w = x.shape
        split = x.reshape(n, c, h // block, block, w // block, block)
        return split.transpose(0, 3, 5, 1, 2, 4).reshape(
            n, c * block**2, h // block, w // block
        )

    return [move]


def _pad(node: NodeProto, constants: _Constants) -> list[Move]:
    mode = attribute(node, "mode", b"constant").decode()
    filler = _get(constants, 1)
    if filler is not None and np.any(filler):
        raise ValueError("a Pad with something else than zeros")
    pads = _list(constants[0]) or []
    axes = _list(_get(constants, 2))
    name = {"constant": "constant", "edge": "edge", "reflect": "reflect", "wrap": "wrap"}[mode]

    def move(x: Array) -> Array:
        widths = [(0, 0)] * x.ndim
        half = len(pads) // 2
        for index, axis in enumerate(axes if axes is not None else range(half)):
            widths[axis] = (pads[index], pads[index + half])
        cut = tuple(
            slice(max(0, -b), size - max(0, -e))
            for (b, e), size in zip(widths, x.shape, strict=True)
        )
        grown = [(max(0, b), max(0, e)) for b, e in widths]
        return np.pad(x[cut], grown, mode=name)  # type: ignore[call-overload,no-any-return]

    return [move]


def _resize(node: NodeProto, constants: _Constants) -> list[Move]:
    if attribute(node, "mode", b"nearest") != b"nearest":
        raise ValueError("a Resize that interpolates")
    transformation = attribute(node, "coordinate_transformation_mode", b"half_pixel").decode()
    rounding = attribute(node, "nearest_mode", b"round_prefer_floor").decode()
    axes = attribute(node, "axes")
    scales, sizes = _get(constants, 1), _list(_get(constants, 2))
    if attribute(node, "keep_aspect_ratio_policy", b"stretch") != b"stretch":
        raise ValueError("a Resize that keeps the aspect ratio")

    def move(x: Array) -> Array:
        for index, axis in enumerate(axes if axes is not None else range(x.ndim)):
            size = x.shape[axis]
            if sizes:
                new = sizes[index]
                scale = np.float32(new / size)
            else:
                scale = np.float32(np.reshape(scales, -1)[index])  # type: ignore[arg-type]
                new = int(np.floor(np.float32(size) * scale))
            if new != size or scale != 1:
                place = _nearest(new, size, scale, transformation, rounding)
                x = np.take(x, place, axis=axis)
        return x

    return [move]


def _nearest(
    new: int, size: int, scale: np.float32, transformation: str, rounding: str
) -> Array:
    """Where each element of a resized axis comes from; positions are float32, as in ONNX."""
    index = np.arange(new, dtype=np.float32)
    half = np.float32(0.5)
    if transformation == "asymmetric":
        at = index / scale
    elif transformation in {"half_pixel", "pytorch_half_pixel"}:
        single = transformation == "pytorch_half_pixel" and new == 1
        at = np.zeros_like(index) if single else (index + half) / scale - half
    elif transformation == "align_corners":
        at = index * np.float32(size - 1) / np.float32(max(new - 1, 1))
    else:
        raise ValueError(f"a Resize by {transformation}")
    rounded: Array
    if rounding in {"floor", "round_prefer_ceil"}:
        rounded = np.floor(at if rounding == "floor" else at + half)
    elif rounding in {"ceil", "round_prefer_floor"}:
        rounded = np.ceil(at if rounding == "ceil" else at - half)
    else:
        raise ValueError(f"a Resize that rounds by {rounding}")
    return np.asarray(np.clip(rounded, 0, size - 1), np.int64)


def _identity(node: NodeProto, constants: _Constants) -> list[Move]:
    return [lambda x: x]


MOVES: dict[str, Callable[[NodeProto, _Constants], list[Move]]] = {
    "DepthToSpace": _depth_to_space,
    "Dropout": _identity,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Identity": _identity,
    "Pad": _pad,
    "Reshape": _reshape,
    "Resize": _resize,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
"""For each operator: from a node and the constants behind its data, one `Move` an output.

Raises:
    ValueError: what this node does is no movement.
"""
