"""What a network asks of a chip, before and after: multiply-accumulates by width, weight bytes."""

from __future__ import annotations

from collections import Counter
from typing import Any

from graph_tools.macs import count_macs
from graph_tools.model import Model, initializers
from graph_tools.quantizer import Plan

__all__ = ["describe_cost"]


def describe_cost(model: Model, plan: Plan) -> dict[str, Any]:
    """The ``cost`` part of the report.

    Args:
        model: the network that the plan is for.
        plan: its quantizers and integers.

    Returns:
        ``macs``: of convolutions and matrix products, for one image, and ``macs_by_width`` the
        same by bits of the weights and of the activations (both None: in float), most first;
        ``parameters`` that are quantized and ``parameter_bytes``, ``float`` and ``quantized``
        (packed: bits times elements; scales are not counted).
    """
    macs = count_macs(model)
    widths: Counter[tuple[int | None, int | None]] = Counter()
    for node in model.proto.graph.node:
        if node.name not in macs:
            continue
        source, weight = node.input[0], node.input[1]
        constant, tensor = plan.constants.get(weight), plan.tensors.get(weight)
        weight_bits = constant.quantizer.bits if constant else tensor.bits if tensor else None
        bits = plan.tensors[source].bits if source in plan.tensors else None
        key = (None, None) if weight_bits is None or bits is None else (weight_bits, bits)
        widths[key] += macs[node.name]
    known = initializers(model.proto)
    packed = sum(
        known[name].size * constant.quantizer.bits for name, constant in plan.constants.items()
    )
    parameters = sum(known[name].size for name in plan.constants)
    return {
        "macs": sum(macs.values()),
        "macs_by_width": [
            {"weights": weights, "activations": activations, "macs": count}
            for (weights, activations), count in widths.most_common()
        ],
        "parameters": parameters,
        "parameter_bytes": {"float": 4 * parameters, "quantized": -(-packed // 8)},
    }
