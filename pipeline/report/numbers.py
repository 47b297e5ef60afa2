"""Numbers of a report: JSON-safe values, and how they are written for a reader."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

__all__ = [
    "as_float",
    "format_bytes",
    "format_count",
    "format_number",
    "format_seconds",
    "to_json_values",
]


def to_json_values(value: Any) -> Any:
    """Return ``value`` in types that strict JSON can hold.

    Not-a-number becomes None; infinities, which an SQNR without any error has, become the
    strings ``"inf"`` and ``"-inf"``. Mappings keep their order.

    Args:
        value: nested mappings, sequences, numpy arrays and scalars, paths, plain values.

    Raises:
        TypeError: a type without a JSON form.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float | np.floating):
        number = float(value)
        if math.isnan(number):
            return None
        return number if math.isfinite(number) else ("inf" if number > 0 else "-inf")
    if isinstance(value, np.bool_ | np.integer):
        return value.item()
    if isinstance(value, np.ndarray):
        return to_json_values(value.tolist())
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): to_json_values(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [to_json_values(item) for item in value]
    raise TypeError(f"a report cannot hold {type(value).__name__}")


def as_float(value: Any) -> float | None:
    """Return a number of the JSON form as a float (infinite ones too), None for the rest."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int | float):
        return float(value)
    return {"inf": math.inf, "-inf": -math.inf}.get(value) if isinstance(value, str) else None


def format_number(value: Any, digits: int | None = None) -> str:
    """Write a number: fixed ``digits`` after the point, or about four significant ones."""
    number = as_float(value)
    if number is None:
        return "\N{EN DASH}"
    if math.isinf(number):
        return "\N{INFINITY}" if number > 0 else "\N{MINUS SIGN}\N{INFINITY}"
    if digits is not None:
        text = f"{number:,.{digits}f}"
    elif number == int(number) and abs(number) < 1e15:
        text = f"{int(number):,}"
    else:
        text = f"{number:.4g}"
    if text.startswith("-"):
        text = text[1:] if not text.strip("-0.,") else "\N{MINUS SIGN}" + text[1:]
    return text


def format_bytes(value: Any) -> str:
    """Write a file size in decimal units."""
    number = as_float(value)
    if number is None or math.isinf(number):
        return "\N{EN DASH}"
    for unit in ("bytes", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}" if unit != "bytes" else f"{number:.0f} {unit}"
        number /= 1000
    return f"{number:.3g} GB"


def format_count(value: Any) -> str:
    """Write a large number with a decimal prefix: 40.6 M."""
    number = as_float(value)
    if number is None or math.isinf(number):
        return "\N{EN DASH}"
    for unit in ("", " k", " M", " G"):
        if abs(number) < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:,.3g} T"


def format_seconds(value: Any) -> str:
    """Write a duration in seconds or minutes."""
    number = as_float(value)
    if number is None or math.isinf(number):
        return "\N{EN DASH}"
    if number < 60:
        return f"{number:.2g} s" if number < 10 else f"{number:.0f} s"
    minutes, seconds = divmod(round(number), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
