"""The file and the images of a proof: read, checked, in batches of the file's size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from graph_tools.errors import DataError, ModelError, VerificationError
from graph_tools.quantized_graph import QuantizedGraph
from graph_tools.reading import check_weights, read_proto
from pipeline.images import ImageSet

__all__ = ["filled", "read_file", "require_fit", "require_quantized"]


def read_file(path: Path) -> onnx.ModelProto:
    """Read an ONNX file.

    Raises:
        VerificationError: it is none, or it is empty.
    """
    try:
        proto, _ = read_proto(path)
        check_weights(proto, where=str(path))
    except ModelError as error:
        raise VerificationError(error.what, where=error.where, hint=error.hint) from error
    if not proto.graph.node:
        raise VerificationError("not an ONNX model, or an empty one", where=str(path))
    return proto


def require_quantized(graph: QuantizedGraph, path: Path) -> None:
    """Raise a VerificationError unless a file is quantized and has one input."""
    if not graph.quantizers or not graph.dequantizers:
        raise VerificationError(
            "is not quantized: it has no QuantizeLinear/DequantizeLinear pairs",
            where=str(path),
            hint="run `zsq quantize` on it first",
        )
    if len(graph.inputs) != 1:
        raise VerificationError(
            f"has {len(graph.inputs)} inputs, only one can be an image", where=str(path)
        )


def require_fit(graph: QuantizedGraph, images: ImageSet, path: Path) -> None:
    """Raise a DataError unless the images have the shape of a file's input."""
    entry = graph.inputs[0]
    dims = [dim.dim_value or None for dim in entry.type.tensor_type.shape.dim]
    fits = len(dims) == 4 and all(
        want is None or want == got for want, got in zip(dims[1:], images.shape, strict=True)
    )
    if not fits:
        wanted = "x".join("?" if dim is None else str(dim) for dim in dims[1:])
        raise DataError(
            f"images of {'x'.join(map(str, images.shape))} do not fit the input "
            f"'{entry.name}' of {path.name}, which takes {wanted}",
            where=str(images.path),
        )


def filled(batch: npt.NDArray[np.float32], size: int | None) -> npt.NDArray[np.float32]:
    """Fill a batch with its last image up to the size that a file has; None: any size."""
    if size is None or len(batch) >= size:
        return batch
    return np.concatenate([batch, np.repeat(batch[-1:], size - len(batch), axis=0)])
