"""Accumulators by construction: 7-bit weights, and sums that int32 does not hold."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from graph_tools.errors import IntegerOverflowError
from graph_tools.quantized_graph import QuantizedGraph
from pipeline.cli import main
from pipeline.verify.accumulators import refuse_overflow
from tests.pipeline.qdq_builder import QdqBuilder

QUICK = "--method noise --num-images 4 --threads 1".split()


def quantized(source: Path, folder: Path, *options: str) -> onnx.ModelProto:
    target = folder / "q.onnx"
    code = main(["quantize", str(source), "-o", str(target), "--quiet", *QUICK, *options])
    assert code == 0
    return onnx.load(target)


def weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    graph = QuantizedGraph(model)
    return {
        node.name: graph.constant(graph.producers[node.input[1]].input[0])
        for node in graph.weighted()
    }


@pytest.mark.parametrize("options", [(), ("--second-moment-correction",), ("--weights", "4")])
def test_seven_bit_weights_cannot_saturate_a_pair(digits_models, tmp_path, options):
    source = digits_models / "digits_mobilenet.onnx"
    model = quantized(source, tmp_path, "--weight-range", "7bit", *options)
    found = weights(model)
    assert len(found) > 5
    for integers in found.values():
        assert integers.dtype == np.int8
        assert integers.min() >= -64
        assert integers.max() <= 63
        assert 255 * 2 * max(int(integers.max()), -int(integers.min())) <= 2**15 - 1
    proof = json.loads((tmp_path / "q" / "report.json").read_text())["proof"]
    assert proof["saturation"]["nodes_at_risk"] == []
    assert proof["saturation"]["saturates"] is False  # default = optimized, on any CPU
    assert [d["differing"] for t in proof["tensors"] for d in t["differences"]] == [0, 0, 0]


def test_the_full_range_is_used_without_it(digits_models, tmp_path):
    found = weights(quantized(digits_models / "digits_mobilenet.onnx", tmp_path))
    assert max(int(np.abs(w.astype(int)).max()) for w in found.values()) > 64


def wide_layer(path: Path, features: int) -> Path:
    """One Gemm over all pixels, every weight the largest that its scale has."""
    weight = np.full((2, features), 127 / 64, np.float32)
    text = (
        '<ir_version: 8, opset_import: ["" : 17]> '
        f"g (float[N,1,{features // 512},512] image) => (float[N,2] y) "
        "{ flat = Flatten(image) y = Gemm<transB = 1>(flat, w, b) }"
    )
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(2, np.float32), "b"))
    model.graph.node[1].name = "classifier"
    onnx.save(model, path)
    return path


def test_sums_that_int32_does_not_hold_are_refused_by_name(tmp_path, capsys):
    source = wide_layer(tmp_path / "wide.onnx", 512 * 300)
    target = tmp_path / "q.onnx"
    arguments = ["quantize", str(source), "-o", str(target), "--quiet", *QUICK]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "classifier" in error
    assert "33 bits, int32 overflows" in error
    assert "--bits 'classifier=W4'" in error
    assert len(error.strip().splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["wide.onnx"]
    assert main([*arguments, "--bits", "classifier=W4"]) == 0


def test_the_layer_that_needs_most_is_named():
    g = QdqBuilder((3, 8, 8))
    a = g.quantize(g.weighted("Conv", g.image, "a", (4, 3, 1, 1)), -4)
    g.quantize(g.weighted("Conv", a, "b", (4, 4, 1, 1)), -4, output="out")
    g.constants["a_b_q"][:] = 2**31 - 1
    refuse = g.model({"out": 4})
    with pytest.raises(IntegerOverflowError, match=r"Conv conv_a: its sums can need 33 bits"):
        refuse_overflow(QuantizedGraph(refuse))
    g.constants["a_b_q"][:] = 2**20
    refuse_overflow(QuantizedGraph(g.model({"out": 4})))
