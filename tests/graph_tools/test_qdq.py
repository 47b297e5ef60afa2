"""The written file computes exactly what the plan says."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest

from graph_tools.qdq import dequantized_name, write_qdq
from graph_tools.quantizer import FloatNode, Plan, QuantizedConstant, TensorQuantizer

RNG = np.random.default_rng(0)
U8 = TensorQuantizer(bits=8, signed=False, exponent=-6)
S8 = TensorQuantizer(bits=8, signed=True, exponent=-5)


@pytest.fixture
def conv_relu(make_model):
    return make_model(
        "g (float[N,2,4,4] x) => (float[N,3,4,4] y) {"
        " c = Conv<pads=[1,1,1,1]>(x, w, b) y = Relu(c) }",
        w=RNG.normal(size=(3, 2, 3, 3)).astype(np.float32),
        b=RNG.normal(size=3).astype(np.float32),
    )


def plan_for(model, *, input_quantizer=S8, output_quantizer=U8, bits=8) -> Plan:
    conv, relu = model.proto.graph.node
    weights = {i.name: onnx.numpy_helper.to_array(i) for i in model.proto.graph.initializer}
    weight = TensorQuantizer(bits=bits, signed=True, exponent=(-5, -6, -4), axis=0)
    exponents = tuple(input_quantizer.exponent + exponent for exponent in (-5, -6, -4))
    bias = TensorQuantizer(bits=32, signed=True, exponent=exponents, axis=0)
    return Plan(
        tensors={"x": input_quantizer, "y": output_quantizer},
        constants={
            conv.input[1]: QuantizedConstant(
                integers=weight.quantize(weights[conv.input[1]]),
                quantizer=weight,
                role="weight",
                node=conv.name,
            ),
            conv.input[2]: QuantizedConstant(
                integers=bias.quantize(weights[conv.input[2]]),
                quantizer=bias,
                role="bias",
                node=conv.name,
            ),
        },
        absorbed={relu.name: "y"},
    )


def integer_reference(model, plan, image):
    """Conv + Relu in 64-bit integers."""
    conv = model.proto.graph.node[0]
    x = plan.tensors["x"].quantize(image).astype(np.int64)
    w = plan.constants[conv.input[1]]
    b = plan.constants[conv.input[2]]
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    sums = np.einsum("nchwij,ocij->nohw", windows, w.integers.astype(np.int64))
    sums = sums + b.integers.reshape(1, -1, 1, 1)
    values = sums * b.quantizer.scale.astype(np.float64).reshape(1, -1, 1, 1)
    out = plan.tensors["y"]
    return out.dequantize(out.quantize(values))


@pytest.mark.parametrize(
    ("given", "result", "bits"),
    [
        (S8, U8, 8),
        (U8, U8, 8),
        (S8, TensorQuantizer(bits=4, signed=False, exponent=-2), 4),
        (
            TensorQuantizer(bits=16, signed=True, exponent=-12),
            TensorQuantizer(bits=16, signed=False, exponent=-12),
            8,
        ),
        (S8, U8, 2),
    ],
)
def test_written_file_equals_integer_arithmetic(conv_relu, run_onnx, given, result, bits):
    plan = plan_for(conv_relu, input_quantizer=given, output_quantizer=result, bits=bits)
    image = 2 * RNG.normal(size=(5, 2, 4, 4)).astype(np.float32)
    (found,) = run_onnx(write_qdq(conv_relu, plan), image)
    assert np.array_equal(found, integer_reference(conv_relu, plan, image))


def test_structure(conv_relu):
    proto = write_qdq(conv_relu, plan_for(conv_relu), metadata={"zsq.test": "1"})
    operators = [n.op_type for n in proto.graph.node]
    assert operators == [
        "QuantizeLinear",
        "DequantizeLinear",
        "DequantizeLinear",
        "DequantizeLinear",
        "Conv",
        "QuantizeLinear",
        "DequantizeLinear",
    ]
    assert proto.ir_version == 10
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", 21)]
    assert [o.name for o in proto.graph.output] == ["y"]
    assert [p.key for p in proto.metadata_props] == ["zsq.test", "zsq.digests"]
    assert proto.metadata_props[0].value == "1"
    assert dequantized_name("y", ("y",)) == "y"
    assert dequantized_name("x", ("y",)) == "x_dq"


def test_declared_batch_is_restored(make_model, tmp_path):
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> '
        "g (float[1,2,4,4] x) => (float[1,2,4,4] y) { y = Relu(x) }"
    )
    onnx.save(proto, tmp_path / "static.onnx")
    from graph_tools.model import load

    model = load(tmp_path / "static.onnx")
    written = write_qdq(model, Plan(tensors={"x": S8, "y": U8}, constants={}))
    dims = written.graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_value for d in dims] == [1, 2, 4, 4]


def test_float_nodes_read_exact_constants(make_model, run_onnx):
    model = make_model(
        "g (float[N,2,4,4] x) => (float[N,2,4,4] y) { a = Mul(x, k) y = Exp(a) }",
        k=np.float32(0.3),
    )
    constant = TensorQuantizer(bits=8, signed=False, exponent=0)
    mul, _ = model.proto.graph.node
    plan = Plan(
        tensors={"x": S8},
        constants={
            "k": QuantizedConstant(
                integers=constant.quantize(np.float32(0.3)),
                quantizer=constant,
                role="operand",
                node=mul.name,
            )
        },
        float_nodes=(FloatNode(node=mul.name, op_type="Mul", reason=""),),
    )
    image = RNG.normal(size=(1, 2, 4, 4)).astype(np.float32)
    (found,) = run_onnx(write_qdq(model, plan), image)
    expected = np.exp(S8.dequantize(S8.quantize(image)) * np.float32(0.3))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("operator", ["MatMul", "Add", "Sub", "Mul"])
def test_a_constant_with_two_readers_runs_with_the_precision_option(make_model, operator):
    model = make_model(
        "g (float[N,2,4,4] x) => (float[N,2,4,4] y) {"
        f" a = {operator}(x, w) y = {operator}(a, w) }}",
        w=RNG.normal(size=(4, 4)).astype(np.float32),
    )
    weight = TensorQuantizer(bits=8, signed=True, exponent=-6)
    integers = np.array(RNG.integers(-128, 128, (4, 4)), np.int32)
    constant = QuantizedConstant(
        integers=integers, quantizer=weight, role="weight", node=model.proto.graph.node[0].name
    )
    plan = Plan(tensors=dict.fromkeys(("x", "a", "y"), S8), constants={"w": constant})
    written = write_qdq(model, plan).SerializeToString()
    image = RNG.normal(size=(1, 2, 4, 4)).astype(np.float32)
    found = []
    for level, precision in (("ORT_DISABLE_ALL", "0"), ("ORT_ENABLE_ALL", "1")):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        options.add_session_config_entry("session.x64quantprecision", precision)
        session = onnxruntime.InferenceSession(written, options)
        found.append(session.run(None, {"x": image})[0])
    np.testing.assert_array_equal(found[0], found[1])
