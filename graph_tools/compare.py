"""Two models on the same images: SQNR, largest error and histograms, tensor by tensor.

``SQNR = 10 log10(sum s^2 / sum (s - q)^2)`` in dB over all images, with s of the float and q
of the quantized model; infinite when they are equal. Sums are kept in float64 and batches are
streamed, so memory does not depend on the number of images.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

from graph_tools.errors import DataError, ModelError
from graph_tools.shapes import outline
from graph_tools.weights import is_outside, values_of

__all__ = ["Histogram", "TensorComparison", "compare_tensors", "run_tensors", "with_outputs"]

_BINS = 64
_FINE = 64 * _BINS  # bins while the range may still grow; merged to _BINS at the end
_BATCH_VALUES = 2**19  # input values run at once, because every pair is an output


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """How often values occur in both models.

    Attributes:
        edges: [bins + 1] float64, ascending, equally far apart.
        float: [bins] int64 counts in the float model.
        quantized: [bins] int64 counts in the quantized model.
    """

    edges: npt.NDArray[np.float64]
    float: npt.NDArray[np.int64]
    quantized: npt.NDArray[np.int64]

    def to_dict(self) -> dict[str, list[Any]]:
        """Plain data: ``edges``, ``float``, ``quantized``."""
        return {
            "edges": self.edges.tolist(),
            "float": self.float.tolist(),
            "quantized": self.quantized.tolist(),
        }


@dataclass(frozen=True, kw_only=True)
class TensorComparison:
    """One tensor in both models, over all images.

    Attributes:
        agreement: of integers and booleans the share of equal elements; where the shapes
            differ (what NonMaxSuppression selects), of equal rows. None for floats.
        sqnr_db: None for integers, and where the shapes of floats differ; else signal to
            quantization noise ratio in dB; ``inf`` when equal, ``-inf`` when only the float
            tensor is zero, or a value is not finite.
        max_abs_error: largest ``|s - q|``.
        signal_power: mean of ``s^2``.
        noise_power: mean of ``(s - q)^2``.
        elements: how many were compared.
        histogram: where asked for.
        same_top1: of floats with one row of two or more values an image, such as class scores,
            the share of images whose largest value is at the same place; else None.
        gain: the factor nearest to what leads from s to q, ``sum s q / sum s^2``; 1 where s is 0.
    """

    sqnr_db: float | None
    max_abs_error: float
    signal_power: float
    noise_power: float
    elements: int
    histogram: Histogram | None = None
    agreement: float | None = None
    same_top1: float | None = None
    gain: float = 1.0

    @property
    def aligned_sqnr_db(self) -> float | None:
        """The SQNR once the gain is taken out: of s to q / gain."""
        signal = self.gain**2 * self.signal_power
        noise = self.noise_power - (1 - self.gain) ** 2 * self.signal_power
        if self.sqnr_db is None or not signal or not math.isfinite(noise):
            return self.sqnr_db
        # Cancellation leaves the noise uncertain by some 1e-15 of the signal.
        return 10 * math.log10(signal / max(noise, 1e-15 * signal))


def with_outputs(proto: onnx.ModelProto, tensors: Iterable[str]) -> onnx.ModelProto:
    """Return a copy whose only outputs are ``tensors``.

    Raises:
        ModelError: a tensor that the graph does not have.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    known = {name for node in proto.graph.node for name in node.output}
    known |= {entry.name for entry in proto.graph.input}
    del copy.graph.output[:]
    for name in dict.fromkeys(tensors):
        if name not in known:
            raise ModelError("there is no such tensor in the graph", where=name)
        copy.graph.output.append(onnx.ValueInfoProto(name=name))
    return copy


def compare_tensors(
    float_proto: onnx.ModelProto,
    quantized_proto: onnx.ModelProto,
    pairs: Mapping[str, str],
    images: Iterable[npt.NDArray[np.float32]],
    *,
    histograms: Collection[str] = (),
    threads: int = 0,
) -> dict[str, TensorComparison]:
    """Compare tensors of two models, run by onnxruntime without optimization.

    Args:
        float_proto: one model with one input.
        quantized_proto: the other, with the same input shape.
        pairs: tensor of the float model to tensor (dequantized) of the quantized model.
        images: batches, [N, ...] float32 in the models' own layout, such as
            ``ImageSet.batches(32)``; read once. A model with a fixed batch gets batches of
            that size, the last one filled up.
        histograms: tensors of the float model to make histograms of.
        threads: onnxruntime threads in an operator; 0 lets it choose.

    Returns:
        A comparison for each pair, by the float model's tensor name, in the order given.

    Raises:
        ModelError: a tensor is missing or the two shapes differ; onnxruntime refuses a model.
        DataError: there are no images.

    Example:
        ``compare_tensors(model.proto, qdq, {"logits": "logits"}, images.batches(32))``
    """
    runs = (
        _Run(float_proto, list(pairs), threads),
        _Run(quantized_proto, list(pairs.values()), threads),
    )
    sizes = {run.batch for run in runs if run.batch is not None}
    if len(sizes) > 1:
        raise ModelError(f"the two models have different batch sizes, {sorted(sizes)}")
    size = sizes.pop() if sizes else None
    meters = {name: _Meter(with_histogram=name in histograms) for name in pairs}
    for batch in _pieces(images, size):
        first, second = (run(batch, size) for run in runs)
        for name, other in pairs.items():
            meters[name].update(name, first[name], second[other])
    if not any(meter.elements for meter in meters.values()):
        raise DataError("there are no images to compare with")
    return {name: meter.result() for name, meter in meters.items()}


def run_tensors(
    proto: onnx.ModelProto,
    tensors: Iterable[str],
    images: npt.NDArray[np.float32],
    *,
    threads: int = 0,
) -> dict[str, npt.NDArray[Any]]:
    """Run one batch without optimization, and return tensors of the graph by name.

    Args:
        proto: a model with one input.
        tensors: of its graph.
        images: [N, ...] float32 in the model's own layout; filled up to a fixed batch.
        threads: as in `compare_tensors`.

    Raises:
        ModelError: see `compare_tensors`.
    """
    run = _Run(proto, list(tensors), threads)
    return run(images, run.batch)


_TYPES: dict[str, np.dtype[Any]] = {
    "tensor(uint8)": np.dtype(np.uint8),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(double)": np.dtype(np.float64),
}
"""Of images that a file takes, other than float32."""


class _Run:
    def __init__(self, proto: onnx.ModelProto, tensors: list[str], threads: int) -> None:
        self.names = list(dict.fromkeys(tensors))
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        bare = outline(with_outputs(proto, self.names), outside_only=True)
        self.weights = {t.name: values_of(t) for t in proto.graph.initializer if is_outside(t)}
        try:
            self.session = ort.InferenceSession(
                bare.SerializeToString(),
                options,
                providers=["CPUExecutionProvider"],
            )
        except Exception as error:  # onnxruntime's exceptions have no base class of their own
            raise ModelError(f"onnxruntime refuses the model: {error}") from error
        entry = self.session.get_inputs()[0]
        self.input = entry.name
        self.type: np.dtype[Any] = _TYPES.get(entry.type, np.dtype(np.float32))
        first = entry.shape[0] if entry.shape else None
        self.batch = first if isinstance(first, int) and first > 0 else None

    def __call__(
        self, images: npt.NDArray[np.float32], size: int | None
    ) -> dict[str, npt.NDArray[Any]]:
        count, size = len(images), size or len(images)
        if count < size:
            filler = np.repeat(images[-1:], size - count, axis=0)
            images = np.concatenate([images, filler])
        whole = np.clip(np.rint(images), 0, 255) if self.type == np.uint8 else images
        given = whole.astype(self.type)
        try:
            values = self.session.run(self.names, {self.input: given, **self.weights})
        except Exception as error:  # see above
            raise ModelError(f"onnxruntime fails on a batch of {size}: {error}") from error
        return {
            name: value[:count] if value.ndim and len(value) == size else value
            for name, value in zip(self.names, values, strict=True)
        }


def _pieces(
    images: Iterable[npt.NDArray[np.float32]], size: int | None
) -> Iterator[npt.NDArray[np.float32]]:
    for batch in images:
        step = size or max(1, _BATCH_VALUES // max(1, math.prod(batch.shape[1:])))
        for start in range(0, len(batch), step):
            yield np.ascontiguousarray(batch[start : start + step], np.float32)


class _Meter:
    def __init__(self, *, with_histogram: bool) -> None:
        self.signal = self.noise = self.largest = self.cross = 0.0
        self.elements = 0
        self.counter = _Counter() if with_histogram else None
        self.equal = 0
        self.rows = self.same_rows = 0
        self.is_integer = self.is_selection = False

    def update(self, name: str, first: npt.NDArray[Any], second: npt.NDArray[Any]) -> None:
        if not np.issubdtype(first.dtype, np.inexact):
            self.is_integer = True
            equal, total = _agreement(first, second)
            self.equal, self.elements = self.equal + equal, self.elements + total
            return
        if first.shape[1:] == second.shape[1:] and len(first) != len(second):
            self.is_selection = True  # of another number of rows
            self.elements += max(first.size, second.size)
            return
        if first.shape != second.shape:
            raise ModelError(
                f"has shape {list(first.shape)} in the float model and "
                f"{list(second.shape)} in the quantized one",
                where=name,
            )
        if first.ndim > 1 and 1 < max(first.shape[1:]) == first.size // max(len(first), 1):
            places = (
                values.reshape(len(values), -1).argmax(axis=1) for values in (first, second)
            )
            self.rows += len(first)
            self.same_rows += int(np.equal(*places).sum())
        s, q = (values.astype(np.float64).reshape(-1) for values in (first, second))
        if self.counter is not None:
            self.counter.add(s, q)
        q -= s
        self.elements += s.size
        self.signal += float(s @ s)
        self.noise += float(q @ q)
        self.cross += float(s @ q)
        self.largest = max(self.largest, float(np.abs(q).max(initial=0.0)))

    def result(self) -> TensorComparison:
        if self.is_integer or self.is_selection:
            return TensorComparison(
                sqnr_db=None,
                max_abs_error=0.0 if self.is_integer else math.inf,
                signal_power=0.0,
                noise_power=0.0,
                elements=self.elements,
                agreement=self.equal / self.elements if self.is_integer else None,
            )
        ratio = self.signal / self.noise if self.noise else math.inf
        sqnr = 10 * math.log10(ratio) if ratio > 0 else -math.inf
        return TensorComparison(
            sqnr_db=sqnr,
            max_abs_error=self.largest,
            signal_power=self.signal / max(self.elements, 1),
            noise_power=self.noise / max(self.elements, 1),
            elements=self.elements,
            histogram=None if self.counter is None else self.counter.histogram(),
            same_top1=self.same_rows / self.rows if self.rows else None,
            gain=1 + self.cross / self.signal if self.signal else 1.0,
        )


def _agreement(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> tuple[int, int]:
    """Equal elements, and elements; rows in any order where the shapes differ."""
    if first.shape == second.shape:
        return int((first == second).sum()), first.size
    rows = [Counter(map(bytes, np.ascontiguousarray(v))) for v in (first, second)]
    return (rows[0] & rows[1]).total(), max(len(first), len(second))


class _Counter:
    """Counts in fine bins over [-limit, limit), a power of two that doubles when needed.

    Doubling merges neighbours, so the counts are exact without a first pass for the range.
    """

    def __init__(self) -> None:
        self.limit = 0.0
        self.counts = np.zeros((2, _FINE), np.int64)

    def add(self, *values: npt.NDArray[np.float64]) -> None:
        finite = [v[np.isfinite(v)] for v in values]
        largest = max(float(np.abs(v).max(initial=0.0)) for v in finite)
        if self.limit == 0.0 and largest == 0.0:  # zero is in the same bin at every limit
            self.counts[:, _FINE // 2] += [len(v) for v in finite]
            return
        if self.limit == 0.0:
            self.limit = 2.0 ** math.frexp(largest)[1]
        while largest >= self.limit:
            merged = self.counts.reshape(2, _FINE // 2, 2).sum(axis=2)
            self.counts = np.pad(merged, ((0, 0), (_FINE // 4, _FINE // 4)))
            self.limit *= 2
        for row, v in zip(self.counts, finite, strict=True):
            bins = np.floor((v / self.limit + 1) * (_FINE // 2)).astype(np.int64)
            row += np.bincount(bins, minlength=_FINE)

    def histogram(self) -> Histogram:
        used = np.flatnonzero(self.counts.sum(axis=0))
        first, last = (int(used[0]), int(used[-1])) if used.size else (_FINE // 2, _FINE // 2)
        merge = -(-(last - first + 1) // _BINS)
        first = min(first, _FINE - merge * _BINS)
        counts = self.counts[:, first : first + merge * _BINS]
        counts = counts.reshape(2, _BINS, merge).sum(axis=2)
        width = 2 * (self.limit or 1.0) / _FINE
        edges = np.arange(_BINS + 1, dtype=np.float64) * merge + (first - _FINE // 2)
        return Histogram(edges=edges * width, float=counts[0], quantized=counts[1])
