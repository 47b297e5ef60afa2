"""Make graph inputs other than the image constant, with values that the user gives.

An input whose first dimension is the batch, and whose array has one row, is that row for every
image; all other arrays stand as they are. Folding does the rest.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from tokenize import TokenError

import numpy as np
import onnx
from onnx import TensorProto, helper

from graph_tools.errors import SettingsError
from graph_tools.weights import tensor_of

__all__ = ["NPY_FAULTS", "fix_inputs", "read_input"]

NPY_FAULTS = (
    *(OSError, ValueError, EOFError, OverflowError),
    *(MemoryError, RecursionError, SyntaxError, TokenError),  # headers of nested nonsense
)
"""What numpy raises on a file that is not what it claims to be."""

_OPTION = "--input"


def read_input(path: str | os.PathLike[str]) -> np.ndarray:
    """Read one array from an .npy file; pickled objects are never unpickled.

    Raises:
        SettingsError: no such file, or not an array of numbers.
    """
    where = f"{_OPTION} {path}"
    try:
        array = np.load(Path(path), mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise SettingsError("no such file", where=where) from error
    except NPY_FAULTS as error:
        raise SettingsError(
            "is not an .npy file of numbers", where=where, hint="write it with numpy.save"
        ) from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        raise SettingsError(
            "is not an .npy file of numbers", where=where, hint="write it with numpy.save"
        )
    return np.array(array)


def fix_inputs(
    proto: onnx.ModelProto, arrays: Mapping[str, np.ndarray], *, where: str
) -> tuple[str, ...]:
    """Turn inputs into constants, in place.

    Args:
        proto: as read.
        arrays: by input name, of the input's rank, its known dimensions and its kind of type.
        where: the file, for messages.

    Returns:
        Notes for the user.

    Raises:
        SettingsError: an unknown name, an array that does not fit, NaN, or no input left.
    """
    graph = proto.graph
    constant = {tensor.name for tensor in graph.initializer}
    inputs = {value.name: value for value in graph.input if value.name not in constant}
    if unknown := [name for name in arrays if name not in inputs]:
        raise SettingsError(
            f"{where} has no input '{unknown[0]}'",
            where=_OPTION,
            hint=f"its inputs are {', '.join(inputs) or 'none'}",
        )
    if arrays and len(arrays) == len(inputs):
        raise SettingsError(
            "all inputs are given, none is left for the image",
            where=_OPTION,
            hint="leave out the image",
        )
    if not arrays:
        return ()
    left = [value for name, value in inputs.items() if name not in arrays]
    batch = _image_batch(left)
    nodes = []
    for name, array in arrays.items():
        value = inputs[name]
        fitted = _fitted(value, array)
        stored = name
        if _follows_batch(value, fitted, batch):
            stored = f"{name}/row"
            nodes += _repeat(name, stored, fitted, left[0].name)
        graph.initializer.append(tensor_of(fitted, stored, outside=False))
    if nodes:
        _allow_expand(proto)
    kept = [value for value in graph.input if value.name not in arrays]
    ordered = [*nodes, *graph.node]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in ordered]
    del graph.node[:]
    graph.node.extend(copies)
    del graph.input[:]
    graph.input.extend(kept)
    shapes = ", ".join(f"{name} [{_numbers(a.shape)}]" for name, a in arrays.items())
    return (f"input(s) fixed to the arrays given: {shapes}",)


def _image_batch(left: list[onnx.ValueInfoProto]) -> onnx.TensorShapeProto.Dimension | None:
    dims = left[0].type.tensor_type.shape.dim if len(left) == 1 else []
    return dims[0] if dims else None


def _fitted(value: onnx.ValueInfoProto, array: np.ndarray) -> np.ndarray:
    """Return `array` in the element type of the input, or raise SettingsError."""
    tensor = value.type.tensor_type
    where = f"{_OPTION} {value.name}"
    if value.type.WhichOneof("value") != "tensor_type":
        raise SettingsError("is no tensor in the file", where=where)
    wanted = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    name = TensorProto.DataType.Name(tensor.elem_type).lower()
    same_kind = "f" if name in ("float", "float16", "double", "bfloat16") else wanted.kind
    if array.dtype.kind != same_kind and not (array.dtype.kind in "iu" and same_kind in "iu"):
        raise SettingsError(
            f"the array is {array.dtype}, the input {name}", where=where, hint="convert it"
        )
    if array.dtype.kind == "f" and np.isnan(array).any():
        raise SettingsError(f"the array holds {int(np.isnan(array).sum())} NaN", where=where)
    if tensor.HasField("shape"):
        sizes = [int(dim.dim_value) or None for dim in tensor.shape.dim]
        if len(sizes) != array.ndim or any(
            size is not None and size != given
            for size, given in zip(sizes, array.shape, strict=True)
        ):
            declared = ",".join(
                str(d.dim_value or d.dim_param or "?") for d in tensor.shape.dim
            )
            raise SettingsError(
                f"the array is [{_numbers(array.shape)}], the input [{declared}]", where=where
            )
    with np.errstate(over="ignore"):
        converted = array.astype(wanted)
    if wanted.kind in "iu" and not np.array_equal(converted, array):
        raise SettingsError(f"the array does not fit in {name}", where=where)
    return converted


def _follows_batch(
    value: onnx.ValueInfoProto,
    array: np.ndarray,
    batch: onnx.TensorShapeProto.Dimension | None,
) -> bool:
    """Whether the one row of `array` is meant for each image."""
    dims = value.type.tensor_type.shape.dim
    if batch is None or not dims or dims[0].dim_value or batch.dim_value:
        return False
    return bool(array.shape[0] == 1 and dims[0].dim_param == batch.dim_param)


def _repeat(name: str, row: str, array: np.ndarray, image: str) -> list[onnx.NodeProto]:
    """Return nodes that repeat `row` for each image of the input `image`."""

    def constant(part: str, values: list[int]) -> onnx.NodeProto:
        tensor = helper.make_tensor(part, TensorProto.INT64, [len(values)], values)
        return helper.make_node("Constant", [], [f"{name}/{part}"], value=tensor)

    return [
        constant("first", [0]),
        constant("rest", list(array.shape[1:])),
        helper.make_node("Shape", [image], [f"{name}/sizes"]),
        helper.make_node("Gather", [f"{name}/sizes", f"{name}/first"], [f"{name}/batch"]),
        helper.make_node(
            "Concat", [f"{name}/batch", f"{name}/rest"], [f"{name}/shape"], axis=0
        ),
        helper.make_node("Expand", [row, f"{name}/shape"], [name], f"{name}/repeat"),
    ]


def _allow_expand(proto: onnx.ModelProto) -> None:
    """Raise opset 7 to the first with Expand; in between operators only gained uses."""
    for opset in proto.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version == 7:
            opset.version = 8


def _numbers(shape: tuple[int, ...]) -> str:
    return ",".join(map(str, shape))
