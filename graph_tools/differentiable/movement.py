"""Resizing and data movement, axis by axis, in terms of operators that have gradients."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from graph_tools.differentiable.registry import NoGradientError, Site, Writer, rewrite
from graph_tools.equivalence import run_model
from graph_tools.opset import IR_VERSION, OPSET

__all__: list[str] = []


def _gather(write: Writer, x: str, axis: int, indices: np.ndarray) -> str:
    return write("Gather", x, indices.astype(np.int64), axis=axis)


def _repeat(write: Writer, x: str, shape: tuple[int, ...], axis: int, times: int) -> str:
    """Repeat every element; its gradient, a sum, is much quicker than that of Gather."""
    wide = (*shape[: axis + 1], times, *shape[axis + 1 :])
    spread = write("Expand", write("Unsqueeze", x, np.array([axis + 1])), np.array(wide))
    return write.reshape(spread, (*shape[:axis], shape[axis] * times, *shape[axis + 1 :]))


def _multiply(
    write: Writer, x: str, shape: tuple[int, ...], axis: int, matrix: np.ndarray
) -> str:
    """Apply ``matrix`` [out, in] along an axis of ``x``, which has ``shape``."""
    rank, (size_out, size_in) = len(shape), matrix.shape
    hot = matrix.argmax(1)
    if np.array_equal(matrix, np.eye(size_in)):
        return x
    if np.array_equal(matrix, np.eye(size_in)[hot]):
        times = size_out // size_in
        if np.array_equal(hot, np.repeat(np.arange(size_in), max(times, 1))):
            return _repeat(write, x, shape, axis, times)
        return _gather(write, x, axis, hot)
    matrix = matrix.astype(np.float32)
    if axis == rank - 1:
        return write("MatMul", x, np.ascontiguousarray(matrix.T))
    if axis == rank - 2:
        return write("MatMul", matrix, x)
    before, after = int(np.prod(shape[:axis])), int(np.prod(shape[axis + 1 :]))
    product = write("MatMul", matrix, write.reshape(x, (before, size_in, after)))
    return write.reshape(product, (*shape[:axis], size_out, *shape[axis + 1 :]))


@rewrite("Resize")
def _resize(site: Site, write: Writer) -> str:
    """One matrix an axis, read off onnxruntime's own Resize of the unit vectors."""
    mode = site.attribute("coordinate_transformation_mode", "half_pixel")
    policy = site.attribute("keep_aspect_ratio_policy", "stretch")
    if mode == "tf_crop_and_resize" or policy != "stretch":
        raise NoGradientError(f"Resize with {mode}, {policy}")
    value, shape = site.name(0), list(site.shape(site.name(0)))
    target = site.shape(site.node.output[0])
    scales, rank = site.value(2), len(shape)
    axes = [int(axis) % rank for axis in site.attribute("axes", range(rank))]
    given = dict(zip(axes, scales, strict=True)) if scales is not None and scales.size else {}
    for axis in range(rank):
        if target[axis] != shape[axis] or given.get(axis, 1) != 1:
            matrix = _resize_matrix(site.node, shape[axis], target[axis], given.get(axis))
            value = _multiply(write, value, tuple(shape), axis, matrix)
            shape[axis] = target[axis]
    return write("Identity", value)


def _resize_matrix(
    node: onnx.NodeProto, size_in: int, size_out: int, scale: float | None
) -> np.ndarray:
    """Return ``[out, in]``, what a Resize does along one axis."""
    attributes = [a for a in node.attribute if a.name != "axes"]
    if scale is None:
        how, values = ["", "", "sizes"], np.array([size_in, 1, size_out, 1], np.int64)
    else:
        how, values = ["", "scales"], np.array([1, 1, scale, 1], np.float32)
    alone = helper.make_node("Resize", ["x", *how], ["y"])
    alone.attribute.extend(attributes)
    graph = helper.make_graph(
        [alone],
        "resize",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [size_in, 1, size_in, 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(values, how[-1])],
    )
    opsets = [helper.make_opsetid("", OPSET)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    units = np.eye(size_in, dtype=np.float32).reshape(size_in, 1, size_in, 1)
    try:
        (rows,) = run_model(proto, {"x": units}, threads=1)
    except RuntimeError as error:
        raise NoGradientError("Resize of a kind that onnxruntime refuses") from error
    return rows.reshape(size_in, size_out).T


@rewrite("CumSum")
def _cum_sum(site: Site, write: Writer) -> str:
    shape = site.shape(site.name(0))
    axis = int(np.asarray(site.value(1)).reshape(())) % len(shape)
    exclusive, size = site.attribute("exclusive", 0), shape[axis]
    matrix = np.tri(size, k=-1 if exclusive else 0)
    if site.attribute("reverse", 0):
        matrix = matrix[::-1, ::-1]
    return write("Identity", _multiply(write, site.name(0), shape, axis, matrix))


@rewrite("Pad")
def _pad(site: Site, write: Writer) -> str | None:
    """Constant padding of all axes has a gradient; other modes gather."""
    mode, shape = site.attribute("mode", "constant"), site.shape(site.name(0))
    axes = site.value(3)
    if mode == "constant" and axes is None:
        return None
    pads, rank = np.asarray(site.value(1)), len(shape)
    padded = [int(a) % rank for a in (range(rank) if axes is None else axes)]
    begin, end = np.zeros(rank, np.int64), np.zeros(rank, np.int64)
    begin[padded], end[padded] = np.split(pads, 2)
    if mode == "constant":
        value = [site.name(2)] if site.name(2) else []
        return write("Pad", site.name(0), np.concatenate([begin, end]), *value)
    result = site.name(0)
    for axis in padded:
        if begin[axis] or end[axis]:
            result = _gather(
                write, result, axis, _padded(shape[axis], begin[axis], end[axis], mode)
            )
    return write("Identity", result)


def _padded(size: int, begin: int, end: int, mode: str) -> np.ndarray:
    """Return the positions that fill an axis; negative pads crop before the others fill."""
    kept = np.arange(max(-begin, 0), size - max(-end, 0))
    width = (max(begin, 0), max(end, 0))
    return np.asarray(np.pad(kept, width, mode=mode))  # type: ignore[call-overload]


@rewrite("Slice")
def _slice(site: Site, write: Writer) -> str | None:
    """Negative steps gather."""
    shape, steps = site.shape(site.name(0)), site.value(4)
    if steps is None or (steps > 0).all():
        return None
    starts, ends, axes = (site.value(index) for index in (1, 2, 3))
    assert starts is not None  # they are required by the operator
    assert ends is not None
    result = site.name(0)
    for i, axis in enumerate(range(len(starts)) if axes is None else axes):
        size = shape[axis]
        chosen = np.arange(size)[slice(*_bounds(starts[i], ends[i], steps[i], size))]
        result = _gather(write, result, int(axis) % len(shape), chosen)
    return result


def _bounds(start: int, end: int, step: int, size: int) -> tuple[int, int | None, int]:
    """Return Python's slice: a negative end beyond the front means all, in ONNX."""
    before_front = step < 0 and end < -size
    return int(max(start, -size)), None if before_front else int(end), int(step)


@rewrite("Split")
def _split(site: Site, write: Writer) -> str | None:
    """A gradient is joined from all parts: one of which nobody reads would be missing."""
    if all(name in site.traced for name in site.node.output):
        return None
    axis = site.attribute("axis", 0) % len(site.shape(site.name(0)))
    start = 0
    result = ""
    for name in site.node.output:
        end = start + site.shape(name)[axis]
        if name in site.traced:
            write("Slice", site.name(0), *(np.array([value]) for value in (start, end, axis)))
            result = write.nodes[-1].output[0] = name
        start = end
    return result


@rewrite("DepthToSpace")
def _depth_to_space(site: Site, write: Writer) -> str:
    n, c, h, w = site.shape(site.name(0))
    block = site.attribute("blocksize", 1)
    if site.attribute("mode", "DCR") == "DCR":
        parts, order = (n, block, block, c // block**2, h, w), [0, 3, 4, 1, 5, 2]
    else:
        parts, order = (n, c // block**2, block, block, h, w), [0, 1, 4, 2, 5, 3]
    moved = write("Transpose", write.reshape(site.name(0), parts), perm=order)
    return write.reshape(moved, (n, c // block**2, h * block, w * block))


@rewrite("SpaceToDepth")
def _space_to_depth(site: Site, write: Writer) -> str:
    n, c, h, w = site.shape(site.name(0))
    block = site.attribute("blocksize", 1)
    parts = (n, c, h // block, block, w // block, block)
    moved = write("Transpose", write.reshape(site.name(0), parts), perm=[0, 3, 5, 1, 2, 4])
    return write.reshape(moved, (n, c * block**2, h // block, w // block))
