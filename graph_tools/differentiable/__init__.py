"""Rewrite a graph into operators that onnxruntime-training can differentiate.

What it differentiates rightly was tried operator by operator, version 1.19.2: some operators have
no gradient, and some a wrong one (AveragePool with dilations, Conv with ``auto_pad``,
LeakyRelu with a negative slope, the tanh form of Gelu, BatchNormalization as in training).
An operator is replaced by the rewrite registered for it, else by ONNX's own definition of it
as a function; what remains without gradient is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
from onnx import TensorProto, inliner

from graph_tools.batch import resolve_shapes
from graph_tools.differentiable import arithmetic, movement, reduction, windows
from graph_tools.differentiable.registry import REWRITES, NoGradientError, Site, Writer
from graph_tools.errors import UnsupportedOperatorError
from graph_tools.opset import opset_version
from graph_tools.passes import constants_to_initializers, name_nodes
from graph_tools.quiet import quiet
from graph_tools.shapes import TensorType, infer, set_shape
from graph_tools.weights import values_of

__all__ = ["WITH_GRADIENT", "differentiable", "traced_tensors"]

_FAMILIES = (arithmetic, movement, reduction, windows)  # importing them fills REWRITES

WITH_GRADIENT = frozenset(
    """
    Abs Add AveragePool Cast Clip Concat Conv Cos Div Erf Exp Expand Flatten Gather
    GatherElements GatherND Gelu Gemm GlobalAveragePool Identity LeakyRelu Log LogSoftmax MatMul
    Max MaxPool Min Mul Neg Pad Pow Reciprocal ReduceL2 ReduceLogSumExp ReduceMean ReduceSum
    Relu Reshape Sigmoid Sin Slice Softmax Split Sqrt Squeeze Sub Tanh Tile TopK Transpose Trilu
    Unsqueeze Where
    """.split()
)
"""Operators whose gradient was found right, in the variants that the rewrites leave."""

_FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.UNDEFINED)
_HINT = "use --engine torch, or export without them"
_MAX_ROUNDS = 200  # shape inference may end at an operator: then what follows waits for it


def differentiable(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph that computes the same from operators with gradients.

    Args:
        proto: opset 21, all shapes static, every node needed for an output; it is not changed.

    Returns:
        The rewritten graph. Tensors that are outputs keep their names.

    Raises:
        UnsupportedOperatorError: names all operators between an input and an output that have
            no gradient.
    """
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    refused: set[str] = set()
    for _ in range(_MAX_ROUNDS):
        types = infer(result)
        traced = traced_tensors(result, types)
        changed, refused = _rewrite(result, types, traced)
        if names := _functions(result, traced):
            result = _inlined(result, names, types)
            changed = True
        if not changed:
            break
    refused |= {
        node.op_type
        for node in result.graph.node
        if _is_traced(node, traced)
        and node.op_type not in WITH_GRADIENT
        and not any(name.split()[0] == node.op_type for name in refused)
    }
    if refused:
        raise UnsupportedOperatorError(
            tuple(refused),
            where=f"{proto.graph.name}: gradients in onnxruntime-training",
            hint=_HINT,
        )
    _enter_once(result.graph)
    _keep_apart(result.graph)
    name_nodes(result.graph)
    return result


def _enter_once(graph: onnx.GraphProto) -> None:
    """Read each graph input by one Identity.

    The gradient builder names the gradient of an input twice where one node reads it twice.
    """
    names = [value.name for value in graph.input]
    rename = {name: f"{name}/entered" for name in names}
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = rename.get(name, name)
    for position, name in enumerate(names):
        entry = onnx.helper.make_node("Identity", [name], [rename[name]])
        graph.node.insert(position, entry)


def _keep_apart(graph: onnx.GraphProto) -> None:
    """Divide by square roots in two nodes, so that no written-out normalization is recognized.

    The gradient builder would fuse it, and name the gradient of its scale twice where the scales
    of two of them are equal.
    """
    roots = {node.output[0] for node in graph.node if node.op_type == "Sqrt"}
    for position in reversed(range(len(graph.node))):
        node = graph.node[position]
        if node.op_type == "Div" and node.input[1] in roots:
            inverse = f"{node.output[0]}/inverse"
            entry = onnx.helper.make_node("Reciprocal", [node.input[1]], [inverse], inverse)
            node.op_type, node.input[1] = "Mul", inverse
            graph.node.insert(position, entry)


def traced_tensors(proto: onnx.ModelProto, types: Mapping[str, TensorType]) -> frozenset[str]:
    """Return the tensors through which a gradient flows from outputs to inputs.

    Args:
        proto: a graph.
        types: of its tensors; only floats carry gradients, and what might be one.
    """
    graph = proto.graph

    def is_float(name: str) -> bool:
        return name not in types or types[name].elem_type in _FLOATS

    constants = {tensor.name for tensor in graph.initializer}
    reached = {v.name for v in graph.input if is_float(v.name)} - constants
    for node in graph.node:
        if not reached.isdisjoint(node.input):
            reached.update(name for name in node.output if is_float(name))
    wanted = {value.name for value in graph.output} & reached
    for node in reversed(graph.node):
        if not wanted.isdisjoint(node.output):
            wanted.update(reached.intersection(node.input))
    return frozenset(wanted)


def _rewrite(
    proto: onnx.ModelProto, types: Mapping[str, TensorType], traced: frozenset[str]
) -> tuple[bool, set[str]]:
    """Replace nodes by what is registered for them, in place; return (changed, refused)."""
    graph = proto.graph
    constants = {t.name: values_of(t) for t in graph.initializer}
    outputs = {value.name for value in graph.output}
    used = {name for node in graph.node for name in node.input} | outputs
    taken = {name for node in graph.node for name in node.output} | {*constants, *types}
    nodes: list[onnx.NodeProto] = []
    changed, refused = False, set()
    for node in graph.node:
        write = Writer(node.output[0] or node.name, taken)
        function = REWRITES.get(node.op_type) if _is_traced(node, traced) else None
        result = None
        if function is not None:
            site = Site(node=node, types=types, constants=constants, traced=traced)
            try:
                result = function(site, write)
            except NoGradientError as error:
                refused.add(str(error))
        if result is None:
            nodes.append(node)
            continue
        changed = True
        for new in write.nodes:
            if new.output[0] == result and result not in node.output:
                new.output[0] = node.output[0]
        made = {name for new in write.nodes for name in new.output}
        if any(name in used and name not in made for name in node.output):
            refused.add(f"{node.op_type} with more than one output")
        nodes.extend(write.nodes)
        graph.initializer.extend(write.constants)
    if changed:
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(copies)
        del graph.value_info[:]
    return changed, refused


def _inlined(
    proto: onnx.ModelProto, names: set[str], types: Mapping[str, TensorType]
) -> onnx.ModelProto:
    """Replace operators by ONNX's definitions of them, which may depend on types."""
    opset = opset_version(proto)
    del proto.graph.value_info[:]
    for node in proto.graph.node:
        if (
            node.op_type in names
        ):  # the inliner loses attributes that are left to their default
            given = {attribute.name for attribute in node.attribute}
            known = onnx.defs.get_schema(node.op_type, opset).attributes
            node.attribute.extend(
                entry.default_value
                for name, entry in known.items()
                if name not in given and entry.default_value.type
            )
    outputs = {value.name for value in proto.graph.output}
    for name, kind in types.items():
        if kind.elem_type and name not in outputs:
            set_shape(proto.graph.value_info.add(name=name), kind.elem_type, kind.shape)
    with quiet():
        result = inliner.inline_selected_functions(
            proto, [("", name) for name in sorted(names)], inline_schema_functions=True
        )
    constants_to_initializers(result.graph)
    del result.opset_import[:]
    result.opset_import.append(onnx.helper.make_opsetid("", opset))
    del result.graph.value_info[:]
    # their shape arithmetic, at the shapes that are fixed here
    return resolve_shapes(
        result, batches=(types[proto.graph.input[0].name].static or (1,))[:1]
    )


def _functions(proto: onnx.ModelProto, traced: frozenset[str]) -> set[str]:
    """Return operators without gradient and rewrite that ONNX defines as functions."""
    version = opset_version(proto)
    return {
        node.op_type
        for node in proto.graph.node
        if _is_traced(node, traced)
        and node.op_type not in WITH_GRADIENT
        and node.op_type not in REWRITES
        and _has_body(node.op_type, version)
    }


def _has_body(op_type: str, version: int) -> bool:
    if not onnx.defs.has(op_type, version):
        return False
    schema: Any = onnx.defs.get_schema(op_type, version)  # its stubs lack both
    return bool(schema.has_function or schema.has_context_dependent_function)


def _is_traced(node: onnx.NodeProto, traced: frozenset[str]) -> bool:
    return not traced.isdisjoint(node.output)
