"""Spell sequences of tensors without sequences.

Exporters write ``x.split(4, 1)[0]`` as SplitToSequence and SequenceAt, lists of tensors as
SequenceConstruct or SequenceInsert, and ``torch.cat`` of a list as ConcatFromSequence. Where
the list and the positions are known, these are Slices and Concats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from graph_tools.weights import values_of

__all__ = ["resolve_sequences"]

_INT64_MAX = 2**63 - 1


@dataclass(frozen=True)
class _Pieces:
    """What SplitToSequence makes of `tensor`.

    Attributes:
        sizes: of the pieces along `axis`; one number if all but the last have the same.
        keep: whether the pieces keep the axis (of size one).
    """

    tensor: str
    axis: int
    sizes: int | tuple[int, ...]
    keep: bool


_Sequence = _Pieces | tuple[str, ...]


def resolve_sequences(graph: onnx.GraphProto) -> bool:
    """Replace what reads a known sequence, in place; what makes it is left, unused.

    Args:
        graph: opset 13 or newer, constants as initializers, nodes sorted.

    Returns:
        Whether anything changed.
    """
    constants = {t.name: t for t in graph.initializer}
    known: dict[str, _Sequence] = {}
    changed = False
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        sequence = _made(node, known, constants)
        if sequence is not None:
            known[node.output[0]] = sequence
        spelled = _spelled(graph, node, known, constants)
        changed |= spelled is not None
        nodes.extend([node] if spelled is None else spelled)
    if changed:
        kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(kept)
    return changed


def _made(
    node: onnx.NodeProto,
    known: Mapping[str, _Sequence],
    constants: Mapping[str, onnx.TensorProto],
) -> _Sequence | None:
    """Return the sequence that `node` makes, if it is known."""
    match node.op_type:
        case "SequenceEmpty":
            return ()
        case "SequenceConstruct":
            return tuple(node.input)
        case "SequenceInsert":
            before = known.get(node.input[0])
            place = _integers(node, 2, constants)
            if not isinstance(before, tuple) or (place is None and len(node.input) > 2):
                return None
            items = list(before)
            items.insert(len(items) if place is None else int(place), node.input[1])
            return tuple(items)
        case "SplitToSequence":
            sizes = _integers(node, 1, constants)
            given = len(node.input) > 1 and bool(node.input[1])
            if given and sizes is None:
                return None
            return _Pieces(
                tensor=node.input[0],
                axis=_attribute(node, "axis", 0),
                sizes=1 if sizes is None else sizes.tolist() if sizes.ndim == 0
                else tuple(sizes.tolist()),
                keep=given or bool(_attribute(node, "keepdims", 1)),
            )  # fmt: skip
    return None


def _spelled(
    graph: onnx.GraphProto,
    node: onnx.NodeProto,
    known: Mapping[str, _Sequence],
    constants: Mapping[str, onnx.TensorProto],
) -> list[onnx.NodeProto] | None:
    """Return nodes that compute what `node` reads from a known sequence, else None."""
    if node.op_type not in ("SequenceAt", "SequenceLength", "ConcatFromSequence"):
        return None
    sequence, output = known.get(node.input[0]), node.output[0]
    if node.op_type == "SequenceAt":
        place = _integers(node, 1, constants)
        if place is None or sequence is None:
            return None
        if isinstance(sequence, _Pieces):
            return _piece(graph, sequence, int(place), output)
        if not -len(sequence) <= place < len(sequence):
            return None
        return [helper.make_node("Identity", [sequence[int(place)]], [output])]
    if not isinstance(sequence, tuple):
        return None
    if node.op_type == "SequenceLength":
        length = np.array(len(sequence), np.int64)
        return [
            helper.make_node("Constant", [], [output], value=numpy_helper.from_array(length))
        ]
    return _joined(graph, node, sequence) if sequence else None


def _piece(
    graph: onnx.GraphProto, pieces: _Pieces, place: int, output: str
) -> list[onnx.NodeProto] | None:
    if not pieces.keep:
        index = _constant(graph, f"{output}/index", np.array(place, np.int64))
        return [helper.make_node("Gather", [pieces.tensor, index], [output], axis=pieces.axis)]
    if isinstance(pieces.sizes, tuple):
        if not -len(pieces.sizes) <= place < len(pieces.sizes):
            return None
        place %= len(pieces.sizes)
        start = sum(pieces.sizes[:place])
        end = start + pieces.sizes[place]
    elif place >= 0:
        start, end = place * pieces.sizes, (place + 1) * pieces.sizes
    elif pieces.sizes == 1:
        start, end = place, place + 1 or _INT64_MAX
    else:  # counted from the end, where the last piece may be smaller
        return None
    values = (("starts", start), ("ends", end), ("axes", pieces.axis))
    names = [
        _constant(graph, f"{output}/{name}", np.array([value], np.int64))
        for name, value in values
    ]
    return [helper.make_node("Slice", [pieces.tensor, *names], [output])]


def _joined(
    graph: onnx.GraphProto, node: onnx.NodeProto, sequence: tuple[str, ...]
) -> list[onnx.NodeProto]:
    output, axis = node.output[0], _attribute(node, "axis", 0)
    if not _attribute(node, "new_axis", 0):
        return [helper.make_node("Concat", list(sequence), [output], axis=axis)]
    axes = _constant(graph, f"{output}/axes", np.array([axis], np.int64))
    names = [f"{output}/{index}" for index in range(len(sequence))]
    return [
        *(
            helper.make_node("Unsqueeze", [source, axes], [name])
            for source, name in zip(sequence, names, strict=True)
        ),
        helper.make_node("Concat", names, [output], axis=axis),
    ]


def _constant(graph: onnx.GraphProto, name: str, value: np.ndarray) -> str:
    graph.initializer.append(numpy_helper.from_array(value, name))
    return name


def _integers(
    node: onnx.NodeProto, index: int, constants: Mapping[str, onnx.TensorProto]
) -> np.ndarray | None:
    if index >= len(node.input) or node.input[index] not in constants:
        return None
    return values_of(constants[node.input[index]])


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return int(next((a.i for a in node.attribute if a.name == name), default))
