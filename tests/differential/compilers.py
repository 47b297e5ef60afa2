"""Random graphs on a compiler: many in one file, since starting one takes longer than most graphs.

The graphs of a file share the image and nothing else, so each is compiled as it would be alone. A
file that differs, or that the compiler refuses, is halved until each graph that does stands alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import onnx
from onnx import helper, numpy_helper

from pipeline.target_profiles import Check
from pipeline.verify.agreement import measure_target
from pipeline.verify.compilers.engine import Engine
from pipeline.verify.reference import Reference, static_copy
from pipeline.verify.rows import TargetRow
from tests.differential.random_graphs import images_for

__all__ = ["is_refused", "merged", "not_exact"]


def is_refused(target: str, model: onnx.ModelProto) -> bool:
    """Whether a target is known to refuse it; each case has a test in pipeline/targets."""
    if target != "iree":
        return False
    constants = {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}
    for node in model.graph.node:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "ConvTranspose":
            pads = attributes.get("pads", [0] * 4)
            if pads[:2] != pads[2:]:
                return True
        pools = node.op_type in ("AveragePool", "MaxPool")
        if (pools or attributes.get("group", 1) > 1) and _leaves_rows_over(model, node):
            return True
        if node.op_type == "Pad" and attributes.get("mode") == b"reflect":
            if constants[node.input[1]].max() > 1:
                return True
    return False


def _leaves_rows_over(model: onnx.ModelProto, node: onnx.NodeProto) -> bool:
    """One window in height or width, behind which a stride reaches rows that none covers."""
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in onnx.shape_inference.infer_shapes(model).graph.value_info
    }
    weights = {entry.name: list(entry.dims) for entry in model.graph.initializer}
    makers = {name: maker for maker in model.graph.node for name in maker.output}
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if "kernel_shape" not in attributes:  # a convolution's is its weight's
        attributes["kernel_shape"] = weights[makers[node.input[1]].input[0]][2:]
    made = shapes[node.output[0]][2:]
    for axis, length in enumerate(shapes[node.input[0]][2:]):
        pads = attributes.get("pads", [0] * 4)
        padded = length + pads[axis] + pads[axis + 2]
        spread = attributes.get("dilations", [1, 1])[axis]
        reached = (attributes["kernel_shape"][axis] - 1) * spread + 1
        if made[axis] == 1 and padded > reached:
            return True
    return False


def merged(models: Iterable[onnx.ModelProto]) -> onnx.ModelProto:
    """One file of several, all of one input shape; names get the number of their graph."""
    whole = onnx.ModelProto()
    for index, model in enumerate(models):
        if not index:
            whole.CopyFrom(model)
            for kind in ("node", "initializer", "output", "value_info"):
                whole.graph.ClearField(kind)
        image = model.graph.input[0].name
        assert model.graph.input[0] == whole.graph.input[0]

        def named(name: str, image: str = image, index: int = index) -> str:
            return name if name in ("", image) else f"g{index}_{name}"

        for node in model.graph.node:
            copy = whole.graph.node.add()
            copy.CopyFrom(node)
            copy.name = named(node.name)
            for names in (copy.input, copy.output):
                names[:] = [named(name) for name in names]
        for kind in ("initializer", "output"):
            for entry in getattr(model.graph, kind):
                copy = getattr(whole.graph, kind).add()
                copy.CopyFrom(entry)
                copy.name = named(entry.name)
    return whole


def not_exact(
    engine: Engine, models: Mapping[int, onnx.ModelProto], check: Check
) -> Iterator[tuple[int, TargetRow]]:
    """Yield the graphs that a compiler refuses or computes otherwise, by their keys.

    Args:
        engine: the compiler.
        models: of one input shape and a batch of 1.
        check: what is known of it.
    """
    whole = static_copy(merged(models.values()), 1)
    images = images_for(next(iter(models.values())), count=3)[:, None]
    row = measure_target(
        engine, Reference.measure(whole, images), check, locate=len(models) == 1
    )
    if row.verdict == "exact":
        return
    if len(models) == 1:
        yield next(iter(models)), row
        return
    keys = list(models)
    for part in (keys[: len(keys) // 2], keys[len(keys) // 2 :]):
        yield from not_exact(engine, {key: models[key] for key in part}, check)
