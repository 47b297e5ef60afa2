"""Find the first tensor at which two runs part."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from onnx import NodeProto

from graph_tools.quantized_graph import QuantizedGraph
from graph_tools.saving import loadable
from pipeline.verify.compilers import onnxruntime as ort
from pipeline.verify.cut import cut_at

__all__ = ["Parting", "first_difference"]


@dataclass(frozen=True, kw_only=True)
class Parting:
    """Where two runs part: a quantized tensor whose inputs still agree.

    Attributes:
        tensor: its name.
        op_type: the operator that makes it, "" if none does; ``node`` is its name.
    """

    tensor: str
    op_type: str
    node: str

    def __str__(self) -> str:
        made_by = f" (made by {self.op_type} {self.node})" if self.op_type else ""
        return f"tensor '{self.tensor}'{made_by}"


def first_difference(
    graph: QuantizedGraph, batch: npt.NDArray[np.float32], *, threads: int = 0
) -> Parting | None:
    """Name a tensor that differs between unoptimized and optimized run while its inputs agree.

    The model is cut at quantized tensors, from the outputs back, as long as something in front
    still differs.

    Args:
        graph: the whole model.
        batch: [N, ...] float32 images.
        threads: as in `ort.compile`.

    Returns:
        None when this batch shows no difference.
    """
    known: dict[str, bool] = {}

    def differs(integers: str) -> bool:
        if integers not in known:
            cut, ends = cut_at(graph, (integers,))
            with tempfile.TemporaryDirectory(prefix="zsq-") as folder:
                model = loadable(cut, Path(folder))
                first, second = (
                    ort.run(ort.compile(model, mode, threads=threads), batch)[ends[0].output]
                    for mode in ("unoptimized", "optimized")
                )
            known[integers] = not np.array_equal(first, second, equal_nan=True)
        return known[integers]

    worst: NodeProto | None = None
    candidates = [
        node for output in graph.outputs for node in graph.origin(output).dequantizers
    ]
    while (found := next((n for n in candidates if differs(n.input[0])), None)) is not None:
        worst = found
        quantizer = graph.quantizer_of(found)
        candidates = (
            [] if quantizer is None else [*graph.origin(quantizer.input[0]).dequantizers]
        )
    if worst is None:
        return None
    quantizer = graph.quantizer_of(worst)
    tensor = worst.input[0] if quantizer is None else quantizer.input[0]
    maker = graph.producers.get(tensor)
    return Parting(
        tensor=tensor,
        op_type=maker.op_type if maker is not None else "",
        node=maker.name if maker is not None else "",
    )
