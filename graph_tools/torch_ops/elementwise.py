"""Arithmetic and transcendental functions, element by element, with broadcasting."""

from __future__ import annotations

from functools import reduce

import torch

from graph_tools.torch_ops.registry import Compute, Node, alias, operator

__all__ = ["divide", "modulo", "power"]

alias("Abs", torch.abs)
alias("Acos", torch.acos)
alias("Acosh", torch.acosh)
alias("Add", torch.add)
alias("Asin", torch.asin)
alias("Asinh", torch.asinh)
alias("Atan", torch.atan)
alias("Atanh", torch.atanh)
alias("Ceil", torch.ceil)
alias("Cos", torch.cos)
alias("Cosh", torch.cosh)
alias("Erf", torch.erf)
alias("Exp", torch.exp)
alias("Floor", torch.floor)
alias("Identity", lambda x: x)
alias("Log", torch.log)
alias("Max", lambda *values: reduce(torch.maximum, values))
alias("Mean", lambda *values: reduce(torch.add, values) / len(values))
alias("Min", lambda *values: reduce(torch.minimum, values))
alias("Mul", torch.mul)
alias("Neg", torch.neg)
alias("Reciprocal", torch.reciprocal)
alias("Round", torch.round)  # half to even, as ONNX
alias("Sign", torch.sign)
alias("Sin", torch.sin)
alias("Sinh", torch.sinh)
alias("Sqrt", torch.sqrt)
alias("Sub", torch.sub)
alias("Sum", lambda *values: reduce(torch.add, values))
alias("Tan", torch.tan)


@operator("Div")
def divide(node: Node) -> Compute:
    """Quotient; of integers, truncated towards zero."""

    def compute(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if a.dtype.is_floating_point:
            return torch.div(a, b)
        return torch.div(a, b, rounding_mode="trunc")

    return compute


@operator("Mod")
def modulo(node: Node) -> Compute:
    """Remainder with the sign of the divisor, or with fmod=1 of the dividend."""
    return torch.fmod if node.integer("fmod", 0) else torch.remainder


@operator("Pow")
def power(node: Node) -> Compute:
    """Base to the exponent, in the type of the base."""
    exponent = node.scalar(1)
    if exponent is not None:
        return lambda x, _: torch.pow(x, exponent).to(x.dtype)
    return lambda x, y: torch.pow(x, y).to(x.dtype)
