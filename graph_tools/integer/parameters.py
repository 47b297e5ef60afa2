"""Constants, scales and zero points of a file, and what its Q and DQ nodes do with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import NodeProto

from graph_tools.errors import ModelError
from graph_tools.integer.arithmetic import Fixed, Integers, log2_exact, requantize
from graph_tools.integer.tables import Lookup
from graph_tools.integer.values import Stored, Value
from graph_tools.quantized_graph import QuantizedGraph, attribute

__all__ = ["Parameters"]

_KEPT = 2**20  # elements of a stored tensor that stays dequantized between batches


class Parameters:
    """Everything that a file says beside its operators.

    Args:
        graph: the file.

    Raises:
        ModelError: a scale is no power of two; names the node.
    """

    def __init__(self, graph: QuantizedGraph) -> None:
        self._graph = graph
        self._constants: dict[str, npt.NDArray[Any] | None] = {}
        self._dequantized: dict[str, Fixed] = {}
        self._stored = {
            node.output[0]: node
            for node in graph.dequantizers
            if graph.is_constant(node.input[0])
        }
        for node in (*graph.quantizers, *graph.dequantizers):
            self._exponent(node, 1)

    def constant(self, name: str) -> npt.NDArray[Any] | None:
        """The value of a constant; None for computed tensors and absent inputs."""
        if name not in self._constants:
            self._constants[name] = self._graph.constant(name) if name else None
        return self._constants[name]

    def is_stored(self, name: str) -> bool:
        """Whether a DequantizeLinear makes ``name`` from integers in the file."""
        return name in self._stored

    def stored(self, name: str) -> Fixed:
        """What a DequantizeLinear makes of integers in the file."""
        if name not in self._dequantized:
            node = self._stored[name]
            found = self.dequantize(node, Stored(self._integers(node.input[0])))
            if found.mantissa.size > _KEPT:
                return found
            self._dequantized[name] = found
        return self._dequantized[name]

    def dequantize(self, node: NodeProto, value: Stored) -> Fixed:
        """DequantizeLinear."""
        rank = value.integers.ndim
        zero = self._zero_point(node, rank)
        low, high = self._graph.limits(node)
        middle = int(zero.reshape(-1)[0])
        return Fixed(
            mantissa=value.integers - zero,
            exponent=self._exponent(node, rank),
            span=(low - middle, high - middle),
        )

    def quantize(self, node: NodeProto, value: Value) -> Integers:
        """QuantizeLinear."""
        low, high = self._graph.limits(node)
        if isinstance(value, Stored):
            raise ModelError("quantizes integers", where=f"node {node.name}")
        if isinstance(value, Fixed):
            rank = value.mantissa.ndim
            zero = self._zero_point(node, rank)
            if zero.size != 1:
                raise ModelError("has several zero points", where=f"node {node.name}")
            return requantize(
                value,
                self._exponent(node, rank),
                low=low,
                high=high,
                zero_point=int(zero.reshape(-1)[0]),
            )
        values = value.values
        steps = np.ldexp(values, -self._exponent(node, values.ndim).astype(np.int32))
        rounded = np.rint(np.nan_to_num(steps.astype(np.float64), nan=0.0))
        zero = self._zero_point(node, values.ndim)
        found = np.clip(rounded + zero, low, high).astype(np.int64)
        return found[value.index] if isinstance(value, Lookup) else found

    def _integers(self, name: str) -> Integers:
        return np.asarray(self.constant(name)).astype(np.int64)

    def _exponent(self, node: NodeProto, rank: int) -> Integers:
        scale = self.constant(node.input[1])
        exponent = None if scale is None else log2_exact(scale)
        if exponent is None:
            raise ModelError(
                "its scale is no power of two",
                where=f"node {node.name or node.output[0]}",
                hint="integers alone compute with powers of two only",
            )
        return self._along(node, exponent, rank)

    def _zero_point(self, node: NodeProto, rank: int) -> Integers:
        if len(node.input) < 3 or not node.input[2]:
            return np.asarray(0, np.int64)
        return self._along(node, self._integers(node.input[2]), rank)

    def _along(self, node: NodeProto, values: Integers, rank: int) -> Integers:
        if values.size == 1:
            return values.reshape(())
        if values.ndim != 1:
            raise ModelError("has a scale for each block", where=f"node {node.name}")
        if rank == 1:
            return values
        shape = [1] * rank
        shape[attribute(node, "axis", 1)] = -1
        return values.reshape(shape)
