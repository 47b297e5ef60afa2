"""Each quantized tensor by itself: equal integers in, how far apart are the integers out?

Where float sums round (scales of weights that are no powers of two, sums beyond 2^24, additions of
tensors that have no quantizer) two exact-looking runs may land on different sides of the middle
between two integers. What follows then differs for another reason: other inputs. So each tensor is
compared in a piece of the network of its own, from the integers of the unoptimized run in front of
it to its own integers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto, helper

from graph_tools.quantized_graph import QuantizedGraph
from graph_tools.saving import loadable
from pipeline.verify.compilers import onnxruntime as ort
from pipeline.verify.opening import filled

__all__ = ["Stepwise", "compare_stepwise"]


@dataclass(frozen=True, kw_only=True)
class Stepwise:
    """Optimized against unoptimized run, each tensor from the same integers.

    Attributes:
        tensors: quantized tensors compared; ``inexact`` those with an element that differs.
        elements: integers compared; ``differing`` those that differ.
        largest_steps: largest difference.
        worst: the tensor that has it; "" without a difference.
        unexplained: tensors that differ although nothing in front of them rounds.
    """

    tensors: int
    inexact: int
    elements: int
    differing: int
    largest_steps: float
    worst: str
    unexplained: tuple[str, ...] = ()

    @property
    def within_one_step(self) -> bool:
        """No integer is off by more than one, and none where all sums are exact."""
        return self.tensors > 0 and self.largest_steps <= 1 and not self.unexplained

    def __str__(self) -> str:
        return (
            f"from equal integers {self.inexact} of {self.tensors} tensors differ in "
            f"{self.differing:,} of {self.elements:,} elements, by at most "
            f"{self.largest_steps:g} steps"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the fields."""
        return {**vars(self), "unexplained": list(self.unexplained)}


def compare_stepwise(
    graph: QuantizedGraph,
    batch: npt.NDArray[np.float32],
    rounding: Collection[str],
    *,
    threads: int = 0,
) -> Stepwise:
    """Compare every activation that a QuantizeLinear makes, on one batch.

    Args:
        graph: the model.
        batch: [N, ...] float32 images.
        rounding: names of the nodes that may round.
        threads: as in `ort.compile`.
    """
    batch = filled(batch, graph.batch)  # pieces are run directly
    ends = [
        node
        for node in graph.dequantizers
        if not graph.is_weight(node) and graph.quantizer_of(node) is not None
    ]
    given = {graph.inputs[0].name: batch, **_values(graph, ends, batch, threads)}
    tensors = inexact = elements = differing = 0
    largest, worst = 0.0, ""
    unexplained = []
    for end in ends:
        piece, names = _piece(graph, end)
        scale = graph.scale(end)
        if not names or scale is None or scale.size != 1:
            continue
        found = _run(piece, {name: given[source] for name, source in names.items()}, threads)
        steps = np.abs(found - given[end.output[0]]) / float(scale.reshape(-1)[0])
        tensors, elements = tensors + 1, elements + steps.size
        if (count := int(np.count_nonzero(steps))) > 0:
            inexact, differing = inexact + 1, differing + count
            if not any(node.name in rounding for node in piece.graph.node):
                unexplained.append(end.output[0])
        if (most := float(np.max(steps, initial=0.0))) > largest:
            largest, worst = most, end.output[0]
    return Stepwise(
        tensors=tensors,
        inexact=inexact,
        elements=elements,
        differing=differing,
        largest_steps=largest,
        worst=worst,
        unexplained=tuple(unexplained),
    )


def _values(
    graph: QuantizedGraph,
    ends: list[NodeProto],
    batch: npt.NDArray[np.float32],
    threads: int,
) -> dict[str, npt.NDArray[Any]]:
    """Dequantized tensors of the unoptimized run, in which nothing is fused."""
    whole = onnx.ModelProto()
    whole.CopyFrom(graph.proto)
    del whole.graph.output[:]
    whole.graph.output.extend(
        helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None) for node in ends
    )
    with tempfile.TemporaryDirectory(prefix="zsq-") as folder:
        model = loadable(whole, Path(folder))
        return ort.run(ort.compile(model, "unoptimized", threads=threads), batch)


def _piece(graph: QuantizedGraph, end: NodeProto) -> tuple[onnx.ModelProto, dict[str, str]]:
    """The network from the last integers in front of ``end`` to ``end``, and what to feed it.

    Inputs are dequantized tensors, quantized again: that gives their integers back. Returns the
    source of each input by its name; none if a piece cannot be cut out.
    """
    wanted: set[int] = set()
    names: dict[str, str] = {}
    edges: dict[int, str] = {}  # QuantizeLinear nodes that read an input of the piece
    pending = [end.output[0]]
    while pending:
        name = pending.pop()
        node = graph.producers.get(name)
        if node is None:
            if not graph.is_constant(name) and name:
                names[name] = name
            continue
        if id(node) in wanted:
            continue
        wanted.add(id(node))
        is_edge = node.op_type == "DequantizeLinear" and node is not end
        if is_edge and not graph.is_weight(node):
            inner = list(_to_quantizer(graph, node))
            if not inner:
                return onnx.ModelProto(), {}
            wanted.update(map(id, inner))
            edges[id(inner[-1])] = f"{node.output[0]}/given"
            names[f"{node.output[0]}/given"] = node.output[0]
        else:
            pending += node.input
    piece = onnx.ModelProto()
    piece.CopyFrom(graph.proto)
    del piece.graph.node[:], piece.graph.output[:], piece.graph.value_info[:]
    del piece.graph.input[:]
    for node in graph.nodes:
        if id(node) in wanted:
            copy = piece.graph.node.add()
            copy.CopyFrom(node)
            copy.input[0] = edges.get(id(node), copy.input[0])
    types = {value.name: value for value in graph.proto.graph.value_info}
    types |= {value.name: value for value in (*graph.inputs, *graph.proto.graph.output)}
    for name, source in names.items():
        entry = piece.graph.input.add()
        entry.CopyFrom(types[source]) if source in types else entry.CopyFrom(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        )
        entry.name = name
    piece.graph.output.append(
        helper.make_tensor_value_info(end.output[0], TensorProto.FLOAT, None)
    )
    used = {name for node in piece.graph.node for name in node.input}
    kept = [entry for entry in piece.graph.initializer if entry.name in used]
    del piece.graph.initializer[:]
    piece.graph.initializer.extend(kept)
    return piece, names


def _to_quantizer(graph: QuantizedGraph, dequantizer: NodeProto) -> Iterator[NodeProto]:
    """The nodes from a DequantizeLinear back to its QuantizeLinear; none if data moves between."""
    found = []
    node = graph.producers.get(dequantizer.input[0])
    while node is not None and node.op_type == "Clip":
        found.append(node)
        node = graph.producers.get(node.input[0])
    if node is not None and node.op_type == "QuantizeLinear":
        yield from (*found, node)


def _run(
    piece: onnx.ModelProto, given: dict[str, npt.NDArray[Any]], threads: int
) -> npt.NDArray[Any]:
    with tempfile.TemporaryDirectory(prefix="zsq-") as folder:
        compiled = ort.compile(loadable(piece, Path(folder)), "optimized", threads=threads)
        values: list[npt.NDArray[Any]] = compiled.session.run(None, given)
    return values[0]
