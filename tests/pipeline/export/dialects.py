"""Evaluate exported dialects: their quantizers, written out in plain operators, run in onnxruntime.

Independent of what writes them: only the definitions of the two formats are used here.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

from graph_tools.integer import IntegerNetwork
from graph_tools.quantized_graph import QuantizedGraph

QUANTIZERS = ("ActivationPOTQuantizer", "Quant", "WeightsPOTQuantizer")


def _parameters(node, constants):
    """Scale (an array that broadcasts), lowest and highest integer."""
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "Quant":
        scale, zero, bits = (constants[name] for name in node.input[1:])
        assert not zero.any()
        assert given["rounding_mode"] == b"ROUND"
        bits, narrow = int(bits), given["narrow"]
    else:
        bits, narrow = given["num_bits"], 0
        if node.op_type == "WeightsPOTQuantizer":
            threshold = constants[node.input[1]]
            shape = [1] * constants[node.input[0]].ndim
            if given["per_channel"]:
                shape[given["channel_axis"]] = -1
            threshold = threshold.reshape(shape)
        else:
            threshold = np.float32(given["threshold"])
        assert np.all(np.frexp(threshold)[0] == 0.5)
        scale = threshold / 2.0 ** (bits - given["signed"])
    low = -(2 ** (bits - 1)) + narrow if given["signed"] else 0
    high = 2 ** (bits - 1) - 1 if given["signed"] else 2**bits - 1 - narrow
    return np.asarray(scale, np.float32), low, high


def run_dialect(proto: onnx.ModelProto, image: np.ndarray) -> dict[str, np.ndarray]:
    """Outputs and every rounded activation of one image."""
    plain = onnx.ModelProto()
    plain.CopyFrom(proto)
    constants = {entry.name: numpy_helper.to_array(entry) for entry in proto.graph.initializer}
    nodes, rounded = [], []
    for node in proto.graph.node:
        if node.op_type not in QUANTIZERS:
            nodes.append(node)
            continue
        scale, low, high = _parameters(node, constants)
        name = node.output[0]
        for what, value in (("s", scale), ("l", low), ("h", high)):
            plain.graph.initializer.append(
                numpy_helper.from_array(np.asarray(value, np.float32), f"{name}!{what}")
            )
        nodes += [
            helper.make_node("Div", [node.input[0], f"{name}!s"], [f"{name}!1"]),
            helper.make_node("Round", [f"{name}!1"], [f"{name}!2"]),
            helper.make_node("Clip", [f"{name}!2", f"{name}!l", f"{name}!h"], [f"{name}!3"]),
            helper.make_node("Mul", [f"{name}!3", f"{name}!s"], [name]),
        ]
        if node.input[0] not in constants:
            rounded.append(name)
    del plain.graph.node[:], plain.graph.value_info[:], plain.graph.output[:]
    plain.graph.node.extend(nodes)
    names = list(dict.fromkeys([*rounded, *(entry.name for entry in proto.graph.output)]))
    plain.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    kept = [entry for entry in plain.opset_import if entry.domain in ("", "ai.onnx")]
    del plain.opset_import[:]
    plain.opset_import.extend(kept)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        plain.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    values = session.run(names, {proto.graph.input[0].name: image})
    return dict(zip(names, values, strict=True))


def differing(
    quantized: onnx.ModelProto, found: dict[str, np.ndarray], image: np.ndarray
) -> tuple[int, int]:
    """Integers of a run that differ from the interpreter's on the quantized file, of how many."""
    graph = QuantizedGraph(quantized)
    integers = IntegerNetwork(quantized).run(image).integers
    different = total = 0
    for node in graph.dequantizers:
        name = node.output[0]
        if name not in found or node.input[0] not in integers:
            continue
        expected = integers[node.input[0]] - int(graph.constant(node.input[2]))
        steps = found[name] / float(graph.scale(node))
        different += int((steps != expected).sum())
        total += expected.size
    return different, total
