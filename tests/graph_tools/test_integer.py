"""The integer interpreter against unoptimized onnxruntime, operator by operator."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest

from graph_tools.errors import IntegerOverflowError, ModelError, UnsupportedOperatorError
from graph_tools.integer import IntegerNetwork, first_difference
from tests.pipeline.qdq_builder import QdqBuilder, residual_network

IMAGE = (4, 9, 10)
I8, U8, I16 = np.int8, np.uint8, np.int16


def in_onnxruntime(model: onnx.ModelProto, images: np.ndarray, names) -> dict:
    """Integer tensors of the unoptimized run."""
    whole = onnx.shape_inference.infer_shapes(model)
    types = {value.name: value for value in whole.graph.value_info}
    whole.graph.output.extend(types[name] for name in names)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        whole.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found = session.run(list(names), {session.get_inputs()[0].name: images})
    return dict(zip(names, found, strict=True))


def images_for(model: onnx.ModelProto, count: int = 3) -> np.ndarray:
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim[1:]]
    return np.random.default_rng(3).normal(size=(count, *shape)).astype(np.float32) * 2


def assert_equal_runs(model: onnx.ModelProto, *, strict: bool = True):
    images = images_for(model)
    network = IntegerNetwork(model, strict=strict)
    run = network.run(images)
    expected = in_onnxruntime(model, images, list(run.integers))
    assert first_difference(network.graph, run.integers, expected) is None
    assert any(len(np.unique(values)) > 8 for values in run.integers.values())
    return run


def one(op: str, **attributes) -> Callable[[QdqBuilder], str]:
    return lambda g: g.node(op, [g.image], "y", **attributes)


def weighted(op: str, shape, **attributes) -> Callable[[QdqBuilder], str]:
    return lambda g: g.weighted(op, g.image, "y", shape, **attributes)


def with_constants(op: str, *values, **attributes) -> Callable[[QdqBuilder], str]:
    def build(g: QdqBuilder) -> str:
        names = [g.constant(f"k{i}", value) for i, value in enumerate(values)]
        return g.node(op, [g.image, *names], "y", **attributes)

    return build


def pair(op: str, first: int = -5, second: int = -3, **attributes):
    def build(g: QdqBuilder) -> str:
        a = g.quantize(g.node("MaxPool", [g.image], "a", kernel_shape=[1, 1]), first, I8)
        b = g.quantize(g.node("Relu", [g.image], "b"), second, U8)
        return g.node(op, [a, b], "y", **attributes)

    return build


def matmul(g: QdqBuilder) -> str:
    turned = g.quantize(g.node("Transpose", [g.image], "t", perm=[0, 1, 3, 2]), -5, I8)
    return g.node("MatMul", [g.image, turned], "y")


def gemm(g: QdqBuilder) -> str:
    flat = g.quantize(g.node("Flatten", [g.image], "f"), -5, I8)
    return g.weighted("Gemm", flat, "y", (12, 360), transB=1)


def split(g: QdqBuilder) -> str:
    sizes = g.constant("sizes", np.int64([1, 3]))
    g.nodes.append(onnx.helper.make_node("Split", [g.image, sizes], ["s0", "s1"], "s", axis=1))
    first = g.quantize("s0", -4, I8)
    second = g.quantize("s1", -5, I8)
    return g.node("Concat", [second, first], "y", axis=1)


def empty(values) -> np.ndarray:
    return np.asarray(values, np.float32)


CASES = {
    "conv": weighted("Conv", (8, 4, 3, 3), pads=[1] * 4),
    "conv strides pads": weighted("Conv", (8, 4, 3, 2), strides=[2, 3], pads=[0, 1, 2, 1]),
    "conv dilations": weighted("Conv", (8, 4, 3, 3), dilations=[2, 3], pads=[2] * 4),
    "conv groups": weighted("Conv", (8, 2, 3, 3), group=2),
    "conv depthwise": weighted("Conv", (8, 1, 3, 3), group=4, pads=[1] * 4),
    "conv same": weighted("Conv", (8, 4, 3, 3), auto_pad="SAME_LOWER", strides=[2, 2]),
    "conv transposed": weighted(
        "ConvTranspose", (4, 6, 3, 3), axis=1, strides=[2, 2], pads=[1, 0, 1, 1],
        output_padding=[1, 0],
    ),
    "gemm": gemm,
    "matmul": matmul,
    "add": pair("Add"),
    "add far apart": pair("Add", -9, 1),
    "sub": pair("Sub"),
    "mul": pair("Mul"),
    "max": pair("Max"),
    "min": pair("Min"),
    "concat": pair("Concat", axis=1),
    "relu": one("Relu"),
    "clip 6": with_constants("Clip", np.float32(0), np.float32(6)),
    "clip odd": with_constants("Clip", np.float32(-0.7), np.float32(1.3)),
    "max pool": one("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4),
    "max pool ceil": one("MaxPool", kernel_shape=[2, 3], strides=[2, 2], ceil_mode=1),
    "average pool": one("AveragePool", kernel_shape=[3, 3], strides=[2, 1], pads=[1] * 4),
    "average pool with pads": one(
        "AveragePool", kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=1
    ),
    "average pool ceil": one(
        "AveragePool", kernel_shape=[4, 3], strides=[2, 2], ceil_mode=1
    ),
    "global average": one("GlobalAveragePool"),
    "global max": one("GlobalMaxPool"),
    "reduce mean": with_constants("ReduceMean", np.int64([2, 3]), keepdims=1),
    "resize": with_constants(
        "Resize", empty([]), empty([1, 1, 2, 2]), mode="nearest",
        coordinate_transformation_mode="asymmetric", nearest_mode="floor",
    ),
    "resize down": with_constants(
        "Resize", empty([]), empty([]), np.int64([1, 4, 5, 7]), mode="nearest"
    ),
    "pad": with_constants("Pad", np.int64([0, 0, 1, 2, 0, 0, 0, 1])),
    "pad reflect": with_constants("Pad", np.int64([0, 0, 1, 2, 0, 0, 0, 1]), mode="reflect"),
    "reshape": with_constants("Reshape", np.int64([0, 2, -1, 10])),
    "transpose": one("Transpose", perm=[0, 2, 3, 1]),
    "slice": with_constants(
        "Slice", np.int64([-2, 7]), np.int64([-100, 2]), np.int64([2, 3]), np.int64([-2, -1])
    ),
    "split": split,
    "gather": with_constants("Gather", np.int64([3, 0, -1]), axis=1),
    "depth to space": one("DepthToSpace", blocksize=2, mode="CRD"),
    "sigmoid": one("Sigmoid"),
    "hard swish": one("HardSwish"),
    "leaky relu": one("LeakyRelu", alpha=0.1),
    "tanh": one("Tanh"),
    "gain": with_constants("Mul", np.float32(0.3)),
    "gain of a higher rank": with_constants("Add", np.full((1, 1, 1, 1, 1), 0.3, np.float32)),
    "gain per channel": with_constants(
        "Div", np.float32([1.4, 3, -0.7, 7]).reshape(4, 1, 1)
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [I8, U8, I16], ids=lambda t: t.__name__)
@pytest.mark.parametrize("name", CASES)
def test_operators_give_the_integers_of_onnxruntime(name, dtype):
    if dtype is I16 and name in {"tanh", "gain"}:
        pytest.skip("65,536 entries are shown once")
    g = QdqBuilder(IMAGE, dtype=dtype)
    y = CASES[name](g)
    g.quantize(y, -4, I8, output="out")
    model = g.model({"out": _rank(name)})
    run = assert_equal_runs(model, strict=True)
    assert bool(run.tables) == (
        name in {"sigmoid", "hard swish", "leaky relu", "tanh"} or name.startswith("gain")
    )


def _rank(name: str) -> int:
    return {"gemm": 2, "gain of a higher rank": 5}.get(name, 4)


@pytest.mark.parametrize("area", [(3, 3), (7, 7), (5, 6), (9, 10)])
def test_means_round_as_float_does_for_every_sum(area):
    """All sums that 8-bit integers have, over areas that are no powers of two, and ties."""
    g = QdqBuilder((1, *area), dtype=U8)
    g.constants["image_scale"] = np.float32(1)
    y = g.node("GlobalAveragePool", [g.image], "y")
    g.quantize(y, 1, U8, output="out")  # halves are ties
    model = g.model({"out": 4})
    count = area[0] * area[1]
    sums = np.arange(255 * count + 1)
    images = np.full((len(sums), count), 0, np.float32)
    images += (sums // count)[:, None]
    images += np.arange(count) < (sums % count)[:, None]
    images = images.reshape(-1, 1, *area).astype(np.float32)
    run = IntegerNetwork(model).run(images)
    expected = in_onnxruntime(model, images, ["y_q"])
    assert np.array_equal(run.integers["y_q"], expected["y_q"])
    assert len(np.unique(run.integers["y_q"])) == 129


def test_a_network_and_its_float_tail():
    run = assert_equal_runs(residual_network(tail="softmax"))
    assert run.tail
    assert not run.float_nodes
    assert not run.outputs


def test_outputs_are_the_dequantized_integers(run_onnx):
    model = residual_network()
    images = images_for(model)
    run = IntegerNetwork(model).run(images)
    assert np.array_equal(run.outputs["logits"], run_onnx(model, images)[0])


def test_an_operator_without_integer_form_is_named():
    g = QdqBuilder(IMAGE)
    g.quantize(g.node("Softmax", [g.image], "y", axis=1), -8, U8, output="out")
    model = g.model({"out": 4})
    assert assert_equal_runs(model, strict=False).float_nodes == ("softmax_y",)
    with pytest.raises(UnsupportedOperatorError, match=r"softmax_y.*Softmax"):
        IntegerNetwork(model, strict=True).run(images_for(model))


def test_narrow_and_midpoint_integers():
    g = QdqBuilder(IMAGE)
    y = g.weighted("Conv", g.image, "y", (8, 4, 3, 3))
    scale = g.constant("s", np.float32(2.0**-2))
    zero = g.constant("z", np.uint8(128))
    g.node("QuantizeLinear", [y, scale, zero], "y_q")
    low, high = g.constant("low", np.uint8(120)), g.constant("high", np.uint8(135))
    g.node("Clip", ["y_q", low, high], "y_q_narrow")
    narrow = g.node("DequantizeLinear", ["y_q_narrow", scale, zero], "y_dq")
    g.quantize(g.node("Add", [narrow, narrow], "sum"), -1, I8, output="out")
    run = assert_equal_runs(g.model({"out": 4}))
    assert {"y_q", "y_q_narrow"} <= set(run.integers)
    assert run.integers["y_q_narrow"].min() == 120
    assert run.integers["y_q_narrow"].max() == 135


def test_overflow_is_reported_and_not_wrapped():
    g = QdqBuilder((2**10, 1, 1), dtype=I16)
    g.weighted(
        "Conv", g.image, "y", (2, 2**10, 1, 1), weight=np.full((2, 2**10, 1, 1), 127, I8)
    )
    g.quantize("y", -4, I8, output="out")
    model = g.model({"out": 4})
    images = np.full((1, 2**10, 1, 1), 1e6, np.float32)  # 2^10 products of 2^15 and 2^7
    with pytest.raises(IntegerOverflowError, match=r"node conv_y: Conv needs 33 bits"):
        IntegerNetwork(model).run(images)
    wide = IntegerNetwork(model, accumulator_bits=33).run(images)
    assert wide.accumulators["conv_y"] == 33
    assert wide.integers["y_q"].tolist() == [[[[127]], [[127]]]]


def test_a_scale_that_is_no_power_of_two_is_refused():
    model = residual_network()
    for entry in model.graph.initializer:
        if entry.name == "c2_scale":
            entry.CopyFrom(onnx.numpy_helper.from_array(np.float32(0.3), entry.name))
    with pytest.raises(ModelError, match=r"quantizelinear_c2.*no power of two"):
        IntegerNetwork(model).run(images_for(model))


@pytest.mark.parametrize("layer", ["c1", "c2", "dw", "fc"])
def test_a_corrupted_weight_is_traced_to_its_node(layer):
    good, bad = residual_network(), residual_network()
    for entry in bad.graph.initializer:
        if entry.name == f"{layer}_w_q":
            weight = onnx.numpy_helper.to_array(entry).copy()
            weight[0] = -weight[0]
            entry.CopyFrom(onnx.numpy_helper.from_array(weight, entry.name))
    images = images_for(good)
    network = IntegerNetwork(good)
    runs = [network.run(images), IntegerNetwork(bad).run(images)]
    found = first_difference(network.graph, *(run.integers for run in runs))
    # Behind an absorbed Relu the node that is quantized is the Relu.
    maker = network.graph.producers[f"{found.tensor.removesuffix('_q')}"]
    assert found.node == maker.name
    assert layer in {maker.output[0], *maker.input}
    assert 0 < found.differing <= found.elements
