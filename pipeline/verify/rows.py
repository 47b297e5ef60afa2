"""What the comparison of targets found: a row each."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from typing import Any

from graph_tools.integer import FirstDifference
from pipeline.verify.cpu import Cpu, read_cpu

__all__ = ["Agreement", "TargetRow"]


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
        allowed_steps: largest difference that is no failure; None: any that is finite.
        cause: why it may differ; "" where it may not.
        first: where it parts from the interpreter, if that was found.
        integer_kernels: weighted operators that compute in integers, of how many.
        seconds_per_image: median of the runs, the first left out.
        compile_seconds: of the file.
        packed: what its converter says of the file, of a target that compiles and does not run.
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
    packed: str | None = None

    @property
    def failed(self) -> bool:
        """It was tried and did not run, or differs by more than it may."""
        if self.skipped:
            return False
        if self.packed is not None:
            return not self.compiled
        allowed = sys.float_info.max if self.allowed_steps is None else self.allowed_steps
        return not self.ran or self.largest_steps > allowed

    @property
    def verdict(self) -> str:
        """One of skipped, refused, compiled, exact, differs (by too much) and explained."""
        if self.skipped:
            return "skipped"
        if self.packed is not None and self.compiled:
            return "compiled"
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
        """Plain data: the fields, ``verdict`` and ``share``; ``packed`` only if it has one."""
        far = self.largest_steps
        values = dict(vars(self))
        if self.packed is None:
            del values["packed"]
        return {
            **values,
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
        if self.packed is not None:
            return self.packed
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
