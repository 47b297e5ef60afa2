"""Save models whole, with external data where protobuf cannot hold the weights."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

import onnx

from graph_tools import weights
from graph_tools.errors import ZsqError
from graph_tools.weights import (
    may_be_outside,
    refer,
    stored_bytes,
    take_inside,
    values_of,
)

__all__ = ["data_file", "loadable", "save"]

_ALIGNMENT = 4096  # of each tensor in external data, so that it can be mapped


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
