"""Random small float networks, as exporters write them, for the whole way to a quantized file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.differential.random_graphs import Choose

__all__ = ["random_network"]

_ACTIVATIONS = ("Relu", "Clip", "HardSwish", "Sigmoid", "LeakyRelu", "PRelu", "Silu", "Tanh")


class _Network:
    def __init__(self, choose: Choose) -> None:
        self.choose = choose
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.rng = np.random.default_rng(choose(range(100)))

    def node(self, op: str, inputs: Sequence[str], **attributes: Any) -> str:
        name = f"{op.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def constant(self, value: Any) -> str:
        name = f"constant{len(self.constants)}"
        self.constants[name] = np.asarray(value)
        return name

    def conv(self, x: str, channels: int, out: int, kernel: int, **attributes: Any) -> str:
        inner = channels // attributes.get("group", 1)
        shape = (out, inner, kernel, kernel)
        weight = self.rng.normal(size=shape) / np.sqrt(inner * kernel**2)
        bias = self.rng.normal(size=out) / 4
        names = [self.constant(v.astype(np.float32)) for v in (weight, bias)]
        pads = [kernel // 2] * 4
        return self.node("Conv", [x, *names], pads=pads, **attributes)

    def activation(self, x: str) -> str:
        kind = self.choose(_ACTIVATIONS)
        if kind == "Clip":
            return self.node("Clip", [x, *map(self.constant, np.float32([0, 6]))])
        if kind == "PRelu":
            return self.node("PRelu", [x, self.constant(np.float32([[[0.3]]]))])
        if kind == "Silu":
            return self.node("Mul", [x, self.node("Sigmoid", [x])])
        return self.node(kind, [x])

    def block(self, x: str, channels: int) -> str:
        kind = self.choose(
            ["residual", "plain", "depthwise", "gated", "concat", "pool", "resize"]
        )
        if kind == "residual":
            y = self.activation(self.conv(x, channels, channels, 3))
            return self.activation(self.node("Add", [self.conv(y, channels, channels, 1), x]))
        if kind == "plain":
            return self.activation(self.conv(x, channels, channels, self.choose([3, 1])))
        if kind == "depthwise":
            return self.activation(self.conv(x, channels, channels, 3, group=channels))
        if kind == "gated":  # squeeze and excitation
            gate = self.conv(self.node("GlobalAveragePool", [x]), channels, channels, 1)
            return self.node("Mul", [x, self.node("Sigmoid", [gate])])
        if kind == "concat":
            both = self.node("Concat", [self.activation(x), x], axis=1)
            return self.conv(both, 2 * channels, channels, 1)
        if kind == "pool":
            op = self.choose(["MaxPool", "AveragePool"])
            size = self.choose([2, 3])
            return self.node(op, [x], kernel_shape=[size] * 2, strides=[1, 1])
        scales = self.constant(np.float32([1, 1, 2, 2]))
        mode, how = self.choose([("nearest", "asymmetric"), ("linear", "half_pixel")])
        attributes = {"nearest_mode": "floor"} if mode == "nearest" else {}
        return self.node(
            "Resize",
            [x, "", scales],
            mode=mode,
            coordinate_transformation_mode=how,
            **attributes,
        )


def random_network(choose: Choose) -> onnx.ModelProto:
    """Convolutions, activations and what stands between them; classes or a map at the end."""
    g = _Network(choose)
    channels = choose([4, 6])
    x = g.activation(g.conv("image", 3, channels, 3, strides=[choose([1, 2])] * 2))
    for _ in range(choose([1, 2, 3])):
        x = g.block(x, channels)
    if choose([True, False]):
        pooled = g.node("GlobalAveragePool", [x])
        flat = g.node("Flatten", [pooled])
        weight = g.rng.normal(size=(5, channels)).astype(np.float32)
        bias = g.rng.normal(size=5).astype(np.float32)
        y, rank = g.node("Gemm", [flat, g.constant(weight), g.constant(bias)], transB=1), 2
    else:
        y, rank = g.conv(x, channels, 3, 1), 4
    graph = helper.make_graph(
        g.nodes,
        "network",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 12, 12])],
        [helper.make_tensor_value_info(y, TensorProto.FLOAT, [None] * rank)],
        [numpy_helper.from_array(value, name) for name, value in g.constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model
