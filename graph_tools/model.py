"""Load any exported ONNX network into one normal form, and save models whole.

The normal form: opset 21, IR 10, domain ai.onnx only, one float32 image input, no subgraphs
and no functions, constants folded and shape arithmetic resolved, Identity and Dropout gone,
every node named, every shape inferred. BatchNormalization stays. What `load` returns computes
what the file computes: it was run beside it.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from graph_tools import weights
from graph_tools.errors import ModelError, UnsupportedOperatorError, ZsqError
from graph_tools.image_input import ImageInput, Layout
from graph_tools.normal_form import check_graph, normalize
from graph_tools.passes import name_nodes
from graph_tools.reading import read_proto
from graph_tools.shapes import annotate
from graph_tools.weights import (
    may_be_outside,
    move_out,
    refer,
    stored_bytes,
    take_inside,
    values_of,
)

__all__ = [
    "ImageInput",
    "Layout",
    "Model",
    "data_file",
    "initializers",
    "load",
    "loadable",
    "replace_proto",
    "save",
]

logger = logging.getLogger(__name__)

_ALIGNMENT = 4096  # of each tensor in external data, so that it can be mapped


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
) -> Model:
    """Read an ONNX file into the normal form.

    Args:
        path: an .onnx file of opset 6 or newer, external data beside it.
        input_shape: four numbers, batch first, for inputs whose height, width or channels the
            file leaves free.
        layout: overrides the layout detected from the graph.

    Returns:
        The model. It was run in onnxruntime on random images and gave what the file gives.

    Raises:
        ModelError: the file is damaged, not usable or already quantized.
        UnsupportedOperatorError: operators that ONNX does not define, all of them.
        DynamicShapeError: free dimensions and no `input_shape`.
        SettingsError: an `input_shape` that is not four positive numbers.
    """
    original, sha256 = read_proto(path)
    where = str(path)
    try:
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
        input=normal.input,
        outputs=tuple(value.name for value in original.graph.output),
        fixed_batch=normal.fixed_batch,
        source=Path(path),
        sha256=sha256,
        notes=normal.notes,
    )
    logger.info("%s: %d nodes", where, len(model.proto.graph.node))
    return model


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


def data_file(path: str | os.PathLike[str]) -> Path:
    """Return where `save` puts the weights that do not fit into the file itself."""
    target = Path(path)
    return target.with_name(f"{target.name}.data")


def save(proto: onnx.ModelProto, path: str | os.PathLike[str]) -> None:
    """Write a model so that the file is either whole or untouched.

    More than `graph_tools.weights.MAX_INLINE` bytes of weights go to external data, in the file
    that `data_file` names.

    Raises:
        ZsqError: the folder is missing or not writable, or the disk is full.
    """
    target, data = Path(path), data_file(path)
    suffix = f".{secrets.token_hex(4)}.tmp"
    temporary = target.with_name(f".{target.name}{suffix}")
    temporary_data = target.with_name(f".{data.name}{suffix}")
    large = sum(stored_bytes(proto)) > weights.MAX_INLINE
    try:
        if large:
            proto = _with_external_data(proto, temporary_data, data.name)
        elif stored_bytes(proto)[1]:
            proto = _whole(proto)
        with temporary.open("xb") as file:
            file.write(proto.SerializeToString(deterministic=True))
        if large:
            os.replace(temporary_data, data)
        os.replace(temporary, target)
    except OSError as error:
        raise ZsqError(
            f"cannot be written: {error.strerror}",
            where=str(path),
            hint="give a path in an existing, writable folder",
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
            temporary_data.unlink(missing_ok=True)


def loadable(proto: onnx.ModelProto, folder: Path) -> bytes | Path:
    """Return what onnxruntime opens: the serialized model, or a file in `folder` if it is large.

    Raises:
        ZsqError: the disk is full.
    """
    if not stored_bytes(proto)[1]:
        return bytes(proto.SerializeToString())
    path = folder / "model.onnx"
    save(proto, path)
    return path


def _bare(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Copy a model without its initializers."""
    result = onnx.ModelProto()
    for field, value in proto.ListFields():
        if field.name != "graph":
            _copy_field(result, field.name, value)
    for field, value in proto.graph.ListFields():
        if field.name != "initializer":
            _copy_field(result.graph, field.name, value)
    return result


def _copy_field(message: Any, name: str, value: Any) -> None:
    if isinstance(value, int | str | bytes):
        setattr(message, name, value)
    else:
        getattr(message, name).MergeFrom(value)


def _whole(proto: onnx.ModelProto) -> onnx.ModelProto:
    result = _bare(proto)
    result.graph.initializer.extend(take_inside(t) for t in proto.graph.initializer)
    return result


def _with_external_data(proto: onnx.ModelProto, path: Path, name: str) -> onnx.ModelProto:
    """Write the large weights to `path`; return a copy that looks for them in file `name`."""
    result = _bare(proto)
    with path.open("xb") as file:
        for tensor in proto.graph.initializer:
            entry = result.graph.initializer.add()
            values = values_of(tensor)
            if not may_be_outside(tensor, values.nbytes):
                entry.CopyFrom(tensor)
                continue
            file.seek(-(-file.tell() // _ALIGNMENT) * _ALIGNMENT)
            offset = file.tell()
            values.tofile(file)
            entry.name, entry.data_type = tensor.name, tensor.data_type
            entry.dims.extend(tensor.dims)
            refer(entry, Path(name), offset=offset, length=values.nbytes)
            entry.external_data[0].value = name
    return result
