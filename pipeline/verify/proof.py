"""What `verify` found out about one quantized file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from graph_tools.digests import Changes
from pipeline.verify.accumulators import Accumulator
from pipeline.verify.cpu import Cpu
from pipeline.verify.differences import Difference
from pipeline.verify.interpreter import Interpreted
from pipeline.verify.kernels import Kernels
from pipeline.verify.scales import ScaleCheck
from pipeline.verify.stepwise import Stepwise

__all__ = ["Proof", "Saturation", "TensorProof"]

_SHOWN = 5
_REMEDY = "which `zsq quantize --weight-range 7bit` rules out"


@dataclass(frozen=True, kw_only=True)
class TensorProof:
    """One compared tensor.

    Attributes:
        name: the graph output, or the tensor that a QuantizeLinear reads.
        kind: ``integer output``: a graph output that holds dequantized integers; ``float
            output``: something in float lies between the last integers and it; ``last
            integers``: the quantized tensor in front of a float tail; ``decision``: a graph
            output of integers or booleans, compared exactly.
        scale: one step of its integers; None for a float output or a decision.
        feeds: the float outputs it feeds; empty for graph outputs.
        differences: one for each pair of runs: unoptimized and optimized, unoptimized and
            default, optimized and default.
    """

    name: str
    kind: Literal["integer output", "float output", "last integers", "decision"]
    scale: float | None
    feeds: tuple[str, ...]
    differences: tuple[Difference, ...]

    def between(self, first: str, second: str) -> Difference:
        """The difference of two runs by name."""
        return next(d for d in self.differences if (d.first, d.second) == (first, second))

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the fields."""
        return {
            "name": self.name,
            "kind": self.kind,
            "scale": self.scale,
            "feeds": list(self.feeds),
            "differences": [difference.to_dict() for difference in self.differences],
        }


@dataclass(frozen=True, kw_only=True)
class Saturation:
    """What this CPU's default 8-bit kernels cost: the optimized run against the default run.

    Attributes:
        saturates: the two runs differ somewhere in integers.
        share: largest share of differing elements over the integer tensors.
        largest_steps: largest difference in steps.
        rows: images whose first choice was compared, over [N, classes] outputs.
        top1_changes: how many of them change their first choice.
        nodes_at_risk: nodes whose weights could saturate on some x64 CPU without VNNI.
        cpu: this CPU.
    """

    saturates: bool
    share: float
    largest_steps: float
    rows: int
    top1_changes: int
    nodes_at_risk: tuple[str, ...]
    cpu: Cpu

    @property
    def top1_change_share(self) -> float | None:
        """Share of first choices that change; None when no output has classes."""
        return self.top1_changes / self.rows if self.rows else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the fields, ``top1_change_share``."""
        return {
            **vars(self),
            "nodes_at_risk": list(self.nodes_at_risk),
            "cpu": self.cpu.to_dict(),
            "top1_change_share": self.top1_change_share,
        }


@dataclass(frozen=True, kw_only=True)
class Proof:
    """Everything that was checked, and whether it holds.

    Attributes:
        model: the file.
        onnxruntime: version of the runtime.
        images: images compared.
        tensors: what was compared, graph outputs first.
        kernels: integer kernels and nodes in float.
        saturation: cost of the default kernels on this CPU.
        scales: scales, zero points and bias scales.
        accumulators: worst case of every weighted node.
        failures: what does not hold, in words; the proof passes when there is none.
        warnings: what holds but may surprise.
        seconds: time taken.
        interpreted: the integer interpreter against both runs.
        changes: what is not as it was written; None for a file without digests.
        stepwise: where float sums round and runs differ, each tensor from equal integers; no
            difference fails the proof if these are within one step.
    """

    model: str
    onnxruntime: str
    images: int
    tensors: tuple[TensorProof, ...]
    kernels: Kernels
    saturation: Saturation
    scales: ScaleCheck
    accumulators: tuple[Accumulator, ...]
    failures: tuple[str, ...]
    warnings: tuple[str, ...]
    seconds: float
    stepwise: Stepwise | None = None
    interpreted: Interpreted = field(default_factory=Interpreted)
    changes: Changes | None = None

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    @property
    def integer_tensors(self) -> tuple[TensorProof, ...]:
        """The compared tensors that hold integers."""
        return tuple(tensor for tensor in self.tensors if tensor.scale is not None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; the keys are stable.

        ``passed``, ``model``, ``onnxruntime``, ``images``, ``seconds``, ``failures``,
        ``warnings``: as the fields; ``elements``, ``differing``: of the integer tensors,
        unoptimized against optimized run; ``tensors``: list of `TensorProof`; ``kernels``:
        `Kernels`; ``stepwise``: `Stepwise` or None; ``interpreter``: `Interpreted`;
        ``changes``: `Changes` or None; ``saturation``: `Saturation`; ``scales``:
        `ScaleCheck`; ``accumulators``: ``largest_bits`` (0 without weighted nodes),
        ``simulation_exact`` (all of them) and ``nodes``, list of `Accumulator`.
        """
        elements, differing = self._compared()
        return {
            "passed": self.passed,
            "model": self.model,
            "onnxruntime": self.onnxruntime,
            "images": self.images,
            "seconds": self.seconds,
            "elements": elements,
            "differing": differing,
            "failures": list(self.failures),
            "warnings": list(self.warnings),
            "tensors": [tensor.to_dict() for tensor in self.tensors],
            "kernels": self.kernels.to_dict(),
            "stepwise": None if self.stepwise is None else self.stepwise.to_dict(),
            "interpreter": self.interpreted.to_dict(),
            "changes": None if self.changes is None else self.changes.to_dict(),
            "saturation": self.saturation.to_dict(),
            "scales": self.scales.to_dict(),
            "accumulators": {
                "largest_bits": max((entry.bits for entry in self.accumulators), default=0),
                "simulation_exact": all(entry.simulation_exact for entry in self.accumulators),
                "nodes": [entry.to_dict() for entry in self.accumulators],
            },
        }

    def summary_lines(self) -> tuple[str, ...]:
        """The proof in a few lines for a terminal, verdict last."""
        lines = [
            *(_tensor_line(tensor) for tensor in self.tensors),
            self.interpreted.line(),
            _contents_line(self.changes),
            self._scale_line(),
            self._kernel_line(),
            *self._float_lines(),
            *self._accumulator_lines(),
            self._saturation_line(),
            *(f"warning: {text}" for text in self.warnings),
            *(f"failure: {text}" for text in self.failures),
        ]
        elements, differing = self._compared()
        verdict = (
            f"{differing:,} of {elements:,} integer elements differ, {self.images} images, "
            f"onnxruntime {self.onnxruntime}"
        )
        return (*lines, f"{'PASSED' if self.passed else 'FAILED'}: {verdict}")

    def _compared(self) -> tuple[int, int]:
        pairs = [t.between("unoptimized", "optimized") for t in self.integer_tensors]
        return sum(pair.elements for pair in pairs), sum(pair.differing for pair in pairs)

    def _scale_line(self) -> str:
        scales = self.scales
        return (
            f"scales: {scales.num_scales - len(scales.not_power_of_two) - len(scales.free)} of "
            f"{scales.num_scales} Q/DQ scales are powers of two, "
            f"{_free_words(scales)}"
            f"{len(scales.asymmetric_zero_points)} zero points are out of place, "
            f"{scales.num_biases - len(scales.bias_mismatches)} of {scales.num_biases} bias "
            "scales are input times weight"
        )

    def _kernel_line(self) -> str:
        counts = ", ".join(f"{n} {op}" for op, n in sorted(self.kernels.counts.items()))
        num_floats = len(self.kernels.floats)
        tail = f"{num_floats} stay in float" if num_floats else "none stays in float"
        return (
            f"integer kernels: {counts or 'none'}; of {len(self.kernels.nodes)} nodes {tail}"
        )

    def _float_lines(self) -> Iterable[str]:
        reasons: dict[str, list[str]] = {}
        for node in self.kernels.floats:
            reasons.setdefault(node.reason, []).append(f"{node.op_type} {node.node}")
        for reason, nodes in list(reasons.items())[:_SHOWN]:
            more = f" and {len(nodes) - _SHOWN} more" if len(nodes) > _SHOWN else ""
            yield f"  in float: {', '.join(nodes[:_SHOWN])}{more}: {reason}"
        if len(reasons) > _SHOWN:
            rest = sum(len(nodes) for nodes in list(reasons.values())[_SHOWN:])
            yield f"  in float: {rest} more nodes, for {len(reasons) - _SHOWN} more reasons"

    def _accumulator_lines(self) -> Iterable[str]:
        if self.accumulators:
            worst = max(self.accumulators, key=lambda entry: entry.largest)
            inexact = sum(not entry.simulation_exact for entry in self.accumulators)
            exact = f"not exact in {inexact} nodes" if inexact else "exact in every node"
            yield (
                f"accumulators: at most {worst.bits} bits ({worst.node}); simulation in float "
                f"is {exact}"
            )

    def _saturation_line(self) -> str:
        it, cpu = self.saturation, self.saturation.cpu
        if not it.saturates:
            risk = len(it.nodes_at_risk)
            others = (
                f"; on x64 CPUs without VNNI up to {risk} nodes could, {_REMEDY}"
                if risk
                else ""
            )
            return f"saturation: none measured on this CPU ({cpu.describe()}){others}"
        top1 = f", {it.top1_changes} of {it.rows} first choices" if it.rows else ""
        return (
            f"saturation: this CPU ({cpu.describe()}) saturates: without "
            f"session.x64quantprecision=1 {100 * it.share:.2f} % of elements change, by up to "
            f"{it.largest_steps:g} steps{top1}; {_REMEDY}"
        )


def _contents_line(changes: Changes | None) -> str:
    if changes is None:
        return "contents: the file has no digests, so they were not compared"
    count = len(changes.tensors) + len(changes.nodes) + len(changes.missing)
    if not count:
        return "contents: all tensors and nodes are as they were written"
    return f"contents: {count} tensors and nodes are not as they were written"


def _free_words(scales: ScaleCheck) -> str:
    free = len(scales.free)
    return f"{free} of weights and biases are free, as the file says, " if free else ""


def _tensor_line(tensor: TensorProof) -> str:
    pair = tensor.between("unoptimized", "optimized")
    if tensor.scale is None:
        size = f"by at most {pair.largest_absolute:.3g} ({100 * pair.largest_relative:.3g} %)"
    else:
        size = f"by at most {pair.largest_steps:g} steps"
    return (
        f"{tensor.kind} {tensor.name}: {pair.differing:,} of {pair.elements:,} elements "
        "differ between unoptimized and optimized run"
        + (f", {size}" if pair.differing else "")
    )
