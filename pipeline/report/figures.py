"""Figures of the report: small inline SVG charts and PNG pictures, all as text.

Charts are drawn 360 units wide, the width of a phone, and laid out side by side on wider
screens, so their labels keep one size. Colors come from the page's style sheet by class
(``muted`` for the reference, ``main`` for the result), which makes them follow light, dark
and print. Equal inputs give equal bytes.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape
from PIL import Image

__all__ = ["Series", "histogram_chart", "line_chart", "thumbnails"]

_WIDTH, _HEIGHT = 360.0, 210.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 10.0, 8.0, 34.0
_MAX_POINTS = 400
_THUMBNAIL_SIDE = 112
_Position = Callable[[float], float]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart.

    Attributes:
        xs: positions.
        ys: values, as long as ``xs``; None leaves a gap.
        style: the result (main) or what it is compared with (muted).
        titles: tool tips, as long as ``xs``, or none; a series with titles has dots.
        joined: draw the line between the points.
    """

    xs: Sequence[float]
    ys: Sequence[float | None]
    style: Literal["main", "muted"] = "main"
    titles: Sequence[str] = ()
    joined: bool = True


def _short(value: float) -> str:
    """Return a tick label of few characters."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}".replace("-", "\N{MINUS SIGN}")
    if abs(value) >= 1e4 and abs(value) < 1e7 and value % 1000 == 0:
        return f"{value / 1000:g}k".replace("-", "\N{MINUS SIGN}")
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}".replace("-", "\N{MINUS SIGN}")


def _linear_ticks(low: float, high: float, count: int = 4) -> list[float]:
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = max(1, math.ceil((last - first) / 5))
    ticks = [10.0**power for power in range(first, last + 1, stride)]
    if high <= low * 300:
        ticks = [
            10.0**power * factor for power in range(first, last + 1) for factor in (1, 2, 5)
        ]
    return [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]


def _scale(low: float, high: float, start: float, end: float, *, log: bool) -> _Position:
    def position(value: float) -> float:
        a, b, v = (math.log(x) if log else x for x in (low, high, value))
        return start + (end - start) * (v - a) / (b - a)

    return position


def _padded(low: float, high: float, *, log: bool) -> tuple[float, float]:
    if log:
        factor = max((high / low) ** 0.05, 1.05)
        return low / factor, high * factor
    margin = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def _frame(
    label: str,
    body: Sequence[str],
    *,
    x_ticks: Sequence[tuple[float, str]],
    y_ticks: Sequence[tuple[float, str]],
    x_label: str,
) -> Markup:
    bottom = _HEIGHT - _BOTTOM
    lines = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" '
        f'aria-label="{escape(label)}">'
    ]
    for y, text in y_ticks:
        lines.append(
            f'<line class="grid" x1="{_LEFT:g}" x2="{_WIDTH - _RIGHT:g}" '
            f'y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{_LEFT - 6:g}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>'
        )
    for x, text in x_ticks:
        lines.append(
            f'<text x="{x:.1f}" y="{bottom + 14:g}" text-anchor="middle">{text}</text>'
        )
    lines.append(
        f'<line class="axis" x1="{_LEFT:g}" x2="{_WIDTH - _RIGHT:g}" '
        f'y1="{bottom:g}" y2="{bottom:g}"/>'
    )
    lines.append(
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2:g}" y="{_HEIGHT - 4:g}" '
        f'text-anchor="middle">{escape(x_label)}</text>'
    )
    return Markup("".join([*lines, *body, "</svg>"]))


def _thin(series: Series) -> Series:
    stride = math.ceil(len(series.xs) / _MAX_POINTS)
    if stride <= 1 or series.titles:
        return series
    chosen = sorted({*range(0, len(series.xs), stride), len(series.xs) - 1})
    return Series(
        xs=[series.xs[i] for i in chosen],
        ys=[series.ys[i] for i in chosen],
        style=series.style,
        joined=series.joined,
    )


def _draw(series: Series, x_at: _Position, y_at: _Position) -> str:
    points = [
        None if y is None else (x_at(x), y_at(y))
        for x, y in zip(series.xs, series.ys, strict=True)
    ]
    parts: list[str] = []
    if series.joined:
        path, pen_up = [], True
        for point in points:
            if point is not None:
                path.append(f"{'M' if pen_up else 'L'}{point[0]:.1f} {point[1]:.1f}")
            pen_up = point is None
        parts.append(f'<path class="line {series.style}" d="{"".join(path)}"/>')
    radius = 2.6 if len(points) <= 40 else 1.8
    if not series.titles:
        return "".join(parts)
    for point, title in zip(points, series.titles, strict=True):
        if point is not None:
            parts.append(
                f'<circle class="dot {series.style}" cx="{point[0]:.1f}" cy="{point[1]:.1f}" '
                f'r="{radius:g}"><title>{escape(title)}</title></circle>'
            )
    return "".join(parts)


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    x_label: str,
    log: bool | None = None,
    x_ticks: bool = True,
) -> Markup | None:
    """Draw lines over one horizontal axis.

    Args:
        series: what to draw, in drawing order.
        label: what the chart shows, for screen readers.
        x_label: name of the horizontal axis.
        log: logarithmic vertical axis, which drops values that are not positive; None takes
            one when all values are positive and span more than a factor of ten.
        x_ticks: label positions along the horizontal axis.

    Returns:
        An ``<svg>`` element, or None when there is no finite value.
    """
    values = [y for one in series for y in one.ys if y is not None and math.isfinite(y)]
    if log is None:
        log = bool(values) and min(values) > 0 and max(values) > 10 * min(values)
    kept = [value for value in values if value > 0 or not log]
    if not kept:
        return None
    clean = [
        Series(
            xs=one.xs,
            ys=[
                y if y is not None and math.isfinite(y) and (y > 0 or not log) else None
                for y in one.ys
            ],
            style=one.style,
            titles=one.titles,
            joined=one.joined,
        )
        for one in map(_thin, series)
    ]
    x_low = min(x for one in clean for x in one.xs)
    x_high = max(x for one in clean for x in one.xs)
    if x_low == x_high:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    y_low, y_high = _padded(min(kept), max(kept), log=log)
    x_at = _scale(x_low, x_high, _LEFT + 4, _WIDTH - _RIGHT - 4, log=False)
    y_at = _scale(y_low, y_high, _HEIGHT - _BOTTOM, _TOP, log=log)
    ticks = _log_ticks(y_low, y_high) if log else _linear_ticks(y_low, y_high)
    if len(ticks) < 2:
        ticks = _linear_ticks(y_low, y_high)
    ticks = [tick for tick in ticks if tick > 0 or not log]
    return _frame(
        label,
        [_draw(one, x_at, y_at) for one in clean],
        x_ticks=[(x_at(x), _short(x)) for x in _linear_ticks(x_low, x_high, 5)]
        if x_ticks
        else (),
        y_ticks=[(y_at(y), _short(y)) for y in ticks],
        x_label=x_label,
    )


def histogram_chart(
    edges: Sequence[float],
    float_counts: Sequence[float],
    quantized_counts: Sequence[float],
    *,
    label: str,
    x_label: str,
) -> Markup | None:
    """Draw two histograms over the same bins: float filled, quantized as an outline.

    Args:
        edges: n + 1 ascending bin edges.
        float_counts: n counts of the float network's values.
        quantized_counts: n counts of the quantized network's values.
        label: what the chart shows, for screen readers.
        x_label: name of the horizontal axis.

    Returns:
        An ``<svg>`` element, or None when the bins are empty or malformed. Counts are drawn
        on a logarithmic axis when one bin holds most values (its label says so).
    """
    counts = [float(count) for count in (*float_counts, *quantized_counts)]
    numbers = [*map(float, edges), *counts]
    well_formed = len(edges) - 1 == len(float_counts) == len(quantized_counts) > 0
    if not well_formed or not all(map(math.isfinite, numbers)) or max(counts) <= 0:
        return None
    if not float(edges[-1]) > float(edges[0]):
        return None
    peak = max(counts)
    filled = sorted(count for count in counts if count > 0)
    log = peak > 50 * filled[len(filled) // 2] and peak > 1
    height: Callable[[float], float] = math.log1p if log else float
    x_at = _scale(float(edges[0]), float(edges[-1]), _LEFT + 4, _WIDTH - _RIGHT - 4, log=False)
    y_at = _scale(0.0, height(peak) * 1.05, _HEIGHT - _BOTTOM, _TOP, log=False)

    def outline(values: Sequence[float]) -> str:
        steps = [f"M{x_at(float(edges[0])):.1f} {y_at(0.0):.1f}"]
        for left, right, value in zip(edges[:-1], edges[1:], values, strict=True):
            y = y_at(height(float(value)))
            steps.append(f"L{x_at(float(left)):.1f} {y:.1f}L{x_at(float(right)):.1f} {y:.1f}")
        steps.append(f"L{x_at(float(edges[-1])):.1f} {y_at(0.0):.1f}")
        return "".join(steps)

    ticks = (
        [0.0, *(10.0**power for power in range(1, int(math.log10(peak)) + 1))]
        if log
        else _linear_ticks(0.0, peak)
    )
    if len(ticks) > 6:
        ticks = ticks[:1] + ticks[1::2]
    return _frame(
        label,
        [
            f'<path class="area muted" d="{outline(float_counts)}"/>',
            f'<path class="line main" d="{outline(quantized_counts)}"/>',
        ],
        x_ticks=[
            (x_at(x), _short(x)) for x in _linear_ticks(float(edges[0]), float(edges[-1]), 5)
        ],
        y_ticks=[(y_at(height(y)), _short(y)) for y in ticks],
        x_label=f"{x_label} (counts on a log scale)" if log else x_label,
    )


def thumbnails(images: npt.NDArray[np.uint8]) -> tuple[str, ...]:
    """Encode the first images as PNG data URIs, few and small enough to send by mail.

    Args:
        images: [n, height, width, channels] uint8, 1 (gray) or 3 (RGB) channels, n may be 0.

    Returns:
        Up to 64 URIs when an image is at most 64 pixels a side, up to 24 otherwise; longer
        sides than 112 pixels are scaled down.

    Raises:
        ValueError: another dtype, rank or number of channels.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(
            f"images must be uint8 [n, height, width, 1 or 3], not {images.dtype} "
            f"{list(images.shape)}"
        )
    side = max(images.shape[1:3])
    uris = []
    for pixels in images[: 64 if side <= 64 else 24]:
        picture = Image.fromarray(
            np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        )
        picture.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE), Image.Resampling.BOX)
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG", optimize=True)
        uris.append("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())
    return tuple(uris)
