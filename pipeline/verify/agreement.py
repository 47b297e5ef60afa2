"""The same integers on every compiler: a file on each target against the integer interpreter."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from graph_tools.quantized_graph import QuantizedGraph
from pipeline.images import ImageSet
from pipeline.settings import VerifySettings
from pipeline.target_profiles import Check, TargetProfile
from pipeline.verify.causes import (
    FLOAT_OPERATOR,
    INPUT_ROUNDING,
    float_operator,
    is_input_rounding,
    known_causes,
)
from pipeline.verify.compilers.engine import Engine, Ran, Refusal
from pipeline.verify.engines import engines_of, parse_targets
from pipeline.verify.kernels import name_nodes
from pipeline.verify.opening import filled, read_file, require_fit, require_quantized
from pipeline.verify.reference import Piece, Reference, Wanted, static_copy
from pipeline.verify.rows import Agreement, TargetRow
from pipeline.verify.trace import trace

__all__ = ["compare_targets", "measure_target"]

Convert = Callable[[TargetProfile], TargetRow]
OnTarget = Callable[[int, int, Mapping[str, float]], None]

_TRACED = 2  # runs on which the first difference is looked for


def compare_targets(
    path: Path,
    images: ImageSet,
    settings: VerifySettings,
    targets: str,
    *,
    proto: onnx.ModelProto | None = None,
    convert: Convert | None = None,
    on_step: OnTarget | None = None,
) -> Agreement:
    """Run a QDQ file on targets and compare its integers with the interpreter's.

    Args:
        path: the quantized model.
        images: in the model's own layout and normalization.
        settings: number of images, threads, seconds for each request.
        targets: ``all`` or names with commas between them.
        proto: of the file, if it was read already.
        convert: gives the row of a target that compiles and does not run; without it there is
            none.
        on_step: called after each target.

    Raises:
        SettingsError: a name that is no target.
        VerificationError: the file is not quantized, or no integers lead to its outputs.
        ModelError, IntegerOverflowError: the interpreter cannot run it.
    """
    started = time.perf_counter()
    profiles = parse_targets(targets)
    engines = [entry for profile in profiles for entry in engines_of(profile, settings)]
    converting = [
        p for p in profiles if p.verify is not None and p.verify.converts and convert
    ]
    total = len(engines) + len(converting)
    reference = _reference(proto or read_file(path), path, images, settings.max_images)
    interpreted = time.perf_counter() - started
    rows = []
    for done, (name, engine, check) in enumerate(engines):
        if on_step is not None:
            on_step(done, total, {})
        if isinstance(engine, str):
            rows.append(TargetRow(target=name, skipped=engine))
        else:
            rows.append(measure_target(engine, reference, check))
    if convert is not None:
        rows += [convert(profile) for profile in converting]
    if on_step is not None:
        on_step(total, total, {})
    return Agreement(
        model=str(path),
        images=min(settings.max_images, images.count),
        batch=reference.images.shape[1],
        rows=tuple(rows),
        tensors=tuple(w.name for piece in reference.pieces for w in piece.wanted),
        float_nodes=reference.float_nodes,
        seconds=time.perf_counter() - started,
        reference_seconds=interpreted,
    )


def measure_target(
    engine: Engine, reference: Reference, check: Check, *, locate: bool = True
) -> TargetRow:
    """Run one target on all pieces of a file.

    Args:
        engine: the target.
        reference: what the file must give.
        check: what the target's profile allows.
        locate: look for the first node that differs, which takes more runs.
    """
    causes = known_causes(check, reference.graph)
    row: dict[str, Any] = {
        "target": engine.name,
        "version": engine.version,
        "allowed_steps": None if causes or check.steps < 0 else check.steps,
        "cause": "; ".join(causes) or check.cause,
    }
    elements = differing = 0
    largest = 0.0
    wrong: list[npt.NDArray[np.bool_]] = []
    try:
        for index, piece in enumerate(reference.pieces):
            images = reference.images if piece.wanted else reference.images[:1]
            ran = engine.run(piece.proto, images)
            if index == 0:
                row |= _facts(ran, images.shape[1])
            for wanted in piece.wanted:
                far = _distance(ran, piece, wanted)
                elements += far.size
                differing += int(np.count_nonzero(far))
                largest = max(largest, float(far.max(initial=0.0)))
                wrong.append(np.asarray(far.any(axis=1)))
    except Refusal as refusal:
        reached = {"compiled": refusal.compiled, "ran": False, "refused": refusal.what}
        return TargetRow(**(row | reached))
    first = None
    if differing and locate:
        chosen = np.flatnonzero(np.any(wrong, axis=0))[:_TRACED]
        first = trace(engine, reference, reference.images[chosen])
        if is_input_rounding(first, reference.graph):
            row |= {
                "cause": "; ".join(filter(None, (row["cause"], INPUT_ROUNDING))),
                "allowed_steps": None,
            }
        elif operator := float_operator(first, reference.graph, reference.float_nodes):
            cause = FLOAT_OPERATOR.format(operator)
            row["cause"] = "; ".join(filter(None, (row["cause"], cause)))
            if row["allowed_steps"] is not None:
                row["allowed_steps"] = max(1, row["allowed_steps"])
    return TargetRow(
        **row, elements=elements, differing=differing, largest_steps=largest, first=first
    )


def _facts(ran: Ran, batch: int) -> dict[str, Any]:
    seconds = ran.run_seconds[1:] or ran.run_seconds
    return {
        "compiled": True,
        "ran": True,
        "integer_kernels": ran.integer_kernels,
        "seconds_per_image": float(np.median(seconds)) / batch,
        "compile_seconds": ran.compile_seconds,
    }


def _distance(ran: Ran, piece: Piece, wanted: Wanted) -> npt.NDArray[np.float64]:
    """[runs, elements] steps between a target and the interpreter."""
    values = ran.outputs[wanted.index]
    if values.size != wanted.steps.size:
        name = piece.proto.graph.output[wanted.index].name
        raise Refusal(f"output '{name}' is {list(values.shape[1:])}", compiled=True)
    steps = values.reshape(wanted.steps.shape).astype(np.float64) / wanted.scale
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(np.abs(steps - wanted.steps), nan=np.inf, posinf=np.inf)


def _reference(read: onnx.ModelProto, path: Path, images: ImageSet, limit: int) -> Reference:
    proto = name_nodes(read)
    graph = QuantizedGraph(proto)
    require_quantized(graph, path)
    require_fit(graph, images, path)
    batch = graph.batch or 1
    batches = [filled(each, batch) for each in images.batches(batch, limit=limit)]
    return Reference.measure(static_copy(proto, batch), np.stack(batches))
