"""Rockchip's RKNN toolkit: the rk3588's NPU, in the toolkit's simulator."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

__all__ = ["compile", "integer_kernels", "run", "version"]


def version() -> str:
    """Return the toolkit's version."""
    from importlib.metadata import version as installed

    return installed("rknn-toolkit2")


def compile(model: str, folder: str) -> Any:
    """Build an ONNX file for the rk3588, and start the simulator."""
    from rknn.api import RKNN

    toolkit = RKNN(verbose=False)
    # At level 3, the default, sums are fused with convolutions and rounded once.
    configured = toolkit.config(target_platform="rk3588", optimization_level=2)
    _check(configured, "config", folder)
    _check(toolkit.load_onnx(model=model), "load_onnx", folder)
    _check(toolkit.build(do_quantization=False), "build", folder)
    _check(toolkit.init_runtime(), "init_runtime", folder)
    return toolkit


def run(compiled: Any, batch: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    """Run one batch, in the graph's own layout."""
    layout = {"data_format": "nchw"} if batch.ndim == 4 else {}
    values = compiled.inference(inputs=[batch], **layout)
    if values is None:
        raise RuntimeError("the simulator gives nothing")
    return [np.asarray(value) for value in values]


def integer_kernels(compiled: Any) -> None:
    """The simulator does not say."""
    return None


def _check(code: int, step: str, folder: str) -> None:
    if code == 0:
        return
    with open(os.path.join(folder, "log.txt"), errors="replace") as log:
        errors = [line[2:].strip() for line in log if line.startswith("E ")]
    said = next((line for line in errors if line and "Traceback" not in line), "")
    raise RuntimeError(f"{step} failed{': ' if said else ''}{said}")
