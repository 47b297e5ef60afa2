"""Follow the channels of a tensor to the weights that read them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from graph_tools.rewrites import rank_of

__all__ = ["ChannelPath", "Reader", "readers_of"]

_HOMOGENEOUS = frozenset(  # f(s x) = s f(x) for one s > 0 per channel, channels on axis 1
    "AveragePool GlobalAveragePool GlobalMaxPool LeakyRelu MaxPool PRelu Relu".split()
)


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A weighted operator at the end of a path.

    Attributes:
        repeat: how many of its input channels belong to one channel at the start of the path
            (Flatten of an image makes them neighbours).
    """

    node: gs.Node
    repeat: int


@dataclass(frozen=True, kw_only=True)
class ChannelPath:
    """Where the channels of a tensor go.

    Attributes:
        readers: weighted operators that read them; empty if anything else does.
        bound: the smallest upper bound of a Clip on the way, inf if there is none.
        obstacle: what stands in the way: an operator, or ``output``; empty if nothing does.
    """

    readers: tuple[Reader, ...] = ()
    bound: float = math.inf
    obstacle: str = ""


def readers_of(
    graph: gs.Graph, tensor: gs.Variable, is_reader: Callable[[gs.Node], bool], repeat: int = 1
) -> ChannelPath:
    """Find what reads the channels of ``tensor`` through operators that keep them apart.

    Args:
        graph: prepared for quantization.
        tensor: with channels on axis 1.
        is_reader: whether the path ends at a node, if it enters by its first input.
        repeat: see `Reader`.
    """
    if any(tensor is output for output in graph.outputs):
        return ChannelPath(obstacle="output")
    readers: list[Reader] = []
    bound = math.inf
    for node in tensor.outputs:
        if node.inputs[0] is not tensor or any(i is tensor for i in node.inputs[1:]):
            return ChannelPath(obstacle=node.op)
        if is_reader(node):
            readers.append(Reader(node=node, repeat=repeat))
            continue
        step = _step(node)
        if step is None:
            return ChannelPath(obstacle=node.op)
        further = readers_of(graph, node.outputs[0], is_reader, repeat * step[0])
        if further.obstacle:
            return further
        readers.extend(further.readers)
        bound = min(bound, step[1], further.bound)
    if not readers:
        return ChannelPath(obstacle="nothing")
    return ChannelPath(readers=tuple(readers), bound=bound)


def _step(node: gs.Node) -> tuple[int, float] | None:
    """(repeat, bound) of an operator on the way; None if scaled channels do not come out scaled."""
    if node.op in _HOMOGENEOUS:
        return 1, math.inf
    if node.op == "Clip":
        bounds = [_scalar(i) if i.name else None for i in node.inputs[1:3]]
        low, high = (*bounds, None, None)[:2]
        if (
            any(i.name and not isinstance(i, gs.Constant) for i in node.inputs[1:3])
            or low != 0
        ):
            return None
        return 1, math.inf if high is None else high
    if node.op == "Pad":
        return (1, math.inf) if _pads_zeros_in_space(node) else None
    before, after = node.inputs[0].shape, node.outputs[0].shape
    if not before or not after or not all(isinstance(size, int) for size in before[1:]):
        return None
    if node.op == "Resize":
        crops = node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize"
        return None if crops or list(before[:2]) != list(after[:2]) else (1, math.inf)
    if node.op in ("Flatten", "Reshape", "Squeeze", "Unsqueeze") and len(before) >= 2:
        size = math.prod(before[2:])
        if len(after) == 2 and after[1] == before[1] * size and before[0] == after[0]:
            return size, math.inf
        if size == 1 and len(after) > 2 and list(before[:2]) == list(after[:2]):
            return 1, math.inf
    return None


def _scalar(tensor: gs.Tensor) -> float | None:
    if not isinstance(tensor, gs.Constant):
        return None
    return float(np.asarray(tensor.values).reshape(-1)[0])


def _pads_zeros_in_space(node: gs.Node) -> bool:
    """Whether a Pad leaves batch and channels alone and writes zeros, or values of the image."""
    rank = rank_of(node.inputs[0])
    if rank is None or not isinstance(node.inputs[1], gs.Constant) or len(node.inputs) > 3:
        return False
    pads = np.asarray(node.inputs[1].values)
    if pads.size != 2 * rank or pads[[0, 1, rank, rank + 1]].any():
        return False
    has_value = len(node.inputs) > 2 and node.inputs[2].name
    return (
        node.attrs.get("mode", "constant") != "constant"
        or not has_value
        or _scalar(node.inputs[2]) == 0.0
    )
