"""QONNX, for FINN and hls4ml: one Quant node for each rounding.

``Quant(x, scale, zero point, bits)`` rounds ``x / scale`` half to even, saturates to the bits and
gives floats back (github.com/fastmachinelearning/qonnx, docs/qonnx-custom-ops). Weights are float
initializers behind one, their scales shaped ``[C, 1, 1, 1]`` to broadcast; biases are float
initializers with the values of their integers. The batch is 1, and attributes that ONNX leaves to
their defaults are written out, for hls4ml reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from pipeline.export.fake_quantized import FakeQuantized, Rounding, Stored
from pipeline.export.static_shapes import with_static_movement

__all__ = ["DOMAIN", "to_qonnx", "write_qonnx"]

DOMAIN = "qonnx.custom_op.general"


class _Dialect:
    def rounding(self, rounding: Rounding) -> tuple[list[NodeProto], list[TensorProto]]:
        return self._quant(
            rounding.source,
            rounding.result,
            np.asarray(rounding.scale, np.float32),
            rounding.bits,
            rounding.signed,
        )

    def stored(self, stored: Stored) -> tuple[list[NodeProto], list[TensorProto]]:
        if stored.role == "bias":
            return [], [numpy_helper.from_array(stored.values, stored.result)]
        source = f"{stored.result}_values"
        nodes, constants = self._quant(
            source, stored.result, stored.broadcast_scale, stored.bits, stored.signed
        )
        return nodes, [numpy_helper.from_array(stored.values, source), *constants]

    def _quant(
        self, source: str, result: str, scale: Any, bits: int, signed: bool
    ) -> tuple[list[NodeProto], list[TensorProto]]:
        parts = {
            "scale": np.asarray(scale, np.float32),
            "zero_point": np.zeros((), np.float32),
            "bits": np.asarray(bits, np.float32),
        }
        node = helper.make_node(
            "Quant",
            [source, *(f"{result}_{part}" for part in parts)],
            [result],
            f"{result}_quant",
            domain=DOMAIN,
            signed=int(signed),
            narrow=0,
            rounding_mode="ROUND",
        )
        constants = [
            numpy_helper.from_array(value, f"{result}_{part}") for part, value in parts.items()
        ]
        return [node], constants


def to_qonnx(network: FakeQuantized, ends: Sequence[str]) -> onnx.ModelProto:
    """Write a network up to ``ends`` with Quant nodes, for a batch of one."""
    proto = network.translate(_Dialect(), ends, batch=1, drop_idle=True)
    proto = with_static_movement(proto)
    for node in proto.graph.node:
        _write_out(node, proto)
    return proto


def _write_out(node: NodeProto, proto: onnx.ModelProto) -> None:
    """Write the attributes of windows that are left to their defaults."""
    given = {entry.name for entry in node.attribute}
    if node.op_type not in ("AveragePool", "Conv", "ConvTranspose", "MaxPool"):
        return
    if node.op_type.startswith("Conv"):
        shapes = {value.name: value for value in proto.graph.value_info}
        dims = [d.dim_value for d in shapes[node.input[1]].type.tensor_type.shape.dim]
        kernel = dims[2:]
    else:
        kernel = list(next(e.ints for e in node.attribute if e.name == "kernel_shape"))
    defaults: dict[str, Any] = {
        "kernel_shape": kernel,
        "strides": [1] * len(kernel),
        "dilations": [1] * len(kernel),
    }
    if "auto_pad" not in given:
        defaults["pads"] = [0] * (2 * len(kernel))
    if node.op_type.startswith("Conv"):
        defaults["group"] = 1
    for name, value in defaults.items():
        if name not in given:
            node.attribute.append(helper.make_attribute(name, value))


def write_qonnx(network: FakeQuantized, folder: Path) -> tuple[list[str], dict[str, Any]]:
    """Write ``model.onnx`` in QONNX; returns what there is to say in words and as data."""
    proto = to_qonnx(network, network.graph.outputs)
    onnx.save(proto, folder / "model.onnx")
    quants = sum(node.op_type == "Quant" for node in proto.graph.node)
    lines = [f"model.onnx: QONNX, {quants} Quant nodes, batch 1"]
    return lines, {"quant_nodes": quants}
