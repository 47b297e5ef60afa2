"""What targets are known to compute otherwise, as far as the file and this CPU tell."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np

from graph_tools.integer import FirstDifference
from graph_tools.quantized_graph import QuantizedGraph, attribute
from pipeline.target_profiles import Check
from pipeline.verify.accumulators import measure_accumulators
from pipeline.verify.cpu import read_cpu

__all__ = [
    "FLOAT_OPERATOR",
    "INPUT_ROUNDING",
    "QUIRKS",
    "float_operator",
    "has_rounded_branch",
    "is_input_rounding",
    "known_causes",
]

INPUT_ROUNDING = (
    "it divides pixels by the step in other float arithmetic: those next to the middle of two "
    "steps round the other way"
)

FLOAT_OPERATOR = (
    "{} has no exact integer form: the last digits of its floats depend on who computes them"
)

_SATURATION = "saturation: x64 without VNNI adds pairs of products in 16 bits"
_FUSED_ADD = (
    "it fuses convolutions with the Add behind them and skips the rounding in between; "
    "`zsq quantize --target openvino` leaves that out"
)


def known_causes(check: Check, graph: QuantizedGraph) -> list[str]:
    """Say what a target is known to do otherwise on such a file and this CPU."""
    causes = []
    if check.fuses_add and has_rounded_branch(graph):
        causes.append(_FUSED_ADD)
    causes += [
        text for name, (found, text) in QUIRKS.items() if name in check.quirks and found(graph)
    ]
    at_risk = check.saturates and read_cpu().vnni is not True
    if at_risk and any(entry.may_saturate for entry in measure_accumulators(graph)):
        causes.append(_SATURATION)
    return causes


def is_input_rounding(first: FirstDifference | None, graph: QuantizedGraph) -> bool:
    """Whether what differs first is the image's own quantizer, by a step."""
    inputs = {entry.name for entry in graph.inputs}
    made = {node.output[0] for node in graph.quantizers if node.input[0] in inputs}
    return first is not None and first.tensor in made and first.largest_steps <= 1


def float_operator(
    first: FirstDifference | None, graph: QuantizedGraph, float_nodes: Collection[str]
) -> str:
    """The operator where a difference begins, by a step, if the interpreter computes it in float.

    Nodes that only move its values may lie in between; "" if there is no such operator.
    """
    node = None
    if first is not None and first.largest_steps <= 1:
        node = next((node for node in graph.nodes if node.name == first.node), None)
    while node is not None and graph.moves_data(node):
        node = graph.producers.get(node.input[0])
    return "" if node is None or node.name not in float_nodes else node.op_type


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


def _clips_unsigned(graph: QuantizedGraph) -> bool:
    types = {node.output[0]: graph.integer_type(node) for node in graph.quantizers}
    return any(
        np.issubdtype(types[node.input[0]], np.unsignedinteger)
        for node in graph.nodes
        if node.op_type == "Clip" and node.input[0] in types
    )


def _pads_average(graph: QuantizedGraph) -> bool:
    for node in graph.nodes:
        if node.op_type != "AveragePool" or not attribute(node, "count_include_pad", 0):
            continue
        source = graph.dequantizer(node.input[0])
        zero = None
        if source is not None and len(source.input) > 2:
            zero = graph.constant(source.input[2])
        if zero is not None and np.any(zero) and any(attribute(node, "pads", [])):
            return True
    return False


def _multiplies_constant(graph: QuantizedGraph) -> bool:
    for node in graph.nodes:
        sources = [
            graph.producers.get(n) for n in node.input if node.op_type in ("Mul", "Div")
        ]
        if any(
            source is not None
            and source.op_type == "DequantizeLinear"
            and graph.is_constant(source.input[0])
            for source in sources
        ):
            return True
    return False


def _signs_concat(graph: QuantizedGraph) -> bool:
    return any(
        reader.op_type == "QuantizeLinear" and graph.integer_type(reader).name == "int8"
        for node in graph.nodes
        if node.op_type == "Concat"
        for reader in graph.consumers.get(node.output[0], [])
    )


def _has_hard_sigmoid(graph: QuantizedGraph) -> bool:
    return any(node.op_type in ("HardSigmoid", "HardSwish") for node in graph.nodes)


def _has_symmetric_integers(graph: QuantizedGraph) -> bool:
    for node in (*graph.quantizers, *graph.dequantizers):
        low, high = graph.limits(node)
        zero = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        middle = (low + high + 1) // 2
        if high - low < 2**31 and np.any((0 if zero is None else zero) == np.int64(middle)):
            return True
    return False


def _has_swish(graph: QuantizedGraph) -> bool:
    """Whether a tensor is multiplied with its own Sigmoid."""
    for node in graph.nodes:
        if node.op_type != "Sigmoid":
            continue
        made = {node.output[0]}
        for reader in graph.consumers.get(node.output[0], []):  # through its quantizers
            made |= {
                name for n in graph.consumers.get(reader.output[0], []) for name in n.output
            }
        for product in graph.nodes:
            if product.op_type == "Mul" and node.input[0] in product.input:
                if made & set(product.input):
                    return True
    return False


def _resizes_linearly(graph: QuantizedGraph) -> bool:
    return any(
        node.op_type == "Resize" and attribute(node, "mode", b"nearest") != b"nearest"
        for node in graph.nodes
    )


QUIRKS: dict[str, tuple[Callable[[QuantizedGraph], bool], str]] = {
    "clips-signed": (
        _clips_unsigned,
        "it takes the unsigned integers of a Clip for signed ones; "
        "`zsq quantize --signedness signed` has none",
    ),
    "pads-raw": (
        _pads_average,
        "it pads averages with the integer 0 in place of the zero point; "
        "`zsq quantize --zero-point zero` has no other",
    ),
    "folds-factors": (
        _multiplies_constant,
        "it divides a quantizer's range by the constant that is multiplied in front of it, so "
        "that values halfway between two steps round otherwise",
    ),
    "signs-concat": (
        _signs_concat,
        "it computes a Concat wrongly whose result is signed and goes into a convolution",
    ),
    "contracts": (
        _has_hard_sigmoid,
        "it rounds a product and the sum behind it once, so that HardSigmoid and HardSwish may be "
        "a step apart",
    ),
    "stretches-symmetric": (
        _has_symmetric_integers,
        "it thinks of integers around the middle of their type as -127 to 127 and takes 128/127 of "
        "their scale; `zsq quantize --target rknn` writes none",
    ),
    "fuses-swish": (
        _has_swish,
        "it makes one operator of a Sigmoid and the product behind it and skips the rounding in "
        "between",
    ),
    "resizes": (
        _resizes_linearly,
        "it interpolates in steps of its own where a Resize is linear",
    ),
}
"""Further things that a target computes otherwise, by the name that its profile gives: where the
file has them, and what to say of it."""
