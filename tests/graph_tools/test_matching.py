"""Which tensor is which: by name, structure and position."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

from graph_tools.matching import match_tensors


def network(text: str) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    for name in ("w", "v"):
        proto.graph.initializer.append(
            onnx.numpy_helper.from_array(np.ones((3, 3, 1, 1), np.float32), name)
        )
    return proto


PLAIN = """g (float[N,3,8,8] x) => (float[N,3,8,8] y)
    { c = Conv(x, w)  r = Relu(c)  d = Conv(r, v)  s = Sigmoid(d)  y = Add(s, r) }"""


def found(first: onnx.ModelProto, second: onnx.ModelProto) -> list[tuple[str, str, str]]:
    return [(m.first, m.second, m.how) for m in match_tensors(first, second).matches]


def test_equal_names():
    assert found(network(PLAIN), network(PLAIN)) == [
        (name, name, "name") for name in ("x", "r", "d", "s", "y")
    ]


def test_other_names_by_structure_and_a_relu_that_vanished():
    other = network(
        """g (float[N,3,8,8] image) => (float[N,3,8,8] out)
        { a = Conv(image, w)  b = Conv(a, v)  e = Sigmoid(b)  out = Add(e, a) }"""
    )
    assert found(network(PLAIN), other) == [
        ("x", "image", "structure"),
        ("r", "a", "structure"),
        ("d", "b", "structure"),
        ("s", "e", "structure"),
        ("y", "out", "structure"),
    ]


def test_by_position_where_the_ways_differ():
    other = network(
        """g (float[N,3,8,8] image) => (float[N,3,8,8] out)
        { z = Abs(image)  a = Conv(z, w)  b = Conv(a, v)  out = Add(b, a) }"""
    )
    matching = match_tensors(network(PLAIN), other)
    assert [(m.first, m.second) for m in matching.matches if m.how == "position"] == [
        ("r", "a"),
        ("d", "b"),
    ]
    assert matching.only_second == ("z", "out")
    assert matching.only_first == ("s", "y")


def test_what_two_operators_read_ends_a_step():
    """The convolution's own result is used, too: its Relu is a step by itself."""
    proto = network(
        "g (float[N,3,8,8] x) => (float[N,3,8,8] y) { c = Conv(x, w) r = Relu(c) y = Add(c, r) }"
    )
    assert [a for a, _, _ in found(proto, proto)] == ["x", "c", "r", "y"]


class Images(CalibrationDataReader):
    def __init__(self, name: str) -> None:
        rng = np.random.default_rng(0)
        self.batches = iter(
            [{name: rng.standard_normal((4, 1, 8, 8), dtype=np.float32)} for _ in range(2)]
        )

    def get_next(self):
        return next(self.batches, None)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["digits_resnet", "digits_mobilenet"])
def test_a_file_of_another_quantizer(name, digits_models, tmp_path):
    """onnxruntime's own: BatchNormalization folded, Q/DQ of its names around everything."""
    source = digits_models / f"{name}.onnx"
    folded, written = tmp_path / "folded.onnx", tmp_path / "quantized.onnx"
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folded)
    ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    entry = onnx.load(source).graph.input[0].name
    quantize_static(folded, written, Images(entry), quant_format=QuantFormat.QDQ)
    float_proto, quantized = onnx.load(source), onnx.load(Path(written))
    matching = match_tensors(float_proto, quantized)
    weighted = sum(n.op_type in ("Conv", "Gemm") for n in float_proto.graph.node)
    kinds = [match.op_type for match in matching.matches]
    assert sum(kind in ("Conv", "Gemm") for kind in kinds) == weighted
    assert kinds.count("Add") == sum(n.op_type == "Add" for n in float_proto.graph.node)
    assert matching.only_first == ()
    outputs = {entry.name for entry in float_proto.graph.output}
    assert {m.second for m in matching.matches if m.first in outputs} == outputs
