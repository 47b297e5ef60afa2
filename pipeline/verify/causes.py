"""What targets are known to compute otherwise, as far as the file and this CPU tell."""

from __future__ import annotations

import numpy as np

from graph_tools.quantized_graph import QuantizedGraph
from pipeline.target_profiles import Check
from pipeline.verify.accumulators import measure_accumulators
from pipeline.verify.cpu import read_cpu

__all__ = ["clips_unsigned", "has_rounded_branch", "known_causes"]

_SATURATION = "saturation: x64 without VNNI adds pairs of products in 16 bits"
_FUSED_ADD = (
    "it fuses convolutions with the Add behind them and skips the rounding in between; "
    "`zsq quantize --target openvino` leaves that out"
)
_SIGNED_CLIP = (
    "it takes the unsigned integers of a Clip for signed ones; "
    "`zsq quantize --signedness signed` has none"
)


def known_causes(check: Check, graph: QuantizedGraph) -> list[str]:
    """Say what a target is known to do otherwise on such a file and this CPU."""
    causes = []
    if check.fuses_add and has_rounded_branch(graph):
        causes.append(_FUSED_ADD)
    if check.clips_signed and clips_unsigned(graph):
        causes.append(_SIGNED_CLIP)
    at_risk = check.saturates and read_cpu().vnni is not True
    if at_risk and any(entry.may_saturate for entry in measure_accumulators(graph)):
        causes.append(_SATURATION)
    return causes


def has_rounded_branch(graph: QuantizedGraph) -> bool:
    """Whether a sum reads what a convolution gave to it alone, quantized in between."""
    for node in graph.nodes:
        for name in node.input if node.op_type in ("Add", "Sub", "Sum") else ():
            reader = graph.producers.get(name)
            if reader is None or reader.op_type != "DequantizeLinear":
                continue
            quantizer = graph.quantizer_of(reader)
            if quantizer is None or not all(
                len(graph.consumers[made.output[0]]) == 1 for made in (quantizer, reader)
            ):
                continue
            maker = graph.producers.get(quantizer.input[0])
            if maker is not None and maker.op_type in ("Relu", "Clip"):
                maker = graph.producers.get(maker.input[0])
            if maker is not None and maker.op_type == "Conv":
                return True
    return False


def clips_unsigned(graph: QuantizedGraph) -> bool:
    """Whether a Clip narrows unsigned integers."""
    types = {node.output[0]: graph.integer_type(node) for node in graph.quantizers}
    return any(
        np.issubdtype(types[node.input[0]], np.unsignedinteger)
        for node in graph.nodes
        if node.op_type == "Clip" and node.input[0] in types
    )
