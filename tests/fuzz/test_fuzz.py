"""Damaged files end in one line; a few hundred here, thousands with ``python -m tests.fuzz``."""

from __future__ import annotations

import sys

import pytest

from tests.fuzz.cases import COMMANDS, GOOD, case, run_case

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits are those of Linux")
_CASES = {"load": 100, "inspect": 60, "quantize": 60, "verify": 100}


@pytest.mark.parametrize("command", COMMANDS)
def test_damaged_files(command: str) -> None:
    _run(command, range(_CASES[command]))


def test_cases_are_made_again_from_their_numbers() -> None:
    assert case("load", 0, 5) == case("load", 0, 5)
    assert len({case("load", 0, number) for number in range(20)}) > 15


def _run(command: str, numbers: range) -> None:
    bad = []
    for number in numbers:
        outcome = run_case(command, case(command, 0, number))
        if outcome.kind not in GOOD:
            bad.append(f"case {number}: {outcome.kind}: {outcome.text}")
    assert not bad, "\n".join(bad)
