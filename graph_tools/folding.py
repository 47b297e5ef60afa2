"""Constant folding with onnx-graphsurgeon, silent and bounded.

A file of a hundred bytes can ask for a tensor of terabytes (ConstantOfShape, Expand, Tile).
Only nodes whose results have a known and reasonable size are computed.
"""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import helper

from graph_tools.equivalence import run_model
from graph_tools.errors import ModelError
from graph_tools.opset import opset_version
from graph_tools.passes import constants_to_initializers, inline_constant_ifs, remove_no_ops
from graph_tools.quiet import one_line, quiet
from graph_tools.sequences import resolve_sequences
from graph_tools.shapes import TensorType, infer
from graph_tools.walk import subgraphs
from graph_tools.weights import import_graph, is_outside, move_out, tensor_of

__all__ = ["MAX_CONSTANT", "fold_constants", "fold_shapes", "sort_nodes"]

MAX_CONSTANT = 2**26
"""The most elements that a tensor computed from constants alone may have."""

_MAX_CONSTANTS = 2**28  # elements of all of them, beyond 16 times those in the file

_RANDOM = frozenset(
    "Bernoulli Multinomial RandomNormal RandomNormalLike RandomUniform "
    "RandomUniformLike".split()
)
# No larger than their inputs (times the rank), though the exact size depends on values.
_BOUNDED = frozenset("Compress NonZero Reshape Slice Squeeze Unique".split())
_MAX_ROUNDS = 16
_SEQUENCES = 13  # the opset from which on sequences are spelled without


def fold_constants(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Compute all that depends on constants only, drop dead nodes.

    Constant Ifs are spliced, and sequences of tensors spelled without.

    Args:
        proto: a model without initializers among its inputs.

    Returns:
        A new model with the same inputs, outputs and tensor names; nodes sorted.

    Raises:
        ModelError: a constant would have more than `MAX_CONSTANT` elements.
    """
    for _ in range(_MAX_ROUNDS):
        num_nodes = len(proto.graph.node)
        constants_to_initializers(proto.graph)
        proto = _fold_once(proto)
        remove_no_ops(proto.graph)
        changed = inline_constant_ifs(proto.graph)
        if opset_version(proto) >= _SEQUENCES:
            changed |= resolve_sequences(proto.graph)
        if not changed and len(proto.graph.node) == num_nodes:
            break
    return proto


def _fold_once(proto: onnx.ModelProto) -> onnx.ModelProto:
    types = infer(proto)
    proto = _fold_outside(proto, types)
    foldable = _foldable(proto, types)
    if not foldable:
        return _without_dead(proto)
    try:
        result = _gs_fold(proto, foldable, partitioning=None)
    except Exception:  # one node that onnxruntime cannot run must not keep the rest
        try:
            result = _gs_fold(proto, foldable, partitioning="recursive")
        except Exception as error:
            raise ModelError(f"constants cannot be folded: {one_line(error)}") from error
    return _restored(proto, result)


def _gs_fold(
    proto: onnx.ModelProto, foldable: set[str], *, partitioning: str | None
) -> onnx.ModelProto:
    with quiet():
        graph = import_graph(proto)
        graph.toposort()
        if foldable:
            graph.fold_constants(
                fold_shapes=False,
                recurse_subgraphs=False,
                flatten_subgraphs=False,
                partitioning=partitioning,
                error_ok=partitioning is not None,
                should_exclude_node=lambda node: not _names(node) & foldable,
            )
        graph.cleanup()
        result: onnx.ModelProto = gs.export_onnx(graph, do_type_check=False)
        return result


def _fold_outside(proto: onnx.ModelProto, types: dict[str, TensorType]) -> onnx.ModelProto:
    """Compute, one by one, the nodes that read constants outside the model (a Transpose, say)."""
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    if not any(map(is_outside, constants.values())):
        return proto
    done, made = [], []
    for index, node in enumerate(proto.graph.node):
        names = [name for name in node.input if name]
        if (
            not names
            or not all(name in constants for name in names)
            or not any(is_outside(constants[name]) for name in names)
            or not _may_compute(node, types)
        ):
            continue
        outputs = [helper.make_empty_tensor_value_info(name) for name in node.output if name]
        given = [constants[name] for name in dict.fromkeys(names)]
        graph = helper.make_graph([node], "one", [], outputs, given)
        model = helper.make_model(graph, opset_imports=proto.opset_import, ir_version=8)
        try:
            values = run_model(model, {})
        except RuntimeError:  # what onnxruntime cannot run stays as it is
            continue
        for output, value in zip(outputs, values, strict=True):
            constants[output.name] = tensor_of(value, output.name, outside=True)
            made.append(constants[output.name])
        done.append(index)
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    for index in reversed(done):
        del result.graph.node[index]
    result.graph.initializer.extend(made)
    return result


def _without_dead(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Copy a sorted model without the nodes and initializers that no output needs."""
    wanted = {value.name for value in proto.graph.output}
    kept = []
    for node in reversed(proto.graph.node):
        if not wanted.isdisjoint(node.output):
            kept.append(node)
            wanted |= _read(node)
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    for name in ("node", "initializer", "value_info"):
        del getattr(result.graph, name)[:]
    result.graph.node.extend(reversed(kept))
    result.graph.initializer.extend(t for t in proto.graph.initializer if t.name in wanted)
    return result


def _read(node: onnx.NodeProto) -> set[str]:
    """Return the tensors that a node and its subgraphs read."""
    names = set(node.input)
    for graph in subgraphs(node):
        names.update(value.name for value in graph.output)
        for inner in graph.node:
            names |= _read(inner)
    return names


def sort_nodes(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy with the nodes in the order of the data.

    Raises:
        ModelError: that order does not exist.
    """
    try:
        with quiet():
            result: onnx.ModelProto = gs.export_onnx(
                import_graph(proto).toposort(), do_type_check=False
            )
    except Exception as error:
        raise ModelError(f"the nodes cannot be sorted: {one_line(error)}") from error
    return _restored(proto, result)


def _names(node: gs.Node) -> set[str]:
    return {tensor.name for tensor in node.outputs if tensor.name}


def _restored(source: onnx.ModelProto, result: onnx.ModelProto) -> onnx.ModelProto:
    """Keep versions, metadata, inputs and outputs, whatever became constant or unused."""
    result.ir_version = source.ir_version
    for name in ("metadata_props", "opset_import"):
        del getattr(result, name)[:]
        getattr(result, name).extend(getattr(source, name))
    for name in ("input", "output"):
        del getattr(result.graph, name)[:]
        getattr(result.graph, name).extend(getattr(source.graph, name))
    del result.graph.value_info[:]
    move_out(result)
    return result


def _foldable(proto: onnx.ModelProto, types: dict[str, TensorType]) -> set[str]:
    """Return the outputs of the nodes that depend on constants only and may be computed."""
    constant = {t.name for t in proto.graph.initializer if not is_outside(t)}
    foldable: set[str] = set()
    left = _MAX_CONSTANTS + 16 * sum(math.prod(t.dims) for t in proto.graph.initializer)
    pending = list(proto.graph.node)
    while pending:
        waiting = []
        for node in pending:
            if not all(name in constant for name in node.input if name):
                waiting.append(node)
            elif _may_compute(node, types):
                left -= sum(
                    _num_elements(types[n].static or ()) for n in node.output if n in types
                )
                if left < 0:
                    raise ModelError(
                        "its constants, computed, would take more than "
                        f"{_MAX_CONSTANTS} elements",
                        where=f"node '{node.name or node.output[0]}' ({node.op_type})",
                    )
                constant.update(name for name in node.output if name)
                foldable.update(name for name in node.output if name)
        if len(waiting) == len(pending):
            break
        pending = waiting
    return foldable


def _may_compute(node: onnx.NodeProto, types: dict[str, TensorType]) -> bool:
    # What a subgraph computes has no bound: Ifs are spliced, and then folded in turn.
    if node.op_type in _RANDOM or any(True for _ in subgraphs(node)):
        return False
    for name in filter(None, node.output):
        shape = types[name].static if name in types else None
        if shape is None:
            if node.op_type not in _BOUNDED:
                return False
        elif _num_elements(shape) > MAX_CONSTANT:
            raise ModelError(
                f"makes a constant of {_num_elements(shape)} elements "
                f"(at most {MAX_CONSTANT} are supported)",
                where=f"node '{node.name or name}' ({node.op_type})",
            )
    return True


def _num_elements(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


def fold_shapes(proto: onnx.ModelProto) -> bool:
    """Replace Shape and Size of tensors with known shapes by initializers, in place.

    Returns:
        Whether anything changed.
    """
    types = infer(proto)
    graph = proto.graph
    done = []
    for index, node in enumerate(graph.node):
        if node.op_type not in ("Shape", "Size"):
            continue
        shape = types[node.input[0]].static if node.input[0] in types else None
        if shape is None:
            continue
        if node.op_type == "Shape":
            limits = {a.name: a.i for a in node.attribute}
            shape = shape[limits.get("start", 0) : limits.get("end", len(shape))]
            value = np.array(shape, np.int64)
        else:
            value = np.array(_num_elements(shape), np.int64)
        graph.initializer.append(onnx.numpy_helper.from_array(value, node.output[0]))
        done.append(index)
    for index in reversed(done):
        del graph.node[index]
    return bool(done)
