"""Write a plan into a graph as QuantizeLinear and DequantizeLinear nodes.

The only place that writes them. For a quantized tensor ``t`` the file holds
``t -> QuantizeLinear -> t_q -> DequantizeLinear -> t_dq``, and all that read ``t`` read ``t_dq``;
graph outputs keep their names (the operator then writes ``t_float``). Weights are integer
initializers behind a DequantizeLinear, biases int32 with the scale of input times weight. Widths
that have no integer type of their own live in the next wider one, saturated by a Clip on the
integers (`graph_tools.containers`). A constant that several operators read is written once for
each of them: onnxruntime's precision option turns int8 constants into uint8 under one fixed new
name, and fails at the second operator that reads one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from graph_tools import weights
from graph_tools.containers import Container, container_type, refuse_unsupported, width
from graph_tools.digests import stamp
from graph_tools.model import Model, initializers
from graph_tools.quantizer import Plan, QuantizedConstant, TensorQuantizer
from graph_tools.shapes import outline

__all__ = ["dequantized_name", "write_qdq"]

_TAKES_INTEGERS = frozenset(
    {"Add", "Conv", "ConvTranspose", "Div", "Gemm", "MatMul", "Mul", "Sub"}
)


def dequantized_name(tensor: str, outputs: tuple[str, ...]) -> str:
    """Name under which the written file holds the dequantized value of ``tensor``."""
    return tensor if tensor in outputs else f"{tensor}_dq"


class _Writer:
    """Collects the nodes and initializers of the written graph."""

    def __init__(self, model: Model, plan: Plan, container: Container) -> None:
        self.plan, self.outputs, self.container = plan, model.outputs, container
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, np.ndarray[Any, Any]] = {}
        self.renamed = {
            tensor: dequantized_name(tensor, model.outputs) for tensor in plan.tensors
        }

    def raw_name(self, tensor: str) -> str:
        """Name of the float value before the quantizer of ``tensor``."""
        return f"{tensor}_float" if tensor in self.outputs else tensor

    def parameters(self, name: str, quantizer: TensorQuantizer) -> tuple[str, str]:
        """Add the scale and zero point of ``name``; returns their names."""
        scale = quantizer.scale
        self.initializers[f"{name}_scale"] = scale
        midpoint = name in self.plan.midpoint
        dtype = container_type(quantizer, self.container, midpoint=midpoint)
        zero = (1 << (width(dtype) - 1) if midpoint else 0) - quantizer.lift
        self.initializers[f"{name}_zero_point"] = np.full(scale.shape, zero, dtype)
        return f"{name}_scale", f"{name}_zero_point"

    def quantize(self, tensor: str, source: str) -> None:
        """Q/DQ behind the float value ``source`` of ``tensor``."""
        quantizer = self.plan.tensors[tensor]
        scale, zero = self.parameters(tensor, quantizer)
        self.nodes.append(
            helper.make_node(
                "QuantizeLinear", [source, scale, zero], [f"{tensor}_q"], f"{tensor}_quantize"
            )
        )
        integers = f"{tensor}_q"
        zero_point = self.initializers[zero]
        dtype, middle = zero_point.dtype, int(zero_point)
        if quantizer.bits < width(dtype):
            bounds = {"min": quantizer.qmin + middle, "max": quantizer.qmax + middle}
            for side, value in bounds.items():
                self.initializers[f"{tensor}_q_{side}"] = np.asarray(value, dtype)
            self.nodes.append(
                helper.make_node(
                    "Clip",
                    [integers, f"{tensor}_q_min", f"{tensor}_q_max"],
                    [f"{tensor}_q_narrow"],
                    f"{tensor}_saturate",
                )
            )
            integers = f"{tensor}_q_narrow"
        self.nodes.append(
            helper.make_node(
                "DequantizeLinear",
                [integers, scale, zero],
                [self.renamed[tensor]],
                f"{tensor}_dequantize",
            )
        )

    def constant(self, name: str, constant: QuantizedConstant) -> str:
        """Integer initializer ``name`` behind a DequantizeLinear; returns the float name."""
        quantizer = constant.quantizer
        scale, zero = self.parameters(name, quantizer)
        stored = constant.integers - quantizer.lift
        self.initializers[f"{name}_q"] = stored.astype(
            container_type(quantizer, self.container)
        )
        node = helper.make_node(
            "DequantizeLinear",
            [f"{name}_q", scale, zero],
            [f"{name}_dq"],
            f"{name}_dequantize",
        )
        if quantizer.axis is not None:
            node.attribute.append(helper.make_attribute("axis", quantizer.axis))
        self.nodes.append(node)
        return f"{name}_dq"


def write_qdq(
    model: Model,
    plan: Plan,
    *,
    metadata: Mapping[str, str] | None = None,
    container: Container = "int8",
) -> onnx.ModelProto:
    """Write ``plan`` into ``model``'s graph.

    Args:
        model: the prepared network that the plan was made for.
        plan: quantizers and integers.
        metadata: ``metadata_props`` of the file.
        container: the smallest integer type: 8 or 4 bits.

    Returns:
        An ONNX model (opset 21, IR 10, ai.onnx operators only), with the batch that the loaded
        file declared, and digests of what it holds (`graph_tools.digests`).

    Raises:
        TargetError: onnxruntime cannot run an operator on 4-bit integers.
    """
    if container == "int4":
        refuse_unsupported(model, plan)
    writer = _Writer(model, plan, container)
    graph = model.proto.graph
    floats = initializers(model.proto)
    times_read: Counter[str] = Counter()
    float_nodes = {entry.node for entry in plan.float_nodes}
    absorbed_output = {
        node.input[0]: node.output[0] for node in graph.node if node.name in plan.absorbed
    }
    if model.input.name in plan.tensors:
        writer.quantize(model.input.name, model.input.name)
    for node in graph.node:
        if node.name in plan.absorbed:
            continue
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        takes_integers = node.op_type in _TAKES_INTEGERS and node.name not in float_nodes
        for index, name in enumerate(node.input):
            if name in plan.constants and takes_integers:
                own = f"{name}_again{times_read[name]}" if times_read[name] else name
                times_read[name] += 1
                copy.input[index] = writer.constant(own, plan.constants[name])
            elif name in floats:
                writer.initializers[name] = floats[name]
            else:
                copy.input[index] = writer.renamed.get(name, name)
        quantized = []
        for index, name in enumerate(node.output):
            tensor = absorbed_output.get(name, name)
            if tensor in plan.tensors:
                copy.output[index] = writer.raw_name(tensor)
                quantized.append((tensor, copy.output[index]))
            else:
                copy.output[index] = tensor
        writer.nodes.append(copy)
        for tensor, source in quantized:
            writer.quantize(tensor, source)
    proto = _assemble(model, writer)
    helper.set_model_props(proto, dict(metadata or {}))
    stamp(proto)
    return proto


def _assemble(model: Model, writer: _Writer) -> onnx.ModelProto:
    source = model.proto.graph
    graph = helper.make_graph(
        writer.nodes,
        source.name or "quantized",
        [_with_batch(value, model.input.batch) for value in source.input],
        [_with_batch(value, model.input.batch) for value in source.output],
        _tensors(writer.initializers),
    )
    proto = helper.make_model(
        graph,
        producer_name="onnx-zsq",
        ir_version=model.proto.ir_version,
        opset_imports=list(model.proto.opset_import),
    )
    bare = outline(proto, outside_only=True)
    inferred = onnx.shape_inference.infer_shapes(bare, data_prop=True)
    onnx.checker.check_model(inferred, full_check=True)
    proto.graph.value_info.extend(inferred.graph.value_info)
    return proto


def _tensors(values: Mapping[str, np.ndarray[Any, Any]]) -> list[onnx.TensorProto]:
    large = sum(array.nbytes for array in values.values()) > weights.MAX_INLINE
    return [weights.tensor_of(array, name, outside=large) for name, array in values.items()]


def _with_batch(value: onnx.ValueInfoProto, batch: int | None) -> onnx.ValueInfoProto:
    copy = onnx.ValueInfoProto()
    copy.CopyFrom(value)
    shape = copy.type.tensor_type.shape
    is_float = copy.type.tensor_type.elem_type == TensorProto.FLOAT
    if batch is not None and is_float and shape.dim and shape.dim[0].dim_param == "N":
        shape.dim[0].Clear()
        shape.dim[0].dim_value = batch
    return copy
