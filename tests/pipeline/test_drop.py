"""The estimate of what quantization costs, and the constants it rests on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.drop import Estimate, Power, drop_of, estimate_drop, read_calibration
from pipeline.fidelity import Fidelity

CELLS = Path(__file__).parents[2] / "benchmarks" / "results" / "fidelity.json"


def measured(calibration: float, prior: float, **others: float) -> list[Fidelity]:
    shares = {"calibration": calibration, "prior": prior, **others}
    return [
        Fidelity(kind=kind.replace("_", "-"), images=100, agreement=share, sqnr_db=20.0)
        for kind, share in shares.items()
    ]


def estimate(fidelities: list[Fidelity], **given: object) -> Estimate:
    found = estimate_drop(fidelities, **{"matched": True, "classes": 10, "size": 32, **given})
    assert isinstance(found, Estimate)
    return found


def test_full_agreement_costs_nothing_and_less_costs_more():
    drops = [estimate(measured(share, 0.9)).drop for share in (1.0, 0.98, 0.9, 0.5, 0.0)]
    assert drops[0] == 0
    assert drops == sorted(set(drops))
    assert drops[-1] <= 100


def test_images_that_may_flatter_are_not_relied_on():
    """Calibrated with noise: all of it alike, nothing else."""
    flattered = measured(1.0, 0.4)
    assert estimate(flattered).drop == 0
    doubtful = estimate(flattered, matched=False)
    assert doubtful.drop == pytest.approx(read_calibration().prior(0.6))
    assert "less sure" in doubtful.note
    held_out = estimate(measured(1.0, 1.0, held_out=0.4))
    assert held_out.drop == pytest.approx(read_calibration().calibration(0.6))


def test_the_range_is_that_of_the_measured_errors():
    constants = read_calibration()
    found = estimate(measured(0.8, 0.6))
    assert found.high - found.drop == pytest.approx(
        constants.error_generated * (1 + found.drop)
    )
    assert found.drop - found.low == pytest.approx(found.high - found.drop)
    assert estimate(measured(0.0, 0.0)).high <= 100


def test_what_was_not_measured_is_said():
    assert "Outside" not in estimate(measured(0.9, 0.9)).note
    note = estimate(measured(0.9, 0.9), classes=2, size=512).note
    assert "2 classes (10 to 1000) and 512 pixels a side (32 to 224)" in note
    few = [dataclasses.replace(found, images=32) for found in measured(0.9, 0.9)]
    assert "rests on 32 images" in estimate(few).note
    outputs = [Fidelity(kind="calibration", images=9, agreement=None, sqnr_db=20.0)]
    refused = estimate_drop(outputs, matched=True, classes=None, size=320)
    assert refused == (
        "The network does not have one output of class scores, so no loss of accuracy is "
        "estimated."
    )


def test_the_constants_are_those_of_the_measured_cells():
    """The file and the measurements beside it belong together; its errors hold on them."""
    cells, constants = json.loads(CELLS.read_text()), read_calibration()
    assert constants.cells == len(cells)
    assert constants.networks == len({key.split("/")[0] for key in cells})
    inside, errors = [], []
    for key, cell in cells.items():
        shares = {kind: 1 - f["agreement"] for kind, f in cell["fidelity"].items()}
        matched = key.endswith("/dgh")
        drop = drop_of(
            constants.calibration,
            constants.prior,
            calibration=shares["calibration"],
            prior=shares["prior"],
            held_out=None,
            matched=matched,
        )
        error = constants.error_generated if matched else constants.error_other
        inside.append(abs(drop - cell["drop"]) <= error * (1 + drop))
        errors.append(abs(drop - cell["drop"]))
    assert np.mean(inside) >= 0.75  # four of five with the network left out
    assert np.mean(errors) <= constants.mean_error


def test_powers_are_what_they_say():
    assert Power(gain=80.0, power=1.5)(0.25) == pytest.approx(80 * 0.25**1.5)
