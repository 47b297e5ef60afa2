from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto

from graph_tools.errors import SettingsError, TargetError
from graph_tools.integer import IntegerNetwork
from graph_tools.model import load
from graph_tools.opset import to_older_opset
from graph_tools.quantized_graph import QuantizedGraph
from pipeline.cli import main
from pipeline.settings import QuantizeSettings
from pipeline.target_profiles import Rules, TargetProfile, load_profile, profile_names
from pipeline.target_rules import not_taken, settings_for
from pipeline.verify.causes import has_rounded_branch

TEXT = """<ir_version: 8, opset_import: ["" : 17]>
net (float[N,3,8,8] x) => (float[N,5] y) {
    a = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w1, b1)
    r = Relu(a)
    b = Conv<kernel_shape=[1,1]>(r, w2, b2)
    c = Add(r, b)
    d = Relu(c)
    e = Mul(d, half)
    f = GlobalAveragePool(e)
    g = Flatten(f)
    y = Gemm<transB=1>(g, w3, b3)
}"""
SHAPES = {
    "w1": (6, 3, 3, 3),
    "b1": (6,),
    "w2": (6, 6, 1, 1),
    "b2": (6,),
    "w3": (5, 6),
    "b3": (5,),
}


@pytest.fixture(scope="session")
def network(tmp_path_factory):
    path = tmp_path_factory.mktemp("net") / "net.onnx"
    proto, random = onnx.parser.parse_model(TEXT), np.random.default_rng(1)
    for name, shape in SHAPES.items():
        values = random.standard_normal(shape).astype(np.float32) * 0.3
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    half = np.full((1, 6, 1, 1), 0.5, np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(half, "half"))
    onnx.save(proto, path)
    return path


@pytest.fixture
def quantized(network, tmp_path):
    def run(*flags):
        path = tmp_path / "q.onnx"
        words = ["--method", "noise", "--num-images", "8", "--quiet", *flags]
        code = main(["quantize", str(network), "-o", str(path), *words])
        return code, onnx.load(path) if path.exists() else None

    return run


@pytest.mark.parametrize("name", profile_names())
def test_every_targets_rules_are_settings_that_exist(name):
    settings = settings_for(load_profile(name), QuantizeSettings())
    assert settings.weights == 8
    rules = load_profile(name).rules or Rules()
    for operator in rules.operators:
        onnx.defs.get_schema(operator)


def test_the_default_target_changes_nothing():
    assert settings_for(load_profile("onnxruntime"), QuantizeSettings()) == QuantizeSettings()


@pytest.mark.parametrize(
    ("flags", "option"),
    [
        ({"container": "int4"}, "--container int4"),
        ({"weights": 4}, "--weights 4"),
        ({"activations": 16}, "--activations 16"),
        ({"bits": ("conv1=W4",)}, "--bits conv1=W4"),
        ({"target_size": "0.6x"}, "--target-size 0.6x"),
        ({"scheme": "academic"}, "--scheme academic"),
        ({"weight_granularity": "tensor"}, "--weight-granularity tensor"),
        ({"bias_storage": "int32"}, "--bias-storage int32"),
    ],
)
def test_a_conflict_names_the_flag_and_the_target(flags, option):
    with pytest.raises(SettingsError, match="target tensorrt takes") as caught:
        settings_for(load_profile("tensorrt"), QuantizeSettings(**flags))
    assert caught.value.where == option


def test_a_conflict_on_the_command_line_writes_nothing(quantized, capsys):
    code, proto = quantized("--target", "tensorrt", "--container", "int4")
    assert code == 2
    assert proto is None
    assert capsys.readouterr().err.count("\n") == 1


def test_an_unknown_target_lists_those_there_are(quantized, capsys):
    assert quantized("--target", "abacus")[0] == 2
    assert "imx500" in capsys.readouterr().err


def test_tensorrt_gets_signed_integers_around_zero_and_float_biases(quantized):
    code, proto = quantized("--target", "tensorrt")
    assert code == 0
    graph = QuantizedGraph(proto)
    for node in (*graph.quantizers, *graph.dequantizers):
        assert graph.integer_type(node) == np.int8, node.name
        assert not np.any(graph.constant(node.input[2]))
        assert graph.is_weight(node) or graph.scale(node).size == 1
    for node in graph.weighted():
        assert graph.scale(graph.producers[node.input[1]]).size > 1  # a scale a channel
        assert graph.constant(node.input[2]).dtype == np.float32
    add = next(node for node in proto.graph.node if node.op_type == "Add")
    assert {graph.producers[name].op_type for name in add.input} == {"DequantizeLinear"}


def test_a_relu_before_signed_integers_stands_behind_its_operator(quantized):
    _, proto = quantized("--target", "tensorrt")
    graph = QuantizedGraph(proto)
    relus = [node for node in proto.graph.node if node.op_type == "Relu"]
    assert len(relus) == 2
    for relu in relus:
        assert graph.producers[relu.input[0]].op_type in ("Conv", "Add")
        assert graph.consumers[relu.output[0]][0].op_type == "QuantizeLinear"


@pytest.mark.parametrize("target", ["openvino", "tensorrt", "vitis"])
def test_the_interpreter_agrees_with_onnxruntime(quantized, target, run_onnx):
    _, proto = quantized("--target", target)
    image = np.random.default_rng(2).standard_normal((1, 3, 8, 8)).astype(np.float32)
    found = IntegerNetwork(proto).run(image).outputs["y"]
    assert np.array_equal(found, run_onnx(proto, image)[0])


def test_openvino_gets_no_rounding_between_a_convolution_and_its_add(network, tmp_path):
    """In the other files there is one, where the convolution has no second reader."""
    found = {}
    for target in ("onnxruntime", "openvino"):
        path = tmp_path / f"{target}.onnx"
        words = ["--method", "noise", "--num-images", "8", "--quiet", "--target", target]
        assert main(["quantize", str(network), "-o", str(path), *words]) == 0
        found[target] = has_rounded_branch(QuantizedGraph(onnx.load(path)))
    assert found == {"onnxruntime": True, "openvino": False}


def test_openvino_gets_no_signed_activations(quantized):
    """A Concat into int8 in front of a convolution is computed wrongly there."""
    for target, some in (("onnxruntime", True), ("openvino", False)):
        graph = QuantizedGraph(quantized("--target", target)[1])
        signed = [n for n in graph.quantizers if graph.integer_type(n) == np.int8]
        assert bool(signed) == some


def test_vitis_gets_one_scale_a_tensor_at_an_older_opset(quantized):
    code, proto = quantized("--target", "vitis")
    assert code == 0
    graph = QuantizedGraph(proto)
    for node in (*graph.quantizers, *graph.dequantizers):
        scale = graph.scale(node)
        assert scale.ndim == 0
        assert np.frexp(scale)[0] == 0.5
        assert graph.integer_type(node) in (np.int8, np.int32)
    assert proto.opset_import[0].version == 17
    assert graph.batch == 1
    ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])


def test_operators_that_a_target_does_not_take_are_named(network):
    profile = TargetProfile(name="chip", title="", rules=Rules(operators=("Conv", "Add")))
    lines = list(not_taken(profile, load(network)))
    assert Counter("Relu" in line for line in lines)[True] == 1
    assert any("GlobalAveragePool" in line for line in lines)
    assert not any("Conv " in line for line in lines)


def test_a_layout_that_a_target_does_not_take_is_said(network):
    profile = TargetProfile(name="chip", title="", rules=Rules(layout="NHWC"))
    assert any("NHWC" in line for line in not_taken(profile, load(network)))


def test_metadata_of_the_default_target_is_as_before(quantized):
    _, proto = quantized()
    properties = {entry.key: entry.value for entry in proto.metadata_props}
    assert "zsq.target" not in properties
    assert "signedness" not in properties["zsq.settings"]
    assert "fused_sums" not in properties["zsq.settings"]


def test_an_older_opset_refuses_what_it_has_not():
    value = onnx.helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])
    out = onnx.helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 4])
    node = onnx.helper.make_node("Gelu", ["x"], ["y"], "gelu")
    graph = onnx.helper.make_graph([node], "g", [value], [out])
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
    assert to_older_opset(proto, 20, where="x").opset_import[0].version == 20
    with pytest.raises(TargetError, match="no Gelu") as caught:
        to_older_opset(proto, 17, where="x")
    assert "gelu" in caught.value.where
