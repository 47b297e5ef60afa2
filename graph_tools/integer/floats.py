"""Nodes of one file that have no exact integer form, and what is built once for each of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import NodeProto

from graph_tools.integer.parameters import Parameters
from graph_tools.integer.tables import FloatOperator
from graph_tools.quantized_graph import QuantizedGraph

__all__ = ["FloatNodes"]


class FloatNodes:
    """Runs single nodes in float32 and keeps their sessions and tables."""

    def __init__(self, graph: QuantizedGraph, parameters: Parameters) -> None:
        self._graph, self._parameters = graph, parameters
        self._operators: dict[int, FloatOperator] = {}
        self._tables: dict[int, npt.NDArray[np.float32]] = {}

    def run(
        self, node: NodeProto, given: Mapping[str, npt.NDArray[Any]]
    ) -> list[npt.NDArray[Any]]:
        """The outputs of a node from its computed inputs."""
        if id(node) not in self._operators:
            constants = {
                name: value
                for name in node.input
                if name and (value := self._parameters.constant(name)) is not None
            }
            opsets = list(self._graph.proto.opset_import)
            self._operators[id(node)] = FloatOperator(node, opsets, constants)
        return self._operators[id(node)](given)

    def table(
        self, node: NodeProto, name: str, entries: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        """What an elementwise node makes of all values that its input ``name`` can have."""
        if id(node) not in self._tables:
            (found,) = self.run(node, {name: entries})
            self._tables[id(node)] = found.reshape(-1)
        return self._tables[id(node)]
