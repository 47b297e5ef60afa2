"""The product: generate images, quantize, verify, evaluate and report.

Five calls do the work, and one does all of it::

    import pipeline

    model = pipeline.load("model.onnx")
    made = pipeline.generate_images(model, "images.npz")
    quantized = pipeline.quantize_model(model, made.images)
    pipeline.write_qdq(quantized, "model.w8a8.onnx")
    proof = pipeline.verify_model("model.w8a8.onnx", made.images)

    result = pipeline.quantize_file(pipeline.QuantizeJob(model=..., output=...))

What a name stands for is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graph_tools.errors import ZsqError
    from pipeline.api import generate_images, load, quantize_model, verify_model, write_qdq
    from pipeline.comparing import compare_files
    from pipeline.images import open_images
    from pipeline.run import QuantizeJob, Result, evaluate_files, export_file, quantize_file
    from pipeline.settings import (
        CheckpointSettings,
        DetectionSettings,
        GenerateSettings,
        InputSettings,
        QuantizeSettings,
        SweepGrid,
        VerifySettings,
    )
    from pipeline.sweep import sweep_file

__all__ = [
    "CheckpointSettings",
    "DetectionSettings",
    "GenerateSettings",
    "InputSettings",
    "QuantizeJob",
    "QuantizeSettings",
    "Result",
    "SweepGrid",
    "VerifySettings",
    "ZsqError",
    "compare_files",
    "evaluate_files",
    "export_file",
    "generate_images",
    "load",
    "open_images",
    "quantize_file",
    "quantize_model",
    "sweep_file",
    "verify_model",
    "write_qdq",
]

_HOME = {
    "graph_tools.errors": ("ZsqError",),
    "pipeline.api": (
        "generate_images",
        "load",
        "quantize_model",
        "verify_model",
        "write_qdq",
    ),
    "pipeline.comparing": ("compare_files",),
    "pipeline.images": ("open_images",),
    "pipeline.run": (
        "QuantizeJob",
        "Result",
        "evaluate_files",
        "export_file",
        "quantize_file",
    ),
    "pipeline.settings": (
        "CheckpointSettings",
        "DetectionSettings",
        "GenerateSettings",
        "InputSettings",
        "QuantizeSettings",
        "SweepGrid",
        "VerifySettings",
    ),
    "pipeline.sweep": ("sweep_file",),
}


def __getattr__(name: str) -> Any:
    """Import what a public name stands for, when it is first used."""
    for module, names in _HOME.items():
        if name in names:
            value = getattr(importlib.import_module(module), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
