"""Every quantized tensor as plain data: the rows of the report's table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from graph_tools.compare import TensorComparison
from graph_tools.model import Model, initializers
from graph_tools.quantizer import QuantizedConstant, TensorQuantizer
from pipeline.quantize import Quantization

__all__ = ["describe_tensors"]

_BINS = 48

Array = np.ndarray[Any, np.dtype[Any]]


def describe_tensors(
    quantization: Quantization, network: Model, compared: Mapping[str, TensorComparison]
) -> list[dict[str, Any]]:
    """Activations in graph order, then weights, biases and operands.

    Args:
        quantization: the plan, and what it was made from.
        network: what it is for.
        compared: of the tensors in both networks.

    Returns:
        A row each. ``histogram`` has ``low``, ``high`` and ``counts`` of equal bins between them,
        or is None: of activations the values of the float network on the calibration images, of
        weights the values over their channel's threshold (``relative``), so that it is at 1.
    """
    plan = quantization.plan
    producers = {o: n for n in network.proto.graph.node for o in n.output}
    operators = {n.name: n.op_type for n in network.proto.graph.node}
    saturated = {  # unsigned in front of a Clip that stays: what it cuts off is no error
        node.input[0]
        for node in network.proto.graph.node
        if node.op_type == "Clip" and node.name not in plan.absorbed
    }
    rows = []
    for name, quantizer in plan.tensors.items():
        node = producers.get(name)
        comparison = compared.get(name) if name not in saturated else None
        rows.append(
            {
                "name": name,
                "node": node.name if node is not None else "(input)",
                "op_type": node.op_type if node is not None else "(input)",
                "kind": "activation",
                "sqnr_db": None if comparison is None else comparison.sqnr_db,
                "clipped_percent": quantization.clipped_percent.get(name),
                "shares_with": plan.shares.get(name),
                **_describe(quantizer),
                "histogram": _activation_histogram(quantization, name, quantizer),
            }
        )
    floats = initializers(network.proto)
    for name, constant in plan.constants.items():
        rows.append(
            {
                "name": name,
                "node": constant.node,
                "op_type": operators[constant.node],
                "kind": "bias" if constant.role == "bias" else "weight",
                "sqnr_db": _sqnr(floats[name], constant.values),
                "clipped_percent": None,
                "shares_with": None,
                **_describe(constant.quantizer),
                "histogram": _weight_histogram(floats[name], constant),
            }
        )
    return rows


def _describe(quantizer: TensorQuantizer) -> dict[str, Any]:
    exponent: Any = quantizer.exponent
    if isinstance(exponent, tuple):
        exponent = [min(exponent), max(exponent)]
    per_tensor = quantizer.axis is None
    free = None if quantizer.scales is None else [min(quantizer.scales), max(quantizer.scales)]
    return {
        "bits": quantizer.bits,
        "signed": quantizer.signed,
        "exponent": exponent if free is None else None,
        "free_scales": free,
        "threshold": quantizer.threshold if per_tensor else None,
    }


def _activation_histogram(
    quantization: Quantization, name: str, quantizer: TensorQuantizer
) -> dict[str, Any] | None:
    found = quantization.histograms.get(name)
    if found is None:
        return None
    low = min(found.low, -quantizer.threshold if quantizer.signed else 0.0)
    return _binned(found.centers, found.counts, low, max(found.high, quantizer.threshold))


def _weight_histogram(values: Array, constant: QuantizedConstant) -> dict[str, Any] | None:
    if constant.role == "bias":
        return None
    quantizer = constant.quantizer
    scale = np.asarray(quantizer.scale_for(values.ndim), np.float64)
    threshold = scale * 2.0 ** (quantizer.bits - quantizer.signed)
    relative = (np.asarray(values, np.float64) / threshold).reshape(-1)
    limit = max(1.0, float(np.abs(relative).max(initial=0.0)))
    found = _binned(relative, None, -limit if quantizer.signed else 0.0, limit)
    return {**found, "relative": True}


def _binned(values: Array, counts: Array | None, low: float, high: float) -> dict[str, Any]:
    binned, _ = np.histogram(values, bins=_BINS, range=(low, high), weights=counts)
    return {"low": low, "high": high, "counts": [int(count) for count in binned]}


def _sqnr(exact: Array, approximate: Array) -> float | None:
    signal = float(np.sum(np.square(exact, dtype=np.float64)))
    noise = float(np.sum(np.square(exact - approximate, dtype=np.float64)))
    return None if not signal or not noise else 10.0 * float(np.log10(signal / noise))
