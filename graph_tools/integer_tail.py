"""The end of a graph that decides: ArgMax, TopK, NonMaxSuppression, comparisons, casts.

No gradient passes through such operators, their shapes may depend on the data, and what they
compute is not quantized. They and all behind them are the *tail*, unless convolutions or matrix
products follow. The rest of the graph ends at the tensors that the tail reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx
from onnx import TensorProto

__all__ = ["IntegerTail", "find_integer_tail", "is_float", "tensor_types"]

_WEIGHTED = frozenset(("Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul"))
_SELECTING = frozenset(("Compress", "NonMaxSuppression", "NonZero", "TopK", "Unique"))
_SHAPES = frozenset(("Shape", "Size"))


@dataclass(frozen=True, kw_only=True)
class IntegerTail:
    """Where a graph stops to compute and starts to decide.

    Attributes:
        nodes: names of the tail's nodes, in graph order.
        ends: tensors that the rest of the graph is there for: graph outputs that the tail does
            not make, and what the tail reads.
    """

    nodes: tuple[str, ...]
    ends: tuple[str, ...]

    def note(self, proto: onnx.ModelProto) -> str:
        """Say in words what is cut off, for the user."""
        types = {node.name: node.op_type for node in proto.graph.node}
        operators = sorted({types[name] for name in self.nodes})
        return (
            f"{len(self.nodes)} operator(s) that decide at the end of the graph "
            f"({', '.join(operators)}) are left as they are; calibrated are the tensors they "
            f"read: {', '.join(self.ends)}"
        )


def tensor_types(proto: onnx.ModelProto) -> dict[str, int]:
    """Return the element types of the tensors of an annotated graph."""
    graph = proto.graph
    return {
        value.name: value.type.tensor_type.elem_type
        for value in (*graph.input, *graph.value_info, *graph.output)
    }


def is_float(name: str, types: dict[str, int]) -> bool:
    """Whether a tensor is float32, or of unknown type."""
    return types.get(name, 0) in (TensorProto.FLOAT, TensorProto.UNDEFINED)


def find_integer_tail(proto: onnx.ModelProto) -> IntegerTail:
    """Find the tail of a graph.

    Args:
        proto: normal form, nodes sorted and named, types annotated.
    """
    graph = proto.graph
    types = tensor_types(proto)
    outputs = [value.name for value in graph.output]
    live = {value.name for value in graph.input}  # floats that depend on the image by value
    decided: set[str] = set()  # all that depends on a decision
    candidates = []
    for node in graph.node:
        reads_live = not live.isdisjoint(node.input) and node.op_type not in _SHAPES
        decides = reads_live and (
            node.op_type in _SELECTING or not all(is_float(o, types) for o in node.output if o)
        )
        if decides or not decided.isdisjoint(node.input):
            candidates.append(node)
            decided.update(name for name in node.output if name)
        if reads_live:
            live.update(o for o in node.output if o and is_float(o, types))
    wanted: set[str] = set()  # by convolutions and matrix products
    leading = set()
    for node in reversed(graph.node):
        if node.op_type in _WEIGHTED or not wanted.isdisjoint(node.output):
            leading.add(node.name)
            wanted.update(node.input)
    tail = [node for node in candidates if node.name not in leading]
    made = {name for node in tail for name in node.output}
    read = [name for node in tail for name in node.input if name in live and name not in made]
    ends = dict.fromkeys([*(name for name in outputs if name not in made), *read])
    return IntegerTail(nodes=tuple(node.name for node in tail), ends=tuple(ends))
