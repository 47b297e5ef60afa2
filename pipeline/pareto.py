"""Size against fidelity: what no other result beats in both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.sweep import Cell

__all__ = ["front", "plot_front"]

_LABELS = {
    "top1": "top-1 accuracy, %",
    "agreement": "decisions as in float, %",
    "sqnr_db": "SQNR of the outputs, dB",
}
_MARKERS = "osD^vPX*<>"


def front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats.

    Args:
        points: (cost, gain), the cost to be small and the gain large.

    Returns:
        By rising cost and rising gain; no point twice.
    """
    best: list[tuple[float, float]] = []
    for cost, gain in sorted(set(points), key=lambda point: (point[0], -point[1])):
        if not best or gain > best[-1][1]:
            best.append((cost, gain))
    return best


def plot_front(
    path: Path, cells: Sequence[Cell], measure: str, float_top1: float | None
) -> None:
    """Draw cells by size of the weights and fidelity, as a PNG.

    Args:
        path: file to write.
        cells: those with an error are left out.
        measure: top1, agreement or sqnr_db.
        float_top1: drawn as a line where the measure is top1.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [cell for cell in cells if not cell.error and getattr(cell, measure) is not None]
    factor = 100.0 if measure == "agreement" else 1.0

    def gain(cell: Cell) -> float:
        return factor * float(getattr(cell, measure))

    methods = list(dict.fromkeys(f"{cell.method}" for cell in shown))
    roundings = list(dict.fromkeys(cell.rounding for cell in shown))
    figure, axes = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    for cell in shown:
        axes.plot(
            cell.weight_bytes / 1000,
            gain(cell),
            linestyle="none",
            marker=_MARKERS[methods.index(cell.method) % len(_MARKERS)],
            color=f"C{roundings.index(cell.rounding)}",
            markersize=7,
            alpha=0.85,
        )
    best = front((cell.weight_bytes / 1000, gain(cell)) for cell in shown)
    axes.step(*zip(*best, strict=True), where="post", color="0.45", linewidth=1, zorder=0)
    named: set[tuple[float, float]] = set()
    for cell in shown:
        point = cell.weight_bytes / 1000, gain(cell)
        if point in best and point not in named:
            named.add(point)
            axes.annotate(
                f"W{cell.weights}A{cell.activations}",
                point,
                xytext=(6, -12),
                textcoords="offset points",
                fontsize=8,
            )
    if measure == "top1" and float_top1 is not None:
        axes.axhline(float_top1, color="0.6", linestyle=":", linewidth=1)
        axes.annotate(
            "float",
            (1, float_top1),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
        )
    for index, method in enumerate(methods):
        marker = _MARKERS[index % len(_MARKERS)]
        axes.plot([], [], marker, color="0.3", label=f"images: {method}")
    for index, rounding in enumerate(roundings):
        axes.plot([], [], "s", color=f"C{index}", markersize=9, label=rounding)
    axes.plot([], [], color="0.45", label="not beaten")
    axes.legend(fontsize=8, loc="lower right")
    axes.set_xlabel("weights, packed, kB")
    axes.set_ylabel(_LABELS[measure])
    axes.margins(0.08)
    axes.set_xlim(0, 1.12 * max(cell.weight_bytes for cell in shown) / 1000)
    axes.grid(alpha=0.25)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=130, format="png", metadata={"Software": None})
    plt.close(figure)
    temporary.replace(path)
