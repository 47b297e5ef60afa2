"""Rescale bounded activations (ReLU6 as Clip(0, 6)) so that the bound is a power of two.

``clip(y, 0, b) = (b/p) clip((p/b) y, 0, p)`` for ``p = 2**ceil(log2 b)``: the factor ``p/b`` goes
into the weights before the Clip and ``b/p`` into those behind it, which is exact. A quantizer with
threshold ``p`` then does the clipping by its saturation, and the convolution stays an integer
kernel.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_graphsurgeon as gs

from graph_tools.rewrites import is_weighted, only_consumer

__all__ = ["rescale_bounds"]

_HOMOGENEOUS = (  # f(a x) = a f(x) for a > 0, elementwise positions only moved or averaged
    "AveragePool",
    "DepthToSpace",
    "Flatten",
    "GlobalAveragePool",
    "GlobalMaxPool",
    "MaxPool",
    "Relu",
    "Reshape",
    "Slice",
    "SpaceToDepth",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
)


def _weighted_consumers(graph: gs.Graph, tensor: gs.Variable) -> list[gs.Node] | None:
    """Weighted nodes that read ``tensor`` through homogeneous operators; None if others do."""
    if any(tensor is output for output in graph.outputs):
        return None
    found: list[gs.Node] = []
    for node in tensor.outputs:
        if is_weighted(node) and node.inputs[0] is tensor:
            found.append(node)
        elif node.op in _HOMOGENEOUS and node.inputs[0] is tensor:
            further = _weighted_consumers(graph, node.outputs[0])
            if further is None:
                return None
            found.extend(further)
        else:
            return None
    return found


def _bound(node: gs.Node) -> float | None:
    """Upper bound of a Clip from zero to a positive constant."""
    if node.op != "Clip" or len(node.inputs) < 3:
        return None
    low, high = node.inputs[1:3]
    if not isinstance(low, gs.Constant) or not isinstance(high, gs.Constant):
        return None
    bound = float(high.values.reshape(-1)[0])
    is_relu_like = float(low.values.reshape(-1)[0]) == 0.0 and 0.0 < bound < math.inf
    return bound if is_relu_like else None


def rescale_bounds(graph: gs.Graph) -> int:
    """Rescale each Clip(0, b) between weighted nodes to a power-of-two bound.

    Returns:
        How many Clip nodes were rescaled; those whose neighbours cannot take the factor (an Add
        or a graph output behind them, say) keep their bound.
    """
    count = 0
    for node in graph.nodes:
        bound = _bound(node)
        if bound is None or math.log2(bound).is_integer():
            continue
        producers = node.inputs[0].inputs
        if not producers or not is_weighted(producers[0]) or len(producers[0].inputs) < 3:
            continue
        if only_consumer(graph, node.inputs[0]) is None:
            continue
        source: gs.Node = producers[0]
        consumers = _weighted_consumers(graph, node.outputs[0])
        if not consumers:
            continue
        power = 2.0 ** math.ceil(math.log2(bound))
        for index in (1, 2):
            values = np.asarray(source.inputs[index].values, np.float64)
            source.inputs[index].values = (values * (power / bound)).astype(np.float32)
        for consumer in consumers:
            values = np.asarray(consumer.inputs[1].values, np.float64)
            consumer.inputs[1].values = (values * (bound / power)).astype(np.float32)
        node.inputs[2] = gs.Constant(f"{node.name}.bound", np.asarray(power, np.float32))
        count += 1
    return count
