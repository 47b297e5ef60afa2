"""The verdict of the page beyond its first sentence, in whole sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.report.numbers import as_float, format_bytes, format_count, format_number

__all__ = ["basis", "sentences"]

_BASES = {
    "prior": "images from an image prior, no statistics of the training data: accuracy cannot be "
    "promised",
    "noise": "images of Gaussian noise, which tell nothing of the training data",
}


def basis(report: Mapping[str, Any]) -> list[str]:
    """Say what the calibration rests on, in words."""
    method = str((report.get("generation") or {}).get("method"))
    restoration = report.get("restoration") or {}
    if method == "dgh" and restoration.get("restored"):
        restored, candidates = (
            format_number(restoration.get(key)) for key in ("restored", "candidates")
        )
        return [
            f"images match BatchNormalization statistics restored from a side file at {restored} "
            f"of {candidates} nodes"
        ]
    return [_BASES[method]] if method in _BASES else []


def sentences(report: Mapping[str, Any]) -> tuple[str, ...]:
    """Say how good the file is, what it takes, and what to look at."""
    return tuple(
        sentence
        for part in (_quality, _resources, _kernels, _beginnings)
        for sentence in part(report)
    )


def _quality(report: Mapping[str, Any]) -> Iterator[str]:
    found = report.get("evaluation") or []
    boxes = any("mAP@0.5" in row for row in found)
    key, name = ("mAP@0.5", "mAP@0.5") if boxes else ("top1", "top-1")
    rows = [row for row in found if as_float(row.get(key)) is not None]
    if len(rows) > 1:
        first, last = (as_float(row[key]) or 0.0 for row in (rows[0], rows[-1]))
        change = f"{'+' if last >= first else ''}{format_number(last - first, 2)} points"
        yield (
            f"On {format_number(rows[-1].get('count'))} labeled images {name} goes from "
            f"{format_number(first, 2)} to {format_number(last, 2)} % ({change})."
        )
        return
    fidelity = report.get("fidelity") or {}
    estimate = fidelity.get("estimate") or {}
    if as_float(estimate.get("drop")) is not None:
        low, high = (format_number(estimate.get(key), 1) for key in ("low", "high"))
        yield (
            f"Estimated without labels, top-1 falls by {format_number(estimate['drop'], 1)} "
            f"points (most likely {low} to {high})."
        )
    yield from _outputs((report.get("quantization") or {}).get("outputs") or [])


def _outputs(outputs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    known = [
        (sqnr, output)
        for output in outputs
        if (sqnr := as_float(output.get("sqnr_db"))) is not None
    ]
    if known:
        sqnr, output = min(known, key=lambda pair: pair[0])
        which = (
            f"the worst output, {output.get('name')}, has" if len(outputs) > 1 else "it has"
        )
        yield (
            f"Against the float network {which} a signal-to-noise ratio of "
            f"{format_number(sqnr, 1)} dB on the calibration images."
        )


def _resources(report: Mapping[str, Any]) -> Iterator[str]:
    cost = report.get("cost") or {}
    sizes, total = cost.get("parameter_bytes") or {}, as_float(cost.get("macs"))
    words = []
    if sizes.get("quantized"):
        words.append(
            f"weights take {format_bytes(sizes['quantized'])} instead of "
            f"{format_bytes(sizes.get('float'))}"
        )
    widths = [row for row in cost.get("macs_by_width") or [] if row.get("weights")]
    if total and widths:
        share = sum(as_float(row.get("macs")) or 0.0 for row in widths) / total
        kinds = ", ".join(
            f"{row['weights']}\N{MULTIPLICATION SIGN}{row['activations']}"
            for row in widths[:3]
        )
        amount = "all" if share > 0.9999 else f"{format_number(100 * share, 1)} % of"
        words.append(
            f"{amount} {format_count(total)} multiply-accumulates an image are in integers "
            f"({kinds} bits)"
        )
    if words:
        text = "; ".join(words)
        yield f"{text[0].upper()}{text[1:]}."


def _kernels(report: Mapping[str, Any]) -> Iterator[str]:
    kernels = (report.get("proof") or {}).get("kernels") or {}
    integer = kernels.get("num_integer") or 0
    computing = integer + len(kernels.get("float") or [])
    if computing:
        yield f"In onnxruntime {integer} of {computing} compute nodes are integer kernels."


def _beginnings(report: Mapping[str, Any]) -> Iterator[str]:
    mixed = (report.get("quantization") or {}).get("mixed_precision") or {}
    for text in (*basis(report), *([mixed["note"]] if mixed.get("note") else [])):
        yield f"{text[0].upper()}{text[1:]}."
