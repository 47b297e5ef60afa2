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
one sign, learning does not undo it, and few images show little of it; so channels move that hardly
reach their bound. What that does to the float network is measured: all that follows is judged by
the network as it is then. (Counted 10,000 times little of MobileNetV1 is left to gain:
docs/measured.md.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
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
from graph_tools.weights import export_graph, import_graph
from pipeline.quantize.thresholds import FLOOR, ceil_log2, rounded_weight
from pipeline.settings import QuantizeSettings

__all__ = ["absorb_scales"]

Array = np.ndarray[Any, np.dtype[Any]]
Batches = Callable[[], Iterable[torch.Tensor]]

_PHASES = 8  # of an octave; the error of weights repeats with it
_LOG_FACTORS = np.arange(1 - _PHASES, _PHASES // 2 + 1) / _PHASES
_UNCHANGED = _PHASES - 1  # index of the factor 1
_CLIPPING = 100.0
_GAIN = 0.99  # of the error: channels that gain less stay as they are
_POSITIONS = 32  # along each side of an image, at least, where it has more
_FEW_BITS = 8  # of weights; with as many, rounding them is no matter
_CHUNK = 2**22  # weights whose errors are computed at a time


@dataclass(eq=False, kw_only=True)
class _Seen:
    """What the calibration images show of a pair.

    Attributes:
        high: the largest value that passes.
        squares: [input channels] sums of the mean squares of what the weights read, by image.
        clipped: [factors, channels] the same of the errors of clipping.
        count: images.
    """

    high: float = 0.0
    squares: Array = field(default_factory=lambda: np.zeros(()))
    clipped: Array = field(default_factory=lambda: np.zeros(()))
    count: int = 0


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
        weights: bits of the weights by operator. Channels made by others, or by weights of 8 bits,
            stay as they are.
        activations: bits of the tensors that are quantized.
        settings: threshold error, zero points, signs.

    Returns:
        The network with other weights (same values, but where a Clip now bounds a channel
        elsewhere), and a note for the user that says how much its outputs changed.
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
    ratios: list[Array] = []
    moved = 0
    for pair, sight in zip(pairs, seen, strict=True):
        if not sight.count:
            continue
        squares = sight.squares / sight.count * incoming.get(id(pair.source), 1.0) ** 2
        rounding = _weight_errors(pair.source, squares, weights[pair.source.name], settings)
        bits = activations.get(pair.source.outputs[0].name, settings.activations)
        best = _best(pair, sight, rounding, bits, settings)
        before, after = rounding[_UNCHANGED], rounding[best, np.arange(best.size)]
        ratios.append(after[before > 0] / before[before > 0])
        moved += int((best != _UNCHANGED).sum())
        factor = np.exp2(_LOG_FACTORS[best])
        scale_channels(pair, factor)
        for reader in pair.readers:
            incoming[id(reader.node)] = np.repeat(factor, reader.repeat)
    ratio = np.concatenate([*ratios, np.ones(0)])
    mean = float(np.exp(np.log(np.maximum(ratio, FLOOR)).mean())) if ratio.size else 1.0
    scaled = replace_proto(model, export_graph(nodes, model.proto))
    return scaled, (
        f"scales absorbed: {moved} channels behind {len(pairs)} of {len(found) + refused.total()} "
        f"operators; rounding their weights costs {mean:.2f} of what it did, in the mean; outputs "
        f"in float stay as they are to {_agreement(graph, scaled, batches):.0f} dB"
    )


def _best(
    pair: ChannelPair, sight: _Seen, rounding: Array, bits: int, settings: QuantizeSettings
) -> Array:
    """[channels]: index of the factor with the smallest error, `_UNCHANGED` if it gains little.

    ``rounding`` [factors, channels] are the errors of the weights, ``bits`` those of the channels.
    """
    unsigned = _rectified(pair) and settings.signedness == "auto"
    step = _top(pair, sight) / 2.0 ** (bits if unsigned else bits - 1)
    own = (step / np.exp2(_LOG_FACTORS)) ** 2 / 12
    cost = rounding + _CLIPPING * sight.clipped / sight.count + own[:, None]
    gains = (rounding[_UNCHANGED] > 0) & (cost.min(axis=0) < _GAIN * cost[_UNCHANGED])
    return np.where(gains, cost.argmin(axis=0), _UNCHANGED)


def _agreement(graph: TorchGraph, scaled: Model, batches: Batches) -> float:
    """Signal to noise ratio of the scaled network's outputs on the first images, in dB."""
    batch = next(iter(batches()))
    with torch.no_grad():
        wanted = graph(batch)
        found = TorchGraph(scaled.proto, outputs=graph.output_names)(batch)
    pairs = [(wanted[name].double(), found[name].double()) for name in wanted]
    signal = sum(float(exact.square().sum()) for exact, _ in pairs)
    noise = sum(float((exact - other).square().sum()) for exact, other in pairs)
    return 10 * math.log10(max(signal, FLOOR) / max(noise, FLOOR**4))


def _weight_errors(
    node: gs.Node, squares: Array, bits: int, settings: QuantizeSettings
) -> Array:
    """[factors, channels]: what rounding the weights adds to each channel, in its own units.

    ``squares`` [input channels] are the mean squares of what they read.
    """
    blocks = blocks_of(node, np.asarray(node.inputs[1].values, np.float64))
    groups, outputs, inputs, _ = blocks.shape
    read = squares.reshape(groups, inputs)
    errors = np.empty((_PHASES, groups, outputs))
    chunk = max(1, _CHUNK // max(1, blocks[:, 0].size))
    for phase, first in product(range(_PHASES), range(0, outputs, chunk)):
        weight = blocks[:, first : first + chunk]
        factor = 2.0 ** (phase / _PHASES)
        rounded = rounded_weight(
            (weight * factor).reshape(-1, *weight.shape[2:]),
            axis=0,
            bits=bits,
            metric=settings.threshold,
            lifted=settings.lifted,
        ).reshape(weight.shape)
        lost = ((rounded / factor - weight) ** 2).sum(axis=3)
        errors[phase, :, first : first + chunk] = np.einsum("goi,gi->go", lost, read)
    phases = np.rint(_LOG_FACTORS * _PHASES).astype(int) % _PHASES
    return np.asarray(errors.reshape(_PHASES, -1)[phases])


def _look(graph: TorchGraph, pairs: list[ChannelPair], batches: Batches) -> list[_Seen]:
    """Two passes over the images: the first finds each tensor's range, the second clips."""
    made = {pair.source.outputs[0].name: pair for pair in pairs}
    readers: dict[str, list[_Seen]] = {}
    seen = {name: _Seen() for name in made}
    for name, pair in made.items():
        readers.setdefault(pair.source.inputs[0].name, []).append(seen[name])

    def measure(name: str, value: torch.Tensor) -> torch.Tensor:
        if name in readers and value.numel():
            squares = _channels(value).square().mean(1, dtype=torch.float64) * len(value)
            for sight in readers[name]:
                sight.squares = sight.squares + squares.numpy()
        if name in made and value.numel():
            high = float(_passed(made[name], value).max())
            seen[name].high = max(seen[name].high, high)
        return value

    def clip(name: str, value: torch.Tensor) -> torch.Tensor:
        if name in made and value.numel() and math.isfinite(seen[name].high):
            sight, rows = seen[name], _channels(_sparse(_passed(made[name], value)))
            top = _top(made[name], sight)
            whole = rows.clamp(max=top)
            errors = [
                (whole - rows.clamp(max=top / factor)).square().mean(1, dtype=torch.float64)
                for factor in np.exp2(_LOG_FACTORS)
            ]
            sight.clipped = sight.clipped + torch.stack(errors).numpy() * len(value)
            sight.count += len(value)
        return value

    with torch.no_grad():
        for hook in (measure, clip):
            for batch in batches():
                graph(batch, hook=hook)
    return list(seen.values())


def _top(pair: ChannelPair, sight: _Seen) -> float:
    """Up to where channels pass their quantizer and their Clip."""
    return min(pair.bound, 2.0 ** ceil_log2(max(sight.high, FLOOR)))


def _rectified(pair: ChannelPair) -> bool:
    """Whether what a pair's operator makes passes only where it is positive, on all paths."""
    return all(node.op in ("Relu", "Clip") for node in pair.source.outputs[0].outputs)


def _passed(pair: ChannelPair, value: torch.Tensor) -> torch.Tensor:
    return value.clamp(min=0) if _rectified(pair) else value.abs()


def _channels(value: torch.Tensor) -> torch.Tensor:
    """[channels, all else] of a tensor with channels on axis 1."""
    return value.transpose(0, 1).flatten(1)


def _sparse(value: torch.Tensor) -> torch.Tensor:
    """Some positions of large images, evenly spread over each axis."""
    for axis in range(2, value.ndim):
        step = max(1, value.shape[axis] // _POSITIONS)
        value = value.index_select(axis, torch.arange(0, value.shape[axis], step))
    return value
