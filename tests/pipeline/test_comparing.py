"""``zsq compare``: any two files, tensor by tensor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from graph_tools.reading import read_proto
from pipeline.cli import main
from pipeline.comparing import compare_files


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """The shipped MobileNet and what `zsq quantize` makes of it."""
    folder = tmp_path_factory.mktemp("pair")
    shipped = Path(__file__).resolve().parents[2] / "models" / "digits_mobilenet.onnx"
    source = Path(shutil.copy(shipped, folder / "digits.onnx"))
    flags = "--num-images 16 --iterations 3 --mean 0.5 --std 0.5 --quiet".split()
    assert main(["quantize", str(source), *flags]) == 0
    return source, folder / "digits.w8a8.onnx"


def test_outputs_and_moved_bounds_are_those_of_numpy(pair, run_onnx):
    source, quantized = pair
    comparison = compare_files(source, quantized)
    assert (comparison.only_first, comparison.only_second) == ((), ())
    assert all(row.matched == "name" for row in comparison.rows)
    images = np.load(quantized.with_suffix("") / "images.npz")["images"]
    protos = [read_proto(path)[0] for path in pair]
    for row in (comparison.rows[-1], comparison.rows[2]):
        s, q = (
            run_onnx(with_output(proto, name), images, [name])[0].astype(np.float64)
            for proto, name in zip(protos, (row.first, row.second), strict=True)
        )
        gain = (s * q).sum() / (s * s).sum() if row.gain != 1 else 1.0
        assert row.gain == pytest.approx(gain, rel=1e-9)
        sqnr = 10 * np.log10((gain * s * gain * s).sum() / np.square(q - gain * s).sum())
        assert row.sqnr_db == pytest.approx(sqnr, rel=1e-6)
    assert comparison.rows[-1].is_output
    # A ReLU6 of this network is held at 8 / 6 of its value, so that its bound is a power of two.
    assert comparison.rows[2].gain == pytest.approx(8 / 6, rel=0.01)
    lowest = sorted(row.sqnr_db for row in comparison.rows)[:3]
    assert [row.sqnr_db for row in sorted(comparison.rows, key=lambda row: row.rank)[-3:]] == (
        lowest
    )


def with_output(proto: onnx.ModelProto, name: str) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    if name not in [entry.name for entry in copy.graph.output]:
        copy.graph.output.append(onnx.ValueInfoProto(name=name))
    return copy


def test_a_model_and_itself(pair, capsys):
    source, quantized = pair
    images = quantized.with_suffix("") / "images.npz"
    arguments = ["compare", str(source), str(source), "--images", str(images)]
    assert main([*arguments, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert all(row["max_abs_error"] == 0 and row["rank"] == 0 for row in facts["rows"])
    assert all(row["sqnr_db"] is None for row in facts["rows"])  # infinite: no JSON number


def test_the_table_marks_the_worst(pair, capsys):
    assert main(["compare", *map(str, pair), "--max-images", "4"]) == 0
    out = capsys.readouterr().out
    for rank in (1, 2, 3):
        assert out.count(f"worst {rank}") == 1
    assert "x 1.33" in out
    assert out.splitlines()[-1].startswith("4 images: ")


def test_what_cannot_be_compared_is_one_line(pair, make_model, tmp_path, capsys):
    other = make_model("g (float[N,3,4,4] z) => (float[N,3,4,4] u) { u = Relu(z) }").source
    wrong = tmp_path / "wrong.npz"
    np.savez(wrong, images=np.zeros((2, 3, 5, 5), np.float32))
    source, quantized = map(str, pair)
    images = pair[1].with_suffix("") / "images.npz"
    lonely = str(shutil.copy(source, tmp_path / "lonely.onnx"))
    for arguments, word in (
        ([source, str(tmp_path / "absent.onnx")], "absent.onnx"),
        ([lonely, lonely], "--images"),
        ([source, quantized, "--images", str(wrong)], "onnxruntime"),
        ([source, str(other), "--images", str(images)], "onnxruntime"),
        ([source, quantized, "--max-images", "0"], "--max-images"),
    ):
        assert main(["compare", *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1
        assert word in captured.err, arguments
