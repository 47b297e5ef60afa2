"""An estimate of the accuracy that quantization costs, from agreement on images without labels.

    drop = gain * disagreement ** power, in points of top-1

The calibration images tell it where they were made to match the network's statistics, as DGH's
are. Other images can flatter: calibrated with noise, a network may agree with its float self on all
of the noise and on nothing else. There synthetic natural images tell it, too, by constants of their
own (they lie nearer to the borders between classes than photographs), and the larger counts; so do
held-out images, wherever there are any. The constants, and how far the estimate was off, are in
``fidelity.toml``, which ``benchmarks/fidelity.py`` fits to measured drops.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from typing import Any

from pipeline.fidelity import Fidelity

__all__ = [
    "SMALL",
    "Calibration",
    "Estimate",
    "Power",
    "drop_of",
    "estimate_drop",
    "read_calibration",
]

_FEW = 64  # images of a kind, the fewest that the constants were fitted to

SMALL = 15
"""Points: how far off estimates are of smaller drops is said apart."""


@dataclass(frozen=True, kw_only=True)
class Power:
    """``gain * disagreement ** power``: points of top-1 from a share of images, 0..1."""

    gain: float
    power: float

    def __call__(self, disagreement: float) -> float:
        """Points of top-1."""
        return float(self.gain * disagreement**self.power)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What `estimate_drop` rests on.

    Attributes:
        calibration: from calibration or held-out images; ``prior`` from synthetic ones.
        error_generated: half the width of the range that holds 80 % of the measured drops, over
            1 + the estimate, where the calibration images match the network's statistics.
        error_other: likewise where they do not, or are not known to.
        cells: measured files; ``networks`` they are of.
        correlation: of estimates and drops, each network left out of the fit in turn.
        mean_error: mean absolute error, likewise, in points; ``mean_error_small`` of drops below
            `SMALL` points.
        classes: fewest and most that the networks name; ``sizes`` of their images, pixels a side.
    """

    calibration: Power
    prior: Power
    error_generated: float
    error_other: float
    cells: int
    networks: int
    correlation: float
    mean_error: float
    mean_error_small: float
    classes: tuple[int, int]
    sizes: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Points of top-1 that quantization costs.

    Attributes:
        drop: the estimate; four of five drops lie between ``low`` and ``high``.
        note: how sure this is, in words.
    """

    drop: float
    low: float
    high: float
    note: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the report."""
        return asdict(self)


@cache
def read_calibration() -> Calibration:
    """The constants that the project ships."""
    text = (resources.files("pipeline") / "fidelity.toml").read_text(encoding="utf-8")
    found = tomllib.loads(text)
    for name in ("classes", "sizes"):
        found[name] = tuple(found[name])
    for name in ("calibration", "prior"):
        found[name] = Power(**found[name])
    return Calibration(**found)


def drop_of(
    by_calibration: Power,
    by_prior: Power,
    *,
    calibration: float,
    prior: float,
    held_out: float | None,
    matched: bool,
) -> float:
    """Return the drop in points from shares of images that disagree, 0..1.

    Args:
        by_calibration: what calibration and held-out images tell.
        by_prior: what synthetic images tell.
        calibration: the share on calibration images.
        prior: on synthetic images.
        held_out: on held-out images, if there are any.
        matched: the calibration images were made to match the network's statistics.
    """
    found = by_calibration(max(calibration, held_out or 0.0))
    return found if matched else max(found, by_prior(prior))


def estimate_drop(
    fidelities: Sequence[Fidelity], *, matched: bool, classes: int | None, size: int
) -> Estimate | str:
    """Estimate what quantization costs in accuracy.

    Args:
        fidelities: on calibration and synthetic images, and maybe on held-out ones.
        matched: the calibration images were made to match the network's statistics.
        classes: how many the network names; None if that is not known.
        size: of its images, the longer side in pixels.

    Returns:
        The estimate, or why there is none.
    """
    shares = {
        found.kind: 1 - found.agreement for found in fidelities if found.agreement is not None
    }
    if not {"calibration", "prior"} <= shares.keys():
        return (
            "The network does not have one output of class scores, so no loss of accuracy is "
            "estimated."
        )
    constants = read_calibration()
    drop = drop_of(
        constants.calibration,
        constants.prior,
        calibration=shares["calibration"],
        prior=shares["prior"],
        held_out=shares.get("held-out"),
        matched=matched,
    )
    fewest = min(found.images for found in fidelities)
    error = (constants.error_generated if matched else constants.error_other) * (1 + drop)
    return Estimate(
        drop=drop,
        low=drop - error,
        high=min(100.0, drop + error),
        note=" ".join(_notes(constants, matched, classes, size, fewest)),
    )


def _notes(
    constants: Calibration, matched: bool, classes: int | None, size: int, fewest: int
) -> Sequence[str]:
    notes = [
        f"From {constants.cells} measured files of {constants.networks} networks, each left out "
        f"in turn: correlation {constants.correlation:.2f}, mean error "
        f"{constants.mean_error:.1f} points, {constants.mean_error_small:.1f} of drops below "
        f"{SMALL}."
    ]
    if not matched:
        notes.append(
            "The calibration images were not made to match the network's statistics, which makes "
            "the estimate less sure."
        )
    if fewest < _FEW:
        notes.append(f"It rests on {fewest} images of a kind, fewer than were measured.")
    outside = [
        f"{value} {what} ({least} to {most})"
        for value, what, (least, most) in (
            (classes, "classes", constants.classes),
            (size, "pixels a side", constants.sizes),
        )
        if value is not None and not least <= value <= most
    ]
    if outside:
        notes.append(f"Outside of what was measured: {' and '.join(outside)}.")
    return notes
