"""What ran the quantized file for the proof, a row an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["EngineRow", "engines"]


@dataclass(frozen=True, kw_only=True)
class EngineRow:
    """An engine against the unoptimized run.

    Attributes:
        name: the engine and its mode; ``what`` it does, in words.
        images: that it ran; None if it did not.
        elements: integers compared, ``differing`` of them unequal; None where nothing was.
        steps: largest difference in steps.
        verdict: exact, or what else; ``tone`` colors it.
        note: why it did not run, or where it differs.
    """

    name: str
    what: str
    images: int | None
    elements: int | None
    differing: int | None
    steps: float | None
    verdict: str
    tone: Literal["good", "warn", "bad", ""]
    note: str = ""


def engines(proof: Mapping[str, Any]) -> tuple[EngineRow, ...]:
    """Return the rows of a proof in its JSON form; none without one."""
    if not proof:
        return ()
    version = f"onnxruntime {proof.get('onnxruntime')}"
    images = proof.get("images")
    rows = [
        EngineRow(
            name=f"{version}, unoptimized",
            what="every operator by itself, in float between quantizers: the reference here",
            images=images,
            elements=proof.get("elements"),
            differing=None,
            steps=None,
            verdict="reference",
            tone="",
        )
    ]
    for run, what in (
        ("optimized", "integer kernels, exact sums (session.x64quantprecision = 1)"),
        ("default", "integer kernels as this CPU has them"),
    ):
        found = _summed(proof.get("tensors") or [], "unoptimized", run, scaled=True)
        if found is not None:
            row = _row(f"{version}, {run}", what, images, *found)
            if run == "default" and row.differing:
                row = _row(row.name, what, images, *found, tone="warn")
            rows.append(row)
    rows.append(_interpreter(proof.get("interpreter") or {}))
    return tuple(rows)


def _interpreter(found: Mapping[str, Any]) -> EngineRow:
    what = "this tool's own, in integers alone"
    summed = _summed(found.get("tensors") or [], "unoptimized", "interpreter")
    if summed is None or not found.get("images"):
        return EngineRow(
            name="integer interpreter",
            what=what,
            images=None,
            elements=None,
            differing=None,
            steps=None,
            verdict="not run",
            tone="warn",
            note=str(found.get("refused") or found.get("overflow") or ""),
        )
    return _row("integer interpreter", what, found.get("images"), *summed)


def _row(
    name: str,
    what: str,
    images: Any,
    elements: int,
    differing: int,
    steps: float,
    tone: Literal["good", "warn", "bad", ""] | None = None,
) -> EngineRow:
    verdict = "exact" if not differing else "one step" if steps <= 1 else "differs"
    chosen = tone or ("good" if not differing else "warn" if steps <= 1 else "bad")
    return EngineRow(
        name=name,
        what=what,
        images=images,
        elements=elements,
        differing=differing,
        steps=steps,
        verdict=verdict,
        tone=chosen,
    )


def _summed(
    tensors: Any, first: str, second: str, *, scaled: bool = False
) -> tuple[int, int, float] | None:
    """Elements, differing ones and the largest steps of a pair of runs, over integer tensors."""
    found = [
        pair
        for tensor in tensors
        if not scaled or tensor.get("scale") is not None
        for pair in tensor.get("differences") or []
        if pair.get("first") == first and pair.get("second") == second
    ]
    if not found:
        return None
    return (
        sum(pair.get("elements") or 0 for pair in found),
        sum(pair.get("differing") or 0 for pair in found),
        max((_number(pair.get("largest_steps")) for pair in found), default=0.0),
    )


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
