"""A small writer of QDQ graphs for tests: exponents in, no scale but powers of two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class QdqBuilder:
    """Builds a graph node by node; methods take and return names of dequantized tensors."""

    def __init__(
        self, image: tuple[int, int, int], *, batch: int | str = "N", dtype: Any = np.int8
    ) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.scales: dict[str, float] = {}
        self.shape = (batch, *image)
        self.rng = np.random.default_rng(7)
        self.image = self.quantize("image", -5, dtype)

    def node(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        name = f"{op.lower()}_{output}"
        self.nodes.append(helper.make_node(op, inputs, [output], name=name, **attributes))
        return output

    def constant(self, name: str, value: Any) -> str:
        self.constants[name] = np.asarray(value)
        return name

    def quantize(
        self, x: str, exponent: int, dtype: Any = np.uint8, *, output: str = ""
    ) -> str:
        scale = self.constant(f"{x}_scale", np.float32(2.0**exponent))
        zero = self.constant(f"{x}_zero", np.zeros((), dtype))
        self.node("QuantizeLinear", [x, scale, zero], f"{x}_q")
        self.scales[output or f"{x}_dq"] = 2.0**exponent
        return self.node("DequantizeLinear", [f"{x}_q", scale, zero], output or f"{x}_dq")

    def weighted(
        self,
        op: str,
        x: str,
        y: str,
        shape: tuple[int, ...],
        *,
        exponent: int = -8,
        axis: int = 0,
        weight: np.ndarray | None = None,
        **attributes: Any,
    ) -> str:
        """A Conv, ConvTranspose or Gemm with random int8 weights and int32 biases."""
        channels = shape[axis]
        if weight is None:
            weight = self.rng.integers(-127, 128, shape).astype(np.int8)
        exponents = exponent - np.arange(channels) % 3
        scale = self.constant(f"{y}_w_scale", np.exp2(exponents).astype(np.float32))
        zero = self.constant(f"{y}_w_zero", np.zeros(channels, weight.dtype))
        w = self.node(
            "DequantizeLinear",
            [self.constant(f"{y}_w_q", weight), scale, zero],
            f"{y}_w_dq",
            axis=axis,
        )
        bias = self.rng.integers(-2000, 2000, channels).astype(np.int32)
        b_scale = self.constant(f"{y}_b_scale", self.constants[scale] * self.scales[x])
        b = self.node(
            "DequantizeLinear",
            [self.constant(f"{y}_b_q", bias), b_scale],
            f"{y}_b_dq",
            axis=0,
        )
        return self.node(op, [x, w, b], y, **attributes)

    def model(self, outputs: dict[str, int]) -> onnx.ModelProto:
        """Finish; ``outputs`` gives the rank of each graph output."""
        graph = helper.make_graph(
            self.nodes,
            "test",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, self.shape)],
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank)
                for name, rank in outputs.items()
            ],
            [numpy_helper.from_array(value, name) for name, value in self.constants.items()],
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10
        )
        onnx.checker.check_model(model)
        return model


def residual_network(*, tail: str = "integer", batch: int | str = "N") -> onnx.ModelProto:
    """Conv-Relu, Conv, Add-Relu, MaxPool, depthwise, Concat, GlobalAveragePool, Gemm."""
    g = QdqBuilder((3, 16, 16), batch=batch)
    g.weighted("Conv", g.image, "c1", (16, 3, 3, 3), pads=[1] * 4)
    r1 = g.quantize(g.node("Relu", ["c1"], "r1"), -5)
    c2 = g.quantize(g.weighted("Conv", r1, "c2", (16, 16, 3, 3), pads=[1] * 4), -4, np.int8)
    r2 = g.quantize(g.node("Relu", [g.node("Add", [c2, r1], "a1")], "r2"), -4)
    m1 = g.quantize(g.node("MaxPool", [r2], "m1", kernel_shape=[2, 2], strides=[2, 2]), -4)
    g.weighted("Conv", m1, "dw", (16, 1, 3, 3), exponent=-7, pads=[1] * 4, group=16)
    r3 = g.quantize(g.node("Relu", ["dw"], "r3"), -3)
    cat = g.quantize(g.node("Concat", [r3, m1], "cat", axis=1), -3)
    gap = g.quantize(g.node("GlobalAveragePool", [cat], "gap"), -4)
    flat = g.quantize(g.node("Flatten", [gap], "flat"), -4)
    g.weighted("Gemm", flat, "fc", (10, 32), transB=1)
    if tail == "integer":
        g.quantize("fc", -3, np.int8, output="logits")
        return g.model({"logits": 2})
    g.node("Softmax", [g.quantize("fc", -3, np.int8)], "probabilities", axis=1)
    return g.model({"probabilities": 2})
