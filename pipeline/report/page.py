"""The report as one HTML page: what the template needs beyond the report itself."""

from __future__ import annotations

import base64
import hashlib
import itertools
import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape

from pipeline.report.figures import Series, histogram_chart, line_chart, thumbnails
from pipeline.report.numbers import as_float, format_bytes, format_number, format_seconds
from pipeline.report.verdict import judge

__all__ = ["render_page"]

_TERMS = {
    "total": "Total loss",
    "statistics": "Loss of the statistics",
    "output": "Output loss",
    "output_weight": "Weight of the output loss",
    "learning_rate": "Learning rate (schedule)",
}
_STATISTICS = {"mean": "Error of the mean", "std": "Error of the standard deviation"}


def render_page(report: Mapping[str, Any], images: npt.NDArray[np.uint8]) -> str:
    """Return the page as HTML text without any outside reference.

    Scripts are allowed by the hash of the one that the template holds, so a name out of a
    model could not run even if it were not escaped.

    Args:
        report: the report in its JSON form.
        images: [n, height, width, 1 or 3] uint8 pictures to show, n may be 0.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline", "report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.ChainableUndefined,
        finalize=lambda value: "\N{EN DASH}" if value is None else value,
    )
    environment.filters.update(
        number=format_number,
        bytes=format_bytes,
        seconds=format_seconds,
        power=_power,
        percent=_percent,
        plain=_plain,
        bar=_bar,
        csp_hash=_csp_hash,
        name=_name,
    )
    pictures = thumbnails(images)
    generation = report.get("generation") or {}
    return environment.get_template("report.html.j2").render(
        report=report,
        verdict=judge(report),
        pictures=pictures,
        num_images=max(len(images), int(as_float(generation.get("num_images")) or 0)),
        picture_size=images.shape[1:3],
        **_facts(report),
        **_charts(report),
    )


def _csp_hash(script: str) -> str:
    """Return a script's source expression for a Content-Security-Policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _percent(share: Any) -> str:
    """Write a share of 1 in percent, never rounding a small one to nothing."""
    number = as_float(share)
    if number is None:
        return "\N{EN DASH}"
    return f"{100 * number:.2g} %" if abs(number) < 0.1 else f"{100 * number:.3g} %"


def _power(exponent: Any) -> Markup | str:
    """Write ``2**exponent``, or the range of a per-channel pair."""
    if isinstance(exponent, Sequence) and not isinstance(exponent, str):
        ends = sorted(set(exponent), key=lambda end: as_float(end) or 0.0)
        dots = Markup(" \N{HORIZONTAL ELLIPSIS} ")
        return dots.join(_power(end) for end in ends) if ends else "\N{EN DASH}"
    number = as_float(exponent)
    if number is None:
        return "\N{EN DASH}"
    return Markup("2<sup>{}</sup>").format(format_number(number))


def _name(name: Any) -> Markup:
    """Write a name from the graph so that it can break after a separator."""
    text = str(escape("" if name is None else name))
    return Markup(re.sub(r"(?<=.)[/_.:](?=\w)", r"\g<0><wbr>", text))


def _plain(value: Any) -> str:
    """Write a setting: words for None and truth values, numbers as numbers."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_plain(item) for item in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_plain(item)}" for key, item in value.items())
    return str(value)


def _bar(sqnr_db: Any) -> Markup:
    """Draw an SQNR on a bar from 0 to 60 dB."""
    number = as_float(sqnr_db)
    if number is None:
        return Markup()
    width = min(max(number, 0.0), 60.0) / 60
    return Markup(
        '<span class="bar" aria-hidden="true"><i style="width:{:.0%}"></i></span>'
    ).format(width)


def _order(tensor: Mapping[str, Any]) -> float:
    number = as_float(tensor.get("sqnr_db"))
    return math.inf if number is None else min(number, 1e9)


def _facts(report: Mapping[str, Any]) -> dict[str, Any]:
    tensors = (report.get("quantization") or {}).get("tensors") or []
    ranked = sorted(tensors, key=_order)
    preprocessing = report.get("preprocessing") or {}
    model = report.get("model") or {}
    model_input = model.get("input") or {}
    shape = model_input.get("shape")
    return {
        "model_name": PurePath(str(model.get("path") or "model")).name,
        "activations": [one for one in ranked if one.get("kind") == "activation"],
        "parameters": [one for one in ranked if one.get("kind") != "activation"],
        "input_range": _input_range(preprocessing),
        "num_channels": shape[2 if model_input.get("layout") == "NHWC" else 0] if shape else 0,
        "quantization_notes": [
            note
            for note in (report.get("quantization") or {}).get("notes") or []
            if note not in (model.get("notes") or [])
        ],
        "accumulators": sorted(
            ((report.get("proof") or {}).get("accumulators") or {}).get("nodes") or [],
            key=lambda node: -(as_float(node.get("largest")) or 0.0),
        ),
        "absorbed": _grouped((report.get("quantization") or {}).get("absorbed") or []),
        "match": _match((report.get("generation") or {}).get("statistics") or []),
        "total_seconds": sum(
            as_float(seconds) or 0.0 for seconds in (report.get("times") or {}).values()
        ),
    }


def _input_range(preprocessing: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the least and greatest value that a pixel can take in the model's units."""
    means = [as_float(mean) for mean in preprocessing.get("mean") or []]
    stds = [as_float(std) for std in preprocessing.get("std") or []]
    pairs = [
        (mean, std) for mean, std in zip(means, stds, strict=False) if mean is not None and std
    ]
    if not pairs:
        return None
    return min(-mean / std for mean, std in pairs), max(
        (1 - mean) / std for mean, std in pairs
    )


def _grouped(nodes: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    return Counter(str(node.get("op_type")) for node in nodes).most_common()


def _match(sites: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the median and worst error over all sites, before and after, per statistic."""
    rows = []
    for key, title in _STATISTICS.items():
        after = [(as_float(site.get(f"{key}_error_after")), site) for site in sites]
        known = [(error, site) for error, site in after if error is not None]
        before = [
            error
            for site in sites
            if (error := as_float(site.get(f"{key}_error_before"))) is not None
        ]
        if known:
            worst, site = max(known, key=lambda pair: pair[0])
            rows.append(
                {
                    "title": title,
                    "before": statistics.median(before) if before else None,
                    "after": statistics.median(error for error, _ in known),
                    "worst": worst,
                    "node": site.get("node"),
                }
            )
    return rows


def _charts(report: Mapping[str, Any]) -> dict[str, Any]:
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
    for key, title in _STATISTICS.items():
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
                "chart": chart,
            }
        )
    return rows
