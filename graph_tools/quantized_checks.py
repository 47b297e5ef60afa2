"""Refuse quantized files whose parts do not fit together, before anything computes with them.

onnx's checker and onnxruntime's loader let several of these pass.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx

from graph_tools.errors import ModelError
from graph_tools.limits import MAX_TENSOR
from graph_tools.quantized_graph import QuantizedGraph

__all__ = ["check_quantized"]

_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")


def check_quantized(proto: onnx.ModelProto, *, where: str) -> None:
    """Check inputs, quantizers and bounds.

    Args:
        proto: the file.
        where: the file, for messages.

    Raises:
        ModelError: a graph input with a dimension that is negative or beyond all memory; a node
            without outputs; a scale or zero point without values, or of different numbers of
            values; another type than integers; a scale that is zero or not finite; a bound of a
            Clip that is no single number.
    """
    _check_nodes(proto, where)
    graph = QuantizedGraph(proto)
    for problem in (*_inputs(graph), *_nodes(graph)):
        raise ModelError(problem, where=where, hint="export or quantize the model again")


def _check_nodes(proto: onnx.ModelProto, where: str) -> None:
    """Ask onnx's checker about each node: its shape inference crashes on some it refuses."""
    context = onnx.checker.C.CheckerContext()
    if not 0 <= proto.ir_version < 2**31:
        raise ModelError(f"has IR version {proto.ir_version}", where=where)
    context.ir_version = proto.ir_version
    versions = {entry.domain: entry.version for entry in proto.opset_import}
    for domain, version in versions.items():
        if not 0 < version < 2**31:
            raise ModelError(
                f"imports opset {version} of domain {domain or 'ai.onnx'}", where=where
            )
    context.opset_imports = versions
    for index, node in enumerate(proto.graph.node):
        if node.domain not in ("", "ai.onnx"):
            continue
        try:
            onnx.checker.check_node(node, context)
        except onnx.checker.ValidationError as error:
            raise ModelError(
                f"{node.op_type} node '{node.name or index}' is none that onnx knows "
                f"({str(error).splitlines()[0]})",
                where=where,
                hint="export or quantize the model again",
            ) from error


def _inputs(graph: QuantizedGraph) -> Iterator[str]:
    for entry in graph.inputs:
        elements = 1
        for dim in entry.type.tensor_type.shape.dim:
            if dim.dim_value < 0:
                yield f"input '{entry.name}' has a dimension of {dim.dim_value}"
            elements *= max(1, dim.dim_value)
        if elements > MAX_TENSOR:
            yield f"input '{entry.name}' has {elements} values"


def _nodes(graph: QuantizedGraph) -> Iterator[str]:
    for index, node in enumerate(graph.nodes):
        name = f"{node.op_type} node '{node.name or index}'"
        if not any(node.output):
            yield f"{name} has no output"
        elif node.op_type == "Clip":
            bounds = [graph.constant(text) for text in node.input[1:3] if text]
            if any(bound is not None and bound.size != 1 for bound in bounds):
                yield f"{name} has a bound that is no single number"
        elif node.op_type in _QUANTIZERS:
            yield from (f"{name} has {what}" for what in _quantizer(graph, node))


def _quantizer(graph: QuantizedGraph, node: onnx.NodeProto) -> Iterator[str]:
    scale = graph.constant(node.input[1]) if len(node.input) > 1 else None
    zero_point = (
        graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    )
    kind = graph.integer_type(node).name
    if not kind.removeprefix("u").startswith("int"):
        yield f"{kind} in place of integers"
    if scale is not None and not np.all(np.isfinite(scale) & (scale != 0)):
        yield "a scale that is zero or not finite"
    for what, values in (("scale", scale), ("zero point", zero_point)):
        if values is not None and not values.size:
            yield f"a {what} without values"
    if scale is not None and zero_point is not None and scale.size != zero_point.size:
        yield f"a scale of shape {scale.shape} and a zero point of shape {zero_point.shape}"
