"""Multiply-accumulates of convolutions and matrix products, node by node, for one image."""

from __future__ import annotations

import math
from collections.abc import Mapping

import onnx
from onnx import helper

from graph_tools.model import Model
from graph_tools.shapes import TensorType, infer, with_batch

__all__ = ["count_macs"]


def count_macs(model: Model) -> dict[str, int]:
    """Count the multiply-accumulates of each convolution and matrix product.

    Padding counts as if it were multiplied, as it does in other counts. A network of one batch
    size is counted at that size and divided by it.

    Returns:
        By node name, for one image. Nodes of shapes that inference does not reach are missing.
    """
    batch = model.fixed_batch or 1
    types = infer(with_batch(model.proto, model.input.name, batch))
    found = {}
    for node in model.proto.graph.node:
        macs = _macs(node, types)
        if macs is not None:
            found[node.name] = macs // batch
    return found


def _macs(node: onnx.NodeProto, types: Mapping[str, TensorType]) -> int | None:
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return None
    first, second, result = (
        type_.static if (type_ := types.get(name)) is not None else None
        for name in (*node.input[:2], node.output[0])
    )
    if first is None or second is None or result is None:
        return None
    match node.op_type:
        case "Conv":  # weights [out, in / groups, ...]
            return math.prod(result) * math.prod(second[1:])
        case "ConvTranspose":  # weights [in, out / groups, ...]
            return math.prod(first) * math.prod(second[1:])
        case "Gemm":
            transposed = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            return math.prod(result) * first[0 if transposed.get("transA") else 1]
        case _:
            return math.prod(result) * (first[-1] if first else 1)
