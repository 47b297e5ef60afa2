"""Cross-layer equalization: scale the channels between weighted operators, exactly.

Where an activation ``f`` commutes with positive factors, ``f(s y) = s f(y)``, a channel may be
scaled by the weights that make it, ``W1[c] / s, b1[c] / s``, and scaled back by all the weights
that read it, ``W2[:, c] * s``. With ``s = sqrt(r1 / r2)``, the largest magnitudes of channel ``c``
in both weights become equal (Nagel et al. 2019, arXiv 1906.04721, section 4.1); all pairs of a
network are gone through until nothing moves, which for triples with a depthwise convolution in the
middle ends where the paper's closed form does.

We depart from it in three points. Factors are rounded to powers of two: no value of the float
network changes in any bit (but where numbers become subnormal), and with power-of-two scales the
weights before keep their grid; measured, they lose nothing to free factors. No bias is scaled up
beyond the largest of its operator: a channel that is all bias would otherwise widen the range of
the whole tensor, and the paper has to absorb such biases afterwards. And ReLU6 is not replaced by
ReLU: over a Clip from zero to ``b`` a channel is scaled only if, by interval arithmetic, it cannot
reach ``b`` before or after, whatever the image.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graph_tools.channel_paths import Reader
from graph_tools.channel_scaling import (
    ChannelPair,
    blocks_of,
    find_channel_pairs,
    scale_channels,
    scaled_inputs,
    scaled_outputs,
)
from graph_tools.model import Model, replace_proto
from graph_tools.rewrites import output_channel_axis
from graph_tools.weights import export_graph, import_graph

__all__ = ["equalize_channels"]

Array = np.ndarray[Any, np.dtype[Any]]

_ROUNDS = 100
_SETTLED = 0.01  # of a factor of two
_LARGEST = 16.0  # exponent of a factor


@dataclass(eq=False, kw_only=True)
class _Pair(ChannelPair):
    """A pair, and how far its channels are scaled.

    Attributes:
        least: [channels] bounds of ``log_scale``; ``most`` likewise.
        log_scale: [channels] log2 of ``s``, so far.
    """

    least: Array
    most: Array
    log_scale: Array


def equalize_channels(model: Model) -> Model:
    """Equalize the channels between the weighted operators of a network.

    Args:
        model: prepared for quantization.

    Returns:
        The network with other weights, and a note that counts the pairs that were scaled and
        the operators that stood in the way of others.
    """
    graph = import_graph(model.proto)
    pairs, refused = _find_pairs(graph)
    _settle(pairs)
    num_scaled = sum(_apply(pair) for pair in pairs)
    notes = [
        f"channels equalized behind {num_scaled} of {len(pairs) + refused.total()} operators"
    ]
    if refused:
        counted = ", ".join(f"{reason} {count}" for reason, count in refused.most_common())
        notes.append(f"not equalized, because of what reads the channels: {counted}")
    return replace_proto(model, export_graph(graph, model.proto), notes=notes)


def _find_pairs(graph: gs.Graph) -> tuple[list[_Pair], Counter[str]]:
    found, refused = find_channel_pairs(graph)
    pairs: list[_Pair] = []
    for pair in found:
        least, most = _limits(pair.source, pair.bound)
        if not (least < most).any():
            refused["Clip"] += 1
            continue
        start = np.zeros(least.size)
        pairs.append(_Pair(**vars(pair), least=least, most=most, log_scale=start))
    return pairs, refused


def _limits(node: gs.Node, bound: float) -> tuple[Array, Array]:
    """(least, most) of ``log_scale`` by channel; both zero where it must stay as it is."""
    bias = np.abs(np.asarray(node.inputs[2].values, np.float64))
    least, most = np.full(bias.size, -_LARGEST), np.full(bias.size, _LARGEST)
    has_bias = bias > 0
    least[has_bias] = np.maximum(-_LARGEST, np.log2(bias[has_bias] / bias.max()))
    if bound < math.inf:
        highest = _highest(node)
        is_free = highest <= bound
        room = np.ceil(np.log2(np.maximum(highest[is_free], 2.0**-_LARGEST) / bound))
        least[is_free] = np.maximum(least[is_free], room)
        least[~is_free] = most[~is_free] = 0.0
    return least, most


def _highest(node: gs.Node) -> Array:
    """Upper bound of each output channel over all images, inf where the input has none."""
    bias = np.asarray(node.inputs[2].values, np.float64)
    top = _bound_of_values(node.inputs[0])
    if top is None or node.op == "ConvTranspose":
        return np.full(bias.size, np.inf)
    weight = np.moveaxis(
        np.asarray(node.inputs[1].values, np.float64), output_channel_axis(node), 0
    )
    highest = bias + top * np.maximum(weight, 0).reshape(bias.size, -1).sum(axis=1)
    return np.asarray(highest * (1 + 1e-4))  # float32 sums round: leave room


def _bound_of_values(tensor: gs.Tensor) -> float | None:
    """``b`` if a tensor lies in [0, b] whatever the image; zero padding stays inside."""
    while tensor.inputs:
        node = tensor.inputs[0]
        if node.op == "Sigmoid":
            return 1.0
        if node.op == "Clip" and all(
            isinstance(i, gs.Constant) and i.values is not None for i in node.inputs[1:3]
        ):
            bounds = [float(i.values.reshape(-1)[0]) for i in node.inputs[1:3]]
            return bounds[1] if len(bounds) == 2 and bounds[0] >= 0 else None
        if node.op not in ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"):
            return None
        tensor = node.inputs[0]
    return None


def _settle(pairs: list[_Pair]) -> None:
    """Find ``log_scale`` of all pairs, by turns, until none moves."""
    weights = {
        id(node): np.abs(np.asarray(node.inputs[1].values, np.float64))
        for pair in pairs
        for node in (pair.source, *(reader.node for reader in pair.readers))
    }
    for _ in range(_ROUNDS):
        largest = 0.0
        for pair in pairs:
            made = _output_ranges(pair.source, weights[id(pair.source)])
            read = np.max(
                [_input_ranges(r, weights[id(r.node)], made.size) for r in pair.readers],
                axis=0,
            )
            usable = (made > 0) & (read > 0)
            move = np.zeros(made.size)
            move[usable] = 0.5 * np.log2(made[usable] / read[usable])
            target = np.clip(pair.log_scale + move, pair.least, pair.most)
            move, pair.log_scale = target - pair.log_scale, target
            scale = np.exp2(move)
            weights[id(pair.source)] = scaled_outputs(
                pair.source, weights[id(pair.source)], 1 / scale
            )
            for reader in pair.readers:
                weights[id(reader.node)] = scaled_inputs(
                    reader, weights[id(reader.node)], scale
                )
            largest = max(largest, float(np.abs(move).max(initial=0.0)))
        if largest < _SETTLED:
            break


def _apply(pair: _Pair) -> bool:
    """Scale the weights of a pair by powers of two; False if nothing is to be done."""
    exponents = np.rint(pair.log_scale)
    if not exponents.any():
        return False
    scale_channels(pair, np.exp2(-exponents))
    return True


def _output_ranges(node: gs.Node, weight: Array) -> Array:
    return np.asarray(blocks_of(node, weight).max(axis=(2, 3))).reshape(-1)


def _input_ranges(reader: Reader, weight: Array, channels: int) -> Array:
    ranges = blocks_of(reader.node, weight).max(axis=(1, 3)).reshape(channels, reader.repeat)
    return np.asarray(ranges.max(axis=1))
