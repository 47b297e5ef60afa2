"""The verdict in words: what a reader must know before anything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.report.numbers import as_float, format_bytes, format_count, format_number
from pipeline.report.summary import basis, sentences

__all__ = ["Fact", "Tone", "Verdict", "judge"]

Tone = Literal["good", "warn", "bad", ""]
_GOOD: Tone = "good"
_WARN: Tone = "warn"
_BAD: Tone = "bad"
_POOR_SQNR_DB = 10.0
_POOR_AGREEMENT = 0.8
_POOR_DROP = 5.0  # points
_ARROW = " \N{RIGHTWARDS ARROW} "


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One number of the strip below the verdict."""

    label: str
    value: str
    detail: str = ""
    tone: Tone = ""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What stands at the top.

    Attributes:
        title: of the page.
        lead: the first sentence, without a period; ``tone`` colors it.
        clauses: more for a terminal, a line each.
        sentences: more for the page.
        facts: the same in figures.
    """

    title: str
    lead: str
    tone: Tone
    clauses: tuple[str, ...]
    sentences: tuple[str, ...]
    facts: tuple[Fact, ...]


def judge(report: Mapping[str, Any]) -> Verdict:
    """Sum the report up.

    Args:
        report: the report in its JSON form; parts that are None are passed over.
    """
    quantization = report.get("quantization") or {}
    weights, activations = (
        quantization.get(key) or "?" for key in ("weight_bits", "activation_bits")
    )
    bits = f"W{weights}A{activations}"
    scales = "power of two"
    if not quantization.get("power_of_two"):
        free = (report.get("settings") or {}).get("weight_scale") == "free"
        scales = "free weight scales" if free else "not power of two"
    proved, tone, proof_facts, proof_clauses = _proof(report.get("proof"))
    clauses, facts = [*proof_clauses], [*proof_facts]
    clauses += basis(report)
    quality = (report.get("generation") or {}).get("quality") or {}
    clauses += [f"images: {quality['line']}"] if quality.get("line") else []
    mixed = quantization.get("mixed_precision")
    clauses += [mixed["note"]] if mixed else []
    for clause, fact in (
        _sqnr(quantization.get("outputs") or []),
        _accuracy(report.get("evaluation") or []),
        _estimate(report),
        _size(quantization.get("bytes") or {}),
        _macs(report.get("cost") or {}),
    ):
        clauses += [clause] if clause else []
        facts += [fact] if fact else []
    if tone == _GOOD and any(fact.tone == _BAD for fact in facts):
        tone = _WARN  # exact, but not close to the float network
    return Verdict(
        title=bits,
        lead=f"{bits}, {scales}, {proved}",
        tone=tone,
        clauses=tuple(clauses),
        sentences=sentences(report),
        facts=tuple(facts),
    )


def _sqnr(outputs: Sequence[Mapping[str, Any]]) -> tuple[str, Fact | None]:
    known = [
        (sqnr, output)
        for output in outputs
        if (sqnr := as_float(output.get("sqnr_db"))) is not None
    ]
    if not known:
        return _agreement(outputs)
    sqnr, output = min(known, key=lambda pair: pair[0])
    several = len(outputs) > 1
    text = f"{format_number(sqnr, 1)} dB"
    return (
        f"{'worst ' if several else ''}output SQNR {text}",
        Fact(
            label="Worst output SQNR" if several else "Output SQNR",
            value=text,
            tone=_BAD if sqnr < _POOR_SQNR_DB else "",
            detail=f"{output.get('name')}, of {len(outputs)} outputs" if several else "",
        ),
    )


def _agreement(outputs: Sequence[Mapping[str, Any]]) -> tuple[str, Fact | None]:
    """What there is to say of outputs that are integers, all of them."""
    known = [
        (share, output)
        for output in outputs
        if (share := as_float(output.get("agreement"))) is not None
    ]
    if not known:
        return "", None
    share, output = min(known, key=lambda pair: pair[0])
    text = f"{format_number(100 * share, 1)} %"
    return (
        f"{text} of output {output.get('name')} as in float",
        Fact(label="As in float", value=text, tone=_BAD if share < _POOR_AGREEMENT else ""),
    )


def _accuracy(rows: Sequence[Mapping[str, Any]]) -> tuple[str, Fact | None]:
    key, name, label = "top1", "top-1", "Top-1, %"
    if any("mAP@0.5" in row for row in rows):
        key, name, label = "mAP@0.5", "mAP@0.5", "mAP@0.5, %"
    known = [(value, row) for row in rows if (value := as_float(row.get(key))) is not None]
    if not known:
        return "", None
    first, last = known[0][0], known[-1][0]
    count = format_number(known[-1][1].get("count"))
    if len(known) == 1:
        text = format_number(last, 1)
        return f"{name} {text}", Fact(label=label, value=text, detail=f"{count} images")
    text = format_number(first, 1) + _ARROW + format_number(last, 1)
    points = f"{'+' if last > first else ''}{format_number(last - first, 2)} points"
    return f"{name} {text}", Fact(label=label, value=text, detail=f"{points}, {count} images")


def _estimate(report: Mapping[str, Any]) -> tuple[str, Fact | None]:
    estimate = (report.get("fidelity") or {}).get("estimate") or {}
    drop = as_float(estimate.get("drop"))
    if drop is None or report.get("evaluation"):
        return "", None
    low, high = (format_number(estimate.get(key), 1) for key in ("low", "high"))
    text = f"{format_number(drop, 1)} points"
    return (
        f"estimated loss of top-1, without labels: {text} ({low} to {high})",
        Fact(
            label="Estimated loss of top-1",
            value=text,
            detail=f"{low} to {high}, no labels",
            tone=_BAD if drop > _POOR_DROP else "",
        ),
    )


def _macs(cost: Mapping[str, Any]) -> tuple[str, Fact | None]:
    rows, total = cost.get("macs_by_width") or [], as_float(cost.get("macs"))
    if not total:
        return "", None
    integer = sum(as_float(row.get("macs")) or 0.0 for row in rows if row.get("weights"))
    share = f"{format_number(100 * integer / total, 1).removesuffix('.0')} % in integers"
    return "", Fact(label="MACs an image", value=format_count(total), detail=share)


def _size(sizes: Mapping[str, Any]) -> tuple[str, Fact | None]:
    if not sizes.get("quantized"):
        return "", None
    detail = f"float {format_bytes(sizes.get('float'))}"
    return "", Fact(label="File size", value=format_bytes(sizes["quantized"]), detail=detail)


def _proof(
    proof: Mapping[str, Any] | None,
) -> tuple[str, Tone, list[Fact], list[str]]:
    """Return the lead's end, its tone, the facts and the clauses that the proof gives."""
    if not proof:
        fact = Fact(label="Bit-exact", value="not checked", tone="warn")
        return "not verified", "warn", [fact], []
    images = f"{format_number(proof.get('images'))} images"
    elements, differing = proof.get("elements") or 0, proof.get("differing") or 0
    counted = f"{format_number(differing)} of {format_number(elements)} elements differ"
    if differing and proof.get("passed"):
        how = (
            "within one step, tensor by tensor,"
            if proof.get("stepwise")
            else "within one step"
        )
        lead, tone = f"proved {how} on {images} in onnxruntime ({counted})", _WARN
        value = "one step"
    elif differing:
        lead, tone, value = f"not bit-exact: {counted} in onnxruntime", _BAD, "no"
    elif not proof.get("passed"):
        lead, tone, value = "verification failed", _BAD, "yes" if elements else "not checked"
    elif not elements:
        lead, tone = f"ran on {images}, but no tensor holds integers to compare", _WARN
        value = "not checked"
    else:
        lead, tone, value = f"proved bit-exact on {images} in onnxruntime", _GOOD, "yes"
    fact = Fact(
        label="Bit-exact",
        value=value,
        detail=f"{images}, {counted}" if elements else images,
        tone=tone,
    )
    clause, kernel_fact = _kernels(proof.get("kernels") or {})
    return (
        lead,
        tone,
        [fact, kernel_fact] if kernel_fact else [fact],
        [clause] if clause else [],
    )


def _kernels(kernels: Mapping[str, Any]) -> tuple[str, Fact | None]:
    num_integer = kernels.get("num_integer") or 0
    num_computing = num_integer + len(kernels.get("float") or [])
    if not num_computing:
        return "", None
    absorbed = kernels.get("num_absorbed")
    return (
        f"{num_integer} of {num_computing} compute nodes are integer kernels",
        Fact(
            label="Integer kernels",
            value=f"{num_integer} of {num_computing}",
            detail=f"{absorbed} more nodes absorbed" if absorbed else "",
        ),
    )
