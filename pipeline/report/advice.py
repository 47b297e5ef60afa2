"""What costs most, and what to type against it, in words."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.report.numbers import as_float, format_number

__all__ = ["Advice", "Suggestion", "advise", "percent_of_outputs"]

_SMALL = 0.01  # relative error of the outputs that is hardly worth an effort
_SPREAD = 0.8  # of the error is left without the worst: it comes from many tensors


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """One tensor that costs much.

    Attributes:
        name: of the tensor; ``what`` it is, in words.
        flag: the words for the command line.
        error: of the outputs with it alone rounded, in words.
    """

    name: str
    what: str
    flag: str
    error: str


@dataclass(frozen=True, kw_only=True)
class Advice:
    """The ranking in words.

    Attributes:
        headline: one sentence.
        suggestions: the worst for which more bits exist.
        outcome: what they gain together, in one sentence; empty if there is nothing to gain.
        further: what else to try where that is little; else empty.
        flags: all of them, as words for the command line.
        rows: every tensor, worst first, each with ``share``: its bar, 0..1.
    """

    headline: str
    suggestions: tuple[Suggestion, ...]
    outcome: str
    further: str
    flags: str
    rows: tuple[dict[str, Any], ...]


def percent_of_outputs(error: Any) -> str:
    """Write a relative error of the outputs."""
    number = as_float(error)
    if number is None:
        return "\N{EN DASH}"
    percent = 100 * number
    return f"{format_number(percent, 0 if percent >= 10 else 1 if percent >= 1 else 2)} %"


def advise(report: Mapping[str, Any]) -> Advice | None:
    """Put ``report['sensitivity']`` into words; None if nothing was measured."""
    found = report.get("sensitivity") or {}
    costs = [
        cost for cost in found.get("costs") or [] if as_float(cost.get("error")) is not None
    ]
    if not costs:
        return None
    by_name = {cost.get("name"): cost for cost in costs}
    worst = [by_name[name] for name in found.get("widened") or [] if name in by_name]
    total, widened = as_float(found.get("error")), as_float(found.get("widened_error"))
    largest = max(as_float(cost["error"]) or 0.0 for cost in costs)
    suggestions = tuple(
        Suggestion(
            name=str(cost.get("name")),
            what=_what(cost),
            flag=shlex.join(["--bits", str(cost.get("flag"))]),
            error=percent_of_outputs(cost.get("error")),
        )
        for cost in worst
    )
    outcome = ""
    if suggestions and total is not None and widened is not None:
        these = "these two" if len(worst) == 2 else "these three"
        outcome = (
            f"With {'it' if len(worst) == 1 else these} in more bits the error of the outputs is "
            f"{percent_of_outputs(widened)} instead of {percent_of_outputs(total)} (measured, "
            "at the same thresholds)."
        )
    further = ""
    if outcome and total and widened and total >= _SMALL and widened > _SPREAD * total:
        settings = report.get("settings") or {}
        few = any(
            cost.get("kind") == "weight" and (cost.get("bits") or 8) < 8 for cost in costs
        )
        learn = few and settings.get("rounding") == "nearest"
        remedy = "learned rounding (--rounding adaround)" if learn else "more bits everywhere"
        further = f"Most of the error is spread over many tensors: {remedy} will do more."
    return Advice(
        headline=_headline(worst, total),
        suggestions=suggestions,
        outcome=outcome,
        further=further,
        flags=" ".join(suggestion.flag for suggestion in suggestions),
        rows=tuple(
            {**cost, "share": (as_float(cost["error"]) or 0.0) / largest if largest else 0.0}
            for cost in costs
        ),
    )


def _what(cost: Mapping[str, Any]) -> str:
    bits, wider = cost.get("bits"), cost.get("wider")
    if cost.get("kind") == "weight":
        return f"weight of {cost.get('node')}, {bits} bits: try {wider}"
    if cost.get("node") == "(input)":
        return f"the input, {bits} bits: try {wider}"
    return f"made by {cost.get('node')}, {bits} bits: try {wider}"


def _headline(worst: list[Mapping[str, Any]], total: float | None) -> str:
    if not worst:
        return "Everything has the most bits that exist already."
    subject = {1: "This tensor costs", 2: "These two tensors cost"}.get(
        len(worst), "These three tensors cost"
    )
    if total is not None and total < _SMALL:
        return (
            f"All roundings together change the outputs by {percent_of_outputs(total)} only; "
            f"{subject[0].lower()}{subject[1:]} most of it."
        )
    widths = sorted({int(cost.get("wider") or 0) for cost in worst})
    return f"{subject} most: try {' or '.join(map(str, widths))} bits here."
