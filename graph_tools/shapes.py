"""Shapes of all tensors, by `onnx.shape_inference`.

With a fixed batch every dimension of an ordinary network is a number. Inferring twice, with
batch 2 and batch 3, tells which dimensions are the batch or a multiple of it, where inference
with a symbol would lose track at the first Reshape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import onnx
from onnx import shape_inference

from graph_tools.errors import ModelError
from graph_tools.quiet import quiet
from graph_tools.weights import is_outside

__all__ = [
    "BATCH",
    "PROBES",
    "Dim",
    "TensorType",
    "annotate",
    "infer",
    "outline",
    "ranks_of",
    "set_shape",
    "with_batch",
]

BATCH = "N"
"""Name of the batch dimension in the normal form."""

PROBES = (2, 3)
"""Batch sizes that are compared to find the dimensions that follow the batch."""

Dim = int | str | None

_MAX_KEPT = 1024
_LONGEST_ROW = 1 << 20

# Their outputs have the type of their first input, which onnx does not infer.
_LIKE_FIRST_INPUT = frozenset({"GroupNormalization", "MeanVarianceNormalization"})


@dataclass(frozen=True)
class TensorType:
    """Element type and shape of a tensor; unknown dimensions are None."""

    elem_type: int
    shape: tuple[Dim, ...] | None

    @property
    def static(self) -> tuple[int, ...] | None:
        """The shape if all its dimensions are numbers, else None."""
        if self.shape is None:
            return None
        numbers = tuple(dim for dim in self.shape if isinstance(dim, int))
        return numbers if len(numbers) == len(self.shape) else None


def ranks_of(graph: onnx.GraphProto) -> dict[str, int]:
    """Return the ranks of the tensors of an annotated graph, as far as they are known."""
    return {
        value.name: len(value.type.tensor_type.shape.dim)
        for value in (*graph.input, *graph.value_info, *graph.output)
        if value.type.tensor_type.HasField("shape")
    }


def set_shape(
    value: onnx.ValueInfoProto, elem_type: int, shape: tuple[Dim, ...] | None
) -> None:
    """Write a tensor type into `value`; None as shape means unknown rank."""
    value.ClearField("type")
    value.type.tensor_type.elem_type = elem_type
    if shape is None:
        return
    value.type.tensor_type.shape.SetInParent()
    for dim in shape:
        entry = value.type.tensor_type.shape.dim.add()
        if isinstance(dim, int):
            entry.dim_value = dim
        elif dim is not None:
            entry.dim_param = dim


def outline(proto: onnx.ModelProto, *, outside_only: bool = False) -> onnx.ModelProto:
    """Copy `proto` without its large float weights, which become graph inputs.

    Shapes and shape arithmetic never depend on them, so this is what inference and the
    probing of batch sizes work on.

    Args:
        proto: any model.
        outside_only: leave out those alone that `graph_tools.weights` keeps outside the model.
    """
    result = onnx.ModelProto(ir_version=proto.ir_version)
    result.opset_import.extend(proto.opset_import)
    result.functions.extend(proto.functions)
    graph = result.graph
    graph.name = proto.graph.name or "graph"
    graph.node.extend(proto.graph.node)
    graph.input.extend(proto.graph.input)
    graph.output.extend(proto.graph.output)
    graph.sparse_initializer.extend(proto.graph.sparse_initializer)
    listed = {value.name for value in proto.graph.input}  # as IR 3 wants it
    for tensor in proto.graph.initializer:
        is_float = tensor.data_type == onnx.TensorProto.FLOAT and not outside_only
        if is_outside(tensor) or (is_float and math.prod(tensor.dims) > _MAX_KEPT):
            if tensor.name in listed:
                continue
            value = graph.input.add(name=tensor.name)
            set_shape(value, tensor.data_type, tuple(tensor.dims))
        else:
            graph.initializer.append(tensor)
    return result


def infer(proto: onnx.ModelProto) -> dict[str, TensorType]:
    """Infer the type of every tensor from the graph's inputs; stored shapes are not trusted.

    Args:
        proto: any model; initializers listed as inputs were taken out.

    Returns:
        By tensor name, weights and inputs included. Tensors that inference does not reach are
        missing.
    """
    bare = outline(proto)
    for value in bare.graph.output:
        if elem_type := value.type.tensor_type.elem_type:
            set_shape(value, elem_type, None)
        else:
            value.ClearField("type")
    for node in bare.graph.node:
        if node.op_type in _LIKE_FIRST_INPUT:
            node.op_type = "Relu"
            del node.attribute[:], node.input[1:]
    propagate = not _has_long_row(_inferred(bare, strict=False, propagate=False) or bare)
    inferred = _inferred(bare, strict=True, propagate=propagate)
    if inferred is None:  # strict mode refuses much
        inferred = _inferred(bare, strict=False, propagate=propagate)
    graph = (inferred or bare).graph
    types = {t.name: TensorType(t.data_type, tuple(t.dims)) for t in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        types[value.name] = _tensor_type(value)
    return types


def _inferred(
    bare: onnx.ModelProto, *, strict: bool, propagate: bool
) -> onnx.ModelProto | None:
    """What onnx infers; None after any fault of its C++ library."""
    with quiet():
        try:
            return shape_inference.infer_shapes(bare, strict_mode=strict, data_prop=propagate)
        except Exception:
            return None


def _has_long_row(proto: onnx.ModelProto) -> bool:
    """Whether a tensor of one dimension is so long that no shape is computed from it.

    onnx propagates the values of such tensors one by one: 2**30 take it minutes and gigabytes.
    """
    found = (value.type.tensor_type.shape.dim for value in proto.graph.value_info)
    return any(len(dims) == 1 and dims[0].dim_value > _LONGEST_ROW for dims in found)


def _tensor_type(value: onnx.ValueInfoProto) -> TensorType:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return TensorType(tensor.elem_type, None)
    return TensorType(tensor.elem_type, tuple(_dim(dim) for dim in tensor.shape.dim))


def _dim(dim: onnx.TensorShapeProto.Dimension) -> Dim:
    return int(dim.dim_value) if dim.HasField("dim_value") else None


def with_batch(proto: onnx.ModelProto, name: str, batch: int) -> onnx.ModelProto:
    """Copy the outline of `proto` with the first dimension of input `name` set to `batch`."""
    bare = outline(proto)
    for value in bare.graph.input:
        if value.name == name:
            value.type.tensor_type.shape.dim[0].Clear()
            value.type.tensor_type.shape.dim[0].dim_value = batch
    return bare


def annotate(proto: onnx.ModelProto, *, batch: int | None) -> None:
    """Write the shape of every tensor into the graph, in place.

    Args:
        proto: normal form with one graph input.
        batch: the only batch size that the graph takes; None if it takes any, then the batch
            is written as the symbol ``N`` and its multiples as ``k*N``.

    Raises:
        ModelError: the shapes of the graph contradict each other.
    """
    graph = proto.graph
    name = graph.input[0].name
    if batch is not None:
        types = infer(with_batch(proto, name, batch))
    else:
        types = _symbolic(*(infer(with_batch(proto, name, size)) for size in PROBES))
    produced = [output for node in graph.node for output in node.output if output]
    outputs = {value.name for value in graph.output}
    del graph.value_info[:]
    for tensor in produced:
        if tensor in types and tensor not in outputs and types[tensor].elem_type:
            value = graph.value_info.add(name=tensor)
            set_shape(value, types[tensor].elem_type, types[tensor].shape)
    for value in (graph.input[0], *graph.output):
        if value.name not in types or not types[value.name].elem_type:
            raise ModelError(f"the type of output '{value.name}' cannot be inferred")
        set_shape(value, types[value.name].elem_type, types[value.name].shape)


def _symbolic(
    first: Mapping[str, TensorType], second: Mapping[str, TensorType]
) -> dict[str, TensorType]:
    types = {}
    for name in first.keys() & second.keys():
        a, b = first[name], second[name]
        shape: tuple[Dim, ...] | None = None
        if a.shape is not None and b.shape is not None and len(a.shape) == len(b.shape):
            shape = tuple(_symbol(x, y) for x, y in zip(a.shape, b.shape, strict=True))
        types[name] = TensorType(a.elem_type, shape)
    return types


def _symbol(first: Dim, second: Dim) -> Dim:
    if not isinstance(first, int) or not isinstance(second, int):
        return None
    if first == second:
        return first
    factor, rest = divmod(first, PROBES[0])
    if rest or factor * PROBES[1] != second:
        return None
    return BATCH if factor == 1 else f"{factor}*{BATCH}"
