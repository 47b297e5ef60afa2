"""ONNX operators in torch, a family a file; importing this package registers them all.

To add an operator, write one function in the file of its family (see
:mod:`graph_tools.torch_ops.registry`).
"""

from __future__ import annotations

from graph_tools.torch_ops import (
    activation,
    attention,
    convolution,
    creation,
    elementwise,
    indexing,
    linear,
    logic,
    loss,
    normalization,
    padding,
    pooling,
    quantization,
    recurrent,
    reduction,
    regions,
    resize,
    sampling,
    scatter,
    shape,
    sorting,
    spectral,
)
from graph_tools.torch_ops.registry import OPERATORS, Compute, Node, Operator, operator

__all__ = [
    "OPERATORS",
    "Compute",
    "Node",
    "Operator",
    "activation",
    "attention",
    "convolution",
    "creation",
    "elementwise",
    "indexing",
    "linear",
    "logic",
    "loss",
    "normalization",
    "operator",
    "padding",
    "pooling",
    "quantization",
    "recurrent",
    "reduction",
    "regions",
    "resize",
    "sampling",
    "scatter",
    "shape",
    "sorting",
    "spectral",
]
