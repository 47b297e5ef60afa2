"""Real compilers: what they compute exactly, and a minimal file for each known exception."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest

from graph_tools.opset import to_older_opset
from graph_tools.quantized_graph import QuantizedGraph
from pipeline.settings import QuantizeSettings
from pipeline.target_profiles import Check, load_profile
from pipeline.verify.agreement import measure_target
from pipeline.verify.compilers.onnxruntime_engine import OnnxruntimeEngine
from pipeline.verify.compilers.process import ProcessEngine
from pipeline.verify.cut import cut_at
from pipeline.verify.reference import Reference, static_copy
from tests.differential.test_written_files import written
from tests.pipeline.qdq_builder import QdqBuilder, residual_network
from tests.pipeline.targets.installed import installed

pytestmark = pytest.mark.slow
Compiler = Callable[[str], ProcessEngine]


@pytest.fixture
def compiler(monkeypatch) -> Compiler:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return installed


def images(count: int = 4) -> np.ndarray:
    rng = np.random.default_rng(3)
    return rng.normal(size=(count, 1, 3, 16, 16)).astype(np.float32)


def reference(proto: onnx.ModelProto) -> Reference:
    return Reference.measure(static_copy(proto, 1), images())


@pytest.mark.parametrize("name", ["iree", "tvm"])
@pytest.mark.parametrize("tail", ["integer", "float"])
def test_these_are_exact(compiler, name, tail):
    row = measure_target(
        compiler(name), reference(residual_network(tail=tail)), load_profile(name).verify
    )
    assert (row.verdict, row.refused) == ("exact", "")
    assert row.integer_kernels is not None


def test_iree_refuses_one_window_of_a_strided_depthwise_convolution(compiler):
    """IREE 3.13.0: 5x5, stride 2, on 2x2 padded to 6x6; the one window leaves a row over."""
    g = QdqBuilder((8, 2, 2))
    attributes = {"pads": [2] * 4, "strides": [2, 2], "group": 8}
    g.weighted("Conv", g.image, "c1", (8, 1, 5, 5), **attributes)
    g.quantize("c1", -3, np.int8, output="features")
    proto = static_copy(g.model({"features": 4}), 1)
    given = np.zeros((1, 1, 8, 2, 2), np.float32)
    row = measure_target(compiler("iree"), Reference.measure(proto, given), Check())
    assert (row.verdict, row.compiled) == ("refused", False)
    assert "to be 6, but found 5" in row.refused
    exact = measure_target(compiler("tvm"), Reference.measure(proto, given), Check())
    assert exact.verdict == "exact"


def test_iree_takes_the_unsigned_integers_of_a_clip_for_signed_ones(compiler):
    """IREE 3.13.0: what exceeds 127 becomes the lower bound; with int8 all is well."""
    for dtype, low, high, exact in ((np.uint8, 0, 15, False), (np.int8, -8, 7, True)):
        g = QdqBuilder((1, 4, 8), dtype=dtype)
        bounds = [
            g.constant(name, np.asarray(value, dtype))
            for name, value in (("low", low), ("high", high))
        ]
        g.node("Clip", [f"{g.image.removesuffix('_dq')}_q", *bounds], "narrow")
        g.node("DequantizeLinear", ["narrow", "image_scale", "image_zero"], "out")
        proto = static_copy(g.model({"out": 4}), 1)
        ramp = np.arange(-64, 192, 8, dtype=np.float32) / 32
        given = Reference.measure(proto, ramp.reshape(1, 1, 1, 4, 8))
        row = measure_target(compiler("iree"), given, load_profile("iree").verify)
        assert (row.verdict, row.failed) == ("exact" if exact else "explained", False)
        assert ("takes the unsigned integers" in row.cause) is not exact
        others = measure_target(compiler("tvm"), given, load_profile("tvm").verify)
        assert others.verdict == "exact"


@pytest.mark.parametrize("operator", ["AveragePool", "MaxPool"])
def test_iree_refuses_one_window_of_a_strided_pool(compiler, operator):
    """IREE 3.13.0: 2x2, stride 2, on 3x4; the one row of windows leaves a row over."""
    g = QdqBuilder((1, 3, 4))
    g.node(operator, [g.image], "y", kernel_shape=[2, 2], strides=[2, 2])
    g.quantize("y", -5, np.int8, output="out")
    given = images(1)[:, :, :1, :3, :4]
    wanted = Reference.measure(static_copy(g.model({"out": 4}), 1), given)
    assert measure_target(compiler("iree"), wanted, Check()).verdict == "refused"
    assert measure_target(compiler("tvm"), wanted, Check()).verdict == "exact"


def moved(operator: str, attributes: dict, pads: list[int]) -> onnx.ModelProto:
    g = QdqBuilder((1, 6, 6))
    if operator == "ConvTranspose":
        g.weighted(
            "ConvTranspose", g.image, "y", (1, 2, 2, 2), axis=1, pads=pads, **attributes
        )
    else:
        given = g.constant("pads", np.int64([0, 0, *pads[:2], 0, 0, *pads[2:]]))
        g.node("Pad", [g.image, given], "y", **attributes)
    g.quantize("y", -5, np.int8, output="out")
    return static_copy(g.model({"out": 4}), 1)


@pytest.mark.parametrize(
    ("operator", "attributes", "taken", "refused"),
    [
        ("ConvTranspose", {"strides": [2, 2]}, [1, 1, 1, 1], [1, 1, 1, 0]),
        ("Pad", {"mode": "reflect"}, [1, 0, 1, 1], [0, 2, 0, 2]),
    ],
)
def test_iree_refuses_these_pads(compiler, operator, attributes, taken, refused):
    """IREE 3.13.0: ConvTranspose padded unevenly; reflections of two rows or more."""
    given = images(1)[:, :, :1, :6, :6]
    for pads, verdict in ((taken, "exact"), (refused, "refused")):
        wanted = Reference.measure(moved(operator, attributes, pads), given)
        assert measure_target(compiler("iree"), wanted, Check()).verdict == verdict
        assert measure_target(compiler("tvm"), wanted, Check()).verdict == "exact"


def one_operator(
    operator: str, zero: int, *, factor: int | None = None, **attributes
) -> onnx.ModelProto:
    """On an unsigned image; with ``factor`` times that many 128ths."""
    g = QdqBuilder((1, 16, 64), dtype=np.uint8)
    g.constants["image_zero"] = np.asarray(zero, np.uint8)
    inputs = [g.image]
    if factor is not None:
        g.constant("f_q", np.asarray([factor], np.int8))
        g.constant("f_scale", np.float32(2.0**-7))
        g.constant("f_zero", np.zeros((), np.int8))
        inputs.append(g.node("DequantizeLinear", ["f_q", "f_scale", "f_zero"], "f"))
    g.quantize(g.node(operator, inputs, "y", **attributes), -5, np.int8, output="out")
    return static_copy(g.model({"out": 4}), 1)


def ramp() -> np.ndarray:
    """Every integer of the image that 8 bits hold."""
    steps = np.resize(np.arange(-128, 256), (1, 1, 1, 16, 64))
    return (steps / 32).astype(np.float32)


def test_openvino_pads_averages_with_the_integer_zero(compiler):
    """OpenVINO 2026.4.1: 0 in place of the zero point 128."""
    check = load_profile("openvino").verify
    attributes = {"kernel_shape": [2, 2], "pads": [1, 0, 0, 1], "count_include_pad": 1}
    for zero, verdict in ((128, "explained"), (0, "exact")):
        wanted = Reference.measure(one_operator("AveragePool", zero, **attributes), ramp())
        row = measure_target(compiler("openvino"), wanted, check)
        assert (row.verdict, "pads averages" in row.cause) == (verdict, zero > 0)
        if zero:
            found = compiler("openvino").run(wanted.pieces[0].proto, ramp()).outputs[0] * 32
            given = np.clip(np.rint(ramp()[0, 0, 0] * 32) + 128, 0, 255)
            raw = np.pad(given, ((1, 0), (0, 1)))  # zeros, before the zero point is taken off
            sums = raw[:-1, :-1] + raw[1:, :-1] + raw[:-1, 1:] + raw[1:, 1:]
            expected = np.clip(np.rint(sums / 4 - 128), -128, 127)
            np.testing.assert_array_equal(found[0, 0, 0], expected)


def test_openvino_rounds_ties_otherwise_behind_a_constant_factor(compiler):
    """OpenVINO 2026.4.1 divides the quantizer's range by the factor, which rounds."""
    check = load_profile("openvino").verify
    differing = 0
    for factor in range(33, 128, 2):
        proto = one_operator("Mul", 128, factor=factor)
        wanted = Reference.measure(proto, ramp())
        row = measure_target(compiler("openvino"), wanted, check)
        assert row.verdict in ("exact", "explained")
        if row.differing:
            assert "divides a quantizer's range" in row.cause
            steps = wanted.pieces[0].wanted[0].steps.reshape(-1)
            found = compiler("openvino").run(proto, ramp()).outputs[0].reshape(-1) * 32
            given = np.clip(np.rint(ramp().reshape(-1) * 32), -128, 127)
            ties = np.abs((given * factor / 128) % 1) == 0.5
            assert ties[steps != found].all()
            differing += 1
            break
    assert differing


@pytest.mark.parametrize(("dtype", "exact"), [(np.int8, False), (np.uint8, True)])
def test_openvino_concatenates_wrongly_into_signed_integers(compiler, dtype, exact):
    """OpenVINO 2026.4.1: a Concat that is quantized to int8 in front of a convolution."""
    g = QdqBuilder((2, 4, 5), dtype=dtype)
    g.constants["image_scale"] = np.float32(2.0**-7)
    other = g.quantize(g.node("Identity", [g.image], "i"), -7, dtype)
    both = g.quantize(g.node("Concat", [other, g.image], "both", axis=1), -7, dtype)
    g.weighted("Conv", both, "c", (3, 4, 1, 1))
    g.quantize("c", -5, np.int8, output="out")
    given = np.random.default_rng(0).uniform(size=(2, 1, 2, 4, 5)).astype(np.float32)
    wanted = Reference.measure(static_copy(g.model({"out": 4}), 1), given)
    row = measure_target(compiler("openvino"), wanted, load_profile("openvino").verify)
    assert row.verdict == ("exact" if exact else "explained")
    assert ("computes a Concat wrongly" in row.cause) is not exact


def test_iree_contracts_hard_sigmoid(compiler):
    """IREE 3.13.0: 0.2 x + 0.5 rounded once; one step where two roundings end at a tie."""
    g = QdqBuilder((1, 16, 64), dtype=np.uint8)
    g.quantize(g.node("HardSigmoid", [g.image], "y"), -7, np.uint8, output="out")
    wanted = Reference.measure(static_copy(g.model({"out": 4}), 1), ramp())
    row = measure_target(compiler("iree"), wanted, load_profile("iree").verify)
    assert row.verdict in ("exact", "explained")
    assert row.largest_steps <= 1
    assert "rounds a product and the sum" in row.cause


def plain_network(bits: int) -> onnx.ModelProto:
    """Convolutions in a row, nothing for a compiler to fuse wrongly."""
    g = QdqBuilder((3, 16, 16))
    top = 2 ** (bits - 1) - 1
    draw = np.random.default_rng(1).integers
    first = draw(-top, top + 1, (16, 3, 3, 3)).astype(np.int8)
    second = np.where(draw(0, 2, (16, 16, 3, 3)) > 0, top, -top // 4).astype(np.int8)
    g.weighted("Conv", g.image, "c1", first.shape, weight=first, pads=[1] * 4)
    r1 = g.quantize(g.node("Relu", ["c1"], "r1"), -6)
    g.weighted("Conv", r1, "c2", second.shape, weight=second, exponent=-9, pads=[1] * 4)
    g.quantize(g.node("Relu", ["c2"], "r2"), -3, output="features")
    return g.model({"features": 4})


def test_openvino_is_exact_on_plain_convolutions_with_7_bit_weights(compiler):
    engine = compiler("openvino")
    row = measure_target(engine, reference(plain_network(7)), load_profile("openvino").verify)
    assert row.verdict == "exact"
    assert row.integer_kernels == (2, 2)


@pytest.mark.parametrize(("bits", "saturates"), [(8, True), (7, False)])
def test_openvino_saturates_with_8_bit_weights_where_there_is_no_vnni(
    compiler, monkeypatch, bits, saturates
):
    """Two products of up to 255 * 127 are added in 16 bits; with 7 bits they fit."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    row = measure_target(
        compiler("openvino"), reference(plain_network(bits)), load_profile("openvino").verify
    )
    assert bool(row.differing) is saturates


def without_rounding(proto: onnx.ModelProto, tensor: str) -> onnx.ModelProto:
    """Leave out the quantizer of a tensor."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    kept = [
        n for n in copy.graph.node if n.op_type != "QuantizeLinear" or n.input[0] != tensor
    ]
    for node in kept:
        if node.op_type == "DequantizeLinear" and node.input[0] == f"{tensor}_q":
            node.op_type = "Identity"
            del node.input[:]
            node.input.append(tensor)
    del copy.graph.node[:]
    copy.graph.node.extend(kept)
    used = {name for node in kept for name in node.input}
    constants = [entry for entry in copy.graph.initializer if entry.name in used]
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(constants)
    return copy


def residual_block() -> onnx.ModelProto:
    g = QdqBuilder((3, 16, 16))
    g.weighted("Conv", g.image, "c0", (16, 3, 3, 3), pads=[1] * 4)
    r0 = g.quantize(g.node("Relu", ["c0"], "r0"), -5)
    g.weighted("Conv", r0, "c1", (16, 16, 3, 3), pads=[1] * 4)
    r1 = g.quantize(g.node("Relu", ["c1"], "r1"), -4)
    small = g.rng.integers(-63, 64, (16, 16, 3, 3)).astype(np.int8)
    g.weighted("Conv", r1, "c2", small.shape, weight=small, exponent=-10, pads=[1] * 4)
    c2 = g.quantize("c2", -4, np.int8)
    g.quantize(g.node("Relu", [g.node("Add", [c2, r0], "a")], "r2"), -4, output="sum")
    return g.model({"sum": 4})


def test_openvino_skips_the_rounding_between_a_convolution_and_its_add(compiler):
    """OpenVINO 2026.4.1: Conv, FakeQuantize and Add become one kernel, which adds unrounded."""
    engine = compiler("openvino")
    row = measure_target(engine, reference(residual_block()), load_profile("openvino").verify)
    assert row.differing
    assert row.first.op_type == "Relu"
    assert "skips the rounding" in row.cause
    found = engine.run(static_copy(residual_block(), 1), images()).outputs[0]
    unrounded = static_copy(without_rounding(residual_block(), "c2"), 1)
    expected = OnnxruntimeEngine(mode="unoptimized", threads=1).run(unrounded, images())
    np.testing.assert_array_equal(found, expected.outputs[0])


def test_openvino_is_exact_where_nothing_is_rounded_in_between(compiler):
    """Also behind the Add, which it computes in bfloat16 if it may."""
    g = QdqBuilder((3, 16, 16))
    g.weighted("Conv", g.image, "c0", (16, 3, 3, 3), pads=[1] * 4)
    r0 = g.quantize(g.node("Relu", ["c0"], "r0"), -5)
    small = g.rng.integers(-63, 64, (16, 16, 3, 3)).astype(np.int8)
    g.weighted("Conv", r0, "c1", small.shape, weight=small, pads=[1] * 4)
    r1 = g.quantize(g.node("Relu", ["c1"], "r1"), -4)
    g.weighted("Conv", r1, "c2", small.shape, weight=small, exponent=-10, pads=[1] * 4)
    r2 = g.quantize(g.node("Relu", [g.node("Add", ["c2", r0], "a")], "r2"), -4)
    g.weighted("Conv", r2, "c3", small.shape, weight=small, exponent=-10, pads=[1] * 4)
    g.quantize(g.node("Relu", ["c3"], "r3"), -3, output="features")
    expected = reference(g.model({"features": 4}))
    row = measure_target(compiler("openvino"), expected, load_profile("openvino").verify)
    assert (row.verdict, row.cause) == ("exact", "")


@pytest.mark.parametrize("zero_point", ["auto", "below"])
def test_rknn_is_exact_with_zero_points_below_the_middle(compiler, zero_point, tmp_path):
    """Convolutions, signed sums and pools of random networks, quantized twice."""
    settings = QuantizeSettings(zero_point=zero_point)
    check = load_profile("rknn").verify
    for seed in (0, 1, 2):
        proto, _ = written(seed, tmp_path, settings)
        given = np.random.default_rng(seed).normal(size=(3, 1, 3, 12, 12)).astype(np.float32)
        found = Reference.measure(static_copy(to_older_opset(proto, 19, where=""), 1), given)
        row = measure_target(compiler("rknn"), found, check)
        assert row.refused == ""
        assert row.verdict == ("exact" if zero_point == "below" else "explained")
        assert ("--target rknn" in row.cause) is (zero_point == "auto")


def test_rknn_gives_signed_tensors_scales_of_its_own(compiler):
    """rknn-toolkit2 2.5.0: an int8 input of scale s is taken in steps of 128/127 s."""
    g = QdqBuilder((3, 16, 16))
    g.weighted("Conv", g.image, "c1", (16, 3, 3, 3), pads=[1] * 4)
    g.quantize(g.node("Relu", ["c1"], "r1"), -3, output="features")
    whole = QuantizedGraph(static_copy(g.model({"features": 4}), 1))
    cut = static_copy(cut_at(whole, ("image_q",))[0], 1)
    found = compiler("rknn").run(cut, images()).outputs[0]
    steps = np.unique(np.abs(found[found != 0])) / 2.0**-5
    np.testing.assert_allclose(steps, np.rint(steps * 127 / 128) * 128 / 127, rtol=1e-3)
