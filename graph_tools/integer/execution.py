"""One batch on its way through a file, node by node, in integers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
from onnx import NodeProto

from graph_tools.errors import (
    IntegerOverflowError,
    ModelError,
    UnsupportedOperatorError,
    VerificationError,
)
from graph_tools.integer.arithmetic import Fixed, Integers, bits_of, from_float, require_bits
from graph_tools.integer.floats import FloatNodes
from graph_tools.integer.movement import MOVES, Move
from graph_tools.integer.operators import EXACT
from graph_tools.integer.parameters import Parameters
from graph_tools.integer.tables import ELEMENTWISE, Lookup, table_over
from graph_tools.integer.values import Float, Stored, Value
from graph_tools.quantized_graph import QuantizedGraph

__all__ = ["Execution"]

# With a constant in float the file's result is a float32 product, whose ties are not exact ones.
_GAINS = frozenset({"Add", "Div", "Mul", "Sub"})


class Execution:
    """Runs one batch.

    Args:
        graph: the file.
        parameters: its constants.
        floats: its nodes without an exact form.
        needed: ids of the nodes that lead to integers.
        accumulator_bits: of every sum and product between two quantizers.
        strict: refuse operators in front of integers that need float32.

    Attributes:
        values: tensors that are still read, by name.
        integers: every integer tensor, in the graph's order.
        accumulators: bits of each exact operator's largest result, by node name.
        tables: nodes that were looked up; ``float_nodes`` computed in float32; ``tail`` not run.
    """

    def __init__(
        self,
        graph: QuantizedGraph,
        parameters: Parameters,
        floats: FloatNodes,
        *,
        needed: frozenset[int],
        accumulator_bits: int,
        strict: bool,
    ) -> None:
        self.graph, self._parameters, self._floats = graph, parameters, floats
        self._needed, self._bits, self._strict = needed, accumulator_bits, strict
        self.values: dict[str, Value] = {}
        self.integers: dict[str, Integers] = {}
        self.accumulators: dict[str, int] = {}
        self.tables: list[str] = []
        self.float_nodes: list[str] = []
        self.tail: list[str] = []

    def run(self, batch: npt.NDArray[np.float32]) -> None:
        """Run all nodes; ``values`` then holds the graph's outputs."""
        self.values[self.graph.inputs[0].name] = Float(np.asarray(batch, np.float32))
        remaining = {name: len(users) for name, users in self.graph.consumers.items()}
        for node in self.graph.nodes:
            self._node(node)
            for name in node.input:  # what nobody reads any more need not stay in memory
                remaining[name] -= 1
                if not remaining[name] and name not in self.graph.outputs:
                    self.values.pop(name, None)

    def _node(self, node: NodeProto) -> None:
        if node.op_type == "Constant":
            return
        if self._parameters.is_stored(node.output[0]):
            self.values[node.output[0]] = self._parameters.stored(node.output[0])
            return
        computed = [n for n in node.input if n and self._parameters.constant(n) is None]
        if any(name not in self.values for name in computed):
            self.tail.append(node.name)  # behind the float tail
            return
        try:
            results = self._compute(node, computed)
        except IntegerOverflowError as error:
            where = f"node {node.name or node.output[0]}"
            raise IntegerOverflowError(
                f"{node.op_type} {error.what}",
                where=where,
                hint="smaller weights or fewer bits make it fit",
            ) from error
        if results is None:
            self.tail.append(node.name)
            return
        for name, value in zip(node.output, results, strict=False):
            if name:
                self.values[name] = value
                if isinstance(value, Stored):
                    self.integers[name] = value.integers

    def _compute(self, node: NodeProto, computed: list[str]) -> list[Value] | None:
        values = [self.values[name] for name in computed]
        if node.op_type == "QuantizeLinear":
            value = values[0] if values else self._fixed(node.input[0])
            return [Stored(self._parameters.quantize(node, value))]
        if node.op_type == "DequantizeLinear":
            if not isinstance(values[0], Stored):
                raise ModelError("dequantizes no integers", where=f"node {node.name}")
            return [self._parameters.dequantize(node, values[0])]
        if any(isinstance(value, Stored) for value in values):
            return self._on_stored(node, values)
        if (moved := self._moved(node, values)) is not None:
            return moved
        gain = node.op_type in _GAINS and len(computed) == 1
        if gain and (looked_up := self._looked_up(node, computed)) is not None:
            return [looked_up]
        if gain and (gained := self._gained(node, computed)) is not None:
            return [gained]
        if all(isinstance(value, Fixed) for value in values) and node.op_type in EXACT:
            found = self._exact(node)
            if found is not None:
                return [found]
        if (looked_up := self._looked_up(node, computed)) is not None:
            return [looked_up]
        return self._in_float(node, computed)

    def _fixed(self, name: str) -> Fixed:
        value = self.values.get(name)
        if isinstance(value, Fixed):
            return value
        constant = np.asarray(self._parameters.constant(name))
        if not np.all(np.isfinite(constant)):
            raise ValueError("an infinite constant")
        return from_float(constant)

    def _on_stored(self, node: NodeProto, values: list[Value]) -> list[Value]:
        value = values[0]
        if len(values) == 1 and isinstance(value, Stored):
            if node.op_type == "Clip":
                bounds = [self._parameters.constant(n) if n else None for n in node.input[1:]]
                low, high = (
                    None if b is None else int(b.item()) for b in (*bounds, None, None)[:2]
                )
                return [Stored(np.clip(value.integers, low, high))]
            if (moves := self._moves(node)) is not None and node.op_type != "Pad":
                return [Stored(move(value.integers)) for move in moves]
        raise UnsupportedOperatorError(
            (node.op_type,),
            where=f"node {node.name}",
            hint="the interpreter knows Clip and data movement on stored integers",
        )

    def _moves(self, node: NodeProto) -> list[Move] | None:
        if node.op_type not in MOVES:
            return None
        constants = [self._parameters.constant(name) for name in node.input[1:]]
        absent = [not name for name in node.input[1:]]
        if any(c is None and not a for c, a in zip(constants, absent, strict=True)):
            return None
        try:
            return MOVES[node.op_type](node, constants)
        except ValueError:
            return None

    def _moved(self, node: NodeProto, values: list[Value]) -> list[Value] | None:
        if len(values) != 1 or (moves := self._moves(node)) is None:
            return None
        value = values[0]
        if isinstance(value, Fixed):
            return [value.moved(move) for move in moves]
        if isinstance(value, Lookup) and node.op_type != "Pad":
            return [replace(value, index=move(value.index)) for move in moves]
        return None

    def _exact(self, node: NodeProto) -> Fixed | None:
        """The result of an operator with an exact integer form; None where it has none."""
        plain = any(
            self._parameters.constant(n) is not None and n not in self.values
            for n in node.input
        )
        try:
            inputs = [self._operand(node, name) for name in node.input]
            found = EXACT[node.op_type](node, inputs)
            require_bits(found.mantissa, self._bits)
        except (ValueError, ZeroDivisionError):
            return None
        except IntegerOverflowError:
            if plain:  # a constant in float, not an integer of the file
                return None
            raise
        self.accumulators[node.name] = bits_of(found.mantissa)
        return found

    def _operand(self, node: NodeProto, name: str) -> Fixed | None:
        if not name:
            return None
        constant = self._parameters.constant(name)
        unbounded = (
            constant is not None and node.op_type == "Clip" and np.isinf(constant).all()
        )
        return None if unbounded else self._fixed(name)

    def _looked_up(self, node: NodeProto, computed: list[str]) -> Lookup | None:
        if node.op_type not in ELEMENTWISE or len(computed) != 1:
            return None
        others = [self._parameters.constant(name) for name in node.input if name]
        value = self.values[computed[0]]
        rank = len(value.shape) if isinstance(value, Fixed | Lookup) else 0
        if any(o is not None and (o.size != 1 or o.ndim > rank) for o in others):
            return None
        table = table_over(value) if isinstance(value, Fixed) else value
        if not isinstance(table, Lookup):
            return None
        self.tables.append(node.name)
        return table.mapped(self._floats.table(node, computed[0], table.values))

    def _gained(self, node: NodeProto, computed: list[str]) -> Float | None:
        """A gain of several values in float: one float32 operation on each integer.

        A table for each value would hold the same.
        """
        value = self.values[computed[0]]
        if isinstance(value, Fixed) and (
            value.divisor.size != 1
            or value.divisor.item() != 1
            or bits_of(value.mantissa) > 24
        ):
            return None
        if isinstance(value, Stored):
            return None
        self.tables.append(node.name)
        return Float(self._floats.run(node, {computed[0]: value.to_float()})[0])

    def _in_float(self, node: NodeProto, computed: list[str]) -> list[Value] | None:
        if id(node) not in self._needed:
            return None
        if self._strict:
            raise UnsupportedOperatorError(
                (node.op_type,), where=f"node {node.name}", hint="it has no integer form"
            )
        given = {}
        for name in computed:
            value = self.values[name]
            if isinstance(value, Stored):
                raise VerificationError("integers read as numbers", where=f"node {node.name}")
            given[name] = value.to_float()
        self.float_nodes.append(node.name)
        results = self._floats.run(node, given)
        names = [name for name in node.output if name]
        by_name = dict(zip(names, map(Float, results), strict=True))
        return [by_name.get(name, Float(np.zeros(0))) for name in node.output]
