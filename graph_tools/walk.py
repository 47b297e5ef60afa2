"""Walk an ONNX model: graphs, nodes, tensors and types, nested ones included; nodes in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx

from graph_tools.errors import ModelError

__all__ = [
    "all_graphs",
    "all_nodes",
    "all_tensors",
    "needed_nodes",
    "nested_nodes",
    "subgraphs",
]


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yield the graphs held directly by the attributes of `node` (If, Loop, Scan)."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


def nested_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Yield nodes, and after each those of its subgraphs."""
    for node in nodes:
        yield node
        for graph in subgraphs(node):
            yield from nested_nodes(graph.node)


def all_nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Yield every node of the graph, of its subgraphs and of the model-local functions."""
    yield from nested_nodes(proto.graph.node)
    for function in proto.functions:
        yield from nested_nodes(function.node)


def all_graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """Yield the main graph and every subgraph, those inside functions included."""
    yield proto.graph
    for node in all_nodes(proto):
        yield from subgraphs(node)


def all_tensors(proto: onnx.ModelProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Yield ``(name for messages, tensor)`` for each initializer and tensor attribute.

    The two parts of a sparse tensor are yielded one after the other. The tensors are those of
    the model, not copies: writing to them changes it.
    """
    for graph in all_graphs(proto):
        for tensor in graph.initializer:
            yield tensor.name, tensor
        for sparse in graph.sparse_initializer:
            yield sparse.values.name, sparse.values
            yield sparse.values.name, sparse.indices
    for node in all_nodes(proto):
        name = node.output[0] if node.output else node.name
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield name, attribute.t
            elif attribute.type == onnx.AttributeProto.TENSORS:
                yield from ((name, tensor) for tensor in attribute.tensors)
            elif attribute.type == onnx.AttributeProto.SPARSE_TENSOR:
                yield name, attribute.sparse_tensor.values
                yield name, attribute.sparse_tensor.indices


def needed_nodes(
    graph: onnx.GraphProto, outputs: Iterable[str], available: set[str]
) -> list[onnx.NodeProto]:
    """Return the nodes that ``outputs`` depend on, in an order in which they can run.

    Raises:
        ModelError: an output is neither made by a node nor ``available``.
    """
    producers = {name: node for node in graph.node for name in node.output if name}
    ordered: list[onnx.NodeProto] = []
    done: set[int] = set()
    for output in outputs:
        if output not in producers and output not in available:
            raise ModelError(f"no tensor {output!r} in the graph", where=graph.name)
        # Depth first with a stack of its own: deep graphs exceed Python's recursion limit.
        stack = [producers[output]] if output in producers else []
        while stack:
            node = stack[-1]
            waiting = [
                producers[name]
                for name in node.input
                if name in producers and id(producers[name]) not in done
            ]
            if id(node) in done:
                stack.pop()
            elif waiting:
                stack.extend(reversed(waiting))
            else:
                done.add(id(node))
                ordered.append(stack.pop())
    return ordered
