from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def accuracy() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("accuracy")
    for name in ("accuracy", "cells"):
        sys.modules.pop(name, None)


def test_keys_are_read_back_whatever_the_names_of_nodes(accuracy: ModuleType) -> None:
    variant = accuracy.variant_name({"bits": ("/a/conv=W8", "/b/*=W2A4"), "qdrop": 0}, {})
    assert variant == "full,bits=/a/conv=W8 /b/*=W2A4,qdrop=0"
    for key in (
        accuracy.Key(network="net", scheme="float"),
        accuracy.Key(
            network="net",
            scheme="W4A8",
            variant=variant,
            rounding="brecq",
            images="dgh",
            seed=3,
        ),
    ):
        assert accuracy.Key.parse(str(key)) == key
    assert str(key).endswith("/brecq/dgh/3")


def test_two_processes_do_not_lose_each_others_cells(tmp_path: Path) -> None:
    path = tmp_path / "cells.json"
    script = (
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "from pathlib import Path; from cells import store_cell\n"
        "for i in range(40): store_cell(Path(sys.argv[1]), f'{sys.argv[2]}{i}', {'top1': i})\n"
    )
    runs = [subprocess.Popen([sys.executable, "-c", script, path, name]) for name in "ab"]
    assert [run.wait() for run in runs] == [0, 0]
    cells = json.loads(path.read_text())
    assert cells == {f"{name}{i}": {"top1": i} for name in "ab" for i in range(40)}


def test_the_table_has_means_spreads_and_differences(accuracy: ModuleType) -> None:
    cells = {"net/float": {"top1": 80.0}}
    tops = {"real/0": 70.0, "real/1": 72.0, "dgh/0": 74.0, "noise/0": 50.0}
    for images, top1 in tops.items():
        cells[f"net/W4A8/full/nearest/{images}"] = {"top1": top1, "quantize": 3.0}
    row = accuracy.markdown(cells).splitlines()[-1]
    assert row == (
        "| full, nearest | 80.00 | 71.00 ± 1.41 (2) | 74.00 | 50.00 | +3.00 | +24.00 | -6.00 | 3 |"
    )
