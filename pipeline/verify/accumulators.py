"""Worst-case accumulators of the weighted nodes, from the stored integers alone.

For one output channel with weights w, bias b and inputs in [low, high], every partial sum, in
any order, lies between ``sum(min(w*low, w*high, 0)) + min(b, 0)`` and ``sum(max(w*low, w*high,
0)) + max(b, 0)``. The larger magnitude decides whether int32 can overflow and whether float32,
which holds all integers up to 2**24, adds them exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import NodeProto

from graph_tools.errors import IntegerOverflowError
from graph_tools.quantized_graph import QuantizedGraph, attribute
from pipeline.verify.scales import is_power_of_two

__all__ = ["Accumulator", "measure_accumulators", "refuse_overflow"]

_PAIR_LIMIT = 2**15 - 1  # of the sum of two products


@dataclass(frozen=True, kw_only=True)
class Accumulator:
    """The worst case of one weighted node, over its output channels.

    Attributes:
        node: the node's name.
        op_type: its operator.
        largest: largest magnitude that any partial sum can have.
        bits: width of a two's complement accumulator that holds it.
        simulation_exact: float32 arithmetic on the dequantized values is exact (largest at
            most 2**24, scales powers of two), so an unoptimized float run is a true reference.
        free_scales: the scales of its weight are no powers of two: requantization is no shift.
        overflows_int32: an int32 accumulator can overflow.
        input_bits: width of the type of its input.
        may_saturate: 8-bit kernels that add pairs of products in 16 bits (x64 without VNNI)
            could saturate: two weights of one channel and one sign exceed 128 together.
    """

    node: str
    op_type: str
    largest: int
    bits: int
    simulation_exact: bool
    overflows_int32: bool
    may_saturate: bool
    free_scales: bool = False
    input_bits: int = 8

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the fields."""
        return dict(vars(self))


def measure_accumulators(graph: QuantizedGraph) -> Iterator[Accumulator]:
    """Yield the worst case of every weighted node with a quantized input and weight."""
    for node in graph.weighted():
        data = graph.dequantizer(node.input[0])
        if data is None or graph.is_weight(data):
            continue
        stored = graph.constant(graph.producers[node.input[1]].input[0])
        if stored is None:
            continue
        if stored.dtype.kind not in "iu":  # numpy knows 4-bit integers as extensions only
            stored = stored.astype(np.int64)
        scale = graph.scale(graph.producers[node.input[1]])
        free = scale is None or not is_power_of_two(scale)
        zero = graph.zero_points(graph.producers[node.input[1]], stored.shape)
        # Where they do not fit, onnxruntime refuses the file.
        weights = _by_output_channel(node, stored if zero is None else stored - zero)
        low, high = graph.integer_range(data)
        span = high - low
        bias = _bias(graph, node, len(weights))
        rising = np.maximum(weights, 0).sum(axis=1, dtype=np.int64)
        falling = np.minimum(weights, 0).sum(axis=1, dtype=np.int64)
        low, high = min(low, 0), max(high, 0)  # a product may be missing at a border
        bottom = rising * low + falling * high + np.minimum(bias, 0)
        top = rising * high + falling * low + np.maximum(bias, 0)
        largest = int(max(top.max(initial=0), -bottom.min(initial=0)))
        bits = 1 + max(
            int(top.max(initial=0)).bit_length(), (-int(bottom.min()) - 1).bit_length()
        )
        yield Accumulator(
            node=node.name,
            op_type=node.op_type,
            largest=largest,
            bits=bits,
            simulation_exact=largest <= 2**24 and not free,
            free_scales=free,
            overflows_int32=bits > 32,
            may_saturate=_may_saturate(_by_output_channel(node, stored), span),
            input_bits=int(graph.integer_type(data).name.lstrip("uint")),
        )


def refuse_overflow(graph: QuantizedGraph) -> None:
    """Refuse a network whose 32-bit sums can overflow, whatever the image.

    Inputs of 16 bits are let through: no runtime adds their products in 32 bits, and the proof
    reports what they need.

    Raises:
        IntegerOverflowError: names the layer that needs most, and what to do.
    """
    over = [e for e in measure_accumulators(graph) if e.overflows_int32 and e.input_bits <= 8]
    if over:
        worst = max(over, key=lambda entry: entry.bits)
        more = f", and {len(over) - 1} more layers overflow" if len(over) > 1 else ""
        raise IntegerOverflowError(
            f"its sums can need {worst.bits} bits, int32 overflows{more}",
            where=f"{worst.op_type} {worst.node}",
            hint=f"fewer bits there make it fit: --bits '{worst.node}=W4'",
        )


def _by_output_channel(node: NodeProto, weight: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Reshape to [output channels, products summed for one output element]."""
    if node.op_type == "Conv":
        return weight.reshape(len(weight), -1)
    if node.op_type == "ConvTranspose":  # [in, out / groups, kh, kw]
        groups = int(attribute(node, "group", 1))
        grouped = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        return np.moveaxis(grouped, 2, 1).reshape(groups * weight.shape[1], -1)
    if node.op_type == "Gemm" and attribute(node, "transB", 0):
        return weight
    return (
        np.moveaxis(weight, -2, -1).reshape(-1, weight.shape[-2])
        if weight.ndim > 1
        else weight[None]
    )


def _bias(graph: QuantizedGraph, node: NodeProto, channels: int) -> np.ndarray[Any, Any]:
    if len(node.input) > 2 and (source := graph.producers.get(node.input[2])) is not None:
        stored = (
            graph.constant(source.input[0]) if source.op_type == "DequantizeLinear" else None
        )
        if stored is not None and stored.size in (1, channels):
            return np.broadcast_to(stored.astype(np.int64).reshape(-1), (channels,))
    return np.zeros(channels, np.int64)


def _may_saturate(weights: np.ndarray[Any, Any], span: int) -> bool:
    # The kernels take activations as uint8, int8 ones shifted by their zero point.
    largest = max(int(weights.max(initial=0)), -int(weights.min(initial=0)))
    if weights.shape[1] < 2 or span > 255 or largest > 128:
        return False
    ordered = np.sort(weights, axis=1)
    positive = np.maximum(ordered[:, -2:], 0).sum(axis=1) * span > _PAIR_LIMIT
    negative = np.minimum(ordered[:, :2], 0).sum(axis=1) * span < -_PAIR_LIMIT - 1
    return bool(np.any(positive | negative))
