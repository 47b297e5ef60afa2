"""ONNX element types and arrays as torch types and tensors."""

from __future__ import annotations

import numpy as np
import onnx
import torch

from graph_tools.errors import ModelError

__all__ = ["FLOAT8_TYPES", "INTEGER_RANGES", "to_tensor", "torch_type"]

_T = onnx.TensorProto

_TORCH_TYPES: dict[int, torch.dtype] = {
    _T.FLOAT: torch.float32,
    _T.DOUBLE: torch.float64,
    _T.FLOAT16: torch.float16,
    _T.BFLOAT16: torch.bfloat16,
    _T.BOOL: torch.bool,
    _T.INT8: torch.int8,
    _T.INT16: torch.int16,
    _T.INT32: torch.int32,
    _T.INT64: torch.int64,
    _T.UINT8: torch.uint8,
    _T.UINT16: torch.uint16,
    _T.UINT32: torch.uint32,
    _T.UINT64: torch.uint64,
    # Narrow integers have no torch type: their values are kept in bytes.
    _T.INT4: torch.int8,
    _T.INT2: torch.int8,
    _T.UINT4: torch.uint8,
    _T.UINT2: torch.uint8,
    _T.FLOAT8E4M3FN: torch.float8_e4m3fn,
    _T.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    _T.FLOAT8E5M2: torch.float8_e5m2,
    _T.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
}

FLOAT8_TYPES = frozenset(
    {
        torch.float8_e4m3fn,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2,
        torch.float8_e5m2fnuz,
    }
)

INTEGER_RANGES: dict[int, tuple[int, int]] = {
    _T.INT2: (-2, 1),
    _T.UINT2: (0, 3),
    _T.INT4: (-8, 7),
    _T.UINT4: (0, 15),
    _T.INT8: (-128, 127),
    _T.UINT8: (0, 255),
    _T.INT16: (-32768, 32767),
    _T.UINT16: (0, 65535),
}

# numpy knows these types only as extensions; torch takes their bits under another name.
_SAME_BITS: dict[str, tuple[type[np.generic], torch.dtype]] = {
    "bfloat16": (np.int16, torch.bfloat16),
    "float8_e4m3fn": (np.uint8, torch.float8_e4m3fn),
    "float8_e4m3fnuz": (np.uint8, torch.float8_e4m3fnuz),
    "float8_e5m2": (np.uint8, torch.float8_e5m2),
    "float8_e5m2fnuz": (np.uint8, torch.float8_e5m2fnuz),
}
_IN_BYTES = {"int4": np.int8, "int2": np.int8, "uint4": np.uint8, "uint2": np.uint8}


def torch_type(element_type: int) -> torch.dtype:
    """Return the torch type of an ``onnx.TensorProto`` element type.

    Raises:
        ModelError: torch has no such type.
    """
    if element_type not in _TORCH_TYPES:
        known = element_type in _T.DataType.values()
        name = _T.DataType.Name(_T.DataType.ValueType(element_type)) if known else element_type
        raise ModelError(f"element type {name} is not supported")
    return _TORCH_TYPES[element_type]


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """Copy an array to a CPU tensor; 2- and 4-bit integers become bytes.

    Raises:
        ModelError: torch has no such type (strings, for example).
    """
    name = array.dtype.name
    array = np.ascontiguousarray(array).reshape(array.shape)  # the former makes scalars 1-D
    if name in _SAME_BITS:
        bits, target = _SAME_BITS[name]
        return torch.from_numpy(array.view(bits).copy()).view(target)
    if name in _IN_BYTES:
        return torch.from_numpy(array.astype(_IN_BYTES[name]))
    try:
        return torch.from_numpy(array.copy())
    except TypeError as error:
        raise ModelError(f"element type {name} is not supported") from error
