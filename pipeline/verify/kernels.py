"""Which nodes onnxruntime turned into integer kernels, and why the others stayed in float.

The graph as optimized by onnxruntime keeps the names of the nodes it replaces (``conv_1`` or
``conv_1_token_5`` becomes a QLinearConv); activations that a quantizer does are gone.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import NodeProto

from graph_tools.quantized_graph import QuantizedGraph
from pipeline.verify.reasons import HAS_INTEGER_KERNEL, float_reason

__all__ = ["Kernels", "NodeKernel", "name_nodes", "read_kernels"]

_INTEGER_KERNEL = re.compile(r"QLinear|QGemm|ConvInteger|MatMulInteger|DynamicQuantize")
_PLUMBING = frozenset({"QuantizeLinear", "DequantizeLinear", "Constant"})


@dataclass(frozen=True, kw_only=True)
class NodeKernel:
    """What became of one node of the file.

    Attributes:
        node: its name.
        op_type: its operator.
        kernel: the operator that does its work in the optimized graph; "" when it is gone
            because a quantizer or another kernel does its work.
        integer: it works on integers (or is gone).
        reason: why it stays in float, as far as known; "" for integer nodes.
    """

    node: str
    op_type: str
    kernel: str
    integer: bool
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the fields."""
        return dict(vars(self))


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Kernels of the optimized graph.

    Attributes:
        nodes: every node of the file that is neither Q, DQ nor Constant, in graph order.
        counts: integer kernels in the optimized graph, by operator.
    """

    nodes: tuple[NodeKernel, ...]
    counts: dict[str, int]

    @property
    def floats(self) -> tuple[NodeKernel, ...]:
        """Nodes that stay in float."""
        return tuple(node for node in self.nodes if not node.integer)

    @property
    def all_integer(self) -> bool:
        """No node stays in float."""
        return not self.floats

    def to_dict(self) -> dict[str, Any]:
        """Plain data.

        Keys: ``integer_kernels`` (counts by operator), ``num_nodes``, ``num_integer``,
        ``num_absorbed``, ``all_integer``, ``float`` (node, op_type, kernel, reason).
        """
        absorbed = sum(1 for node in self.nodes if node.integer and not node.kernel)
        return {
            "integer_kernels": dict(sorted(self.counts.items())),
            "num_nodes": len(self.nodes),
            "num_integer": len(self.nodes) - len(self.floats) - absorbed,
            "num_absorbed": absorbed,
            "all_integer": self.all_integer,
            "float": [
                {key: value for key, value in vars(node).items() if key != "integer"}
                for node in self.floats
            ],
        }


def name_nodes(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which every node has a name of its own."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    taken: set[str] = set()
    for index, node in enumerate(copy.graph.node):
        name = node.name or f"{node.op_type}_{index}"
        while name in taken:
            name = f"{name}_{index}"
        node.name = name
        taken.add(name)
    return copy


def read_kernels(graph: QuantizedGraph, optimized: onnx.ModelProto) -> Kernels:
    """Find in the optimized graph what became of each node.

    Args:
        graph: the file, all nodes named (`name_nodes`).
        optimized: what onnxruntime wrote for it.
    """
    integers = _integer_tensors(optimized)
    by_name: dict[str, NodeProto] = {}
    counts: Counter[str] = Counter()
    for node in optimized.graph.node:
        by_name[node.name] = node
        by_name.setdefault(_plain(node.name), node)
        if node.op_type not in _PLUMBING and _is_integer(node, integers):
            counts[node.op_type] += 1
    by_output = {name: node for node in optimized.graph.node for name in node.output}

    found = []
    for node in graph.nodes:
        if node.op_type in _PLUMBING:
            continue
        kernel = by_name.get(node.name) or by_output.get(node.output[0])
        integer = kernel is None or _is_integer(kernel, integers)
        if kernel is None and node.op_type in HAS_INTEGER_KERNEL:
            integer = False  # folded into something that cannot be told
        found.append(
            NodeKernel(
                node=node.name,
                op_type=node.op_type,
                kernel=kernel.op_type if kernel is not None else "",
                integer=integer,
                reason="" if integer else float_reason(graph, node),
            )
        )
    return Kernels(nodes=tuple(found), counts=dict(counts))


def _plain(name: str) -> str:
    """Undo what onnxruntime does to the name of a node it replaces."""
    return re.sub(r"(_token_\d+|_nchwc)+$", "", name.removeprefix("fused "))


def _is_integer(node: NodeProto, integers: set[str]) -> bool:
    if _INTEGER_KERNEL.match(node.op_type):
        return True
    is_movement = node.op_type not in _PLUMBING and bool(node.input)
    return is_movement and node.input[0] in integers


def _integer_tensors(model: onnx.ModelProto) -> set[str]:
    """Names of quantized activations; the optimized file does not store tensor types."""
    integers: set[str] = set()
    for node in _ordered(model):
        moves = node.op_type not in _PLUMBING and node.input and node.input[0] in integers
        makes = node.op_type == "QuantizeLinear" or node.op_type.startswith("QLinear")
        if makes or moves or (node.op_type == "QGemm" and len(node.input) == 9):
            integers.update(node.output)
    return integers


def _ordered(model: onnx.ModelProto) -> list[NodeProto]:
    producers = {name: node for node in model.graph.node for name in node.output if name}
    done: set[str] = set()
    order: list[NodeProto] = []
    stack = [(node, False) for node in reversed(model.graph.node)]
    while stack:
        node, ready = stack.pop()
        key = node.output[0]
        if ready:
            order.append(node)
        elif key not in done:
            done.add(key)
            stack.append((node, True))
            stack += [(producers[name], False) for name in node.input if name in producers]
    return order
