"""Small exact rewrites that every loaded graph goes through.

Each takes a model and changes it in place; none changes what the graph computes (but for the
precision of `to_float32`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from graph_tools.errors import ModelError
from graph_tools.walk import all_graphs, all_nodes, all_tensors, subgraphs
from graph_tools.weights import is_outside, tensor_of, values_of

__all__ = [
    "FLOAT_TYPES",
    "check_inference_mode",
    "constants_to_initializers",
    "drop_initializer_inputs",
    "drop_unread_masks",
    "drop_unused_initializers",
    "inline_constant_ifs",
    "name_nodes",
    "remove_no_ops",
    "rename_tensor",
    "tell_names_apart",
    "to_float32",
    "unused_name",
]

FLOAT_TYPES = frozenset(
    {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16}
)
_OTHER_FLOATS = FLOAT_TYPES - {TensorProto.FLOAT}
_TYPE_ATTRIBUTES = frozenset({"to", "dtype"})
_MAX_SPARSE = 2**26
_CHUNK = 2**22  # elements converted at once


def drop_unread_masks(proto: onnx.ModelProto) -> None:
    """Drop the second output of Dropout where nobody reads it, in place."""
    read = {name for node in all_nodes(proto) for name in node.input}
    read |= {value.name for graph in all_graphs(proto) for value in graph.output}
    read |= {name for function in proto.functions for name in function.output}
    for node in all_nodes(proto):
        if node.op_type == "Dropout" and read.isdisjoint(node.output[1:]):
            del node.output[1:]


def check_inference_mode(proto: onnx.ModelProto, *, where: str) -> None:
    """Refuse BatchNormalization in training mode: its statistics are not those of the file.

    Before opset 14 the mode shows in the number of outputs alone, read or not.

    Raises:
        ModelError: naming the node.
    """
    for node in all_nodes(proto):
        if node.op_type != "BatchNormalization":
            continue
        training = any(a.name == "training_mode" and a.i for a in node.attribute)
        if training or any(node.output[1:]):
            raise ModelError(
                f"BatchNormalization '{node.name or node.output[0]}' is in training mode",
                where=where,
                hint="call model.eval() before the export",
            )


def drop_initializer_inputs(graph: onnx.GraphProto) -> None:
    """Take initializers out of the graph inputs, where IR 3 had to list them."""
    constant = {t.name for t in graph.initializer}
    constant |= {s.values.name for s in graph.sparse_initializer}
    kept = [value for value in graph.input if value.name not in constant]
    del graph.input[:]
    graph.input.extend(kept)


def drop_unused_initializers(graph: onnx.GraphProto) -> None:
    """Drop the initializers that neither a node reads nor the graph gives out, in place.

    Args:
        graph: without subgraphs.
    """
    used = {name for node in graph.node for name in node.input}
    used |= {value.name for value in graph.output}
    names = [tensor.name for tensor in graph.initializer]
    for index in reversed(range(len(names))):
        if names[index] not in used:
            del graph.initializer[index]


def unused_name(name: str, taken: set[str]) -> str:
    """Return `name`, or `name` with a number behind it, and add it to `taken`."""
    index, result = 0, name
    while result in taken:
        index += 1
        result = f"{name}_{index}"
    taken.add(result)
    return result


def constants_to_initializers(graph: onnx.GraphProto) -> None:
    """Turn Constant nodes of every numeric kind, and sparse initializers, into initializers.

    Raises:
        ModelError: a sparse tensor is malformed or too large when dense.
    """
    kept = []
    for node in graph.node:
        values = _constant_value(node) if node.op_type == "Constant" else None
        if values is None:
            kept.append(node)
        elif isinstance(values, TensorProto):
            tensor = TensorProto()
            tensor.CopyFrom(values)
            tensor.name = node.output[0]
            graph.initializer.append(tensor)
        else:
            graph.initializer.append(numpy_helper.from_array(values, node.output[0]))
    _replace(graph.node, kept)
    for sparse in graph.sparse_initializer:
        dense = _dense(sparse, sparse.values.name)
        graph.initializer.append(numpy_helper.from_array(dense, sparse.values.name))
    del graph.sparse_initializer[:]


def _constant_value(node: onnx.NodeProto) -> np.ndarray | TensorProto | None:
    if len(node.attribute) != 1 or not node.output:
        return None
    attribute = node.attribute[0]
    match attribute.name:
        case "value":
            tensor: TensorProto = attribute.t
            return tensor
        case "sparse_value":
            return _dense(attribute.sparse_tensor, node.output[0])
        case "value_float":
            return np.array(attribute.f, np.float32)
        case "value_floats":
            return np.array(attribute.floats, np.float32)
        case "value_int":
            return np.array(attribute.i, np.int64)
        case "value_ints":
            return np.array(attribute.ints, np.int64)
    return None


def _dense(sparse: onnx.SparseTensorProto, name: str) -> np.ndarray:
    shape = tuple(sparse.dims)
    if np.prod(shape, dtype=object) > _MAX_SPARSE:
        raise ModelError(f"sparse tensor '{name}' is too large: {shape}")
    try:
        values = numpy_helper.to_array(sparse.values)
        indices = numpy_helper.to_array(sparse.indices)
        dense = np.zeros(shape, values.dtype)
        if indices.ndim == 1:
            dense.reshape(-1)[indices] = values
        else:
            dense[tuple(indices.T)] = values
    except (ValueError, IndexError) as error:
        raise ModelError(f"sparse tensor '{name}' is malformed: {error}") from error
    return dense


def to_float32(proto: onnx.ModelProto) -> tuple[str, ...]:
    """Convert float16, bfloat16 and double to float32 everywhere: weights, casts, values.

    Numbers beyond float32 become its largest finite ones; infinities stay.

    Returns:
        The names of the types that were found, e.g. ``("float16",)``.
    """
    found: set[int] = set()
    for _, tensor in all_tensors(proto):
        if tensor.data_type in _OTHER_FLOATS:
            found.add(tensor.data_type)
            values = values_of(tensor)
            single = np.empty(values.shape, np.float32)
            wide, narrow = values.reshape(-1), single.reshape(-1)
            for start in range(0, wide.size, _CHUNK):
                part = slice(start, start + _CHUNK)
                narrow[part] = _as_float32(wide[part])
            tensor.CopyFrom(tensor_of(single, tensor.name, outside=is_outside(tensor)))
    for node in all_nodes(proto):
        for attribute in node.attribute:
            is_type = attribute.type == AttributeProto.INT
            if is_type and attribute.name in _TYPE_ATTRIBUTES and attribute.i in _OTHER_FLOATS:
                found.add(attribute.i)
                attribute.i = TensorProto.FLOAT
    for graph in all_graphs(proto):
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type in _OTHER_FLOATS:
                found.add(value.type.tensor_type.elem_type)
                value.type.tensor_type.elem_type = TensorProto.FLOAT
    return tuple(sorted(TensorProto.DataType.Name(t).lower() for t in found))


def _as_float32(values: np.ndarray) -> np.ndarray:
    exact = values.astype(np.float64)
    limit = np.finfo(np.float32)
    finite = np.clip(exact, limit.min, limit.max)
    return np.where(np.isfinite(exact), finite, exact).astype(np.float32)


def rename_tensor(nodes: Iterable[onnx.NodeProto], old: str, new: str) -> None:
    """Rename a tensor in the inputs and outputs of `nodes` and in their subgraphs."""
    for node in nodes:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new
        for graph in subgraphs(node):
            rename_tensor(graph.node, old, new)
            for value in graph.output:
                if value.name == old:
                    value.name = new


def tell_names_apart(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """Rename weights and results whose name a later result uses again.

    ONNX forbids that, but torch's dynamo exporter names the result of ``x.mean()`` like a
    buffer called ``mean``. Read in order, the newest definition counts; the last keeps the
    name.

    Returns:
        The model, a copy if anything changed, and the names that were defined twice.
    """
    weights = {t.name for t in proto.graph.initializer}
    fixed = {v.name for v in proto.graph.input}
    places: dict[str, list[int]] = {name: [-1] for name in weights - fixed}
    for position, node in enumerate(proto.graph.node):
        for name in filter(None, node.output):
            places.setdefault(name, []).append(position)
    repeated = tuple(n for n, found in places.items() if len(found) > 1 and n not in fixed)
    if not repeated:
        return proto, ()
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    graph = result.graph
    for name in repeated:
        for index, (start, end) in enumerate(pairwise(places[name])):
            new = f"{name}/defined_{index}"
            for tensor in graph.initializer:
                if start < 0 and tensor.name == name:
                    tensor.name = new
            last = list(graph.node[end].output)
            rename_tensor(graph.node[max(start, 0) : end + 1], name, new)
            graph.node[end].output[:] = last
    return result, repeated


def remove_no_ops(graph: onnx.GraphProto) -> None:
    """Remove Identity, inference-mode Dropout and single-input Concat/Sum/Max/Min/Mean.

    Graph outputs keep their names. A node is left where it joins a graph output directly to a
    graph input, a constant or another graph output.

    Raises:
        ModelError: a Dropout in training mode.
    """
    outputs = {value.name for value in graph.output}
    fixed = outputs | {v.name for v in graph.input} | {t.name for t in graph.initializer}
    constants = {t.name: t for t in graph.initializer}
    users: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in _touched(node):
            users[name].append(node)

    def rename(old: str, new: str) -> None:
        touching = users.pop(old, [])
        rename_tensor(touching, old, new)
        users[new].extend(touching)

    removed = []
    for index, node in enumerate(graph.node):
        if not _is_no_op(node, constants):
            continue
        source, target = node.input[0], node.output[0]
        if target not in outputs:
            rename(target, source)
        elif source not in fixed:
            rename(source, target)
        else:
            continue
        removed.append(index)
    for index in reversed(removed):
        del graph.node[index]


def _touched(node: onnx.NodeProto) -> set[str]:
    """Return the tensors that a node and its subgraphs name."""
    names = {*node.input, *node.output}
    for graph in subgraphs(node):
        names.update(value.name for value in graph.output)
        for inner in graph.node:
            names |= _touched(inner)
    return names


def _is_no_op(node: onnx.NodeProto, constants: dict[str, TensorProto]) -> bool:
    if node.op_type == "Identity":
        return True
    if node.op_type in ("Concat", "Sum", "Max", "Min", "Mean"):
        return len(node.input) == 1
    if node.op_type != "Dropout":
        return False
    if len(node.input) > 2 and node.input[2]:
        mode = constants.get(node.input[2])
        if mode is None or bool(values_of(mode).any()):
            raise ModelError(
                "Dropout in training mode",
                where=f"node '{node.name or node.output[0]}'",
                hint="call model.eval() before the export",
            )
    return not any(node.output[1:])


def inline_constant_ifs(graph: onnx.GraphProto) -> bool:
    """Replace each If whose condition is an initializer by the branch that it takes.

    Returns:
        Whether anything changed.
    """
    constants = {t.name: t for t in graph.initializer}
    changed = False
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        condition = constants.get(node.input[0]) if node.op_type == "If" else None
        if condition is None:
            nodes.append(node)
            continue
        taken = bool(values_of(condition).any())
        name = "then_branch" if taken else "else_branch"
        branch = next(a.g for a in node.attribute if a.name == name)
        nodes.extend(_spliced(branch, node, graph))
        changed = True
    if changed:
        _replace(graph.node, nodes)
    return changed


def _spliced(
    branch: onnx.GraphProto, node: onnx.NodeProto, graph: onnx.GraphProto
) -> list[onnx.NodeProto]:
    """Return the nodes of `branch`, ready to stand in `graph` in place of the If `node`."""
    body = onnx.GraphProto()
    body.CopyFrom(branch)
    local = [t.name for t in body.initializer]
    local += [name for inner in body.node for name in inner.output if name]
    for name in local:
        new = f"{node.output[0]}/{name}"
        rename_tensor(body.node, name, new)
        for value in (*body.initializer, *body.output):
            if value.name == name:
                value.name = new
    graph.initializer.extend(body.initializer)
    for inner in body.node:
        if inner.name:
            inner.name = f"{node.name or node.output[0]}/{inner.name}"
    joins = [
        helper.make_node("Identity", [inner.name], [outer])
        for inner, outer in zip(body.output, node.output, strict=True)
        if outer
    ]
    return [*body.node, *joins]


def name_nodes(graph: onnx.GraphProto) -> None:
    """Give every node a unique name; names that are unique already stay."""
    used: set[str] = set()
    nameless = []
    for node in graph.node:
        if node.name and node.name not in used:
            used.add(node.name)
        else:
            nameless.append(node)
    counts: dict[str, int] = {}
    for node in nameless:
        base = node.name or node.op_type
        while True:
            index = counts.get(base, 0)
            counts[base] = index + 1
            if (name := f"{base}_{index}") not in used:
                break
        node.name = name
        used.add(name)


def _replace(field: object, items: list[onnx.NodeProto]) -> None:
    copies = []
    for item in items:
        copy = onnx.NodeProto()
        copy.CopyFrom(item)
        copies.append(copy)
    del field[:]  # type: ignore[attr-defined]
    field.extend(copies)  # type: ignore[attr-defined]
