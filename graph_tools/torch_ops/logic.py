"""Comparisons, logic and selection; bool results carry no gradient, Where does."""

from __future__ import annotations

import torch

from graph_tools.torch_ops.dtypes import torch_type
from graph_tools.torch_ops.registry import Compute, Node, alias, operator

__all__ = ["bit_cast", "bit_shift", "is_inf"]

alias("And", torch.logical_and)
alias("BitwiseAnd", torch.bitwise_and)
alias("BitwiseNot", torch.bitwise_not)
alias("BitwiseOr", torch.bitwise_or)
alias("BitwiseXor", torch.bitwise_xor)
alias("Equal", torch.eq)
alias("Greater", torch.gt)
alias("GreaterOrEqual", torch.ge)
alias("IsNaN", torch.isnan)
alias("Less", torch.lt)
alias("LessOrEqual", torch.le)
alias("Not", torch.logical_not)
alias("Or", torch.logical_or)
alias("Where", torch.where)
alias("Xor", torch.logical_xor)


@operator("IsInf")
def is_inf(node: Node) -> Compute:
    """Tell where the input is infinite, with the wanted sign(s)."""
    negative, positive = node.integer("detect_negative", 1), node.integer("detect_positive", 1)
    if negative and positive:
        return torch.isinf
    if positive:
        return torch.isposinf
    return torch.isneginf if negative else lambda x: torch.zeros_like(x, dtype=torch.bool)


@operator("BitShift")
def bit_shift(node: Node) -> Compute:
    """Shift unsigned integers by as many bits as another tensor says."""
    left = node.text("direction", "LEFT") == "LEFT"
    return torch.bitwise_left_shift if left else torch.bitwise_right_shift


@operator("BitCast")
def bit_cast(node: Node) -> Compute:
    """The same bits as another type of the same width."""
    dtype = torch_type(node.attributes["to"])
    return lambda x: x.contiguous().view(dtype)
