"""The report as one HTML page: what the template needs beyond the report itself."""

from __future__ import annotations

import base64
import functools
import hashlib
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

from pipeline.report.advice import advise, percent_of_outputs
from pipeline.report.charts import STATISTICS, charts_of
from pipeline.report.distribution import distribution
from pipeline.report.engines import engines
from pipeline.report.figures import thumbnails
from pipeline.report.numbers import (
    as_float,
    format_bytes,
    format_count,
    format_number,
    format_seconds,
)
from pipeline.report.verdict import judge

__all__ = ["render_page"]


def render_page(report: Mapping[str, Any], images: npt.NDArray[np.uint8]) -> str:
    """Return the page as HTML text without any outside reference.

    Scripts are allowed by the hash of the one that the template holds, so a name out of a
    model could not run even if it were not escaped.

    Args:
        report: the report in its JSON form.
        images: [n, height, width, 1 or 3] uint8 pictures to show, n may be 0.
    """
    pictures = thumbnails(images)
    generation = report.get("generation") or {}
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            verdict=judge(report),
            advice=advise(report),
            engines=engines(report.get("proof") or {}),
            pictures=pictures,
            num_images=max(len(images), int(as_float(generation.get("num_images")) or 0)),
            picture_size=images.shape[1:3],
            **_facts(report),
            **charts_of(report),
        )
    )


@functools.cache
def _environment() -> jinja2.Environment:
    """The templates, compiled once in a process."""
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
        count=format_count,
        seconds=format_seconds,
        distribution=distribution,
        of_outputs=percent_of_outputs,
        power=_power,
        percent=_percent,
        plain=_plain,
        bar=_bar,
        command=_command,
        csp_hash=_csp_hash,
        name=_name,
    )
    return environment


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


def _command(text: Any) -> Markup:
    """Write a command so that no flag breaks behind its dashes."""
    keep = r'<span class="keep">\g<0></span>'
    return Markup(re.sub(r"(?<![^\s(])--[a-z-]+", keep, str(escape(text))))


def _plain(value: Any) -> str:
    """Write a setting: words for None and truth values, numbers as numbers."""
    if value is None or value in ("", [], ()):
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
    kinds = ("activation", "weight", "bias")
    ranked = sorted(
        tensors,
        key=lambda one: (one.get("kind") in kinds and kinds.index(one["kind"]), _order(one)),
    )
    preprocessing = report.get("preprocessing") or {}
    model = report.get("model") or {}
    model_input = model.get("input") or {}
    shape = model_input.get("shape")
    return {
        "model_name": PurePath(str(model.get("path") or "model")).name,
        "tensors": ranked,
        "costs": {
            cost.get("name"): as_float(cost.get("error"))
            for cost in (report.get("sensitivity") or {}).get("costs") or []
        },
        "num_activations": sum(one.get("kind") == "activation" for one in tensors),
        "float_macs": sum(
            as_float(row.get("macs")) or 0.0
            for row in (report.get("cost") or {}).get("macs_by_width") or []
            if row.get("weights") is None
        ),
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
    for key, title in STATISTICS.items():
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
