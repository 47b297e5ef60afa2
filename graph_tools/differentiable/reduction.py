"""Normalizations and reductions in terms of operators that have gradients."""

from __future__ import annotations

import numpy as np

from graph_tools.differentiable.registry import Site, Writer, rewrite

__all__: list[str] = []


@rewrite("BatchNormalization")
def _batch_norm(site: Site, write: Writer) -> str:
    """One factor and one summand per channel.

    The training build of onnxruntime takes every BatchNormalization for one in training mode.
    """
    scale, bias, mean, variance = (np.asarray(site.value(i), np.float64) for i in range(1, 5))
    factor = scale / np.sqrt(variance + site.attribute("epsilon", 1e-5))
    channels = (-1,) + (1,) * (len(site.shape(site.name(0))) - 2)
    scaled, shift = (
        values.astype(np.float32).reshape(channels)
        for values in (factor, bias - mean * factor)
    )
    return write("Add", write("Mul", site.name(0), scaled), shift)


def _normalized(write: Writer, x: str, axes: range, epsilon: float) -> str:
    """``(x - mean) / sqrt(variance + epsilon)`` over the axes."""
    over = np.array(axes, np.int64)
    centered = write("Sub", x, write("ReduceMean", x, over))
    variance = write("ReduceMean", write("Mul", centered, centered), over)
    return write("Div", centered, write("Sqrt", write("Add", variance, epsilon)))


@rewrite("InstanceNormalization", "GroupNormalization")
def _group_norm(site: Site, write: Writer) -> str:
    shape = site.shape(site.name(0))
    groups = site.attribute("num_groups", shape[1])
    rows = write.reshape(site.name(0), (shape[0], groups, -1))
    rows = _normalized(write, rows, range(2, 3), site.attribute("epsilon", 1e-5))
    channels = (-1,) + (1,) * (len(shape) - 2)
    scale, bias = (write.reshape(site.name(index), channels) for index in (1, 2))
    return write("Add", write("Mul", write.reshape(rows, shape), scale), bias)


@rewrite("LayerNormalization")
def _layer_norm(site: Site, write: Writer) -> str:
    rank = len(site.shape(site.name(0)))
    axes = range(site.attribute("axis", -1) % rank, rank)
    value = _normalized(write, site.name(0), axes, site.attribute("epsilon", 1e-5))
    value = write("Mul", value, site.name(1))
    return write("Add", value, site.name(2)) if site.name(2) else value


@rewrite("LRN")
def _lrn(site: Site, write: Writer) -> str:
    """The sum over neighboring channels is a product with a band matrix."""
    shape, size = site.shape(site.name(0)), site.attribute("size", 0)
    offset = np.subtract.outer(*[np.arange(shape[1])] * 2)  # row - column
    band = (offset <= (size - 1) // 2) & (-offset <= size // 2)
    squares = write.reshape(write("Mul", site.name(0), site.name(0)), (*shape[:2], -1))
    sums = write.reshape(write("MatMul", band.astype(np.float32), squares), shape)
    scaled = write("Mul", sums, site.attribute("alpha", 1e-4) / size)
    power = write(
        "Pow",
        write("Add", scaled, site.attribute("bias", 1.0)),
        site.attribute("beta", 0.75),
    )
    return write("Div", site.name(0), power)


_BEFORE = {"ReduceL1": "Abs", "ReduceSumSquare": "Mul", "ReduceL2": "Mul"}
_AFTER = {"ReduceLogSum": "Log", "ReduceL2": "Sqrt"}
_WITH_GRADIENT = ("ReduceMean", "ReduceSum", "ReduceL2", "ReduceLogSumExp")


@rewrite(*_WITH_GRADIENT, "ReduceL1", "ReduceLogSum", "ReduceSumSquare")
def _reduce(site: Site, write: Writer) -> str | None:
    """Function of the elements, sum, function of the sum."""
    op, axes = site.node.op_type, site.value(1)
    over_all = axes is None or not axes.size
    does_nothing = over_all and site.attribute("noop_with_empty_axes", 0)
    if op in _WITH_GRADIENT and not does_nothing:
        if not over_all or site.attribute("keepdims", 1):
            return None
        # without axes and dimensions their gradients fail, or not: all are named
        every = np.arange(len(site.shape(site.name(0))))
        return write(op, site.name(0), every, keepdims=0)
    value = site.name(0)
    if op in _BEFORE:
        value = write(_BEFORE[op], *([value] * (2 if _BEFORE[op] == "Mul" else 1)))
    if not does_nothing:
        kept = site.attribute("keepdims", 1)
        given = [] if axes is None else [axes]
        value = write("ReduceSum", value, *given, keepdims=kept)
    return write(_AFTER[op], value) if op in _AFTER else write("Identity", value)


@rewrite("ReduceMax", "ReduceMin")
def _reduce_max(site: Site, write: Writer) -> str:
    """A MaxPool over all that is reduced, of the negative for the minimum."""
    shape, axes = site.shape(site.name(0)), site.value(1)
    rank, sign = len(shape), site.node.op_type == "ReduceMin"
    if axes is not None and axes.size:
        reduced = sorted({int(axis) % rank for axis in axes.reshape(-1)})
    else:
        reduced = [] if site.attribute("noop_with_empty_axes", 0) else list(range(rank))
    if not reduced:
        return write("Identity", site.name(0))
    value = write("Neg", site.name(0)) if sign else site.name(0)
    order = [axis for axis in range(rank) if axis not in reduced] + reduced
    if order != list(range(rank)):
        value = write("Transpose", value, perm=order)
    size = int(np.prod([shape[axis] for axis in reduced]))
    rows = write.reshape(value, (-1, 1, size))
    pooled = write("MaxPool", rows, kernel_shape=[size])
    value = write.reshape(pooled, site.shape(site.node.output[0]))
    return write("Neg", value) if sign else value
