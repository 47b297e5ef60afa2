"""Run a QDQ file in integers, node by node, and keep every integer tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto

from graph_tools.errors import (
    IntegerOverflowError,
    ModelError,
    UnsupportedOperatorError,
    VerificationError,
)
from graph_tools.integer.arithmetic import (
    Fixed,
    Integers,
    bits_of,
    from_float,
    log2_exact,
    requantize,
    require_bits,
)
from graph_tools.integer.movement import MOVES, Move
from graph_tools.integer.operators import EXACT
from graph_tools.integer.tables import ELEMENTWISE, FloatOperator, Lookup, table_over
from graph_tools.quantized_graph import QuantizedGraph, attribute

__all__ = ["IntegerNetwork", "IntegerRun"]

Array = npt.NDArray[Any]

# With a constant in float the file's result is a float32 product, whose ties are not exact ones.
_GAINS = frozenset({"Add", "Div", "Mul", "Sub"})


@dataclass(frozen=True)
class _Stored:
    """Integers as the file stores them, zero point included."""

    integers: Integers


@dataclass(frozen=True)
class _Float:
    """A tensor that is in float."""

    values: Array

    def to_float(self) -> Array:
        return self.values


_Value = _Stored | Fixed | Lookup | _Float


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
        self._constants: dict[str, Array | None] = {}
        self._static: dict[str, _Value] = {}
        self._float: dict[int, FloatOperator] = {}
        self._tables: dict[int, npt.NDArray[np.float32]] = {}
        self._needed = self._needed_for_integers()
        for node in self.graph.nodes:
            if node.op_type == "DequantizeLinear" and self.graph.is_constant(node.input[0]):
                self._static[node.output[0]] = self._dequantize(
                    node, _Stored(self._integers(node.input[0]))
                )

    def run(self, batch: npt.NDArray[np.float32]) -> IntegerRun:
        """Run one batch.

        Args:
            batch: [N, ...] float32, the graph's one input.

        Raises:
            IntegerOverflowError: a result leaves the accumulator; names the node.
            UnsupportedOperatorError: in strict mode, the nodes that need float32.
            VerificationError: onnxruntime cannot run a node that needs float32.
        """
        return _Run(self, batch).result()

    def constant(self, name: str) -> Array | None:
        """The value of a constant; None for computed tensors and absent inputs."""
        if name not in self._constants:
            self._constants[name] = self.graph.constant(name) if name else None
        return self._constants[name]

    def _integers(self, name: str) -> Integers:
        return np.asarray(self.constant(name)).astype(np.int64)

    def _needed_for_integers(self) -> frozenset[int]:
        needed: set[int] = set()
        pending = [node.input[0] for node in self.graph.dequantizers]
        while pending:
            node = self.graph.producers.get(pending.pop())
            if node is not None and id(node) not in needed:
                needed.add(id(node))
                pending += node.input
        return frozenset(needed)

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

    def _along(self, node: NodeProto, values: Integers, rank: int) -> Integers:
        if values.size == 1:
            return values.reshape(())
        if values.ndim != 1:
            raise ModelError("has a scale for each block", where=f"node {node.name}")
        shape = [1] * rank
        shape[attribute(node, "axis", 1)] = -1
        return values.reshape(shape)

    def _zero_point(self, node: NodeProto, rank: int) -> Integers:
        if len(node.input) < 3 or not node.input[2]:
            return np.asarray(0, np.int64)
        return self._along(node, self._integers(node.input[2]), rank)

    def _dequantize(self, node: NodeProto, value: _Stored) -> Fixed:
        rank = value.integers.ndim
        zero = self._zero_point(node, rank)
        low, high = self.graph.limits(node)
        middle = int(zero.reshape(-1)[0])
        return Fixed(
            mantissa=value.integers - zero,
            exponent=self._exponent(node, rank),
            span=(low - middle, high - middle),
        )

    def _quantize(self, node: NodeProto, value: _Value) -> Integers:
        low, high = self.graph.limits(node)
        if isinstance(value, Fixed):
            rank = value.mantissa.ndim
            return requantize(
                value,
                self._exponent(node, rank),
                low=low,
                high=high,
                zero_point=int(self._zero_point(node, rank)),
            )
        if isinstance(value, _Stored):
            raise ModelError("quantizes integers", where=f"node {node.name}")
        values = value.values
        rank = values.ndim
        steps = np.ldexp(values, -self._exponent(node, rank).astype(np.int32))
        rounded = np.rint(np.nan_to_num(steps.astype(np.float64), nan=0.0))
        found = np.clip(rounded + self._zero_point(node, rank), low, high).astype(np.int64)
        return found[value.index] if isinstance(value, Lookup) else found


class _Run:
    """One batch on its way through the graph."""

    def __init__(self, network: IntegerNetwork, batch: npt.NDArray[np.float32]) -> None:
        self.network, self.graph = network, network.graph
        self.values: dict[str, _Value] = dict(network._static)
        self.values[self.graph.inputs[0].name] = _Float(np.asarray(batch, np.float32))
        self.integers: dict[str, Integers] = {}
        self.accumulators: dict[str, int] = {}
        self.tables: list[str] = []
        self.float_nodes: list[str] = []
        self.tail: list[str] = []

    def result(self) -> IntegerRun:
        remaining = {name: len(users) for name, users in self.graph.consumers.items()}
        for node in self.graph.nodes:
            self._node(node)
            for name in node.input:  # what nobody reads any more need not stay in memory
                remaining[name] -= 1
                if not remaining[name] and name not in self.graph.outputs:
                    self.values.pop(name, None)
        outputs = {
            name: value.to_float()
            for name in self.graph.outputs
            if isinstance(value := self.values.get(name), Fixed | Lookup)
        }
        return IntegerRun(
            integers=self.integers,
            outputs=outputs,
            accumulators=self.accumulators,
            tables=tuple(self.tables),
            float_nodes=tuple(self.float_nodes),
            tail=tuple(self.tail),
        )

    def _node(self, node: NodeProto) -> None:
        if node.op_type == "Constant" or node.output[0] in self.network._static:
            return
        computed = [n for n in node.input if n and self.network.constant(n) is None]
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
                if isinstance(value, _Stored):
                    self.integers[name] = value.integers

    def _compute(self, node: NodeProto, computed: list[str]) -> list[_Value] | None:
        values = [self.values[name] for name in computed]
        if node.op_type == "QuantizeLinear":
            value = values[0] if values else self._fixed(node.input[0])
            return [_Stored(self.network._quantize(node, value))]
        if node.op_type == "DequantizeLinear":
            if not isinstance(values[0], _Stored):
                raise ModelError("dequantizes no integers", where=f"node {node.name}")
            return [self.network._dequantize(node, values[0])]
        if any(isinstance(value, _Stored) for value in values):
            return self._on_stored(node, values)
        if (moved := self._moved(node, values)) is not None:
            return moved
        gain = node.op_type in _GAINS and len(computed) == 1
        if gain and (looked_up := self._looked_up(node, computed)) is not None:
            return [looked_up]
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
        constant = np.asarray(self.network.constant(name))
        if not np.all(np.isfinite(constant)):
            raise ValueError("an infinite constant")
        return from_float(constant)

    def _on_stored(self, node: NodeProto, values: list[_Value]) -> list[_Value]:
        value = values[0]
        if len(values) == 1 and isinstance(value, _Stored):
            if node.op_type == "Clip":
                bounds = [self.network.constant(n) if n else None for n in node.input[1:]]
                low, high = (None if b is None else int(b) for b in (*bounds, None, None)[:2])
                return [_Stored(np.clip(value.integers, low, high))]
            if (moves := self._moves(node)) is not None and node.op_type != "Pad":
                return [_Stored(move(value.integers)) for move in moves]
        raise UnsupportedOperatorError(
            (node.op_type,),
            where=f"node {node.name}",
            hint="the interpreter knows Clip and data movement on stored integers",
        )

    def _moves(self, node: NodeProto) -> list[Move] | None:
        if node.op_type not in MOVES:
            return None
        constants = [self.network.constant(name) for name in node.input[1:]]
        absent = [not name for name in node.input[1:]]
        if any(c is None and not a for c, a in zip(constants, absent, strict=True)):
            return None
        try:
            return MOVES[node.op_type](node, constants)
        except ValueError:
            return None

    def _moved(self, node: NodeProto, values: list[_Value]) -> list[_Value] | None:
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
            self.network.constant(n) is not None and n not in self.values for n in node.input
        )
        try:
            inputs = [self._operand(node, name) for name in node.input]
            found = EXACT[node.op_type](node, inputs)
            require_bits(found.mantissa, self.network._bits)
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
        constant = self.network.constant(name)
        unbounded = (
            constant is not None and node.op_type == "Clip" and np.isinf(constant).all()
        )
        return None if unbounded else self._fixed(name)

    def _looked_up(self, node: NodeProto, computed: list[str]) -> Lookup | None:
        if node.op_type not in ELEMENTWISE or len(computed) != 1:
            return None
        others = [self.network.constant(name) for name in node.input if name]
        if any(other is not None and other.size != 1 for other in others):
            return None
        value = self.values[computed[0]]
        table = table_over(value) if isinstance(value, Fixed) else value
        if not isinstance(table, Lookup):
            return None
        if id(node) not in self.network._tables:  # built once
            (entries,) = self._float_operator(node)({computed[0]: table.values})
            self.network._tables[id(node)] = entries.reshape(-1)
        self.tables.append(node.name)
        return table.mapped(self.network._tables[id(node)])

    def _in_float(self, node: NodeProto, computed: list[str]) -> list[_Value] | None:
        if id(node) not in self.network._needed:
            return None
        if self.network._strict:
            raise UnsupportedOperatorError(
                (node.op_type,), where=f"node {node.name}", hint="it has no integer form"
            )
        given = {}
        for name in computed:
            value = self.values[name]
            if isinstance(value, _Stored):
                raise VerificationError("integers read as numbers", where=f"node {node.name}")
            given[name] = value.to_float()
        self.float_nodes.append(node.name)
        results = self._float_operator(node)(given)
        names = [name for name in node.output if name]
        by_name = dict(zip(names, map(_Float, results), strict=True))
        return [by_name.get(name, _Float(np.zeros(0))) for name in node.output]

    def _float_operator(self, node: NodeProto) -> FloatOperator:
        if id(node) not in self.network._float:
            constants = {
                name: value
                for name in node.input
                if name and (value := self.network.constant(name)) is not None
            }
            opsets = list(self.graph.proto.opset_import)
            self.network._float[id(node)] = FloatOperator(node, opsets, constants)
        return self.network._float[id(node)]
