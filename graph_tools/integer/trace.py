"""Trace a mismatch to the first node that differs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from graph_tools.quantized_graph import QuantizedGraph

__all__ = ["FirstDifference", "first_difference"]


@dataclass(frozen=True, kw_only=True)
class FirstDifference:
    """The first integer tensor at which two runs part: all in front of it agrees.

    Attributes:
        tensor: its name in the graph.
        op_type: the operator whose result was quantized into it; "" for the graph's input.
        node: that operator's name.
        elements: of the tensor.
        differing: elements that are not equal.
        largest_steps: largest difference.
    """

    tensor: str
    op_type: str
    node: str
    elements: int
    differing: int
    largest_steps: int

    def __str__(self) -> str:
        made_by = f"{self.op_type} {self.node}" if self.op_type else "the input"
        return (
            f"{made_by} ('{self.tensor}'): {self.differing:,} of {self.elements:,} elements "
            f"differ, by at most {self.largest_steps} steps"
        )


def first_difference(
    graph: QuantizedGraph,
    expected: Mapping[str, npt.NDArray[Any]],
    found: Mapping[str, npt.NDArray[Any]],
) -> FirstDifference | None:
    """Compare the integer tensors that both runs give, in the graph's order.

    Args:
        graph: of the file.
        expected: integers by tensor name, such as `IntegerRun.integers`.
        found: those of another run or file.

    Returns:
        None when all that both have is equal.
    """
    for node in graph.nodes:
        for name in node.output:
            if name not in expected or name not in found:
                continue
            first, second = (np.asarray(x[name]).astype(np.int64) for x in (expected, found))
            if np.array_equal(first, second):
                continue
            same = first.shape == second.shape
            steps = np.abs(first - second) if same else np.full(first.shape, -1)
            source = _source(graph, name)
            maker = graph.producers.get(source)
            return FirstDifference(
                tensor=name,
                op_type=maker.op_type if maker is not None else "",
                node=maker.name if maker is not None else "",
                elements=first.size,
                differing=int(np.count_nonzero(steps)),
                largest_steps=int(steps.max(initial=0)),
            )
    return None


def _source(graph: QuantizedGraph, name: str) -> str:
    """The tensor that was quantized into integers, or these where another operator made them."""
    node = graph.producers[name]
    while node.op_type == "Clip" and node.input[0] in graph.producers:
        node = graph.producers[node.input[0]]
    return node.input[0] if node.op_type == "QuantizeLinear" else name
