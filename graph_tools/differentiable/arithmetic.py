"""Activations and arithmetic in terms of operators that have gradients.

The function bodies of the ONNX operators would do but for exp: a branch that is not taken
overflows, and infinity times the gradient 0 is not a number. Here every exponent is at most 0.
"""

from __future__ import annotations

import math
from functools import reduce

import numpy as np
from onnx import TensorProto

from graph_tools.differentiable.registry import NoGradientError, Site, Writer, rewrite

__all__: list[str] = []


@rewrite("HardSigmoid")
def _hard_sigmoid(site: Site, write: Writer) -> str:
    slope, offset = site.attribute("alpha", 0.2), site.attribute("beta", 0.5)
    return write("Clip", write("Add", write("Mul", site.name(0), slope), offset), 0.0, 1.0)


@rewrite("HardSwish")
def _hard_swish(site: Site, write: Writer) -> str:
    x = site.name(0)
    return write("Mul", x, write("Clip", write("Add", write("Mul", x, 1 / 6), 0.5), 0.0, 1.0))


def _exponential_unit(
    write: Writer, x: str, *, alpha: float, width: float = 1.0, gamma: float = 1.0
) -> str:
    """``gamma (max(x, 0) + alpha (exp(min(x, 0) / width) - 1))``."""
    below = write("Min", x, 0.0)
    if width != 1:
        below = write("Mul", below, 1 / width)
    curve = write("Mul", write("Sub", write("Exp", below), 1.0), alpha)
    unit = write("Add", write("Relu", x), curve)
    return unit if gamma == 1 else write("Mul", unit, gamma)


@rewrite("Elu")
def _elu(site: Site, write: Writer) -> str:
    return _exponential_unit(write, site.name(0), alpha=site.attribute("alpha", 1.0))


@rewrite("Celu")
def _celu(site: Site, write: Writer) -> str:
    alpha = site.attribute("alpha", 1.0)
    return _exponential_unit(write, site.name(0), alpha=alpha, width=alpha)


@rewrite("Selu")
def _selu(site: Site, write: Writer) -> str:
    alpha = site.attribute("alpha", 1.6732632423543772)
    gamma = site.attribute("gamma", 1.0507009873554805)
    return _exponential_unit(write, site.name(0), alpha=alpha, gamma=gamma)


def _softplus(write: Writer, x: str) -> str:
    """``max(x, 0) + log(1 + exp(-|x|))``."""
    small = write("Exp", write("Neg", write("Abs", x)))
    return write("Add", write("Relu", x), write("Log", write("Add", small, 1.0)))


@rewrite("Softplus")
def _softplus_node(site: Site, write: Writer) -> str:
    return _softplus(write, site.name(0))


@rewrite("Mish")
def _mish(site: Site, write: Writer) -> str:
    return write("Mul", site.name(0), write("Tanh", _softplus(write, site.name(0))))


@rewrite("Softsign")
def _softsign(site: Site, write: Writer) -> str:
    return write("Div", site.name(0), write("Add", write("Abs", site.name(0)), 1.0))


@rewrite("Swish")
def _swish(site: Site, write: Writer) -> str:
    inner = write("Mul", site.name(0), site.attribute("alpha", 1.0))
    return write("Mul", site.name(0), write("Sigmoid", inner))


@rewrite("ThresholdedRelu")
def _thresholded_relu(site: Site, write: Writer) -> str:
    x = site.name(0)
    return write("Where", write("Greater", x, site.attribute("alpha", 1.0)), x, 0.0)


@rewrite("PRelu")
def _prelu(site: Site, write: Writer) -> str:
    x, slope = site.name(0), site.name(1)
    return write("Where", write("Less", x, 0.0), write("Mul", x, slope), x)


@rewrite("LeakyRelu")
def _leaky_relu(site: Site, write: Writer) -> str | None:
    """Its gradient goes by the sign of the output: wrong for a negative slope."""
    x, slope = site.name(0), site.attribute("alpha", 0.01)
    if slope >= 0:
        return None
    return write("Where", write("Less", x, 0.0), write("Mul", x, slope), x)


@rewrite("Gelu")
def _gelu(site: Site, write: Writer) -> str | None:
    """Its gradient is that of the exact form, whatever ``approximate`` says."""
    if site.attribute("approximate", "none") != "tanh":
        return None
    x = site.name(0)
    cube = write("Mul", write("Mul", x, write("Mul", x, x)), 0.044715)
    inner = write("Mul", write("Add", x, cube), math.sqrt(2 / math.pi))
    return write("Mul", write("Mul", x, 0.5), write("Add", write("Tanh", inner), 1.0))


@rewrite("Tan")
def _tan(site: Site, write: Writer) -> str:
    return write("Div", write("Sin", site.name(0)), write("Cos", site.name(0)))


@rewrite("Sinh", "Cosh")
def _sinh_cosh(site: Site, write: Writer) -> str:
    up, down = write("Exp", site.name(0)), write("Exp", write("Neg", site.name(0)))
    joined = write("Sub" if site.node.op_type == "Sinh" else "Add", up, down)
    return write("Mul", joined, 0.5)


@rewrite("Sign")
def _sign(site: Site, write: Writer) -> str:
    """Comparisons pass no gradient on, which is right: it is 0."""
    above, below = (
        write("Cast", write(op, site.name(0), 0.0), to=TensorProto.FLOAT)
        for op in ("Greater", "Less")
    )
    return write("Sub", above, below)


@rewrite("Pow")
def _pow(site: Site, write: Writer) -> str | None:
    base, exponent = site.name(0), site.name(1)
    if site.is_traced(1):
        if not site.is_traced(0) and not (np.asarray(site.value(0)) > 0).all():
            raise NoGradientError("Pow of a base that is not positive")
        return write("Exp", write("Mul", exponent, write("Log", base)))
    if site.types[exponent].elem_type == TensorProto.FLOAT:
        return None
    return write("Pow", base, write("Cast", exponent, to=TensorProto.FLOAT))


@rewrite("Clip")
def _clip(site: Site, write: Writer) -> str | None:
    if not site.is_traced(1) and not site.is_traced(2):
        return None
    value = site.name(0)
    for op, bound in (("Max", site.name(1)), ("Min", site.name(2))):
        value = write(op, value, bound) if bound else value
    return value


@rewrite("Sum", "Mean")
def _sum(site: Site, write: Writer) -> str:
    names = list(site.node.input)
    if len(names) == 1:
        return write("Identity", names[0])
    total = reduce(lambda left, right: write("Add", left, right), names)
    return total if site.node.op_type == "Sum" else write("Mul", total, 1 / len(names))


@rewrite("Dropout")
def _dropout(site: Site, write: Writer) -> str:
    """Of inference: it changes nothing."""
    return write("Identity", site.name(0))


@rewrite("CastLike")
def _cast_like(site: Site, write: Writer) -> str:
    return write("Cast", site.name(0), to=site.types[site.name(1)].elem_type)


@rewrite("MatMul")
def _mat_mul(site: Site, write: Writer) -> str | None:
    """Its gradient takes vectors for matrices."""
    left, right = site.name(0), site.name(1)
    if len(site.shape(left)) > 1 and len(site.shape(right)) > 1:
        return None
    if len(site.shape(left)) == 1:
        left = write.reshape(left, (1, -1))
    if len(site.shape(right)) == 1:
        right = write.reshape(right, (-1, 1))
    return write.reshape(write("MatMul", left, right), site.shape(site.node.output[0]))
