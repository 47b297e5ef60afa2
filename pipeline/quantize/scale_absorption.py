"""Absorb the fractions of weight scales: power-of-two scales that fit like free ones.

The best scale of an output channel's weights is hardly ever a power of two. But a channel may be
scaled by any positive factor where it is made, and scaled back where it is read
(`graph_tools.channel_scaling`; Nagel et al. 2019, arXiv 1906.04721, equalize ranges so). With the
factor ``f = 2**k / s`` the scale ``s`` becomes the power of two ``2**k``, and the weights of the
next layer absorb the rest.

A factor has two prices. A channel made smaller uses less of its tensor's quantizer, and one made
larger leaves it sooner; and a Clip between the two operators, which stays where it is, bounds the
channel elsewhere. For each channel the factor is taken with the smallest

    rounding of the weights + 100 * clipping + rounding of the channel

each the mean squared error in the channel's own units: of the weights by their errors and the mean
squares of what they read, of clipping on the calibration images. Clipping counts more since it has
one sign, since learning does not undo it, and since few images show little of it; at 10 and at
1000 MobileNetV1's outputs are further from the float network's (docs/measured.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch

from graph_tools.channel_scaling import (
    ChannelPair,
    blocks_of,
    find_channel_pairs,
    scale_channels,
)
from graph_tools.model import Model, replace_proto
from graph_tools.torch_graph import TorchGraph
from graph_tools.weights import import_graph
from pipeline.quantize.thresholds import FLOOR, ceil_log2, rounded_weight
from pipeline.settings import QuantizeSettings

__all__ = ["absorb_scales"]

Array = np.ndarray[Any, np.dtype[Any]]
Batches = Callable[[], Iterable[torch.Tensor]]

_LOG_FACTORS = np.arange(-8, 5) / 8
_UNCHANGED = 8  # index of the factor 1
_CLIPPING = 100.0
_GAIN = 0.99  # of the error: channels that gain less stay as they are
_POSITIONS = 1024  # of each channel of an image, at least, where it has more
_FEW_BITS = 8  # of weights; with as many, rounding them is no matter


@dataclass(eq=False, kw_only=True)
class _Seen:
    """What the calibration images show of a pair.

    Attributes:
        top: up to where the channels' quantizer or Clip lets them pass.
        rectified: whether what is negative does not.
        squares: [input channels] mean squares of what the weights read.
        clipped: [factors, channels] mean squared errors of clipping.
    """

    top: float
    rectified: bool
    squares: Array
    clipped: Array


def absorb_scales(
    model: Model,
    graph: TorchGraph,
    batches: Batches,
    weights: Mapping[str, int],
    activations: Mapping[str, int],
    settings: QuantizeSettings,
) -> tuple[Model, str]:
    """Scale channels so that power-of-two scales suit the weights that make them.

    Args:
        model: prepared for quantization.
        graph: the same network in torch.
        batches: starts a new pass over the images, each batch ``[n, ...]`` in the model's layout.
        weights: bits of the weights by operator; operators with 8 and others stay as they are.
        activations: bits of the tensors that are quantized.
        settings: threshold error, zero points.

    Returns:
        The network with other weights (same values, but where a Clip now bounds a channel
        elsewhere), and a note for the user.
    """
    nodes = import_graph(model.proto)
    found, refused = find_channel_pairs(nodes)
    pairs = [
        pair
        for pair in found
        if weights.get(pair.source.name, _FEW_BITS) < _FEW_BITS
        and (pair.source.op != "ConvTranspose" or pair.source.attrs.get("group", 1) == 1)
    ]
    if not pairs:
        return model, "scales absorbed behind 0 operators"
    seen = _look(graph, pairs, batches)
    incoming: dict[int, Array] = {}
    before = after = 0.0
    moved = channels = 0
    for pair, sight in zip(pairs, seen, strict=True):
        squares = sight.squares * incoming.get(id(pair.source), 1.0) ** 2
        rounding = _weight_errors(pair.source, squares, weights[pair.source.name], settings)
        bits = activations.get(pair.source.outputs[0].name, settings.activations)
        step = sight.top / 2.0 ** (bits if sight.rectified else bits - 1)
        own = (step / np.exp2(_LOG_FACTORS)) ** 2 / 12
        cost = rounding + _CLIPPING * sight.clipped + own[:, None]
        best = cost.argmin(axis=0)
        place = np.arange(best.size)
        best = np.where(cost[best, place] < _GAIN * cost[_UNCHANGED], best, _UNCHANGED)
        before += rounding[_UNCHANGED].sum()
        after += rounding[best, place].sum()
        moved, channels = moved + int((best != _UNCHANGED).sum()), channels + best.size
        factor = np.exp2(_LOG_FACTORS[best])
        scale_channels(pair, factor)
        for reader in pair.readers:
            incoming[id(reader.node)] = np.repeat(factor, reader.repeat)
    proto: onnx.ModelProto = gs.export_onnx(nodes, do_type_check=False)
    proto.ir_version = model.proto.ir_version
    total = len(found) + refused.total()
    return replace_proto(model, proto), (
        f"scales absorbed: {moved} of {channels} channels behind {len(pairs)} of {total} "
        f"operators; what their weights lose by rounding is {after / max(before, FLOOR):.2f} of "
        "what it was"
    )


def _weight_errors(
    node: gs.Node, squares: Array, bits: int, settings: QuantizeSettings
) -> Array:
    """[factors, channels]: what rounding the weights adds to each channel, in its own units."""
    blocks = blocks_of(node, np.asarray(node.inputs[1].values, np.float64))
    groups, rows = blocks.shape[0], blocks.shape[0] * blocks.shape[1]
    read = np.broadcast_to(squares.reshape(groups, 1, -1, 1), blocks.shape).reshape(rows, -1)
    weight = blocks.reshape(rows, -1)
    errors = np.empty((_LOG_FACTORS.size, rows))
    for index, factor in enumerate(np.exp2(_LOG_FACTORS)):
        rounded = rounded_weight(
            weight * factor,
            axis=0,
            bits=bits,
            metric=settings.threshold,
            lifted=settings.lifted,
        )
        errors[index] = ((rounded / factor - weight) ** 2 * read).sum(axis=1)
    return errors


def _look(graph: TorchGraph, pairs: list[ChannelPair], batches: Batches) -> list[_Seen]:
    """Two passes over the images: the first finds each tensor's range, the second clips."""
    made = {pair.source.outputs[0].name: pair for pair in pairs}
    read = {pair.source.inputs[0].name for pair in pairs}
    high: dict[str, float] = {}
    sums: dict[str, list[Array]] = {}

    def measure(name: str, value: torch.Tensor) -> torch.Tensor:
        if name in read:
            sums.setdefault(name, []).append(_channels(value).square().mean(1).numpy())
        if name in made:
            most = float(_passed(made[name], value).max())
            high[name] = max(high.get(name, 0.0), most)
        return value

    clipped: dict[str, list[Array]] = {}

    def clip(name: str, value: torch.Tensor) -> torch.Tensor:
        if name in made:
            rows = _channels(_sparse(_passed(made[name], value)))
            whole = rows.clamp(max=top[name])
            errors = [
                (whole - rows.clamp(max=top[name] / factor)).square().mean(1).numpy()
                for factor in np.exp2(_LOG_FACTORS)
            ]
            clipped.setdefault(name, []).append(np.stack(errors))
        return value

    with torch.no_grad():
        for batch in batches():
            graph(batch, hook=measure)
        top = {
            name: pair.bound
            if pair.bound < math.inf
            else 2.0 ** ceil_log2(max(high[name], FLOOR))
            for name, pair in made.items()
        }
        for batch in batches():
            graph(batch, hook=clip)
    return [
        _Seen(
            top=top[name],
            rectified=_rectified(pair),
            squares=np.mean(sums[pair.source.inputs[0].name], axis=0),
            clipped=np.mean(clipped[name], axis=0),
        )
        for name, pair in made.items()
    ]


def _rectified(pair: ChannelPair) -> bool:
    """Whether what a pair's operator makes passes only where it is positive."""
    readers = pair.source.outputs[0].outputs
    return pair.bound < math.inf or all(node.op == "Relu" for node in readers)


def _passed(pair: ChannelPair, value: torch.Tensor) -> torch.Tensor:
    return value.clamp(min=0) if _rectified(pair) else value.abs()


def _channels(value: torch.Tensor) -> torch.Tensor:
    """[channels, all else] of a tensor with channels on axis 1, in float64."""
    return value.transpose(0, 1).flatten(1).double()


def _sparse(value: torch.Tensor) -> torch.Tensor:
    """Some positions of large images, evenly spread."""
    rows = value.flatten(2) if value.ndim > 2 else value[:, :, None]
    return rows[:, :, :: max(1, rows.shape[2] // _POSITIONS)]
