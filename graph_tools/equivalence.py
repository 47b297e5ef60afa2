"""Run a model in onnxruntime without optimizations, and compare outputs.

The check behind every loaded file: its normal form gives what the file gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx.reference
import onnxruntime

from graph_tools.image_input import ImageInput
from graph_tools.quiet import quiet
from graph_tools.shapes import outline
from graph_tools.weights import is_outside, values_of

__all__ = ["Reference", "Runner", "largest_difference", "run_model"]

_MAX_IR = 10
_TOLERANCE = 1e-3
_HALF_TOLERANCE = 3e-2
_FATAL = 4


class Runner:
    """A model in onnxruntime on the CPU, without optimizations.

    Weights outside the model are fed like images: onnxruntime then uses the mapped memory
    itself, where initializers would be copied.

    Args:
        proto: any model that onnxruntime takes; its IR version may be newer than it reads.
        threads: 0 lets onnxruntime choose.

    Raises:
        RuntimeError: onnxruntime refuses the model.
    """

    def __init__(self, proto: onnx.ModelProto, *, threads: int = 0) -> None:
        self._weights = {
            t.name: values_of(t) for t in proto.graph.initializer if is_outside(t)
        }
        model = outline(proto, outside_only=True) if self._weights else onnx.ModelProto()
        if not self._weights:
            model.CopyFrom(proto)
        model.ir_version = min(model.ir_version, _MAX_IR)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = _FATAL
        options.intra_op_num_threads = threads
        try:
            with quiet():
                self._session = onnxruntime.InferenceSession(
                    model.SerializeToString(), options, providers=["CPUExecutionProvider"]
                )
        except Exception as error:  # its exceptions share no base class
            raise RuntimeError(" ".join(str(error).split())[:200]) from error

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Return the graph outputs in order, for arrays by input name.

        Raises:
            RuntimeError: onnxruntime fails to run the model.
        """
        try:
            with quiet():
                outputs = self._session.run(None, {**feeds, **self._weights})
        except Exception as error:  # as above
            raise RuntimeError(" ".join(str(error).split())[:200]) from error
        return [np.asarray(output) for output in outputs]


def run_model(
    proto: onnx.ModelProto, feeds: Mapping[str, np.ndarray], *, threads: int = 0
) -> list[np.ndarray]:
    """Run a model once; see `Runner`."""
    return Runner(proto, threads=threads)(feeds)


def largest_difference(actual: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """Return the largest difference of any output, relative to that output's largest value.

    Args:
        actual: outputs, any numeric types.
        expected: as many outputs.

    Returns:
        0 for equal outputs; infinity if shapes or the places of non-finite values differ. For
        integer and boolean outputs the share of elements that differ.
    """
    if len(actual) != len(expected):
        return float("inf")
    return max((_difference(a, b) for a, b in zip(actual, expected, strict=True)), default=0.0)


def _difference(actual: np.ndarray, expected: np.ndarray) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    if not actual.size:
        return 0.0
    if not np.issubdtype(expected.dtype, np.floating):
        return float((actual != expected).mean())
    a, b = actual.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(b)
    if not np.array_equal(np.isfinite(a), finite):
        return float("inf")
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return float("inf")
    largest = float(np.abs(b[finite]).max(initial=0.0))
    difference = float(np.abs(a[finite] - b[finite]).max(initial=0.0))
    return difference / largest if largest else (float("inf") if difference else 0.0)


class Reference:
    """The file itself in onnxruntime, on random images.

    Args:
        original: the model as read.
        image: its image input.

    Attributes:
        tolerance: how far a normal form may be off, relative to the largest output.
    """

    def __init__(self, original: onnx.ModelProto, image: ImageInput) -> None:
        self._original, self._image = original, image
        self._runner: Runner | None = None  # to open a deep graph takes seconds
        elem_type = next(
            v.type.tensor_type.elem_type for v in original.graph.input if v.name == image.name
        )
        self._dtype = onnx.helper.tensor_dtype_to_np_dtype(elem_type)
        half = elem_type in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
        self.tolerance = _HALF_TOLERANCE if half else _TOLERANCE

    def images(self, count: int) -> np.ndarray:
        """Return `count` distinct images, always the same, ``[count, *shape] float32``."""
        rng = np.random.default_rng(0)
        return rng.uniform(-1, 1, (count, *self._image.shape)).astype(np.float32)

    def run(self, count: int, batch: int) -> list[np.ndarray]:
        """Run the file on `count` images in portions of `batch`; join along axis 0.

        Raises:
            RuntimeError: onnxruntime does not take the file, or not this batch.
        """
        images = self.images(count).astype(self._dtype)
        self._runner = runner = self._runner or Runner(self._original)
        parts = [
            runner({self._image.name: images[start : start + batch]})
            for start in range(0, count, batch)
        ]
        if len(parts) == 1:
            return parts[0]
        if any(not output.ndim for output in parts[0]):
            raise RuntimeError("an output has no batch dimension")
        return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]

    def run_slowly(self, batch: int) -> list[np.ndarray]:
        """Run the file with the reference implementation of ONNX.

        Raises:
            RuntimeError: it fails too.
        """
        feeds = {self._image.name: self.images(batch).astype(self._dtype)}
        try:
            with quiet():
                evaluator = onnx.reference.ReferenceEvaluator(self._original)
                return [np.asarray(output) for output in evaluator.run(None, feeds)]
        except Exception as error:
            raise RuntimeError(" ".join(str(error).split())[:200]) from error

    def run_normal(self, proto: onnx.ModelProto, count: int) -> list[np.ndarray]:
        """Run a normal form on the same `count` images at once."""
        return run_model(proto, {self._image.name: self.images(count)})
