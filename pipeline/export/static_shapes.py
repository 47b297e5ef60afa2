"""Data movement in the words that compilers for fixed shapes take.

With a fixed batch every Reshape has one shape, which is written out. A Gather along the batch takes
channels of a tensor in front of it: ShuffleNet's exchange of channels (arXiv 1807.11164) ends with
one, behind a reshape to pairs of channels, a transpose and a reshape to a batch of two. What the
chain moves where is found by moving the numbers of the elements through it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from graph_tools.quantized_graph import QuantizedGraph, attribute

__all__ = ["with_static_movement"]

Array = np.ndarray[Any, np.dtype[np.int64]]

_MOVES = frozenset({"Gather", "Reshape", "Transpose"})


def with_static_movement(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy whose movement of data is written for its own, fixed shapes.

    Args:
        proto: a model with a fixed batch, whose tensors all have shapes.
    """
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    graph = _Shapes(result)
    nodes = []
    for node in result.graph.node:
        if node.op_type == "Gather" and attribute(node, "axis", 0) == 0:
            node = graph.channels_of(node) or node
        elif node.op_type == "Reshape":
            node = graph.written_out(node)
        nodes.append(node)
    _keep_what_is_read(result, nodes)
    return result


class _Shapes:
    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto = proto
        self.index = QuantizedGraph(proto)
        values = (*proto.graph.input, *proto.graph.value_info, *proto.graph.output)
        self.shapes = {
            value.name: tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
            for value in values
        }

    def add(self, name: str, values: Any) -> str:
        array = np.asarray(values, np.int64)
        self.proto.graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def written_out(self, node: NodeProto) -> NodeProto:
        shape = self.shapes.get(node.output[0], ())
        if not shape or 0 in shape:
            return node
        name = self.add(f"{node.output[0]}/shape", shape)
        return helper.make_node("Reshape", [node.input[0], name], node.output, node.name)

    def channels_of(self, node: NodeProto) -> NodeProto | None:
        """A Slice of the channels of the tensor that a chain of movement begins at."""
        chain: list[NodeProto] = []
        tensor, step = node.output[0], node
        while True:
            chain.append(step)
            tensor = step.input[0]
            shape = self.shapes.get(tensor, ())
            if len(shape) == 4 and shape[0] == 1 and min(shape) > 0:
                break
            maker = self.index.producers.get(tensor)
            if maker is None or maker.op_type not in _MOVES:
                return None
            step = maker
        numbers: Array = np.arange(np.prod(shape), dtype=np.int64).reshape(shape)
        moved = numbers
        for step in reversed(chain):
            following = self._moved(step, moved)
            if following is None:
                return None
            moved = following
        if moved.ndim != 4 or moved.shape[2:] != shape[2:]:
            return None
        channels = moved[0, :, 0, 0] // (shape[2] * shape[3])
        strides = set(np.diff(channels).tolist()) or {1}
        if (
            len(strides) > 1
            or min(strides) < 1
            or not np.array_equal(numbers[:, channels], moved)
        ):
            return None
        names = [
            self.add(f"{node.output[0]}/{what}", [value])
            for what, value in (
                ("starts", channels[0]),
                ("ends", channels[-1] + 1),
                ("axes", 1),
                ("steps", strides.pop()),
            )
        ]
        return helper.make_node("Slice", [tensor, *names], node.output, node.name)

    def _moved(self, node: NodeProto, numbers: Array) -> Array | None:
        if node.op_type == "Transpose":
            return np.transpose(numbers, attribute(node, "perm"))
        if node.op_type == "Reshape":
            shape = self.shapes.get(node.output[0], ())
            return numbers.reshape(shape) if shape and 0 not in shape else None
        indices = self.index.constant(node.input[1])
        axis = int(attribute(node, "axis", 0))
        return None if indices is None else np.take(numbers, indices, axis=axis)


def _keep_what_is_read(proto: onnx.ModelProto, nodes: list[NodeProto]) -> None:
    wanted = {value.name for value in proto.graph.output}
    kept = []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted.update(node.input)
    graph = proto.graph
    constants = [entry for entry in graph.initializer if entry.name in wanted]
    values = [entry for entry in graph.value_info if entry.name in wanted]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(reversed(kept))
    graph.initializer.extend(constants)
    graph.value_info.extend(values)
