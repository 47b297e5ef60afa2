"""ONNX files in onnxruntime, set up so that integer kernels are exact."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from graph_tools.errors import DynamicShapeError, ModelError, SettingsError
from graph_tools.fixed_inputs import fix_inputs
from graph_tools.limits import check_file_cost
from graph_tools.model import ImageInput, Layout
from graph_tools.reading import read_outline, read_proto
from graph_tools.saving import loadable

__all__ = ["Session", "open_session"]

_Number = np.floating[Any] | np.uint8
_DTYPES: dict[str, type[_Number]] = {
    "tensor(uint8)": np.uint8,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
}
# Values in one run of a model that takes any batch: 8 MB of float32, at most 64 images.
_BATCH_VALUES = 2 * 2**20
_MAX_BATCH = 64
_MAX_CHANNELS = 4
# Tracing bakes the batch of the example into a Reshape; such a file still claims to take any.
_PROBED_BATCH = 3
_LIKELY_BATCHES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Session:
    """A model ready to run.

    Args:
        path: its file.
        input: what it takes; ``input.batch`` is the only batch size, if the file fixes one.
        batch_size: a good batch size; ``input.batch`` if that is fixed.
    """

    path: Path
    input: ImageInput
    batch_size: int
    _session: onnxruntime.InferenceSession = field(repr=False)
    _dtype: type[_Number] = field(repr=False)

    def scores(self, images: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        """Return the first output for each image, flattened: [N, K].

        Args:
            images: [N, *input.shape] float32; any N, also if the file fixes its batch size.

        Raises:
            ModelError: the model fails, or its output is not one row per image.
        """
        name = self._session.get_outputs()[0].name
        runs = self._runs(images, [name])
        return np.concatenate([run[name].reshape(len(run[name]), -1)[:n] for run, n in runs])

    def outputs(
        self, images: npt.NDArray[np.float32]
    ) -> list[tuple[dict[str, npt.NDArray[Any]], int]]:
        """Run images and return all outputs by name, run by run.

        Args:
            images: [N, *input.shape] float32, N > 0; any N, also if the file fixes its batch
                size: then there are several runs.

        Returns:
            For each run its outputs in the order of the file, [n, ...] each, and how many of
            their rows, the first ones, are images.

        Raises:
            ModelError: the model fails, or an output is not one row per image.
        """
        return list(
            self._runs(images, [output.name for output in self._session.get_outputs()])
        )

    def _runs(
        self, images: npt.NDArray[np.float32], names: list[str]
    ) -> Iterator[tuple[dict[str, npt.NDArray[Any]], int]]:
        size = self.input.batch or len(images)
        for start in range(0, len(images), size):
            batch = images[start : start + size]
            yield self._run(batch, size, names), len(batch)

    def _run(
        self, images: npt.NDArray[np.float32], size: int, names: list[str]
    ) -> dict[str, npt.NDArray[Any]]:
        if len(images) < size:  # the last images of a file with a fixed batch
            more = np.repeat(images[-1:], size - len(images), axis=0)
            images = np.concatenate([images, more])
        if self._dtype is np.uint8:  # pixels, whole numbers but for rounding errors
            images = np.clip(np.rint(images), 0, 255)
        feed = {self.input.name: images.astype(self._dtype)}
        try:
            outputs = self._session.run(names, feed)
        # onnxruntime's exceptions have no common class of their own.
        except Exception as error:
            what = f"onnxruntime cannot run it ({_first_line(error)})"
            raise ModelError(what, where=str(self.path)) from error
        for number, (name, output) in enumerate(zip(names, outputs, strict=True)):
            if not isinstance(output, np.ndarray) or output.shape[:1] != (size,):
                which = "its first output" if number == 0 else "its output"
                raise ModelError(
                    f"{which}, {name}, is not one row for each of {size} image(s)",
                    where=str(self.path),
                )
        return dict(zip(names, outputs, strict=True))


def open_session(
    path: str | os.PathLike[str],
    *,
    threads: int = 0,
    model_input: ImageInput | None = None,
    fixed: Mapping[str, npt.NDArray[Any]] | None = None,
) -> Session:
    """Open an ONNX file in onnxruntime on the CPU, with all optimizations.

    ``session.x64quantprecision`` is on: without it, int8 kernels saturate on processors
    without VNNI instructions.

    Args:
        path: float or quantized.
        threads: threads inside an operator; 0 lets onnxruntime choose.
        model_input: layout and size, for files that leave them open.
        fixed: arrays for inputs other than the image; ignored by a file with one input.

    Raises:
        ModelError: onnxruntime cannot load the file, or it has not one image input.
        DynamicShapeError: the file leaves the image size open and ``model_input`` is None.
        SettingsError: threads is negative.
    """
    path = Path(path)
    if threads < 0:
        raise SettingsError(f"{threads} is not 0 or more", where="--threads")
    if not path.is_file():
        raise ModelError("there is no such file", where=str(path))
    check_file_cost(read_outline(path), where=str(path))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = _open(path, options)
    if fixed and len(session.get_inputs()) > 1:
        proto, _ = read_proto(path)
        fix_inputs(proto, fixed, where=str(path))
        with tempfile.TemporaryDirectory(prefix="zsq-") as folder:
            session = _open(path, options, loadable(proto, Path(folder)))
    inputs = session.get_inputs()
    if len(inputs) != 1:
        raise ModelError(f"it has {len(inputs)} inputs, not one", where=str(path))
    if inputs[0].type not in _DTYPES:
        raise ModelError(
            f"its input, {inputs[0].name}, is {inputs[0].type}, not floating point or uint8",
            where=str(path),
        )
    if model_input is None:
        model_input = _image_input(inputs[0].name, inputs[0].shape, str(path))
    dtype = _DTYPES[inputs[0].type]
    batch = inputs[0].shape[0] if isinstance(inputs[0].shape[0], int) else None
    if batch is None:
        batch = _baked_batch(session, model_input, dtype)
    model_input = ImageInput(
        name=inputs[0].name, shape=model_input.shape, layout=model_input.layout, batch=batch
    )
    wanted = max(1, min(_MAX_BATCH, _BATCH_VALUES // int(np.prod(model_input.shape))))
    return Session(
        path=path,
        input=model_input,
        batch_size=batch or wanted,
        _session=session,
        _dtype=dtype,
    )


def _open(
    path: Path, options: onnxruntime.SessionOptions, model: bytes | Path | None = None
) -> onnxruntime.InferenceSession:
    try:
        return onnxruntime.InferenceSession(
            model if isinstance(model, bytes) else str(model or path),
            options,
            providers=["CPUExecutionProvider"],
        )
    except Exception as error:
        what = f"onnxruntime cannot load it ({_first_line(error)})"
        raise ModelError(what, where=str(path)) from error


def _baked_batch(
    session: onnxruntime.InferenceSession,
    model_input: ImageInput,
    dtype: type[_Number],
) -> int | None:
    """Return the only batch size at which a file runs; None if it takes any, or fails at all."""
    quiet = onnxruntime.RunOptions()
    quiet.log_severity_level = 4  # failing is what this is about
    for batch in (_PROBED_BATCH, *_LIKELY_BATCHES):
        images = np.zeros((batch, *model_input.shape), dtype=dtype)
        try:
            session.run(None, {session.get_inputs()[0].name: images}, quiet)
        except Exception:  # onnxruntime's exceptions have no common class of their own
            continue
        return None if batch == _PROBED_BATCH else batch
    return None


def _image_input(name: str, dims: list[int | str | None], where: str) -> ImageInput:
    """Return the input that a file declares; the layout follows from its shape alone."""
    if len(dims) != 4:
        raise ModelError(f"its input, {name}, has {len(dims)} axes, not four", where=where)
    image = [dim for dim in dims[1:] if isinstance(dim, int) and dim > 0]
    if len(image) != 3:
        raise DynamicShapeError(
            f"its input, {name}, has the shape {dims}",
            where=where,
            hint="give --input-shape with all sizes",
        )
    layout: Layout = "NHWC" if image[2] <= _MAX_CHANNELS < image[0] else "NCHW"
    return ImageInput(
        name=name, shape=(image[0], image[1], image[2]), layout=layout, batch=None
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else repr(error)
