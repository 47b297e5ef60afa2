"""Weights that do not fit into protobuf messages stay in files and are mapped into memory.

A message holds at most 2 GiB, and every copy of a model would copy its weights. Once the weights
of a model exceed `MAX_INLINE`, tensors above `SMALL` are *outside*: their TensorProto names an
absolute path, an offset and a length, and `values_of` maps that part of the file. Such a model
is copied, inferred and checked like any other; only `outline` must come before what reads the
values through protobuf. Values computed on the way go into a folder of their own, which is
removed when the process ends.
"""

from __future__ import annotations

import atexit
import functools
import math
import mmap
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper, numpy_helper
from onnx_graphsurgeon.ir.tensor import LazyValues

from graph_tools.errors import ZsqError

__all__ = [
    "MAX_INLINE",
    "SMALL",
    "export_graph",
    "import_graph",
    "is_outside",
    "move_out",
    "outside_tensor",
    "refer",
    "stored_bytes",
    "take_inside",
    "tensor_of",
    "values_of",
]

MAX_INLINE = 2**30
"""The most bytes of weights that a model holds inside, half of what protobuf can."""

SMALL = 2**16
"""Tensors of fewer bytes stay inside in any case: shapes and bounds are among them."""

_PACKED = frozenset(  # several elements in a byte, or none of a fixed size
    {
        TensorProto.STRING,
        TensorProto.INT4,
        TensorProto.UINT4,
        TensorProto.FLOAT4E2M1,
        TensorProto.INT2,
        TensorProto.UINT2,
    }
)


def is_outside(tensor: onnx.TensorProto) -> bool:
    """Whether the values of `tensor` lie in a file."""
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def refer(tensor: onnx.TensorProto, path: Path, *, offset: int, length: int) -> None:
    """Let `tensor` name a part of a file as its values, in place.

    Args:
        tensor: with type and shape.
        path: of the file.
        offset: of the first byte.
        length: in bytes.
    """
    for field in ("raw_data", "float_data", "int32_data", "int64_data", "double_data"):
        tensor.ClearField(field)
    del tensor.external_data[:]
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (
        ("location", str(path.resolve())),
        ("offset", str(offset)),
        ("length", str(length)),
    ):
        tensor.external_data.add(key=key, value=value)


def may_be_outside(tensor: onnx.TensorProto, length: int) -> bool:
    """Whether a tensor of `length` bytes can and should be mapped rather than held."""
    return length >= SMALL and tensor.data_type not in _PACKED


def values_of(tensor: onnx.TensorProto) -> np.ndarray[Any, Any]:
    """Return the values of a tensor, wherever they lie.

    Values outside are mapped, not read: pages come in as they are used. Each file is mapped
    once, whoever uses it, or the memory of the process would seem to hold it several times.
    The array is not for writing.

    Raises:
        ValueError: the data does not fit the shape.
        OSError: the file is gone.
    """
    if not is_outside(tensor):
        return np.asarray(numpy_helper.to_array(tensor))
    path, offset, length = _place(tensor)
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
    shape = tuple(tensor.dims)
    count = math.prod(shape)
    if count * dtype.itemsize != length:
        raise ValueError(f"{length} bytes are no {dtype} of shape {shape}")
    values = np.frombuffer(_mapped(path), dtype, count, offset).reshape(shape)
    values.flags.writeable = False
    return values


_mappings: WeakValueDictionary[tuple[Path, int, int], mmap.mmap] = WeakValueDictionary()


def _mapped(path: Path) -> mmap.mmap:
    """Map a file, private to this process."""
    status = path.stat()
    key = (path, status.st_ino, status.st_mtime_ns)
    mapping = _mappings.get(key)
    if mapping is None:
        with path.open("rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        _mappings[key] = mapping
    return mapping


def _place(tensor: onnx.TensorProto) -> tuple[Path, int, int]:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return Path(entries["location"]), int(entries["offset"]), int(entries["length"])


def stored_bytes(proto: onnx.ModelProto) -> tuple[int, int]:
    """Return the bytes of the main graph's weights (inside, outside)."""
    inside = outside = 0
    for tensor in proto.graph.initializer:
        if is_outside(tensor):
            outside += _place(tensor)[2]
        else:
            inside += tensor.ByteSize()
    return inside, outside


def outside_tensor(values: np.ndarray[Any, Any], name: str) -> onnx.TensorProto:
    """Write values to a file of their own and return the tensor that names it.

    Raises:
        ZsqError: the disk is full.
    """
    values = np.ascontiguousarray(values).reshape(values.shape)
    tensor = TensorProto(
        name=name, data_type=helper.np_dtype_to_tensor_dtype(values.dtype), dims=values.shape
    )
    try:
        handle, path = tempfile.mkstemp(dir=_folder())
        with os.fdopen(handle, "wb") as file:
            values.tofile(file)
    except OSError as error:
        raise ZsqError(
            f"weights cannot be written: {error.strerror or error}",
            where=tempfile.gettempdir(),
            hint="large models need free space there; set TMPDIR to another folder",
        ) from error
    refer(tensor, Path(path), offset=0, length=values.nbytes)
    return tensor


def tensor_of(values: np.ndarray[Any, Any], name: str, *, outside: bool) -> onnx.TensorProto:
    """Return values as a tensor, written to a file if `outside` and they are large.

    Raises:
        ZsqError: the disk is full.
    """
    packed = values.dtype in (ml_dtypes.int4, ml_dtypes.uint4)  # half of what numpy holds
    if outside and values.nbytes >= SMALL and not packed:
        return outside_tensor(values, name)
    return numpy_helper.from_array(values, name)


@functools.cache
def _folder() -> str:
    folder = tempfile.mkdtemp(prefix="zsq-weights-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def move_out(proto: onnx.ModelProto) -> None:
    """Write the weights inside to files if they and those outside exceed `MAX_INLINE`, in place.

    Raises:
        ZsqError: the disk is full.
    """
    if sum(stored_bytes(proto)) <= MAX_INLINE:
        return
    for tensor in proto.graph.initializer:
        if not is_outside(tensor) and may_be_outside(tensor, tensor.ByteSize()):
            tensor.CopyFrom(outside_tensor(values_of(tensor), tensor.name))


def take_inside(tensor: onnx.TensorProto) -> onnx.TensorProto:
    """Return `tensor` with its values in it."""
    if not is_outside(tensor):
        return tensor
    return numpy_helper.from_array(values_of(tensor), tensor.name)


class _Mapped(LazyValues):  # type: ignore[misc]
    """Values that onnx-graphsurgeon passes on untouched unless somebody asks for them."""

    def load(self) -> np.ndarray[Any, Any]:
        """Map them."""
        return values_of(self.tensor)


def import_graph(proto: onnx.ModelProto) -> gs.Graph:
    """Import a model into onnx-graphsurgeon; weights outside stay there until they are read."""
    graph = gs.import_onnx(proto)
    outside = {t.name: t for t in proto.graph.initializer if is_outside(t)}
    for name, tensor in graph.tensors().items() if outside else ():
        if name in outside:
            tensor._values = _Mapped(outside[name])
            tensor.data_location = None  # once they are read they go inside
    return graph


def export_graph(graph: gs.Graph, origin: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model of a graph that `import_graph` made of ``origin``; its IR version stays."""
    proto: onnx.ModelProto = gs.export_onnx(graph, do_type_check=False)
    proto.ir_version = origin.ir_version
    return proto
