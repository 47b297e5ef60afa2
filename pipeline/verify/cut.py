"""A copy of a QDQ model that ends at chosen integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx
from onnx import NodeProto, TensorProto, helper

from graph_tools.quantized_graph import QuantizedGraph

__all__ = ["End", "cut_at"]


@dataclass(frozen=True, kw_only=True)
class End:
    """One output of a cut model.

    Attributes:
        integers: the tensor of integers it was cut at.
        output: name of the dequantized output in the cut model.
        tensor: the tensor that was quantized into these integers.
        scale: size of one step.
    """

    integers: str
    output: str
    tensor: str
    scale: float | None


def cut_at(
    graph: QuantizedGraph, integers: Sequence[str]
) -> tuple[onnx.ModelProto, tuple[End, ...]]:
    """Copy the model up to ``integers``, each read by a DequantizeLinear that is an output.

    Nothing that comes after is kept, so that onnxruntime sees the same pattern as at the end
    of a network whose outputs are quantized.

    Args:
        graph: the whole model.
        integers: tensors that a DequantizeLinear reads.
    """
    wanted = graph.leading_to(integers)
    readers = {node.input[0]: node for node in graph.dequantizers}

    cut = onnx.ModelProto()
    cut.CopyFrom(graph.proto)
    del cut.graph.node[:], cut.graph.output[:], cut.graph.value_info[:]
    cut.graph.node.extend(node for node in graph.nodes if id(node) in wanted)
    ends = []
    for index, name in enumerate(integers):
        output = f"{name}/cut{index}"
        reader = NodeProto()
        reader.CopyFrom(readers[name])
        reader.name, reader.output[0] = f"{reader.name}/cut{index}", output
        cut.graph.node.append(reader)
        cut.graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, None))
        quantizer = graph.quantizer_of(reader)
        scale = graph.scale(reader)
        ends.append(
            End(
                integers=name,
                output=output,
                tensor=quantizer.input[0] if quantizer is not None else name,
                scale=float(scale.reshape(-1)[0])
                if scale is not None and scale.size == 1
                else None,
            )
        )
    used = {name for node in cut.graph.node for name in node.input}
    kept = [entry for entry in cut.graph.initializer if entry.name in used]
    del cut.graph.initializer[:]
    cut.graph.initializer.extend(kept)
    return cut, tuple(ends)
