"""Random small QDQ graphs, for whoever runs one: the interpreter, onnxruntime, other compilers.

``random_graph(choose)`` asks ``choose`` for each decision and gives a model with one image input
and integers behind every operator. With hypothesis ``choose`` draws (and so shrinks); with
``chooser(seed)`` numpy does::

    model = random_graph(chooser(7), operators=["Conv", "Add"])
    batch = images_for(model)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["APPROXIMATE", "OPERATORS", "Choose", "chooser", "images_for", "random_graph"]

Choose = Callable[[Sequence[Any]], Any]
"""Takes the options of a decision and gives one of them; the first is the simplest."""

APPROXIMATE = frozenset({"Sigmoid", "Softmax", "Tanh"})
"""Operators that runtimes approximate: one step is allowed."""


def chooser(seed: int) -> Choose:
    """Decisions of numpy's generator."""
    rng = np.random.default_rng(seed)
    return lambda options: options[int(rng.integers(len(options)))]


def images_for(model: onnx.ModelProto, count: int = 2, seed: int = 0) -> np.ndarray:
    """Images that use the input's range and a little more: [count, channels, height, width]."""
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim[1:]]
    scale = next(e for e in model.graph.initializer if e.name == "image_scale")
    step = float(numpy_helper.to_array(scale))
    wide = model.graph.node[0].input[2] == "image_zero" and any(
        e.name == "image_zero" and e.data_type == TensorProto.INT16
        for e in model.graph.initializer
    )
    spread = step * (9000 if wide else 70)
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, *shape)) * spread).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    """A dequantized tensor: its steps are ``2**exponent`` and about ``2**spread`` are used."""

    name: str
    shape: tuple[int, ...]  # without the batch
    exponent: int
    dtype: Any

    @property
    def bits(self) -> int:
        return 16 if self.dtype in (np.int16, np.uint16) else 8

    @property
    def magnitude(self) -> int:
        """log2 of what its values are like."""
        return self.exponent + self.bits - 3


class _Maker:
    def __init__(self, choose: Choose, *, wide: bool, per_channel: bool) -> None:
        self.choose, self.wide, self.per_channel = choose, wide, per_channel
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.tensors: list[_Tensor] = []
        self.rng = np.random.default_rng(choose(range(100)))
        self.count = 0

    def name(self, kind: str) -> str:
        self.count += 1
        return f"{kind.lower()}{self.count}"

    def constant(self, name: str, value: Any) -> str:
        self.constants[name] = np.asarray(value)
        return name

    def node(self, op: str, inputs: Sequence[str], **attributes: Any) -> str:
        output = self.name(op)
        self.nodes.append(
            helper.make_node(op, inputs, [output], name=f"{op}_{output}", **attributes)
        )
        return output

    def quantize(
        self, x: str, shape: tuple[int, ...], magnitude: int, *, like: _Tensor | None = None
    ) -> _Tensor:
        """Q and DQ of a random type behind ``x``, whose values are like ``2**magnitude``."""
        if like is not None:
            dtype, exponent = like.dtype, like.exponent
            middle = int(self.constants[f"{like.name.removesuffix('_dq')}_zero"])
        else:
            types = [(np.int8, 0), (np.uint8, 0), (np.uint8, 128)]
            dtype, middle = self.choose([*types, (np.int16, 0)] if self.wide else types)
            bits = 16 if dtype is np.int16 else 8
            exponent = magnitude - bits + 3 + self.choose([0, 1, -1])
        scale = self.constant(f"{x}_scale", np.float32(2.0**exponent))
        zero = self.constant(f"{x}_zero", np.asarray(middle, dtype))
        self.nodes.append(
            helper.make_node("QuantizeLinear", [x, scale, zero], [f"{x}_q"], f"{x}_q")
        )
        integers = f"{x}_q"
        if like is None and dtype is not np.int16 and self.choose([False] * 7 + [True]):
            low, high = (0, 15) if not middle and dtype is np.uint8 else (-8, 7)
            bounds = [
                self.constant(f"{x}_{side}", np.asarray(value + middle, dtype))
                for side, value in (("low", low), ("high", high))
            ]
            self.nodes.append(
                helper.make_node("Clip", [integers, *bounds], [f"{x}_narrow"], f"{x}_narrow")
            )
            integers = f"{x}_narrow"
        self.nodes.append(
            helper.make_node(
                "DequantizeLinear", [integers, scale, zero], [f"{x}_dq"], f"{x}_d"
            )
        )
        tensor = _Tensor(name=f"{x}_dq", shape=shape, exponent=exponent, dtype=dtype)
        self.tensors.append(tensor)
        return tensor

    def weight(
        self, x: _Tensor, shape: tuple[int, ...], axis: int, fan_in: int, channels: int
    ) -> tuple[list[str], int]:
        """Names of a dequantized weight and bias, and the magnitude of the result."""
        y = self.name("w")
        bits = 4 if x.bits == 16 else self.choose([8, 8, 4])
        top = 2 ** (bits - 1)
        values = self.rng.integers(-top, top, shape).astype(np.int8)
        spread = -round(math.log2(0.6 * top * math.sqrt(fan_in)))
        exponents = np.full(shape[axis], spread)
        if self.per_channel:
            exponents -= np.arange(shape[axis]) % 3
        elif shape[axis]:
            exponents = exponents[:1].reshape(())
        scale = np.exp2(exponents).astype(np.float32)
        names = [
            self.constant(f"{y}_q", values),
            self.constant(f"{y}_scale", scale),
            self.constant(f"{y}_zero", np.zeros(scale.shape, np.int8)),
        ]
        extra = {"axis": axis} if scale.ndim else {}
        found = [self._dequantize(names, f"{y}_dq", **extra)]
        if self.choose([True, True, False]):
            limit = 2 ** (12 if x.bits == 8 else 18)
            bias = self.rng.integers(-limit, limit, channels).astype(np.int32)
            b_scale = scale * np.float32(2.0**x.exponent)
            if scale.ndim and len(scale) != channels:  # groups of a ConvTranspose share them
                b_scale = np.tile(b_scale, channels // len(scale))
            names = [
                self.constant(f"{y}_b_q", bias),
                self.constant(f"{y}_b_scale", b_scale),
                self.constant(f"{y}_b_zero", np.zeros(b_scale.shape, np.int32)),
            ]
            extra = {"axis": 0} if b_scale.ndim else {}
            found.append(self._dequantize(names, f"{y}_b_dq", **extra))
        return found, x.magnitude

    def _dequantize(self, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(
            helper.make_node("DequantizeLinear", inputs, [output], output, **attributes)
        )
        return output

    def pick(self, *, rank: int = 3, like: _Tensor | None = None) -> _Tensor | None:
        """A tensor to read: the newest is the simplest."""
        fitting = [
            t
            for t in reversed(self.tensors)
            if len(t.shape) == rank and (like is None or t.shape == like.shape)
        ]
        if not fitting:
            return None
        found: _Tensor = self.choose(fitting)
        return found


def _conv(g: _Maker) -> None:
    x = g.pick()
    assert x is not None
    c, h, w = x.shape
    group = g.choose([1, 1, c, *([2] if c % 2 == 0 else [])])
    out = group * g.choose([1, 2, 3] if group > 1 else [3, 4, 5, 8])
    kernel = [g.choose([1, 3, 2]), g.choose([1, 3, 2])]
    dilations, strides = [g.choose([1, 1, 2]), g.choose([1, 2])], [g.choose([1, 2, 3]), 1]
    pads = [g.choose([0, 1, 2]) for _ in range(4)]
    size = [
        (length + pads[a] + pads[a + 2] - (kernel[a] - 1) * dilations[a] - 1) // strides[a] + 1
        for a, length in enumerate((h, w))
    ]
    if min(size) < 1:
        return
    fan_in = c // group * kernel[0] * kernel[1]
    inputs, magnitude = g.weight(x, (out, c // group, *kernel), 0, fan_in, out)
    y = g.node(
        "Conv", [x.name, *inputs], group=group, dilations=dilations, strides=strides, pads=pads
    )
    _activated(g, y, (out, *size), magnitude)


def _activated(g: _Maker, y: str, shape: tuple[int, ...], magnitude: int) -> None:
    """Perhaps a Relu or Clip between a sum and its quantizer."""
    kind = g.choose(["", "Relu", "Clip"])
    if kind == "Relu":
        y = g.node("Relu", [y])
    elif kind == "Clip":
        top = g.choose([6.0, 1.0, 4.0])
        low, high = g.name("low"), g.name("high")
        g.constant(low, np.float32(0))
        g.constant(high, np.float32(top))
        y = g.node("Clip", [y, low, high])
        magnitude = min(magnitude, round(math.log2(top)))
    g.quantize(y, shape, magnitude)


def _conv_transpose(g: _Maker) -> None:
    x = g.pick()
    assert x is not None
    c, h, w = x.shape
    if x.bits == 16 or max(h, w) > 12:
        return
    group = g.choose([1, *([2] if c % 2 == 0 else [])])
    out, kernel = g.choose([2, 3]), g.choose([2, 3])
    stride = g.choose([2, 1])
    pads = [g.choose([0, 1]) for _ in range(4)]
    size = [
        (length - 1) * stride + kernel - pads[a] - pads[a + 2]
        for a, length in enumerate((h, w))
    ]
    if min(size) < 1:
        return
    fan_in = max(1, c // group * kernel * kernel // stride**2)
    inputs, magnitude = g.weight(x, (c, out, kernel, kernel), 1, fan_in, out * group)
    y = g.node(
        "ConvTranspose", [x.name, *inputs], group=group, strides=[stride] * 2, pads=pads
    )
    _activated(g, y, (out * group, *size), magnitude)


def _gemm(g: _Maker) -> None:
    x = g.pick(rank=1) or g.pick()
    assert x is not None
    flat = x
    if len(x.shape) == 3:
        if math.prod(x.shape) > 400:
            return
        y = g.node("Flatten", [x.name])
        flat = g.quantize(y, (math.prod(x.shape),), x.magnitude, like=x)
    (features,) = flat.shape
    out, turned = g.choose([4, 10]), g.choose([1, 0])
    shape = (out, features) if turned else (features, out)
    inputs, magnitude = g.weight(flat, shape, 0 if turned else 1, features, out)
    y = g.node("Gemm", [flat.name, *inputs], transB=turned)
    _activated(g, y, (out,), magnitude)


def _matmul(g: _Maker) -> None:
    x = g.pick()
    assert x is not None
    c, h, w = x.shape
    if g.choose([True, False]) or x.bits == 16:
        out = g.choose([3, 8])
        inputs, magnitude = g.weight(x, (w, out), 1, w, out)
        y = g.node("MatMul", [x.name, inputs[0]])
        if len(inputs) > 1:  # its bias has no reader
            g.nodes.remove(next(n for n in g.nodes if n.output[0] == inputs[1]))
        g.quantize(y, (c, h, out), magnitude)
        return
    turned = g.quantize(
        g.node("Transpose", [x.name], perm=[0, 1, 3, 2]), (c, w, h), x.magnitude, like=x
    )
    y = g.node("MatMul", [x.name, turned.name])
    g.quantize(y, (c, h, h), 2 * x.magnitude + round(math.log2(w) / 2))


def _pair(op: str) -> Callable[[_Maker], None]:
    def build(g: _Maker) -> None:
        a = g.pick()
        assert a is not None
        b = g.pick(like=a)
        assert b is not None
        if op == "Mul" and a.bits + b.bits > 24:
            return
        y = g.node(op, [a.name, b.name])
        if op == "Mul":
            g.quantize(y, a.shape, a.magnitude + b.magnitude)
        else:
            _activated(g, y, a.shape, max(a.magnitude, b.magnitude))

    return build


def _operand(op: str) -> Callable[[_Maker], None]:
    """Arithmetic with a quantized constant, as the writer stores it."""

    def build(g: _Maker) -> None:
        x = g.pick()
        assert x is not None
        name = g.name("operand")
        shape = g.choose([(1,), (1, x.shape[0], 1, 1)])
        signed = g.choose([True, False])
        dtype = np.int8 if signed else np.uint8
        integers = g.rng.integers(-128 if signed else 1, 128 if signed else 256, shape)
        exponent = -7 if op == "Mul" else x.exponent + g.choose([0, 1, -2])
        names = [
            g.constant(f"{name}_q", integers.astype(dtype)),
            g.constant(f"{name}_scale", np.float32(2.0**exponent)),
            g.constant(f"{name}_zero", np.zeros((), dtype)),
        ]
        y = g.node(op, [x.name, g._dequantize(names, f"{name}_dq")])
        g.quantize(y, x.shape, x.magnitude)

    return build


def _concat(g: _Maker) -> None:
    a = g.pick()
    assert a is not None
    others = [t for t in g.tensors if len(t.shape) == 3 and t.shape[1:] == a.shape[1:]]
    b = g.choose(list(reversed(others)))
    y = g.node("Concat", [a.name, b.name], axis=1)
    shape = (a.shape[0] + b.shape[0], *a.shape[1:])
    g.quantize(y, shape, max(a.magnitude, b.magnitude))


def _unary(op: str, **options: Sequence[Any]) -> Callable[[_Maker], None]:
    def build(g: _Maker) -> None:
        x = g.pick()
        assert x is not None
        if op == "Softmax" and x.shape[0] == 1:
            return  # a defect of onnxruntime 1.31: test_runtime_defects.py
        attributes = {name: g.choose(values) for name, values in options.items()}
        y = g.node(op, [x.name], **attributes)
        unit = {"Sigmoid": -1, "Softmax": -2, "Tanh": -1}
        g.quantize(y, x.shape, unit.get(op, x.magnitude))

    return build


def _prelu(g: _Maker) -> None:
    x = g.pick()
    assert x is not None
    slope = g.constant(g.name("slope"), np.float32([g.choose([0.25, 0.125])]))
    g.quantize(g.node("PRelu", [x.name, slope]), x.shape, x.magnitude)


def _pool(op: str) -> Callable[[_Maker], None]:
    def build(g: _Maker) -> None:
        x = g.pick()
        assert x is not None
        c, h, w = x.shape
        kernel = [g.choose([2, 3]), g.choose([2, 3, 1])]
        strides = [g.choose([2, 1]), g.choose([2, 1])]
        pads = [g.choose([0, 1]) if k > 1 else 0 for k in (*kernel, *kernel)]
        size = [
            (length + pads[a] + pads[a + 2] - kernel[a]) // strides[a] + 1
            for a, length in enumerate((h, w))
        ]
        if min(size) < 1:
            return
        extra = {"count_include_pad": g.choose([0, 1])} if op == "AveragePool" else {}
        y = g.node(op, [x.name], kernel_shape=kernel, strides=strides, pads=pads, **extra)
        like = x if op == "MaxPool" else None
        g.quantize(y, (c, *size), x.magnitude, like=like)

    return build


def _global_average_pool(g: _Maker) -> None:
    x = g.pick()
    assert x is not None
    y = g.node("GlobalAveragePool", [x.name])
    g.quantize(y, (x.shape[0], 1, 1), x.magnitude - 1)


def _resize(g: _Maker) -> None:
    x = g.pick()
    assert x is not None
    c, h, w = x.shape
    if max(h, w) > 12:
        return
    scales = g.constant(g.name("scales"), np.float32([1, 1, 2, 2]))
    y = g.node(
        "Resize",
        [x.name, "", scales],
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )
    g.quantize(y, (c, 2 * h, 2 * w), x.magnitude, like=x)


def _pad(g: _Maker) -> None:
    x = g.pick()
    assert x is not None
    c, h, w = x.shape
    widths = [g.choose([0, 1, 2]) for _ in range(4)]
    pads = g.constant(
        g.name("pads"), np.int64([0, 0, widths[0], widths[1], 0, 0, widths[2], widths[3]])
    )
    mode = g.choose(["constant", "edge", "reflect"]) if min(h, w) > 2 else "constant"
    y = g.node("Pad", [x.name, pads], mode=mode)
    shape = (c, h + widths[0] + widths[2], w + widths[1] + widths[3])
    g.quantize(y, shape, x.magnitude, like=x)


def _move(g: _Maker) -> None:
    x = g.pick()
    assert x is not None
    c, h, w = x.shape
    kind = g.choose(["Transpose", "Reshape", "Slice"])
    if kind == "Transpose":
        y, shape = g.node("Transpose", [x.name], perm=[0, 2, 3, 1]), (h, w, c)
    elif kind == "Reshape":
        target = g.constant(g.name("shape"), np.int64([0, -1, w, c]))
        y, shape = g.node("Reshape", [x.name, target]), (h, w, c)
    else:
        step = g.choose([1, 2])
        places = [
            g.constant(g.name("place"), np.int64([value])) for value in (0, 2**31 - 1, 2, step)
        ]
        y, shape = g.node("Slice", [x.name, *places]), (c, -(-h // step), w)
    g.quantize(y, shape, x.magnitude, like=x)


def _split(g: _Maker) -> None:
    x = g.pick()
    assert x is not None
    c, h, w = x.shape
    if c < 2:
        return
    sizes = g.constant(g.name("sizes"), np.int64([1, c - 1]))
    names = [g.name("split"), g.name("split")]
    g.nodes.append(helper.make_node("Split", [x.name, sizes], names, names[0], axis=1))
    for name, size in zip(names, (1, c - 1), strict=True):
        g.quantize(name, (size, h, w), x.magnitude, like=x)


OPERATORS: dict[str, Callable[[_Maker], None]] = {
    "Conv": _conv,
    "Add": _pair("Add"),
    "Sub": _pair("Sub"),
    "Mul": _pair("Mul"),
    "AddOperand": _operand("Add"),
    "MulOperand": _operand("Mul"),
    "Concat": _concat,
    "MaxPool": _pool("MaxPool"),
    "AveragePool": _pool("AveragePool"),
    "GlobalAveragePool": _global_average_pool,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "ConvTranspose": _conv_transpose,
    "Relu": _unary("Relu"),
    "LeakyRelu": _unary("LeakyRelu", alpha=[0.125, 0.25]),
    "PRelu": _prelu,
    "HardSwish": _unary("HardSwish"),
    "HardSigmoid": _unary("HardSigmoid"),
    "Sigmoid": _unary("Sigmoid"),
    "Tanh": _unary("Tanh"),
    "Softmax": _unary("Softmax", axis=[1]),
    "Resize": _resize,
    "Pad": _pad,
    "Move": _move,
    "Split": _split,
}
"""What a graph is made of, by name; most are operators of ONNX."""


def random_graph(
    choose: Choose,
    *,
    operators: Sequence[str] = tuple(OPERATORS),
    most: int = 5,
    wide: bool = True,
    per_channel: bool = True,
    batch: int | str = "N",
) -> onnx.ModelProto:
    """A QDQ graph of some operators; tensors that nobody reads are its outputs.

    Args:
        choose: decides.
        operators: names in `OPERATORS`.
        most: operators at most; one that does not fit is left out.
        wide: some activations have 16 bits.
        per_channel: weights have a scale for each output channel.
        batch: of the input.
    """
    g = _Maker(choose, wide=wide, per_channel=per_channel)
    shape = (choose([3, 4, 1]), choose([6, 5, 8]), choose([6, 7, 8]))
    g.quantize("image", shape, -1)
    for _ in range(choose(range(1, most + 1))):
        OPERATORS[choose(operators)](g)
    if len(g.tensors) == 1:
        _activated(g, g.node("Relu", [g.tensors[0].name]), shape, -1)
    used = {name for node in g.nodes for name in node.input}
    outputs = [t for t in g.tensors if t.name not in used]
    graph = helper.make_graph(
        g.nodes,
        "random",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, *shape])],
        [
            helper.make_tensor_value_info(t.name, TensorProto.FLOAT, [batch, *t.shape])
            for t in outputs
        ],
        [numpy_helper.from_array(v, name) for name, v in g.constants.items() if name in used],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    )
    onnx.checker.check_model(model, full_check=True)
    return model
