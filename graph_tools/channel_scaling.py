"""Scale the channels between weighted operators: what makes them, and all that reads them.

Where an activation ``f`` commutes with positive factors, ``f(s y) = s f(y)``, a channel may be
scaled by the weights that make it and scaled back by all the weights that read it.
`graph_tools.equalization` chooses the factors by the weights alone,
`pipeline.quantize.scale_absorption` by the quantizers.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graph_tools.channel_paths import Reader, readers_of
from graph_tools.rewrites import is_weighted, scale_weights

__all__ = [
    "ChannelPair",
    "blocks_of",
    "find_channel_pairs",
    "scale_channels",
    "scaled_inputs",
    "scaled_outputs",
]

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(eq=False, kw_only=True)
class ChannelPair:
    """A weighted operator and all that read its output.

    Attributes:
        bound: the smallest upper bound of a Clip in between, inf if there is none.
    """

    source: gs.Node
    readers: tuple[Reader, ...]
    bound: float


def find_channel_pairs(graph: gs.Graph) -> tuple[list[ChannelPair], Counter[str]]:
    """Find the weighted operators whose channels may be scaled, in topological order.

    Args:
        graph: prepared for quantization.

    Returns:
        The pairs; and how often which operator stood in the way of another.
    """
    pairs: list[ChannelPair] = []
    refused: Counter[str] = Counter()
    for node in graph.nodes:
        if not _owns_weights(node) or any(node.outputs[0] is o for o in graph.outputs):
            continue
        path = readers_of(graph, node.outputs[0], _owns_weights)
        if path.obstacle:
            refused[path.obstacle] += 1
            continue
        pairs.append(ChannelPair(source=node, readers=path.readers, bound=path.bound))
    return pairs, refused


def scale_channels(pair: ChannelPair, factor: Array) -> None:
    """Multiply channels by ``factor`` [channels] where they are made, divide where read."""
    scale_weights(pair.source, factor, np.zeros(factor.size))
    for reader in pair.readers:
        weight = np.asarray(reader.node.inputs[1].values, np.float64)
        reader.node.inputs[1].values = scaled_inputs(reader, weight, 1 / factor).astype(
            np.float32
        )


def _owns_weights(node: gs.Node) -> bool:
    return (
        is_weighted(node)
        and len(node.inputs) == 3
        and all(len(constant.outputs) == 1 for constant in node.inputs[1:])
        and node.attrs.get("alpha", 1.0) == node.attrs.get("beta", 1.0) == 1.0
    )


def blocks_of(node: gs.Node, weight: Array) -> Array:
    """A weight as [groups, out/groups, in/groups, taps]; a view of it."""
    groups = node.attrs.get("group", 1) if node.op != "Gemm" else 1
    if node.op == "ConvTranspose":
        view = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        return np.swapaxes(view, 1, 2)
    if node.op == "Gemm" and not node.attrs.get("transB", 0):
        return weight.T.reshape(1, weight.shape[1], weight.shape[0], 1)
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


def _unblocked(node: gs.Node, blocks: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of `blocks_of`."""
    if node.op == "ConvTranspose":
        return np.swapaxes(blocks, 1, 2).reshape(shape)
    if node.op == "Gemm" and not node.attrs.get("transB", 0):
        return blocks.reshape(shape[1], shape[0]).T
    return blocks.reshape(shape)


def scaled_outputs(node: gs.Node, weight: Array, factor: Array) -> Array:
    """The weight of an operator whose output channels are multiplied by ``factor``."""
    blocks = blocks_of(node, weight)
    spread = factor.reshape(blocks.shape[0], blocks.shape[1], 1, 1)
    return _unblocked(node, blocks * spread, weight.shape)


def scaled_inputs(reader: Reader, weight: Array, factor: Array) -> Array:
    """The weight of a reader that multiplies the channels it reads by ``factor``."""
    blocks = blocks_of(reader.node, weight)
    spread = np.repeat(factor, reader.repeat).reshape(blocks.shape[0], 1, blocks.shape[2], 1)
    return _unblocked(reader.node, blocks * spread, weight.shape)
