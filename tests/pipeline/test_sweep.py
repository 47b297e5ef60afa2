"""``zsq sweep``: a grid that goes on where it was stopped, and what no cell beats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline import sweep
from pipeline.cli import main
from pipeline.pareto import front

GRID = "--weights 8 2 --rounding nearest --method noise --num-images 16 --mean 0.5 --std 0.5"


@pytest.fixture
def digits(digits_models, tmp_path) -> Path:
    return Path(shutil.copy(digits_models / "digits_resnet.onnx", tmp_path / "digits.onnx"))


def run(capsys, *arguments, grid: str = GRID) -> tuple[dict, int]:
    code = main(["sweep", *map(str, arguments), *grid.split(), "--json"])
    captured = capsys.readouterr()
    assert code in (0, 1), captured.err
    return json.loads(captured.out), code


def test_a_sweep_goes_on_where_it_was_stopped(digits, tmp_path, capsys, monkeypatch):
    quantize_file, runs = sweep.quantize_file, []

    def stopped(job, **others):
        if len(runs) == 1:
            raise KeyboardInterrupt
        runs.append(job.output.name)
        return quantize_file(job, **others)

    monkeypatch.setattr(sweep, "quantize_file", stopped)
    assert main(["sweep", str(digits), *GRID.split(), "--quiet"]) == 130
    folder = tmp_path / "digits.sweep"
    assert list(json.loads((folder / "sweep.json").read_text())["cells"]) == runs_of(runs)
    generated = (folder / "images-noise-0.npz").stat().st_mtime_ns
    monkeypatch.setattr(
        sweep,
        "quantize_file",
        lambda job, **others: runs.append(job.output.name) or quantize_file(job, **others),
    )
    facts, code = run(capsys, digits)
    assert code == 0
    assert runs == ["noise-0.w8a8-nearest.onnx", "noise-0.w2a8-nearest.onnx"]
    assert facts["resumed"] == 1
    assert (folder / "images-noise-0.npz").stat().st_mtime_ns == generated
    first, second = facts["cells"]
    # Packed weights: 2 bits are a quarter of 8.
    assert first["weight_bytes"] == pytest.approx(4 * second["weight_bytes"], abs=4)
    assert first["sqnr_db"] > second["sqnr_db"] + 6
    assert 0 <= second["agreement"] <= first["agreement"] <= 1
    assert first["proved"]
    with Image.open(folder / "pareto.png") as plot:
        assert plot.width > 600
    # Other settings are other cells; more of the grid only adds.
    more, _ = run(capsys, digits, grid=GRID.replace("8 2", "8 2 4"))
    assert more["resumed"] == 2
    again, _ = run(capsys, digits, "--settings", settings(tmp_path, "threshold = 'mae'"))
    assert again["resumed"] == 0


def runs_of(names: list[str]) -> list[str]:
    return [name.removesuffix(".onnx") for name in names]


def settings(folder: Path, text: str) -> Path:
    path = folder / "settings.toml"
    path.write_text(f"model = 'other.onnx'\n{text}\n")
    return path


def test_fidelity_is_that_of_numpy(digits, tmp_path, capsys, run_onnx):
    facts, _ = run(capsys, digits, grid=GRID.replace("8 2", "2"))
    (cell,) = facts["cells"]
    folder = tmp_path / "digits.sweep"
    images = np.load(folder / "images-noise-1.npz")["images"]
    assert not np.array_equal(images, np.load(folder / "images-noise-0.npz")["images"])
    s, q = (
        run_onnx(onnx.load(path), images)[0].astype(np.float64)
        for path in (digits, folder / f"{cell['name']}.onnx")
    )
    assert cell["sqnr_db"] == pytest.approx(
        10 * np.log10(np.square(s).sum() / np.square(s - q).sum()), rel=1e-6
    )
    assert cell["agreement"] == (s.argmax(1) == q.argmax(1)).mean()
    assert (folder / cell["name"] / "images.npz").samefile(folder / "images-noise-0.npz")


def test_accuracy_decides_where_there_are_labels(digits, tmp_path, capsys):
    rng = np.random.default_rng(0)
    labelled = tmp_path / "labelled.npz"
    pixels = rng.integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
    np.savez(labelled, images=pixels, labels=np.arange(20) % 10)
    grid = GRID.replace("8 2", "8")
    facts, _ = run(capsys, digits, "--data", labelled, grid=grid)
    assert facts["measure"] == "top1"
    assert facts["float_top1"] is not None
    assert facts["cells"][0]["optimal"]
    assert main(["sweep", str(digits), *grid.split(), "--data", str(labelled)]) == 0
    out = capsys.readouterr().out
    assert "1 of 1 cells were there before" in out
    assert "not beaten" in out


def test_a_cell_that_cannot_be_does_not_stop_the_others(digits, tmp_path, capsys):
    text = "second-moment-correction = true"
    grid = GRID.replace("8 2", "8").replace("nearest", "adaround nearest")
    facts, code = run(capsys, digits, "--settings", settings(tmp_path, text), grid=grid)
    assert code == 1
    learned, nearest = facts["cells"]
    assert "--second-moment-correction" in learned["error"]
    assert nearest["error"] == ""
    assert nearest["optimal"]


def test_what_is_wrong_is_one_line(digits, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    (other / "sweep.json").write_text("{}")
    for arguments, word in (
        (["--weights", "8", "8"], "--weights: names one twice"),
        (["--method"], "--method"),
        (["-o", str(other), *GRID.split()], "is not what a sweep wrote"),
        (["-o", str(digits / "under"), *GRID.split()], "under"),
        (["--settings", str(settings(tmp_path, "wights = 4"))], "did you mean 'weights'"),
    ):
        assert main(["sweep", str(digits), *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1
        assert word in captured.err, arguments


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_the_front_is_what_no_other_beats(points):
    beaten = {
        (c, g)
        for c, g in points
        for d, h in points
        if (d <= c and h > g) or (d < c and h >= g)
    }
    assert front(points) == sorted(set(points) - beaten)
