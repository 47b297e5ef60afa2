"""Why onnxruntime leaves a node of a QDQ graph in float, as far as the graph tells."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from graph_tools.quantized_graph import QuantizedGraph
from pipeline.verify.scales import bias_fits

__all__ = ["HAS_INTEGER_KERNEL", "float_reason"]

# Operators that onnxruntime's CPU provider has an 8-bit kernel for, from a QDQ graph.
HAS_INTEGER_KERNEL = frozenset(
    "Add AveragePool Concat Conv Gemm GlobalAveragePool LeakyRelu MatMul Mul Sigmoid Softmax "
    "Where".split()
)
_EIGHT_BITS = ("int8", "uint8")


def float_reason(graph: QuantizedGraph, node: NodeProto) -> str:
    """Say why ``node`` has no integer kernel, from the file's own graph."""
    moves = graph.moves_data(node)
    if node.op_type not in HAS_INTEGER_KERNEL and not moves:
        return f"onnxruntime has no integer kernel for {node.op_type}"
    return (
        _input_reason(graph, node)
        or _output_reason(graph, node)
        or _scale_reason(graph, node)
        or _signed_reason(graph, node)
        or (f"onnxruntime moves this data in float: {node.op_type}" if moves else "unknown")
    )


def _input_reason(graph: QuantizedGraph, node: NodeProto) -> str:
    bias = node.op_type in {"Conv", "Gemm", "ConvTranspose"}
    for position, name in enumerate(node.input):
        source = graph.producers.get(name)
        if not name or (graph.moves_data(node) and position and node.op_type != "Concat"):
            continue
        if source is None or source.op_type != "DequantizeLinear":
            through = graph.dequantizer(name)
            if bias and position == 2:
                return f"its bias '{name}' is not quantized"
            if source is not None and through is not None:
                return f"{source.op_type} lies between its DequantizeLinear and it"
            return f"its input '{name}' is not quantized"
        kind = graph.integer_type(source).name
        if kind not in _EIGHT_BITS and not (bias and position == 2 and kind == "int32"):
            return f"onnxruntime has no integer kernel for {kind}"
    return ""


def _output_reason(graph: QuantizedGraph, node: NodeProto) -> str:
    name, between, clip = node.output[0], "", None
    while True:
        readers = graph.consumers.get(name, [])
        if name in graph.outputs:
            return f"its output '{name}' leaves the graph in float"
        if len(readers) != 1:
            return f"its output '{name}' is read by {len(readers)} nodes before a quantizer"
        reader = readers[0]
        if reader.op_type == "QuantizeLinear":
            break
        if between or reader.op_type not in {"Relu", "Clip"}:
            return f"its output goes to {reader.op_type} before a quantizer"
        between, name, clip = reader.op_type, reader.output[0], reader
    kind = graph.integer_type(reader).name
    if kind not in _EIGHT_BITS:
        return f"onnxruntime has no integer kernel for {kind}"
    if between == "Relu" and kind == "int8":
        return f"Relu before the signed '{reader.output[0]}', which does not imply it"
    if between == "Clip" and clip is not None and not _clip_is_implied(graph, clip, reader):
        return f"the bounds of its Clip are not those of the quantizer '{reader.output[0]}'"
    return ""


def _scale_reason(graph: QuantizedGraph, node: NodeProto) -> str:
    if not bias_fits(graph, node):
        return "its bias scale is not input times weight"
    source = graph.producers.get(node.input[0])
    reader = next(iter(graph.consumers.get(node.output[0], [])), None)
    if graph.moves_data(node) and node.op_type != "Concat" and source and reader:
        before, after = graph.scale(source), graph.scale(reader)
        if before is not None and after is not None and not np.array_equal(before, after):
            return "it moves data, but its input and its output have different scales"
    return ""


def _clip_is_implied(graph: QuantizedGraph, clip: NodeProto, quantizer: NodeProto) -> bool:
    scale = graph.scale(quantizer)
    if scale is None:
        return False
    bounds = [graph.constant(name) if name else None for name in [*clip.input, "", ""][1:3]]
    low, high = (limit * scale.max() for limit in graph.limits(quantizer))
    return bool(
        (bounds[0] is None or bounds[0] <= low) and (bounds[1] is None or bounds[1] >= high)
    )


def _signed_reason(graph: QuantizedGraph, node: NodeProto) -> str:
    """An int8 tensor becomes uint8, as all others, only if one DequantizeLinear reads it."""
    nearby = [graph.producers.get(name) for name in node.input]
    quantizers = [
        graph.quantizer_of(source)
        for source in nearby
        if source is not None
        and source.op_type == "DequantizeLinear"
        and not graph.is_weight(source)
    ]
    reader = next(iter(graph.consumers.get(node.output[0], [])), None)
    if reader is not None and reader.op_type in {"Relu", "Clip"}:
        reader = next(iter(graph.consumers.get(reader.output[0], [])), None)
    for quantizer in (*quantizers, reader):
        if quantizer is None or quantizer.op_type != "QuantizeLinear":
            continue
        if graph.integer_type(quantizer) != np.int8:
            continue
        direct = graph.consumers.get(quantizer.output[0], [])
        readers = sum(
            len(graph.consumers.get(r.output[0], [])) + (r.output[0] in graph.outputs) or 1
            for r in direct
        )
        tensor = f"the int8 tensor '{quantizer.input[0]}'"
        if any(r.op_type == "Clip" for r in direct):
            return f"{tensor} is saturated to fewer bits by a Clip on integers"
        if readers > 1:
            return (
                f"{tensor} has {readers} readers, and onnxruntime on x64 has no kernel from "
                "int8 to uint8 or back"
            )
    return ""
