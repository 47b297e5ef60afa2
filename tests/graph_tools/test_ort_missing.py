"""Choosing the engine that is not installed, in the ordinary environment."""

from __future__ import annotations

import pytest

from graph_tools.errors import SettingsError
from graph_tools.ort_graph import OrtGraph
from graph_tools.ort_session import is_available
from pipeline.cli import main

pytestmark = pytest.mark.skipif(is_available(), reason="onnxruntime-training is installed")


def test_the_class_says_what_is_missing(digits_models) -> None:
    import onnx

    with pytest.raises(SettingsError, match=r"--engine: .*onnxruntime-training.*make ort"):
        OrtGraph(onnx.load(digits_models / "digits_resnet.onnx"))


@pytest.mark.parametrize("command", ["generate", "quantize"])
def test_the_command_line_says_so_in_one_line(
    command, digits_models, tmp_path, capsys
) -> None:
    model = str(digits_models / "digits_resnet.onnx")
    output = tmp_path / ("images.npz" if command == "generate" else "q.onnx")
    assert main([command, model, "-o", str(output), "--engine", "ort"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("zsq: --engine: 'ort' needs onnxruntime-training")
    assert "make ort" in captured.err
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())
