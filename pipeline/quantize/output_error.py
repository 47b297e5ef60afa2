"""Scales of weights by the error of what the operator computes, not by that of the weights.

Rounding the weights ``w`` of one output channel to ``w + d`` changes what it computes from a window
``x`` of the input by ``<d, x>``: by ``d' H d`` on average of squares, with the windows' second
moments ``H``. What learned rounding can make of that is estimated without gradients: weight after
weight is rounded up or down so as to make up for those before it (OPTQ, arXiv 2210.17323,
section 3); then single ones are turned for as long as that helps. Rounded to nearest instead,
correlated inputs would speak for scales that are worse than those that suit the weights.

Of some scales around the one that suits the weights (HPTQ, arXiv 2109.09113, section 3.2) the one
with the smallest error wins, channel by channel. Where biases are learned, too, a mean error costs
nothing, and ``H`` is a covariance.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from graph_tools.quantizer import QuantizedConstant, TensorQuantizer
from graph_tools.torch_graph import Step, TorchGraph
from pipeline.quantize.placement import Weighted

__all__ = ["MOST_BITS", "fit_scales"]

Array = np.ndarray[Any, np.dtype[Any]]

MOST_BITS = 2
"""Of wider weights the estimate is not good enough: nothing is gained at 3 bits, and MobileNetV1
loses three points at 4."""

_OPERATORS = frozenset(("Conv", "Gemm", "MatMul"))
_LARGEST = 5000  # weights of an output channel; beyond, H would not fit
_WINDOWS = 2**15  # that H is taken from, or four for each weight
_ELEMENTS = 2**24  # of windows in memory at a time
_DAMPING = 0.01  # of the mean second moment, so that H has an inverse (OPTQ)
_COLUMNS = 64  # weights rounded before the others take note
_MOST_TURNS = 300  # of single weights of a channel, afterwards


def fit_scales(
    graph: TorchGraph,
    step: Step,
    site: Weighted,
    inputs: Sequence[torch.Tensor],
    constant: QuantizedConstant,
    candidates: Sequence[TensorQuantizer],
    generator: torch.Generator,
    *,
    centered: bool,
    shared: bool = False,
) -> QuantizedConstant:
    """Choose the scale of each output channel of a weight, and round it to nearest.

    Args:
        graph: the float network.
        step: the operator in it.
        site: the same, with what is constant.
        inputs: what the operator reads in the quantized network, [N, ...] each.
        constant: the weight with the scales that suit it.
        candidates: quantizers to choose from, channel by channel.
        generator: draws windows.
        centered: mean errors cost nothing.
        shared: all channels take the same candidate.

    Returns:
        The weight with its new scales; ``constant`` for operators other than Conv, Gemm and MatMul,
        for very long windows, and for inputs that are constant or not finite.
    """
    weight = graph.constants[site.weight]
    rows = weight.movedim(site.axis, 0).flatten(1).double()
    if step.op_type not in _OPERATORS or not 0 < rows.shape[1] <= _LARGEST:
        return constant
    with torch.no_grad():
        moments = _moments(graph, step, site, inputs, generator, centered=centered)
        if not bool(torch.isfinite(moments).all()):
            return constant
        factor = _error_feedback(moments)
        if factor is None:
            return constant
        errors = torch.stack([_error(rows, q, moments, factor) for q in candidates])
    if shared:
        errors = errors.sum(1, keepdim=True).expand_as(errors)
    quantizer = _chosen(candidates, errors.argmin(0).numpy())
    return replace(constant, quantizer=quantizer, integers=quantizer.quantize(weight.numpy()))


def _moments(
    graph: TorchGraph,
    step: Step,
    site: Weighted,
    inputs: Iterable[torch.Tensor],
    generator: torch.Generator,
    *,
    centered: bool,
) -> torch.Tensor:
    """Second moments of what the weights of an output channel see, [groups, n, n] float64."""
    total, mean, count = torch.zeros(()), torch.zeros(()), 0
    for windows in _windows(graph, step, site, inputs, generator):
        total = total + windows @ windows.transpose(1, 2)
        mean, count = mean + windows.sum(2), count + windows.shape[2]
    total, mean = total / count, mean / count
    return total - mean[:, :, None] * mean[:, None, :] if centered else total


def _windows(
    graph: TorchGraph,
    step: Step,
    site: Weighted,
    inputs: Iterable[torch.Tensor],
    generator: torch.Generator,
) -> Iterator[torch.Tensor]:
    """What the weights of an output channel see, some of it: [groups, n, windows] float64.

    An operator whose weight is the identity gives back its windows, whatever its attributes.
    """
    values = list(inputs)
    images = sum(map(len, values))
    weight = graph.constants[site.weight]
    size = weight.movedim(site.axis, 0)[0].numel()
    identity, groups = torch.eye(size), 1
    if step.op_type == "Conv":
        groups = values[0].shape[1] // weight.shape[1]
        identity = identity.reshape(size, *weight.shape[1:])
        identity = identity.repeat(groups, *[1] * (weight.dim() - 1))
    constants = {site.weight: identity}
    if site.bias:
        constants[site.bias] = torch.zeros(size * groups)
    wanted = -(-max(_WINDOWS, 4 * size) // images)  # of each image
    for value in values:
        share = value[:1].numel() * size // weight.shape[1]  # of a convolution of stride 1
        for piece in torch.split(value, max(1, _ELEMENTS // max(1, share))):
            made = graph.run_step(step, {site.input: piece, **constants})[0]
            rows = made.movedim(site.channel_axis, 0).flatten(1)
            drawn = torch.randperm(rows.shape[1], generator=generator)[: wanted * len(piece)]
            yield rows[:, drawn].reshape(groups, size, -1).double()


def _error_feedback(moments: torch.Tensor) -> torch.Tensor | None:
    """How errors are made up for: the upper Cholesky factor of the inverse of ``H``.

    None where ``H`` is nothing but rounding errors: that is the covariance of constant inputs.
    """
    diagonal = torch.diagonal(moments, dim1=1, dim2=2)
    damping = _DAMPING * diagonal.mean(1) + 1e-30
    damped = moments + torch.diag_embed(damping[:, None].expand_as(diagonal))
    lower, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed.any()):
        return None
    factor: torch.Tensor
    factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if bool(failed.any()) else factor


def _error(
    rows: torch.Tensor, quantizer: TensorQuantizer, moments: torch.Tensor, factor: torch.Tensor
) -> torch.Tensor:
    """Mean squared error of each channel's output, [channels], weights rounded up or down."""
    groups, size = moments.shape[:2]
    scale = torch.from_numpy(np.asarray(quantizer.scale, np.float64)).reshape(-1, 1)
    exact = (rows / scale).reshape(groups, -1, size)
    low = exact.floor().clamp(quantizer.qmin, quantizer.qmax)
    high = (exact.floor() + 1).clamp(quantizer.qmin, quantizer.qmax)
    rest, rounded = exact.clone(), torch.empty_like(exact)
    for first in range(0, size, _COLUMNS):
        last = min(first + _COLUMNS, size)
        errors = []
        for i in range(first, last):
            value = rest[:, :, i]
            rounded[:, :, i] = torch.clamp(value.round(), low[:, :, i], high[:, :, i])
            error = (value - rounded[:, :, i]) / factor[:, None, i, i]
            rest[:, :, i:last] -= error[:, :, None] * factor[:, None, i, i:last]
            errors.append(error)
        rest[:, :, last:] -= torch.stack(errors, 2) @ factor[:, first:last, last:]
    _turn(rounded, exact, low, high, moments)
    change = rounded - exact
    square = ((change @ moments) * change).sum(2).reshape(-1)
    return square * scale[:, 0].square()


def _turn(
    rounded: torch.Tensor,
    exact: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    moments: torch.Tensor,
) -> None:
    """Round single weights the other way for as long as that helps, in place.

    With ``d`` the change of the weights, turning weight i by t adds ``2 t (H d)_i + t^2 H_ii``.
    """
    slope = (rounded - exact) @ moments
    diagonal = torch.diagonal(moments, dim1=1, dim2=2)[:, None]
    for _ in range(min(_MOST_TURNS, 2 * exact.shape[2])):
        turn = torch.where(rounded > low, low, high) - rounded  # 0 where the range ends
        gain = 2 * turn * slope + turn.square() * diagonal
        least, place = gain.min(2, keepdim=True)
        moved = torch.where(least < 0, turn.gather(2, place), 0.0)
        if not bool(moved.any()):
            break
        rounded.scatter_add_(2, place, moved)
        slope += moved * _rows_of(moments, place)


def _rows_of(moments: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Row ``place[g, o]`` of each group's matrix, [groups, channels, n]."""
    groups = torch.arange(len(moments))[:, None]
    return moments[groups, place[:, :, 0]]


def _chosen(candidates: Sequence[TensorQuantizer], places: Array) -> TensorQuantizer:
    """Channel by channel one of the candidates."""
    first = candidates[0]
    exponents = np.array([q.exponent for q in candidates])[places, np.arange(len(places))]
    scales = None
    if first.scales is not None:
        found = np.array([q.scales for q in candidates])[places, np.arange(len(places))]
        scales = tuple(map(float, found))
    return replace(first, exponent=tuple(map(int, exponents)), scales=scales)
