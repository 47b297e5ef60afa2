"""What measurements and checks mean: saturation, failures and warnings in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from onnx import NodeProto

from graph_tools.digests import Changes
from graph_tools.quantized_graph import QuantizedGraph
from pipeline.verify.accumulators import Accumulator
from pipeline.verify.cpu import read_cpu
from pipeline.verify.interpreter import Interpreted
from pipeline.verify.proof import Saturation, TensorProof
from pipeline.verify.scales import ScaleCheck

__all__ = [
    "change_failures",
    "difference_failures",
    "find_warnings",
    "interpreter_differences",
    "interpreter_failures",
    "measure_saturation",
    "overflow_failures",
    "refusal_hint",
    "scale_failures",
]

_NAMED = 8  # names that a message lists


def measure_saturation(
    tensors: Sequence[TensorProof], accumulators: Sequence[Accumulator]
) -> Saturation:
    """Sum up what the default run changes against the optimized run."""
    pairs = [tensor.between("optimized", "default") for tensor in tensors]
    integers = [p for p, t in zip(pairs, tensors, strict=True) if t.scale is not None]
    outputs = [p for p, t in zip(pairs, tensors, strict=True) if not t.feeds]
    return Saturation(
        saturates=any(pair.differing for pair in integers),
        share=max((pair.share for pair in integers), default=0.0),
        largest_steps=max((pair.largest_steps or 0.0 for pair in integers), default=0.0),
        rows=sum(pair.rows for pair in outputs),
        top1_changes=sum(pair.top1_changes for pair in outputs),
        nodes_at_risk=tuple(entry.node for entry in accumulators if entry.may_saturate),
        cpu=read_cpu(),
    )


def difference_failures(tensors: Sequence[TensorProof]) -> Iterator[str]:
    """Say in which integer tensors the unoptimized and the optimized run differ."""
    integers = [tensor for tensor in tensors if tensor.scale is not None]
    if not integers:
        yield "no output, and nothing in front of one, holds integers: nothing was compared"
    for tensor in integers:
        pair = tensor.between("unoptimized", "optimized")
        if pair.differing:
            yield (
                f"{tensor.name}: {pair.differing:,} of {pair.elements:,} integers "
                f"({100 * pair.share:.3g} %) differ between the unoptimized and the optimized "
                f"run, by up to {pair.largest_steps:g} steps"
            )
    for tensor in tensors:
        pair = tensor.between("unoptimized", "optimized")
        if tensor.kind == "decision" and pair.differing:
            yield (
                f"{tensor.name}: {pair.differing:,} of {pair.elements:,} decisions differ "
                "between the unoptimized and the optimized run"
            )


def interpreter_differences(interpreted: Interpreted) -> Iterator[str]:
    """Say where onnxruntime and the integer interpreter part."""
    for entry in interpreted.tensors:
        for pair in (entry.unoptimized, entry.optimized):
            if pair.differing:
                yield (
                    f"{entry.name}: {pair.differing:,} of {pair.elements:,} integers "
                    f"({100 * pair.share:.3g} %) differ between the {pair.first} run and the "
                    f"integer interpreter, by up to {pair.largest_steps:g} steps"
                )
    if interpreted.traced is not None:
        yield (
            "the unoptimized run parts from the integer interpreter at "
            f"{interpreted.traced.difference}"
        )


def interpreter_failures(interpreted: Interpreted) -> Iterator[str]:
    """Say what overflows an accumulator on these images."""
    if interpreted.overflow:
        yield f"the integer interpreter overflows: {interpreted.overflow}"


def change_failures(changes: Changes | None) -> Iterator[str]:
    """Say what is not as it was written."""
    if changes is None:
        return
    for names, text in (
        (changes.tensors, "contents changed since the file was written, tensor"),
        (changes.nodes, "wiring changed since the file was written, node"),
        (changes.missing, "missing since the file was written"),
    ):
        if names:
            yield f"{text} ({len(names)}): {_list(names)}"


def scale_failures(scales: ScaleCheck) -> Iterator[str]:
    """Say which scales and zero points are wrong."""
    for names, text in (
        (scales.not_power_of_two, "not a power of two, scale"),
        (
            scales.asymmetric_zero_points,
            "zero point is neither 0 nor the middle of its type nor two below, node",
        ),
        (scales.bias_mismatches, "bias scale is not input times weight, node"),
        (scales.pair_mismatches, "dequantized with another scale than quantized, node"),
    ):
        if names:
            yield f"{text} ({len(names)}): {_list(names)}"


def overflow_failures(accumulators: Sequence[Accumulator]) -> Iterator[str]:
    """Say which nodes can overflow an int32 accumulator.

    Those with inputs of 16 bits are `find_warnings`'s: no runtime adds them in int32.
    """
    for entry in accumulators:
        if entry.overflows_int32 and entry.input_bits <= 8:
            yield f"{entry.node}: an int32 accumulator can overflow ({entry.bits} bits needed)"


def find_warnings(
    graph: QuantizedGraph, scales: ScaleCheck, accumulators: Sequence[Accumulator]
) -> Iterator[str]:
    """Say what holds but may surprise."""
    if scales.float_biases:
        yield f"biases in float: {_list(scales.float_biases)}"
    wide = [entry for entry in accumulators if entry.overflows_int32 and entry.input_bits > 8]
    if wide:
        yield (
            f"inputs of 16 bits need accumulators of up to {max(e.bits for e in wide)} bits, more "
            f"than int32: {_list([entry.node for entry in wide])}"
        )
    free = [entry.node for entry in accumulators if entry.free_scales]
    if free:
        yield (
            "scales of weights are no powers of two: requantization is no shift, and float sums "
            f"round: {_list(free)}"
        )
    inexact = [entry.node for entry in accumulators if entry.largest > 2**24]
    if inexact:
        yield (
            "sums can exceed 2^24 in the worst case, where simulation in float rounds: "
            f"{_list(inexact)}"
        )
    domains = sorted({n.domain for n in graph.nodes if n.domain not in ("", "ai.onnx")})
    if domains:
        yield f"operators outside ai.onnx, which hardware compilers refuse: {_list(domains)}"


def refusal_hint(graph: QuantizedGraph) -> str:
    """Name the pattern that onnxruntime 1.31 is known to refuse, if the graph has it.

    Its optimizer moves an int8 DequantizeLinear behind an operator that only moves data, with
    an ``output_dtype`` that its own change to uint8 then contradicts.
    """
    nodes = [
        reader.name
        for node in graph.dequantizers
        if graph.integer_type(node) == np.int8 and not graph.is_weight(node)
        for reader in graph.consumers.get(node.output[0], [])
        if graph.moves_data(reader) and not _is_quantized(graph, reader)
    ]
    return f"quantize again behind {_list(nodes)}" if nodes else ""


def _is_quantized(graph: QuantizedGraph, node: NodeProto) -> bool:
    readers = [reader for name in node.output for reader in graph.consumers.get(name, [])]
    is_output = any(name in graph.outputs for name in node.output)
    return not is_output and all(r.op_type == "QuantizeLinear" for r in readers)


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
