"""Find the first tensor at which a compiler's integers part from the interpreter's.

First by one copy of the model with every dequantized tensor as an output. That may keep a compiler
from fusing what it fused before, and the difference with it: then by halving, with copies that are
cut at one tensor each.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx

from graph_tools.integer import FirstDifference, first_difference
from pipeline.verify.compilers.engine import Engine, Refusal
from pipeline.verify.cut import cut_at
from pipeline.verify.reference import Reference, dequantized, static_copy, zero_point

__all__ = ["trace"]

Integers = npt.NDArray[np.int64]


def trace(
    engine: Engine, reference: Reference, images: npt.NDArray[np.float32]
) -> FirstDifference | None:
    """Name the first tensor, in the graph's order, that differs.

    Args:
        engine: the compiler.
        reference: of the file.
        images: [runs, batch, ...], on which the outputs differ.

    Returns:
        None when the difference does not show in any copy.
    """
    graph = reference.graph
    readers = {node.input[0]: (node, scale) for node, scale in dequantized(graph)}
    runs = [reference.network.run(batch).integers for batch in images]
    order = [name for name in runs[0] if name in readers]
    expected = {name: np.stack([run[name] for run in runs]) for name in order}

    def part(names: Sequence[str], proto: onnx.ModelProto) -> FirstDifference | None:
        outputs = [value.name for value in proto.graph.output]
        try:
            values = engine.run(proto, images).outputs
            found = {}
            for index, name in enumerate(names):
                node, scale = readers[name]
                made = node.output[0]
                position = outputs.index(made) if made in outputs else index
                steps = values[position].astype(np.float64) / scale
                steps = np.nan_to_num(steps, posinf=2.0**31, neginf=-(2.0**31))
                integers = np.rint(steps).astype(np.int64) + zero_point(graph, node)
                found[name] = integers.reshape(expected[name].shape)
        except (Refusal, ValueError):  # this copy tells nothing
            return None
        return first_difference(graph, expected, found)

    found = part(order, _with_outputs(reference, order))
    if found is not None:
        return found

    def cut_part(name: str) -> FirstDifference | None:
        return part((name,), static_copy(cut_at(graph, (name,))[0], images.shape[1]))

    low, high = 0, len(order) - 1
    while low < high:
        middle = (low + high) // 2
        parting = cut_part(order[middle])
        if parting is None:
            low = middle + 1
        else:
            high, found = middle, parting
    return found or (cut_part(order[low]) if order else None)


def _with_outputs(reference: Reference, names: Sequence[str]) -> onnx.ModelProto:
    graph = reference.graph
    copy = onnx.ModelProto()
    copy.CopyFrom(graph.proto)
    types = {value.name: value for value in graph.proto.graph.value_info}
    made = {node.input[0]: node.output[0] for node, _ in dequantized(graph)}
    new = {made[name] for name in names} - set(graph.outputs)
    copy.graph.output.extend(types[made[name]] for name in names if made[name] in new)
    kept = [value for value in copy.graph.value_info if value.name not in new]
    del copy.graph.value_info[:]
    copy.graph.value_info.extend(kept)
    return copy
