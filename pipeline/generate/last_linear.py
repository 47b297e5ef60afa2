"""A classifier's last linear layer: its input is what the network has to say about an image."""

from __future__ import annotations

from dataclasses import dataclass

from graph_tools.model import Model, initializers
from pipeline.generate.heads import find_heads

__all__ = ["LastLinear", "find_last_linear"]


@dataclass(frozen=True, kw_only=True)
class LastLinear:
    """The last linear layer of a classifier.

    Args:
        features: name of its input, [N, F], or [N, F, 1, 1] before a convolution.
        logits: name of what it computes, [N, classes] or [N, classes, 1, 1].
        classes: their number, at least 2.
    """

    features: str
    logits: str
    classes: int


def find_last_linear(model: Model) -> LastLinear | None:
    """Return the layer, or None if the network is no classifier.

    A classifier has one output, which one linear layer feeds with a vector for each image.
    """
    heads = find_heads(model)
    if len(heads) != 1 or len(model.outputs) != 1:
        return None
    graph = model.proto.graph
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.value_info, *graph.output)
    }
    producers = {name: node for node in graph.node for name in node.output}
    constants = set(initializers(model.proto))
    node = producers.get(heads[0])
    if node is not None and node.op_type == "Add":  # a bias behind its matrix product
        inner = [name for name in node.input if name not in constants]
        node = producers.get(inner[0]) if len(inner) == 1 else None
    if node is None or node.op_type not in ("Conv", "Gemm", "MatMul"):
        return None
    shape, inside = shapes.get(heads[0], []), shapes.get(node.input[0], [])
    vectors = all(len(s) in (2, 4) and set(s[2:]) <= {1} for s in (shape, inside))
    if not vectors or shape[1] < 2 or node.input[0] in constants:
        return None
    return LastLinear(features=node.input[0], logits=heads[0], classes=shape[1])
