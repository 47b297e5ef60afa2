"""Comparisons, logic and selection; bool results carry no gradient, Where does."""

from __future__ import annotations

import torch

from graph_tools.torch_ops.registry import Compute, Node, alias, operator

__all__ = ["is_inf"]

alias("And", torch.logical_and)
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
