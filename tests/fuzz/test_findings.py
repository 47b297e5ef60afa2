"""What the fuzzer found, each as the smallest file that showed it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from graph_tools.errors import DataError, ModelError, VerificationError
from graph_tools.prepare import prepare_for_quantization
from graph_tools.qdq import write_qdq
from graph_tools.torch_graph import TorchGraph
from pipeline.generate.stretch import ranges
from pipeline.images import ImageWriter, open_images
from pipeline.proving import verify_file
from pipeline.quantize import quantize
from pipeline.quantize.observe import observe
from pipeline.settings import QuantizeSettings, VerifySettings
from pipeline.verify import Proof
from tests.pipeline.qdq_builder import residual_network


def proof_of(proto: onnx.ModelProto, folder: Path) -> Proof:
    path = folder / "case.onnx"
    path.write_bytes(proto.SerializeToString())
    settings = VerifySettings(max_images=2, interpreter_images=2, threads=1)
    return verify_file(path, None, settings)[0]


def test_verify_of_nodes_in_the_wrong_order(tmp_path: Path) -> None:
    """onnxruntime sorts them; the interpreter made nothing, and a KeyError came out."""
    proto = residual_network()
    nodes = list(reversed(proto.graph.node))
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    refused = proof_of(proto, tmp_path).interpreted.refused
    assert "the interpreter has no integers for" in refused


def test_zero_points_that_do_not_fit_the_weights(tmp_path: Path) -> None:
    """Taken off the weights in front of onnxruntime, which refuses them: a ValueError."""
    proto = residual_network()
    for node in proto.graph.node:
        for entry in node.attribute:
            if node.op_type == "DequantizeLinear" and entry.name == "axis":
                entry.i = 2
    with pytest.raises(VerificationError, match="onnxruntime fails"):
        proof_of(proto, tmp_path)


def test_a_dropout_whose_training_mode_is_no_scalar(make_model) -> None:
    """The truth of several values was a ValueError."""
    with pytest.raises(ModelError, match="Dropout in training mode"):
        make_model(
            "g (float[N,3,4,4] x) => (float[N,3,4,4] y) { y = Dropout(x, r, t) }",
            r=np.float32(0.5),
            t=np.array([False, True]),
        )


def _negative_batch(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -3


def _endless_input(proto: onnx.ModelProto) -> None:
    for dim in proto.graph.input[0].type.tensor_type.shape.dim[1:]:
        dim.dim_value = 2**40


def _no_outputs(proto: onnx.ModelProto) -> None:
    proto.graph.node.append(onnx.helper.make_node("Relu", [proto.graph.input[0].name], []))


def _empty_zero_point(proto: onnx.ModelProto) -> None:
    node = next(node for node in proto.graph.node if node.op_type == "DequantizeLinear")
    entry = next(t for t in proto.graph.initializer if t.name == node.input[2])
    empty = np.zeros(0, onnx.numpy_helper.to_array(entry).dtype)
    entry.CopyFrom(onnx.numpy_helper.from_array(empty, entry.name))


def _two_zero_points(proto: onnx.ModelProto) -> None:
    node = next(node for node in proto.graph.node if node.op_type == "QuantizeLinear")
    entry = next(t for t in proto.graph.initializer if t.name == node.input[2])
    twice = np.zeros(2, onnx.numpy_helper.to_array(entry).dtype)
    entry.CopyFrom(onnx.numpy_helper.from_array(twice, entry.name))


def _bounds_in_a_row(proto: onnx.ModelProto) -> None:
    proto.graph.initializer.append(
        onnx.numpy_helper.from_array(np.zeros(2, np.float32), "bounds")
    )
    first = proto.graph.input[0].name
    proto.graph.node.append(onnx.helper.make_node("Clip", [first, "bounds"], ["clipped"]))


def _endless_row(proto: onnx.ModelProto) -> None:
    for name, values in (("sizes", np.array([2**36])), ("one", np.ones(1, np.float32))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    proto.graph.node.append(onnx.helper.make_node("Expand", ["one", "sizes"], ["row"]))
    proto.graph.node.append(onnx.helper.make_node("Sub", ["row", "row"], ["difference"]))


def _endless_opset(proto: onnx.ModelProto) -> None:
    proto.opset_import[0].version = 2**40


def _float_zero_point(proto: onnx.ModelProto) -> None:
    node = next(node for node in proto.graph.node if node.op_type == "QuantizeLinear")
    entry = next(t for t in proto.graph.initializer if t.name == node.input[2])
    entry.CopyFrom(onnx.helper.make_tensor(entry.name, onnx.TensorProto.FLOAT8E4M3FN, [], [0]))


def _endless_ir_version(proto: onnx.ModelProto) -> None:
    proto.ir_version = 2**40


def _zero_scale(proto: onnx.ModelProto) -> None:
    node = next(node for node in proto.graph.node if node.op_type == "QuantizeLinear")
    entry = next(t for t in proto.graph.initializer if t.name == node.input[1])
    entry.CopyFrom(onnx.numpy_helper.from_array(np.zeros((), np.float32), entry.name))


def _another_operator(proto: onnx.ModelProto) -> None:
    node = next(node for node in proto.graph.node if node.op_type == "QuantizeLinear")
    node.op_type = "RegexFullMatch"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_another_operator, "is none that onnx knows"),
        (_negative_batch, "has a dimension of -3"),
        (_endless_input, "values"),
        (_no_outputs, "output size 0"),
        (_empty_zero_point, "a zero point without values"),
        (_two_zero_points, "a zero point of shape"),
        (_bounds_in_a_row, "a bound that is no single number"),
        (_endless_opset, "imports opset 1099511627776"),
        (_float_zero_point, "float8_e4m3fn in place of integers"),
        (_endless_ir_version, "IR version 1099511627776"),
        (_zero_scale, "a scale that is zero or not finite"),
        (_endless_row, "68719476736"),
    ],
)
def test_verify_of_parts_that_do_not_fit(tmp_path: Path, damage, message: str) -> None:
    """Each was an internal error deep inside, or asked numpy for more than there is."""
    proto = residual_network()
    damage(proto)
    with pytest.raises(ModelError, match=message):
        proof_of(proto, tmp_path)


def test_tensors_without_elements(make_model) -> None:
    """There was no histogram of one: a KeyError."""
    model = make_model(
        "g (float[N,3,4,4] x) => (float[N,3,M,4] y) { y = Slice(x, end, end, axis) }",
        end=np.array([4]),
        axis=np.array([2]),
    )
    with pytest.raises(DataError, match="no elements"):
        observe(TorchGraph(model.proto), ["y"], lambda: iter([torch.ones(2, 3, 4, 4)]))


def test_outputs_without_elements() -> None:
    """Their range was an IndexError, once images were made."""
    with pytest.raises(ModelError, match="output has no elements"):
        ranges(torch.empty(4, 0, 3))


def test_values_too_large_for_a_power_of_two(make_model) -> None:
    """A range of 2**128 is not in float32: counting into it was a RuntimeError."""
    model = make_model(
        "g (float[N,3,4,4] x) => (float[N,3,4,4] y) { y = Mul(x, c) }", c=np.float32(3e38)
    )
    graph = TorchGraph(model.proto)
    with pytest.raises(DataError, match="too much for a power-of-two range"):
        observe(graph, ["y"], lambda: iter([torch.ones(2, 3, 4, 4)]))


def test_a_normalization_whose_axes_are_not_given(make_model, tmp_path: Path) -> None:
    """onnx 1.23 cannot infer the shapes of its body then: an InferenceError as it was written."""
    model = make_model(
        "g (float[N,3,4,4] x) => (float[N,4,4,4] y)"
        " { c = Conv<pads=[1,1,1,1]>(x, w) y = MeanVarianceNormalization(c) }",
        w=np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32),
    )
    with ImageWriter(tmp_path / "images.npz", count=4, shape=(3, 4, 4)) as writer:
        writer.append(np.random.default_rng(1).normal(size=(4, 3, 4, 4)).astype(np.float32))
    found = quantize(
        prepare_for_quantization(model),
        open_images(tmp_path / "images.npz"),
        QuantizeSettings(),
    )
    onnx.checker.check_model(write_qdq(found.model, found.plan), full_check=True)
