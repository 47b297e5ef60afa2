"""Images in uint8: the same network with a float input, which takes the same numbers.

A Cast to float is exact on 0..255, so that it can be left to whoever feeds the network.
"""

from __future__ import annotations

import onnx

from graph_tools.passes import FLOAT_TYPES

__all__ = ["float_input"]

_MOVING = frozenset(("Identity", "Transpose"))


def float_input(proto: onnx.ModelProto) -> str:
    """Give a uint8 image input the type float32, in place.

    Only if nothing but Casts to float reads it, maybe behind a Transpose; otherwise the graph is
    left alone.

    Args:
        proto: with one input that is not an initializer.

    Returns:
        A note for the user; empty if nothing was changed.
    """
    graph = proto.graph
    constants = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in constants]
    if len(inputs) != 1 or inputs[0].type.tensor_type.elem_type != onnx.TensorProto.UINT8:
        return ""
    moved, waiting = set(), [inputs[0].name]
    while waiting:
        tensor = waiting.pop()
        moved.add(tensor)
        for node in graph.node:
            if any(attribute.HasField("g") for attribute in node.attribute):
                return ""  # a branch may read anything
            if tensor not in node.input:
                continue
            if node.op_type in _MOVING:
                waiting.append(node.output[0])
            elif node.op_type != "Cast" or not _to_float(node):
                return ""
    if any(value.name in moved for value in graph.output):
        return ""
    inputs[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    for value in [value for value in graph.value_info if value.name in moved]:
        graph.value_info.remove(value)
    return f"input {inputs[0].name} is uint8: taken as float32, pixels in 0..255"


def _to_float(node: onnx.NodeProto) -> bool:
    return any(a.name == "to" and a.i in FLOAT_TYPES for a in node.attribute)
