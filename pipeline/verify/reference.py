"""What a file must give on some images, by the integer interpreter, and the models to ask for it.

Integers are compared where they end: at graph outputs that hold dequantized integers, and, where a
float tail follows, at the last integers in front of it, in a copy of the model that is cut there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx

from graph_tools.errors import VerificationError
from graph_tools.integer import IntegerNetwork
from graph_tools.quantized_graph import QuantizedGraph
from graph_tools.shapes import annotate
from pipeline.verify.cut import cut_at

__all__ = ["Piece", "Reference", "Wanted", "dequantized", "static_copy", "zero_point"]

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One output that is compared.

    Attributes:
        index: of the output in the piece.
        name: of the tensor in the file.
        scale: size of one step.
        steps: [runs, elements] int64, less the zero point: what the interpreter gives.
    """

    index: int
    name: str
    scale: float
    steps: Integers


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A model to run, and what is compared of it; nothing of a file that ends in float."""

    proto: onnx.ModelProto
    wanted: tuple[Wanted, ...]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What a file gives.

    Attributes:
        graph: of the static copy.
        network: the interpreter of it.
        images: [runs, batch, ...] float32.
        pieces: the whole file first.
        float_nodes: nodes in front of integers that the interpreter computes in float32.
    """

    graph: QuantizedGraph
    network: IntegerNetwork
    images: npt.NDArray[np.float32]
    pieces: tuple[Piece, ...]
    float_nodes: tuple[str, ...]

    @classmethod
    def measure(cls, proto: onnx.ModelProto, images: npt.NDArray[np.float32]) -> Reference:
        """Interpret a file.

        Args:
            proto: of a static batch (`static_copy`).
            images: [runs, batch, ...]

        Raises:
            ModelError, IntegerOverflowError: the interpreter cannot run it.
            VerificationError: no integers lead to any output.
        """
        network = IntegerNetwork(proto)
        graph = network.graph
        scales = {name: graph.output_scale(name) for name in graph.outputs}
        whole = {n: float(s) for n, s in scales.items() if s is not None}
        last = tuple(graph.last_integers())
        if not whole and not last:
            raise VerificationError("no integers lead to its outputs: nothing can be compared")
        readers = {node.input[0]: node for node in graph.dequantizers}
        found: dict[str, list[Integers]] = {name: [] for name in (*whole, *last)}
        float_nodes: tuple[str, ...] = ()
        for batch in images:
            run = network.run(batch)
            float_nodes = run.float_nodes
            for name, scale in whole.items():
                if name not in run.outputs:
                    raise VerificationError(
                        f"the interpreter has no integers for output '{name}'"
                    )
                steps = run.outputs[name].astype(np.float64) / scale
                found[name].append(np.rint(steps).astype(np.int64).reshape(-1))
            for name in last:
                middle = zero_point(graph, readers[name])
                found[name].append((run.integers[name] - middle).reshape(-1))
        pieces = [
            Piece(
                proto=proto,
                wanted=tuple(
                    Wanted(
                        index=graph.outputs.index(name),
                        name=name,
                        scale=scale,
                        steps=np.stack(found[name]),
                    )
                    for name, scale in whole.items()
                ),
            )
        ]
        if last:
            cut, ends = cut_at(graph, last)
            pieces.append(
                Piece(
                    proto=static_copy(cut, images.shape[1]),
                    wanted=tuple(
                        Wanted(
                            index=index,
                            name=end.tensor,
                            scale=end.scale,
                            steps=np.stack(found[end.integers]),
                        )
                        for index, end in enumerate(ends)
                        if end.scale is not None
                    ),
                )
            )
        return cls(
            graph=graph,
            network=network,
            images=images,
            pieces=tuple(pieces),
            float_nodes=float_nodes,
        )


def static_copy(proto: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """Copy a model for one batch size, the shapes of all tensors written into it."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    annotate(copy, batch=batch)
    return copy


def zero_point(graph: QuantizedGraph, node: onnx.NodeProto) -> int:
    """Return the zero point of a DequantizeLinear of an activation."""
    value = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    return 0 if value is None else int(value.reshape(-1)[0])


def dequantized(graph: QuantizedGraph) -> Iterator[tuple[onnx.NodeProto, float]]:
    """Yield the DequantizeLinear nodes of activations, one for each tensor, with their scales."""
    seen: set[str] = set()
    for node in graph.dequantizers:
        scale = graph.scale(node)
        if node.input[0] in seen or graph.is_weight(node) or scale is None or scale.size != 1:
            continue
        seen.add(node.input[0])
        yield node, float(scale.reshape(-1)[0])
