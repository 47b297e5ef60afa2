"""onnxruntime on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from graph_tools.errors import VerificationError
from pipeline.verify.opening import filled

__all__ = ["Compiled", "Mode", "available", "compile", "run"]

Mode = Literal["unoptimized", "optimized", "default"]

_PRECISION_OPTION = "session.x64quantprecision"
_OPTIMIZED_WEIGHTS = "session.optimized_model_external_initializers_file_name"


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A session, ready to run.

    Attributes:
        session: the onnxruntime session.
        input_name: its one input.
        output_names: its outputs, in order.
        batch: the only batch size it takes; None when any.
        mode: how it was compiled.
    """

    session: Any
    input_name: str
    output_names: tuple[str, ...]
    batch: int | None
    mode: Mode


def available() -> str:
    """Return the version of onnxruntime."""
    return str(ort.__version__)


def compile(
    model: bytes | Path,
    mode: Mode,
    *,
    threads: int = 0,
    optimized_path: Path | None = None,
    where: str = "",
) -> Compiled:
    """Make a session.

    Args:
        model: a serialized ONNX model with one input, or the file that holds it.
        mode: ``unoptimized``: no graph optimization, float arithmetic on dequantized values;
            ``optimized``: all optimizations, integer kernels, exact sums on every x64 CPU
            (``session.x64quantprecision``); ``default``: all optimizations only, as a program
            that sets no options gets them.
        threads: threads in an operator; 0 lets onnxruntime choose.
        optimized_path: where onnxruntime writes the graph as optimized; None for nowhere.
        where: what to name in errors.

    Raises:
        VerificationError: onnxruntime refuses the model.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    level = ort.GraphOptimizationLevel
    unoptimized = mode == "unoptimized"
    options.graph_optimization_level = (
        level.ORT_DISABLE_ALL if unoptimized else level.ORT_ENABLE_ALL
    )
    if mode == "optimized":
        options.add_session_config_entry(_PRECISION_OPTION, "1")
    if optimized_path is not None:
        options.optimized_model_filepath = str(optimized_path)
        # The weights, which nobody reads, may exceed what the file can hold.
        options.add_session_config_entry(_OPTIMIZED_WEIGHTS, f"{optimized_path.name}.data")
    try:
        session = ort.InferenceSession(
            model if isinstance(model, bytes) else str(model),
            options,
            providers=["CPUExecutionProvider"],
        )
    except Exception as error:  # onnxruntime's exceptions have no base class of their own
        raise VerificationError(
            f"onnxruntime refuses the model ({mode} run): {_one_line(error)}", where=where
        ) from error
    inputs = session.get_inputs()
    batch = inputs[0].shape[0] if inputs and inputs[0].shape else None
    return Compiled(
        session=session,
        input_name=inputs[0].name if inputs else "",
        output_names=tuple(entry.name for entry in session.get_outputs()),
        batch=batch if isinstance(batch, int) and batch > 0 else None,
        mode=mode,
    )


def run(compiled: Compiled, images: npt.NDArray[np.float32]) -> dict[str, npt.NDArray[Any]]:
    """Run one batch.

    A batch smaller than the model's fixed size is filled with its last image, and the rows of
    these fillers are taken off again where an output's first dimension is the batch.

    Args:
        compiled: from `compile`.
        images: [n, ...] float32; n at most the fixed batch size, if there is one.

    Returns:
        Every output by name.

    Raises:
        VerificationError: onnxruntime fails on the batch.
    """
    count, images = len(images), filled(images, compiled.batch)
    size = len(images)
    try:
        values = compiled.session.run(None, {compiled.input_name: images})
    except Exception as error:  # see compile
        raise VerificationError(
            f"onnxruntime fails on a batch of {size} ({compiled.mode} run): {_one_line(error)}"
        ) from error
    return {
        name: value[:count] if np.ndim(value) and len(value) == size else value
        for name, value in zip(compiled.output_names, values, strict=True)
    }


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."
