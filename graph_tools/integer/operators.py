"""Operators with an exact integer form: tensors in, the tensor out, nothing rounded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from onnx import NodeProto

from graph_tools.integer.arithmetic import (
    Fixed,
    Integers,
    add,
    align,
    divide,
    from_float,
    multiply,
    subtract,
)
from graph_tools.integer.weighted import convolve, convolve_transposed, matrix_product
from graph_tools.integer.windows import average_pool, max_pool, mean, read_windows
from graph_tools.quantized_graph import attribute

__all__ = ["EXACT", "join"]

_Inputs = Sequence[Fixed | None]
_Exact = Callable[[NodeProto, _Inputs], Fixed]


def _given(inputs: _Inputs) -> list[Fixed]:
    return [value for value in inputs if value is not None]


def _with_bias(total: Fixed, inputs: _Inputs) -> Fixed:
    bias = inputs[2] if len(inputs) > 2 else None
    if bias is None:
        return total
    shape = (1, -1, *[1] * (total.mantissa.ndim - 2))
    return add(
        total,
        replace(
            bias,
            mantissa=bias.mantissa.reshape(shape),
            exponent=bias.exponent.reshape(shape) if bias.exponent.ndim else bias.exponent,
        ),
    )


def _conv(node: NodeProto, inputs: _Inputs) -> Fixed:
    x, weight = _given(inputs[:2])
    windows = read_windows(node, x.shape[2:], weight.shape[2:])
    groups = attribute(node, "group", 1)
    return _with_bias(convolve(x, weight, windows=windows, groups=groups), inputs)


def _conv_transpose(node: NodeProto, inputs: _Inputs) -> Fixed:
    x, weight = _given(inputs[:2])
    if attribute(node, "output_shape") or attribute(node, "auto_pad", b"NOTSET") != b"NOTSET":
        raise ValueError("a ConvTranspose whose pads follow from its output")
    total = convolve_transposed(
        x,
        weight,
        windows=read_windows(node, x.shape[2:], weight.shape[2:]),
        groups=attribute(node, "group", 1),
        output_padding=attribute(node, "output_padding", [0] * (x.mantissa.ndim - 2)),
    )
    return _with_bias(total, inputs)


def _gemm(node: NodeProto, inputs: _Inputs) -> Fixed:
    first, second = _given(inputs[:2])
    if attribute(node, "transA", 0):
        first = first.moved(np.transpose)
    if attribute(node, "transB", 0):
        second = _transposed(second)
    total = matrix_product(first, second)
    if (alpha := attribute(node, "alpha", 1.0)) != 1.0:
        total = multiply(total, from_float(alpha))
    bias = inputs[2] if len(inputs) > 2 else None
    if bias is None:
        return total
    if (beta := attribute(node, "beta", 1.0)) != 1.0:
        bias = multiply(bias, from_float(beta))
    return add(total, bias)


def _transposed(value: Fixed) -> Fixed:
    exponent = value.exponent
    return replace(
        value, mantissa=value.mantissa.T, exponent=exponent.T if exponent.ndim else exponent
    )


def _matmul(node: NodeProto, inputs: _Inputs) -> Fixed:
    return matrix_product(*_given(inputs))


def _sum(node: NodeProto, inputs: _Inputs) -> Fixed:
    total, *rest = _given(inputs)
    for value in rest:
        total = add(total, value)
    return total


def _extreme(choose: Callable[[Integers, Integers], Integers]) -> _Exact:
    def operator(node: NodeProto, inputs: _Inputs) -> Fixed:
        result, *rest = _given(inputs)
        for value in rest:
            a, b, exponent, divisor = align(result, value)
            result = Fixed(mantissa=choose(a, b), exponent=exponent, divisor=divisor)
        return result

    return operator


_maximum, _minimum = _extreme(np.maximum), _extreme(np.minimum)


def _clip(node: NodeProto, inputs: _Inputs) -> Fixed:
    value = inputs[0]
    low, high = (*inputs, None, None)[1:3]
    if low is not None:
        value = _maximum(node, [value, low])
    if high is not None:
        value = _minimum(node, [value, high])
    return _given([value])[0]


def _relu(node: NodeProto, inputs: _Inputs) -> Fixed:
    (x,) = _given(inputs)
    return replace(x, mantissa=np.maximum(x.mantissa, 0))


def _negative(node: NodeProto, inputs: _Inputs) -> Fixed:
    (x,) = _given(inputs)
    return replace(x, mantissa=-x.mantissa, span=None)


def _absolute(node: NodeProto, inputs: _Inputs) -> Fixed:
    (x,) = _given(inputs)
    return replace(x, mantissa=np.abs(x.mantissa), span=None)


def _max_pool(node: NodeProto, inputs: _Inputs) -> Fixed:
    (x,) = _given(inputs)
    if len(node.output) > 1 and node.output[1]:
        raise ValueError("a MaxPool that gives indices")
    return max_pool(x, read_windows(node, x.shape[2:]))


def _average_pool(node: NodeProto, inputs: _Inputs) -> Fixed:
    (x,) = _given(inputs)
    count_pads = bool(attribute(node, "count_include_pad", 0))
    return average_pool(x, read_windows(node, x.shape[2:]), count_pads=count_pads)


def _global_average_pool(node: NodeProto, inputs: _Inputs) -> Fixed:
    (x,) = _given(inputs)
    return mean(x, range(2, x.mantissa.ndim), keep=True)


def _global_max_pool(node: NodeProto, inputs: _Inputs) -> Fixed:
    (x,) = _given(inputs)
    axes = tuple(range(2, x.mantissa.ndim))
    if x.exponent.size != 1 or x.divisor.size != 1:
        raise ValueError("the scales vary over what is compared")
    return replace(x, mantissa=x.mantissa.max(axis=axes, keepdims=True))


def _reduce(*, divides: bool) -> _Exact:
    def operator(node: NodeProto, inputs: _Inputs) -> Fixed:
        x = _given(inputs[:1])[0]
        axes = attribute(node, "axes", ())
        if len(inputs) > 1 and inputs[1] is not None:
            axes = inputs[1].mantissa.reshape(-1) << inputs[1].exponent
        if len(axes) == 0:
            axes = () if attribute(node, "noop_with_empty_axes", 0) else range(x.mantissa.ndim)
        keep = bool(attribute(node, "keepdims", 1))
        return mean(x, [int(axis) for axis in axes], keep=keep, divide=divides)

    return operator


def join(values: Sequence[Fixed], axis: int) -> Fixed:
    """Concat; scales may differ."""
    first = values[0]
    rest: dict[str, Integers] = {}
    for name in ("exponent", "divisor"):
        parts = [getattr(value, name) for value in values]
        same = all(part.size == 1 and part.item() == parts[0].item() for part in parts)
        rest[name] = (
            parts[0].reshape(())
            if same
            else np.concatenate(
                [np.broadcast_to(p, v.shape) for p, v in zip(parts, values, strict=True)], axis
            )
        )
    alike = rest["exponent"].ndim == 0 and all(value.span == first.span for value in values)
    return Fixed(
        mantissa=np.concatenate([value.mantissa for value in values], axis),
        exponent=rest["exponent"],
        divisor=rest["divisor"],
        span=first.span if alike else None,
    )


def _concat(node: NodeProto, inputs: _Inputs) -> Fixed:
    return join(_given(inputs), attribute(node, "axis"))


def _pairwise(operation: Callable[[Fixed, Fixed], Fixed]) -> _Exact:
    def operator(node: NodeProto, inputs: _Inputs) -> Fixed:
        first, second = _given(inputs)
        return operation(first, second)

    return operator


EXACT: dict[str, _Exact] = {
    "Abs": _absolute,
    "Add": _pairwise(add),
    "AveragePool": _average_pool,
    "Clip": _clip,
    "Concat": _concat,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Div": _pairwise(divide),
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average_pool,
    "GlobalMaxPool": _global_max_pool,
    "MatMul": _matmul,
    "Max": _maximum,
    "MaxPool": _max_pool,
    "Min": _minimum,
    "Mul": _pairwise(multiply),
    "Neg": _negative,
    "ReduceMean": _reduce(divides=True),
    "ReduceSum": _reduce(divides=False),
    "Relu": _relu,
    "Sub": _pairwise(subtract),
    "Sum": _sum,
}
"""By operator. A ValueError or ZeroDivisionError says that this node has no such form."""
