"""The distribution of one tensor as a line of a table: its values, and where they are cut off."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from pipeline.report.numbers import as_float, format_number

__all__ = ["distribution"]

_WIDTH, _HEIGHT = 132.0, 30.0


def distribution(row: Mapping[str, Any]) -> Markup:
    """Draw a tensor's histogram with its threshold; counts on a logarithmic axis.

    Args:
        row: of the report's ``quantization.tensors``.

    Returns:
        An ``<svg>`` element; nothing where no histogram was kept.
    """
    histogram = row.get("histogram") or {}
    low, high = as_float(histogram.get("low")), as_float(histogram.get("high"))
    counts = [as_float(count) or 0.0 for count in histogram.get("counts") or []]
    if low is None or high is None or not low < high or not any(counts):
        return Markup()
    relative = bool(histogram.get("relative"))
    threshold = 1.0 if relative else as_float(row.get("threshold"))
    peak = math.log1p(max(counts))

    def x_at(value: float) -> float:
        return _WIDTH * (value - low) / (high - low)

    step = _WIDTH / len(counts)
    parts = [f"M0 {_HEIGHT:g}"]
    before = None
    for index, count in enumerate(counts):
        y = f"{_HEIGHT - (_HEIGHT - 3) * math.log1p(count) / peak:.3g}"
        if y != before:
            parts.append(f"H{index * step:.4g}V{y}")
        before = y
    parts.append(f"H{_WIDTH:g}V{_HEIGHT:g}Z")
    edges = [] if threshold is None else [threshold, -threshold] if low < 0 else [threshold]
    lines = [
        f'<line class="edge" x1="{x:.4g}" x2="{x:.4g}" y1="0" y2="{_HEIGHT:g}"/>'
        for edge in edges
        for x in [min(max(x_at(edge), 0.7), _WIDTH - 0.7)]
    ]
    cut = [
        f'<rect class="cut" x="{left:.4g}" y="0" width="{right - left:.4g}" height="{_HEIGHT:g}"/>'
        for left, right in _outside(edges, x_at)
        if right - left > 0.5
    ]
    what = "values over their channel's threshold" if relative else "values"
    said = f"{what} from {format_number(low)} to {format_number(high)}"
    if threshold is not None and not relative:
        said += f", threshold {format_number(threshold)}"
    return Markup(
        '<svg class="dist" viewBox="0 0 {} {}" role="img" aria-label="{}"><title>{}</title>{}'
        '<path d="{}"/>{}</svg>'
    ).format(
        f"{_WIDTH:g}",
        f"{_HEIGHT:g}",
        said,
        said,
        Markup("".join(cut)),
        "".join(parts),
        Markup("".join(lines)),
    )


def _outside(edges: list[float], x_at: Any) -> list[tuple[float, float]]:
    """What lies beyond the threshold, left to right in the drawing."""
    if not edges:
        return []
    right = (x_at(max(edges)), _WIDTH)
    return [right] if len(edges) == 1 else [(0.0, x_at(min(edges))), right]
