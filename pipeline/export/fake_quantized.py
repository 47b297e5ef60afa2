"""What a QDQ file rounds, and the same file in the words of another quantization dialect.

A dialect such as QONNX knows no integers in the graph: one node rounds a float tensor to a grid of
steps and gives floats back. A pair of QuantizeLinear and DequantizeLinear, with the Clip between
them that saturates to fewer bits, is one such node; so is a DequantizeLinear of stored integers
behind the floats that they stand for. A zero point in the middle of an unsigned type says nothing
else than a signed type does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from graph_tools.errors import TargetError
from graph_tools.quantized_graph import QuantizedGraph, attribute
from graph_tools.quantizer import LIFT
from graph_tools.shapes import outline

__all__ = ["Dialect", "FakeQuantized", "Rounding", "Stored", "log2_of"]

Array = np.ndarray[Any, np.dtype[Any]]

_WIDTHS = (2, 3, 4, 8, 16, 32)
_KEEPS_GRID = frozenset(  # their results hold values of their first input and nothing else
    "DepthToSpace Flatten Gather GlobalMaxPool Identity MaxPool Reshape Slice SpaceToDepth Split "
    "Squeeze Tile Transpose Unsqueeze".split()
)


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """One place where activations are rounded.

    Attributes:
        name: of the QuantizeLinear node.
        source: the float tensor that is rounded; ``result`` the rounded one.
        scale: size of a step.
        bits: of the integers; ``signed`` whether negative ones exist.
    """

    name: str
    source: str
    result: str
    scale: float
    bits: int
    signed: bool

    @property
    def threshold(self) -> float:
        """Magnitude of the range: ``scale * 2**(bits - signed)``."""
        return self.scale * 2.0 ** (self.bits - self.signed)


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One constant that is stored in integers.

    Attributes:
        name: of the tensor of integers; ``result`` the float tensor that operators read.
        integers: their values, less the zero point, int64.
        scale: [] or [channels of ``axis``] float32.
        axis: of the channels; None for one scale.
        bits: the smallest of 2, 3, 4, 8, 16 and 32 that hold all integers.
        signed: whether the type has negative integers.
        role: ``weight``, ``bias`` or ``operand`` of arithmetic.
    """

    name: str
    result: str
    integers: Array
    scale: Array
    axis: int | None
    bits: int
    signed: bool
    role: Literal["weight", "bias", "operand"]

    @property
    def broadcast_scale(self) -> Array:
        """The scale with as many dimensions as the integers."""
        if self.axis is None:
            return self.scale.reshape(())
        shape = [1] * self.integers.ndim
        shape[self.axis] = -1
        return self.scale.reshape(shape)

    @property
    def values(self) -> Array:
        """What the integers stand for, float32."""
        exact = self.integers.astype(np.float64) * self.broadcast_scale
        return np.asarray(exact, np.float32)


class Dialect(Protocol):
    """How another format writes what is rounded: nodes, and constants that they read."""

    def rounding(self, rounding: Rounding) -> tuple[list[NodeProto], list[TensorProto]]:
        """Nodes from ``rounding.source`` to ``rounding.result``."""

    def stored(self, stored: Stored) -> tuple[list[NodeProto], list[TensorProto]]:
        """Nodes that make ``stored.result``; none if it is an initializer."""


class FakeQuantized:
    """A QDQ file as float operators between roundings.

    Args:
        proto: the model, as `graph_tools.qdq.write_qdq` wrote it.

    Raises:
        TargetError: a quantizer that rounds otherwise than by a scale and a symmetric range.
    """

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.graph = QuantizedGraph(proto)
        self._skipped = {
            id(node)
            for node in self.graph.nodes
            if node.op_type == "Clip"
            and (maker := self.graph.producers.get(node.input[0])) is not None
            and maker.op_type == "QuantizeLinear"
        }
        self.roundings = {
            entry.result: entry
            for node in self.graph.dequantizers
            if not self.graph.is_weight(node)
            for entry in [self._rounding(node)]
        }
        self.stored = {
            node.output[0]: self._stored(node)
            for node in self.graph.dequantizers
            if self.graph.is_weight(node)
        }
        self.idle = self._idle()

    @property
    def operators(self) -> Iterator[NodeProto]:
        """The nodes that compute, in the graph's order."""
        for node in self.graph.nodes:
            quantizes = node.op_type in ("QuantizeLinear", "DequantizeLinear")
            if not quantizes and id(node) not in self._skipped:
                yield node

    def _rounding(self, node: NodeProto) -> Rounding:
        source = self.graph.producers.get(node.input[0])
        if source is not None and id(source) in self._skipped:
            source = self.graph.producers[source.input[0]]
        if source is None or source.op_type != "QuantizeLinear":
            raise _refused(node, "reads integers that no QuantizeLinear in front of it makes")
        scale = self.graph.scale(node)
        if scale is None or scale.size != 1:
            raise _refused(node, "has no constant scale of one number")
        low, high = self.graph.integer_range(node)
        bits = (high + 1).bit_length() - 1 + (low < 0)
        if (low - LIFT, high - LIFT) == _range(bits, signed=True):
            raise _lifted(node)
        if (low, high) not in (_range(bits, signed=True), _range(bits, signed=False)):
            raise _refused(
                node, f"takes integers from {low} to {high}, no range of a quantizer"
            )
        return Rounding(
            name=source.name or source.output[0],
            source=source.input[0],
            result=node.output[0],
            scale=float(scale.reshape(-1)[0]),
            bits=bits,
            signed=low < 0,
        )

    def _idle(self) -> dict[str, str]:
        """Results of roundings that round nothing, with what they are rounded from.

        What a rounded tensor's values were only moved into is rounded likewise already.
        """
        grids: dict[str, tuple[float, int, bool]] = {}
        found = {}
        for node in self.graph.nodes:
            for result in node.output:
                if (rounding := self.roundings.get(result)) is not None:
                    grid = (rounding.scale, rounding.bits, rounding.signed)
                    if grids.get(rounding.source) == grid:
                        found[result] = rounding.source
                    grids[result] = grid
                elif node.op_type in _KEEPS_GRID and node.input[0] in grids:
                    grids[result] = grids[node.input[0]]
        return found

    def _stored(self, node: NodeProto) -> Stored:
        integers, scale = self.graph.constant(node.input[0]), self.graph.scale(node)
        if integers is None or scale is None or integers.dtype == np.float32:
            raise _refused(node, "stores its values in float, or its scale is computed")
        zero = self.graph.constant(node.input[2]) if len(node.input) > 2 else None
        axis = None if scale.ndim == 0 else int(attribute(node, "axis", 1)) % integers.ndim
        values = integers.astype(np.int64)
        if zero is not None and np.any(zero == -LIFT):
            raise _lifted(node)
        zeros = self.graph.zero_points(node, values.shape)
        if zeros is None:
            raise _refused(node, "has zero points that do not fit what it reads")
        values = values - zeros
        signed = self.graph.limits(node)[0] < 0 or bool((values < 0).any())
        low, high = int(values.min(initial=0)), int(values.max(initial=0))
        bits = next(
            (
                b
                for b in _WIDTHS
                if _range(b, signed=signed)[0] <= low <= high <= _range(b, signed=signed)[1]
            ),
            32,
        )
        return Stored(
            name=node.input[0],
            result=node.output[0],
            integers=values,
            scale=np.asarray(scale, np.float32),
            axis=axis,
            bits=bits,
            signed=signed,
            role=self._role(node.output[0]),
        )

    def _role(self, tensor: str) -> Literal["weight", "bias", "operand"]:
        for node in self.graph.consumers.get(tensor, ()):
            if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
                return "bias" if list(node.input).index(tensor) == 2 else "weight"
        return "operand"

    def shapes(self, batch: int | None = None) -> dict[str, onnx.ValueInfoProto]:
        """Type and shape of every float tensor, with this batch if one is given."""
        bare = onnx.ModelProto()
        bare.CopyFrom(outline(self.graph.proto, outside_only=True))
        del bare.graph.value_info[:]
        for value in bare.graph.output:
            value.type.tensor_type.ClearField("shape")
        for value in bare.graph.input:
            if batch is not None and value.type.tensor_type.shape.dim:
                value.type.tensor_type.shape.dim[0].dim_value = batch
        inferred = onnx.shape_inference.infer_shapes(bare, data_prop=True).graph
        return {
            value.name: value
            for value in [*inferred.input, *inferred.output, *inferred.value_info]
        }

    def translate(
        self,
        dialect: Dialect,
        ends: Sequence[str],
        *,
        batch: int | None = None,
        drop_idle: bool = False,
    ) -> onnx.ModelProto:
        """Write the graph up to ``ends`` in a dialect.

        Args:
            dialect: the words for roundings and stored constants.
            ends: float tensors that become the graph's outputs.
            batch: fixes the batch.
            drop_idle: leave out roundings that round nothing, but at the ends.

        Returns:
            A model with the types and shapes of all its tensors; its opset is the file's, domains
            of the dialect's nodes are added by version 1.
        """
        wanted = self.graph.leading_to(ends)
        idle = {k: v for k, v in self.idle.items() if drop_idle and k not in ends}
        nodes: list[NodeProto] = []
        constants: dict[str, TensorProto] = {}
        for node in self.graph.nodes:
            if id(node) not in wanted:
                continue
            if node.op_type == "DequantizeLinear":
                result = node.output[0]
                if result in idle:
                    continue
                made, read = (
                    dialect.stored(self.stored[result])
                    if result in self.stored
                    else dialect.rounding(self.roundings[result])
                )
                nodes += made
                constants.update((entry.name, entry) for entry in read)
            elif node.op_type != "QuantizeLinear" and id(node) not in self._skipped:
                copy = NodeProto()
                copy.CopyFrom(node)
                nodes.append(copy)
                for name in node.input:
                    values = self.graph.constant(name) if name else None
                    if values is not None and name not in self.graph.producers:
                        constants[name] = numpy_helper.from_array(np.asarray(values), name)
        for made_node in nodes:
            for index, name in enumerate(made_node.input):
                while name in idle:
                    name = idle[name]
                made_node.input[index] = name
        return self._assemble(nodes, constants, ends, batch)

    def _assemble(
        self,
        nodes: list[NodeProto],
        constants: dict[str, TensorProto],
        ends: Sequence[str],
        batch: int | None,
    ) -> onnx.ModelProto:
        shapes = self.shapes(batch)
        source = self.graph.proto
        made = {name for node in nodes for name in node.output} - set(ends) - {""}
        read = {name for node in nodes for name in node.input}
        graph = helper.make_graph(
            nodes,
            source.graph.name or "quantized",
            [shapes[entry.name] for entry in self.graph.inputs if entry.name in read],
            [shapes[name] for name in ends],
            list(constants.values()),
            value_info=[shapes[name] for name in sorted(made & set(shapes))],
        )
        opsets = {entry.domain: entry.version for entry in source.opset_import}
        for node in nodes:
            opsets.setdefault(node.domain, 1)
        return helper.make_model(
            graph,
            producer_name="onnx-zsq",
            ir_version=source.ir_version,
            opset_imports=[helper.make_opsetid(*entry) for entry in opsets.items()],
        )


def log2_of(scale: Array | float, where: str) -> Array:
    """Exponents of scales that are powers of two.

    Raises:
        TargetError: one is none.
    """
    mantissa, exponent = np.frexp(np.asarray(scale, np.float64))
    if np.any(mantissa != 0.5):
        raise TargetError(
            "takes scales that are powers of two",
            where=where,
            hint="quantize with --weight-scale pot",
        )
    return np.asarray(exponent - 1)


def _range(bits: int, *, signed: bool) -> tuple[int, int]:
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)


def _lifted(node: NodeProto) -> TargetError:
    return TargetError(
        "has its zero point below the middle",
        where=f"{node.op_type} {node.name or node.output[0]}",
        hint="that is for RKNN: quantize without --target rknn and --zero-point below",
    )


def _refused(node: NodeProto, what: str) -> TargetError:
    return TargetError(
        what,
        where=f"{node.op_type} {node.name or node.output[0]}",
        hint="export takes files that zsq quantize wrote",
    )
