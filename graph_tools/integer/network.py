"""Run a QDQ file in integers, and keep every integer tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx

from graph_tools.integer.arithmetic import Fixed, Integers
from graph_tools.integer.execution import Execution
from graph_tools.integer.floats import FloatNodes
from graph_tools.integer.parameters import Parameters
from graph_tools.integer.tables import Lookup
from graph_tools.quantized_graph import QuantizedGraph

__all__ = ["IntegerNetwork", "IntegerRun"]


@dataclass(frozen=True, kw_only=True)
class IntegerRun:
    """What a batch gave.

    Attributes:
        integers: every integer tensor, zero point included, int64, by name in the graph's order:
            what QuantizeLinear gives, a Clip on integers behind it, and what moves these.
        outputs: graph outputs that integers determine exactly, dequantized to float32.
        accumulators: bits that the largest result of each exact operator took, by node name.
        tables: nodes that were looked up.
        float_nodes: nodes in front of integers that were computed in float32.
        tail: nodes that lead to no integers and have no exact form; they were not run.
    """

    integers: Mapping[str, Integers]
    outputs: Mapping[str, npt.NDArray[np.float32]]
    accumulators: Mapping[str, int]
    tables: tuple[str, ...]
    float_nodes: tuple[str, ...]
    tail: tuple[str, ...]


class IntegerNetwork:
    """An interpreter of a QDQ file, in integers from the first QuantizeLinear on.

    Scales must be powers of two. Sums are exact and checked against the accumulator;
    requantization is a shift that rounds half to even (a division where a mean was taken).

    Args:
        proto: the model, as `graph_tools.qdq.write_qdq` or another tool wrote it.
        accumulator_bits: of every sum and product between two quantizers.
        strict: refuse operators in front of integers that need float32.

    Raises:
        ModelError: a scale is no power of two; names the node.
    """

    def __init__(
        self, proto: onnx.ModelProto, *, accumulator_bits: int = 32, strict: bool = False
    ) -> None:
        self.graph = QuantizedGraph(proto)
        self._bits, self._strict = accumulator_bits, strict
        self._parameters = Parameters(self.graph)
        self._floats = FloatNodes(self.graph, self._parameters)
        self._needed = self._needed_for_integers()

    def run(self, batch: npt.NDArray[np.float32]) -> IntegerRun:
        """Run one batch.

        Args:
            batch: [N, ...] float32, the graph's one input.

        Raises:
            IntegerOverflowError: a result leaves the accumulator; names the node.
            UnsupportedOperatorError: in strict mode, the nodes that need float32.
            VerificationError: onnxruntime cannot run a node that needs float32.
        """
        execution = Execution(
            self.graph,
            self._parameters,
            self._floats,
            needed=self._needed,
            accumulator_bits=self._bits,
            strict=self._strict,
        )
        execution.run(batch)
        outputs = {
            name: value.to_float()
            for name in self.graph.outputs
            if isinstance(value := execution.values.get(name), Fixed | Lookup)
        }
        return IntegerRun(
            integers=execution.integers,
            outputs=outputs,
            accumulators=execution.accumulators,
            tables=tuple(execution.tables),
            float_nodes=tuple(execution.float_nodes),
            tail=tuple(execution.tail),
        )

    def _needed_for_integers(self) -> frozenset[int]:
        stored = (node.input[0] for node in self.graph.dequantizers)
        return frozenset(self.graph.leading_to(stored))
