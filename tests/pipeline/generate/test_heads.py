from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper, parser

from graph_tools.model import Model, load
from pipeline.generate.heads import find_heads

HEADER = '<ir_version: 8, opset_import: ["" : 17]>'


def test_softmax_is_walked_through(small: Model) -> None:
    assert find_heads(small) == ("g",)


def test_decoded_boxes_lead_to_their_convolutions(tmp_path: Path) -> None:
    graph = """
    boxes (float[N, 3, 8, 8] image) => (float[N, 64, 4] boxes, float[N, 64, 2] scores)
    <float[4, 3, 1, 1] w1, float[2, 3, 1, 1] w2, float[4] b, int64[3] four, int64[3] two,
     float[1] half>
    {
        c1 = Conv (image, w1)
        t1 = Transpose <perm = [0, 2, 3, 1]> (c1)
        r1 = Reshape (t1, four)
        m1 = Mul (r1, half)
        boxes = Exp (m1)
        c2 = Conv (image, w2)
        t2 = Transpose <perm = [0, 2, 3, 1]> (c2)
        r2 = Reshape (t2, two)
        scores = Sigmoid (r2)
    }
    """
    proto = parser.parse_model(HEADER + graph)
    floats = {"w1": [4, 3, 1, 1], "w2": [2, 3, 1, 1], "b": [4], "half": [1]}
    for name, shape in floats.items():
        size = 1
        for dim in shape:
            size *= dim
        values = [0.1 * (index + 1) for index in range(size)]
        proto.graph.initializer.append(
            helper.make_tensor(name, TensorProto.FLOAT, shape, values)
        )
    for name, last in (("four", 4), ("two", 2)):
        proto.graph.initializer.append(
            helper.make_tensor(name, TensorProto.INT64, [3], [-1, 64, last])
        )
    onnx.save(proto, tmp_path / "boxes.onnx")
    assert find_heads(load(tmp_path / "boxes.onnx")) == ("c1", "c2")


@pytest.mark.parametrize(
    ("file", "heads"),
    [
        ("cifar10_resnet20.onnx", 1),
        ("mlperftiny_resnet8_cifar10_tf2onnx_bn.onnx", 1),
        ("ultraface_rfb320.onnx", 8),
        ("yolo_fastestv2_coco.onnx", 6),
    ],
)
def test_heads_of_real_networks_are_their_last_linear_layers(
    shared_models: Path, file: str, heads: int
) -> None:
    model = load(shared_models / file)
    found = find_heads(model)
    assert len(found) == heads
    producers = {name: node for node in model.proto.graph.node for name in node.output}
    assert {producers[name].op_type for name in found} <= {"Conv", "Gemm", "Add"}
