"""Rewrites before quantization change no value."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from graph_tools.model import initializers, load
from graph_tools.prepare import prepare_for_quantization

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def positive(*shape):
    return RNG.uniform(0.5, 2, size=shape).astype(np.float32)


def operators(model):
    return Counter(node.op_type for node in model.proto.graph.node)


def assert_same_values(before, after, run_onnx):
    image = RNG.normal(size=(2, *before.input.shape)).astype(np.float32)
    for exact, found in zip(
        run_onnx(before.proto, image), run_onnx(after.proto, image), strict=True
    ):
        # float32 weights are rounded once more than in the original
        np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-5 * np.abs(exact).max())


def test_affine_behind_a_convolution_is_folded(make_model, run_onnx):
    model = make_model(
        "g (float[N,3,8,8] x) => (float[N,4,8,8] y) {"
        " c = Conv<pads=[1,1,1,1]>(x, w) m = Mul(c, s) a = Add(t, m) d = Sub(a, t)"
        " e = Div(d, s) y = Relu(e) }",
        w=normal(4, 3, 3, 3),
        s=positive(4, 1, 1),
        t=normal(1, 4, 1, 1),
    )
    prepared = prepare_for_quantization(model)
    assert operators(prepared) == {"Conv": 1, "Relu": 1}
    assert_same_values(model, prepared, run_onnx)


def test_batch_norm_without_a_convolution_becomes_depthwise(make_model, run_onnx):
    model = make_model(
        "g (float[N,3,8,8] x) => (float[N,3,8,8] y) {"
        " b = BatchNormalization(x, g, be, m, v) y = Relu(b) }",
        g=positive(3),
        be=normal(3),
        m=normal(3),
        v=positive(3),
    )
    prepared = prepare_for_quantization(model)
    assert operators(prepared) == {"Conv": 1, "Relu": 1}
    assert_same_values(model, prepared, run_onnx)


def test_normalization_of_the_input_becomes_a_convolution(make_model, run_onnx):
    model = make_model(
        "g (float[N,3,8,8] x) => (float[N,4,8,8] y) {"
        " a = Sub(x, m) b = Div(a, s) y = Conv<pads=[1,1,1,1]>(b, w) }",
        m=normal(3, 1, 1),
        s=positive(3, 1, 1),
        w=normal(4, 3, 3, 3),
    )
    prepared = prepare_for_quantization(model)
    assert operators(prepared) == {"Conv": 2}
    assert_same_values(model, prepared, run_onnx)


def test_scalar_chains_inside_are_left_alone(make_model, run_onnx):
    model = make_model(
        "g (float[N,3,8,8] x) => (float[N,4,8,8] y) {"
        " c = Conv<pads=[1,1,1,1]>(x, w) p = Sigmoid(c) q = Add(p, three) y = Mul(q, c) }",
        w=normal(4, 3, 3, 3),
        three=np.float32(3),
    )
    prepared = prepare_for_quantization(model)
    assert operators(prepared) == {"Conv": 1, "Sigmoid": 1, "Add": 1, "Mul": 1}
    assert_same_values(model, prepared, run_onnx)


@pytest.mark.parametrize("keepdims", [0, 1])
def test_means_over_space_and_matmul_become_global_pool_and_gemm(
    make_model, run_onnx, keepdims
):
    flatten = "f = Flatten(p)" if keepdims else "f = Identity(p)"
    model = make_model(
        "g (float[N,3,8,8] x) => (float[N,5] y) {"
        f" p = ReduceMean<axes=[2,3], keepdims={keepdims}>(x) {flatten}"
        " m = MatMul(f, w) y = Add(m, b) }",
        w=normal(3, 5),
        b=normal(5),
    )
    prepared = prepare_for_quantization(model)
    assert operators(prepared) == {"GlobalAveragePool": 1, "Flatten": 1, "Gemm": 1}
    assert_same_values(model, prepared, run_onnx)


def test_average_pool_over_everything_is_global(make_model, run_onnx):
    model = make_model(
        "g (float[N,3,8,8] x) => (float[N,3,1,1] y) { y = AveragePool<kernel_shape=[8,8]>(x) }"
    )
    prepared = prepare_for_quantization(model)
    assert operators(prepared) == {"GlobalAveragePool": 1}
    assert_same_values(model, prepared, run_onnx)


def test_relu6_bounds_become_powers_of_two(make_model, run_onnx):
    model = make_model(
        "g (float[N,3,8,8] x) => (float[N,5] y) {"
        " c = Conv<pads=[1,1,1,1]>(x, w) r = Clip(c, zero, six)"
        " d = Conv<group=4, pads=[1,1,1,1]>(r, dw) s = Clip(d, zero, six)"
        " p = GlobalAveragePool(s) f = Flatten(p) y = Gemm<transB=1>(f, fc, b) }",
        w=5 * normal(4, 3, 3, 3),
        dw=5 * normal(4, 1, 3, 3),
        fc=normal(5, 4),
        b=normal(5),
        zero=np.float32(0),
        six=np.float32(6),
    )
    prepared = prepare_for_quantization(model)
    constants = initializers(prepared.proto)
    bounds = [
        float(constants[n.input[2]]) for n in prepared.proto.graph.node if n.op_type == "Clip"
    ]
    assert bounds == [8.0, 8.0]
    assert_same_values(model, prepared, run_onnx)


def test_a_bound_that_an_add_reads_is_kept(make_model, run_onnx):
    model = make_model(
        "g (float[N,3,8,8] x) => (float[N,3,8,8] y) {"
        " c = Conv<pads=[1,1,1,1]>(x, w) r = Clip(c, zero, six) y = Add(r, x) }",
        w=5 * normal(3, 3, 3, 3),
        zero=np.float32(0),
        six=np.float32(6),
    )
    prepared = prepare_for_quantization(model)
    clip = next(n for n in prepared.proto.graph.node if n.op_type == "Clip")
    assert float(initializers(prepared.proto)[clip.input[2]]) == 6.0
    assert_same_values(model, prepared, run_onnx)


def test_shared_weights_are_separated(make_model, run_onnx):
    model = make_model(
        "g (float[N,3,8,8] x) => (float[N,3,8,8] y) {"
        " a = Conv<pads=[1,1,1,1]>(x, w) b = Mul(a, s) y = Conv<pads=[1,1,1,1]>(b, w) }",
        w=normal(3, 3, 3, 3),
        s=positive(3, 1, 1),
    )
    prepared = prepare_for_quantization(model)
    weights = [n.input[1] for n in prepared.proto.graph.node]
    assert len(set(weights)) == 2
    assert_same_values(model, prepared, run_onnx)


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_automatic_pads_are_written_out(make_model, run_onnx, auto_pad):
    model = make_model(
        "g (float[N,3,9,8] x) => (float[N,4,h,w] y) {"
        f' y = Conv<auto_pad="{auto_pad}", strides=[2,2]>(x, k) }}',
        k=normal(4, 3, 3, 3),
    )
    prepared = prepare_for_quantization(model)
    (node,) = prepared.proto.graph.node
    names = {a.name for a in node.attribute}
    assert names == {"dilations", "group", "kernel_shape", "pads", "strides"}
    assert_same_values(model, prepared, run_onnx)


@pytest.mark.parametrize(
    "name",
    [
        "cifar10_resnet20",
        "mcunet_cifar10_32",
        "mlperftiny_resnet8_cifar10_tf2onnx_bn",
        "mobilenet_v1_025_224_imagenet",
        "ultraface_rfb320",
        "yolo_fastestv2_coco",
    ],
)
def test_real_networks_keep_their_values(shared_models, run_onnx, name):
    model = load(shared_models / f"{name}.onnx")
    prepared = prepare_for_quantization(model)
    assert operators(prepared)["BatchNormalization"] == 0
    assert_same_values(model, prepared, run_onnx)


def test_batch_norm_behind_a_matmul_is_folded(make_model, run_onnx):
    model = make_model(
        "g (float[N,3,4,4] x) => (float[N,5] y) {"
        " f = Flatten(x) a = MatMul(f, w) b = BatchNormalization(a, g, be, m, v) y = Relu(b) }",
        w=normal(48, 5),
        g=positive(5),
        be=normal(5),
        m=normal(5),
        v=positive(5),
    )
    prepared = prepare_for_quantization(model)
    assert operators(prepared) == {"Flatten": 1, "Gemm": 1, "Relu": 1}
    assert_same_values(model, prepared, run_onnx)


def test_batch_norm_of_a_vector_is_folded_into_the_gemm_behind_it(make_model, run_onnx):
    model = make_model(
        "g (float[N,3,8,8] x) => (float[N,5] y) {"
        " p = GlobalAveragePool(x) f = Flatten(p) b = BatchNormalization(f, g, be, m, v)"
        " y = Gemm(b, w, c) }",
        w=normal(3, 5),
        c=normal(5),
        g=positive(3),
        be=normal(3),
        m=normal(3),
        v=positive(3),
    )
    prepared = prepare_for_quantization(model)
    assert operators(prepared) == {"GlobalAveragePool": 1, "Flatten": 1, "Gemm": 1}
    assert_same_values(model, prepared, run_onnx)


def test_pads_that_add_nothing_are_dropped(make_model, run_onnx):
    model = make_model(
        "g (float[N,3,8,8] x) => (float[N,4,4,4] y) {"
        " c = Conv<pads=[1,1,1,1]>(x, w) p = Pad(c, none)"
        " y = AveragePool<kernel_shape=[2,2], strides=[2,2]>(p) }",
        w=normal(4, 3, 3, 3),
        none=np.zeros(8, np.int64),
    )
    prepared = prepare_for_quantization(model)
    assert operators(prepared) == {"Conv": 1, "AveragePool": 1}
    assert_same_values(model, prepared, run_onnx)


@pytest.mark.parametrize("pads", [[0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 1]])
@pytest.mark.parametrize("include", [0, 1])
@pytest.mark.parametrize("strides", [[2, 2], [2, 3], [4, 4]])
def test_average_pools_are_rounded_down(make_model, run_onnx, pads, include, strides):
    model = make_model(
        "g (float[N,3,9,10] x) => (float[N,3,h,w] y) {"
        f" y = AveragePool<kernel_shape=[3,2], pads={pads}, strides={strides},"
        f" ceil_mode=1, count_include_pad={include}>(x) }}"
    )
    prepared = prepare_for_quantization(model)
    pool = next(n for n in prepared.proto.graph.node if n.op_type == "AveragePool")
    attributes = {a.name: a.i for a in pool.attribute}
    assert attributes["ceil_mode"] == 0
    assert "dilations" not in attributes  # onnxruntime's integer kernel does not know it
    assert_same_values(model, prepared, run_onnx)
