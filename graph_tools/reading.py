"""Read an ONNX file whole, or say in one line why it cannot be read.

Nothing outside the folder of the file is opened, and no external data before its location,
offset and length were checked.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import onnx
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from graph_tools import weights
from graph_tools.errors import ModelError
from graph_tools.walk import all_graphs, all_nodes, all_tensors

__all__ = ["MAX_BYTES", "check_weights", "num_bytes", "read_outline", "read_proto"]

MAX_BYTES = 2**31 - 1
"""The most bytes that protobuf reads or writes as one message."""

_FLOATS = frozenset(
    {
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.FLOAT16,
        onnx.TensorProto.DOUBLE,
        onnx.TensorProto.BFLOAT16,
    }
)
_TAKES_INFINITY = frozenset(
    "Cast CastLike Clip ConstantOfShape Equal Expand Greater GreaterOrEqual Identity Less "
    "LessOrEqual Max Min Pad Where".split()
)


def read_proto(path: str | os.PathLike[str]) -> tuple[onnx.ModelProto, str]:
    """Read a model with its external data.

    Args:
        path: an .onnx file.

    Returns:
        The model and the sha256 of the file in hex. All weights are inside, unless there are
        more than `graph_tools.weights.MAX_INLINE` bytes: then the large ones stay in the files
        of external data (`graph_tools.weights.values_of` maps them).

    Raises:
        ModelError: the file is missing, empty, truncated, not ONNX or itself larger than
            `MAX_BYTES`, or its external data is missing, too short or outside its folder.
    """
    proto, data = _parse(Path(path))
    _load_external_data(proto, Path(path))
    return proto, hashlib.sha256(data).hexdigest()


def read_outline(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """Read a model as `read_proto` does, but leave external data where they are.

    Raises:
        ModelError: see `read_proto`; the places of external data are checked.
    """
    file = Path(path)
    proto, _ = _parse(file)
    for name, tensor in all_tensors(proto):
        if uses_external_data(tensor):
            _check_external(name, tensor, file)
    return proto


def _parse(file: Path) -> tuple[onnx.ModelProto, bytes]:
    where = str(file)
    data = _read_bytes(file)
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except Exception as error:  # DecodeError, from a package without types
        raise ModelError(
            "not an ONNX file, or truncated", where=where, hint="export or download it again"
        ) from error
    if not proto.ir_version or not (proto.graph.node or proto.graph.output):
        raise ModelError("not an ONNX file, or truncated: no graph in it", where=where)
    if not all(isinstance(text, str) for text in _texts(proto)):
        raise ModelError(
            "damaged: a name in it is not text",
            where=where,
            hint="export or download it again",
        )
    return proto, data


def _read_bytes(file: Path) -> bytes:
    """Return the content of a file that may be a model."""
    where = str(file)
    if file.is_dir():
        raise ModelError("is a folder", where=where, hint="give the .onnx file")
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe or a device may never end
            raise ModelError("is not a regular file", where=where, hint="give the .onnx file")
        if status.st_size > MAX_BYTES:
            raise ModelError(
                "larger than 2 GiB, the limit of ONNX files",
                where=where,
                hint="export with external data",
            )
        data = file.read_bytes()
    except FileNotFoundError as error:
        raise ModelError("no such file", where=where) from error
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", where=where) from error
    if not data:
        raise ModelError("the file is empty", where=where, hint="export or download it again")
    if data.startswith(b"version https://git-lfs"):
        raise ModelError("is a Git LFS pointer", where=where, hint="run `git lfs pull`")
    return data


def num_bytes(path: str | os.PathLike[str]) -> int:
    """Return the size of a model that `read_proto` takes, external data included."""
    file = Path(path)
    proto = onnx.load(file, load_external_data=False)
    external = {
        file.parent / entry.value
        for _, tensor in all_tensors(proto)
        if uses_external_data(tensor)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return sum(part.stat().st_size for part in (file, *sorted(external)))


def _texts(proto: onnx.ModelProto) -> Iterator[object]:
    """Yield all names; protobuf gives bytes for those that are not UTF-8."""
    for opset in proto.opset_import:
        yield opset.domain
    for entry in proto.metadata_props:
        yield from (entry.key, entry.value)
    for _, tensor in all_tensors(proto):
        yield tensor.name
        for entry in tensor.external_data:
            yield from (entry.key, entry.value)
    for function in proto.functions:
        yield from (function.name, function.domain, *function.input, *function.output)
    for graph in all_graphs(proto):
        yield graph.name
        for value in (*graph.input, *graph.output, *graph.value_info):
            yield value.name
            for dim in value.type.tensor_type.shape.dim:
                yield dim.dim_param
    for node in all_nodes(proto):
        yield from (node.op_type, node.name, node.domain, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)


def _load_external_data(proto: onnx.ModelProto, file: Path) -> None:
    tensors = [(name, tensor) for name, tensor in all_tensors(proto)]
    external = [(name, tensor) for name, tensor in tensors if uses_external_data(tensor)]
    places = [_check_external(name, tensor, file) for name, tensor in external]
    main = {id(tensor) for tensor in proto.graph.initializer}
    inside = proto.ByteSize()
    large = inside + sum(length for _, _, length in places) > weights.MAX_INLINE
    for (name, tensor), (path, offset, length) in zip(external, places, strict=True):
        if large and id(tensor) in main and weights.may_be_outside(tensor, length):
            weights.refer(tensor, path, offset=offset, length=length)
            continue
        inside += length
        if inside > MAX_BYTES:  # many tensors may name the same part of a file
            raise ModelError(
                f"external data that cannot stay outside exceeds 2 GiB at tensor '{name}'",
                where=str(file),
                hint="export constants as initializers",
            )
        try:
            load_external_data_for_tensor(tensor, str(file.parent))
        except Exception as error:
            raise ModelError(
                f"external data of tensor '{name}' cannot be read: {error}", where=str(file)
            ) from error
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]


def _check_external(name: str, tensor: onnx.TensorProto, file: Path) -> tuple[Path, int, int]:
    """Return file, offset and length in bytes that `tensor` reads, or raise ModelError."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    what = f"external data '{location}' of tensor '{name}'"

    def fault(text: str, hint: str = "") -> ModelError:
        return ModelError(f"{what} {text}", where=str(file), hint=hint)

    pure = PurePosixPath(location)
    if (
        not location
        or pure.is_absolute()
        or ".." in pure.parts
        or PureWindowsPath(location).drive
        or "\\" in location
        or "\0" in location
    ):
        raise fault("lies outside the model's folder", "keep it beside the .onnx file")
    folder = file.parent.resolve()
    target = file.parent / location
    try:
        inside, found = target.resolve().is_relative_to(folder), target.is_file()
    except (OSError, RuntimeError) as error:  # a name too long, links in a circle
        raise fault("cannot be found", "keep it beside the .onnx file") from error
    if not inside:
        raise fault("is a link that leaves the model's folder", "copy the data there")
    if not found:
        raise fault("is missing", "keep it beside the .onnx file")
    try:
        offset = int(entries.get("offset") or 0)
        size = target.stat().st_size
        length = int(entries.get("length") or size - offset)
    except ValueError as error:
        raise fault("has a malformed offset or length") from error
    if offset < 0 or length < 0 or offset + length > size:
        raise fault(f"ends early ({size} bytes, {offset + length} needed)", "is it truncated?")
    return target, offset, length


def check_weights(proto: onnx.ModelProto, *, where: str) -> None:
    """Refuse tensors whose data does not fit their shape, NaN, and infinite weights.

    Infinity is accepted where it is a bound or a mask (Clip, Pad, Where and the like).

    Args:
        proto: any model, its weights inside.
        where: the file, for the message.

    Raises:
        ModelError: naming the tensor.
    """
    users: dict[str, set[str]] = defaultdict(set)
    for node in all_nodes(proto):
        if node.op_type == "Constant" and node.output:
            continue
        for name in node.input:
            users[name].add(node.op_type)
        if node.op_type == "ConstantOfShape":
            users[node.output[0]].add(node.op_type)
    for name, tensor in all_tensors(proto):
        try:
            values = weights.values_of(tensor)
        except Exception as error:
            raise ModelError(
                f"tensor '{name}' is malformed: its data does not fit its shape "
                f"{_shape(tensor.dims)}",
                where=where,
                hint="the file is damaged; export it again",
            ) from error
        if tensor.data_type in _FLOATS:
            _check_finite(name, values, users[name], where)


def _check_finite(name: str, values: np.ndarray, users: set[str], where: str) -> None:
    flat = values.reshape(-1)
    num_nan = num_inf = 0
    for start in range(0, flat.size, _CHUNK):  # copies of large weights would not fit
        part = flat[start : start + _CHUNK]
        num_nan += int(np.isnan(part).sum())
        num_inf += int(np.isinf(part).sum())
    if not num_nan and not num_inf:
        return
    if num_nan:
        raise ModelError(f"tensor '{name}' holds {num_nan} NaN", where=where, hint=_RETRAIN)
    if not users <= _TAKES_INFINITY:
        raise ModelError(
            f"tensor '{name}' holds {num_inf} infinite values", where=where, hint=_RETRAIN
        )


_CHUNK = 2**22
_RETRAIN = "the checkpoint is damaged; export a sound one"


def _shape(dims: Iterable[int]) -> str:
    return "x".join(str(dim) for dim in dims) or "scalar"
