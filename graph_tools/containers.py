"""The integer types that hold quantized values in a file.

``int8`` containers: every width below 8 lies in 8 bits, an activation saturated by a Clip on the
integers, for onnxruntime has integer kernels for 8 bits only. ``int4`` containers: activations of 4
bits and weights of 4 and fewer lie in INT4 or UINT4 (opset 21), two in a byte. The values are the
same. onnxruntime computes on them in float, and what it fails at is refused here by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import ml_dtypes
import numpy as np
from onnx import NodeProto

from graph_tools.errors import TargetError
from graph_tools.model import Model
from graph_tools.quantizer import Plan, TensorQuantizer

__all__ = ["Container", "container_type", "refuse_unsupported", "width"]

Container = Literal["int8", "int4"]

_SIGNED: dict[int, Any] = {4: ml_dtypes.int4, 8: np.int8, 16: np.int16, 32: np.int32}
_UNSIGNED: dict[int, Any] = {4: ml_dtypes.uint4, 8: np.uint8, 16: np.uint16}


def container_type(
    quantizer: TensorQuantizer, container: Container, *, midpoint: bool = False
) -> np.dtype[Any]:
    """The integer type that stores a quantizer's values.

    Args:
        quantizer: of the tensor.
        container: the smallest type.
        midpoint: store signed values unsigned, around the middle.
    """
    least = 4 if container == "int4" else 8
    bits = next(bits for bits in (4, 8, 16, 32) if bits >= max(quantizer.bits, least))
    types = _SIGNED if quantizer.signed and not midpoint else _UNSIGNED
    found: np.dtype[Any] = np.dtype(types[bits])
    return found


def width(dtype: np.dtype[Any]) -> int:
    """Bits of an integer type; numpy does not know those of 4-bit types."""
    return int(dtype.name.removeprefix("u").removeprefix("int"))


def refuse_unsupported(model: Model, plan: Plan) -> None:
    """Refuse 4-bit containers where onnxruntime (1.31) cannot run them.

    Raises:
        TargetError: the first operator that it fails at, or lifted quantizers, and what to do.
    """
    constants = (constant.quantizer for constant in plan.constants.values())
    if any(quantizer.lifted for quantizer in (*plan.tensors.values(), *constants)):
        raise TargetError(
            "4-bit types have no room below their smallest integer",
            where="--zero-point below",
            hint="--container int8",
        )
    absorbed = {
        n.input[0]: n.output[0] for n in model.proto.graph.node if n.name in plan.absorbed
    }
    for node in model.proto.graph.node:
        for what in _failures(node, plan, absorbed.get(node.output[0], node.output[0])):
            raise TargetError(
                f"onnxruntime cannot run {node.op_type} {what}",
                where=f"node {node.name}",
                hint=f"--container int8, or 8 bits there: --bits '{node.name}=A8'",
            )


def _failures(node: NodeProto, plan: Plan, output: str) -> Iterator[str]:
    # Its optimizer puts integer kernels in place that do not take these types.
    types = []
    for tensor in (node.input[0] if node.input else "", output):
        if (quantizer := plan.tensors.get(tensor)) is not None:
            midpoint = tensor in plan.midpoint
            types.append(container_type(quantizer, "int4", midpoint=midpoint))
    if len(types) != 2 or types[0] != types[1] or width(types[0]) != 4:
        return
    if node.op_type == "MaxPool":
        yield f"on {types[0]}"
    if node.op_type == "Conv" and len(node.input) > 1:
        weight = plan.constants.get(node.input[1])
        if weight is not None and weight.quantizer.bits > 4:
            yield f"with 8-bit weights from {types[0]} to {types[0]}"
