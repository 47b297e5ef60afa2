"""The same integers on every compiler: a file on each target against the integer interpreter."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from graph_tools.errors import ModelError, SettingsError, VerificationError
from graph_tools.integer import FirstDifference
from graph_tools.quantized_graph import QuantizedGraph
from graph_tools.reading import read_proto
from pipeline.environments import find_environment, how_to_get
from pipeline.images import ImageSet
from pipeline.settings import VerifySettings
from pipeline.target_profiles import Check, TargetProfile, load_profile, profile_names
from pipeline.verify.accumulators import measure_accumulators
from pipeline.verify.compilers import onnxruntime as ort
from pipeline.verify.compilers.engine import Engine, Ran, Refusal
from pipeline.verify.compilers.onnxruntime_engine import OnnxruntimeEngine
from pipeline.verify.compilers.process import RUNNERS, ProcessEngine
from pipeline.verify.cpu import Cpu, read_cpu
from pipeline.verify.kernels import name_nodes
from pipeline.verify.reference import Piece, Reference, Wanted, static_copy
from pipeline.verify.trace import trace

__all__ = [
    "Agreement",
    "TargetRow",
    "compare_targets",
    "measure_target",
    "parse_targets",
    "runnable_targets",
]

OnTarget = Callable[[int, int, Mapping[str, float]], None]

_TRACED = 2  # runs on which the first difference is looked for
_SATURATION = "saturation: x64 without VNNI adds pairs of products in 16 bits"
_FUSED_ADD = (
    "it fuses convolutions with the Add behind them and skips the rounding in between; "
    "`zsq quantize --target openvino` leaves that out"
)
_MODES: tuple[ort.Mode, ...] = ("unoptimized", "optimized", "default")


@dataclass(frozen=True, kw_only=True)
class TargetRow:
    """One target and how far it is from the interpreter.

    Attributes:
        target: its name, and the mode of onnxruntime.
        version: "" if it is not installed.
        skipped: why it was not tried, and how to get it; "" if it was.
        refused: what went wrong, in one line; "" if nothing did.
        compiled, ran: how far it got.
        elements: integers compared; ``differing`` those that differ.
        largest_steps: largest difference; infinite where a NaN or infinity was given.
        allowed_steps: largest difference that is no failure; None: any.
        cause: why it may differ; "" where it may not.
        first: where it parts from the interpreter, if that was found.
        integer_kernels: weighted operators that compute in integers, of how many.
        seconds_per_image: median of the runs, the first left out.
        compile_seconds: of the file.
    """

    target: str
    version: str = ""
    skipped: str = ""
    refused: str = ""
    compiled: bool = False
    ran: bool = False
    elements: int = 0
    differing: int = 0
    largest_steps: float = 0.0
    allowed_steps: int | None = 0
    cause: str = ""
    first: FirstDifference | None = None
    integer_kernels: tuple[int, int] | None = None
    seconds_per_image: float | None = None
    compile_seconds: float | None = None

    @property
    def failed(self) -> bool:
        """It was tried and did not run, or differs by more than it may."""
        if self.skipped:
            return False
        too_far = self.allowed_steps is not None and self.largest_steps > self.allowed_steps
        return not self.ran or too_far

    @property
    def verdict(self) -> str:
        """One of skipped, refused, exact, differs (more than it may) and explained."""
        if self.skipped:
            return "skipped"
        if not self.ran:
            return "refused"
        if not self.differing:
            return "exact"
        return "differs" if self.failed else "explained"

    @property
    def share(self) -> float:
        """Differing integers, as a share of all."""
        return self.differing / self.elements if self.elements else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the fields, ``verdict`` and ``share``."""
        far = self.largest_steps
        return {
            **vars(self),
            "largest_steps": far if math.isfinite(far) else None,
            "first": None if self.first is None else dict(vars(self.first)),
            "integer_kernels": None
            if self.integer_kernels is None
            else list(self.integer_kernels),
            "share": self.share,
            "verdict": self.verdict,
        }

    def note(self) -> str:
        """What a table cannot hold, in one line; "" if there is nothing to say."""
        if self.skipped or self.refused:
            return self.skipped or self.refused
        words = []
        if self.differing:
            allowed = "any" if self.allowed_steps is None else f"{self.allowed_steps}"
            words.append(
                f"{self.cause} ({allowed} steps allowed)" if self.cause else "should be exact"
            )
            if self.first is not None:
                words.append(f"parts at {self.first}")
        return "; ".join(words)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """A file on all targets.

    Attributes:
        model: the file.
        images: images that were run; ``batch`` of them at a time.
        rows: a target each.
        tensors: names of the tensors that were compared.
        float_nodes: nodes in front of integers that the interpreter computes in float32.
        cpu: this CPU.
        seconds: time taken, ``reference_seconds`` of it by the interpreter.
    """

    model: str
    images: int
    batch: int
    rows: tuple[TargetRow, ...]
    tensors: tuple[str, ...]
    float_nodes: tuple[str, ...]
    cpu: Cpu = field(default_factory=read_cpu)
    seconds: float = 0.0
    reference_seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """No target that was tried failed."""
        return not any(row.failed for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            **vars(self),
            "rows": [row.to_dict() for row in self.rows],
            "tensors": list(self.tensors),
            "float_nodes": list(self.float_nodes),
            "cpu": self.cpu.to_dict(),
            "passed": self.passed,
        }


def runnable_targets() -> tuple[str, ...]:
    """Return the targets that can run a network here, once they are installed."""
    names = profile_names()
    return tuple(name for name in names if load_profile(name).verify is not None)


def parse_targets(text: str) -> tuple[TargetProfile, ...]:
    """Read ``all`` or ``openvino,iree``.

    Raises:
        SettingsError: a name that is no target, or one that cannot run a network.
    """
    known = runnable_targets()
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise SettingsError("names no target", where="--targets", hint=f"give all or {known}")
    profiles = [load_profile(name) for name in (known if names == ["all"] else names)]
    for profile in profiles:
        if profile.verify is None:
            raise SettingsError(
                f"'{profile.name}' cannot run a network here",
                where="--targets",
                hint=f"these can: {', '.join(known)}",
            )
    return tuple(dict.fromkeys(profiles))


def compare_targets(
    path: Path,
    images: ImageSet,
    settings: VerifySettings,
    targets: str,
    *,
    on_step: OnTarget | None = None,
) -> Agreement:
    """Run a QDQ file on targets and compare its integers with the interpreter's.

    Args:
        path: the quantized model.
        images: in the model's own layout and normalization.
        settings: number of images, threads, seconds for each request.
        targets: ``all`` or names with commas between them.
        on_step: called after each target.

    Raises:
        SettingsError: a name that is no target.
        VerificationError: the file is not quantized, or no integers lead to its outputs.
        ModelError, IntegerOverflowError: the interpreter cannot run it.
    """
    started = time.perf_counter()
    engines = [
        entry for profile in parse_targets(targets) for entry in _engines(profile, settings)
    ]
    reference = _reference(path, images, settings.max_images)
    interpreted = time.perf_counter() - started
    rows = []
    for done, (name, engine, check) in enumerate(engines):
        if on_step is not None:
            on_step(done, len(engines), {})
        if isinstance(engine, str):
            rows.append(TargetRow(target=name, skipped=engine))
        else:
            rows.append(measure_target(engine, reference, check))
    if on_step is not None:
        on_step(len(engines), len(engines), {})
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


def measure_target(engine: Engine, reference: Reference, check: Check) -> TargetRow:
    """Run one target on all pieces of a file.

    Args:
        engine: the target.
        reference: what the file must give.
        check: what the target's profile allows.
    """
    causes = _causes(check, reference.graph)
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
    if differing:
        chosen = np.flatnonzero(np.any(wrong, axis=0))[:_TRACED]
        first = trace(engine, reference, reference.images[chosen])
    return TargetRow(
        **row, elements=elements, differing=differing, largest_steps=largest, first=first
    )


def _causes(check: Check, graph: QuantizedGraph) -> list[str]:
    """What a target is known to do otherwise on such a file and this CPU."""
    causes = []
    if check.fuses_add and has_rounded_branch(graph):
        causes.append(_FUSED_ADD)
    at_risk = check.saturates and read_cpu().vnni is not True
    if at_risk and any(entry.may_saturate for entry in measure_accumulators(graph)):
        causes.append(_SATURATION)
    return causes


def has_rounded_branch(graph: QuantizedGraph) -> bool:
    """Whether a sum reads what a convolution gave to it alone, quantized in between."""
    for node in graph.nodes:
        for name in node.input if node.op_type in ("Add", "Sub", "Sum") else ():
            reader = graph.producers.get(name)
            if reader is None or reader.op_type != "DequantizeLinear":
                continue
            quantizer = graph.quantizer_of(reader)
            if quantizer is None or not all(
                len(graph.consumers[made.output[0]]) == 1 for made in (quantizer, reader)
            ):
                continue
            maker = graph.producers.get(quantizer.input[0])
            if maker is not None and maker.op_type in ("Relu", "Clip"):
                maker = graph.producers.get(maker.input[0])
            if maker is not None and maker.op_type == "Conv":
                return True
    return False


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


def _engines(
    profile: TargetProfile, settings: VerifySettings
) -> Sequence[tuple[str, Engine | str, Check]]:
    """The rows of a target: an engine, or why there is none."""
    check = profile.verify
    assert check is not None
    if profile.name == "onnxruntime":
        saturating = Check(steps=check.steps, saturates=True)
        return [
            (
                f"onnxruntime {mode}",
                OnnxruntimeEngine(mode=mode, threads=settings.threads),
                saturating if mode == "default" else check,
            )
            for mode in _MODES
        ]
    environment = find_environment(profile)
    if environment is None:
        return [(profile.name, f"not installed: {how_to_get(profile)}", check)]
    engine = ProcessEngine(
        name=profile.name,
        version=environment.version,
        python=environment.python,
        script=RUNNERS / f"{profile.name}.py",
        timeout=settings.timeout,
        threads=settings.threads,
        opset=check.opset,
    )
    return [(profile.name, engine, check)]


def _reference(path: Path, images: ImageSet, limit: int) -> Reference:
    try:
        proto, _ = read_proto(path)
    except ModelError as error:
        raise VerificationError(error.what, where=error.where, hint=error.hint) from error
    graph = QuantizedGraph(proto)
    if not graph.quantizers or len(graph.inputs) != 1:
        raise VerificationError(
            "is not quantized, or has several inputs", where=str(path), hint="see zsq quantize"
        )
    batch = graph.batch or 1
    batches = list(images.batches(batch, limit=limit))
    missing = batch - len(batches[-1])
    if missing:
        filler = np.repeat(batches[-1][-1:], missing, axis=0)
        batches[-1] = np.concatenate([batches[-1], filler])
    return Reference.measure(static_copy(name_nodes(proto), batch), np.stack(batches))
