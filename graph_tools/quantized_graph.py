"""An index over a QDQ graph: who makes and who reads each tensor, and where integers end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, numpy_helper

from graph_tools.weights import values_of

__all__ = ["Origin", "QuantizedGraph", "attribute"]

# Operators whose output holds only values of their data inputs.
_MOVES_DATA = frozenset(
    "Concat DepthToSpace Dropout Expand Flatten Gather GlobalMaxPool Identity MaxPool Reshape "
    "Slice SpaceToDepth Split Squeeze Tile Transpose Unsqueeze".split()
)


_FLOATS = (
    onnx.TensorProto.UNDEFINED,
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.DOUBLE,
    onnx.TensorProto.BFLOAT16,
)


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """Return an attribute's value, or ``default`` when the node has none of that name."""
    for entry in node.attribute:
        if entry.name == name:
            return onnx.helper.get_attribute_value(entry)
    return default


@dataclass(frozen=True)
class Origin:
    """Where a tensor's integers come from.

    Attributes:
        dequantizers: the DequantizeLinear nodes of activations that are reached first.
        moved_only: nothing but data movement lies between them and the tensor.
    """

    dequantizers: tuple[NodeProto, ...]
    moved_only: bool


class QuantizedGraph:
    """Read-only index of a model in QDQ form.

    Args:
        proto: the model, external data loaded.
    """

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto = proto
        self.nodes = tuple(proto.graph.node)
        self.producers = {name: node for node in self.nodes for name in node.output if name}
        self.consumers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)
        self._initializers = {entry.name: entry for entry in proto.graph.initializer}
        self.inputs = tuple(
            entry for entry in proto.graph.input if entry.name not in self._initializers
        )
        self.outputs = tuple(entry.name for entry in proto.graph.output)

    @cached_property
    def free_weight_scales(self) -> bool:
        """Whether the file says that the scales of its weights are no powers of two."""
        props = {entry.key: entry.value for entry in self.proto.metadata_props}
        return props.get("zsq.weight_scale") == "free"

    @cached_property
    def quantizers(self) -> tuple[NodeProto, ...]:
        """Every QuantizeLinear node."""
        return tuple(n for n in self.nodes if n.op_type == "QuantizeLinear")

    @cached_property
    def dequantizers(self) -> tuple[NodeProto, ...]:
        """Every DequantizeLinear node."""
        return tuple(n for n in self.nodes if n.op_type == "DequantizeLinear")

    @cached_property
    def decisions(self) -> frozenset[str]:
        """Graph outputs that are integers or booleans, such as ArgMax gives."""
        return frozenset(
            entry.name
            for entry in self.proto.graph.output
            if entry.type.tensor_type.elem_type not in _FLOATS
        )

    @cached_property
    def batch(self) -> int | None:
        """The batch size the file declares for its first input; None when it is free."""
        dims = self.inputs[0].type.tensor_type.shape.dim if self.inputs else []
        return int(dims[0].dim_value) or None if dims else None

    def constant(self, name: str) -> np.ndarray[Any, Any] | None:
        """The value of an initializer or Constant node; None when ``name`` is computed."""
        if name in self._initializers:
            return values_of(self._initializers[name])
        node = self.producers.get(name)
        if node is not None and node.op_type == "Constant":
            value = attribute(node, "value")
            if value is not None:
                return np.asarray(numpy_helper.to_array(value))
            for kind in ("value_float", "value_int", "value_floats", "value_ints"):
                if (plain := attribute(node, kind)) is not None:
                    return np.asarray(plain)
        return None

    def is_constant(self, name: str) -> bool:
        """Whether ``name`` is an initializer or made by a Constant node."""
        node = self.producers.get(name)
        return name in self._initializers or (node is not None and node.op_type == "Constant")

    def is_weight(self, dequantizer: NodeProto) -> bool:
        """Whether a DequantizeLinear reads stored values rather than an activation."""
        node = self.producers.get(dequantizer.input[0])
        if node is not None and node.op_type == "QuantizeLinear":
            return self.is_constant(node.input[0])  # weights that some tools store in float
        return self.is_constant(dequantizer.input[0])

    def integer_type(self, node: NodeProto) -> np.dtype[Any]:
        """The integer type of a QuantizeLinear or DequantizeLinear node's quantized side."""
        if len(node.input) > 2 and node.input[2]:
            zero_point = self.constant(node.input[2])
            if zero_point is not None:
                dtype: np.dtype[Any] = zero_point.dtype
                return dtype
        if node.op_type == "DequantizeLinear":
            stored = self.constant(node.input[0])
            if stored is not None:
                dtype = stored.dtype
                return dtype
            source = self.quantizer_of(node)
            return np.dtype(np.uint8) if source is None else self.integer_type(source)
        kind = attribute(node, "output_dtype", 0) or onnx.TensorProto.UINT8
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind))

    def quantizer_of(self, dequantizer: NodeProto) -> NodeProto | None:
        """The QuantizeLinear whose integers ``dequantizer`` reads.

        Data movement may lie between them, and a Clip that saturates to fewer bits.
        """
        node = self.producers.get(dequantizer.input[0])
        while node is not None and node.op_type != "QuantizeLinear":
            passes = self.moves_data(node) or node.op_type == "Clip"
            node = self.producers.get(node.input[0]) if passes else None
        return node

    def limits(self, node: NodeProto) -> tuple[int, int]:
        """Smallest and largest integer of a QuantizeLinear or DequantizeLinear node's type."""
        name = self.integer_type(node).name
        # numpy has no iinfo for the 4- and 2-bit types of ml_dtypes.
        bits, signed = int(name.removeprefix("u").removeprefix("int")), name[0] != "u"
        return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)

    def integer_range(self, dequantizer: NodeProto) -> tuple[int, int]:
        """Smallest and largest integer, less the zero point, that a DequantizeLinear can read."""
        low, high = self.limits(dequantizer)
        node = self.producers.get(dequantizer.input[0])
        while node is not None and (self.moves_data(node) or node.op_type == "Clip"):
            if node.op_type == "Clip":
                bounds = [self.constant(n) if n else None for n in [*node.input, "", ""][1:3]]
                low = low if bounds[0] is None else max(low, int(bounds[0].item()))
                high = high if bounds[1] is None else min(high, int(bounds[1].item()))
            node = self.producers.get(node.input[0])
        zero_point = (
            self.constant(dequantizer.input[2]) if len(dequantizer.input) > 2 else None
        )
        middle = 0 if zero_point is None else int(zero_point.reshape(-1)[0])
        return low - middle, high - middle

    def moves_data(self, node: NodeProto) -> bool:
        """Whether the outputs hold only values of the data inputs, and zeros."""
        if node.op_type == "Resize":
            return bool(attribute(node, "mode", b"nearest") == b"nearest")
        if node.op_type == "Pad":
            filler = self.constant(node.input[2]) if len(node.input) > 2 else np.zeros(1)
            zero = filler is not None and not np.any(filler)
            return zero or attribute(node, "mode", b"constant") != b"constant"
        return node.op_type in _MOVES_DATA

    def scale(self, node: NodeProto) -> np.ndarray[Any, Any] | None:
        """The scale of a QuantizeLinear or DequantizeLinear node; None when computed."""
        return self.constant(node.input[1])

    def zero_points(
        self, node: NodeProto, shape: tuple[int, ...]
    ) -> np.ndarray[Any, Any] | None:
        """The zero points of a DequantizeLinear node, int64, shaped to broadcast.

        Args:
            node: reads constants.
            shape: of these; None is returned where the zero points do not fit it.
        """
        zero = self.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        if zero is None or zero.size == 1:
            return np.asarray(0 if zero is None else zero.item(), np.int64)
        axis = int(attribute(node, "axis", 1)) % max(1, len(shape))
        if not shape or zero.size != shape[axis]:
            return None
        return zero.astype(np.int64).reshape(
            [-1 if at == axis else 1 for at in range(len(shape))]
        )

    def origin(self, tensor: str) -> Origin:
        """Walk back from ``tensor`` to the last activations that were integers."""
        found: dict[str, NodeProto] = {}
        moved_only = True
        seen: set[str] = set()
        pending = [tensor]
        while pending:
            name = pending.pop()
            if name in seen or not name or self.is_constant(name):
                continue
            seen.add(name)
            node = self.producers.get(name)
            if node is None:
                moved_only = False
            elif node.op_type == "DequantizeLinear":
                if self.is_weight(node):
                    moved_only = False
                else:
                    found[node.output[0]] = node
            else:
                moved_only = moved_only and self.moves_data(node)
                pending += node.input if node.op_type == "Concat" else self._data_inputs(node)
        return Origin(tuple(found.values()), moved_only and bool(found))

    def leading_to(self, tensors: Iterable[str]) -> set[int]:
        """Return the ``id`` of every node that any of ``tensors`` depends on."""
        found: set[int] = set()
        pending = list(tensors)
        while pending:
            node = self.producers.get(pending.pop())
            if node is not None and id(node) not in found:
                found.add(id(node))
                pending += node.input
        return found

    def last_integers(self) -> dict[str, list[str]]:
        """Return the integers in front of outputs that end in float, with the outputs they feed."""
        feeds: dict[str, list[str]] = {}
        for name in self.outputs:
            if self.output_scale(name) is None:
                for node in self.origin(name).dequantizers:
                    feeds.setdefault(node.input[0], []).append(name)
        return feeds

    def _data_inputs(self, node: NodeProto) -> list[str]:
        # Shapes, indices and pads of a data movement are no data of the tensor.
        return list(node.input[:1] if self.moves_data(node) else node.input)

    def output_scale(self, tensor: str) -> np.float32 | None:
        """The one scale of a tensor that only moves dequantized integers; None otherwise."""
        origin = self.origin(tensor)
        if not origin.moved_only:
            return None
        scales = [self.scale(node) for node in origin.dequantizers]
        values = {
            float(s.reshape(-1)[0]) if s is not None and s.size == 1 else None for s in scales
        }
        only = values.pop()
        return np.float32(only) if only is not None and not values else None

    def weighted(self) -> Iterator[NodeProto]:
        """Conv, ConvTranspose, Gemm and MatMul nodes with a constant quantized weight."""
        for node in self.nodes:
            if node.op_type in {"Conv", "ConvTranspose", "Gemm", "MatMul"}:
                source = self.producers.get(node.input[1])
                if (
                    source is not None
                    and source.op_type == "DequantizeLinear"
                    and self.is_weight(source)
                ):
                    yield node

    def dequantizer(self, tensor: str) -> NodeProto | None:
        """The DequantizeLinear that makes ``tensor``, directly or by data movement."""
        node = self.producers.get(tensor)
        while node is not None and node.op_type != "DequantizeLinear":
            node = self.producers.get(node.input[0]) if self.moves_data(node) else None
        return node
