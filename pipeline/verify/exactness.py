"""Run a quantized file three ways in onnxruntime, and in integers, and compare the integers."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from graph_tools.digests import find_changes
from graph_tools.errors import VerificationError
from graph_tools.quantized_graph import QuantizedGraph
from pipeline.images import ImageSet
from pipeline.settings import VerifySettings
from pipeline.verify.accumulators import Accumulator, measure_accumulators
from pipeline.verify.compilers import onnxruntime as ort
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
from pipeline.verify.kernels import name_nodes
from pipeline.verify.localize import first_difference
from pipeline.verify.opening import read_file, require_fit, require_quantized
from pipeline.verify.parts import Part, compile_parts
from pipeline.verify.proof import Proof, TensorProof
from pipeline.verify.scales import check_scales
from pipeline.verify.stepwise import compare_stepwise

__all__ = ["OnStep", "verify"]

logger = logging.getLogger(__name__)

OnStep = Callable[[int, int, Mapping[str, float]], None]

_BATCH_VALUES = 2**22  # input values of one batch: 16 MiB


def verify(
    path: Path,
    images: ImageSet,
    settings: VerifySettings,
    *,
    proto: onnx.ModelProto | None = None,
    on_step: OnStep | None = None,
) -> Proof:
    """Check a QDQ file: exactness, contents, kernels, saturation, scales, accumulators.

    Args:
        path: the quantized model.
        images: in the model's own layout and normalization.
        settings: number of images and threads.
        proto: of the file, if it was read already.
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
    read = proto or read_file(path)
    changes = find_changes(read)
    graph = QuantizedGraph(name_nodes(read))
    require_quantized(graph, path)
    require_fit(graph, images, path)

    try:
        parts, kernels = compile_parts(graph, settings, str(path))
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


def _interpreter(
    graph: QuantizedGraph,
    parts: Sequence[Part],
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


def _batch_size(graph: QuantizedGraph, images: ImageSet) -> int:
    return graph.batch or _usual_batch(images)


def _usual_batch(images: ImageSet) -> int:
    return max(1, min(64, _BATCH_VALUES // math.prod(images.shape)))


def _differing(parts: Sequence[Part]) -> float:
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
