"""Load any exported ONNX network into one normal form, and save models whole.

The normal form: opset 21, IR 10, domain ai.onnx only, one float32 image input, no subgraphs
and no functions, constants folded and shape arithmetic resolved, Identity and Dropout gone,
every node named, every shape inferred. BatchNormalization stays. What `load` returns computes
what the file computes: it was run beside it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx

from graph_tools.errors import ModelError, UnsupportedOperatorError, ZsqError
from graph_tools.fixed_inputs import fix_inputs
from graph_tools.image_input import ImageInput, Layout
from graph_tools.integer_input import float_input
from graph_tools.integer_tail import find_integer_tail
from graph_tools.limits import within_memory
from graph_tools.normal_form import check_graph, normalize
from graph_tools.passes import name_nodes
from graph_tools.reading import read_proto
from graph_tools.saving import save
from graph_tools.shapes import annotate
from graph_tools.weights import move_out, values_of

__all__ = [
    "ImageInput",
    "Layout",
    "Model",
    "initializers",
    "load",
    "replace_proto",
    "save",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A network in normal form. Treat `proto` as read-only.

    Attributes:
        proto: the normal form.
        input: its one graph input.
        outputs: names of the graph outputs, as in the file.
        fixed_batch: the only batch size that the graph takes; None if it takes any.
        source: the file read.
        sha256: of the file read, in hex.
        notes: what `load` changed or assumed, for the user.
    """

    proto: onnx.ModelProto
    input: ImageInput
    outputs: tuple[str, ...]
    fixed_batch: int | None
    source: Path | None
    sha256: str
    notes: tuple[str, ...]


def load(
    path: str | os.PathLike[str],
    *,
    input_shape: tuple[int, ...] | None = None,
    layout: Layout | None = None,
    inputs: Mapping[str, np.ndarray] | None = None,
) -> Model:
    """Read an ONNX file into the normal form.

    Args:
        path: an .onnx file of opset 6 or newer, external data beside it.
        input_shape: four numbers, batch first, for inputs whose height, width or channels the
            file leaves free.
        layout: overrides the layout detected from the graph.
        inputs: arrays that inputs other than the image are fixed to, by name; see
            `graph_tools.fixed_inputs`.

    Returns:
        The model. It was run in onnxruntime on random images and gave what the file gives.

    Raises:
        ModelError: the file is damaged, not usable or already quantized.
        UnsupportedOperatorError: operators that ONNX does not define, all of them.
        DynamicShapeError: free dimensions and no `input_shape`.
        SettingsError: an `input_shape` that is not four positive numbers, or an array in
            `inputs` that does not fit.
    """
    original, sha256 = read_proto(path)
    where = str(path)
    fixed = fix_inputs(original, inputs or {}, where=where)
    integer = float_input(original)
    try:
        with within_memory(where):
            normal = normalize(original, where=where, input_shape=input_shape, layout=layout)
    except UnsupportedOperatorError as error:
        raise UnsupportedOperatorError(error.missing, where=where) from error
    except ZsqError as error:
        place = error.where if error.where.startswith(where) else f"{where}: {error.where}"
        raise type(error)(
            error.what, where=place.removesuffix(": "), hint=error.hint
        ) from error
    model = Model(
        proto=normal.proto,
        input=replace(normal.input, integer=bool(integer)),
        outputs=tuple(value.name for value in original.graph.output),
        fixed_batch=normal.fixed_batch,
        source=Path(path),
        sha256=sha256,
        notes=(
            *fixed,
            *([integer] if integer else []),
            *normal.notes,
            *_tail_notes(normal.proto),
        ),
    )
    logger.info("%s: %d nodes", where, len(model.proto.graph.node))
    return model


def _tail_notes(proto: onnx.ModelProto) -> tuple[str, ...]:
    tail = find_integer_tail(proto)
    return (tail.note(proto),) if tail.nodes else ()


def replace_proto(
    model: Model,
    proto: onnx.ModelProto,
    *,
    outputs: Sequence[str] | None = None,
    notes: Sequence[str] = (),
) -> Model:
    """Put another graph into a model; shapes are inferred anew, the graph is checked.

    Args:
        model: where all but the graph comes from.
        proto: the new graph, with the same image input. It is copied.
        outputs: names of the new graph outputs; any tensors. None keeps those of `proto`.
        notes: added to the model's.

    Raises:
        ModelError: an output does not exist, or the graph is not valid.
    """
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    graph = result.graph
    if outputs is not None:
        made = {name for node in graph.node for name in node.output}
        made |= {value.name for value in graph.input}
        if unknown := [name for name in outputs if name not in made]:
            raise ModelError(f"no tensor is named {', '.join(unknown)}")
        del graph.output[:]
        for name in outputs:
            graph.output.add(name=name)
    name_nodes(graph)
    move_out(result)
    annotate(result, batch=model.fixed_batch)
    check_graph(result)
    return replace(
        model,
        proto=result,
        outputs=tuple(value.name for value in graph.output),
        notes=(*model.notes, *notes),
    )


def initializers(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Return the weights and constants of the graph by name."""
    return {t.name: values_of(t) for t in proto.graph.initializer}
