"""Free a graph of its shape arithmetic, and of a batch size that is baked into it.

Exporters compute the target of a Reshape at run time (Shape, Gather, Unsqueeze, Concat) when
the batch is dynamic. Folding the graph once with batch 2 and once with batch 3 shows what such
a chain yields: what is equal is a constant; what follows the batch is spelled without
arithmetic (`graph_tools.shape_rules`). What cannot be spelled so stays as it was.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from graph_tools.folding import fold_constants, fold_shapes
from graph_tools.limits import check_sizes
from graph_tools.shape_rules import Probe, Use, free_constant, rewrite, same
from graph_tools.shapes import BATCH, PROBES, TensorType, infer, set_shape, with_batch
from graph_tools.walk import all_nodes
from graph_tools.weights import values_of

__all__ = ["fold_at_batch", "generalize_batch", "resolve_shapes"]

_MAX_ROUNDS = 16


def resolve_shapes(
    proto: onnx.ModelProto, *, batches: Sequence[int] = PROBES
) -> onnx.ModelProto:
    """Replace shape arithmetic by constants that hold for every batch size.

    Args:
        proto: one graph input, its height, width and channels static.
        batches: the sizes to fold at. With a single one its values are taken as they are:
            the result then runs at that size only.

    Returns:
        A new model, constants folded. Constant conditions of If are resolved too.

    Raises:
        ModelError: a tensor would be too large.
    """
    proto = fold_constants(proto)
    for _ in range(_MAX_ROUNDS):
        if not any(node.op_type in ("Shape", "Size") for node in all_nodes(proto)):
            for batch in batches:
                check_sizes(infer(with_batch(proto, proto.graph.input[0].name, batch)))
            break  # nothing can follow the batch by value
        probes = tuple(fold_at_batch(proto, batch) for batch in batches)
        if not _substitute(proto, probes):
            break
        proto = fold_constants(proto)
    return proto


def fold_at_batch(proto: onnx.ModelProto, batch: int) -> Probe:
    """Fold the graph at one batch size and infer its shapes; its large weights are left out.

    Raises:
        ModelError: a tensor would be too large.
    """
    bare = with_batch(proto, proto.graph.input[0].name, batch)
    # As outputs, the conditions outlive the If nodes that are spliced away.
    outputs = {value.name for value in bare.graph.output}
    conditions = {node.input[0] for node in bare.graph.node if node.op_type == "If"}
    for name in sorted(conditions - outputs):
        value = bare.graph.output.add(name=name)
        set_shape(value, onnx.TensorProto.BOOL, None)
    check_sizes(infer(bare))
    for _ in range(_MAX_ROUNDS):
        num_nodes = len(bare.graph.node)
        changed = fold_shapes(bare)
        bare = fold_constants(bare)
        if not changed and len(bare.graph.node) == num_nodes:
            break
    types = infer(bare)
    check_sizes(types)
    constants = {t.name: values_of(t) for t in bare.graph.initializer}
    return Probe(constants, types)


def _substitute(proto: onnx.ModelProto, probes: tuple[Probe, ...]) -> bool:
    graph = proto.graph
    inputs = {value.name for value in graph.input}
    made = [name for node in graph.node for name in node.output if name and name not in inputs]
    changed = False
    makers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in set(node.input):
            readers[name].append(node)
    for name in made:
        if not all(name in probe.constants for probe in probes):
            continue
        values = tuple(probe.constants[name] for probe in probes)
        if all(same(value, values[0]) for value in values):
            _make_constant(graph, makers[name], name, values[0])
            changed = True
        else:
            changed |= _rewrite_uses(graph, readers[name], name, values, probes)
    return changed


def _make_constant(
    graph: onnx.GraphProto, maker: onnx.NodeProto, name: str, value: np.ndarray
) -> None:
    maker.output[list(maker.output).index(name)] = f"{name}/unused"
    graph.initializer.append(numpy_helper.from_array(value, name))


def _rewrite_uses(
    graph: onnx.GraphProto,
    readers: Sequence[onnx.NodeProto],
    name: str,
    values: tuple[np.ndarray, ...],
    probes: tuple[Probe, ...],
) -> bool:
    changed = False
    for node in readers:
        for index in [i for i, given in enumerate(node.input) if given == name]:
            changed |= rewrite(graph, Use(node, index, values, probes))
    return changed


def generalize_batch(proto: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """Guess the form for any batch size of a graph whose constants are written for one.

    In the order of the graph, each Reshape is given the 0 or -1 at the place where, in memory
    order, the batch of its input goes. The guess must be checked by running it.

    Args:
        proto: opset of the normal form, one graph input.
        batch: the size that the graph is written for.

    Returns:
        A new model with a dynamic batch, shape arithmetic resolved.

    Raises:
        ModelError: a tensor would be too large.
    """
    result = onnx.ModelProto()
    result.CopyFrom(fold_constants(proto))
    graph = result.graph
    dim = graph.input[0].type.tensor_type.shape.dim[0]
    dim.Clear()
    dim.dim_param = BATCH
    probe = fold_at_batch(result, batch)
    done: set[str] = set()
    while True:
        larger = _types_at(result, batch + 1)
        if _repeat_constants(graph, larger, batch):
            continue
        if not (ready := _next_constant_shapes(graph, done)):
            break
        for node, index, value in ready:
            done.add(node.output[0])
            source = probe.shape(node.input[0])
            target = probe.shape(node.output[0])
            grown = larger[node.input[0]].static if node.input[0] in larger else None
            if source and target and grown and len(source) == len(grown) and value.ndim == 1:
                free_constant(graph, node, index, value, (source, grown, target))
    return resolve_shapes(result)


def _types_at(proto: onnx.ModelProto, batch: int) -> Mapping[str, TensorType]:
    """Return the types of all tensors as far as they hold at another batch size."""
    if any(node.op_type in ("Shape", "Size") for node in proto.graph.node):
        return fold_at_batch(proto, batch).types  # shapes may follow from arithmetic
    return infer(with_batch(proto, proto.graph.input[0].name, batch))


def _repeat_constants(
    graph: onnx.GraphProto, larger: Mapping[str, TensorType], batch: int
) -> bool:
    """Let constants that are joined to each image, such as a class token, follow the batch.

    They have one row for each image of the file's batch; the first is repeated instead.
    """
    constants = {t.name: t for t in graph.initializer}
    made: list[onnx.NodeProto] = []
    changed = False
    for node in graph.node:
        shapes = {n: larger[n].static for n in node.input if n in larger}
        grown = next((n for n, s in shapes.items() if s and s[0] == batch + 1), None)
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        if node.op_type == "Concat" and grown and axis % len(shapes[grown] or ()):
            for index, name in enumerate(node.input):
                if name in constants and constants[name].dims[0] == batch:
                    repeat = _repeated(graph, constants[name], grown, f"{name}/{len(made)}")
                    made.extend(repeat)
                    node.input[index] = repeat[-1].output[0] if repeat else name
                    changed |= bool(repeat)
        made.append(onnx.NodeProto.FromString(node.SerializeToString()))
    if changed:
        del graph.node[:]
        graph.node.extend(made)
    return changed


def _repeated(
    graph: onnx.GraphProto, tensor: onnx.TensorProto, image: str, name: str
) -> list[onnx.NodeProto]:
    """Return nodes that repeat the one row of `tensor` as often as `image` has rows."""
    values = values_of(tensor)
    if not (values == values[:1]).all():
        return []
    row, ones = f"{name}/row", f"{name}/ones"
    size, shape, output = f"{name}/size", f"{name}/shape", f"{name}/repeated"
    graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values[:1]), row))
    rest = np.ones(values.ndim - 1, np.int64)
    graph.initializer.append(numpy_helper.from_array(rest, ones))
    return [
        helper.make_node("Shape", [image], [size], start=0, end=1),
        helper.make_node("Concat", [size, ones], [shape], axis=0),
        helper.make_node("Expand", [row, shape], [output]),
    ]


_SHAPE_INDEX = {"Reshape": 1, "Expand": 1, "Resize": 3}


def _next_constant_shapes(
    graph: onnx.GraphProto, done: set[str]
) -> list[tuple[onnx.NodeProto, int, np.ndarray]]:
    """Return the nodes with a constant target shape that no other such node feeds."""
    constants = {t.name: t for t in graph.initializer}
    waiting: set[str] = set()
    ready = []
    for node in graph.node:
        index = _SHAPE_INDEX.get(node.op_type, 0)
        fed = not waiting.isdisjoint(node.input)
        is_target = 0 < index < len(node.input) and node.input[index] in constants
        if is_target and node.output[0] not in done:
            if not fed:
                value = values_of(constants[node.input[index]])
                ready.append((node, index, value))
            fed = True
        if fed:
            waiting.update(node.output)
    return ready
