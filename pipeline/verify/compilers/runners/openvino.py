"""OpenVINO on the CPU."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

__all__ = ["compile", "integer_kernels", "run", "version"]

_WEIGHTED = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")


def version() -> str:
    """Return OpenVINO's version."""
    import openvino

    return str(openvino.__version__).split("-")[0]


def compile(model: str, folder: str) -> Any:
    """Compile an ONNX file for as few threads as OMP_NUM_THREADS says."""
    import openvino

    core = openvino.Core()
    settings = {"CACHE_DIR": "", "INFERENCE_PRECISION_HINT": "f32"}
    if threads := os.environ.get("OMP_NUM_THREADS"):
        settings["INFERENCE_NUM_THREADS"] = threads
    return core.compile_model(core.read_model(model), "CPU", settings)


def run(compiled: Any, batch: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    """Run one batch."""
    values = compiled([batch])
    return [np.asarray(values[output]) for output in compiled.outputs]


def integer_kernels(compiled: Any) -> tuple[int, int]:
    """Count weighted operators, by the precision that the runtime model states."""
    kinds = []
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        if "layerType" in info and str(info["layerType"].astype(str)) in _WEIGHTED:
            kinds.append(str(info["runtimePrecision"].astype(str)))
    return sum(kind in ("i8", "u8") for kind in kinds), len(kinds)
