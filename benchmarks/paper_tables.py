"""Tables and plots that several experiments of the papers share."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from cells import Cell

At = dict[str, Any]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """``70.98 ± 1.41 (3)``."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):.{digits}f} ({len(values)})"


def _order(value: Any) -> tuple[int, float, str]:
    return (0, value, "") if isinstance(value, int | float) else (1, 0, str(value))


def levels(cells: dict[str, Cell], axis: str) -> list[Any]:
    """What stands at ``axis`` in the cells, in order."""
    return sorted({cell["at"][axis] for cell in cells.values()}, key=_order)


def _grouped(
    cells: dict[str, Cell], axes: Sequence[str]
) -> list[tuple[tuple[Any, ...], dict[str, Cell]]]:
    """The cells by what stands at ``axes``, in order."""
    groups: dict[tuple[Any, ...], dict[str, Cell]] = {}
    for key, cell in cells.items():
        groups.setdefault(tuple(cell["at"][name] for name in axes), {})[key] = cell
    return sorted(groups.items(), key=lambda item: [_order(v) for v in item[0]])


def pivot(
    cells: dict[str, Cell],
    *,
    title: str,
    tables: Sequence[str],
    row: str,
    column: str,
    value: Callable[[Cell], float],
    digits: int = 2,
) -> str:
    """One table for each combination of ``tables``: means over all else, mostly seeds."""
    lines = [f"# {title}", "", "Mean ± standard deviation (n seeds)."]
    for group, found in _grouped(cells, tables):
        columns = levels(found, column)
        lines += ["", f"## {', '.join(map(str, group))}", ""]
        lines += [
            "| " + " | ".join([row, *map(str, columns)]) + " |",
            "|---" * (len(columns) + 1) + "|",
        ]
        for name in levels(found, row):
            words = [str(name)]
            for level in columns:
                words.append(
                    spread(
                        [
                            value(cell)
                            for cell in found.values()
                            if cell["at"][row] == name and cell["at"][column] == level
                        ],
                        digits,
                    )
                )
            lines.append("| " + " | ".join(words) + " |")
    return "\n".join(lines) + "\n"


def draw(
    cells: dict[str, Cell],
    path: Path,
    *,
    panels: Sequence[str],
    x: str,
    line: str,
    value: Callable[[Cell], float],
    label: str,
) -> None:
    """One panel for each combination of ``panels``: means, with bars of a standard deviation."""
    groups = _grouped(cells, panels)
    _, axes = plt.subplots(
        1, len(groups), figsize=(4.2 * len(groups), 3.6), squeeze=False, layout="constrained"
    )
    for panel, (group, found) in zip(axes[0], groups, strict=True):
        ticks = levels(found, x)
        for name in levels(found, line):
            xs, means, bars = [], [], []
            for place, tick in enumerate(ticks):
                values = [
                    value(cell)
                    for cell in found.values()
                    if cell["at"][line] == name and cell["at"][x] == tick
                ]
                if values:
                    xs.append(place)
                    means.append(statistics.mean(values))
                    bars.append(statistics.stdev(values) if len(values) > 1 else 0.0)
            panel.errorbar(xs, means, bars, marker="o", capsize=2, label=str(name))
        panel.set_xticks(range(len(ticks)), [str(tick) for tick in ticks], rotation=30)
        panel.set_title(", ".join(map(str, group)), fontsize=9)
        panel.set_xlabel(x)
        panel.legend(fontsize=6)
    axes[0][0].set_ylabel(label)
    save(path)


def save(path: Path) -> None:
    """Write the current figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plt.savefig(path, dpi=110, metadata={"Software": None})
    plt.close()
