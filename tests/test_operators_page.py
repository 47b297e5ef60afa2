from __future__ import annotations

import pytest
import torch

from docs.make_operators import PAGE, VISION, Result, node_results, render
from graph_tools.torch_ops import OPERATORS


@pytest.fixture(scope="module")
def results() -> list[Result]:
    torch.set_num_threads(1)
    return node_results()


def test_page_is_current(results: list[Result]) -> None:
    assert PAGE.read_text() == render(results), "run `python -m docs.make_operators`"


def test_vision_operators_are_there_and_pass(results: list[Result]) -> None:
    assert VISION <= set(OPERATORS)
    passed = [result.outcome == "passed" for result in results if result.operator in VISION]
    assert len(passed) > 900
    assert sum(passed) >= 0.95 * len(passed)


def test_everything_is_explained() -> None:
    assert "not explained" not in PAGE.read_text()
