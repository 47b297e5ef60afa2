"""Run a quantized file three ways in onnxruntime and in integers, and compare every integer.

Tensors are compared where integers end: at graph outputs that hold dequantized integers, and,
where a float tail follows (a Softmax, box decoding), at the last integers in front of it, in a
copy of the model that is cut there. Making an inner tensor an output of the whole model would
keep onnxruntime from fusing the kernels around it, and so prove something else.
"""

from __future__ import annotations

import itertools
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx

from graph_tools.digests import find_changes
from graph_tools.errors import DataError, ModelError, VerificationError
from graph_tools.quantized_graph import QuantizedGraph
from graph_tools.reading import read_proto
from graph_tools.saving import loadable
from pipeline.images import ImageSet
from pipeline.settings import VerifySettings
from pipeline.verify.accumulators import Accumulator, measure_accumulators
from pipeline.verify.compilers import onnxruntime as ort
from pipeline.verify.cut import cut_at
from pipeline.verify.differences import DifferenceMeter
from pipeline.verify.findings import (
    change_failures,
    difference_failures,
    find_warnings,
    interpreter_differences,
    interpreter_failures,
    measure_saturation,
    overflow_failures,
    refusal_hint,
    scale_failures,
)
from pipeline.verify.interpreter import Interpreter
from pipeline.verify.kernels import Kernels, name_nodes, read_kernels
from pipeline.verify.localize import first_difference
from pipeline.verify.proof import Proof, TensorProof
from pipeline.verify.scales import check_scales
from pipeline.verify.stepwise import compare_stepwise

__all__ = ["OnStep", "verify"]

logger = logging.getLogger(__name__)

OnStep = Callable[[int, int, Mapping[str, float]], None]

_MODES: tuple[ort.Mode, ...] = ("unoptimized", "optimized", "default")
_PAIRS = tuple(itertools.combinations(_MODES, 2))
_BATCH_VALUES = 2**22  # input values of one batch: 16 MiB


def verify(
    path: Path,
    images: ImageSet,
    settings: VerifySettings,
    *,
    on_step: OnStep | None = None,
) -> Proof:
    """Check a QDQ file: exactness, contents, kernels, saturation, scales, accumulators.

    Args:
        path: the quantized model.
        images: in the model's own layout and normalization.
        settings: number of images and threads.
        on_step: called after each batch with images done, images in all, and
            ``{"differing": share}`` of the integer elements so far.

    Returns:
        The proof; ``passed`` says whether everything held.

    Raises:
        VerificationError: the file is no ONNX file or not quantized, or onnxruntime refuses
            it.
        DataError: the images do not fit the model's input.
    """
    started = time.perf_counter()
    read = _read(path)
    changes = find_changes(read)
    proto = name_nodes(read)
    graph = QuantizedGraph(proto)
    _require_quantized(graph, path)
    _require_fit(graph, images, path)

    try:
        parts, kernels = _compile(graph, settings, str(path))
    except VerificationError as error:
        error.hint = refusal_hint(graph)
        raise
    accumulators = tuple(measure_accumulators(graph))
    usual = _usual_batch(images)
    interpreter = _interpreter(graph, parts, accumulators, settings, usual)
    total = min(settings.max_images, images.count)
    done = 0
    differing_batch: npt.NDArray[np.float32] | None = None
    for batch in images.batches(_batch_size(graph, images), limit=total):
        found: dict[str, dict[str, npt.NDArray[Any]]] = {}
        for part in parts:
            for mode, values in part.compare(batch).items():
                found.setdefault(mode, {}).update(values)
        interpreter.compare(batch, found)
        if differing_batch is None and _differing(parts):
            differing_batch = batch
        done += len(batch)
        if on_step is not None:
            on_step(done, total, {"differing": _differing(parts)})
    tensors = tuple(tensor for part in parts for tensor in part.results())

    scales = check_scales(graph)
    interpreted = interpreter.result()
    differences = list(difference_failures(tensors))
    parting = stepwise = None
    rounding = _rounding(graph, accumulators)
    approximate = {node.name for node in graph.nodes if node.op_type in _APPROXIMATED}
    if differing_batch is not None and rounding:
        inexact = rounding | approximate
        stepwise = compare_stepwise(graph, differing_batch, inexact, threads=settings.threads)
        differences.append(str(stepwise))
    if differing_batch is not None:
        parting = first_difference(graph, differing_batch, threads=settings.threads)
    if parting is not None:
        differences.append(f"the two runs part at {parting}")
    approximated = (
        parting is not None and parting.op_type in _APPROXIMATED and _within_one_step(tensors)
    )
    if approximated and parting is not None:
        differences = [
            f"{text}; {parting.op_type} has no exact integer form, one step is allowed"
            for text in differences
        ]
    approximated |= stepwise is not None and stepwise.within_one_step
    parted = list(interpreter_differences(interpreted))
    declared = interpreted.traced is None or (
        bool(interpreted.traced.behind & (rounding | approximate))
        and abs(interpreted.traced.difference.largest_steps) <= 1
    )
    proof = Proof(
        model=str(path),
        onnxruntime=ort.available(),
        images=done,
        tensors=tensors,
        kernels=kernels,
        saturation=measure_saturation(tensors, accumulators),
        scales=scales,
        accumulators=accumulators,
        stepwise=stepwise,
        interpreted=interpreted,
        changes=changes,
        failures=(
            *([] if approximated else differences),
            *([] if declared else parted),
            *interpreter_failures(interpreted),
            *change_failures(changes),
            *scale_failures(scales),
            *overflow_failures(accumulators),
        ),
        warnings=(
            *(differences if approximated else ()),
            *(parted if declared else ()),
            *find_warnings(graph, scales, accumulators),
        ),
        seconds=time.perf_counter() - started,
    )
    logger.info(
        "verified %s in %.1f s: %s", path.name, proof.seconds, proof.summary_lines()[-1]
    )
    return proof


_APPROXIMATED = frozenset(  # onnxruntime's 8-bit kernels approximate these
    "Elu Erf Exp Gelu HardSigmoid HardSwish LayerNormalization LogSoftmax Mish Sigmoid Softmax "
    "Softplus Tanh".split()
)


def _rounding(graph: QuantizedGraph, accumulators: Sequence[Accumulator]) -> set[str]:
    """Nodes whose float sums may round: inexact layers, and additions of tensors in float."""
    found = {entry.node for entry in accumulators if not entry.simulation_exact}
    for node in graph.nodes:
        computed = [name for name in node.input if not graph.is_constant(name)]
        if node.op_type != "Add" or all(map(graph.dequantizer, computed)):
            continue
        readers = graph.consumers.get(node.output[0], [])
        while len(readers) == 1 and readers[0].op_type in {"Relu", "Clip"}:
            readers = graph.consumers.get(readers[0].output[0], [])
        if any(reader.op_type == "QuantizeLinear" for reader in readers):
            found.add(node.name)
    return found


@dataclass(frozen=True, kw_only=True)
class _Target:
    """A tensor to compare: its name in the run, and what it stands for.

    ``integers``: where the stored integers are if it is no graph output.
    """

    output: str
    name: str
    scale: float | None
    feeds: tuple[str, ...] = ()
    integers: str = ""
    decides: bool = False

    @property
    def kind(self) -> Literal["integer output", "float output", "last integers", "decision"]:
        if self.feeds:
            return "last integers"
        if self.decides:
            return "decision"
        return "float output" if self.scale is None else "integer output"


class _Part:
    """One model, compiled for every mode, and the meters of its outputs."""

    def __init__(self, runs: Sequence[ort.Compiled], targets: Sequence[_Target]) -> None:
        self._runs = runs
        self.targets = targets
        self.meters = {
            (target.output, pair): DifferenceMeter(*pair, target.scale)
            for target in targets
            for pair in _PAIRS
        }

    def compare(
        self, batch: npt.NDArray[np.float32]
    ) -> dict[ort.Mode, dict[str, npt.NDArray[Any]]]:
        """Run a batch in every mode and compare; returns the outputs by mode."""
        values = {run.mode: ort.run(run, batch) for run in self._runs}
        for (output, (first, second)), meter in self.meters.items():
            meter.update(values[first][output], values[second][output])
        return values

    def results(self) -> Iterator[TensorProof]:
        """Return what was measured, a tensor at a time."""
        for target in self.targets:
            yield TensorProof(
                name=target.name,
                kind=target.kind,
                scale=target.scale,
                feeds=target.feeds,
                differences=tuple(
                    self.meters[target.output, pair].result() for pair in _PAIRS
                ),
            )


def _interpreter(
    graph: QuantizedGraph,
    parts: Sequence[_Part],
    accumulators: Sequence[Accumulator],
    settings: VerifySettings,
    usual: int,
) -> Interpreter:
    """The interpreter over the tensors of integers that the parts compare.

    ``usual``: images that it runs unless the settings say otherwise.
    """
    targets = [t for part in parts for t in part.targets if t.scale is not None]
    wide = any(entry.input_bits > 8 for entry in accumulators)  # no runtime has int32 there
    return Interpreter(
        graph,
        {target.output: target.scale for target in targets if target.scale is not None},
        {target.output: target.integers for target in targets if target.integers},
        limit=usual if settings.interpreter_images is None else settings.interpreter_images,
        accumulator_bits=62 if wide else 32,
        threads=settings.threads,
    )


def _read(path: Path) -> onnx.ModelProto:
    try:
        proto, _ = read_proto(path)
    except ModelError as error:
        raise VerificationError(error.what, where=error.where, hint=error.hint) from error
    if not proto.graph.node:
        raise VerificationError("not an ONNX model, or an empty one", where=str(path))
    return proto


def _require_quantized(graph: QuantizedGraph, path: Path) -> None:
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


def _require_fit(graph: QuantizedGraph, images: ImageSet, path: Path) -> None:
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


def _batch_size(graph: QuantizedGraph, images: ImageSet) -> int:
    return graph.batch or _usual_batch(images)


def _usual_batch(images: ImageSet) -> int:
    return max(1, min(64, _BATCH_VALUES // math.prod(images.shape)))


def _compile(
    graph: QuantizedGraph, settings: VerifySettings, where: str
) -> tuple[list[_Part], Kernels]:
    """Compile the file, and the copy that ends where integers end if there are float tails."""
    with tempfile.TemporaryDirectory(prefix="zsq-") as folder:
        model = loadable(graph.proto, Path(folder))
        optimized = Path(folder) / "optimized.onnx"
        runs = [
            ort.compile(
                model,
                mode,
                threads=settings.threads,
                optimized_path=optimized if mode == "optimized" else None,
                where=where,
            )
            for mode in _MODES
        ]
        kernels = read_kernels(graph, onnx.load(optimized, load_external_data=False))

    scales = {name: graph.output_scale(name) for name in graph.outputs}
    targets = [
        _Target(
            output=name,
            name=name,
            scale=None if scale is None else float(scale),
            decides=name in graph.decisions,
        )
        for name, scale in scales.items()
    ]
    parts = [_Part(runs, targets)]
    feeds: dict[str, list[str]] = {}
    for name, scale in scales.items():
        if scale is None:
            for node in graph.origin(name).dequantizers:
                feeds.setdefault(node.input[0], []).append(name)
    if feeds:
        cut, ends = cut_at(graph, tuple(feeds))
        with tempfile.TemporaryDirectory(prefix="zsq-") as folder:
            model = loadable(cut, Path(folder))
            runs = [
                ort.compile(model, m, threads=settings.threads, where=where) for m in _MODES
            ]
        parts.append(
            _Part(
                runs,
                [
                    _Target(
                        output=end.output,
                        name=end.tensor,
                        scale=end.scale,
                        feeds=tuple(feeds[end.integers]),
                        integers=end.integers,
                    )
                    for end in ends
                ],
            )
        )
    return parts, kernels


def _differing(parts: Sequence[_Part]) -> float:
    results = [
        tensor.between("unoptimized", "optimized")
        for part in parts
        for tensor in part.results()
        if tensor.scale is not None
    ]
    elements = sum(entry.elements for entry in results)
    return sum(entry.differing for entry in results) / elements if elements else 0.0


def _within_one_step(tensors: Sequence[TensorProof]) -> bool:
    pairs = [
        tensor.between("unoptimized", "optimized")
        for tensor in tensors
        if tensor.scale is not None
    ]
    return all((pair.largest_steps or 0.0) <= 1.0 for pair in pairs)
