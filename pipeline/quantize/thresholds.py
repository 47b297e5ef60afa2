"""The power-of-two threshold search.

HPTQ (arXiv 2109.09113) section 3.2: candidates are
``2**ceil(log2 max|x|)`` times 2, 1, 1/2, ..., the one with the smallest error wins, the larger on
ties. Errors are computed on histograms (activations) or on the values (weights). For comparison
there is a search without that constraint, for weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from graph_tools.quantizer import TensorQuantizer

__all__ = [
    "FLOOR",
    "Metric",
    "activation_exponent",
    "ceil_log2",
    "rounded_weight",
    "squared_error",
    "weight_exponents",
    "weight_scales",
    "without_outliers",
]

Metric = Literal["mse", "mae", "kl", "no-clipping"]
Array = np.ndarray[Any, np.dtype[Any]]

FLOOR = 2.0**-16
"""Smallest magnitude that a threshold is chosen for (an all-zero tensor has this one)."""

_ACTIVATION_CANDIDATES = 20
_WEIGHT_CANDIDATES = 10
_FREE_CANDIDATES = np.linspace(1.1, 0.1, 101)  # of the smallest scale that clips nothing
_REFINEMENTS = 4
_CHUNK = 2**22  # weights searched at once


def ceil_log2(value: float) -> int:
    """``ceil(log2(value))``, exact at powers of two."""
    mantissa, exponent = math.frexp(value)
    return exponent - 1 if mantissa == 0.5 else exponent


def _integer_range(bits: int, signed: bool, lifted: bool) -> tuple[int, int]:
    quantizer = TensorQuantizer(bits=bits, signed=signed, exponent=0, lifted=lifted)
    return quantizer.qmin, quantizer.qmax


def _quantized(
    values: Array, scale: float | Array, bits: int, signed: bool, lifted: bool
) -> Array:
    """Values after quantization; ``scale`` broadcasts."""
    return np.clip(np.rint(values / scale), *_integer_range(bits, signed, lifted)) * scale


def _largest_exponent(low: float, high: float, bits: int, signed: bool, lifted: bool) -> int:
    """Exponent of the smallest scale that clips nothing."""
    bottom, top = _integer_range(bits, signed, lifted)
    magnitude = max(high / top, low / bottom if signed else 0.0)
    return ceil_log2(max(magnitude, FLOOR / 2 ** (bits - signed)))


def without_outliers(centers: Array, counts: Array, z: float) -> Array:
    """The counts of a histogram, zero in bins further than ``z`` standard deviations off the mean.

    HPTQ (arXiv 2109.09113), outlier removal. The range that the threshold search starts from
    shrinks with it.

    Args:
        centers: [bins] bin centers.
        counts: [bins] how many values fell in each.
        z: at least 1, so that something is left; 0 changes nothing.
    """
    total = float(counts.sum())
    if z == 0.0 or total == 0.0:
        return counts
    mean = float(np.dot(centers, counts)) / total
    deviation = math.sqrt(float(np.dot((centers - mean) ** 2, counts)) / total)
    far = np.abs(centers - mean) > z * deviation
    if deviation <= 1e-12 * abs(mean):  # all in one bin: the rest is rounding
        return counts
    return np.where(far, 0.0, counts)


def activation_exponent(
    centers: Array,
    counts: Array,
    *,
    bits: int,
    signed: bool,
    metric: Metric = "mse",
    lifted: bool = False,
) -> int:
    """Scale exponent of one tensor from its histogram.

    Args:
        centers: [bins] bin centers, ascending.
        counts: [bins] how many values fell in each.
        bits: width of the integers.
        signed: whether the quantizer has negative integers.
        metric: error to minimize; ``no-clipping`` takes the smallest scale that clips nothing.
        lifted: see `TensorQuantizer`.
    """
    used = np.flatnonzero(counts)
    if used.size == 0:
        return ceil_log2(FLOOR) - (bits - signed)
    low, high = float(centers[used[0]]), float(centers[used[-1]])
    start = _largest_exponent(low, high, bits, signed, lifted)
    if metric == "no-clipping":
        return start
    centers, weights = centers[used].astype(np.float64), counts[used].astype(np.float64)
    best, best_error = start, math.inf
    widest = (
        start if metric == "kl" else start + 1
    )  # merged levels cost smooth densities no KL
    for exponent in range(widest, widest - _ACTIVATION_CANDIDATES, -1):
        if metric == "kl":
            error = _kl_divergence(weights, centers, exponent, bits, signed, lifted)
        else:
            quantized = _quantized(centers, 2.0**exponent, bits, signed, lifted)
            power = 2 if metric == "mse" else 1
            error = float(np.dot(weights, np.abs(quantized - centers) ** power))
        if error < best_error:
            best, best_error = exponent, error
    return best


def squared_error(
    centers: Array, counts: Array, *, exponent: int, bits: int, signed: bool
) -> float:
    """Sum of the squared errors that a quantizer makes on a histogram."""
    quantized = _quantized(centers, 2.0**exponent, bits, signed, lifted=False)
    return float(np.dot(counts, (quantized - centers) ** 2))


def _kl_divergence(
    counts: Array, centers: Array, exponent: int, bits: int, signed: bool, lifted: bool
) -> float:
    """KL(P || Q) of one candidate, as entropy calibration defines it.

    P: the bins inside the range, saturated values added to the outermost; Q: the same bins
    without those, each level's mass spread evenly over the non-empty bins that fall on it.
    """
    low, high = _integer_range(bits, signed, lifted)
    levels = np.rint(centers / 2.0**exponent)
    inside = (levels >= low) & (levels <= high)
    if inside.sum() < high - low + 1:  # fewer bins than levels say nothing
        return math.inf
    p = counts[inside].copy()
    _, inverse = np.unique(levels[inside], return_inverse=True)
    q = (np.bincount(inverse, weights=p) / np.bincount(inverse))[inverse]
    p[0] += counts[levels < low].sum()
    p[-1] += counts[levels > high].sum()
    p, q = p / p.sum(), q / q.sum()
    return float(np.sum(p * np.log(p / q)))


def weight_exponents(
    weight: Array, *, axis: int, bits: int, metric: Metric = "mse", lifted: bool = False
) -> tuple[int, ...]:
    """Scale exponent of each output channel of a weight.

    Args:
        weight: any rank, float.
        axis: its output-channel axis.
        bits: width of the (signed) integers.
        metric: ``mse``, ``mae`` or ``no-clipping``; ``kl`` is for histograms, and weights take
            ``mse`` instead.
        lifted: see `TensorQuantizer`.
    """
    return tuple(
        exponent
        for rows in _row_chunks(weight, axis)
        for exponent in _row_exponents(rows, bits, metric, lifted)
    )


def rounded_weight(
    weight: Array, *, axis: int, bits: int, metric: Metric = "mse", lifted: bool = False
) -> Array:
    """The weight on the grid of the power-of-two scales that `weight_exponents` gives it."""
    exponents = weight_exponents(weight, axis=axis, bits=bits, metric=metric, lifted=lifted)
    shape = [1] * weight.ndim
    shape[axis] = -1
    scale = np.exp2(np.asarray(exponents, np.float64)).reshape(shape)
    return _quantized(weight, scale, bits, True, lifted)


def weight_scales(
    weight: Array, *, axis: int, bits: int, metric: Metric = "mse", lifted: bool = False
) -> tuple[float, ...]:
    """Free scale of each output channel of a weight, in float32: any number, not powers of two.

    The best of 101 candidates, refined by least squares: for given integers q the scale with the
    smallest squared error is ``<w, q> / <q, q>``.

    Args:
        weight: any rank, float.
        axis: its output-channel axis.
        bits: width of the (signed) integers.
        metric: as in `weight_exponents`.
        lifted: likewise.
    """
    return tuple(
        float(np.float32(scale))
        for rows in _row_chunks(weight, axis)
        for scale in _row_scales(rows, bits, metric, lifted)
    )


def _row_chunks(weight: Array, axis: int) -> Iterator[Array]:
    """Output channels as rows of float64, some at a time."""
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    step = max(1, _CHUNK // max(1, rows.shape[1]))
    for first in range(0, len(rows), step):
        yield np.asarray(rows[first : first + step], np.float64)


def _row_scales(rows: Array, bits: int, metric: Metric, lifted: bool) -> Array:
    """Free scale of each row of a matrix."""
    bottom, top = _integer_range(bits, True, lifted)
    least = FLOOR / 2 ** (bits - 1)
    high, low = rows.max(axis=1, initial=0.0), rows.min(axis=1, initial=0.0)
    start: Array = np.maximum(np.maximum(high / top, low / bottom), least)
    if metric == "no-clipping":
        return start
    power = 1 if metric == "mae" else 2
    best, best_error = start.copy(), np.full(len(rows), np.inf)

    def consider(scales: Array) -> None:
        nonlocal best, best_error
        quantized = _quantized(rows, scales[:, None], bits, True, lifted)
        error = (np.abs(quantized - rows) ** power).sum(axis=1)
        better = error < best_error
        best, best_error = np.where(better, scales, best), np.minimum(error, best_error)

    for factor in _FREE_CANDIDATES:
        consider(np.maximum(start * factor, least))
    for _ in range(_REFINEMENTS if power == 2 else 0):
        integers = np.clip(np.rint(rows / best[:, None]), bottom, top)
        square = (integers**2).sum(axis=1)
        fitted = (rows * integers).sum(axis=1) / np.maximum(square, 1)
        consider(np.where(square > 0, np.maximum(fitted, least), best))
    return best


def _row_exponents(rows: Array, bits: int, metric: Metric, lifted: bool) -> tuple[int, ...]:
    """Scale exponent of each row of a matrix."""
    start = np.array(
        [_largest_exponent(float(r.min()), float(r.max()), bits, True, lifted) for r in rows],
        np.int64,
    )
    if metric == "no-clipping":
        return tuple(int(exponent) for exponent in start)
    power = 1 if metric == "mae" else 2
    best, best_error = start.copy(), np.full(len(rows), np.inf)
    floor = ceil_log2(FLOOR) - (bits - 1)
    for step in range(-1, _WEIGHT_CANDIDATES - 1):
        exponents = np.maximum(start - step, floor)
        scale = np.exp2(exponents.astype(np.float64))[:, None]
        quantized = _quantized(rows, scale, bits, True, lifted)
        error = (np.abs(quantized - rows) ** power).sum(axis=1)
        better = error < best_error
        best, best_error = np.where(better, exponents, best), np.minimum(error, best_error)
    return tuple(int(exponent) for exponent in best)
