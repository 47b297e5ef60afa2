"""Static checks of every scale and zero point in a QDQ file; nothing is run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import NodeProto

from graph_tools.quantized_graph import QuantizedGraph
from graph_tools.quantizer import LIFT

__all__ = ["ScaleCheck", "bias_fits", "check_scales", "is_power_of_two"]


@dataclass(frozen=True, kw_only=True)
class ScaleCheck:
    """What the scales and zero points are.

    Attributes:
        num_scales: different scales of QuantizeLinear and DequantizeLinear nodes.
        num_biases: int32 biases whose scale was compared with input times weight.
        not_power_of_two: names of those that are not powers of two, or are computed.
        free: names of those of weights and biases that are not powers of two either, in a file that
            says so; they are positive and finite.
        asymmetric_zero_points: nodes whose zero point is neither 0 nor the middle of its type's
            range nor two below (uint8 around 128 holds the values of int8 around 0).
        bias_mismatches: weighted nodes whose bias scale is not exactly s_x * s_w.
        pair_mismatches: DequantizeLinear nodes that read integers of another scale.
        float_biases: weighted nodes with a bias that is not quantized.
    """

    num_scales: int
    num_biases: int
    not_power_of_two: tuple[str, ...]
    asymmetric_zero_points: tuple[str, ...]
    bias_mismatches: tuple[str, ...]
    pair_mismatches: tuple[str, ...]
    float_biases: tuple[str, ...]
    free: tuple[str, ...] = ()

    @property
    def power_of_two(self) -> bool:
        """All scales are powers of two."""
        return not self.not_power_of_two and not self.free

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the fields, and ``power_of_two``."""
        lists = {
            "not_power_of_two": list(self.not_power_of_two),
            "asymmetric_zero_points": list(self.asymmetric_zero_points),
            "bias_mismatches": list(self.bias_mismatches),
            "pair_mismatches": list(self.pair_mismatches),
            "float_biases": list(self.float_biases),
            "free": list(self.free),
        }
        return {
            "num_scales": self.num_scales,
            "num_biases": self.num_biases,
            "power_of_two": self.power_of_two,
            **lists,
        }


def is_power_of_two(values: np.ndarray[Any, Any]) -> bool:
    """Whether every element is a positive, normal (not subnormal) power of two.

    Example:
        >>> is_power_of_two(np.float32([0.5, 4])), is_power_of_two(np.float32([0.3]))
        (True, False)
    """
    numbers = np.asarray(values, np.float64)
    mantissas, _ = np.frexp(numbers)
    normal = numbers >= np.finfo(np.float32).tiny
    return bool(np.all((mantissas == 0.5) & normal & np.isfinite(numbers)))


def check_scales(graph: QuantizedGraph) -> ScaleCheck:
    """Check every Q and DQ node, and every bias against its input and weight."""
    not_power_of_two: dict[str, None] = {}
    free: dict[str, None] = {}
    nonzero: list[str] = []
    nodes = (*graph.quantizers, *graph.dequantizers)
    for node in nodes:
        scale = graph.scale(node)
        if scale is None or not is_power_of_two(scale):
            declared = scale is not None and graph.free_weight_scales and _is_free(graph, node)
            (free if declared else not_power_of_two)[node.input[1]] = None
        if len(node.input) > 2 and node.input[2]:
            zero_point = graph.constant(node.input[2])
            if zero_point is None or not _is_symmetric(zero_point):
                nonzero.append(node.name or node.output[0])

    biased = [node for node in graph.weighted() if len(node.input) > 2 and node.input[2]]
    quantized = [node for node in biased if _quantized_bias(graph, node) is not None]
    return ScaleCheck(
        num_scales=len({node.input[1] for node in nodes}),
        num_biases=len(quantized),
        not_power_of_two=tuple(not_power_of_two),
        asymmetric_zero_points=tuple(nonzero),
        bias_mismatches=tuple(node.name for node in quantized if not bias_fits(graph, node)),
        pair_mismatches=tuple(
            node.name or node.output[0]
            for node in graph.dequantizers
            if not _pair_agrees(graph, node)
        ),
        float_biases=tuple(n.name for n in biased if _quantized_bias(graph, n) is None),
        free=tuple(free),
    )


def _is_free(graph: QuantizedGraph, node: NodeProto) -> bool:
    """Whether a node dequantizes a weight or bias of a layer, per channel and by good numbers."""
    scale = graph.scale(node)
    if node.op_type != "DequantizeLinear" or not graph.is_weight(node) or scale is None:
        return False
    readers = graph.consumers.get(node.output[0], [])
    layers = all(
        r.op_type in {"Conv", "ConvTranspose", "Gemm", "MatMul"}
        and node.output[0] != r.input[0]
        for r in readers
    )
    return layers and bool(np.all(np.isfinite(scale) & (scale > 0)))


def bias_fits(graph: QuantizedGraph, node: NodeProto) -> bool:
    """Whether the scale of a node's int32 bias is exactly that of input times weight.

    True for a node without such a bias, and where the input is float: there is no product to
    compare with.
    """
    bias, data = _quantized_bias(graph, node), graph.dequantizer(node.input[0])
    weight = graph.dequantizer(node.input[1]) if len(node.input) > 1 else None
    if bias is None or data is None or weight is None:
        return True
    scales = [graph.scale(n) for n in (data, weight, bias)]
    if any(scale is None for scale in scales):
        return False
    s_x, s_w, s_b = (np.asarray(scale, np.float32).reshape(-1) for scale in scales)
    if node.op_type == "ConvTranspose" and s_b.size % s_w.size == 0:  # groups share a scale
        s_w = np.tile(s_w, s_b.size // s_w.size)
    try:
        return bool(np.all(np.broadcast_to(s_x * s_w, np.broadcast(s_w, s_b).shape) == s_b))
    except ValueError:
        return False


def _is_symmetric(zero_point: np.ndarray[Any, Any]) -> bool:
    name = zero_point.dtype.name
    middle = 2 ** (int(name.removeprefix("uint")) - 1) if name.startswith("uint") else 0
    found = zero_point.astype(np.int64)
    lifted = name in ("int8", "uint8", "int16", "uint16") and np.all(found == middle - LIFT)
    return bool(lifted or np.all(np.isin(found, (0, middle))))


def _quantized_bias(graph: QuantizedGraph, node: NodeProto) -> NodeProto | None:
    if node.op_type not in {"Conv", "ConvTranspose", "Gemm"} or len(node.input) < 3:
        return None
    source = graph.producers.get(node.input[2])
    is_quantized = source is not None and source.op_type == "DequantizeLinear"
    return source if is_quantized else None


def _pair_agrees(graph: QuantizedGraph, dequantizer: NodeProto) -> bool:
    quantizer = graph.quantizer_of(dequantizer)
    if quantizer is None:
        return True
    first, second = graph.scale(quantizer), graph.scale(dequantizer)
    return first is not None and second is not None and np.array_equal(first, second)
