"""The charts of a report, drawn from its parts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from pipeline.report.figures import Series, histogram_chart, line_chart
from pipeline.report.numbers import as_float, format_number

__all__ = ["STATISTICS", "charts_of"]

_TERMS = {
    "total": "Total loss",
    "statistics": "Loss of the statistics",
    "output": "Output loss",
    "output_weight": "Weight of the output loss",
    "learning_rate": "Learning rate (schedule)",
}
STATISTICS = {"mean": "Error of the mean", "std": "Error of the standard deviation"}


def charts_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the charts of each section, by the name that the template has for them."""
    generation = report.get("generation") or {}
    quantization = report.get("quantization") or {}
    return {
        "loss_charts": _loss_charts(generation.get("history") or []),
        "statistics_charts": _statistics_charts(generation.get("statistics") or []),
        "tensor_charts": _tensor_charts(quantization.get("tensors") or []),
        "outputs": _outputs(quantization.get("outputs") or []),
    }


def _loss_charts(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, Markup, Any, Any]]:
    """Return title, chart, first and last value of every term that is not constant."""
    steps = [as_float(record.get("iteration")) for record in history]
    rising = all(
        a is not None and b is not None and a < b for a, b in itertools.pairwise(steps)
    )
    xs = [
        step if rising and step is not None else float(index)
        for index, step in enumerate(steps)
    ]
    terms = dict.fromkeys(term for record in history for term in record if term != "iteration")
    charts = []
    for term in terms:
        values = [as_float(record.get(term)) for record in history]
        if len(set(values)) < 2:
            continue
        title = _TERMS.get(term, term.replace("_", " ").capitalize())
        chart = line_chart(
            [Series(xs=xs, ys=values)],
            label=f"{title} over the iterations",
            x_label="iteration",
        )
        known = [value for value in values if value is not None]
        if chart is not None:
            charts.append((title, chart, known[0], known[-1]))
    return charts


def _statistics_charts(sites: Sequence[Mapping[str, Any]]) -> list[tuple[str, Markup]]:
    charts = []
    xs = [float(index + 1) for index in range(len(sites))]
    for key, title in STATISTICS.items():
        series = []
        for moment in ("before", "after"):
            ys = [as_float(site.get(f"{key}_error_{moment}")) for site in sites]
            series.append(
                Series(
                    xs=xs,
                    ys=ys,
                    style="muted" if moment == "before" else "main",
                    titles=[
                        f"{site.get('node')}, {moment}: {format_number(y)}"
                        for site, y in zip(sites, ys, strict=True)
                    ],
                )
            )
        chart = line_chart(
            series,
            label=f"{title} at each BatchNormalization, before and after",
            x_label="BatchNormalization, from input to output",
        )
        if chart is not None:
            charts.append((title, chart))
    return charts


def _tensor_charts(tensors: Sequence[Mapping[str, Any]]) -> list[tuple[str, Markup]]:
    charts = []
    for kind, noun in (("activation", "activations"), ("weight", "weights")):
        found = [
            (tensor, sqnr)
            for tensor in tensors
            if tensor.get("kind") == kind
            and (sqnr := as_float(tensor.get("sqnr_db"))) is not None
            and math.isfinite(sqnr)
        ]
        series = Series(
            xs=[float(index + 1) for index in range(len(found))],
            ys=[sqnr for _, sqnr in found],
            titles=[f"{tensor.get('name')}: {sqnr:.1f} dB" for tensor, sqnr in found],
            joined=kind == "activation",
        )
        chart = line_chart(
            [series],
            label=f"SQNR of the {noun} from input to output",
            x_label=f"{noun}, from input to output",
            log=False,
        )
        if chart is not None:
            charts.append((f"SQNR of the {noun}, dB", chart))
    return charts


def _floats(values: Sequence[Any] | None) -> list[float]:
    numbers = [as_float(value) for value in values or []]
    return [math.nan if number is None else number for number in numbers]


def _outputs(outputs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for output in outputs:
        histogram = output.get("histogram") or {}
        chart = histogram_chart(
            *(_floats(histogram.get(key)) for key in ("edges", "float", "quantized")),
            label=f"Distribution of output {escape(str(output.get('name')))}",
            x_label="value",
        )
        rows.append(
            {
                "name": output.get("name"),
                "sqnr_db": output.get("sqnr_db"),
                "agreement": output.get("agreement"),
                "same_top1": output.get("same_top1"),
                "chart": chart,
            }
        )
    return rows
